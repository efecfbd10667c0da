"""Who has fallen silent, and who lives but does not get on: judged from what every rank says of itself twice a second. Pure.

A dead process is known at once without any of this (lifeline.py); a frozen one, a suspended laptop and a cut network are not, nor is a
thread that waits for ever. So each rank sends a Beat, the hub keeps the last one, and the rules here decide when that is too long ago.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BEAT_S = 0.5
FRESH_S = 3 * BEAT_S  # so old may the beat of a rank be that is said to live
WAKING_S = 5.0  # from the end of a standstill until all has come that it caused
SILENT_S = 15.0  # auto: without a sign of life
FIRST_STEP_S = 1800.0  # auto: without progress while no step has ended yet, so nobody knows how long one takes
STUCK_S = 300.0  # auto: without progress, at least: a slow disk or a slow download is no hang
STEPS_WITHOUT_PROGRESS = 10


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself. doing: in words; for_s: seconds since it began that, or last got on with it; moves: counts what it has
    begun; is_in_step, waits: whether it is inside a training step, and there for another rank; longest_step_s: so far, 0 before the first
    has ended. part: the phase, the step or the part of them that is counted; done, total: items or bytes of it, total 0 where that is
    not known; unit: of both, in the plural."""

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
        self.beat, self.came_at = beat, now

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


def silent_after_s(peer_timeout_s: float | None) -> float:
    """Seconds without a beat until a rank is lost. None: auto."""
    return SILENT_S if peer_timeout_s is None else peer_timeout_s


def stuck_after_s(peer_timeout_s: float | None, longest_step_s: float) -> float:
    """Seconds without progress inside a step until a rank is lost: ten of the longest steps so far, and at least --peer-timeout."""
    if longest_step_s == 0.0:
        return max(FIRST_STEP_S, peer_timeout_s or 0.0)
    return max(STUCK_S if peer_timeout_s is None else peer_timeout_s, STEPS_WITHOUT_PROGRESS * longest_step_s)


def find_overdue(pulses: Mapping[int, Pulse], now: float, peer_timeout_s: float | None) -> Overdue | None:
    """The rank that keeps the others waiting for too long, if any. pulses: of the ranks that are in the job now."""
    limit = silent_after_s(peer_timeout_s)
    silent = [(pulse.came_at, rank) for rank, pulse in pulses.items() if now - pulse.came_at > limit]
    if silent:
        came_at, rank = min(silent)
        return Overdue(
            rank,
            f"has given no sign of life for {now - came_at:.0f} s (--peer-timeout); it was {pulses[rank].last_words(now)}. Its process may "
            "be stopped, its machine suspended or overloaded, or its network cut",
        )
    longest = max((pulse.beat.longest_step_s for pulse in pulses.values() if pulse.beat is not None), default=0.0)
    limit = stuck_after_s(peer_timeout_s, longest)
    stuck = {
        rank: pulse
        for rank, pulse in pulses.items()
        if pulse.beat is not None and pulse.beat.is_in_step and now - pulse.moved_at > limit and now - pulse.came_at < FRESH_S
    }
    at_work = {rank: pulse for rank, pulse in stuck.items() if pulse.beat is not None and not pulse.beat.waits}
    if not stuck or (not at_work and len(stuck) < len(pulses)):
        return None  # those who wait may wait for one that gets on, or that is not in a step
    moved_at, rank = min((pulse.moved_at, rank) for rank, pulse in (at_work or stuck).items())
    return Overdue(
        rank,
        f"lives but has not got on for {now - moved_at:.0f} s; it was {pulses[rank].last_words(now)}. Its output shows where it stands",
        all_wait=not at_work,
    )
