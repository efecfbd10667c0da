"""The data of the next steps, read and tokenised while the current step computes, so that training does not wait for text.

A daemon thread runs up to two steps ahead of the consumer. Promises: each step carries the mixture's state right behind its own
sequences, so what is saved with a consumed step never knows of those read ahead; an exception of the worker is raised by the `next()`
of the step where it belongs, after all steps before it (a defect of the tokenizer itself: where its batch of
documents begins); close() never waits for a reader that waits for room.

Left to the caller: steps without a single target, the cut into micro-batches, closing the mixture.

Legend: N = sequences in a step, T = ids in a sequence.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tasks.mixture import Mixture
from tasks.packing import num_targets

_CLOSE_WAIT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """The data of one optimizer step."""

    tokens: np.ndarray  # (N, 3, T) int32: token ids, positions, targets
    num_targets: int  # over all N sequences
    state: dict[str, Any]  # of the mixture, right behind these N sequences
    data_wait_s: float  # seconds that next() waited for this step


class StepReader:
    """Reads steps ahead of one consumer. From its construction to close() the mixture belongs to its thread alone."""

    def __init__(self, mixture: Mixture, *, sequences_per_step: int, depth: int = 2) -> None:
        """Starts reading at once, up to `depth` steps ahead."""
        assert sequences_per_step >= 1, f"a step must hold at least one sequence, not {sequences_per_step}"
        assert depth >= 1, f"the reader must be allowed to run one step ahead at least, not {depth}"
        self._mixture = mixture
        self._sequences_per_step = sequences_per_step
        self._depth = depth
        self._ready: deque[StepTokens] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="data-reader", daemon=True)
        self._thread.start()

    def next(self) -> StepTokens:
        """The next step, waited for if need be. Raises what the worker met where this step should be, again at every later call."""
        start = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None or self._closed)
            if self._closed:
                raise RuntimeError("StepReader.next() was called after close()")
            if not self._ready:
                assert self._error is not None
                raise self._error
            step = self._ready.popleft()
            self._changed.notify_all()
        return replace(step, data_wait_s=time.perf_counter() - start)

    def close(self, timeout_s: float | None = _CLOSE_WAIT_S) -> None:
        """Stops the thread. Returns at once, or after the sequence being tokenised; after ``timeout_s`` seconds in any case, unless that
        is None: the mixture is then the caller's again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while True:
                step = self._read_step()
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                    if step is None or self._closed:
                        return
                    self._ready.append(step)
                    self._changed.notify_all()
        except BaseException as error:  # handed to the consumer, whole: a panic in a Rust tokenizer is no Exception
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _read_step(self) -> StepTokens | None:
        """The next step of the mixture; None if the reader was closed meanwhile."""
        sequences = []
        for _ in range(self._sequences_per_step):
            if self._closed:
                return None
            sequences.append(self._mixture.next_sequence())
        tokens = np.stack([sequence.planes for sequence in sequences])  # (N, 3, T) int32
        return StepTokens(tokens=tokens, num_targets=num_targets(tokens[:, 2]), state=self._mixture.state(), data_wait_s=0.0)
