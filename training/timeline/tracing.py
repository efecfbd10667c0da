"""--profiling tidy_profiling: the spans of all ranks over a few optimizer steps, on one clock, as one Chrome trace.

Open the file at https://ui.perfetto.dev or chrome://tracing, or draw it with ``python -m training.timeline``. A process is a
replica, a thread is a stage. Promises: bounded memory (a window of steps), spans of all ranks on rank 0's clock, and the measured
cost of the recording itself. Ranks talk through the store, in JSON.

On CUDA the end of every span waits for the compute stream, so that a span shows the device's time and not the launch's. That
takes away the overlap of launching with computing: shares are right, the step as a whole is somewhat slower than without
profiling, and the reported cost does not count it."""

import base64
import json
import logging
import os
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.tensor_file import explained_disk_errors
from comms.clocks import NS, ClockOffset, offset_to_rank_0, on_rank_0
from comms.place import Place
from comms.spans import CATEGORIES, OTHER, Span, Spans
from training.config.train import Config
from training.job.job import COLLECTIVE_TIMEOUT, Job
from training.timeline.trace import TRACE_FORMAT, is_trace
from user_error import UserError

log = logging.getLogger("trainer")

NUM_WARMUP_STEPS = 1  # the first step allocates
PIECE_BYTES = 4 * 2**20  # torch's store takes values of up to 8 MiB


class TidyProfiler:
    """Made on all ranks alike. Call before_step() before each optimizer step and finish() behind the last: the window opens and
    closes itself, after NUM_WARMUP_STEPS where the run is long enough."""

    def __init__(
        self,
        *,
        place: Place,
        device: torch.device,
        spans: Spans,
        store: dist.Store,
        path: Path,
        num_steps: int,
        num_steps_to_come: int,
        about: Mapping[str, Any],
    ) -> None:
        """num_steps: optimizer steps to record; num_steps_to_come: of this run. path: of the trace, used on rank 0 (see
        check_trace_path()). about: what to say of the run in the trace's metadata, JSON values (schedule, micro-batches, ...)."""
        self._place, self._device, self._spans, self._store, self._path = place, device, spans, store, path
        self._about = dict(about)
        self._num_steps, self._num_before = num_steps, min(NUM_WARMUP_STEPS, max(0, num_steps_to_come - num_steps))
        self._num_seen = 0
        self._first: ClockOffset | None = None

    def before_step(self) -> None:
        """Called by all ranks before each optimizer step; collective where the window opens or closes. Raises PeerLost."""
        if self._num_seen == self._num_before:
            self.begin()
        elif self._num_seen == self._num_before + self._num_steps:
            self.finish()
        self._num_seen += 1

    def finish(self) -> None:
        """Called by all ranks behind the last step, more often if you like: closes the window if it is open."""
        if self._first is not None:
            self.end()

    def begin(self) -> None:
        """Collective over all ranks: compare clocks, then record. Raises PeerLost."""
        with self._spans.span("comparing clocks"):
            self._first = offset_to_rank_0(self._place, self._device, self._spans.clock)
        self._spans.start_recording(_stream_wait(self._device))

    def end(self) -> None:
        """Collective over all ranks: stop recording, gather; rank 0 has written the trace when it returns, or warned that the disk does
        not take it: what was trained is worth more. Raises PeerLost."""
        assert self._first is not None, "begin() comes first"
        recorded = self._spans.stop_recording()
        with self._spans.span("writing the trace"):
            last = offset_to_rank_0(self._place, self._device, self._spans.clock)
            own = _of_this_rank(recorded, self._first, last)
            self._first = None
            if self._place.rank != 0:
                _put(self._store, self._place.rank, own)
                return
            by_rank = [own, *(_take(self._store, rank) for rank in range(1, self._place.world_size))]
            try:
                write_trace(self._path, chrome_trace(self._place, by_rank, self._about))
            except UserError as error:
                log.warning("there is no trace: %s. The training goes on", str(error).rstrip("."))
                return
        dearest = max((trace.cost for trace in by_rank), key=lambda cost: cost.share)
        log.info(
            "profiling cost %.2g %% of a step (%.0f spans of %.2g us in %.3g s). Wrote %s: open it at https://ui.perfetto.dev, or draw it "
            "with: python -m training.timeline %s --png timeline.png",
            100 * dearest.share,
            dearest.spans_per_step,
            1e6 * dearest.span_s,
            dearest.step_s,
            self._path,
            self._path,
        )


