"""Greedy generation through the stages of a pipeline: Hugging Face's tokens at every cut, and nothing left over for the training."""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.decoding import NO_END, NUM_POSITIONS, VOCABULARY, decoder_of, decoder_over, prompts_of, without_margins
from support.models import make_model, make_neox_model
from support.ranks import example_tokens, run_ranks
from support.stages import load
from support.tiers import sample
from torch import Tensor
from transformers import AutoModelForCausalLM

from comms.groups import join_process_group, make_groups
from comms.links import MessageStream
from comms.place import place_of
from comms.spans import Spans
from comms.transport import make_transport
from modules.lm_ops import Segments
from pipeline_parallel.decode import Decoder, Generated, groups_of
from pipeline_parallel.partition import even_cut
from training.compute.gradient import GlobalGradient, Schedule
from training.job.job import COLLECTIVE_TIMEOUT
from user_error import UserError


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


@sample(1)
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
    early = [set(one.ids[:6]) for one in free]
    eos = max(range(VOCABULARY), key=lambda token: sum(token in ids for ids in early) % len(free))  # what many say early, not all
    longest = prompts_of([NUM_POSITIONS - 12, 2], seed=1)
    asks: list[Ask] = [
        (prompts, 12, NO_END),
        (prompts, 12, eos),
        (prompts[:4], 1, NO_END),
        (longest, 12, NO_END),
        ([prompts[1]], 5, NO_END),
    ]
    expected = [expected_of(folder, *ask) for ask in asks]
    assert 2 <= sum(one.ended and len(one.ids) < 6 for one in expected[1]) < len(prompts)
    for num_stages, batch_size in ((1, 4), (2, 4), (3, 7), (4, 64), (4, 2)):
        answers = generate(folder, tmp_path / f"{num_stages} {batch_size}", num_stages, asks, batch_size)
        for ask, found, wanted in zip(asks, answers, expected, strict=True):
            assert without_margins(found) == without_margins(wanted), (num_stages, batch_size, ask[1:])
            assert all(one.margin > 0 for one in found)


def test_the_margin_is_that_of_the_closest_decision(model_folder: Path, tmp_path: Path) -> None:
    """By the logits of the whole sequence, computed anew; the end token's decision counts too."""
    prompts, stage = prompts_of([7, 4]), load(model_folder)
    free = generate(model_folder, tmp_path, 2, [(prompts, 6, NO_END)], 2)[0]
    eos = free[0].ids[3]
    found = generate(model_folder, tmp_path, 2, [(prompts, 6, eos)], 2)[0]
    assert found[0].ended and found[0].ids == free[0].ids[: free[0].ids.index(eos)]
    for prompt, one in zip(prompts, found, strict=True):
        said = one.ids + [eos] * one.ended
        ids = torch.tensor([prompt + said])
        with torch.no_grad():
            logits = stage.logits(stage(ids, Segments.from_positions(torch.arange(ids.shape[1])[None])))[0, len(prompt) - 1 : -1]
        assert logits.argmax(1).tolist() == said
        best, second = logits.topk(2).values.T
        assert one.margin == pytest.approx(float((best - second).min()), abs=1e-4)


def test_equal_logits_choose_the_smallest_id_and_have_no_margin(model_folder: Path) -> None:
    stage = load(model_folder)
    with torch.no_grad():
        for row in (7, 200):
            stage.head.weight[row] = 0
            stage.head.bias[row] = 1e4
    ids, margins = stage.next_tokens(torch.randn(3, 32))
    assert ids.tolist() == [7, 7, 7] and margins.tolist() == [0, 0, 0]


def test_groups_fill_the_pipeline_longest_first_and_hold_everybody_once() -> None:
    lengths = [5, 9, 1, 9, 3, 2, 8]
    assert groups_of(lengths, 4, 2) == [[1, 3], [6, 0], [4, 5], [2]]
    assert groups_of(lengths, 64, 3) == [[1, 3, 6], [0, 4, 5], [2]]
    assert groups_of(lengths, 1, 4) == [[1], [3], [6], [0], [4], [5], [2]]
    assert groups_of([], 4, 2) == []
    for batch_size, num_stages, number in itertools.product((1, 2, 5, 8), (1, 2, 3), (1, 4, 9, 30)):
        groups = groups_of(range(number), batch_size, num_stages)
        assert sorted(itertools.chain(*groups)) == list(range(number))
        assert min(num_stages, len(groups)) * max(map(len, groups)) <= max(batch_size, 1) or batch_size < num_stages


