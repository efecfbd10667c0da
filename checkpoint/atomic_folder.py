"""A folder that appears as a whole or not at all: written under a hidden name beside its target, flushed, then renamed.

    <parent>/.<name>.partial.lock   who is writing; beside the folder, so that it is held across the rename; goes when the next one goes
    <parent>/.<name>.partial/       the files so far and, in a folder that can be continued, .journal
    <parent>/<name>/                the same folder after one rename, without the journal

The journal says which files are done: first the digest of the plan, then a line per file, each written after the file is on the disk.
After a kill, a power cut or Ctrl-C the same plan is continued with the files that the journal vouches for; another plan starts over.
Used by the converters; a training checkpoint, which many ranks write, is renamed in the same way by layer_store.StepWriter.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from checkpoint.job_lock import LOCK_NAME, JobLock
from checkpoint.model_folder import ModelFolder, is_file_name
from checkpoint.tensor_file import FileRecord, explained_disk_errors, fsync_directory
from user_error import UserError

PARTIAL_SUFFIX = ".partial"
JOURNAL_NAME = ".journal"
JOURNAL_FORMAT = 1
log = logging.getLogger("checkpoint")


def check_target(target: Path) -> None:
    """Raise UserError unless ``target`` is missing or an empty folder: nothing is ever overwritten."""
    if target.exists() and not target.is_dir():
        raise UserError(f"the target must be a folder, and {target} is a file. Give another one.")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"the target folder must be missing or empty, and {target} is not. Nothing was overwritten; give another one.")


def readable_bytes(count: int) -> str:
    """'12.3 MB': three digits in the largest unit that fits."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
    return next(f"{count / unit:.3g} {name}" for unit, name in units if count >= unit or unit == 1)


@contextmanager
def atomic_folder(target: Path, *, num_bytes: int = 0) -> Iterator[Path]:
    """Yield the folder to write into; when the body ends well it becomes ``target``, else it is removed and ``target`` is as it was.

    ``num_bytes``: what will be written, to refuse a disk that is too small before anything is. A rest of a killed run is cleared away;
    the rest of a live one is locked. Files in it must have been flushed by the body (tensor_file does).
    """
    with _locked_partial(target) as partial:
        try:
            _clear(partial, keep=())
            _check_space(target, num_bytes)
            yield partial
            _publish(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def resumable_folder(target: Path, *, plan: str, num_bytes: int = 0) -> Iterator["ResumableFolder"]:
    """As ``atomic_folder``, but what a killed run of the same ``plan`` has finished is kept (see ``ResumableFolder.once``).

    ``plan``: a text that changes with everything that the files' bytes depend on (``plan_digest``). An error, ours or the disk's, removes
    the folder; only a kill, a power cut or Ctrl-C leaves it for the next run.
    """
    with _locked_partial(target) as partial:
        try:
            folder = ResumableFolder(partial, plan)
            _check_space(target, num_bytes - folder.bytes_kept)
            if folder.num_kept:
                log.warning("continuing in %s: %d files (%.3f GB) were already written", partial, folder.num_kept, folder.bytes_kept / 1e9)
            yield folder
            folder.forget()
            _publish(partial, target)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except KeyboardInterrupt:
            if partial.exists():
                log.warning("%s stays: the same command continues there; remove it to start over", partial)
            raise


class ResumableFolder:
    """The folder that is being written, and what of it was there before. ``path``: where to write."""

    def __init__(self, path: Path, plan: str) -> None:
        """Open the journal in ``path`` for this ``plan``; what it does not vouch for is removed."""
        self.path, self._journal = path, path / JOURNAL_NAME
        self._header = {"format": JOURNAL_FORMAT, "plan": plan}
        records = self._read_journal()
        self._kept = {name: record for name, record in records.items() if _has_size(path / name, record.size)}
        _clear(path, keep={self._journal, *(path / name for name in self._kept)})
        # Written anew, because what is lost of the listed files must not be listed any more when it is written the next time.
        lines = [self._header, *(asdict(record) for record in self._kept.values())]
        successor = self._journal.with_suffix(".new")
        _write_durably(successor, "xb", b"".join(map(_line, lines)))
        os.replace(successor, self._journal)
        fsync_directory(path)

    @property
    def num_kept(self) -> int:
        """Files that an earlier run has written."""
        return len(self._kept)

    @property
    def bytes_kept(self) -> int:
        """Their size."""
        return sum(record.size for record in self._kept.values())

    def keeps(self, name: str) -> bool:
        """True if ``once`` will not write this file."""
        return name in self._kept

    def once(self, name: str, write: Callable[[], FileRecord]) -> FileRecord:
        """The record of the file ``name``: of an earlier run, or of ``write()``, which must leave it flushed under ``path``/``name``."""
        if name in self._kept:
            return self._kept[name]
        record = write()
        assert record.name == name, f"the file {name} was written as {record.name}"
        _write_durably(self._journal, "ab", _line(asdict(record)))
        return record

    def forget(self) -> None:
        """Remove the journal: all is written."""
        self._journal.unlink()

    def _read_journal(self) -> dict[str, FileRecord]:
        """What the journal lists, up to the line in which it breaks off; nothing if it is not of this plan."""
        try:
            header, *lines = self._journal.read_bytes().splitlines(keepends=True)
            if json.loads(header) != self._header:
                return {}
        except (FileNotFoundError, ValueError, RecursionError):  # none there, or broken off in its first line, or none of ours
            return {}
        records = {}
        for line in lines:
            try:
                record = FileRecord(**json.loads(line))
            except (ValueError, TypeError, RecursionError):
                break
            if not is_file_name(record.name) or type(record.size) is not int or not isinstance(record.sha256, str):
                break
            records[record.name] = record
        return records


def plan_digest(source: ModelFolder, *options: object) -> str:
    """For ``resumable_folder``: changes with the source (configuration, tensors, size and time of every file) and with ``options``.

    ``options``: plain values that say what is made of it, the layout's name among them.
    """
    where = [(name, str(source.weights[name].file.path), source.weights[name].name) for name in source.names()]
    files = [file for path in sorted({weight.file.path for weight in source.weights.values()}) for file in _files_of(path)]
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([source.digest(), where, states, [str(option) for option in options]]).encode()).hexdigest()