@dataclass(frozen=True, kw_only=True)
class RecordingCost:
    """What recording took of a step on one rank: spans_per_step (a mean) x span_s (seconds for one, measured) / step_s (a median)."""

    spans_per_step: float
    span_s: float
    step_s: float

    @property
    def share(self) -> float:
        return self.spans_per_step * self.span_s / self.step_s if self.step_s > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class RankTrace:
    """One rank's spans, as rows (name, micro-batch, step, start, end) in nanoseconds of rank 0's clock."""

    rows: list[list[Any]]
    clock_offset_s: float
    clock_uncertainty_s: float
    cost: RecordingCost


def make_profiler(job: Job, config: Config, num_steps_to_come: int) -> "TidyProfiler":
    """For --profiling tidy_profiling. num_steps_to_come: optimizer steps of the run from here on."""
    return TidyProfiler(
        place=job.place,
        device=job.device,
        spans=job.spans,
        store=job.store,
        path=config.trace_file,
        num_steps=config.profiling_steps,
        num_steps_to_come=num_steps_to_come,
        about={
            "schedule": config.pp_mode,
            "micro-batches": config.batch_size // config.micro_batch_size,
            "accumulation": config.gradient_accumulate_step,
            "device": job.device.type,
            "transport": job.backend,
        },
    )


def span_cost_s(num_batches: int = 9, batch_size: int = 1000) -> float:
    """Seconds that one recorded span costs on this machine now: a median over batches."""
    costs = []
    for _ in range(num_batches):
        spans = Spans(record=True)
        start = time.perf_counter()
        for i in range(batch_size):
            with spans.span("forward", i):
                pass
        costs.append((time.perf_counter() - start) / batch_size)
    return statistics.median(costs)


def recording_cost(spans: Sequence[Span], span_s: float) -> RecordingCost:
    """The cost of having recorded ``spans`` at ``span_s`` seconds each."""
    by_step: dict[int, list[Span]] = {}
    for span in spans:
        if span.step is not None:
            by_step.setdefault(span.step, []).append(span)
    lengths = [max(span.end for span in of_step) - min(span.start for span in of_step) for of_step in by_step.values()]
    return RecordingCost(
        spans_per_step=len(spans) / max(1, len(by_step)), span_s=span_s, step_s=statistics.median(lengths) if lengths else 0.0
    )


def _of_this_rank(recorded: list[Span], first: ClockOffset, last: ClockOffset) -> RankTrace:
    def ns(t: float) -> int:
        return round(on_rank_0(t, first, last) * NS)

    return RankTrace(
        rows=[[span.name, span.micro_batch, span.step, ns(span.start), ns(span.end)] for span in recorded],
        clock_offset_s=last.seconds,
        clock_uncertainty_s=max(first.uncertainty, last.uncertainty),
        cost=recording_cost(recorded, span_cost_s()),
    )


def _put(store: dist.Store, rank: int, trace: RankTrace) -> None:
    fields = {**vars(trace), "cost": vars(trace.cost)}
    packed = base64.b64encode(zlib.compress(json.dumps(fields, separators=(",", ":")).encode())).decode()  # the store takes text
    pieces = [packed[start : start + PIECE_BYTES] for start in range(0, len(packed), PIECE_BYTES)]
    for number, piece in enumerate(pieces):
        store.set(f"trace/{rank}/{number}", piece)
    store.set(f"trace/{rank}", str(len(pieces)))


def _take(store: dist.Store, rank: int) -> RankTrace:
    """On rank 0: what _put() put, which leaves the store."""
    store.wait([f"trace/{rank}"], COLLECTIVE_TIMEOUT)
    keys = [f"trace/{rank}/{number}" for number in range(int(store.get(f"trace/{rank}")))]
    packed = b"".join(store.get(key) for key in keys)
    for key in [f"trace/{rank}", *keys]:
        store.delete_key(key)
    fields = json.loads(zlib.decompress(base64.b64decode(packed)))
    return RankTrace(**{**fields, "cost": RecordingCost(**fields["cost"])})


