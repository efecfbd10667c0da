"""Records that other packages read: rows of .parquet files (pyarrow) and of datasets of the hub (datasets, streamed, so that nothing of
them is kept on the disk). Both are optional, imported when such a source is named, and both are read forwards.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tasks.examples import BadRecordError, Record
from tasks.records import size_of_value
from tasks.streams import Forward, Stored
from tasks.task_list import HF, TaskSpec
from user_error import UserError

PARQUET_BATCH_ROWS = 1000


def parquet_rows(path: Path, name: str) -> Forward:
    """The rows of a .parquet file. Raises UserError: not installed, or not readable as such."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{name}: .parquet files need the package pyarrow. Install it with: pip install pyarrow") from error

    def read() -> Iterator[Stored]:
        number = 0
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                    num_bytes = batch.nbytes // max(1, batch.num_rows)
                    for place in range(batch.num_rows):
                        number += 1
                        yield Stored(f"{name}: row {number}", num_bytes, lambda batch=batch, place=place: _row(batch, place))  # type: ignore[misc]
        except (ArrowException, OSError) as error:
            raise UserError(f"A .parquet file must be whole; {name}: {error}. Copy or download it again.") from error

    return read


def _row(batch: Any, place: int) -> Record:
    """One row as Python values. Strings are checked only now: Arrow takes any bytes for UTF-8."""
    try:
        record: Record = batch.slice(place, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise BadRecordError(f"byte 0x{error.object[error.start]:02x} in a string, which is not UTF-8") from error
    return record


def dataset_rows(spec: TaskSpec) -> Forward:
    """The rows of ``hf:owner/name[/config][@split]``, or ``hf:./folder[@split]``; the split is train if none is named. Raises UserError."""
    load = _loader(spec)
    load()

    def read() -> Iterator[Stored]:
        for number, record in enumerate(_explained(load(), spec), start=1):
            yield Stored(f"{spec.name}: row {number}", size_of_value(record), lambda record=record: record)  # type: ignore[misc]

    return read


def _candidates(name: str) -> list[tuple[str, str | None]]:
    """(path, config) in the order to be tried: name/config is what old datasets without an owner are called (glue/mnli), and what
    owner/name looks like too."""
    parts = name.split("/")
    if name.startswith((".", "/", "~")):
        return [(str(Path(name).expanduser()), None)]
    if len(parts) > 2:
        return [("/".join(parts[:2]), "/".join(parts[2:]))]
    return [(name, None), (parts[0], parts[1])] if len(parts) == 2 else [(name, None)]


def _loader(spec: TaskSpec) -> Callable[[], Any]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{spec.source}: hf: sources need the package datasets. Install it with: pip install datasets aiohttp") from error
    candidates = _candidates(spec.source.removeprefix(HF))
    split = spec.split or "train"

    def load() -> Any:
        for path, config in candidates:
            try:
                return datasets.load_dataset(path, config, split=split, streaming=True)
            except Exception as error:  # of the network, the hub, a script or a split: types of their own each
                if isinstance(error, FileNotFoundError) and (path, config) != candidates[-1]:
                    continue  # no dataset of that name
                reason = next(iter(str(error).splitlines()), "")
                raise UserError(
                    "An hf: source is hf:OWNER/NAME[/CONFIG][@SPLIT] and must be loadable by the datasets library; "
                    f"{spec.source}@{split}: {type(error).__name__}: {reason}. Check name, split and network."
                ) from error
        raise AssertionError("the last candidate returns or raises")

    return load


def _explained(dataset: Any, spec: TaskSpec) -> Iterator[Any]:
    try:
        yield from dataset
    except Exception as error:  # as above
        raise UserError(f"{spec.name} broke off: {type(error).__name__}: {error}. Check the network, and start again.") from error
