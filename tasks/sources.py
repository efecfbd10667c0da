"""From what the user wrote as a source to its records: files of many kinds, folders and globs of them, addresses, datasets of the hub.

Promises: a source is read by its ending alone, never guessed from its content (but for .json, which may be one array, one object, or
lines); a folder's files come in the order of their names, hidden ones left out. A source with one part that can only be read forwards is
read forwards as a whole.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from tasks.download import download, file_name_of, is_url
from tasks.examples import BadRecordError, Record
from tasks.lines import Indexed, IndexedLines, IndexedSequence, Joined, read_in_turn, whole_json
from tasks.natural_instructions import InstructionRecords
from tasks.prompts import default_path
from tasks.reading import Reading
from tasks.records import cells_of_row, record_of_cells, record_of_line
from tasks.rows import dataset_rows, parquet_rows
from tasks.streams import PACKED, Forward, Progress, forward_lines, numbered_lines
from tasks.task_list import HF, TaskSpec
from user_error import UserError

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
INSTRUCTION_TASKS = ("ni", "natural_instructions")
FINGERPRINT_WHOLE_BYTES = 256 * 2**20
FINGERPRINT_BYTES = 2**20
MAX_OPEN_FILES = 128  # of one source; a process may have 1024 open, and a folder any number
READABLE = f"{', '.join(KINDS)}, the text formats also with {' or '.join(PACKED)} behind"

_SHARD = re.compile(r"-\d+-of-\d+$")  # train-00000-of-00003.parquet is a part of train


class Kind(NamedTuple):
    """What a file's name says: its format, and one of PACKED or ""."""

    ending: str
    packing: str


class Opening(NamedTuple):
    """How the files of one source are opened. texts_by_name: see whole_json."""

    has_header: bool
    texts_by_name: bool
    is_forward: bool
    keep_open: bool
    progress: Progress


@dataclass(frozen=True, kw_only=True)
class Source:
    """An open source: records by number, or read forwards. files: what it is made of, () for a dataset of the hub."""

    name: str
    files: tuple[Path, ...]
    indexed: Indexed | None
    forward: Forward | None
    identity: str = ""  # of what is in no file

    @property
    def num_bytes(self) -> int:
        """Of all its files, as stored."""
        return sum(file.stat().st_size for file in self.files)

    def fingerprint(self, reading: Reading | None = None) -> str:
        """Hex digits that tell whether the source is still the one a data position belongs to: sizes and bytes of its files; of those
        above 256 MiB in all a MiB at the beginning, the middle and the end of each. Raises UserError."""
        digest = hashlib.sha256(self.identity.encode())
        is_whole = self.num_bytes <= FINGERPRINT_WHOLE_BYTES
        reading = reading or Reading(self.name)
        reading.expect(self.num_bytes if is_whole else 3 * FINGERPRINT_BYTES * len(self.files))
        for file in self.files:
            _add_file(digest, file, is_whole=is_whole, progress=reading.read)
        return digest.hexdigest()


def open_source(spec: TaskSpec, *, has_header: bool = True, reading: Reading | None = None) -> Source:
    """The source of one item of a task list. has_header: whether the first row of a .csv or .tsv names its columns; else they are called
    1, 2, ... Raises UserError: nothing there, an unknown ending, a package that is missing, a file that cannot be read."""
    reading = reading or Reading(spec.name)
    if spec.source.startswith(HF):
        rows = dataset_rows(spec)
        return Source(name=spec.name, files=(), indexed=None, forward=rows, identity=f"{spec.source}@{spec.split or 'train'}")
    try:
        if spec.task in INSTRUCTION_TASKS and (found := _instructions(spec, reading)) is not None:
            return found
        return _open_files(spec, _files(spec), reading, has_header=has_header)
    except OSError as error:
        raise UserError(f"A data file must be readable; {spec.name}: {error}. Correct the path or the file's permissions.") from error