def chrome_trace(place: Place, by_rank: Sequence[RankTrace], about: Mapping[str, Any]) -> dict[str, Any]:
    """The Trace Event Format (object form): "X" a span, "i" an instant, "M" a name; times in microseconds from the first span.

    by_rank: in the order of ranks. place: of any rank, for the grid.
    """
    zero = min((row[3] for trace in by_rank for row in trace.rows), default=0)
    events = [event for rank, trace in enumerate(by_rank) for event in _events(place.at(rank), trace.rows, zero)]
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))  # outer spans before inner ones
    names = [event for rank in range(place.world_size) for event in _names(place.at(rank))]
    ranks = [
        {
            "rank": rank,
            "clock_offset_s": trace.clock_offset_s,
            "clock_uncertainty_s": trace.clock_uncertainty_s,
            "spans_per_step": trace.cost.spans_per_step,
            "span_cost_s": trace.cost.span_s,
            "median_step_s": trace.cost.step_s,
            "overhead": trace.cost.share,
        }
        for rank, trace in enumerate(by_rank)
    ]
    metadata = {"format": TRACE_FORMAT, "stages": place.pp_size, "replicas": place.dp_size, **about, "ranks": ranks}
    return {"traceEvents": [*names, *events], "displayTimeUnit": "ms", "otherData": metadata}


def _events(place: Place, rows: Iterable[list[Any]], zero: int) -> Iterable[dict[str, Any]]:
    for name, micro_batch, step, start, end in rows:
        arguments = {"step": step} if micro_batch is None else {"step": step, "micro_batch": micro_batch}
        event = {"name": name, "cat": CATEGORIES.get(name, OTHER), "pid": place.dp, "tid": place.pp, "ts": (start - zero) / 1000}
        is_instant = end == start and micro_batch is None
        kind = {"ph": "i", "s": "t"} if is_instant else {"ph": "X", "dur": (end - start) / 1000}
        yield {**event, **kind, "args": arguments}


def _names(place: Place) -> Iterable[dict[str, Any]]:
    where = {"ph": "M", "pid": place.dp, "tid": place.pp}
    if place.pp == 0:
        yield {**where, "name": "process_name", "args": {"name": f"replica {place.dp}"}}
        yield {**where, "name": "process_sort_index", "args": {"sort_index": place.dp}}
    yield {**where, "name": "thread_name", "args": {"name": f"stage {place.pp} (rank {place.rank})"}}
    yield {**where, "name": "thread_sort_index", "args": {"sort_index": place.pp}}


def check_trace_path(path: Path) -> None:
    """On rank 0, before anything is loaded: make the folders of ``path`` and try to write there. Raises UserError if that cannot be."""
    rule = f"--profiling tidy_profiling writes its trace to a file that rank 0 makes; {path} cannot be it"
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{rule}: it is {'a folder' if path.is_dir() else 'no ordinary file'}. Name a file")
        if path.exists() and path.stat().st_size > 0 and not is_trace(path):
            raise UserError(f"{rule}: it holds something else, which would be lost. Name a new file, or an older trace")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        partial.write_bytes(b"")
        partial.unlink()
    except OSError as error:
        where = f" (at {error.filename})" if error.filename else ""
        raise UserError(f"{rule}: {error.strerror}{where}. Name a file in a folder that you may write to") from error


def write_trace(path: Path, trace: Mapping[str, Any]) -> None:
    """Put the trace under its name at once, whole, replacing an older one. Raises UserError if the disk does not take it."""
    partial = _partial(path)
    with explained_disk_errors(path):
        try:
            with partial.open("w") as file:
                json.dump(trace, file, separators=(",", ":"), allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _stream_wait(device: torch.device) -> Callable[[], None] | None:
    """How to wait for what the compute stream of ``device`` was given; None on the CPU, which is never behind."""
    if device.type != "cuda":
        return None
    return lambda: torch.cuda.current_stream(device).synchronize()
