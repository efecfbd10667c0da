"""The process groups of a job, made once, by all ranks in the same order.

One group per direction and neighbour pair (what NCCL needs to overlap, and what keeps gloo's messages apart), several per set of
replicas (one TCP stream does not fill a long link), one for token ids, and the default group of all ranks for the step's one
reduction."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout  # no public name before torch 2.13

from comms.place import Place

NUM_REPLICA_GROUPS = {"gloo": 4, "nccl": 1}


@dataclass(frozen=True, kw_only=True)
class PairGroups:
    """The two directions between a stage and the next one."""

    activations: dist.ProcessGroup
    gradients: dist.ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups this rank is a member of. to_next/to_previous are None at the ends of the pipeline, replicas is empty without replicas."""

    to_previous: PairGroups | None
    to_next: PairGroups | None
    replicas: tuple[dist.ProcessGroup, ...]
    tokens: dist.ProcessGroup


def join_process_group(place: Place, store: dist.Store, backend: str, timeout: timedelta, connect_timeout: timedelta | None = None) -> None:
    """Make the default group of all ranks over ``store``. Called by all ranks; ends when all have come. connect_timeout: for that, where
    it is not ``timeout``: in gloo one rank of each pair waits to be called, and nothing can wake it."""
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=connect_timeout or timeout)
    _set_pg_timeout(timeout)


def make_groups(place: Place, backend: str, timeout: timedelta, connect_timeout: timedelta | None = None) -> Groups:
    """Make every group of the grid. Collective over all ranks: all call it, in the same order, also for groups they are not in.
    connect_timeout: as in join_process_group()."""

    def new_group(ranks: list[int]) -> dist.ProcessGroup:
        return _new_group(ranks, place, backend, timeout, connect_timeout)

    to_previous = to_next = None
    for dp in range(place.dp_size):
        for pp in range(place.pp_size - 1):
            first = dp * place.pp_size + pp
            pair = PairGroups(activations=new_group([first, first + 1]), gradients=new_group([first, first + 1]))
            if backend == "nccl" and place.rank in (first, first + 1):
                _open_on_nccl(pair, first, place.rank)
            if place.rank == first:
                to_next = pair
            if place.rank == first + 1:
                to_previous = pair
    replicas: tuple[dist.ProcessGroup, ...] = ()
    if place.dp_size > 1:
        for pp in range(place.pp_size):
            ranks = place.replica_ranks_of(pp)
            made = tuple(new_group(ranks) for _ in range(NUM_REPLICA_GROUPS[backend]))
            if place.pp == pp:
                replicas = made
    return Groups(to_previous=to_previous, to_next=to_next, replicas=replicas, tokens=new_group(list(range(place.world_size))))


def _new_group(ranks: list[int], place: Place, backend: str, timeout: timedelta, connect_timeout: timedelta | None) -> dist.ProcessGroup:
    group = dist.new_group(ranks, timeout=connect_timeout or timeout, backend=backend)
    if place.rank in ranks:
        _set_pg_timeout(timeout, group)
    return group


def make_closing_group(
    place: Place, groups: Groups, backend: str, timeout: timedelta, connect_timeout: timedelta | None = None
) -> dist.ProcessGroup | None:
    """From each pipeline's last stage back to its first, for tokens (pipeline_parallel/decode.py). Collective over all ranks, in the same
    order as whatever other groups they make. With two stages it is the group in which gradients travel, with one and between: None."""
    if place.pp_size <= 2:
        pair = groups.to_next or groups.to_previous
        return None if pair is None else pair.gradients
    own = None
    for dp in range(place.dp_size):
        first, last = dp * place.pp_size, (dp + 1) * place.pp_size - 1
        group = _new_group([first, last], place, backend, timeout, connect_timeout)
        if place.rank in (first, last):
            own = group
            if backend == "nccl":
                _send_an_element(group, sender=last, receiver=first, rank=place.rank)
    return own


def _open_on_nccl(pair: PairGroups, first: int, rank: int) -> None:
    """One element each way. nccl connects on the first message and blocks for it; later, each neighbour would begin with another
    direction, and both would wait for ever."""
    _send_an_element(pair.activations, sender=first, receiver=first + 1, rank=rank)
    _send_an_element(pair.gradients, sender=first + 1, receiver=first, rank=rank)


def _send_an_element(group: dist.ProcessGroup, *, sender: int, receiver: int, rank: int) -> None:
    element = torch.zeros(1, device="cuda")
    if rank == sender:
        dist.send(element, dst=receiver, group=group)
    else:
        dist.recv(element, src=sender, group=group)
