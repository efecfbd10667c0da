"""manifest.json: the list of a folder's files that makes the folder exist. It is written last; what is at odds with it does not count.

    {"format": 2, "step": 100, "position": 6400,
     "files": {"layer_00.safetensors": {"size": ..., "sha256": ...}, ...},         in this folder
     "elsewhere": {"layer_07.safetensors": {...}, ...}}                            of the same step, in folders of other hosts

``position`` counts the sequences that the weights have been trained on: it orders steps, also where a run was resumed with other
accumulation and its step numbers began to count in other units. ``elsewhere`` is there where hosts share no disk: files and elsewhere
together are the checkpoint. Merging folders of one step is a plain copy: whichever manifest remains, it still lists everything.

Promises: ``find_newest_step`` returns a folder only if every file is there in full size, says in words why it passed a newer one over,
and never changes anything. Sizes are what a killed or full disk gets wrong; ``hashes=True`` also finds flipped bits, at the price of
reading everything. Left to others: writing the folder (layer_store.py), putting several folders together (gather.py,
training/checkpoints/discovery.py).
"""

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.model_folder import is_file_name, read_json_object
from checkpoint.tensor_file import CHUNK_BYTES, FileRecord, write_json_file
from user_error import UserError

MANIFEST = "manifest.json"
TRAIN_STATE = "train_state"
TRAINER_FILE = f"{TRAIN_STATE}/trainer.json"
MANIFEST_FORMAT = 2
READABLE_FORMATS = (1, MANIFEST_FORMAT)  # 1 knew neither position nor elsewhere


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What manifest.json says. step and position are None for a model folder; the mappings go from file name to its record."""

    step: int | None
    position: int | None
    here: Mapping[str, FileRecord]
    elsewhere: Mapping[str, FileRecord]

    @property
    def everywhere(self) -> dict[str, FileRecord]:
        """Every file of the checkpoint."""
        return {**self.elsewhere, **self.here}


def write_manifest(
    folder: Path, records: Sequence[FileRecord], step: int | None, *, position: int | None = None, elsewhere: Sequence[FileRecord] = ()
) -> None:
    """Write ``folder``'s manifest; ``step`` and ``position`` are None for a model folder."""
    here, others = _table(records), _table(elsewhere)
    assert not set(here) & set(others), "a file that is here is not listed as elsewhere"
    content = {"format": MANIFEST_FORMAT, "step": step, "position": position, "files": here, "elsewhere": others}
    write_json_file(folder / MANIFEST, content, relative_to=folder)


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError if the manifest is missing or is none that this version reads."""
    content = read_json_object(folder / MANIFEST)
    if content.get("format") not in READABLE_FORMATS:
        raise UserError(f"{folder / MANIFEST} has the format {content.get('format')!r}; this version reads format {MANIFEST_FORMAT}")
    try:
        return Manifest(
            step=_count(content["step"]),
            position=_count(content.get("position")),
            here=_records(content["files"]),
            elsewhere=_records(content.get("elsewhere", {})),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged: it does not say step, position and files with size and sha256") from error


def verify_step(folder: Path, hashes: bool = False, *, only: Collection[str] | None = None) -> list[str]:
    """What is wrong with a step (or model) folder, one clause per defect; [] if all of the checkpoint is in it.

    ``hashes``: also read the files and compare their sha256. ``only``: look at the files of these names alone, as a rank may that
    reads its own layers.
    """
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    chosen = [record for name, record in sorted(manifest.everywhere.items()) if only is None or name in only]
    problems = [problem for record in chosen if (problem := file_problem(folder, record, hashes))]
    if any(not (folder / name).exists() for name in manifest.elsewhere):
        problems.append("the files of other hosts must be put beside these: python -m checkpoint.gather HOSTDIR... --out DIR")
    if manifest.step is not None and TRAINER_FILE not in manifest.everywhere:
        problems.append(f"{MANIFEST} does not list {TRAINER_FILE}")
    return problems


def find_newest_step(root: Path) -> tuple[Path | None, list[str]]:
    """The newest step folder in ``root`` that holds all of its checkpoint, None if there is none; and a warning for every newer one that
    had to be passed over."""
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
    return verify_step(folder) or name_problems(folder, read_manifest(folder))


def name_problems(folder: Path, manifest: Manifest) -> list[str]:
    """[] if the manifest is that of the training step which the folder's name says, else one clause."""
    if manifest.step is None:
        return [f"its {MANIFEST} calls it a model folder, without training state"]
    return [] if str(manifest.step) == folder.name else [f"its {MANIFEST} calls it step {manifest.step}"]


def step_folders(root: Path) -> list[Path]:
    """The folders in ``root`` that are named by a step, complete or not, newest first."""
    return [root / name for name in newest_first(step_positions(root))]


def step_positions(root: Path) -> dict[str, int | None]:
    """Name -> position of the folders in ``root`` that are named by a step, complete or not; None where no manifest says it."""
    if not root.is_dir():
        return {}
    return {e.name: position_of(e) for e in root.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", e.name) and e.is_dir()}


def newest_first(positions: Mapping[str, int | None]) -> list[str]:
    """The names of steps by position. One whose position is not known stands before all others whose number is not larger."""
    known = [(position, int(name), name) for name, position in positions.items() if position is not None]
    ordered = [name for _, _, name in sorted(known, reverse=True)]
    for name in sorted((name for name, position in positions.items() if position is None), key=int):
        place = next((i for i, other in enumerate(ordered) if int(other) <= int(name)), len(ordered))
        ordered.insert(place, name)
    return ordered


def position_of(folder: Path) -> int | None:
    """What its manifest says; None if it says nothing or cannot be read."""
    try:
        return read_manifest(folder).position
    except UserError:
        return None


def file_problem(
    folder: Path, record: FileRecord, hashes: bool = False, progress: Callable[[int], object] = lambda num_bytes: None
) -> str | None:
    """What is wrong with one file of ``folder``, as a clause that names it; None if nothing is. ``progress`` hears the bytes just read."""
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{record.name} has {size} bytes, must have {record.size}"
        if hashes and sha256_of(path, progress) != record.sha256:
            return f"{record.name} has changed: its sha256 is not the one in {MANIFEST}"
    except FileNotFoundError:
        return f"{record.name} is missing"
    except OSError as error:
        return f"{record.name} cannot be read ({error.strerror})"
    return None


def sha256_of(path: Path, progress: Callable[[int], object] = lambda num_bytes: None) -> str:
    """Of a file's content, in hexadecimal. ``progress`` hears the bytes just read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def _table(records: Sequence[FileRecord]) -> dict[str, dict[str, Any]]:
    table = {record.name: {"size": record.size, "sha256": record.sha256} for record in sorted(records, key=lambda record: record.name)}
    assert len(table) == len(records), "every file of a folder is recorded once"
    return table


def _records(table: Mapping[str, Any]) -> dict[str, FileRecord]:
    return {name: _record(name, entry) for name, entry in table.items()}


def _count(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise TypeError(value)
    return value


def _record(name: str, entry: Any) -> FileRecord:
    if not isinstance(entry["sha256"], str) or type(entry["size"]) is not int or entry["size"] < 0 or not _is_inside(name):
        raise TypeError(name)
    return FileRecord(name=name, size=entry["size"], sha256=entry["sha256"])


def _is_inside(name: str) -> bool:
    """A name from disk or wire names a file, and never leads out of its folder."""
    path = Path(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and all(map(is_file_name, path.parts))