def _open_files(spec: TaskSpec, named: list[tuple[Path, str]], reading: Reading, *, has_header: bool) -> Source:
    reading.expect(sum(path.stat().st_size for path, _ in named))
    kinds = [_known_kind(name) for _, name in named]
    opening = Opening(
        has_header=has_header,
        texts_by_name=spec.task == "cot",
        is_forward=any(kind.packing or kind.ending == ".parquet" for kind in kinds),
        keep_open=len(named) <= MAX_OPEN_FILES,
        progress=reading.read,
    )
    indexed: list[Indexed] = []
    forwards: list[Forward] = []
    try:
        for (path, name), kind in zip(named, kinds, strict=True):
            part = _open_file(path, name, kind, opening)
            if callable(part):
                forwards.append(part)
            else:
                indexed.append(part)
                forwards.append(read_in_turn(part))
    except (OSError, UserError):
        for opened in indexed:
            opened.close()
        raise
    files = tuple(path for path, _ in named)
    if len(indexed) == len(named):
        return Source(name=spec.name, files=files, indexed=indexed[0] if len(indexed) == 1 else Joined(indexed), forward=None)
    return Source(name=spec.name, files=files, indexed=None, forward=lambda: itertools.chain.from_iterable(part() for part in forwards))


def _instructions(spec: TaskSpec, reading: Reading) -> Source | None:
    """Folders and .json files of Natural Instructions; None for other files, whose records are instances themselves."""
    path = Path(spec.source).expanduser()
    if is_url(spec.source) or not (path.is_dir() or all(_kind(name) == (".json", "") for _, name in _files(spec))):
        return None
    if spec.split is not None:
        raise _no_split(spec, "Natural Instructions are read as their own splits/default/train_tasks.txt says")
    parts = [InstructionRecords(part, reading) for part in ([path] if path.is_dir() else [file for file, _ in _files(spec)])]
    files = tuple(file for part in parts for file in part.fingerprinted)
    sequences = [IndexedSequence(part) for part in parts]
    return Source(name=spec.name, files=files, indexed=sequences[0] if len(sequences) == 1 else Joined(sequences), forward=None)


def _files(spec: TaskSpec) -> list[tuple[Path, str]]:
    """(path, what messages call it) of every file of an address, a path, a folder or a glob."""
    if is_url(spec.source):
        _known_kind(spec.source)  # before it is fetched
        if spec.split is not None:
            raise _no_split(spec, "an address names a file")
        return [(download(spec.source), spec.source)]
    path = Path(spec.source).expanduser()
    if path.is_dir():
        return [(file, str(file)) for file in _files_of_folder(spec, path)]
    is_pattern = any(sign in spec.source for sign in "*?[") and not path.exists()
    if spec.split is not None and (path.is_file() or is_pattern):
        raise _no_split(spec, "a glob" if is_pattern else "a file")
    if not is_pattern:
        return [(_existing(spec), spec.source)]
    found = sorted(Path(name) for name in glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise _no_data(spec)
    return [(file, str(file)) for file in found]


def _files_of_folder(spec: TaskSpec, folder: Path) -> list[Path]:
    found = [file for file in folder.rglob("*") if file.is_file() and _kind(file.name) is not None]
    found = sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))
    if not found:
        raise _no_data(spec)
    if spec.split is None:
        return found
    parts = {file: {_stem(file), *file.relative_to(folder).parts[:-1]} for file in found}
    chosen = [file for file in found if spec.split in parts[file]]
    if not chosen:
        raise UserError(f"{spec.source} has no part {spec.split!r}; its parts are: {', '.join(sorted(set().union(*parts.values())))}.")
    return chosen


def _no_split(spec: TaskSpec, why: str) -> UserError:
    return UserError(
        f"@{spec.split} chooses a part of a folder or of an hf: dataset; {spec.source}: {why}. Leave it out, or name the part's own file "
        "(a path that has an @ in it needs quotes)."
    )


def _no_data(spec: TaskSpec) -> UserError:
    return UserError(f"A folder or glob of data must hold files of the kinds {READABLE}; {spec.source} holds none. Check the path.")


def _existing(spec: TaskSpec) -> Path:
    path = Path(spec.source).expanduser()
    if path.exists():
        return path
    hint = ""
    if spec.source == default_path(spec.task):
        hint = f" That is where task {spec.task} looks if no path is given: name one, as {spec.task}=PATH."
    elif spec.split is not None:
        hint = " (A path that has an @ in it needs quotes.)"
    raise UserError(
        f"A data file must exist on the machine that reads the data; {spec.source} is no such file (looked from {Path.cwd()}).{hint} "
        "Correct the path."
    )


