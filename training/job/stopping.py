"""SIGTERM and Ctrl-C while training: finish the step, save, exit 0. A second one ends the process at once.

The handler only notes the signal; all ranks decide in the step's one reduction, so a signal to any of them stops all after the same step.
The second signal is seen by a thread (Python runs handlers between bytecodes of the main thread, which may sit in a wait for a peer).
"""

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_INTERRUPTED = 130
ONE_REQUEST_S = 1.0  # launchers pass a Ctrl-C on that the terminal has sent already


class StopRequest:
    """``with StopRequest() as stop:`` around the whole job; from ``stop.listen()`` on, ``stop.name`` is the signal that came, None so far.

    Until then signals do what they always do; after it they only ask, to the end of the block, where the ranks have parted.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        return self

    def listen(self) -> None:
        """Training begins, or goes on: there is something to save. On another thread than the main one, as in a notebook's helper, nothing
        is done: signals are not ours to take there."""
        if threading.current_thread() is not threading.main_thread() or self._previous:
            return
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs = theirs
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        self._previous_wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop-request", daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._previous:
            return
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._theirs.close()  # ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name

    def _watch(self) -> None:
        first_at: float | None = None
        with contextlib.closing(self._ours):
            while received := self._ours.recv(1):
                if received[0] not in SIGNALS:
                    continue
                if first_at is not None and time.monotonic() - first_at > ONE_REQUEST_S:
                    os._exit(EXIT_INTERRUPTED)
                first_at = first_at or time.monotonic()
