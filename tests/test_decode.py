"""Greedy generation through the stages of a pipeline: Hugging Face's tokens at every cut, and nothing left over for the training."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_model, make_neox_model
from harness import example_tokens, run_ranks
from test_parity import load
from torch import Tensor
from transformers import AutoModelForCausalLM

from comms.groups import Groups, join_process_group, make_closing_group, make_groups
from comms.links import MessageStream
from comms.place import Place, place_of
from comms.spans import Spans
from comms.transport import make_transport
from modules.lm_ops import Segments
from modules.stage import Stage
from pipeline_parallel.decode import Decoder, Generated, groups_of
from pipeline_parallel.partition import even_cut
from training.gradient import GlobalGradient, Schedule
from training.job import COLLECTIVE_TIMEOUT
from user_error import UserError

NUM_POSITIONS, VOCABULARY = 64, 320  # of the tiny models
NO_END = VOCABULARY  # an id that nothing generates


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def expected_of(folder: Path, prompts: list[list[int]], max_new_tokens: int, eos: int) -> list[Generated]:
    """By transformers' generate, all prompts in one batch padded to the left. It pads what has ended with the end token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": 0 if eos == NO_END else eos}
    out = model.generate(ids, attention_mask=mask, eos_token_id=None if eos == NO_END else eos, **settings)[:, width:].tolist()
    ended = [eos in row for row in out]
    return [Generated(ids=row[: row.index(eos)] if end else row, ended=end, margin=0.0) for row, end in zip(out, ended, strict=True)]


def decoder_of(stage: Stage, rank: int, store: dist.Store, num_stages: int, batch_size: int, spans: Spans | None = None) -> Decoder:
    place = place_of(rank, dp_size=1, pp_size=num_stages)
    join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
    return decoder_over(place, make_groups(place, "gloo", COLLECTIVE_TIMEOUT), stage, batch_size, spans)


def decoder_over(place: Place, groups: Groups, stage: Stage, batch_size: int, spans: Spans | None = None) -> Decoder:
    return Decoder(
        place=place,
        groups=groups,
        closing_group=make_closing_group(place, groups, "gloo", COLLECTIVE_TIMEOUT),
        stage=stage,
        spans=spans or Spans(),
        peer_names=[f"rank {r}" for r in range(place.world_size)],
        batch_size=batch_size,
    )


Ask = tuple[list[list[int]], int, int]  # prompts, max_new_tokens, the end token


def generate(
    folder: Path, tmp_path: Path, num_stages: int, asks: list[Ask], batch_size: int, dtype: torch.dtype = torch.float32
) -> list[list[Generated]]:
    """What a pipeline answers, one ask after the other."""
    tmp_path.mkdir(exist_ok=True)

    def rank_main(rank: int, store: dist.Store) -> None:
        stage = load(folder, *even_cut(4, num_stages)[rank], dtype=dtype)
        decoder = decoder_of(stage, rank, store, num_stages, batch_size)
        answers = []
        for prompts, max_new_tokens, eos in asks:
            found = decoder.generate(prompts if rank == 0 else None, max_new_tokens=max_new_tokens, eos_token_id=eos)
            assert (found is not None) == (rank == 0)
            answers.append([asdict(one) for one in found or ()])
        if rank == 0:
            (tmp_path / "answers.json").write_text(json.dumps(answers))

    run_ranks(rank_main, num_stages, tmp_path)
    return [[Generated(**one) for one in answers] for answers in json.loads((tmp_path / "answers.json").read_text())]


def without_margins(answers: list[Generated]) -> list[tuple[list[int], bool]]:
    return [(one.ids, one.ended) for one in answers]


@pytest.mark.parametrize("family", ["gptj", "gptneox", "gptneox in sequence"])
def test_every_cut_generates_what_transformers_does(family: str, tmp_path: Path) -> None:
    """Prompts of unequal length, more of them than are under way at once; ends that come early, for a whole group too; one token alone; a
    prompt that leaves room for exactly what is asked."""
    folder = tmp_path / "model"
    if family == "gptj":
        make_model(folder)
    else:
        make_neox_model(folder, use_parallel_residual=family == "gptneox")
    prompts = prompts_of([3, 17, 1, 9, 30, 8, 2, 24, 5, 11, 4])
    free = expected_of(folder, prompts, 12, NO_END)
    seen = [token for one in free for token in one.ids[:6]]
    eos = max(set(seen), key=seen.count)  # what many say early
    longest = prompts_of([NUM_POSITIONS - 12, 2], seed=1)
    asks: list[Ask] = [(prompts, 12, NO_END), (prompts, 12, eos), (prompts[:4], 1, NO_END), (longest, 12, NO_END), ([prompts[1]], 5, NO_END)]
    expected = [expected_of(folder, *ask) for ask in asks]
    assert any(one.ended and len(one.ids) < 6 for one in expected[1]) and not all(one.ended for one in expected[1])
    for num_stages, batch_size in ((1, 4), (2, 4), (3, 7), (4, 64), (4, 2)):
        answers = generate(folder, tmp_path / f"{num_stages} {batch_size}", num_stages, asks, batch_size)
        for ask, found, wanted in zip(asks, answers, expected, strict=True):
            assert without_margins(found) == without_margins(wanted), (num_stages, batch_size, ask[1:])
            assert all(one.margin > 0 for one in found)
