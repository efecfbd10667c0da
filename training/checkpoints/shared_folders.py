"""Which ranks see the same --checkpoint-path, found by files that they leave there for each other; nobody has to say it.

All ranks of a job may share one folder, or each host have its own under the same name, or anything between. Each distinct folder has a
**keeper**, the lowest rank that sees it: it holds the lock, makes and commits steps, and deletes old ones. Of the ranks that hold the
same layers (the replicas of a stage) the lowest one in each folder **writes** there. So one shared folder is written by replica 0, and of
two hosts with a replica each both hold everything.
"""

import contextlib
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from checkpoint.tensor_file import explained_disk_errors
from comms.place import Place
from training.job.job import COLLECTIVE_TIMEOUT, Job, all_say
from user_error import UserError

TOKEN_PREFIX = ".seen-by."
COLLECTED_PREFIX = ".collected."
SEEN_WITHIN_S = 2.0  # for what another host left to be seen, once a change of this rank's own has made the filesystem look anew


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Equal on all ranks. groups: the ranks that see each distinct folder, in ascending order, the groups by their first rank."""

    groups: tuple[tuple[int, ...], ...]

    def of(self, rank: int) -> tuple[int, ...]:
        """The ranks that see the folder of ``rank``, ``rank`` among them."""
        return next(group for group in self.groups if rank in group)

    def keeper(self, rank: int) -> int:
        """Who keeps the folder that ``rank`` sees."""
        return self.of(rank)[0]

    @property
    def keepers(self) -> list[int]:
        """One rank per folder."""
        return [group[0] for group in self.groups]

    def writes(self, place: Place) -> bool:
        """True if the rank at ``place`` writes its layers into the folder it sees."""
        return place.rank == min(rank for rank in self.of(place.rank) if place.at(rank).pp == place.pp)

    def writers(self, place: Place) -> list[int]:
        """All ranks that write; ``place`` is any rank's."""
        return [rank for rank in range(place.world_size) if self.writes(place.at(rank))]


def find_folders(job: Job, root: Path, *, label: str = "folders") -> Folders:
    """Called by all ranks: make ``root`` where it is missing, and find out who sees whose. label: another one for each kind of root. Raises
    UserError where it cannot be written."""
    place, store = job.place, dist.PrefixStore(label, job.store)
    if place.rank == 0:
        store.set("token", secrets.token_hex(8))
    store.wait(["token"], COLLECTIVE_TIMEOUT)
    token = store.get("token").decode()
    paths = [root / f"{TOKEN_PREFIX}{token}.{rank}" for rank in range(place.world_size)]
    with explained_disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        paths[place.rank].touch()
    try:
        all_say(job, store, "left", True)
        hosts = [entry["host_id"] for entry in job.roster]
        deadline = time.monotonic() + SEEN_WITHIN_S
        while True:
            with contextlib.suppress(OSError):  # NFS keeps for up to a minute what a folder holds, unless this host has changed it
                (look := root / f"{TOKEN_PREFIX}{token}.{place.rank}.look").touch()
                look.unlink()
            seen = [rank for rank, path in enumerate(paths) if path.exists()]
            others_unseen = any(hosts[rank] != hosts[place.rank] for rank in set(range(place.world_size)) - set(seen))
            if not others_unseen or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        all_seen = all_say(job, store, "seen", seen)
    finally:
        with contextlib.suppress(OSError):
            paths[place.rank].unlink()
    all_say(job, store, "tidied", True)  # a rank that finds the folder locked ends the others at once, and would leave their files there
    return group_by_sight(all_seen)


def group_by_sight(seen: list[list[int]]) -> Folders:
    """seen: for each rank, the ranks whose files it found. Raises UserError unless everybody who is seen sees back the same ranks."""
    for rank, found in enumerate(seen):
        for other in found:
            if seen[other] != found:
                raise UserError(
                    f"who shares a --checkpoint-path must see the same files in it; rank {rank} sees those of ranks {found}, rank {other} "
                    f"those of {seen[other]}. Look at the filesystem between their hosts, or give each host a folder of its own"
                )
    return Folders(groups=tuple(sorted({tuple(found) for found in seen})))


def remove_tokens(root: Path) -> None:
    """Remove what killed jobs left of looking around and of collecting layers; for the holder of root's lock."""
    for path in root.glob(f"{TOKEN_PREFIX}*"):
        with contextlib.suppress(OSError):
            path.unlink()
    for path in root.glob(f"{COLLECTED_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
