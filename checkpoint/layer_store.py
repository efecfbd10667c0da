"""The checkpoint folder: a Hugging Face folder sharded by layer, written by many ranks, that exists as a whole or not at all.

    <root>/.<step>.partial/   begin (its keeper) .. write_layer, write_train_state (its writers) .. prepare, commit (its keeper)
    <root>/<step>/            the same folder after one rename

Where hosts share no disk there is one such folder per host, with the layers of that host's ranks; its keeper is the lowest rank that
sees it. Promises: at whatever moment the job is killed, ``<root>/<step>`` is either not there or complete, and the steps before it are
untouched. Files are flushed before the manifest is written, the manifest before the rename. The files are cut by layer, never by stage, so
a checkpoint can be resumed at any pipeline degree; ``from_pretrained(<step folder>)`` works. A model folder is the same without
train_state.
Left to others: who calls when, who waits for whom (training/checkpoints/saver.py), what the training state holds (train_state.py).
"""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.adapter_folder import merge_layer_files, write_adapter_weights
from checkpoint.atomic_folder import PARTIAL_SUFFIX
from checkpoint.companions import write_companions
from checkpoint.layered_folder import file_of_layer, write_index
from checkpoint.manifest import TRAIN_STATE, TRAINER_FILE, file_problem, position_of, read_manifest, step_folders, write_manifest
from checkpoint.model_folder import ModelFolder
from checkpoint.tensor_file import (
    Composed,
    FileRecord,
    TensorSource,
    explained_disk_errors,
    fsync_directory,
    write_json_file,
    write_tensor_file,
)
from checkpoint.train_state import TRAINER_FORMAT
from checkpoint.weight_file import TensorSpec, open_weight_file
from modules.stage import layer_key
from user_error import UserError

REMOVED = ".removed"
Progress = Callable[[int], object]  # hears of bytes
VISIBLE_WITHIN_S = 90.0  # NFS shows another host's files after a minute at most (acdirmax); only one that is missing is waited for


def unheard(num_bytes: int) -> None:
    """Where nobody wants to know."""


@dataclass(frozen=True, kw_only=True)
class StepWeights:
    """What the layer files of a step hold together, by name: a whole model, or what of it is trained, as adapters."""

    specs: Mapping[str, TensorSpec]
    is_adapter: bool = False

    @classmethod
    def of(cls, model: ModelFolder) -> "StepWeights":
        """A whole model, in the dtypes of ``model``."""
        return cls(specs={name: TensorSpec(dtype=model.dtype(name), shape=model.shape(name)) for name in model.names()})


class StepWriter:
    """Writes one step into one folder. Every rank makes its own; begin, prepare and commit are the keeper's, after the writers' parts."""

    def __init__(self, root: Path, step: int) -> None:
        assert step >= 0, "a step is counted from 0"
        self.step, self.root = step, root
        self.final, self.partial = root / str(step), root / f".{step}{PARTIAL_SUFFIX}"
        self._is_committed = False

    def begin(self) -> None:
        """The keeper: an empty partial folder; what an earlier, failed attempt at this step left is removed."""
        with explained_disk_errors(self.partial):
            _remove(self.partial)
            (self.partial / TRAIN_STATE).mkdir(parents=True)

    def write_layer(
        self, key: str, weights: Mapping[str, Tensor | Composed], dtypes: Mapping[str, torch.dtype], progress: Progress = unheard
    ) -> FileRecord:
        """A writer: the weights of one layer, each as the dtype that the model folder gave it. Values are copied before this returns.
        ``progress`` hears the bytes just written."""
        assert all(layer_key(name) == key for name in weights), f"these weights do not all belong to {key}: {sorted(weights)}"
        return self._write(file_of_layer(key), [TensorSource.of(name, tensor, dtypes[name]) for name, tensor in weights.items()], progress)

    def write_train_state(self, key: str, tensors: Mapping[str, Tensor | Composed], progress: Progress = unheard) -> FileRecord:
        """A writer: what pack_train_state made of one layer. progress: as above."""
        sources = [TensorSource.of(name, tensor) for name, tensor in tensors.items()]
        return self._write(f"{TRAIN_STATE}/{file_of_layer(key)}", sources, progress)

    def write_companions(self, contents: Mapping[str, bytes]) -> list[FileRecord]:
        """The keeper: configuration and tokenizer, the same bytes in every folder. See ``read_companions``."""
        with explained_disk_errors(self.partial):
            return write_companions(contents, self.partial)

    def prepare(
        self,
        records: Sequence[FileRecord],
        elsewhere: Sequence[FileRecord],
        *,
        position: int,
        weights: StepWeights,
        trainer: Mapping[str, Any],
        visible_within_s: float = VISIBLE_WITHIN_S,
    ) -> None:
        """The keeper, after every writer of every folder has written: all of the step but the rename.

        ``records``: what has been written into this folder; ``elsewhere``: into others alone. ``weights``: of all folders together.
        Adapters are also written as peft reads them, unless some lie elsewhere (then checkpoint.gather does it). Raises UserError if the
        keeper does not see what a writer has written.
        """
        self._check_visible(records, visible_within_s)
        with explained_disk_errors(self.partial):
            trainer_record = write_json_file(self.partial / TRAINER_FILE, {"format": TRAINER_FORMAT, **trainer}, relative_to=self.partial)
            names = {record.name for record in (*records, *elsewhere)}
            weight_map = {name: file_of_layer(layer_key(name)) for name in weights.specs}
            absent = sorted(set(weight_map.values()) - names)
            assert not absent, f"nobody has written {absent}"
            own = {record.name for record in records}
            self._check_weights(own, weight_map, weights)
            here = [*records, trainer_record]
            if not weights.is_adapter:
                here.append(write_index(self.partial, weight_map, sum(spec.num_bytes for spec in weights.specs.values())))
            elif own >= set(weight_map.values()):
                files = [self.partial / file for file in sorted(set(weight_map.values()))]
                here.append(write_adapter_weights(self.partial, merge_layer_files(files)))
            write_manifest(self.partial, here, self.step, position=position, elsewhere=elsewhere)
            fsync_directory(self.partial / TRAIN_STATE)
            fsync_directory(self.partial)

    def commit(self) -> Path:
        """The keeper, after all keepers have prepared: make the step exist, and return its folder.

        What has the step's name already (it counted in other units, or was found damaged) is moved aside, never replaced.
        """
        with explained_disk_errors(self.partial):
            if os.path.lexists(self.final):
                set_aside(self.final)
            os.rename(self.partial, self.final)
            self._is_committed = True
            fsync_directory(self.root)
        return self.final

    def abandon(self) -> None:
        """The keeper, where a part of the step could not be written, here or on another host, whose commit may be what failed: a disk that
        is full should not stay full of this."""
        if self._is_committed:
            os.rename(self.final, self.partial)
        shutil.rmtree(self.partial, ignore_errors=True)

    def give_up(self) -> None:
        """The keeper, where the others are lost: as abandon(), but a step that exists stays; it was ready everywhere."""
        if not self._is_committed:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _write(self, name: str, sources: Sequence[TensorSource], progress: Progress) -> FileRecord:
        with explained_disk_errors(self.partial / name):
            if not _seen_within(VISIBLE_WITHIN_S, (self.partial / name).parent.is_dir):
                raise UserError(f"this host no longer sees {self.partial}, which another one has made. Look at the filesystem under it")
            return write_tensor_file(self.partial / name, sources, relative_to=self.partial, progress=progress)

    def _check_visible(self, records: Sequence[FileRecord], within_s: float) -> None:
        def unseen() -> list[str]:
            return [record.name for record in records if file_problem(self.partial, record)]

        if not _seen_within(within_s, lambda: not unseen()):
            names = unseen()
            what = f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''} in {self.partial}"
            raise UserError(f"{what} cannot be seen by the host that completes the step (waited {within_s:g} s). Look at the filesystem")

    def _check_weights(self, written: set[str], weight_map: Mapping[str, str], weights: StepWeights) -> None:
        for file in sorted(written & set(weight_map.values())):
            seen = dict(open_weight_file(self.partial / file).specs)
            expected = {name: weights.specs[name] for name in weight_map if weight_map[name] == file}
            assert seen == expected, f"{file} must hold exactly its layer: {expected}, and holds {seen}"


