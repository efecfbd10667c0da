"""Records that can be had by their number: lines of a plain file, items of a .json that is one array or object, several such as one.

Nothing here knows what a record means. Memory stays bounded however large a source is: 8 bytes per line of a plain file (16 of a .csv), the
whole of a .json that is one array or object.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from tasks.examples import BadRecordError, Record
from tasks.records import MAX_RECORD_BYTES, TOO_LONG, Numbered, numbered, record_of_value, size_of_value, value_of_json
from tasks.streams import SCAN_BYTES, Forward, Progress, Stored, blocks, numbered_lines, unheard
from user_error import UserError

MAX_WHOLE_BYTES = 2**30  # of a .json that is parsed as a whole


class Indexed(Protocol):
    """Records that can be had by number."""

    def __len__(self) -> int:
        """How many there are, blank lines included."""

    def get(self, index: int) -> Numbered | None:
        """One of them; None for a blank line."""

    def close(self) -> None:
        """No record is asked for any more."""


class IndexedLines:
    """The lines of a plain file, each a record for ``parse``; by seeking. first: records to leave out at the beginning. quoted: a line end
    between quotes ends no record. keep_open: false for one of so many files that they cannot all be open."""

    def __init__(
        self,
        path: Path,
        name: str,
        parse: Callable[[bytes], Record],
        *,
        first: int = 0,
        quoted: bool = False,
        keep_open: bool = True,
        progress: Progress = unheard,
    ) -> None:
        """progress: hears the bytes that were just looked through for the beginnings of the lines."""
        self._path, self._name, self._parse = path, name, parse
        starts, lines = _record_starts(path, quoted=quoted, progress=progress)
        self._starts = starts[first:]  # (number of records + 1,) int64; record i is bytes [starts[i], starts[i + 1])
        self._lines = lines[first:] if lines is not None else None  # of each record its first line, where they are not all one line long
        self._first = first
        self._file: IO[bytes] | None = path.open("rb") if keep_open else None

    def __len__(self) -> int:
        return max(0, len(self._starts) - 1)

    def get(self, index: int) -> Numbered | None:
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        where = f"{self._name}:{int(self._lines[index]) if self._lines is not None else self._first + index + 1}"
        if end - start > MAX_RECORD_BYTES:
            return Numbered(where, BadRecordError(f"{TOO_LONG}: {end - start} bytes"))
        if self._file is not None:
            self._file.seek(start)
            line = self._file.read(end - start)
        else:
            with self._path.open("rb", buffering=0) as file:
                file.seek(start)
                line = file.read(end - start)
        return None if line.isspace() else numbered(where, lambda: self._parse(line))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _record_starts(path: Path, *, quoted: bool, progress: Progress = unheard) -> tuple[np.ndarray, np.ndarray | None]:
    """Byte offset of every record, then the file's size, (number of records + 1,) int64; and, if ``quoted``, the line of each."""
    pieces, lines = [np.zeros(1, dtype=np.int64)], [np.ones(1, dtype=np.int64)]
    num_bytes = num_quotes = num_lines = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(SCAN_BYTES):
            values = np.frombuffer(chunk, dtype=np.uint8)
            ends = np.flatnonzero(values == ord("\n"))
            if quoted:
                quotes = np.flatnonzero(values == ord('"'))
                is_outside = (np.searchsorted(quotes, ends) + num_quotes) % 2 == 0
                lines.append((np.arange(len(ends)) + num_lines + 2)[is_outside])
                num_quotes, num_lines = num_quotes + len(quotes), num_lines + len(ends)
                ends = ends[is_outside]
            pieces.append(ends + (num_bytes + 1))
            num_bytes += len(chunk)
            progress(len(chunk))
    starts = np.concatenate(pieces)
    if starts[-1] != num_bytes:
        starts = np.append(starts, num_bytes)  # the last line may lack its newline
    return starts, np.concatenate(lines) if quoted else None


class IndexedSequence:
    """Records that are in memory, or that a sequence of (where, record) finds itself."""

    def __init__(self, items: Sequence[tuple[str, Any]]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def get(self, index: int) -> Numbered | None:
        where, value = self._items[index]
        return numbered(where, lambda: record_of_value(value))

    def close(self) -> None:
        self._items = ()


class Joined:
    """Several sources as one."""

    def __init__(self, parts: Sequence[Indexed]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def get(self, index: int) -> Numbered | None:
        place = bisect_right(self._ends, index)
        return self._parts[place].get(index - (self._ends[place - 1] if place else 0))

    def close(self) -> None:
        for part in self._parts:
            part.close()


def read_in_turn(records: Indexed) -> Forward:
    """Records by number as a part of a source that is read forwards."""

    def read() -> Iterator[Stored]:
        for number in range(len(records)):
            found = records.get(number)
            if found is not None:
                yield Stored(found.where, size_of_value(found.record), lambda found=found: record_of_value(found.record))  # type: ignore[misc]

    return read


def whole_json(
    path: Path, name: str, packing: str, *, texts_by_name: Callable[[Record], bool] | None, progress: Progress = unheard
) -> IndexedSequence | None:
    """A .json that is one array of objects, or one object; None if it holds one object per line. texts_by_name: whether such an object is
    no record, but holds one text per field; None: never. progress: hears the bytes of the file that were just read. Raises UserError."""
    lines = (line for _, line in numbered_lines(path, name, packing) if line is None or not line.isspace())
    first = next(lines, b"") or b""
    is_array = first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if _is_json(first) and next(lines, b"") != b"":
        return None
    content = bytearray()
    for block in blocks(path, name, packing, progress):
        content += block
        if len(content) > MAX_WHOLE_BYTES:
            if not is_array:
                return None  # told line by line
            raise UserError(
                f"A .json file that is one array is read as a whole, up to {MAX_WHOLE_BYTES / 2**30:g} GiB; {name} is larger. Write it as "
                ".jsonl, one object per line."
            )
    try:
        value = value_of_json(bytes(content))
    except (ValueError, RecursionError) as error:
        if is_array:
            where = f"{name}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else name
            raise UserError(f"A .json file must be JSON in UTF-8; {where}: {error}. Correct the file.") from error
        return None  # told line by line
    if isinstance(value, list):
        return IndexedSequence([(f"{name}: item {number}", item) for number, item in enumerate(value, start=1)])
    if texts_by_name is not None and isinstance(value, dict) and texts_by_name(value):
        return IndexedSequence([(f"{name}: {key}", {"name": key, "text": text}) for key, text in value.items()])
    return IndexedSequence([(name, value)])


def _is_json(line: bytes) -> bool:
    try:
        value_of_json(line)
    except (ValueError, RecursionError):
        return False
    return True
