"""How far a long piece of work is, in one line: what is shown of it, and when.

On a terminal that is a bar with the time left, which goes away at the end. Elsewhere (a file, a log) it is a line every 10 s, the first
after 3 s, so that what is quick says nothing. Commands that work alone use counted(); the ranks of a job are shown by rank 0
(training/membership/progress_display.py).
"""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

FIRST_S, EVERY_S = 3.0, 10.0
LOOK_S = 0.5
BYTES = "bytes"
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def amount(done: int, total: int, unit: str) -> str:
    """Such as ``2.1 of 6.0 GB (35 %)``, ``5 of 16 micro-batches (31 %)``, or, where the total is not known (0), ``1,200 records``."""
    done = max(0, min(done, total) if total > 0 else done)
    if unit == BYTES:
        scale, unit = next(((scale, name) for scale, name in _UNITS if max(done, total) >= scale), (1.0, "bytes"))
        words, whole = (f"{count / scale:.1f}" if scale > 1 else f"{count:,}" for count in (done, total))
    else:
        words, whole = f"{done:,}", f"{total:,}"
    return f"{words} of {whole} {unit} ({100 * done // total} %)" if total > 0 else f"{words} {unit}".rstrip()


def eta_s(done: int, total: int, done_before: int, seconds: float) -> float | None:
    """Seconds until ``total`` is reached at the pace of the last ``seconds``, which began at ``done_before``. None: nobody can say."""
    if total <= 0 or done <= done_before or seconds <= 0.0:
        return None
    return max(0, total - done) * seconds / (done - done_before)


def eta_in_words(seconds: float | None) -> str:
    """Such as ``ETA 0:42``."""
    return "ETA unknown" if seconds is None else f"ETA {duration(seconds)}"


def duration(seconds: float) -> str:
    """Such as ``0:42`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class ProgressLine:
    """Shows one text at a time. Used by one thread at a time."""

    def __init__(self, say: Callable[[str], object], *, on_terminal: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """say: prints a line where there is no terminal. clock: seconds."""
        self._say, self._on_terminal, self._clock = say, on_terminal, clock
        self._bar: tqdm[Any] | None = None
        self._about, self._said_at = "", 0.0

    def show(self, about: str, text: str, share: float | None = None) -> None:
        """``text``, which may change all the time; a line of a file only every EVERY_S as long as it is ``about`` the same. share: of what
        is done, for the bar."""
        if not self._on_terminal:
            now = self._clock()
            if about != self._about or now - self._said_at >= EVERY_S:
                self._about, self._said_at = about, now
                self._say(text)
            return
        if self._bar is None:
            has_size = min(shutil.get_terminal_size(fallback=(0, 0))) > 0  # some terminals say 0, and tqdm would show nothing
            self._bar = tqdm(
                total=1000,
                bar_format="{desc}{bar}",
                ncols=None if has_size else 100,
                nrows=None if has_size else 24,
                dynamic_ncols=has_size,
                leave=False,
                file=sys.stderr,
            )
        self._bar.n = round(1000 * (share or 0.0))
        self._bar.set_description_str(f"{text} " if share is None else f"{text} |", refresh=True)

    def hide(self) -> None:
        """Nothing is to be shown now."""
        self._about = ""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextlib.contextmanager
def counted(title: str, total: int, unit: str = BYTES) -> Iterator[Callable[[int], None]]:
    """Show on stderr how far a command is; yields what is to be called with the bytes or items just done, on one thread. A thread of its
    own shows it, so that a single long piece does not look like an end."""
    done, began = 0, time.monotonic()
    has_ended = threading.Event()
    line = ProgressLine(lambda text: sys.stderr.write(f"{text}\n"), on_terminal=sys.stderr.isatty())

    def add(n: int) -> None:
        nonlocal done
        done += n

    def show() -> None:
        seconds = time.monotonic() - began
        share = min(1.0, done / total) if total > 0 else None
        line.show(title, f"{title}: {amount(done, total, unit)}, {eta_in_words(eta_s(done, total, 0, seconds))}", share)

    def keep_showing() -> None:
        if has_ended.wait(FIRST_S):
            return
        while True:
            show()
            if has_ended.wait(LOOK_S):
                return

    shower = threading.Thread(target=keep_showing, name="progress", daemon=True)
    shower.start()
    try:
        with logging_redirect_tqdm():  # log lines above the bar
            yield add
    finally:
        has_ended.set()
        shower.join()
        line.hide()