def test_all_stages_have_a_group_under_way(model_folder: Path, tmp_path: Path) -> None:
    """Between two visits of one group a stage visits the other ones: the first stage sends S groups before it wants a token back."""
    num_stages = 3

    def rank_main(rank: int, store: dist.Store) -> None:
        spans = Spans(record=True)
        stage = load(model_folder, *even_cut(4, num_stages)[rank])
        decoder = decoder_of(stage, rank, store, num_stages, 6, spans)
        decoder.generate(prompts_of([4] * 6) if rank == 0 else None, max_new_tokens=5, eos_token_id=NO_END)
        if rank == 0:
            names = [span.name for span in spans.recorded if span.name in ("forward", "receiving tokens")]
            assert names == ["forward"] * 3 + ["receiving tokens", "forward"] * 12 + ["receiving tokens"] * 3

    run_ranks(rank_main, num_stages, tmp_path)


def test_a_group_that_has_ended_costs_no_more_forwards(model_folder: Path, tmp_path: Path) -> None:
    """Word of it travels with the messages: every stage stops at once, and goes on with the next group."""
    prompts = prompts_of([4, 4, 4, 4], seed=3)
    free = expected_of(model_folder, prompts[:1], 20, NO_END)[0].ids
    eos = free[2]
    steps = [len(one.ids) + one.ended for one in expected_of(model_folder, prompts, 20, eos)]
    assert steps[0] <= 3

    def rank_main(rank: int, store: dist.Store) -> None:
        spans = Spans(record=True)
        decoder = decoder_of(load(model_folder, *even_cut(4, 2)[rank]), rank, store, 2, 2, spans)
        decoder.generate(prompts if rank == 0 else None, max_new_tokens=20, eos_token_id=eos)
        assert sum(span.name == "forward" for span in spans.recorded) == sum(steps)  # groups of one

    run_ranks(rank_main, 2, tmp_path)


def test_messages_of_training_and_generation_do_not_meet(model_folder: Path, tmp_path: Path) -> None:
    """Steps, evaluations and generations in turn over the same groups: gradients are those of steps alone, answers those of generation."""
    tokens, num_targets = example_tokens(8, 24, VOCABULARY)
    prompts = prompts_of([3, 9, 5, 2, 7])
    expected = without_margins(expected_of(model_folder, prompts, 6, NO_END))
    for num_stages in (2, 3):
        folder = tmp_path / str(num_stages)
        folder.mkdir()

        def rank_main(rank: int, store: dist.Store, num_stages: int = num_stages) -> None:
            place = place_of(rank, dp_size=1, pp_size=num_stages)
            join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
            groups, stage = make_groups(place, "gloo", COLLECTIVE_TIMEOUT), load(model_folder, *even_cut(4, num_stages)[rank])
            gradient = GlobalGradient(
                place=place,
                groups=groups,
                stage=stage,
                spans=Spans(),
                peer_names=[f"rank {r}" for r in range(num_stages)],
                schedule=Schedule(mode="zb"),
                batch_size=8,
                micro_batch_size=2,
                seq_length=24,
                clip_grad_norm=0,
            )
            decoder = decoder_over(place, groups, stage, 4)

            def step() -> list[Tensor]:
                gradient.compute(tokens[None], num_targets)
                found = [parameter.grad.clone() for parameter in stage.parameters() if parameter.grad is not None]
                gradient.forget()
                return found

            alone = step()
            for _ in range(2):
                found = decoder.generate(prompts if rank == 0 else None, max_new_tokens=6, eos_token_id=NO_END)
                assert rank > 0 or without_margins(found or []) == expected
                assert all(torch.equal(one, other) for one, other in zip(alone, step(), strict=True)) and alone
                gradient.evaluate(tokens[:, :, :24])

        run_ranks(rank_main, num_stages, folder)


