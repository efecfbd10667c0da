"""What a rank is doing, and when: spans of time that name their work.

Always on in its cheap form (one attribute, so that a message about a lost peer can say what this rank was doing); recording every span is
asked for by tests and, later, by profiling.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Span(NamedTuple):
    """One piece of work; start and end in seconds of time.perf_counter of this process."""

    name: str
    micro_batch: int | None
    start: float
    end: float


class Spans:
    """The current work of this rank and, if asked for, the record of all of it."""

    def __init__(self, *, record: bool = False) -> None:
        self.recorded: list[Span] = []
        self._record = record
        self._step: int | None = None
        self._current: tuple[str, int | None] = ("starting", None)

    def enter_phase(self, name: str) -> None:
        """Name what is done outside of steps, until the next call."""
        self._current = (name, None)

    def enter_step(self, step: int) -> None:
        """All spans until the next call belong to ``step``."""
        self._step, self._current = step, ("the work between steps", None)

    @contextmanager
    def span(self, name: str, micro_batch: int | None = None) -> Iterator[None]:
        """Name the work done inside the block."""
        before, self._current = self._current, (name, micro_batch)
        start = time.perf_counter()
        yield
        if self._record:
            self.recorded.append(Span(name, micro_batch, start, time.perf_counter()))
        self._current = before  # left as it is when the block raises: a message then says where it happened

    def mark(self, name: str) -> None:
        """Record an instant."""
        if self._record:
            now = time.perf_counter()
            self.recorded.append(Span(name, None, now, now))

    @property
    def in_words(self) -> str:
        """Such as "step 12, forward of micro-batch 3"."""
        name, micro_batch = self._current
        where = name if micro_batch is None else f"{name} of micro-batch {micro_batch}"
        return where if self._step is None else f"step {self._step}, {where}"
