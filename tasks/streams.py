"""Text files read forwards, whatever compresses them: their lines, or the rows of a table whose quotes may hold line ends.

Reading over a record costs its bytes and no look into them, which is how a resumed run comes back to its place. A file that was cut short
is an error, else half of a broken download would be trained on for ever.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard

from tasks.examples import BadRecordError, Record
from tasks.records import MAX_RECORD_BYTES, TOO_LONG, Numbered, numbered
from user_error import UserError

SCAN_BYTES = 2**20
# Little, since a block of 4 bytes may stand for 128 KiB: so much of a file unpacks to 16 MiB at the most, at a tenth more time.
ZST_READ_BYTES = 2**9
SAID_BYTES = 2**16  # at a time
# Files made with `zstd --long=31` need a window this large; the decoder takes only what a frame asks for.
ZST_MAX_WINDOW_BYTES = 2**31
PACKED = (".zst", ".gz")

Progress = Callable[[int], object]  # hears the bytes of a file that were just read


def unheard(num_bytes: int) -> None:
    """Where nobody wants to know."""


class Stored(NamedTuple):
    """A record not looked at yet: reading over it must cost nothing. num_bytes: about what it takes in memory."""

    where: str
    num_bytes: int
    read: Callable[[], Record]

    def numbered(self) -> Numbered:
        """The same, looked at."""
        return numbered(self.where, self.read)


Forward = Callable[[], Iterator[Stored]]  # records that can be read from the beginning only, blank lines left out


def forward_lines(
    path: Path,
    name: str,
    packing: str,
    parse: Callable[[bytes], Record],
    *,
    first: int = 0,
    quoted: bool = False,
    progress: Progress = unheard,
) -> Forward:
    """The records of a file, one to a line. packing: one of PACKED, or "" for a plain file. first: records to leave out at the beginning.
    quoted: a line end between quotes ends no record. progress: hears the bytes of the file that were just read."""

    def read() -> Iterator[Stored]:
        for number, (line_number, line) in enumerate(numbered_lines(path, name, packing, quoted=quoted, progress=progress)):
            if number >= first and not (line is not None and line.isspace()):
                yield _stored(f"{name}:{line_number}", line, parse)

    return read


def _stored(where: str, line: bytes | None, parse: Callable[[bytes], Record]) -> Stored:
    def read_it() -> Record:
        if line is None:
            raise BadRecordError(TOO_LONG)
        return parse(line)

    return Stored(where, len(line or b""), read_it)


def numbered_lines(
    path: Path, name: str, packing: str, *, quoted: bool = False, progress: Progress = unheard
) -> Iterator[tuple[int, bytes | None]]:
    """(number of its first line, the record with its line end); None for one that is too long to be held. Raises UserError."""
    lines = enumerate(_lines(blocks(path, name, packing, progress)), start=1)
    return _rows(lines) if quoted else lines


def blocks(path: Path, name: str, packing: str, progress: Progress = unheard) -> Iterator[bytes]:
    """What the file holds, unpacked, none of them empty. Raises UserError for a broken file and one that cannot be read."""
    try:
        yield from {"": _plain_blocks, ".gz": _gz_blocks, ".zst": _zst_blocks}[packing](path, name, progress)
    except OSError as error:
        raise UserError(f"A data file must be readable; {name}: {error}. Correct the path or the file's permissions.") from error


def _lines(unpacked: Iterator[bytes]) -> Iterator[bytes | None]:
    pieces: list[bytes] = []  # of a line that has not ended yet; joined once, since a long one has many
    num_bytes, is_too_long = 0, False
    for block in unpacked:
        head, *others = block.split(b"\n")
        if others:
            yield None if is_too_long or num_bytes + len(head) > MAX_RECORD_BYTES else b"".join([*pieces, head, b"\n"])
            *whole, head = others
            for line in whole:
                yield None if len(line) > MAX_RECORD_BYTES else line + b"\n"
            pieces, num_bytes, is_too_long = [], 0, False
        pieces.append(head)
        num_bytes += len(head)
        if num_bytes > MAX_RECORD_BYTES:
            pieces, num_bytes, is_too_long = [], 0, True
    if num_bytes or is_too_long:
        yield None if is_too_long else b"".join(pieces)


def _rows(lines: Iterator[tuple[int, bytes | None]]) -> Iterator[tuple[int, bytes | None]]:
    """Lines joined while a quote is open, as IndexedLines finds them."""
    pieces: list[bytes] = []
    start, num_bytes, is_open, is_too_long = 1, 0, False, False
    for number, line in lines:
        if not is_open:
            start, num_bytes, is_too_long = number, 0, False
        if line is None:  # its quotes are not known: taken for even
            is_too_long = True
        else:
            is_open ^= line.count(b'"') % 2 == 1
            num_bytes += len(line)
            pieces.append(line)
        if num_bytes > MAX_RECORD_BYTES:
            is_too_long = True
        if is_too_long:
            pieces = []
        if not is_open:
            yield start, None if is_too_long else b"".join(pieces)
            pieces = []
    if is_open:
        yield start, None if is_too_long else b"".join(pieces)


def _plain_blocks(path: Path, name: str, progress: Progress) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while block := file.read(SCAN_BYTES):
            progress(len(block))
            yield block


def _gz_blocks(path: Path, name: str, progress: Progress) -> Iterator[bytes]:
    try:
        with path.open("rb") as stored, gzip.open(stored, "rb") as file:
            at = 0
            while block := file.read(SCAN_BYTES):
                before, at = at, stored.tell()
                progress(at - before)
                yield block
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"A .gz file must be whole gzip data; {name}: {error}. Copy or download it again, or compress it anew.") from error


def _zst_blocks(path: Path, name: str, progress: Progress) -> Iterator[bytes]:
    """zstandard's own stream_reader takes a file that was cut short for a whole one, so the frames are followed here by hand: a file that
    ends inside a frame is an error."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZST_MAX_WINDOW_BYTES)
    frame = None
    unsaid = 0
    with path.open("rb") as file:
        while chunk := file.read(ZST_READ_BYTES):
            unsaid += len(chunk)
            if unsaid >= SAID_BYTES:
                progress(unsaid)
                unsaid = 0
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
