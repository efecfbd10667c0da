"""What a rank is doing, and when: spans of time that name their work.

Always on in its cheap form (a few attributes, so that a message about a lost peer can say what it was doing, and since when). Recording
every span is asked for by tests and by --profiling tidy_profiling (training/timeline/tracing.py)."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from comms.heartbeat import Beat

# What a span's time is spent on. Names serve failure messages ("step 12, forward of micro-batch 3"); traces are read by category.
CATEGORIES = {
    "receiving activations": "recv",
    "receiving gradients": "recv",
    "forward": "forward",
    "loss": "backward",  # head and loss run with the last stage's backward
    "backward": "backward",
    "weight gradient": "weight-grad",
    "sending activations": "send",
    "sending gradients": "send",
    "waiting for sends": "send",
    "allreduce": "allreduce",
    "allreduce launched": "allreduce",
    "agreeing on the step": "allreduce",
    "gradient norm": "optimizer",
    "update": "optimizer",
    "waiting for data": "data-wait",
    "sharing the lengths of prompts": "allreduce",
    "receiving tokens": "recv",
    "choosing tokens": "forward",
    "sending tokens": "send",
}
WAITING = frozenset({"recv", "send", "allreduce", "data-wait"})  # categories of time spent waiting for another rank
WAITING_FOR_DATA = "waiting for data"  # which another thread of rank 0 reads
SAVING, KEEPING = "saving a checkpoint", "keeping a snapshot"  # a thread may write meanwhile what was begun before
WAITING_FOR_CHECKPOINT = "waiting for the checkpoint to be written"
COMING = "coming to the next meeting"  # after one that has broken off
EVALUATING = "evaluating"  # around the spans of an evaluation: who is in it may be waiting for any other rank
OTHER = "other"  # the category of every other name: checkpoints, barriers


class Span(NamedTuple):
    """One piece of work; start and end in seconds of the clock of its Spans; step None: outside of steps."""

    name: str
    micro_batch: int | None
    start: float
    end: float
    step: int | None = None


class Part:
    """What can be counted of a phase, a step or a part of them, such as bytes of weights. Written by add(), read by any thread."""

    __slots__ = ("_moved", "done", "name", "total", "unit")

    def __init__(self, moved: Callable[[], None], name: str, total: int = 0, unit: str = "") -> None:
        """moved: called at every add(). total: 0 where it is not known. unit: "bytes", or items in the plural."""
        self._moved, self.name, self.total, self.unit, self.done = moved, name, total, unit, 0

    def add(self, n: int = 1) -> None:
        """So many more items or bytes are done; 0: none yet, but this rank gets on. From any thread; two that add at the same moment may
        lose one of both, which a display of progress can bear."""
        self.done += n
        self._moved()


class Spans:
    """The current work of this rank and, if asked for, the record of all of it. Spans are opened by one thread; any may read in_words.

    clock: seconds; another one than time.perf_counter is for tests.
    """

    def __init__(self, *, record: bool = False, clock: Callable[[], float] = time.perf_counter) -> None:
        self.recorded: list[Span] = []
        self.clock = clock
        self._record = record
        self._synchronize: Callable[[], None] | None = None
        self._step: int | None = None
        self._step_began: float | None = None
        self._longest_step_s = 0.0
        self._current: tuple[str, int | None] = ("starting", None)
        self._since, self._moves = clock(), 0
        self.reads_data = False  # whether it is this rank's own thread that it waits for where it waits for data
        self._part = Part(self._moved, "starting")
        self._beside: dict[str, Part] = {}  # span -> what another thread counts meanwhile

    def start_recording(self, synchronize: Callable[[], None] | None = None) -> None:
        """Record every span that is opened from now on.

        synchronize: called before the end of a span is taken, so that on CUDA it shows when the device was done, not when the last
        kernel was launched. It must wait for the compute stream alone: a whole device also runs receives posted ahead, which end
        only when the neighbour sends.
        """
        self._record, self._synchronize = True, synchronize
        self.recorded.clear()

    def stop_recording(self) -> list[Span]:
        """Back to the cheap form; returns what was recorded, which is kept no longer."""
        taken, self.recorded = self.recorded, []
        self._record, self._synchronize = False, None
        return taken

    def enter_phase(self, name: str) -> None:
        """Name what is done outside of steps, until the next call."""
        self._step, self._step_began, self._current = None, None, (name, None)
        self._part = Part(self._moved, name)
        self._moved()

    def enter_step(self, step: int) -> None:
        """All spans until the next call belong to ``step``."""
        now = self.clock()
        if self._step_began is not None:
            self._longest_step_s = max(self._longest_step_s, now - self._step_began)
        self._step, self._step_began, self._current = step, now, ("the work between steps", None)
        self._part = Part(self._moved, f"step {step}")
        self._moved()

    def span(self, name: str, micro_batch: int | None = None) -> "_OpenSpan":
        """Name the work done inside the block: ``with spans.span("forward", i):``. Spans may nest."""
        return _OpenSpan(self, (name, micro_batch))

    def part(self, name: str, total: int = 0, unit: str = "") -> "_OpenPart":
        """span(), and what is done of it can be counted: ``with spans.part("loading weights", num_bytes, "bytes") as part: part.add(n)``.
        total: 0 where it is not known."""
        return _OpenPart(self, Part(self._moved, name, total, unit))

    def start_part(self, total: int, unit: str, name: str | None = None) -> Part:
        """Count what is done of the current phase, step or part of it, from 0. name: what it is called from now on."""
        self._part = Part(self._moved, self._part.name if name is None else name, total, unit)
        return self._part

    @contextmanager
    def beside(self, during: Sequence[str], name: str, total: int = 0, unit: str = "") -> Iterator[Part]:
        """Of another thread: what it does in the block is what this rank does in the spans called ``during``, in which it waits for
        that. Counting moves this rank only then."""

        def moved() -> None:
            if self._current[0] in during:
                self._moved()

        part = Part(moved, name, total, unit)
        self._beside.update(dict.fromkeys(during, part))
        try:
            yield part
        finally:
            for span in during:
                if self._beside.get(span) is part:
                    del self._beside[span]

    def advance(self, n: int = 1) -> None:
        """Part.add() of what is counted now."""
        self._part.add(n)

    def moved_during(self, name: str) -> None:
        """Another thread has got on with what this rank waits for in the span ``name``; nothing happens in any other."""
        if self._current[0] == name:
            self._moved()

    def mark(self, name: str) -> None:
        """Record an instant."""
        if self._record:
            now = self.clock()
            self.recorded.append(Span(name, None, now, now, self._step))

    @property
    def beat(self) -> Beat:
        """What this rank says of itself to the hub. Called on any thread."""
        name, _ = self._current
        part = self._beside.get(name, self._part)
        return Beat(
            doing=self.in_words,
            for_s=max(0.0, self.clock() - self._since),
            moves=self._moves,
            is_in_step=self._step is not None and (name in CATEGORIES or name == EVALUATING),
            waits=(CATEGORIES.get(name) in WAITING or name == EVALUATING) and not (self.reads_data and name == WAITING_FOR_DATA),
            longest_step_s=self._longest_step_s,
            part=part.name,
            done=int(part.done),
            total=int(part.total),
            unit=part.unit,
        )

    def _moved(self) -> None:
        self._since = self.clock()
        self._moves += 1

    @property
    def in_words(self) -> str:
        """Such as "step 12, forward of micro-batch 3"."""
        name, micro_batch = self._current
        where = name if micro_batch is None else f"{name} of micro-batch {micro_batch}"
        return where if self._step is None else f"step {self._step}, {where}"


class _OpenSpan:
    """The block of a span; a class, because entering a generator costs several times as much."""

    __slots__ = ("_before", "_spans", "_start", "_work")

    def __init__(self, spans: Spans, work: tuple[str, int | None]) -> None:
        self._spans, self._work = spans, work

    def __enter__(self) -> object:
        spans = self._spans
        self._before, spans._current = spans._current, self._work
        spans._moved()
        self._start = spans._since if spans._record else None
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            return  # the current work is left as it is: a message then says where it happened
        spans = self._spans
        if self._start is not None and spans._record:
            if spans._synchronize is not None:
                spans._synchronize()
            spans.recorded.append(Span(*self._work, self._start, spans.clock(), spans._step))
        spans._current = self._before
        spans._moved()


class _OpenPart(_OpenSpan):
    """The block of a span whose progress is counted. A part inside of it stands for it while that lasts."""

    __slots__ = ("_part", "_part_before")

    def __init__(self, spans: Spans, part: Part) -> None:
        super().__init__(spans, (part.name, None))
        self._part = part

    def __enter__(self) -> Part:
        super().__enter__()
        self._part_before, self._spans._part = self._spans._part, self._part
        return self._part

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        super().__exit__(kind, error, trace)
        if kind is None:
            self._spans._part = self._part_before
