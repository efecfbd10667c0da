"""Greedy decoders over forked ranks, and prompts for them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from comms.groups import Groups, join_process_group, make_closing_group, make_groups
from comms.place import Place, place_of
from comms.spans import Spans
from modules.stage import Stage
from pipeline_parallel.decode import Decoder, Generated
from training.job.job import COLLECTIVE_TIMEOUT

NUM_POSITIONS, VOCABULARY = 64, 320  # of the tiny models


NO_END = VOCABULARY  # an id that nothing generates


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


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


def without_margins(answers: list[Generated]) -> list[tuple[list[int], bool]]:
    return [(one.ids, one.ended) for one in answers]
