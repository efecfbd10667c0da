"""From what the user wrote as a source to its records: files of many kinds, folders and globs of them, addresses, datasets of the hub.

Promises: a source is read by its ending alone, never guessed from its content (but for .json, which may be one array, one object, or
lines); a folder's files come in the order of their names. Parquet is pyarrow's to read and ``hf:`` the datasets library's (optional
packages, imported when such a source is named); both are read forwards.
"""

import glob
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.download import download, file_name_of, is_url
from tasks.examples import BadRecordError, Record
from tasks.lines import (
    JSON_LINE,
    Forward,
    Indexed,
    IndexedLines,
    IndexedSequence,
    Joined,
    Stored,
    forward_lines,
    table_parser,
    unpacked_lines,
    whole_json,
)
from tasks.natural_instructions import InstructionRecords
from tasks.records import cells_of_row
from tasks.task_list import HF, TaskSpec
from user_error import UserError

PACKED = (".zst", ".gz")
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
INSTRUCTION_TASKS = ("ni", "natural_instructions")
FINGERPRINT_WHOLE_BYTES = 256 * 2**20
FINGERPRINT_BYTES = 2**20
READABLE = f"{', '.join(KINDS)}, the text formats also with {' or '.join(PACKED)} behind"

logger = logging.getLogger(__name__)


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

    def fingerprint(self) -> str:
        """Hex digits that tell whether the source is still the one a data position belongs to."""
        digest = hashlib.sha256(self.identity.encode())
        for file in self.files:
            _add_file(digest, file)
        return digest.hexdigest()


def open_source(spec: TaskSpec, *, has_header: bool = True) -> Source:
    """The source of one item of a task list. has_header: whether the first row of a .csv or .tsv names its columns; else they are called
    1, 2, ... Raises UserError: nothing there, an unknown ending, a package that is missing, a file that cannot be read."""
    if spec.source.startswith(HF):
        return _open_dataset(spec)
    try:
        if spec.task in INSTRUCTION_TASKS and not spec.source.endswith(".jsonl"):
            records = InstructionRecords(_existing(spec))
            return Source(name=spec.name, files=records.fingerprinted, indexed=IndexedSequence(records), forward=None)
        named = [(download(spec.source), spec.source)] if is_url(spec.source) else _files(spec)
        parts = [_open_file(path, name, has_header=has_header) for path, name in named]
    except OSError as error:
        raise UserError(f"A data file must be readable; {spec.name}: {error}. Correct the path or the file's permissions.") from error
    files = tuple(path for path, _ in named)
    indexed = [part for part in parts if not callable(part)]
    if len(indexed) == len(parts):
        return Source(name=spec.name, files=files, indexed=indexed[0] if len(indexed) == 1 else Joined(indexed), forward=None)
    forwards = [part if callable(part) else _forwards(part) for part in parts]
    return Source(name=spec.name, files=files, indexed=None, forward=lambda: itertools.chain.from_iterable(part() for part in forwards))


def _files(spec: TaskSpec) -> list[tuple[Path, str]]:
    """(path, what messages call it) of every file of a path, a folder or a glob."""
    path = Path(spec.source).expanduser()
    if path.is_file():
        if spec.split is not None:
            raise UserError(f"@{spec.split} chooses a part of a folder or of a dataset; {spec.source} is a file. Leave it out.")
        return [(path, spec.source)]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file.name) is not None)
        if spec.split is not None:
            parts = {part for file in found for part in (_stem(file), *file.relative_to(path).parts[:-1])}
            found = [file for file in found if spec.split in (_stem(file), *file.relative_to(path).parts[:-1])]
            if not found:
                raise UserError(f"{spec.source} has no part {spec.split!r}; its parts are: {', '.join(sorted(parts)) or 'none'}.")
    elif any(sign in spec.source for sign in "*?["):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    else:
        _existing(spec)
        found = []
    if not found:
        raise UserError(f"A folder or glob of data must hold files of the kinds {READABLE}; {spec.source} holds none. Check the path.")
    return [(file, str(file)) for file in found]


def _existing(spec: TaskSpec) -> Path:
    path = Path(spec.source).expanduser()
    if path.exists():
        return path
    default = f" That is where task {spec.task} looks if no path is given: name one, as {spec.task}=PATH." if spec.task != "records" else ""
    raise UserError(
        f"A data file must exist on the machine that reads the data; {spec.source} is no such file (looked from {Path.cwd()}).{default} "
        "Correct the path."
    )


def _kind(name: str) -> tuple[str, bool] | None:
    """(ending, whether it is compressed) of a file's name."""
    name = file_name_of(name).lower()
    packed = next((ending for ending in PACKED if name.endswith(ending)), "")
    ending = Path(name.removesuffix(packed)).suffix
    if ending not in KINDS or (packed and ending == ".parquet"):
        return None
    return ending, bool(packed)


def _stem(file: Path) -> str:
    name = file.name
    while Path(name).suffix.lower() in (*KINDS, *PACKED):
        name = Path(name).stem
    return name


def _open_file(path: Path, name: str, *, has_header: bool) -> Indexed | Forward:
    kind = _kind(name)
    if kind is None:
        raise UserError(
            f"A data file must be of one of the kinds {READABLE}, since the ending says its format; seen: {name!r}. Convert it, "
            "and name it "
            "so. (A weight is written behind the last colon: data.jsonl:0.3)"
        )
    ending, is_packed = kind
    if not path.is_file():
        raise UserError(f"A data file must exist on the machine that reads the data; {name} is no such file. Correct the path.")
    if ending == ".parquet":
        return _parquet(path, name)
    if ending in (".csv", ".tsv"):
        return _open_table(path, name, "\t" if ending == ".tsv" else ",", has_header=has_header, is_packed=is_packed)
    if is_packed:
        return forward_lines(path, name, JSON_LINE)
    whole = whole_json(path, name) if ending == ".json" else None
    return whole if whole is not None else IndexedLines(path, name, JSON_LINE)


