"""The checkpoint folder: a Hugging Face folder sharded by layer, written by many ranks, that exists as a whole or not at all.

    <root>/.<step>.partial/   begin (rank 0) .. write_layer, write_train_state (every rank of replica 0) .. commit (rank 0)
    <root>/<step>/            the same folder after one rename

Promises: at whatever moment the job is killed, ``<root>/<step>`` is either not there or complete, and the steps before it are untouched.
Files are flushed before the manifest is written, the manifest before the rename. The files are cut by layer, never by stage, so a
checkpoint can be resumed at any pipeline degree; ``from_pretrained(<step folder>)`` works. A model folder is the same without
train_state.
Left to others: who calls when, the barriers between (the training loop), what the training state holds (train_state.py).
"""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.atomic_folder import PARTIAL_SUFFIX
from checkpoint.layered_folder import file_of_layer, finish_folder
from checkpoint.manifest import TRAIN_STATE, TRAINER_FILE, checkpoint_problems
from checkpoint.tensor_file import (
    FileRecord,
    TensorSource,
    explained_disk_errors,
    fsync_directory,
    write_json_file,
    write_tensor_file,
)
from checkpoint.train_state import TRAINER_FORMAT
from modules.stage import layer_key
from user_error import UserError

VISIBLE_WITHIN_S = 10.0  # network filesystems show another host's files with a delay; a folder that is not shared never does
_SHARED = "--checkpoint-path must be a folder that all hosts share. Give one on a shared filesystem."


class StepWriter:
    """Writes one step. Every rank makes its own; ``begin`` and ``commit`` are rank 0's, a barrier after the one and before the other."""

    def __init__(self, root: Path, step: int) -> None:
        assert step >= 0, "a step is counted from 0"
        self.step, self.root = step, root
        self.final, self.partial = root / str(step), root / f".{step}{PARTIAL_SUFFIX}"

    def is_complete(self) -> bool:
        """True if this step is there already (the job was resumed at exactly this step): saving it again may then be left out."""
        return not checkpoint_problems(self.final)

    def begin(self) -> None:
        """Rank 0: an empty partial folder; what an earlier, killed attempt at this step left is removed."""
        with explained_disk_errors(self.partial):
            if self.partial.exists():
                shutil.rmtree(self.partial)
            (self.partial / TRAIN_STATE).mkdir(parents=True)

    def write_layer(self, key: str, weights: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> FileRecord:
        """Any rank: the weights of one layer, each as the dtype that the model folder gave it. Values are copied before this returns."""
        assert all(layer_key(name) == key for name in weights), f"these weights do not all belong to {key}: {sorted(weights)}"
        return self._write(file_of_layer(key), [TensorSource.of(name, tensor, dtypes[name]) for name, tensor in weights.items()])

    def write_train_state(self, key: str, tensors: Mapping[str, Tensor]) -> FileRecord:
        """Any rank: what pack_train_state made of one layer."""
        return self._write(f"{TRAIN_STATE}/{file_of_layer(key)}", [TensorSource.of(name, tensor) for name, tensor in tensors.items()])

    def commit(
        self,
        records: Sequence[FileRecord],
        weight_map: Mapping[str, str],
        copy_from: Sequence[Path],
        trainer: Mapping[str, Any],
        *,
        visible_within_s: float = VISIBLE_WITHIN_S,
    ) -> Path:
        """Rank 0, after every rank has written: make the step exist. ``records`` of all ranks; ``weight_map`` weight name -> file.

        ``copy_from``: the model folder, then the tokenizer's if it is another one (see ``copy_companions``). Returns the step's folder.
        A complete folder of this step is never replaced: the new attempt is dropped (it would hold the same bytes). A damaged one is moved
        aside to ``<step>.damaged``. Raises UserError if rank 0 does not see what another rank has written, or the folder is no whole model.
        """
        if self.is_complete():
            shutil.rmtree(self.partial, ignore_errors=True)
            return self.final
        self._check_visible(records, visible_within_s)
        names = {record.name for record in records}
        assert all(f"{TRAIN_STATE}/{file}" in names for file in weight_map.values()), f"a layer without training state: {sorted(names)}"
        with explained_disk_errors(self.partial):
            trainer_record = write_json_file(self.partial / TRAINER_FILE, {"format": TRAINER_FORMAT, **trainer}, relative_to=self.partial)
            finish_folder(self.partial, [*records, trainer_record], weight_map, copy_from, step=self.step)
            fsync_directory(self.partial / TRAIN_STATE)
            fsync_directory(self.partial)
            if self.final.exists():
                os.rename(self.final, _unused(self.root, f"{self.step}.damaged"))
            os.rename(self.partial, self.final)
            fsync_directory(self.root)
        return self.final

    def _write(self, name: str, sources: Sequence[TensorSource]) -> FileRecord:
        with explained_disk_errors(self.partial / name):
            if not _seen_within(VISIBLE_WITHIN_S, (self.partial / name).parent.is_dir):
                raise UserError(f"this host does not see {self.partial}, which rank 0 has made: {_SHARED}")
            return write_tensor_file(self.partial / name, sources, relative_to=self.partial)

    def _check_visible(self, records: Sequence[FileRecord], within_s: float) -> None:
        def unseen() -> list[str]:
            return [record.name for record in records if not _has_size(self.partial / record.name, record.size)]

        if not _seen_within(within_s, lambda: not unseen()):
            names = unseen()
            what = f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''} in {self.partial}"
            raise UserError(f"rank 0 does not see {what}, which other ranks have written (waited {within_s:g} s): {_SHARED}")


def remove_partials(root: Path) -> list[str]:
    """Remove what killed saves left in ``root``, and return the names. For the holder of root's lock, before the first save."""
    rests = [entry for entry in sorted(root.glob(f".*{PARTIAL_SUFFIX}")) if entry.name[1 : -len(PARTIAL_SUFFIX)].isdigit()]
    with explained_disk_errors(root):
        for rest in rests:
            shutil.rmtree(rest)
    return [rest.name for rest in rests]


def _seen_within(within_s: float, seen: Callable[[], bool]) -> bool:
    """Ask until ``seen`` or the time is over."""
    deadline = time.monotonic() + within_s
    while not seen():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _unused(root: Path, name: str) -> Path:
    """``root/name``, with a number behind it if that is taken."""
    candidates = (root / (name if i == 0 else f"{name}.{i}") for i in itertools.count())
    return next(path for path in candidates if not path.exists())
