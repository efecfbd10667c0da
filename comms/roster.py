"""What a rank says of itself at the door, signed, and what must be true of all of them together before they are a job. Pure."""

import hmac
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from comms.secret import Secret


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a rank tells the hub. ``plan`` must be equal on all ranks; ``problem`` is a mistake found on this rank alone, else None.

    comes_back: a supervisor starts this rank again when it dies; attempt: how often it has. meeting: the last one that this process took
    part in and still holds the state of, "" for none. signature: see signed()."""

    rank: int
    world_size: int
    host: str
    host_id: str
    pid: int
    address: str
    is_loopback: bool
    plan: dict[str, Any]
    problem: str | None = None
    comes_back: bool = False
    attempt: int = 0
    meeting: str = ""
    signature: str = ""

    @property
    def in_words(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def entry(self) -> dict[str, Any]:
        """Its line in the roster that every rank is sent."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Any) -> "Hello":
        """Raises ValueError for anything that is not a Hello."""
        kinds = {
            **dict.fromkeys(("rank", "world_size", "pid", "attempt"), int),
            **dict.fromkeys(("host", "host_id", "address", "meeting", "signature"), str),
            **dict.fromkeys(("is_loopback", "comes_back"), bool),
            "plan": dict,
        }
        if not isinstance(fields, dict) or set(fields) != set(cls.__dataclass_fields__):
            raise ValueError("not what a rank says of itself")
        wrong = [name for name, kind in kinds.items() if type(fields[name]) is not kind]
        if wrong or not isinstance(fields["problem"], (str, type(None))):
            raise ValueError(f"not what a rank says of itself: {wrong or 'problem'}")
        return cls(**fields)

    def signed(self, secret: Secret) -> "Hello":
        """With a MAC over everything else it says."""
        return replace(self, signature=self._mac(secret))

    def is_signed(self, secret: Secret) -> bool:
        """Whether somebody who knows ``secret`` has said exactly this."""
        return hmac.compare_digest(self.signature.encode(), self._mac(secret).encode())

    def _mac(self, secret: Secret) -> str:
        fields = {name: value for name, value in asdict(self).items() if name != "signature"}
        return secret.mac(b"roster", json.dumps(fields, sort_keys=True).encode()).hex()

    def is_again(self, other: "Hello") -> bool:
        """Whether this is ``other`` once more: the same process after its connection broke, or the one its supervisor has started since."""
        same_place = (self.rank, self.host_id) == (other.rank, other.host_id)
        return same_place and (self.pid == other.pid or self.attempt > other.attempt)


def find_problem(hello: Hello, members: Mapping[int, Hello], world_size: int) -> str | None:
    """Why ``hello`` and ``members``, who came before, are no job of ``world_size``; None if they may be. Called in rank 0's process."""
    if hello.problem is not None and hello.rank == 0:  # the hub lives in rank 0's process, whose problem does not come by wire
        return (
            f"two processes say they are rank 0: pid {os.getpid()} on {socket.gethostname()} and pid {hello.pid} on {hello.host}. "
            "Give every process its own --rank or, if these are two jobs, each its own port. "
            f"The second one says: {hello.problem}"
        )
    if hello.problem is not None:
        return f"{hello.in_words}: {hello.problem}"
    if hello.world_size != world_size:
        return f"all ranks must agree on --world-size; {hello.in_words} was started with {hello.world_size}, rank 0 with {world_size}"
    if not 0 <= hello.rank < world_size:
        return f"--rank must be 0 .. {world_size - 1}; {hello.in_words} is outside"
    if hello.rank in members and not hello.is_again(members[hello.rank]):
        first = members[hello.rank]
        return (
            f"every process needs its own --rank; rank {hello.rank} is taken twice: by pid {first.pid} on {first.host} and pid "
            f"{hello.pid} on {hello.host}"
        )
    others = (other for other in members.values() if other.rank != hello.rank)
    return next((problem for other in others if (problem := not_alike(hello, other)) is not None), None)


def not_alike(hello: Hello, other: Hello) -> str | None:
    """Why the two are not of one job; None if they may be."""
    differing = sorted(k for k in {*hello.plan, *other.plan} if hello.plan.get(k) != other.plan.get(k))
    if differing:
        seen = "; ".join(f"{k}: {other.plan.get(k)!r} and {hello.plan.get(k)!r}" for k in differing)
        return (
            f"all ranks must be started alike; {other.in_words} and {hello.in_words} differ in {seen}. Start all ranks "
            "with the same flags, model and versions"
        )
    if (hello.is_loopback or other.is_loopback) and hello.host_id != other.host_id:
        return (
            f"ranks on several hosts cannot meet over a loopback interface; {other.in_words} uses {other.address}, "
            f"{hello.in_words} uses {hello.address}. Pass --net-interface with one that connects the hosts"
        )
    return None
