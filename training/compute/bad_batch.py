"""The batch that ended a run, kept for inspection: what the model saw when its loss was no number any more."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from checkpoint.tensor_file import explained_disk_errors
from tasks.packing import num_targets
from user_error import UserError

PREFIX = "bad_batch_step_"


def keep_bad_batch(root: Path, step: int, tokens: np.ndarray, decode: Callable[[Sequence[int]], str]) -> str:
    """save_bad_batch(), and a sentence that says where, or why not: what ends the run is worth more than that reason."""
    try:
        return f"The last batch is kept in {save_bad_batch(root, step, tokens, decode)}. "
    except UserError as error:
        return f"The last batch could not be kept: {str(error).rstrip('.')}. "


def save_bad_batch(root: Path, step: int, tokens: np.ndarray, decode: Callable[[Sequence[int]], str]) -> Path:
    """On rank 0. tokens: (N, 3, T) int32, the whole global batch: ids, positions, targets. Returns the folder in ``root``:
    batch.safetensors with the three planes, (N, T) each, and batch.jsonl with every sequence's text and number of targets. One of an
    earlier attempt at the same step is replaced. Raises UserError where the disk does not take it."""
    folder, partial = root / f"{PREFIX}{step}", root / f".{PREFIX}{step}.partial"
    with explained_disk_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        planes = {name: np.ascontiguousarray(tokens[:, plane]) for plane, name in enumerate(("token_ids", "positions", "targets"))}
        (partial / "batch.safetensors").write_bytes(save(planes))
        with (partial / "batch.jsonl").open("w") as file:
            for number, sequence in enumerate(tokens):
                row = {"sequence": number, "targets": num_targets(sequence[2]), "text": decode(sequence[0].tolist())}
                file.write(json.dumps(row) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    return folder