def set_aside(folder: Path) -> Path:
    """Rename a step's folder so that nobody takes it for one, and return its new path. Damaged ones and others are told apart."""
    target = _unused(folder.parent, f"{folder.name}.{'set-aside' if _is_whole_here(folder) else 'damaged'}")
    os.rename(folder, target)
    fsync_directory(folder.parent)
    return target


def remove_old_steps(root: Path, newest: Path, keep: int, *, spared: str | None = None) -> list[str]:
    """Delete the steps before ``newest``, which has just been committed, but for ``keep`` - 1 of them and for the one of the name
    ``spared``, and return their names.

    What does not say its position is left alone. Each is renamed before it is deleted: a job killed meanwhile leaves half a step under a
    name that is none.
    """
    assert keep >= 1, "the newest step always stays"
    position = position_of(newest)
    assert position is not None, f"{newest} has just been written"
    older = [folder for folder in step_folders(root) if (before := position_of(folder)) is not None and before < position]
    removed = []
    for folder in [folder for folder in older[keep - 1 :] if folder.name != spared]:
        hidden = root / f".{folder.name}{REMOVED}{PARTIAL_SUFFIX}"
        with explained_disk_errors(folder):
            _remove(hidden)
            os.rename(folder, hidden)
            fsync_directory(root)
            _remove(hidden)
        removed.append(folder.name)
    return removed


def remove_partials(root: Path) -> list[str]:
    """Remove what killed saves and deletions left in ``root``, and return the names. For the holder of root's lock."""
    names = [entry.name for entry in sorted(root.glob(f".*{PARTIAL_SUFFIX}"))]
    rests = [name for name in names if name[1 : -len(PARTIAL_SUFFIX)].removesuffix(REMOVED).isdecimal()]
    with explained_disk_errors(root):
        for name in rests:
            _remove(root / name)
    return rests


def prepared_steps(root: Path) -> list[tuple[str, int | None]]:
    """(name, position) of the steps whose partial folder lacks nothing but the rename. For the holder of root's lock."""
    names = [entry.name[1 : -len(PARTIAL_SUFFIX)] for entry in sorted(root.glob(f".*{PARTIAL_SUFFIX}"))]
    partials = {name: root / f".{name}{PARTIAL_SUFFIX}" for name in names if name.isdecimal()}
    return [(name, position_of(partial)) for name, partial in partials.items() if _is_whole_here(partial)]


def _is_whole_here(folder: Path) -> bool:
    """True if what this folder's manifest calls its own is there; files of other hosts do not count."""
    try:
        return not any(file_problem(folder, record) for record in read_manifest(folder).here.values())
    except UserError:
        return False


def _remove(path: Path) -> None:
    """A folder and all in it; of a link, which somebody has put in its place, the link alone."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _seen_within(within_s: float, seen: Callable[[], bool]) -> bool:
    """Ask until ``seen`` or the time is over."""
    deadline = time.monotonic() + within_s
    while not seen():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True


def _unused(root: Path, name: str) -> Path:
    """``root/name``, with a number behind it if that is taken."""
    candidates = (root / (name if i == 0 else f"{name}.{i}") for i in itertools.count())
    return next(path for path in candidates if not os.path.lexists(path))
