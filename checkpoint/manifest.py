"""manifest.json: the list of a folder's files that makes the folder exist. It is written last; what is at odds with it does not count.

Promises: ``find_newest_step`` returns a folder only if every file of its manifest is there in full size, says in words why it passed a
newer one over, and never changes anything. Sizes are what a killed or full disk gets wrong; ``hashes=True`` also finds flipped bits, at
the price of reading everything. Left to others: writing the folder (layer_store.py).
"""

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from checkpoint.model_folder import read_json_object
from checkpoint.tensor_file import CHUNK_BYTES, FileRecord, write_json_file
from user_error import UserError

MANIFEST = "manifest.json"
TRAIN_STATE = "train_state"
TRAINER_FILE = f"{TRAIN_STATE}/trainer.json"
MANIFEST_FORMAT = 1


def write_manifest(folder: Path, records: Sequence[FileRecord], step: int | None) -> None:
    """Write ``folder``'s manifest; ``step`` is None for a model folder."""
    files = {record.name: {"size": record.size, "sha256": record.sha256} for record in sorted(records, key=lambda record: record.name)}
    assert len(files) == len(records), "every file of a folder is recorded once"
    write_json_file(folder / MANIFEST, {"format": MANIFEST_FORMAT, "step": step, "files": files}, relative_to=folder)


def read_manifest(folder: Path) -> tuple[int | None, list[FileRecord]]:
    """(step or None, every file). Raises UserError if the manifest is missing or is none that this version reads."""
    content = read_json_object(folder / MANIFEST)
    if content.get("format") != MANIFEST_FORMAT:
        raise UserError(f"{folder / MANIFEST} has the format {content.get('format')!r}; this version reads format {MANIFEST_FORMAT}")
    try:
        return content["step"], [_record(name, entry) for name, entry in content["files"].items()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged: it does not list files with size and sha256") from error


def verify_step(folder: Path, hashes: bool = False, *, only: Collection[str] | None = None) -> list[str]:
    """What is wrong with a step (or model) folder, one clause per defect; [] if it is complete.

    ``hashes``: also read the files and compare their sha256. ``only``: look at the files of these names alone, as a rank may that
    reads its own layers.
    """
    try:
        step, records = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    chosen = [record for record in records if only is None or record.name in only]
    problems = [problem for record in chosen if (problem := _file_problem(folder, record, hashes))]
    if step is not None and TRAINER_FILE not in {record.name for record in records}:
        problems.append(f"{MANIFEST} does not list {TRAINER_FILE}")
    return problems


def find_newest_step(root: Path) -> tuple[Path | None, list[str]]:
    """The newest complete step folder in ``root`` (None if there is none), and a warning for every newer one that had to be passed over."""
    warnings: list[str] = []
    for folder in step_folders(root):
        problems = checkpoint_problems(folder)
        if not problems:
            return folder, warnings
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        warnings.append(f"passed over {folder}, it is no complete checkpoint: {problems[0]}{more}")
    return None, warnings


def checkpoint_problems(folder: Path) -> list[str]:
    """As verify_step, and also: the folder must be the training step that its name says."""
    problems = verify_step(folder)
    if not problems:
        step, _ = read_manifest(folder)
        if step is None:
            return [f"its {MANIFEST} calls it a model folder, without training state"]
        if str(step) != folder.name:
            return [f"its {MANIFEST} calls it step {step}"]
    return problems


def step_folders(root: Path) -> list[Path]:
    """The folders in ``root`` that are named by a step, newest first, complete or not."""
    if not root.is_dir():
        return []
    folders = [entry for entry in root.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", entry.name) and entry.is_dir()]
    return sorted(folders, key=lambda folder: int(folder.name), reverse=True)


def _record(name: str, entry: Any) -> FileRecord:
    if not isinstance(name, str) or not isinstance(entry["sha256"], str) or type(entry["size"]) is not int:
        raise TypeError(name)
    return FileRecord(name=name, size=entry["size"], sha256=entry["sha256"])


def _file_problem(folder: Path, record: FileRecord, hashes: bool) -> str | None:
    path = folder / record.name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{record.name} is missing"
    if size != record.size:
        return f"{record.name} has {size} bytes, must have {record.size}"
    if hashes and _sha256(path) != record.sha256:
        return f"{record.name} has changed: its sha256 is not the one in {MANIFEST}"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
