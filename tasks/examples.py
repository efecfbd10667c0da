"""What a record is turned into: text in pieces, some of which the model is to learn to write; and what a task has to say for that.

This file holds the types that sources (records.py and below), tasks (prompts.py) and packing (encoding.py) share; it reads nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

Record = Mapping[str, Any]


class BadRecordError(Exception):
    """A record that is none, or that its task cannot use; ``str(error)`` says what was seen. The reader adds where, the rule and the
    cure."""


@dataclass(frozen=True)
class Piece:
    """A part of a document's text, as it stands. is_target: it is to be written by the model, not given to it."""

    text: str
    is_target: bool


@dataclass(frozen=True, kw_only=True)
class Example:
    """One document. label: the answer by which it is judged, where the task has labels or completions. as_good: other answers that are
    right too."""

    pieces: tuple[Piece, ...]
    label: str | None = None
    as_good: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def prompt(self) -> str:
        """What stands before the last target piece."""
        return "".join(piece.text for piece in self.pieces[: self._last_target])

    @property
    def completion(self) -> str:
        """The last target piece."""
        return self.pieces[self._last_target].text

    @property
    def _last_target(self) -> int:
        return max(place for place, piece in enumerate(self.pieces) if piece.is_target)


class BoundTask(Protocol):
    """A task that has looked at its records."""

    @property
    def labels(self) -> tuple[str, ...] | None:
        """All that an answer may be; None: anything."""

    @property
    def draws(self) -> bool:
        """Whether example() uses its ``draw``."""

    def example(self, record: Record, draw: Random | None) -> Example:
        """The document of one record. ``draw`` is seeded by where the record stands in the run's data: a resumed run draws the same.
        None: as it is asked in an evaluation, where nothing is drawn. Raises BadRecordError."""

    def completion_of(self, label: str) -> str:
        """How a label is written behind the prompt, its leading space included."""

    def answer(self, generated: str) -> str:
        """From generated text, its end-of-text token removed, to what is compared with the label."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A way to turn the records of a source into documents, by the name that --task-name calls it."""

    name: str
    bind: Callable[[Callable[[], Iterator[Record]]], BoundTask]  # given a way to run through the good records of the source
    default_path: str | None = None  # where its data lies if --task-name names the task alone
