"""Where a rank stands in the grid of replicas x stages. Pure arithmetic; built once and passed explicitly.

rank = replica * num_stages + stage, so that the stages of one pipeline are neighbours in rank. For 2 replicas of 3 stages::

              stage 0   stage 1   stage 2
    replica 0    0         1         2      <- activations flow to the right, gradients back to the left
    replica 1    3         4         5
                 |         |         |
                 +-- gradients of a stage are summed over its column
"""

from collections.abc import Collection
from dataclasses import dataclass

from user_error import UserError


@dataclass(frozen=True, kw_only=True)
class Place:
    """The coordinates of one rank: pp is the stage, dp the replica."""

    rank: int
    dp: int
    pp: int
    dp_size: int
    pp_size: int

    @property
    def world_size(self) -> int:
        return self.dp_size * self.pp_size

    @property
    def is_first_stage(self) -> bool:
        return self.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp == self.pp_size - 1

    def replica_ranks_of(self, stage: int) -> list[int]:
        """The ranks that hold the layers of ``stage``, by replica: the members of its gradient sum."""
        return [dp * self.pp_size + stage for dp in range(self.dp_size)]

    def at(self, rank: int) -> "Place":
        """The place of another rank of the same grid."""
        return place_of(rank, dp_size=self.dp_size, pp_size=self.pp_size)

    def __str__(self) -> str:
        return f"dp{self.dp}/pp{self.pp}"

    @property
    def in_words(self) -> str:
        return f"rank {self.rank} (stage {self.pp} of {self.pp_size}, replica {self.dp} of {self.dp_size})"


def place_of(rank: int, *, dp_size: int, pp_size: int) -> Place:
    """The place of ``rank``. Raises UserError when it lies outside the grid."""
    world_size = dp_size * pp_size
    if not 0 <= rank < world_size:
        raise UserError(f"--rank must be 0 .. {world_size - 1} (world size {world_size}); it is {rank}. Give every process its own rank")
    return Place(rank=rank, dp=rank // pp_size, pp=rank % pp_size, dp_size=dp_size, pp_size=pp_size)


def whole_replicas(present: Collection[int], *, dp_size: int, pp_size: int) -> list[int]:
    """Of the ranks that are there, those whose pipeline is whole; [] unless that of rank 0 is, where the data is read."""
    replicas = [range(dp * pp_size, (dp + 1) * pp_size) for dp in range(dp_size)]
    whole = [ranks for ranks in replicas if all(rank in present for rank in ranks)]
    return [rank for ranks in whole for rank in ranks] if replicas[0] in whole else []
