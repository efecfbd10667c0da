"""How much of a source has been read, as this rank says it of itself: in records where their number is known, else in bytes of the files.

Most of it is read ahead by a thread (prefetch.py). What that reads counts only while the rank waits for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from comms.spans import WAITING_FOR_DATA, Part, Spans

BYTES, RECORDS = "bytes", "records"


class Reading:
    """Of one source. read() and looked_at() are called by whoever reads it, on one thread at a time."""

    def __init__(self, name: str, spans: Spans | None = None) -> None:
        """name: as the user wrote it. spans: this rank's; None: nobody wants to know."""
        self._name = name
        self._spans = Spans() if spans is None else spans
        self._part = Part(lambda: self._spans.moved_during(WAITING_FOR_DATA), "")

    def read(self, num_bytes: int) -> None:
        """So many more bytes of the files, as stored."""
        self._part.add(num_bytes if self._part.unit == BYTES else 0)

    def looked_at(self) -> None:
        """One more record."""
        self._part.add(1 if self._part.unit == RECORDS else 0)

    def expect(self, num_bytes: int) -> None:
        """Before they are read, where counted() was not told how many there are."""
        if self._part.unit == BYTES:
            self._part.total = num_bytes

    @contextmanager
    def counted(self, doing: str, total: int = 0, unit: str = BYTES) -> Iterator[None]:
        """Count what is read in the block from 0, on the thread that opens spans."""
        before = self._part
        with self._spans.part(f"{doing} {self._name}", total, unit) as self._part:
            try:
                yield
            finally:
                self._part = before

    @contextmanager
    def skipping(self, num_records: int) -> Iterator[Part]:
        """Count records that are read over, to come to the one behind them: on any thread that this rank waits for."""
        title = f"reading {self._name} forwards to record {num_records + 1:,}"
        with self._spans.beside((WAITING_FOR_DATA,), title, num_records, RECORDS) as part:
            yield part