@contextmanager
def _locked_partial(target: Path) -> Iterator[Path]:
    """The folder beside ``target``, made, ours and locked until the body has renamed it, removed it or left it to the next run."""
    check_target(target)
    target = target.resolve()  # a link to an empty folder is followed, so that the rename stays on one disk
    partial = target.parent / f".{target.name}{PARTIAL_SUFFIX}"
    lock_path = partial.with_name(partial.name + LOCK_NAME)
    with explained_disk_errors(target):
        _check_is_ours(partial, lock_path)
        with JobLock(partial, path=lock_path) as lock:
            try:
                check_target(target)  # somebody else may have written it since
                partial.mkdir(exist_ok=True)
                yield partial
            finally:
                if not partial.exists():
                    lock.remove()


def _check_is_ours(partial: Path, lock_path: Path) -> None:
    """Raise UserError if something that no run of ours has left is where the partial folder must be: it would be emptied, or followed.

    Before the lock is made, so that a lock beside a folder always means that the folder is ours.
    """
    is_folder = partial.is_dir() and not partial.is_symlink()
    if os.path.lexists(partial) and not is_folder:
        raise UserError(f"{partial} is in the way and not ours: it is no folder. Move it, or give another target.")
    is_foreign = is_folder and any(partial.iterdir()) and not (partial / JOURNAL_NAME).is_file() and not lock_path.exists()
    if is_foreign and partial.exists():  # else its owner has just finished
        raise UserError(f"{partial} is in the way and not ours: no conversion has left it. Move it, or give another target.")


def _publish(partial: Path, target: Path) -> None:
    target = target.resolve()
    for folder, _, _ in os.walk(partial):
        fsync_directory(Path(folder))
    os.rename(partial, target)
    fsync_directory(target.parent)


def _clear(folder: Path, keep: Iterable[Path]) -> None:
    """Remove every file below ``folder`` but ``keep``, and the folders that are empty then."""
    kept = set(keep)
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            if Path(parent, name) not in kept:
                Path(parent, name).unlink()
        if Path(parent) != folder and not os.listdir(parent):
            os.rmdir(parent)


def _files_of(path: Path) -> list[Path]:
    """A file itself; of a folder that stands for its files (weights in 8 bits), all that are not hidden."""
    return [path] if not path.is_dir() else sorted(e for e in path.iterdir() if e.is_file() and not e.name.startswith("."))


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _write_durably(path: Path, mode: str, data: bytes) -> None:
    with closing(open(path, mode)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _line(content: object) -> bytes:
    return (json.dumps(content) + "\n").encode()


def _check_space(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(target.resolve().parent).free
    if num_bytes > free:
        sizes = f"{readable_bytes(num_bytes)} and its disk has {readable_bytes(free)} free"
        raise UserError(f"{target} needs {sizes}. Free some space or give a folder on another disk.")
