"""The lines of one data file in a shuffled order per pass: two ways to store a file, one way to ask for a line.

Neither reads a record's meaning (tasks/readers.py does). Both are pure functions of (seed, place of the task, pass, position) and the
file, and both keep their memory bounded however long a run is:

- PlainLines knows where each line starts (8 bytes a line, and 8 more for the pass' order) and seeks. The whole file is shuffled.
- ZstLines reads a compressed stream forwards and shuffles inside windows of up to 10,000 records, so that only a window is in
  memory. To enter a pass in the middle it reads the bytes up to there again, without looking into them.

Shuffling must give the same order under every numpy that will ever resume a run. numpy promises that only for the legacy RandomState,
whose streams NEP 19 froze; the newer Generator may change between releases.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import zstandard

from user_error import UserError

SCAN_BYTES = 2**20
WINDOW_RECORDS = 10_000
WINDOW_BYTES = 64 * 2**20  # a window of long documents ends here, so that memory is bounded in bytes too
ZST_READ_BYTES = 2**14  # little, since text that repeats itself may unpack to hundreds of times as much
# Files made with `zstd --long=31` need a window this large; the decoder takes only what a frame asks for.
ZST_MAX_WINDOW_BYTES = 2**31


class Lines(Protocol):
    """What tasks/readers.py needs of a stored file."""

    num_bytes: int

    def line_at(self, pass_index: int, position: int) -> tuple[int, bytes] | None:
        """(line number counted from 1, its bytes) at this position of this pass' order; None behind the last. Some may be blank."""

    def in_file_order(self) -> Iterator[tuple[int, bytes]]:
        """All lines with their numbers, as they stand in the file."""

    def close(self) -> None:
        """Closes the file."""


def shuffled(num: int, *key: int) -> np.ndarray:
    """The numbers below `num` in an order fixed for ever by the key (non-negative integers)."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(list(key)))).permutation(num)


class PlainLines:
    """Lines of an uncompressed file, by seeking."""

    def __init__(self, path: Path, *, seed: int, place: int) -> None:
        self.num_bytes = path.stat().st_size
        self._path = path
        self._key = (seed, place)
        self._starts = _line_starts(path)  # (number of lines + 1,) int64; line i is bytes [starts[i], starts[i + 1])
        self._pass_index = -1
        self._order = np.empty(0, dtype=np.int64)
        self._file = path.open("rb")

    def line_at(self, pass_index: int, position: int) -> tuple[int, bytes] | None:
        if pass_index != self._pass_index:
            self._order = shuffled(len(self._starts) - 1, *self._key, pass_index)
            self._pass_index = pass_index
        if position >= len(self._order):
            return None
        index = int(self._order[position])
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        self._file.seek(start)
        return index + 1, self._file.read(end - start)

    def in_file_order(self) -> Iterator[tuple[int, bytes]]:
        with self._path.open("rb") as file:
            yield from enumerate(file, start=1)

    def close(self) -> None:
        self._file.close()


def _line_starts(path: Path) -> np.ndarray:
    """Byte offset of every line, then the file's size, (number of lines + 1,) int64."""
    pieces = [np.zeros(1, dtype=np.int64)]
    num_bytes = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(SCAN_BYTES):
            pieces.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + (num_bytes + 1))
            num_bytes += len(chunk)
    starts = np.concatenate(pieces)
    return starts if starts[-1] == num_bytes else np.append(starts, num_bytes)  # the last line may lack its newline


class ZstLines:
    """Lines of a zstandard stream of one or many frames, window by window."""

    def __init__(self, path: Path, *, name: str, seed: int, place: int) -> None:
        self.num_bytes = path.stat().st_size
        self._path = path
        self._name = name
        self._key = (seed, place)
        self._pass_index = -1
        self._stream: Iterator[tuple[int, bytes]] = iter(())
        self._window: list[tuple[int, bytes]] = []
        self._window_index = -1
        self._window_start = 0  # position of the window's first record in the pass
        self._order = np.empty(0, dtype=np.int64)

    def line_at(self, pass_index: int, position: int) -> tuple[int, bytes] | None:
        if pass_index != self._pass_index or position < self._window_start:
            self._stream = self.in_file_order()
            self._pass_index = pass_index
            self._window, self._window_index, self._window_start = [], -1, 0
        while position >= self._window_start + len(self._window):
            if not self._read_window():
                return None
        return self._window[int(self._order[position - self._window_start])]

    def in_file_order(self) -> Iterator[tuple[int, bytes]]:
        return enumerate(_zst_lines(self._path, self._name), start=1)

    def close(self) -> None:
        self._stream = iter(())  # drops the generator, whose file closes with it

    def _read_window(self) -> bool:
        """Moves on to the next window; at the end of the stream that is an empty one, and the answer False."""
        start = self._window_start + len(self._window)
        self._window = []  # before the next one grows, so that two are never in memory
        num_bytes = 0
        window: list[tuple[int, bytes]] = []
        for line_number, line in self._stream:
            if line.isspace():
                continue
            window.append((line_number, line))
            num_bytes += len(line)
            if len(window) == WINDOW_RECORDS or num_bytes >= WINDOW_BYTES:
                break
        self._window_start = start
        self._window = window
        self._window_index += 1
        self._order = shuffled(len(window), *self._key, self._pass_index, self._window_index)
        return bool(window)


def _zst_lines(path: Path, name: str) -> Iterator[bytes]:
    """Lines with their newlines, as iterating over a plain binary file gives them."""
    rest = b""
    for block in _zst_blocks(path, name):
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


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
