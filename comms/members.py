"""What the hub keeps of a meeting: its rules, who is there, and what came of it so far."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from comms.deadlines import DEADLINES, Deadlines
from comms.handshake import Session
from comms.heartbeat import Beat, Pulse
from comms.roster import Hello

NOTICED_S = 3.0  # a standstill that others may have taken for a loss
DEATH_S = 0.5  # from the end of a connection until its process, if it died, is gone from this host's table


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a job puts up with. may_meet_again: a broken link, or a lost rank that a supervisor starts again, ends the meeting and not the
    job. who_goes_on: of the ranks that are there, those that make a job by themselves, [] if none do. takes_in: whether ranks that were
    gone without, or started anew, make this job with the others at once; else they wait wherever the others can go on by themselves with
    the state they hold. dead: ranks known to be lost when the meeting begins; grace_s: after which others that have not come, and are not
    known to be on their way, count as lost too."""

    may_meet_again: bool = False
    who_goes_on: Callable[[frozenset[int]], list[int]] = lambda present: []
    takes_in: bool = True
    dead: frozenset[int] = frozenset()
    grace_s: float = 0.0
    is_first_meeting: bool = True
    deadlines: Deadlines = DEADLINES


@dataclass
class Member:
    """A rank that was let in, and its connection."""

    hello: Hello
    writer: asyncio.StreamWriter
    session: Session
    pulse: Pulse
    is_done: bool = False
    has_left: bool = False

    def send(self, message: Mapping[str, Any]) -> None:
        """Small enough for the socket's buffer: asyncio hands it to the kernel at once."""
        if not self.writer.is_closing():
            self.writer.write(self.session.seal(message))

    def gone(self, now: float, slept_s: float) -> str:
        """Such as ``is gone: process 12 on host a ended without a word, last heard of 0.3 s ago, ...``. slept_s: for which this process
        itself had stood still."""
        if slept_s > NOTICED_S:
            cause = f"Rank 0 itself had stood still for {slept_s:.0f} s (stopped, suspended or overloaded): the others had to give it up"
        else:
            cause = "If nobody killed it, that machine's kernel may have, for memory (dmesg)"
        ended = f"process {self.hello.pid} on host {self.hello.host} ended without a word"
        return f"is gone: {ended}, {self.pulse.last_words(now)}. {cause}"


@dataclass
class Verdict:
    """What has become of the meeting so far. members: those that make the job, once it has formed; waiting: of replicas without which it
    goes on."""

    formed: dict[str, Any] | None = None
    refused: str | None = None
    restart_helps: bool = False
    again: str | None = None
    members: dict[int, Member] = field(default_factory=dict)
    waiting: dict[int, Member] = field(default_factory=dict)

    @property
    def beats(self) -> dict[int, Beat]:
        """The last one of every member that has sent any. Any thread may ask."""
        return {rank: member.pulse.beat for rank, member in list(self.members.items()) if member.pulse.beat is not None}


def outlives(pid: int, host_id: str, *, own_host_id: str, was_cut: bool) -> bool:
    """Whether the process ``pid`` of host ``host_id`` lives on, whose connection to here ended or was cut. One on this host can be looked
    for. From another one a dying process's kernel says goodbye, and a router that has forgotten a connection resets it."""
    return still_runs(pid) if host_id == own_host_id else was_cut


def still_runs(pid: int, within_s: float = DEATH_S) -> bool:
    """Whether the process ``pid`` of this host, a connection of which has ended, lives on: False as soon as it is gone."""
    give_up = time.monotonic() + within_s
    while is_running(pid):
        if time.monotonic() > give_up:
            return True
        time.sleep(0.02)
    return False


def is_running(pid: int) -> bool:
    """Whether the process ``pid`` of this host lives; one that has ended and that nobody has waited for does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False
