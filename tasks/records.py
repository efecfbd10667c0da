"""What one line of a data file may hold, so that every reader judges it alike.

A record is one JSON object in UTF-8 with a string under "text"; other fields are ignored, and an empty text is a document of its
end-of-text token alone. Blank lines are the readers' business. This file knows neither files nor line numbers: it raises
BadRecordError with what was seen, and the reader adds where, the rule and the cure.
"""

import json
from typing import Literal

OnBadRecord = Literal["error", "skip"]

RULE = 'each line must be one JSON object, in UTF-8, with a string under "text"'

_EXCERPT_CHARS = 60
_JSON_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


class BadRecordError(Exception):
    """A line that is no record; ``str(error)`` says what was seen instead. Never leaves this room."""


def text_of_record(line: bytes) -> str:
    """The text of one line of a data file, exactly as it stands there; BadRecordError if the line is no record."""
    try:
        # A byte-order mark is what some editors write at the start of a file: it carries no text.
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecordError(f"byte 0x{line[error.start]:02x} at column {error.start + 1}, which is not UTF-8: {excerpt(line)}") from error
    except json.JSONDecodeError as error:
        raise BadRecordError(f"not JSON ({error.msg} at column {error.colno}): {excerpt(line)}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets nested without end
        raise BadRecordError(f"not JSON that can be read ({error}): {excerpt(line)}") from error
    if not isinstance(record, dict):
        raise BadRecordError(f"{_JSON_NAMES[type(record)]} instead of an object: {excerpt(line)}")
    if "text" not in record:
        raise BadRecordError(f'an object without "text": {excerpt(line)}')
    text = record["text"]
    if not isinstance(text, str):
        raise BadRecordError(f'"text" is {_JSON_NAMES[type(text)]} instead of a string: {excerpt(line)}')
    try:
        text.encode("utf-8")  # JSON can spell "\ud83d" without its other half, on which tokenizers fail
    except UnicodeEncodeError as error:
        raise BadRecordError(f'"text" holds half of a surrogate pair, which is no character: {excerpt(line)}') from error
    return text


def excerpt(line: bytes) -> str:
    """The beginning of a line, short and printable, for messages."""
    # Four bytes are the most that a UTF-8 character takes, so this much is enough however long the line is.
    head = line[: 4 * _EXCERPT_CHARS + 4].decode("utf-8", errors="replace").strip()
    return repr(head if len(head) <= _EXCERPT_CHARS else head[:_EXCERPT_CHARS] + "...")
