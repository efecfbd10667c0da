"""A folder that appears as a whole or not at all: written under a hidden name beside its target, flushed, then renamed.

Used by the converters; a training checkpoint, which many ranks write, does the same in layer_store.StepWriter.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoint.job_lock import JobLock
from checkpoint.tensor_file import explained_disk_errors, fsync_directory
from user_error import UserError

PARTIAL_SUFFIX = ".partial"


def check_target(target: Path) -> None:
    """Raise UserError unless ``target`` is missing or an empty folder: nothing is ever overwritten."""
    if target.exists() and not target.is_dir():
        raise UserError(f"the target must be a folder, and {target} is a file. Give another one.")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"the target folder must be missing or empty, and {target} is not. Nothing was overwritten; give another one.")


@contextmanager
def atomic_folder(target: Path, *, num_bytes: int = 0) -> Iterator[Path]:
    """Yield the folder to write into; when the body ends well it becomes ``target``, else it is removed and ``target`` is as it was.

    ``num_bytes``: what will be written, to refuse a disk that is too small before anything is. A rest of a killed run is cleared away;
    the rest of a live one is locked. Files in it must have been flushed by the body (tensor_file does).
    """
    check_target(target)
    target = target.resolve()  # a link to an empty folder is followed, so that the rename stays on one disk
    partial = target.parent / f".{target.name}{PARTIAL_SUFFIX}"
    with explained_disk_errors(target), JobLock(partial) as lock:
        try:
            _clear(partial, keep=lock.path)
            _check_space(target, num_bytes)
            yield partial
            lock.path.unlink()
            for folder, _, _ in os.walk(partial):
                fsync_directory(Path(folder))
            os.rename(partial, target)
            fsync_directory(target.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _clear(folder: Path, keep: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry != keep:
            entry.unlink()


def _check_space(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if num_bytes > free:
        sizes = f"{num_bytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free"
        raise UserError(f"{target} needs {sizes}. Free some space or give a folder on another disk.")
