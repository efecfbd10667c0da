"""Documents of one source in a shuffled order that can be entered anywhere, so that a resumed run reads on where it stopped.

`Documents.next_good(pass, position)` is the whole interface of a training: the document at that place of that pass' order, or the next good
one. The order is a pure function of (seed, place of the task in the list, pass) and the source; every pass has another one and covers every
record once. `in_order()` is that of an evaluation: one pass as the files stand. Bad records raise a UserError with file:line, or are left
out and counted.

What is checked when a source is opened, before any training: all records of files that can be sought in and have up to 256 MiB; of others
the records up to the first good one, the rest as they are read. How records are stored is tasks/lines.py's, in which order they come
tasks/order.py's, what they mean the task's (tasks/prompts.py).
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import numpy as np

from comms.spans import Spans
from tasks.examples import BadRecordError, BoundTask, Example, Record, Task
from tasks.order import WINDOW_RECORDS, Ordered, Shuffled, Windowed
from tasks.reading import BYTES, RECORDS, Reading
from tasks.records import OnBadRecord, check_text
from tasks.sources import open_source
from tasks.task_list import TaskSpec
from user_error import UserError

CHECK_ALL_BYTES = 256 * 2**20  # about a second of json.loads
RULE = "each record must be an object in UTF-8 that its task can use"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document and where it stood: its (pass, position), at or after the place asked for; where: file:line."""

    pass_index: int
    position: int
    where: str
    example: Example
    num_skipped: int  # bad records left out between the place asked for and this one


@dataclass(frozen=True, kw_only=True)
class ReadingRules:
    """The flags of the same names, and whether tables have a header."""

    on_bad_record: OnBadRecord = "error"
    shuffle_window: int = WINDOW_RECORDS
    max_samples: int | None = None
    balance_labels: bool = False
    has_header: bool = True


class Documents:
    """The documents of one source, endlessly. Made by open_documents; used by one thread at a time."""

    def __init__(
        self,
        records: Ordered,
        *,
        name: str,
        num_bytes: int,
        fingerprint: str,
        seed: int,
        place: int,
        rules: ReadingRules,
        reading: Reading | None = None,
    ) -> None:
        """bind() comes next."""
        self._reading = reading or Reading(name)
        self.name = name  # as the user wrote it
        self.num_bytes = num_bytes  # of the files, as stored
        self._records, self._fingerprint, self._key = records, fingerprint, (seed, place)
        self._on_bad_record = rules.on_bad_record
        self._task: BoundTask | None = None
        # What is still to be said about bad records that were not counted when the source was opened.
        self._num_skipped_unreported = 0
        self._first_skip_reported = False

    @property
    def task(self) -> BoundTask:
        """What makes documents of these records."""
        assert self._task is not None, "open_documents binds it"
        return self._task

    @contextmanager
    def counted(self, doing: str) -> Iterator[None]:
        """While one pass is read in the block, this rank says how much of it is: of records that can be had by number, else of bytes."""
        total, unit = (len(self._records.numbers), RECORDS) if isinstance(self._records, Shuffled) else (self.num_bytes, BYTES)
        with self._reading.counted(doing, total, unit):
            yield

    def bind(self, task: Task) -> None:
        """Let ``task`` look at the records. Raises UserError for records that it cannot use at all."""
        try:
            self._task = task.bind(self._good_records)
        except UserError as error:  # of the reader, which knows the file, or of the task, which does not
            raise error if self.name in str(error) else UserError(f"{self.name}: {error}") from error

    def _good_records(self) -> Iterator[Record]:
        """Of the whole source: --max-train-samples and --max-eval-samples change no label and so no prompt."""
        for _, record in self._records.unused_too():
            self._reading.looked_at()
            if not isinstance(record, BadRecordError):
                yield record

    def next_good(self, pass_index: int, position: int) -> Document:
        """The first good document at or after this place, in a later pass if need be. Reading on in order is cheap; going back is
        allowed and for sources read forwards costs reading from the start. UserError for a bad record when those are errors, and for a
        source that a whole pass found without a good record."""
        num_skipped = 0
        num_skipped_before_pass = 0
        saw_pass_start = position == 0
        while True:
            try:
                numbered = self._records.at(pass_index, position)
            except LookupError:
                self._report_skipped()
                if saw_pass_start:
                    raise _no_good_record(self.name, num_skipped - num_skipped_before_pass) from None
                pass_index, position, saw_pass_start = pass_index + 1, 0, True
                num_skipped_before_pass = num_skipped
                continue
            self._reading.looked_at()
            if numbered is not None:  # blank lines are neither records nor mistakes
                where, record = numbered
                try:
                    example = self._example(record, (pass_index, position))
                except BadRecordError as error:
                    self.leave_out(where, error)
                    num_skipped += 1
                else:
                    return Document(pass_index=pass_index, position=position, where=where, example=example, num_skipped=num_skipped)
            position += 1

    def in_order(self) -> Iterator[Document]:
        """One pass as the files stand, as it is asked in an evaluation. Raises UserError as next_good does."""
        with self.counted("reading"):
            yield from self._in_order()

    def _in_order(self) -> Iterator[Document]:
        num_skipped = num_good = 0
        for position, (where, record) in enumerate(self._records.in_file_order()):
            self._reading.looked_at()
            try:
                example = self._example(record, None)
            except BadRecordError as error:
                self.leave_out(where, error)
                num_skipped += 1
            else:
                num_good += 1
                yield Document(pass_index=0, position=position, where=where, example=example, num_skipped=0)
        self._report_skipped()
        if not num_good:
            raise _no_good_record(self.name, num_skipped)

    def check(self, *, all_records: bool) -> None:
        """Judges all records, or those up to the first good one, in file order. Raises UserError as next_good does."""
        num_bad, num_good, first = 0, 0, ""
        for where, record in self._records.in_file_order():
            self._reading.looked_at()
            try:
                self._example(record, None)
            except BadRecordError as error:
                if self._on_bad_record == "error":
                    raise _bad_record(where, error) from error
                first = first or f"{where}: {error}"
                num_bad += 1
            else:
                num_good += 1
                if not all_records:
                    break
        if not num_good:
            raise _no_good_record(self.name, num_bad)
        if all_records:
            self._first_skip_reported = True
            if num_bad:
                num_records = num_bad + num_good
                logger.warning("%s: %d of %d records are bad and are left out; first, %s", self.name, num_bad, num_records, first)

    def balance_labels(self) -> None:
        """From now on a pass holds as many records of every label. Raises UserError for tasks and sources that cannot do that."""
        if self.task.labels is None or not isinstance(self._records, Shuffled):
            why = "its task has no labels" if self.task.labels is None else "it can only be read forwards"
            raise UserError(
                f"--balance-labels draws as many records of every label; {self.name}: {why}. Leave it out, or use another source."
            )
        groups: dict[str, list[int]] = {}
        for number in self._records.numbers:
            self._reading.looked_at()
            numbered = self._records.get(int(number))
            if numbered is None:
                continue
            try:
                label = self._example(numbered.record, None).label
            except BadRecordError:
                continue  # told or refused when its turn comes, or counted already
            if label is not None:
                groups.setdefault(label, []).append(int(number))
        if not groups:
            raise UserError(
                f"--balance-labels draws as many records of every label; {self.name}: no example of its task has one. Leave it out."
            )
        self._records.balance([np.array(groups[label], dtype=np.int64) for label in sorted(groups)])

    def fingerprint(self) -> str:
        """Hex digits that tell whether the source is still the one a data position belongs to."""
        return self._fingerprint

    def leave_out(self, where: str, error: BadRecordError) -> None:
        """A record that turned out to be bad: raises UserError where those are errors, else says so once and counts."""
        if self._on_bad_record == "error":
            raise _bad_record(where, error) from error
        if not self._first_skip_reported:
            logger.warning("%s: bad record left out, later ones are only counted: %s", where, error)
            self._first_skip_reported = True
            self._num_skipped_unreported = 1
        elif self._num_skipped_unreported:
            self._num_skipped_unreported += 1

    def close(self) -> None:
        """Closes the files."""
        self._records.close()

    def _example(self, record: Record | BadRecordError, drawn_at: tuple[int, int] | None) -> Example:
        if isinstance(record, BadRecordError):
            raise record
        draw = Random(":".join(map(str, (*self._key, *drawn_at)))) if drawn_at is not None and self.task.draws else None
        example = self.task.example(record, draw)
        for piece in example.pieces:
            check_text(piece.text)
        return example

    def _report_skipped(self) -> None:
        if self._num_skipped_unreported:
            logger.warning("%s: %d bad records left out by the end of the pass", self.name, self._num_skipped_unreported)
            self._num_skipped_unreported = 0


