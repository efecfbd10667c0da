"""Records that carry their own text, by the names of their fields: text; prompt and completion; inputs and targets; messages.

The text is taken as it stands. A prompt's trailing spaces are counted to the completion behind it, since that is where byte-level BPE has
them: " yes" is one token, and a prompt that ends in a space asks for a token that no text has there. Between inputs and targets, which come
without any, one space is put.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from tasks.examples import BadRecordError, Example, Piece, Record

FORMS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "inputs and targets": ("inputs", "targets"),
}
FORMS_RULE = 'a record must be an object with "text", with "prompt" and "completion", with "inputs" and "targets", or with "messages"'

SPEAKERS = {"user": "<human>", "human": "<human>", "assistant": "<bot>", "bot": "<bot>", "gpt": "<bot>", "system": "<system>"}
ANSWERING = "<bot>"
_NAME_CHARS = 60

_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}


def form_of(record: Record) -> str | None:
    """Which of FORMS a record has; the first that fits, None if none does."""
    return next((form for form, fields in FORMS.items() if all(field in record for field in fields)), None)


def example_of(record: Record, form: str) -> Example:
    """The document of a record that must have ``form``, as the first record of its source has. Raises BadRecordError."""
    found = form_of(record)
    if found is None:
        raise BadRecordError(f"{FORMS_RULE}; its fields are {named_fields(record)}")
    if found != form:
        raise BadRecordError(f"it has {found}, while the first record of the source has {form}; a source holds records of one form")
    if form == "text":
        return Example(pieces=(Piece(text_field(record, "text"), True),))
    if form == "messages":
        return _conversation(record["messages"])
    first, second = FORMS[form]
    given = text_field(record, first)
    return prompted(given, answer_behind(given, text_field(record, second)) if first == "inputs" else text_field(record, second))


def prompted(prompt: str, completion: str, *, label: str | None = None) -> Example:
    """A prompt and what is to be written behind it. Raises BadRecordError where either is empty."""
    bare = prompt.rstrip(" ")
    completion = prompt[len(bare) :] + completion
    if not bare.strip():
        raise BadRecordError("the prompt is empty")
    if not completion.strip():
        raise BadRecordError("the completion is empty")
    return Example(pieces=(Piece(bare, False), Piece(completion, True)), label=label)


def answer_behind(prompt: str, answer: str) -> str:
    """``answer`` with a space in front, unless prompt or answer bring white space along."""
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"


def text_field(record: Record, name: str) -> str:
    """A field that must hold text. Raises BadRecordError, naming the fields that there are."""
    if name not in record:
        raise BadRecordError(f'there is no "{name}"; its fields are {named_fields(record)}')
    value = record[name]
    if not isinstance(value, str):
        raise BadRecordError(f'"{name}" is {_KINDS.get(type(value), type(value).__name__)} instead of a string')
    return value


def named_fields(record: Record) -> str:
    """The names of a record's fields, for messages."""
    return ", ".join(_shown(str(name)) for name in islice(record, 12)) or "none"


def _shown(name: str) -> str:
    """Short, and without what cannot be printed: JSON can spell half of a surrogate pair."""
    short = name if len(name) <= _NAME_CHARS else f"{name[:_NAME_CHARS]}..."
    return short.encode(errors="backslashreplace").decode()


def _conversation(messages: Any) -> Example:
    """<human>: ...\\n<bot>: ... (the form of the OIG data); what a bot says is to be learnt."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadRecordError('"messages" must be an array of objects with role and content, one at least')
    pieces: list[Piece] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise BadRecordError(f"message {number} is {_KINDS.get(type(message), 'something else')} instead of an object")
        role, content = text_field(message, "role"), text_field(message, "content")
        if role not in SPEAKERS:
            raise BadRecordError(f"message {number} has role {role!r}; roles are {', '.join(SPEAKERS)}")
        start = "\n" if pieces else ""
        if SPEAKERS[role] == ANSWERING:
            if not content.strip():
                raise BadRecordError(f"message {number}, of role {role}, is empty")
            pieces += [Piece(f"{start}{ANSWERING}:", False), Piece(f" {content}", True)]
        else:
            pieces.append(Piece(f"{start}{SPEAKERS[role]}: {content}", False))
    if not any(piece.is_target for piece in pieces):
        raise BadRecordError("no message is the assistant's, so there is nothing to learn")
    return Example(pieces=tuple(pieces))