def _open_table(path: Path, name: str, delimiter: str, *, has_header: bool, is_packed: bool) -> Indexed | Forward:
    if is_packed:
        first = next((line for line in unpacked_lines(path, name)), b"") or b""
    else:
        with path.open("rb") as file:
            first = file.readline(FINGERPRINT_BYTES)
    try:
        columns = cells_of_row(first, delimiter)
    except BadRecordError as error:
        raise UserError(f"{name}:1: the first row of a table must name its columns; seen: {error}. Correct it.") from error
    if not has_header:
        columns = [str(number) for number in range(1, len(columns) + 1)]
    columns = [column.strip() for column in columns]
    doubled = sorted({column for column in columns if columns.count(column) > 1})
    if doubled:
        raise UserError(
            f"{name}:1: the columns of a table must have different names; there are several {', '.join(map(repr, doubled))} (or "
            "the file has "
            "no header: then name columns by number)."
        )
    parse = table_parser(columns, delimiter)
    if is_packed:
        return forward_lines(path, name, parse, first=int(has_header))
    return IndexedLines(path, name, parse, first=int(has_header), quoted=delimiter == ",")


def _forwards(indexed: Indexed) -> Forward:
    """Records by number, read in turn."""

    def read() -> Iterator[Stored]:
        for number in range(len(indexed)):
            found = indexed.get(number)
            if found is not None:
                yield Stored(found.where, 1, lambda record=found.record: _unwrapped(record))  # type: ignore[misc]

    return read


def _unwrapped(record: Record | BadRecordError) -> Record:
    if isinstance(record, BadRecordError):
        raise record
    return record


def _parquet(path: Path, name: str) -> Forward:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{name}: .parquet files need the package pyarrow. Install it with: pip install pyarrow") from error

    def read() -> Iterator[Stored]:
        number = 0
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1000):
                    for record in batch.to_pylist():
                        number += 1
                        yield Stored(f"{name}: row {number}", batch.nbytes // max(1, batch.num_rows), lambda record=record: record)  # type: ignore[misc]
        except (ArrowException, OSError) as error:
            raise UserError(f"A .parquet file must be whole; {name}: {error}. Copy or download it again.") from error

    return read


def _open_dataset(spec: TaskSpec) -> Source:
    """``hf:owner/name[/config][@split]``, or ``hf:./folder[@split]``: streamed, so that nothing is kept on the disk."""
    path, config = _dataset_name(spec.source.removeprefix(HF))
    split = spec.split or "train"
    load = _dataset_loader(spec, path, config, split)
    load()

    def read() -> Iterator[Stored]:
        for number, record in enumerate(_explained(load(), spec), start=1):
            yield Stored(f"{spec.name}: row {number}", 1000, lambda record=record: record)  # type: ignore[misc]

    return Source(name=spec.name, files=(), indexed=None, forward=read, identity=f"{path}/{config}@{split}")


def _dataset_name(name: str) -> tuple[str, str | None]:
    """owner/name/config; name/config is what old datasets without an owner are called (glue/mnli), and what owner/name looks like too: the
    loader tries that first."""
    parts = name.split("/")
    if name.startswith((".", "/", "~")) or len(parts) < 3:
        return name, None
    return "/".join(parts[:2]), "/".join(parts[2:])


def _dataset_loader(spec: TaskSpec, path: str, config: str | None, split: str) -> Callable[[], Any]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{spec.source}: hf: sources need the package datasets. Install it with: pip install datasets aiohttp") from error

    def load() -> Any:
        tries: list[tuple[str, str | None]] = [(path, config)]
        if config is None and path.count("/") == 1 and not path.startswith((".", "~", "/")):
            tries.append((path.split("/")[0], path.split("/")[1]))
        for number, (name, part) in enumerate(tries, start=1):
            try:
                return datasets.load_dataset(str(Path(name).expanduser()) if name[0] in "./~" else name, part, split=split, streaming=True)
            except Exception as error:  # of the network, the hub, a script or a split: types of their own each
                if number == len(tries):
                    raise UserError(
                        "An hf: source is hf:OWNER/NAME[/CONFIG][@SPLIT] and must be loadable by the datasets library; "
                        f"{spec.source}@{split}: "
                        f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. Check name, split and network."
                    ) from error
        raise AssertionError("the last try returns or raises")

    return load


def _explained(dataset: Any, spec: TaskSpec) -> Iterator[Any]:
    try:
        yield from dataset
    except Exception as error:  # as above
        raise UserError(f"{spec.name} broke off: {type(error).__name__}: {error}. Check the network, and start again.") from error


def _add_file(digest: Any, file: Path) -> None:
    """Size and bytes; of files above 256 MiB a MiB at the beginning, the middle and the end."""
    try:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as opened:
            if size <= FINGERPRINT_WHOLE_BYTES:
                while block := opened.read(FINGERPRINT_BYTES):
                    digest.update(block)
                return
            for start in (0, (size - FINGERPRINT_BYTES) // 2, size - FINGERPRINT_BYTES):
                opened.seek(start)
                digest.update(opened.read(FINGERPRINT_BYTES))
    except OSError as error:
        raise UserError(f"A data file must be readable; {file}: {error}. Correct the path or the file's permissions.") from error
