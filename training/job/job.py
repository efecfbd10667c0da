"""A job that has formed, as its ranks see it, and how they tell each other small things.

How they meet: meeting.py. Nothing here reads a weight."""

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from comms.connections import Connections
from comms.deadlines import DEADLINES, Deadlines
from comms.groups import Groups
from comms.lifeline import Lifeline
from comms.links import naming_the_peer
from comms.place import Place, place_of
from comms.spans import Spans
from comms.transport import NO_LIMIT, wait_for
from training.job.local_facts import LocalFacts

COLLECTIVE_TIMEOUT = NO_LIMIT  # losses, and ranks that do not get on, are noticed by the lifelines


@dataclass(frozen=True, kw_only=True)
class Job(LocalFacts):
    """One meeting of a job. ``place`` is the one in this meeting: where the job goes on without a replica, ranks are counted anew.

    store: shared by all ranks, empty at the start of each meeting; roster: what each rank said of itself, by rank of this meeting;
    num_replicas: that the job was started with; num_threads: what torch computes with here; number: how many meetings this process has
    had before; meeting: the name of this one, alike on all ranks; connect_timeout: for the making of groups, None: that of collectives;
    deadlines: how long a rank waits for others before that counts as a failure."""

    store: dist.Store
    groups: Groups
    connections: Connections
    lifeline: Lifeline
    roster: list[dict[str, Any]]
    num_replicas: int
    num_threads: int
    spans: Spans
    number: int = 0
    meeting: str = ""
    connect_timeout: timedelta | None = None
    deadlines: Deadlines = DEADLINES

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that are here, as they were started, by rank of this meeting."""
        return tuple(entry["rank"] for entry in self.roster)

    @property
    def peer_names(self) -> list[str]:
        """How messages name every rank."""
        started = [place_of(rank, dp_size=self.num_replicas, pp_size=self.place.pp_size) for rank in self.members]
        return [f"{place.in_words} on host {entry['host']}" for place, entry in zip(started, self.roster, strict=True)]

    @property
    def is_whole(self) -> bool:
        """Whether all replicas are here."""
        return self.place.dp_size == self.num_replicas

    def watch_connections(self) -> None:
        """Collective over all ranks, whenever groups have been made: find out which connections are between ranks, and look after them."""
        said = all_say(self, self.store, f"connections/{self.connections.num_recorded}", self.connections.ends)
        self.connections.watch(ends for rank, ends in enumerate(said) if rank != self.place.rank)

    def wait_for_all(self) -> None:
        """Collective over all ranks: returns when all have called it, so that nobody's end is taken for a loss."""
        with self.spans.span("waiting for the other ranks"), naming_the_peer("waiting for the other ranks"):
            wait_for(dist.barrier(async_op=True))


class MeetAgain(Exception):
    """This meeting is over and the job is not: whoever holds state keeps it, and comes to the next one. The text says why."""


def all_say(job: Job, store: dist.Store, what: str, mine: Any) -> list[Any]:
    """Called by all ranks, once for each ``what`` in ``store``: everybody's ``mine`` (JSON), by rank. Raises PeerLost."""
    return exchange(job.place, store, what, mine)


def exchange(place: Place, store: dist.Store, what: str, mine: Any) -> list[Any]:
    """As all_say(), for ranks whose job has not formed yet."""
    keys = [f"{what}/{rank}" for rank in range(place.world_size)]
    with naming_the_peer("asking the store of rank 0"):  # torch's error says nothing about whose store it was
        store.set(keys[place.rank], json.dumps(mine))
        store.wait(keys, COLLECTIVE_TIMEOUT)
        return [json.loads(store.get(key)) for key in keys]
