"""In which order records come: every pass another, fixed for ever by (seed, place of the task, pass) and the file.

Records that can be had by number are shuffled as a whole, and any place in any pass is found at once. Sources that can only be read
forwards are shuffled inside windows; to enter a pass in the middle their bytes are read again up to there, without a look into them.

Shuffling must give the same order under every numpy that will ever resume a run. numpy promises that only for the legacy RandomState,
whose streams NEP 19 froze; the newer Generator may change between releases.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from tasks.lines import Indexed
from tasks.reading import Reading
from tasks.records import Numbered
from tasks.streams import Forward, Stored

WINDOW_RECORDS = 10_000
WINDOW_BYTES = 64 * 2**20  # a window of long documents ends here, so that memory is bounded in bytes too
SUBSET = 2**32 - 1  # in place of a pass: the draw of --max-train-samples

logger = logging.getLogger(__name__)


def shuffled(num: int, *key: int) -> np.ndarray:
    """The numbers below `num` in an order fixed for ever by the key (non-negative integers)."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(list(key)))).permutation(num)


class Ordered(Protocol):
    """What tasks/readers.py needs of a source."""

    def at(self, pass_index: int, position: int) -> Numbered | None:
        """What stands at this place of this pass' order; raises LookupError behind the last one; None for a blank line."""

    def in_file_order(self) -> Iterator[Numbered]:
        """Those that are used, as they stand, blank lines left out."""

    def unused_too(self) -> Iterator[Numbered]:
        """All that the source has, likewise."""

    def close(self) -> None:
        """Closes the files."""


class Shuffled:
    """Records by number, all of them in one order per pass."""

    def __init__(self, records: Indexed, *, key: tuple[int, int], max_samples: int | None = None) -> None:
        """max_samples: how many are used, drawn once."""
        self._records, self._key = records, key
        self._subset: np.ndarray | None = None  # numbers of those that are used, in file order; None: all
        if max_samples is not None and max_samples < len(records):
            self._subset = self._draw(max_samples)
        self._groups: Sequence[np.ndarray] | None = None
        self._pass_index = -1
        self._order = np.empty(0, dtype=np.int64)

    def _draw(self, num: int) -> np.ndarray:
        found: list[int] = []
        for index in shuffled(len(self._records), *self._key, SUBSET):
            if len(found) == num:
                break
            if self._records.get(int(index)) is not None:  # a blank line is no record
                found.append(int(index))
        return np.array(sorted(found), dtype=np.int64)

    @property
    def numbers(self) -> np.ndarray:
        """Of the records that are used, in file order."""
        return np.arange(len(self._records)) if self._subset is None else self._subset

    def balance(self, groups: Sequence[np.ndarray]) -> None:
        """From now on a pass holds as many records of every group (their numbers) as the smallest has, others in every pass."""
        self._groups, self._pass_index = groups, -1

    def at(self, pass_index: int, position: int) -> Numbered | None:
        if pass_index != self._pass_index:
            self._order, self._pass_index = self._order_of(pass_index), pass_index
        if position >= len(self._order):
            raise LookupError(position)
        return self._records.get(int(self._order[position]))

    def _order_of(self, pass_index: int) -> np.ndarray:
        if self._groups is not None:
            least = min(len(group) for group in self._groups)
            drawn = [group[shuffled(len(group), *self._key, pass_index, n)[:least]] for n, group in enumerate(self._groups, start=1)]
            numbers = np.concatenate(drawn)
            return numbers[shuffled(len(numbers), *self._key, pass_index)]
        if self._subset is not None:
            return self._subset[shuffled(len(self._subset), *self._key, pass_index)]
        return shuffled(len(self._records), *self._key, pass_index)

    def get(self, number: int) -> Numbered | None:
        """A record by its number."""
        return self._records.get(number)

    def in_file_order(self) -> Iterator[Numbered]:
        return self._those(range(len(self._records)) if self._subset is None else self._subset.tolist())

    def unused_too(self) -> Iterator[Numbered]:
        return self._those(range(len(self._records)))

    def _those(self, numbers: Iterable[int]) -> Iterator[Numbered]:
        for number in numbers:
            found = self._records.get(number)
            if found is not None:
                yield found

    def close(self) -> None:
        self._records.close()


class Windowed:
    """Records read forwards, window by window."""

    def __init__(
        self,
        forward: Forward,
        *,
        name: str,
        key: tuple[int, int],
        window_records: int = WINDOW_RECORDS,
        max_samples: int | None = None,
        reading: Reading | None = None,
    ) -> None:
        """max_samples: how many are used, the first ones."""
        self._reading = reading or Reading(name)
        self._forward, self._name, self._key = forward, name, key
        self._window_records, self._max_samples = window_records, max_samples
        self._pass_index = -1
        self._stream: Iterator[Stored] = iter(())
        self._window: list[Stored] = []
        self._window_index = -1
        self._window_start = 0  # position of the window's first record in the pass
        self._order = np.empty(0, dtype=np.int64)

    def at(self, pass_index: int, position: int) -> Numbered | None:
        is_entered = pass_index != self._pass_index or position < self._window_start
        started = time.perf_counter()
        if is_entered:
            self._stream = self._stored()
            self._pass_index = pass_index
            self._window, self._window_index, self._window_start = [], -1, 0
        if is_entered and position >= self._window_records:
            self._skip_to(position)
        while position >= self._window_start + len(self._window):
            if not self._read_window():
                raise LookupError(position)
        if is_entered and self._window_index > 0:  # a resume, not the beginning of a pass
            seconds = time.perf_counter() - started
            logger.info("%s: read forwards to record %d of pass %d in %.3g s", self._name, position + 1, pass_index + 1, seconds)
        return self._window[int(self._order[position - self._window_start])].numbered()

    def _skip_to(self, position: int) -> None:
        """Read over what stands in front, as far as there is anything."""
        with self._reading.skipping(position) as part:
            while position >= self._window_start + len(self._window) and self._read_window():
                part.add(len(self._window))

    def in_file_order(self) -> Iterator[Numbered]:
        for stored in self._stored():
            yield stored.numbered()

    def unused_too(self) -> Iterator[Numbered]:
        for stored in self._forward():
            yield stored.numbered()

    def close(self) -> None:
        self._stream, self._window = iter(()), []  # drops the generator, whose file closes with it

    def _stored(self) -> Iterator[Stored]:
        for number, stored in enumerate(self._forward()):
            if number == self._max_samples:
                return
            yield stored

    def _read_window(self) -> bool:
        """Moves on to the next window; at the end of the stream that is an empty one, and the answer False."""
        start = self._window_start + len(self._window)
        self._window = []  # before the next one grows, so that two are never in memory
        num_bytes = 0
        window: list[Stored] = []
        for stored in self._stream:
            window.append(stored)
            num_bytes += stored.num_bytes
            if len(window) == self._window_records or num_bytes >= WINDOW_BYTES:
                break
        self._window_start = start
        self._window = window
        self._window_index += 1
        self._order = shuffled(len(window), *self._key, self._pass_index, self._window_index)
        return bool(window)
