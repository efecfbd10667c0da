"""How records are stored, and how one is found again: by its number where a file can be sought in, or by reading forwards.

Nothing here knows what a record means. Memory stays bounded however large a source is: 8 bytes per line of a plain file (16 of a .csv),
a window of a compressed one, the whole of a .json that is one array or object.
"""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import zstandard

from tasks.examples import BadRecordError, Record
from tasks.records import MAX_RECORD_BYTES, cells_of_row, record_of_cells, record_of_line, record_of_value
from user_error import UserError

SCAN_BYTES = 2**20
ZST_READ_BYTES = 2**14  # little, since text that repeats itself may unpack to hundreds of times as much
# Files made with `zstd --long=31` need a window this large; the decoder takes only what a frame asks for.
ZST_MAX_WINDOW_BYTES = 2**31
MAX_WHOLE_BYTES = 2**30  # of a .json that is parsed as a whole

_TOO_LONG = f"a record of more than {MAX_RECORD_BYTES // 2**20} MiB"


class Numbered(NamedTuple):
    """A record, or what is wrong with it; where: file:line, or what comes nearest."""

    where: str
    record: Record | BadRecordError


class Indexed(Protocol):
    """Records that can be had by number."""

    def __len__(self) -> int:
        """How many there are, blank lines included."""

    def get(self, index: int) -> Numbered | None:
        """One of them; None for a blank line."""

    def close(self) -> None:
        """No record is asked for any more."""


class Stored(NamedTuple):
    """A record not looked at yet: reading over it must cost nothing."""

    where: str
    num_bytes: int
    read: Callable[[], Record]

    def numbered(self) -> Numbered:
        """The same, looked at."""
        return numbered(self.where, self.read)


Forward = Callable[[], Iterator[Stored]]  # records that can be read from the beginning only, blank lines left out


def numbered(where: str, read: Callable[[], Record]) -> Numbered:
    """What ``read`` returns, or what it raises."""
    try:
        return Numbered(where, read())
    except BadRecordError as error:
        return Numbered(where, error)


class IndexedLines:
    """The lines of a plain file, each a record for ``parse``; by seeking. first: lines before the first record. quoted: a line end between
    quotes ends no record."""

    def __init__(self, path: Path, name: str, parse: Callable[[bytes], Record], *, first: int = 0, quoted: bool = False) -> None:
        self._name, self._parse = name, parse
        starts, lines = _record_starts(path, quoted=quoted)
        self._starts = starts[first:]  # (number of records + 1,) int64; record i is bytes [starts[i], starts[i + 1])
        self._lines = lines[first:] if lines is not None else None  # of each record its first line, where they are not all one line long
        self._first = first
        self._file = path.open("rb")

    def __len__(self) -> int:
        return max(0, len(self._starts) - 1)

    def get(self, index: int) -> Numbered | None:
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        where = f"{self._name}:{int(self._lines[index]) if self._lines is not None else self._first + index + 1}"
        if end - start > MAX_RECORD_BYTES:
            return Numbered(where, BadRecordError(f"{_TOO_LONG}: {end - start} bytes"))
        self._file.seek(start)
        line = self._file.read(end - start)
        return None if line.isspace() else numbered(where, lambda: self._parse(line))

    def close(self) -> None:
        self._file.close()


def _record_starts(path: Path, *, quoted: bool) -> tuple[np.ndarray, np.ndarray | None]:
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
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def get(self, index: int) -> Numbered | None:
        place = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[place].get(index - (int(self._ends[place - 1]) if place else 0))

    def close(self) -> None:
        for part in self._parts:
            part.close()