def open_documents(
    spec: TaskSpec, tasks: Mapping[str, Task], *, seed: int, place: int, rules: ReadingRules | None = None, spans: Spans | None = None
) -> Documents:
    """Opens the source of the task at this place of the list. tasks: by name (tasks.prompts.tasks_by_name). spans: where this rank says how
    much it has read.

    Raises UserError for a source that is not there or of an unknown kind, for one without a good record, and, unless bad records are left
    out, for the first bad record among those checked here (see the top of this file).
    """
    rules = rules or ReadingRules()
    reading = Reading(spec.name, spans)
    with reading.counted("indexing"):
        source = open_source(spec, has_header=rules.has_header, reading=reading)
    key = (seed, place)
    records: Ordered
    if source.indexed is not None:
        records = Shuffled(source.indexed, key=key, max_samples=rules.max_samples)
    else:
        assert source.forward is not None, "a source is one or the other"
        window = rules.shuffle_window
        records = Windowed(source.forward, name=spec.name, key=key, window_records=window, max_samples=rules.max_samples, reading=reading)
    try:
        with reading.counted("hashing"):
            fingerprint = source.fingerprint(reading)
        documents = Documents(
            records,
            name=spec.name,
            num_bytes=source.num_bytes,
            fingerprint=fingerprint,
            seed=seed,
            place=place,
            rules=rules,
            reading=reading,
        )
        with documents.counted("looking at the labels of"):
            documents.bind(tasks[spec.task])
        with documents.counted("checking"):
            documents.check(all_records=source.indexed is not None and source.num_bytes <= CHECK_ALL_BYTES)
        if rules.balance_labels:
            with documents.counted("balancing the labels of"):
                documents.balance_labels()
    except (OSError, UserError) as error:
        records.close()
        if isinstance(error, UserError):
            raise
        raise UserError(f"A data file must be readable; {spec.name}: {error}. Correct the path or the file's permissions.") from error
    return documents


def _bad_record(where: str, error: BadRecordError) -> UserError:
    return UserError(f"{where}: {RULE}; seen: {error}. Correct the record, or leave bad records out with --on-bad-record skip.")


def _no_good_record(name: str, num_bad: int) -> UserError:
    seen = f"all of its {num_bad} records are bad" if num_bad else "it is empty or holds blank lines only"
    return UserError(
        f"A data source must hold at least one record, and {RULE}; {name}: {seen}. Give a file with records, or take this one off the list."
    )
