"""What a data file may hold, before any task looks at it: bytes to records, and what is wrong with those that are none.

A record is a mapping from names to values: a line of JSON, a row of a table. This file knows neither files nor line numbers: it raises
BadRecordError with what was seen, and the reader adds where, the rule and the cure.
"""

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tasks.examples import BadRecordError, Record

OnBadRecord = Literal["error", "skip"]

MAX_RECORD_BYTES = 16 * 2**20  # no document is that long; a file without line ends is, and would not fit into memory

TOO_LONG = f"a record of more than {MAX_RECORD_BYTES // 2**20} MiB"

_EXCERPT_CHARS = 60
csv.field_size_limit(MAX_RECORD_BYTES)  # its own is 128 KiB
_JSON_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


class Numbered(NamedTuple):
    """A record, or what is wrong with it; where: file:line, or what comes nearest."""

    where: str
    record: Record | BadRecordError


def numbered(where: str, read: Callable[[], Record]) -> Numbered:
    """What ``read`` returns, or what it raises."""
    try:
        return Numbered(where, read())
    except BadRecordError as error:
        return Numbered(where, error)


def record_of_line(line: bytes) -> Record:
    """The object in one line of JSON. Raises BadRecordError if there is none."""
    try:
        record = _DECODER.decode(_text(line))
    except json.JSONDecodeError as error:
        raise BadRecordError(f"not JSON ({error.msg} at column {error.colno}): {excerpt(line)}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets nested without end
        raise BadRecordError(f"not JSON that can be read ({error}): {excerpt(line)}") from error
    return record_of_value(record, line)


def record_of_value(value: Any, line: bytes = b"") -> Record:
    """``value``, which must be a JSON object; a BadRecordError is raised. line: where it was, for the message."""
    if isinstance(value, BadRecordError):
        raise BadRecordError(str(value))
    if not isinstance(value, dict):
        shown = f": {excerpt(line)}" if line else ""
        raise BadRecordError(f"{_JSON_NAMES.get(type(value), type(value).__name__)} instead of an object{shown}")
    return value


def value_of_json(content: bytes) -> Any:
    """What a whole file holds. In place of an object that has a key twice, or holds one that has, stands a BadRecordError: the others are
    good. Raises ValueError (JSON's or UTF-8's) and RecursionError."""
    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object_or_error)


def size_of_value(value: Any) -> int:
    """About the bytes that a record of text takes, for windows that are bounded in bytes."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(size_of_value, value.values()))
    return sum(map(size_of_value, value)) if isinstance(value, (list, tuple)) else 8


def cells_of_row(row: bytes, delimiter: str) -> list[str]:
    """The cells of one row of a table: .csv with quotes where there are commas, quotes or line ends inside (RFC 4180), .tsv without any.
    Raises BadRecordError."""
    text = _text(row).rstrip("\r\n")
    if not text:
        return []
    if delimiter == "\t":
        return text.split("\t")
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise BadRecordError(f"not a row of a table ({error}): {excerpt(row)}") from error
    if len(rows) != 1:  # cut at the line ends whose number of quotes so far is even, and read otherwise: a quote inside a bare cell
        raise BadRecordError(f"a quote in a cell that does not begin with one, or one not closed; {len(rows)} rows in one: {excerpt(row)}")
    return rows[0]


def record_of_cells(cells: Sequence[str], columns: Sequence[str]) -> Record:
    """A row by the names of its columns. Raises BadRecordError unless there are as many cells."""
    if len(cells) != len(columns):
        raise BadRecordError(
            f"{len(cells)} cells where there are {len(columns)} columns ({', '.join(columns)}): {excerpt(str(cells).encode())}"
        )
    return dict(zip(columns, cells, strict=True))


def check_text(text: str) -> None:
    """Raises BadRecordError for text that no file can hold: JSON can spell half of a surrogate pair, on which tokenizers fail; a table of
    other packages' can hold more in a cell than a line may."""
    if len(text) > MAX_RECORD_BYTES:
        raise BadRecordError(f"{TOO_LONG}: {len(text)} characters")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecordError(f"half of a surrogate pair, which is no character: {excerpt(text.encode(errors='replace'))}") from error


def excerpt(line: bytes) -> str:
    """The beginning of a line, short and printable, for messages."""
    # Four bytes are the most that a UTF-8 character takes, so this much is enough however long the line is.
    head = line[: 4 * _EXCERPT_CHARS + 4].decode("utf-8", errors="replace").strip()
    return repr(head if len(head) <= _EXCERPT_CHARS else head[:_EXCERPT_CHARS] + "...")


def _text(line: bytes) -> str:
    if b"\0" in line:
        raise BadRecordError(f"a NUL byte at column {line.index(0) + 1}, so this is no text: {excerpt(line)}")
    try:
        # A byte-order mark is what some editors write at the start of a file: it carries no text.
        return line.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecordError(
            f"byte 0x{error.object[error.start]:02x} at column {error.start + 1}, which is not UTF-8: {excerpt(line)}"
        ) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        doubled = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise BadRecordError(f"the key {excerpt(doubled.encode(errors='replace'))} stands in it twice")
    return found


def _object_or_error(pairs: list[tuple[str, Any]]) -> dict[str, Any] | BadRecordError:
    try:
        found = _without_duplicates(pairs)
    except BadRecordError as error:
        return error
    return _error_in(list(found.values())) or found


def _error_in(value: Any) -> BadRecordError | None:
    if isinstance(value, list):
        return next((error for item in value if (error := _error_in(item)) is not None), None)
    return value if isinstance(value, BadRecordError) else None


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates)  # one for all lines: making it takes as long as a short line
