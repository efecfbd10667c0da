"""A model folder in the layout of this trainer's public relatives (legacy_layers.py), out of any model folder.

Promises: names without prefix, plain tensors, no causal masks and no rotary tables, configuration and tokenizer beside them; one layer in
memory at a time; nothing of ours in the folder, which appears as a whole or not at all. What a killed run of the same conversion has
finished is not written again.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from checkpoint.atomic_folder import plan_digest, resumable_folder
from checkpoint.companions import copy_companions
from checkpoint.legacy_layers import legacy_files, legacy_place
from checkpoint.manifest import sha256_of
from checkpoint.model_folder import ModelFolder, check_model_folder
from checkpoint.tensor_file import FileRecord, TensorSource, converted
from modules.model_config import ModelConfig

CONVERTED_AT_ONCE = 4 << 20  # elements


def write_legacy_folder(
    source: ModelFolder,
    target: Path,
    config: ModelConfig,
    progress: Callable[[str, int], object] = lambda key, num_bytes: None,
    *,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write ``source`` into ``target`` (missing or empty) as ``dtype`` (None: each weight as it is) and return the files of weights.

    ``progress`` hears (layer key, bytes just written). Raises UserError, also if a value does not fit ``dtype``, and then has written
    nothing.
    """
    check_model_folder(source, config)
    files = legacy_files(config.num_layers)
    parts: dict[str, list[tuple[str, TensorSource]]] = {file: [] for file in files}
    for name in source.names():
        file, short = legacy_place(name, config.names)
        parts[file].append((short, source.weights[name].source(name, dtype)))
    num_bytes = {file: sum(tensor.num_bytes for _, tensor in part) for file, part in parts.items()}
    plan = plan_digest(source, "legacy layers", dtype)
    with resumable_folder(target, plan=plan, num_bytes=sum(num_bytes.values())) as folder:
        for file, part in parts.items():
            folder.once(file, functools.partial(_write_part, folder.path, file, part))
            progress(files[file], num_bytes[file])
        copy_companions([source.path], folder.path, dtypes={tensor.dtype for part in parts.values() for _, tensor in part})
    return [target / file for file in files]


def _write_part(folder: Path, file: str, part: Sequence[tuple[str, TensorSource]]) -> FileRecord:
    """part: (name in the file, the tensor under its Hugging Face name)."""
    path = folder / file
    with contextlib.closing(open(path, "xb")) as stream:
        _save({short: _in_memory(tensor) for short, tensor in part}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    return FileRecord(name=file, size=path.stat().st_size, sha256=sha256_of(path))


def _save(tensors: dict[str, Tensor], stream: BinaryIO) -> None:
    """torch.save, which wraps what a full disk says into a RuntimeError of its zip writer: raises the OSError itself."""
    try:
        torch.save(tensors, stream)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from error


def _in_memory(source: TensorSource) -> Tensor:
    """The tensor in storage of its own: torch.save writes the whole storage under a tensor, which of a mapped file is more."""
    result, start = torch.empty(source.shape, dtype=source.dtype), 0
    for part in source.read().detach().reshape(-1).split(CONVERTED_AT_ONCE):
        result.view(-1)[start : start + len(part)] = converted(part, source)
        start += len(part)
        source.release(part)
    return result