def whole_json(path: Path, name: str) -> IndexedSequence | None:
    """A .json that is one array of objects, one object of texts by name (as chain-of-thought prompts are), or one object; None if it holds
    one object per line. Raises UserError."""
    with path.open("rb") as file:
        head = file.read(SCAN_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
        is_array = head.startswith(b"[")
        if not is_array and _is_json(head.partition(b"\n")[0]) and head.partition(b"\n")[2].strip():
            return None
        if file.seek(0, 2) > MAX_WHOLE_BYTES:
            raise UserError(
                f"A .json file that is one array or object is read as a whole, up to {MAX_WHOLE_BYTES // 2**30} GiB; {name} is "
                "larger. Write "
                "it as .jsonl, one object per line."
            )
        file.seek(0)
        try:
            value = json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            if is_array:
                raise UserError(f"A .json file must be JSON in UTF-8: {name}: {error}. Correct the file.") from error
            return None  # told line by line
    if isinstance(value, list):
        return IndexedSequence([(f"{name}: item {number}", item) for number, item in enumerate(value, start=1)])
    if isinstance(value, dict) and len(value) > 1 and all(isinstance(text, str) for text in value.values()) and "text" not in value:
        return IndexedSequence([(f"{name}: {key}", {"name": key, "text": text}) for key, text in value.items()])
    return IndexedSequence([(name, value)])


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def forward_lines(path: Path, name: str, parse: Callable[[bytes], Record], *, first: int = 0) -> Forward:
    """The lines of a compressed file, one record each; the first ``first`` are none."""

    def read() -> Iterator[Stored]:
        for number, line in enumerate(unpacked_lines(path, name), start=1):
            if number > first and not (line is not None and line.isspace()):
                yield _stored(f"{name}:{number}", line, parse)

    return read


def _stored(where: str, line: bytes | None, parse: Callable[[bytes], Record]) -> Stored:
    def read_it() -> Record:
        if line is None:
            raise BadRecordError(_TOO_LONG)
        return parse(line)

    return Stored(where, len(line or b""), read_it)


def unpacked_lines(path: Path, name: str) -> Iterator[bytes | None]:
    """Lines with their newlines, as iterating over a plain binary file gives them; None for one that is too long to be held."""
    rest, is_too_long = b"", False
    for block in (_gz_blocks if path.name.lower().endswith(".gz") or name.lower().endswith(".gz") else _zst_blocks)(path, name):
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        for line in lines:
            yield None if is_too_long or len(line) > MAX_RECORD_BYTES else line + b"\n"
            is_too_long = False
        if len(rest) > MAX_RECORD_BYTES:
            rest, is_too_long = b"", True
    if rest or is_too_long:
        yield None if is_too_long else rest


def _gz_blocks(path: Path, name: str) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") as file:
            while block := file.read(SCAN_BYTES):
                yield block
    except (gzip.BadGzipFile, EOFError, OSError) as error:
        raise UserError(f"A .gz file must be whole gzip data; {name}: {error}. Copy or download it again, or compress it anew.") from error


def _zst_blocks(path: Path, name: str) -> Iterator[bytes]:
    """Decompressed bytes. zstandard's own stream_reader takes a file that was cut short for a whole one, so the frames are followed
    here by hand: a file that ends inside a frame is an error, else a broken copy would silently train on a part of the data."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZST_MAX_WINDOW_BYTES)
    frame = None
    with path.open("rb") as file:
        while chunk := file.read(ZST_READ_BYTES):
            while chunk:
                frame = frame or decompressor.decompressobj()
                try:
                    block = frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise _broken_zst(name, f"at about byte {file.tell()}: {error}") from error
                chunk = b""
                if frame.eof:  # what follows, if anything, is another frame
                    chunk, frame = frame.unused_data, None
                if block:
                    yield block
    if frame is not None:
        raise _broken_zst(name, "ends in the middle of a frame")


def _broken_zst(name: str, seen: str) -> UserError:
    return UserError(f"A .zst file must be whole zstandard data; {name} {seen}. Copy or download it again, or compress it anew.")


JSON_LINE = record_of_line


def table_parser(columns: Sequence[str], delimiter: str) -> Callable[[bytes], Record]:
    """From a row of a table with these columns to its record."""
    return lambda row: record_of_cells(cells_of_row(row, delimiter), columns)
