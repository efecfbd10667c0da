"""Who has fallen silent, and who lives but does not get on: judged from what every rank says of itself twice a second. Pure.

A dead process is known at once without any of this (lifeline.py); a frozen one, a suspended laptop and a cut network are not, nor is a
thread that waits for ever. So each rank sends a Beat, the hub keeps the last one, and the rules here decide when that is too long ago.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comms.deadlines import Deadlines

BEAT_S = 0.5
FRESH_S = 3 * BEAT_S  # so old may the beat of a rank be that is said to live
WAKING_S = 5.0  # from the end of a standstill until all has come that it caused
STEPS_WITHOUT_PROGRESS = 10


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself. doing: in words; for_s: seconds since it began that, or last got on with it; moves: counts what it has
    begun; is_in_step, waits: whether it is inside a training step, and there for another rank; longest_step_s: so far, 0 before the first
    has ended. part: the phase, the step or the part of them that is counted; done, total: items or bytes of it, total 0 where that is
    not known; unit: of both, in the plural. stood_still_s: for which its process did not run, in all since the meeting began."""

    doing: str
    for_s: float
    moves: int
    is_in_step: bool
    waits: bool
    longest_step_s: float
    part: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    stood_still_s: float = 0.0

    @classmethod
    def from_json(cls, fields: Any) -> "Beat":
        """Raises ValueError for anything that is not a Beat."""
        if not isinstance(fields, dict) or {name: type(value) for name, value in fields.items()} != _KINDS:
            raise ValueError("not a beat")
        return cls(**fields)


_KINDS = {
    "doing": str,
    "for_s": float,
    "moves": int,
    "is_in_step": bool,
    "waits": bool,
    "longest_step_s": float,
    "part": str,
    "done": int,
    "total": int,
    "unit": str,
    "stood_still_s": float,
}


@dataclass(kw_only=True)
class Pulse:
    """A rank's last beat, when it came, and when it last brought progress; on the hub's clock, in seconds."""

    came_at: float
    moved_at: float
    beat: Beat | None = None

    def feel(self, beat: Beat, now: float) -> None:
        """A beat has come."""
        if self.beat is None or beat.moves != self.beat.moves:
            self.moved_at = now - beat.for_s
        else:  # a process that is stopped, or gets no processor, cannot get on meanwhile
            self.moved_at += max(0.0, beat.stood_still_s - self.beat.stood_still_s)
        self.beat, self.came_at = beat, now

    def is_stuck(self, now: float, limit_s: float) -> bool:
        """Whether the rank lives, by its last beat, and has not got on for ``limit_s``."""
        return self.beat is not None and now - self.moved_at > limit_s and now - self.came_at < FRESH_S

    def last_words(self, now: float) -> str:
        """Such as ``last heard of 0.4 s ago, for 0.1 s in step 12, forward of micro-batch 3``."""
        if self.beat is None:
            return f"never heard of since it came {now - self.came_at:.1f} s ago"
        return f"last heard of {now - self.came_at:.1f} s ago, for {self.beat.for_s:.1f} s in {self.beat.doing}"


class Standstill:
    """Of the process that judges, which looks every BEAT_S, or would; on the hub's clock, in seconds. A laptop that was suspended wakes to
    find that the others have given it up."""

    def __init__(self, now: float) -> None:
        self._looked_at, self._slept_s, self._woke_at = now, 0.0, -math.inf

    def look(self, now: float) -> float:
        """Seconds missed since the last look, 0 for less than a beat."""
        missed, self._looked_at = now - self._looked_at - BEAT_S, now
        if missed <= BEAT_S:
            return 0.0
        self._slept_s, self._woke_at = missed, now
        return missed

    def lately_s(self, now: float) -> float:
        """How long the last one took, if it ends now or ended a moment ago; else 0."""
        missing = now - self._looked_at - BEAT_S
        if missing > BEAT_S:
            return missing
        return self._slept_s if now - self._woke_at < WAKING_S else 0.0


@dataclass(frozen=True)
class Overdue:
    """A rank to be taken for lost. why: the end of a sentence that begins with its name. all_wait: for each other; it is none of them."""

    rank: int
    why: str
    all_wait: bool = False


def stuck_after_s(deadlines: Deadlines, longest_step_s: float) -> float:
    """Seconds without progress inside a step until a rank is lost: ten of the longest steps so far, and at least deadlines.step_s."""
    if longest_step_s == 0.0:
        return deadlines.first_step_s
    return max(deadlines.step_s, STEPS_WITHOUT_PROGRESS * longest_step_s)


def find_overdue(pulses: Mapping[int, Pulse], now: float, deadlines: Deadlines) -> Overdue | None:
    """The rank that keeps the others waiting for too long, if any. pulses: of the ranks that are in the job now.

    A silent rank comes first. Then one that is at work inside a step and does not get on, or any of them where all wait for each other.
    Last, where a rank is outside of steps, one of those of which none has got on at all for a very long time."""
    if (silent := find_silent(pulses, now, deadlines)) is not None:
        return silent
    longest = max((pulse.beat.longest_step_s for pulse in pulses.values() if pulse.beat is not None), default=0.0)
    stuck = {rank: pulse for rank, pulse in pulses.items() if pulse.is_stuck(now, stuck_after_s(deadlines, longest))}
    in_step = {rank: pulse for rank, pulse in stuck.items() if pulse.beat is not None and pulse.beat.is_in_step}
    at_work = {rank: pulse for rank, pulse in in_step.items() if pulse.beat is not None and not pulse.beat.waits}
    if at_work or (in_step and len(in_step) == len(pulses)):
        return _stuck(at_work or in_step, now, all_wait=not at_work)
    if pulses and all(pulse.is_stuck(now, deadlines.outside_s) for pulse in pulses.values()):
        at_work = {rank: pulse for rank, pulse in pulses.items() if pulse.beat is not None and not pulse.beat.waits}
        return _stuck(at_work or pulses, now, all_wait=not at_work)
    return None  # those who wait may wait for one that gets on, or that is not in a step


def find_silent(pulses: Mapping[int, Pulse], now: float, deadlines: Deadlines) -> Overdue | None:
    """The rank that has been silent for longest, if it is for too long."""
    silent = [(pulse.came_at, rank) for rank, pulse in pulses.items() if now - pulse.came_at > deadlines.silent_s]
    if not silent:
        return None
    came_at, rank = min(silent)
    return Overdue(
        rank,
        f"has given no sign of life for {now - came_at:.0f} s (--peer-timeout); it was {pulses[rank].last_words(now)}. Its process may "
        "be stopped, its machine suspended or overloaded, or its network cut",
    )


def _stuck(ranks: Mapping[int, Pulse], now: float, *, all_wait: bool) -> Overdue:
    """The one of ``ranks`` that has not got on for longest."""
    moved_at, rank = min((pulse.moved_at, rank) for rank, pulse in ranks.items())
    return Overdue(
        rank,
        f"lives but has not got on for {now - moved_at:.0f} s; it was {ranks[rank].last_words(now)}. Its output shows where it stands",
        all_wait=all_wait,
    )
