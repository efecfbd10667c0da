"""Documents of one data file in a shuffled order that can be entered anywhere, so that a resumed run reads on where it stopped.

`Documents.next_good(pass, position)` is the whole interface: the document at that place of that pass' order, or the next good one.
The order is a pure function of (seed, place of the task in the list, pass) and the file's bytes; every pass has another one and
covers every record once. Bad records (tasks/records.py) raise a UserError with file:line, or are left out and counted.

What is checked when a file is opened, before any training: all records of a plain file of up to 256 MiB; of larger or compressed
files the records up to the first good one, the rest as they are read. How each format is stored and shuffled is tasks/lines.py's.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from tasks.download import download, file_name_of, is_url
from tasks.lines import Lines, PlainLines, ZstLines
from tasks.records import RULE, BadRecordError, OnBadRecord, text_of_record
from user_error import UserError

ENDINGS = (".jsonl", ".json", ".jsonl.zst")
CHECK_ALL_BYTES = 256 * 2**20  # about a second of json.loads
FINGERPRINT_BYTES = 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text and where it stood: its (pass, position), at or after the place asked for."""

    pass_index: int
    position: int
    text: str
    num_skipped: int  # bad records left out between the place asked for and this one


class Documents:
    """The documents of one file, endlessly. Made by open_documents; used by one thread at a time."""

    def __init__(self, lines: Lines, *, name: str, on_bad_record: OnBadRecord) -> None:
        assert on_bad_record in ("error", "skip"), f'on_bad_record is "error" or "skip", not {on_bad_record!r}'
        self.name = name  # as the user wrote it
        self.num_bytes = lines.num_bytes  # of the file, as stored
        self._lines = lines
        self._on_bad_record = on_bad_record
        # What is still to be said about bad records that were not counted when the file was opened.
        self._num_skipped_unreported = 0
        self._first_skip_reported = False

    def next_good(self, pass_index: int, position: int) -> Document:
        """The first good document at or after this place, in a later pass if need be. Reading on in order is cheap; going back is
        allowed and for compressed files costs reading from the start. UserError for a bad record when those are errors, and for a
        file that a whole pass found without a good record."""
        num_skipped = 0
        num_skipped_before_pass = 0
        saw_pass_start = position == 0
        while True:
            numbered_line = self._lines.line_at(pass_index, position)
            if numbered_line is None:
                self._report_skipped()
                if saw_pass_start:
                    raise _no_good_record(self.name, num_skipped - num_skipped_before_pass)
                pass_index, position, saw_pass_start = pass_index + 1, 0, True
                num_skipped_before_pass = num_skipped
                continue
            line_number, line = numbered_line
            if not line.isspace():  # blank lines are neither records nor mistakes
                try:
                    text = text_of_record(line)
                except BadRecordError as error:
                    self._leave_out(line_number, error)
                    num_skipped += 1
                else:
                    return Document(pass_index=pass_index, position=position, text=text, num_skipped=num_skipped)
            position += 1

    def check(self, *, all_records: bool) -> None:
        """Judges all records, or those up to the first good one, in file order. Raises UserError as next_good does."""
        num_bad, num_good, first = 0, 0, ""
        for line_number, line in self._lines.in_file_order():
            if line.isspace():
                continue
            try:
                text_of_record(line)
            except BadRecordError as error:
                if self._on_bad_record == "error":
                    raise _bad_record(self.name, line_number, error) from error
                first = first or f"line {line_number}: {error}"
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

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()

    def _leave_out(self, line_number: int, error: BadRecordError) -> None:
        if self._on_bad_record == "error":
            raise _bad_record(self.name, line_number, error) from error
        if not self._first_skip_reported:
            logger.warning("%s:%d: bad record left out, later ones are only counted: %s", self.name, line_number, error)
            self._first_skip_reported = True
            self._num_skipped_unreported = 1
        elif self._num_skipped_unreported:
            self._num_skipped_unreported += 1

    def _report_skipped(self) -> None:
        if self._num_skipped_unreported:
            logger.warning("%s: %d bad records left out by the end of the pass", self.name, self._num_skipped_unreported)
            self._num_skipped_unreported = 0


def open_documents(path: str, *, seed: int, place: int, on_bad_record: OnBadRecord) -> Documents:
    """Opens the data file that the user named, a local path or an http(s) address, as the task at this place of the list.

    Raises UserError for an unknown ending, a missing or unreadable file, no good record, and, unless bad records are left out, for
    the first bad record among those checked here (see the top of this file).
    """
    local = _local_file(path)
    documents: Documents | None = None
    try:
        lines: Lines
        if file_name_of(path).lower().endswith(".zst"):
            lines = ZstLines(local, name=path, seed=seed, place=place)
        else:
            lines = PlainLines(local, seed=seed, place=place)
        documents = Documents(lines, name=path, on_bad_record=on_bad_record)
        documents.check(all_records=isinstance(lines, PlainLines) and lines.num_bytes <= CHECK_ALL_BYTES)
    except (OSError, UserError) as error:
        if documents is not None:
            documents.close()
        if isinstance(error, UserError):
            raise
        raise UserError(f"A data file must be readable; {path}: {error}. Correct the path or the file's permissions.") from error
    return documents


def content_fingerprint(path: str) -> str:
    """Hex digits that tell whether a data file is still the one a data position belongs to: sha256 over its size and its bytes,
    of files above 256 MiB over a MiB at the beginning, the middle and the end. Raises UserError as open_documents does for a file
    that is not there."""
    local = _local_file(path)
    try:
        size = local.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with local.open("rb") as file:
            if size <= max(CHECK_ALL_BYTES, 3 * FINGERPRINT_BYTES):
                while block := file.read(FINGERPRINT_BYTES):
                    digest.update(block)
            else:
                for start in (0, (size - FINGERPRINT_BYTES) // 2, size - FINGERPRINT_BYTES):
                    file.seek(start)
                    digest.update(file.read(FINGERPRINT_BYTES))
    except OSError as error:
        raise UserError(f"A data file must be readable; {path}: {error}. Correct the path or the file's permissions.") from error
    return digest.hexdigest()


def _local_file(path: str) -> Path:
    """The file on this machine that ``path`` means, downloaded if it is an address. Raises UserError."""
    file_name = file_name_of(path).lower()
    if not file_name.endswith(ENDINGS):
        raise UserError(
            f"A data file must end in one of {', '.join(ENDINGS)}, since the ending says its format; seen: {path!r}. Convert it to one "
            'JSON object with a "text" string per line and name it so. (A weight is written behind the last colon: data.jsonl:0.3)'
        )
    local = download(path) if is_url(path) else Path(path).expanduser()
    if not local.is_file():
        kind = "a folder" if local.is_dir() else "no such file"
        raise UserError(
            f"A data file must exist on the machine that reads the data; {path} is {kind} (looked from {Path.cwd()}). Correct the path."
        )
    return local


def _bad_record(name: str, line_number: int, error: BadRecordError) -> UserError:
    return UserError(f"{name}:{line_number}: {RULE}; seen: {error}. Correct the line, or leave bad records out with --on-bad-record skip.")


def _no_good_record(name: str, num_bad: int) -> UserError:
    seen = f"all of its {num_bad} records are bad" if num_bad else "it is empty or holds blank lines only"
    return UserError(
        f"A data file must hold at least one record, and {RULE}; {name}: {seen}. Give a file with records, or take this one off the list."
    )
