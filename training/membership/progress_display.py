"""What rank 0 shows of all ranks while something takes long: who is furthest behind, how far that one is, and when it will be there.

Every rank says twice a second what it does and how much of it is done (comms/heartbeat.Beat); the hub keeps what came last. A thread of
rank 0 looks at that and shows one bar, or lines where there is no terminal. Phases of less than 3 s and steps of less than 30 s are not
shown. Choosing what to show is a pure function of beats and a clock.
"""

import contextlib
import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from comms.heartbeat import Beat
from comms.place import Place
from comms.progress import FIRST_S, LOOK_S, ProgressLine, amount, duration, eta_in_words, eta_s

log = logging.getLogger("trainer")

MISSING_FIRST_S, MISSING_EVERY_S = 10.0, 60.0  # ranks that have not come yet
MAX_LISTED = 8
STEP_S = 30.0  # a step is shown from here on
UNCOUNTED_S = 10.0  # and a phase of which nobody can say how much is done
STEP = "step "  # begins the name of a step's part


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What to show. about: does not change while the same is shown; share: of what is done, None where that is not known."""

    about: str
    text: str
    share: float | None


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What one rank does; since when (seconds of the clock) it has been seen in this part, and since when it counts, from done_before."""

    beat: Beat
    since: float
    counted_since: float
    done_before: int

    @property
    def is_counted(self) -> bool:
        return self.beat.total > 0 and self.beat.done < self.beat.total

    def eta_s(self, now: float) -> float | None:
        return eta_s(self.beat.done, self.beat.total, self.done_before, now - self.counted_since)

    @property
    def share(self) -> float:
        return max(0.0, min(1.0, self.beat.done / self.beat.total)) if self.beat.total > 0 else 0.0


class Overview:
    """All ranks over time. describe: how a rank is called, "" where there is only one."""

    def __init__(self, describe: Callable[[int], str]) -> None:
        self._describe = describe
        self._seen: dict[int, _Seen] = {}
        self._began: dict[str, float] = {}  # part -> since when at least one rank has been in it

    def look(self, beats: Mapping[int, Beat], now: float) -> Shown | None:
        """What to show at ``now`` (seconds); None where nothing takes long. beats: the last one of every rank."""
        self._seen = {rank: self._follow(self._seen.get(rank), beat, now) for rank, beat in beats.items()}
        parts = {beat.part for beat in beats.values()}
        self._began = {part: self._began.get(part, now) for part in parts}
        if not self._seen:
            return None
        rank = self._furthest_behind(now)
        seen = self._seen[rank]
        if now - seen.since < self._shown_after_s(seen):
            return None
        return self._in_words(rank, seen, now)

    @staticmethod
    def _follow(before: _Seen | None, beat: Beat, now: float) -> _Seen:
        has_ended = before is not None and before.beat.total > 0 and beat.total == 0
        if before is None or before.beat.part != beat.part or has_ended:
            return _Seen(beat=beat, since=now, counted_since=now, done_before=beat.done)
        if beat.total != before.beat.total or beat.done < before.beat.done:  # another count under the same name
            return _Seen(beat=beat, since=before.since, counted_since=now, done_before=beat.done)
        return replace(before, beat=beat)

    @staticmethod
    def _shown_after_s(seen: _Seen) -> float:
        if seen.beat.part.startswith(STEP):
            return STEP_S
        return FIRST_S if seen.is_counted else UNCOUNTED_S

    def _furthest_behind(self, now: float) -> int:
        """The rank that the others will have to wait for: of those that count what they do the one in the part that was begun first, and
        there the one that will take longest. Where nobody counts, the one that came last of those that do not wait for others."""

        def order(rank: int) -> tuple[bool, bool, float, float, float, int]:
            seen = self._seen[rank]
            begun = self._began[seen.beat.part]
            if not seen.is_counted:
                return True, seen.beat.waits, begun, -seen.since, 0.0, rank
            left_s = seen.eta_s(now)
            return False, False, begun, -math.inf if left_s is None else -left_s, seen.share, rank

        return min(self._seen, key=order)

    def _in_words(self, rank: int, seen: _Seen, now: float) -> Shown:
        beat, who = seen.beat, self._describe(rank)
        if not seen.is_counted:
            passed, whose = duration(now - seen.since), f" ({who})" if who else ""
            if beat.part.startswith(STEP):
                return Shown(about=beat.part, text=f"{beat.doing}{whose}, {passed} after the step began", share=None)
            return Shown(about=beat.part, text=f"{beat.doing}{whose}, for {passed} so far", share=None)
        who = f"{who} " if who else ""
        done, left = amount(beat.done, beat.total, beat.unit), eta_in_words(seen.eta_s(now))
        text = f"{beat.part}: {who}{done}, {left}"
        if beat.part.startswith(STEP):
            text = f"{beat.part}: {done} done, {left} ({self._at_work(rank)})"
        return Shown(about=beat.part, text=text, share=seen.share)

    def _at_work(self, rank: int) -> str:
        """Which rank keeps a step waiting, and with what: of those in the step of ``rank`` the one that has been longest at something
        that is no waiting."""
        part = self._seen[rank].beat.part
        working = {other: s.beat.for_s for other, s in self._seen.items() if s.beat.part == part and not s.beat.waits}
        rank = max(working, key=lambda other: working[other], default=rank)
        who, doing = self._describe(rank), self._seen[rank].beat.doing.removeprefix(f"{part}, ")
        return f"{who} is in {doing}" if who else f"now {doing}"