def _kind(name: str) -> Kind | None:
    name = file_name_of(name).lower()
    packing = next((ending for ending in PACKED if name.endswith(ending)), "")
    ending = Path(name.removesuffix(packing)).suffix
    return None if ending not in KINDS or (packing and ending == ".parquet") else Kind(ending, packing)


def _known_kind(name: str) -> Kind:
    kind = _kind(name)
    if kind is None:
        raise UserError(
            f"A data file must be of one of the kinds {READABLE}, since the ending says its format; seen: {name!r}. Convert it, and name "
            "it so. (A weight is written behind the last colon: data.jsonl:0.3)"
        )
    return kind


def _stem(file: Path) -> str:
    name = file.name
    while Path(name).suffix.lower() in (*KINDS, *PACKED):
        name = Path(name).stem
    return _SHARD.sub("", name)


def _open_file(path: Path, name: str, kind: Kind, opening: Opening) -> Indexed | Forward:
    if kind.ending == ".parquet":
        return parquet_rows(path, name)
    if kind.ending in (".csv", ".tsv"):
        parse = _row_parser(path, name, kind, has_header=opening.has_header)
        return _open_lines(path, name, kind, opening, parse, first=int(opening.has_header))
    if kind.ending == ".json":
        texts_by_name = _are_texts_by_name if opening.texts_by_name else None
        whole = whole_json(path, name, kind.packing, texts_by_name=texts_by_name, progress=opening.progress)
        if whole is not None:
            return whole
    return _open_lines(path, name, kind, opening, record_of_line)


def _are_texts_by_name(value: Record) -> bool:
    """Whether an object holds a text per field, as chain-of-thought prompts are kept, and is no record itself."""
    is_record = "text" in value or ("question" in value and "answer" in value)
    return bool(value) and not is_record and all(isinstance(text, str) for text in value.values())


def _open_lines(
    path: Path, name: str, kind: Kind, opening: Opening, parse: Callable[[bytes], Record], *, first: int = 0
) -> Indexed | Forward:
    quoted = kind.ending == ".csv"
    if opening.is_forward:
        return forward_lines(path, name, kind.packing, parse, first=first, quoted=quoted, progress=opening.progress)
    return IndexedLines(path, name, parse, first=first, quoted=quoted, keep_open=opening.keep_open, progress=opening.progress)


def _row_parser(path: Path, name: str, kind: Kind, *, has_header: bool) -> Callable[[bytes], Record]:
    """From a row of this table to its record, by the names that its first row gives the columns."""
    delimiter = "\t" if kind.ending == ".tsv" else ","
    rule = f"{name}:1: the first row of a table must {'name its' if has_header else 'hold its'} columns"
    _, first = next(numbered_lines(path, name, kind.packing, quoted=kind.ending == ".csv"), (1, b""))
    try:
        columns = cells_of_row(first or b"", delimiter)
    except BadRecordError as error:
        raise UserError(f"{rule}; seen: {error}. Correct it.") from error
    if not columns:
        seen = "no table holds so long a row" if first is None else "it is empty"
        raise UserError(f"{rule}; {seen}. Give a file with rows, or take this one off the list.")
    columns = [column.strip() for column in columns] if has_header else [str(number) for number in range(1, len(columns) + 1)]
    doubled = sorted(column for column, count in Counter(columns).items() if count > 1)[:10]
    if doubled:
        raise UserError(
            f"{name}:1: the columns of a table must have different names; there are several {', '.join(map(repr, doubled))}. Correct the "
            "first row (if the file has no header, name columns by number)."
        )
    return lambda row: record_of_cells(cells_of_row(row, delimiter), columns)


def _add_file(digest: Any, file: Path, *, is_whole: bool, progress: Progress) -> None:
    try:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as opened:
            if is_whole or size <= 3 * FINGERPRINT_BYTES:
                while block := opened.read(FINGERPRINT_BYTES):
                    digest.update(block)
                    progress(len(block))
                return
            for start in (0, (size - FINGERPRINT_BYTES) // 2, size - FINGERPRINT_BYTES):
                opened.seek(start)
                digest.update(opened.read(FINGERPRINT_BYTES))
                progress(FINGERPRINT_BYTES)
    except OSError as error:
        raise UserError(f"A data file must be readable; {file}: {error}. Correct the path or the file's permissions.") from error