def test_two_pipelines_generate_on_their_own(model_folder: Path, tmp_path: Path) -> None:
    """Each of two replicas has a closing group of its own, and its own prompts, one of them none."""
    prompts = [prompts_of([3, 9, 5]), []]
    expected = [without_margins(expected_of(model_folder, prompts[0], 4, NO_END)), []]

    def rank_main(rank: int, store: dist.Store) -> None:
        place = place_of(rank, dp_size=2, pp_size=3)
        join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
        stage = load(model_folder, *even_cut(4, 3)[place.pp])
        decoder = decoder_over(place, make_groups(place, "gloo", COLLECTIVE_TIMEOUT), stage, 4)
        found = decoder.generate(prompts[place.dp] if place.pp == 0 else None, max_new_tokens=4, eos_token_id=NO_END)
        assert place.pp > 0 or without_margins(found or []) == expected[place.dp]

    run_ranks(rank_main, 6, tmp_path)


def test_bf16_stages_generate_nearly_what_fp32_does(model_folder: Path, tmp_path: Path) -> None:
    """Where the first decision is wide enough for bf16, it is the same at every cut."""
    prompts = prompts_of([3, 17, 9, 5, 8, 12, 20, 2])
    exact = generate(model_folder, tmp_path, 1, [(prompts, 1, NO_END)], 4)[0]
    wide = [number for number, one in enumerate(exact) if one.margin > 0.2]
    assert len(wide) >= 2
    for num_stages in (1, 2):
        rounded = generate(model_folder, tmp_path, num_stages, [(prompts, 1, NO_END), (prompts, 8, NO_END)], 4, torch.bfloat16)
        assert [rounded[0][number].ids for number in wide] == [exact[number].ids for number in wide]
        assert all(len(one.ids) == 8 for one in rounded[1])
        assert any(one.margin != other.margin for one, other in zip(exact, rounded[0], strict=True)), "it was not bf16"


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([[1], []], "prompt 1 .* has none"),
        ([[1] * 60], r"64 positions; prompt 0 .* has 60 tokens, and 5 more are .*--max-new-tokens"),
        ([[1, 320]], r"0 \.\. 319; those of prompt 0 .* are 1 \.\. 320"),
        ([[-1]], r"are -1 \.\. -1"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts: list[list[int]], says: str, model_folder: Path, tmp_path: Path) -> None:
    def refused(decoder: Decoder) -> None:
        with pytest.raises(UserError, match=says):
            decoder.generate(prompts, max_new_tokens=5, eos_token_id=0)
        assert decoder.generate([[1] * 59], max_new_tokens=5, eos_token_id=NO_END)

    in_one_process(model_folder, tmp_path, refused)


def in_one_process(model_folder: Path, tmp_path: Path, work: Callable[[Decoder], None]) -> None:
    run_ranks(lambda rank, store: work(decoder_of(load(model_folder), rank, store, 1, 4)), 1, tmp_path)


def test_a_stream_carries_messages_of_any_size_in_order_beyond_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comms.links.NUM_TAGS", 3)

    def rank_main(rank: int, store: dist.Store) -> None:
        join_process_group(place_of(rank, dp_size=1, pp_size=2), store, "gloo", COLLECTIVE_TIMEOUT)
        group = dist.new_group([0, 1])
        transport = make_transport(send_group=group, recv_group=group, peer=1 - rank, device=torch.device("cpu"))
        stream, sizes = MessageStream(transport, "the other"), [1, 70_000, 3, 8, 1, 2_000_000, 5, 6, 7]
        if rank == 0:
            for number, size in enumerate(sizes):
                stream.put(torch.full((size,), number, dtype=torch.uint8))
            stream.flush()
        else:
            for size in sizes:
                stream.post(size)
            for number, size in enumerate(sizes):
                assert torch.equal(stream.take(), torch.full((size,), number, dtype=torch.uint8))
        stream.close()

    run_ranks(rank_main, 2, tmp_path)
