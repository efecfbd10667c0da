"""What a data file may hold, before any task looks at it: bytes to records, and what is wrong with those that are none.

A record is a mapping from names to values: a line of JSON, a row of a table. This file knows neither files nor line numbers: it raises
BadRecordError with what was seen, and the reader adds where, the rule and the cure.
"""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any, Literal

from tasks.examples import BadRecordError, Record

OnBadRecord = Literal["error", "skip"]

MAX_RECORD_BYTES = 16 * 2**20  # no document is that long; a file without line ends is, and would not fit into memory

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


def record_of_line(line: bytes) -> Record:
    """The object in one line of JSON. Raises BadRecordError if there is none."""
    try:
        # A byte-order mark is what some editors write at the start of a file: it carries no text.
        record = json.loads(_text(line), object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise BadRecordError(f"not JSON ({error.msg} at column {error.colno}): {excerpt(line)}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets nested without end
        raise BadRecordError(f"not JSON that can be read ({error}): {excerpt(line)}") from error
    return record_of_value(record, line)


def record_of_value(value: Any, line: bytes = b"") -> Record:
    """``value``, which must be a JSON object. line: where it was, for the message."""
    if not isinstance(value, dict):
        shown = f": {excerpt(line)}" if line else ""
        raise BadRecordError(f"{_JSON_NAMES.get(type(value), type(value).__name__)} instead of an object{shown}")
    return value


def cells_of_row(row: bytes, delimiter: str) -> list[str]:
    """The cells of one row of a table: .csv with quotes where there are commas, quotes or line ends inside (RFC 4180), .tsv without any.
    Raises BadRecordError."""
    text = _text(row).rstrip("\r\n")
    if delimiter == "\t":
        return text.split("\t")
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise BadRecordError(f"not a row of a table ({error}): {excerpt(row)}") from error
    if len(rows) != 1:
        raise BadRecordError(f"a quote that is not closed: {excerpt(row)}")
    return rows[0]


def record_of_cells(cells: Sequence[str], columns: Sequence[str]) -> Record:
    """A row by the names of its columns. Raises BadRecordError unless there are as many cells."""
    if len(cells) != len(columns):
        raise BadRecordError(
            f"{len(cells)} cells where there are {len(columns)} columns ({', '.join(columns)}): {excerpt(str(cells).encode())}"
        )
    return dict(zip(columns, cells, strict=True))


def check_characters(text: str) -> None:
    """Raises BadRecordError for text that no file can hold: JSON can spell half of a surrogate pair, on which tokenizers fail."""
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
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"byte 0x{line[error.start]:02x} at column {error.start + 1}, which is not UTF-8: {excerpt(line)}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise BadRecordError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return found
