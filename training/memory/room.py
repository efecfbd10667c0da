"""What memory a rank finds, what it is predicted to need, and where the second clearly exceeds the
first.

A needless refusal is worse than a late end for want of memory. So everything that may become room
counts as room: swap, and what file caches and ZFS give back. The copy that an asynchronous
checkpoint makes does not count as needed, because a save does without it. And a run is refused only
where the prediction, which holds to some 15 %, exceeds the room even if it is 15 % too high.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from pipeline_parallel.partition import size_in_words
from training.job.host_limits import free_memory

PREDICTION_HOLDS_TO = 0.15
ARC_SIZE = Path("/proc/spl/kstat/zfs/arcstats")  # ZFS's cache, which Linux does not count as available
GROUP_FILES = (Path("/proc/self/cgroup"), Path("/proc/self/ns/cgroup"))


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes that a rank is predicted to take: of its host's memory, and of its GPU's."""

    host: int = 0
    gpu: int = 0


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that one rank finds free. host, group, gpu: names that are alike for ranks that share
    that memory (group: a control group, such as a container; gpu: "" without one)."""

    rank: int
    stage: int
    host: str
    group: str
    gpu: str
    host_free: int
    group_free: int
    gpu_free: int

    @property
    def host_name(self) -> str:
        return self.host.partition("/")[0]


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """Ranks that share a memory and are predicted to need more of it than is comfortable.

    where: the memory, in words; kind: "host" or "gpu"."""

    where: str
    kind: str
    ranks: tuple[int, ...]
    stages: tuple[int, ...]
    needed: int
    free: int

    @property
    def is_clear(self) -> bool:
        """Whether it is one however far off the prediction may be."""
        return self.needed * (1 - PREDICTION_HOLDS_TO) > self.free

    def in_words(self) -> str:
        """Who needs how much, and what is there."""
        ranks = ", ".join(map(str, self.ranks))
        who = f"rank {ranks} is" if len(self.ranks) == 1 else f"its {len(self.ranks)} ranks ({ranks}) are"
        swap = ", swap included" if self.kind == "host" else ""
        return f"{who} predicted to take {size_in_words(self.needed)} of {self.where}, of which {size_in_words(self.free)} are free{swap}"


class _Memory(NamedTuple):
    """One kind of memory that ranks may share. name: alike for those that do, "" for none."""

    kind: str
    name: Callable[[Room], str]
    free: Callable[[Room], int]
    in_words: Callable[[Room], str]


_MEMORIES = (
    _Memory(
        "host",
        lambda room: room.host,
        lambda room: room.host_free,
        lambda room: f"the memory of host {room.host_name}",
    ),
    _Memory(
        "host",
        lambda room: f"{room.host} {room.group}",
        lambda room: room.group_free,
        lambda room: f"the memory that a control group (a container) leaves it on {room.host_name}",
    ),
    _Memory(
        "gpu",
        lambda room: room.gpu and f"{room.host} {room.gpu}",
        lambda room: room.gpu_free,
        lambda room: f"the memory of {room.gpu.partition(' ')[0]} on host {room.host_name}",
    ),
)


def shortages(rooms: Sequence[Room], needs: Sequence[Needs]) -> list[Shortage]:
    """Where ``needs`` (one per room, by rank) are not comfortably below what is free, worst first.

    Ranks that share a memory add up. Of what they say of it the largest counts: all looked before
    any of them took much.
    """

    found = []
    for memory in _MEMORIES:
        for name in dict.fromkeys(memory.name(room) for room in rooms):
            here = [place for place, room in enumerate(rooms) if memory.name(room) == name]
            needed = sum(getattr(needs[place], memory.kind) for place in here)
            free = max(memory.free(rooms[place]) for place in here)
            if name and needed * (1 + PREDICTION_HOLDS_TO) > free:
                found.append(
                    Shortage(
                        where=memory.in_words(rooms[here[0]]),
                        kind=memory.kind,
                        ranks=tuple(rooms[place].rank for place in here),
                        stages=tuple(rooms[place].stage for place in here),
                        needed=needed,
                        free=free,
                    )
                )
    return sorted(found, key=lambda shortage: shortage.free / max(1, shortage.needed))


def look_at_room(rank: int, stage: int, host_id: str, device: torch.device) -> Room:
    """What this rank finds free now."""
    swap = psutil.swap_memory().free
    host_free = psutil.virtual_memory().available + swap + _zfs_gives_back()
    group_free = free_memory() + swap + _zfs_gives_back()
    return Room(
        rank=rank,
        stage=stage,
        host=host_id,
        group=_group(),
        gpu=_gpu(device),
        host_free=host_free,
        group_free=group_free,
        gpu_free=_gpu_free(device, host_free),
    )


def _group() -> str:
    membership, namespace = GROUP_FILES
    try:
        return f"{os.stat(namespace).st_ino} {membership.read_text()}"
    except OSError:
        return ""


def _gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    identity = getattr(torch.cuda.get_device_properties(device), "uuid", device.index)
    return f"{device} {identity}"


def _gpu_free(device: torch.device, host_free: int) -> int:
    """A GPU that shares the host's memory may use what its caches give back too."""
    if device.type != "cuda":
        return 0
    free = int(torch.cuda.mem_get_info(device)[0])
    is_shared = getattr(torch.cuda.get_device_properties(device), "is_integrated", 0)
    return max(free, host_free) if is_shared else free


def _zfs_gives_back() -> int:
    try:
        lines = ARC_SIZE.read_text().splitlines()
    except OSError:
        return 0
    sizes = [line.split()[2] for line in lines if line.startswith("size ")]
    return int(sizes[0]) if sizes else 0


def at_most(
    *,
    num_parameters: int,
    num_layers: int,
    num_tokens: int,
    seq_length: int,
    width: int,
    inner_width: int,
    num_heads: int,
    vocab_size: int,
    in_flight: int,
) -> int:
    """More bytes than any training of such a stage needs, by a rough count that costs nothing.

    Twice over: 20 bytes a parameter (weight, gradient, master, moments) and the gradients of the
    head; per layer and token some 64 hidden states in fp32 and every attention weight; chunks of
    logits. Where even this fits, nobody has to rehearse.
    """
    of_token = 64 * width + 16 * inner_width + 3 * num_heads * seq_length
    activations = (in_flight + 1) * num_layers * num_tokens * of_token * 4
    head = 4 * min(num_tokens, 1024) * vocab_size * 4 + vocab_size * width * 8
    return math.ceil(2 * (20 * num_parameters + activations + head))