@contextlib.contextmanager
def show_progress(beats: Callable[[], Mapping[int, Beat]] | None, place: Place) -> Iterator[None]:
    """Show what takes long inside the block. beats: the last one of every rank, asked by another thread; None: not on this rank. place:
    any of the grid that the job was started with."""
    if beats is None:
        yield
        return
    has_ended, overview = threading.Event(), Overview(lambda rank: place.at(rank).in_words if place.world_size > 1 else "")
    shower = threading.Thread(target=_keep_showing, args=(beats, overview, has_ended), name="progress", daemon=True)
    shower.start()
    try:
        yield
    finally:
        has_ended.set()
        shower.join()


def _keep_showing(beats: Callable[[], Mapping[int, Beat]], overview: Overview, has_ended: threading.Event) -> None:
    line = ProgressLine(lambda text: log.info("%s", text), on_terminal=sys.stderr.isatty())
    try:
        while not has_ended.wait(LOOK_S):
            shown = overview.look(beats(), time.monotonic())
            if shown is None:
                line.hide()
            else:
                line.show(shown.about, shown.text, shown.share)
    except Exception:  # of a defect, or of a terminal that went away: the training goes on, and nobody loses more than this
        log.error("%s", traceback.format_exc())
    finally:
        with contextlib.suppress(Exception):
            line.hide()


@contextlib.contextmanager
def say_who_is_missing(missing: Callable[[], Collection[int]] | None, place: Place) -> Iterator[None]:
    """Inside the block, in which ranks are waited for, say every so often which have not come. missing: their numbers, asked by another
    thread; None: not on this rank. place: as above."""
    if missing is None or place.world_size == 1:
        yield
        return
    has_ended, began = threading.Event(), time.monotonic()

    def keep_saying() -> None:
        wait_s = MISSING_FIRST_S
        while not has_ended.wait(wait_s):
            ranks, wait_s = sorted(missing()), MISSING_EVERY_S
            if ranks:
                names = ", ".join(place.at(rank).in_words for rank in ranks[:MAX_LISTED])
                more = f" and {len(ranks) - MAX_LISTED} more" if len(ranks) > MAX_LISTED else ""
                waited = duration(time.monotonic() - began)
                log.info("waiting for %d of %d ranks, for %s so far; missing: %s%s", len(ranks), place.world_size, waited, names, more)

    sayer = threading.Thread(target=keep_saying, name="missing-ranks", daemon=True)
    sayer.start()
    try:
        yield
    finally:
        has_ended.set()
        sayer.join()
