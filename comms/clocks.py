"""What time it is on rank 0: the difference between two ranks' clocks, measured over the wire between them.

Why: spans of different hosts can be laid beside each other, and a wait split into its causes, only on one clock; time.perf_counter starts
anywhere and runs a few millionths fast or slow.

As NTP does it: a rank asks, rank 0 answers with its clock. The answer was given between the question's departure and its own
arrival, so the middle of the two is wrong by half of the round trip at most; of several exchanges the fastest is kept.

::

    rank r   asked ------------------------- answered          offset = rank 0's clock - (asked + answered) / 2
                    \\                     /
    rank 0            `-- reads its clock -'
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from comms.links import naming_the_peer
from comms.place import Place
from comms.transport import wait_for

NUM_EXCHANGES = 16
NS = 1_000_000_000


class ClockOffset(NamedTuple):
    """Add ``seconds`` to this rank's clock to get rank 0's. ``at``: when, on this rank's clock; the truth lies within +- ``uncertainty``
    seconds."""

    at: float
    seconds: float
    uncertainty: float


def offset_to_rank_0(place: Place, device: torch.device, clock: Callable[[], float]) -> ClockOffset:
    """Collective over all ranks, on the default group. Rank 0 answers one rank after the other, NUM_EXCHANGES round trips each.

    device: of this rank, used where the group carries only CUDA tensors. Raises PeerLost.
    """
    message = torch.zeros((), dtype=torch.int64, device=device if dist.get_backend() == "nccl" else "cpu")  # nanoseconds
    if place.rank == 0:
        for rank in range(1, place.world_size):
            with naming_the_peer(f"comparing clocks with {place.at(rank).in_words}"):
                _answer(rank, message, clock)
        return ClockOffset(clock(), 0.0, 0.0)
    with naming_the_peer("comparing clocks with rank 0"):
        return min((_ask(message, clock) for _ in range(NUM_EXCHANGES)), key=lambda offset: offset.uncertainty)


def _answer(rank: int, message: torch.Tensor, clock: Callable[[], float]) -> None:
    for _ in range(NUM_EXCHANGES):
        wait_for(dist.irecv(message, src=rank))
        message.item()  # NCCL: only now it is here
        message.fill_(round(clock() * NS))
        wait_for(dist.isend(message, dst=rank))


def _ask(message: torch.Tensor, clock: Callable[[], float]) -> ClockOffset:
    asked = clock()
    wait_for(dist.isend(message, dst=0))
    wait_for(dist.irecv(message, src=0))
    there = int(message.item()) / NS
    answered = clock()
    return ClockOffset(answered, there - (asked + answered) / 2, (answered - asked) / 2)


def on_rank_0(t: float, first: ClockOffset, last: ClockOffset) -> float:
    """Rank 0's clock when this rank's showed ``t``: between the two measurements the offset is taken to drift evenly."""
    if last.at <= first.at:
        return t + first.seconds
    return t + first.seconds + (last.seconds - first.seconds) * (t - first.at) / (last.at - first.at)
