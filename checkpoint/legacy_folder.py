"""A model folder in the layout of this trainer's public relatives (legacy_layers.py), out of any model folder.

Promises: names without prefix, plain tensors, no causal masks and no rotary tables, configuration and tokenizer beside them; one layer in
memory at a time; nothing of ours in the folder, which appears as a whole or not at all.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.atomic_folder import atomic_folder
from checkpoint.companions import copy_companions
from checkpoint.legacy_layers import legacy_files, legacy_place
from checkpoint.manifest import sha256_of
from checkpoint.model_folder import ModelFolder, check_model_folder
from checkpoint.tensor_file import FileRecord
from modules.model_config import ModelConfig


def write_legacy_folder(
    source: ModelFolder, target: Path, config: ModelConfig, progress: Callable[[str, int], object] = lambda key, num_bytes: None
) -> list[Path]:
    """Write ``source`` into ``target`` (missing or empty) and return the files of weights.

    ``progress`` hears (layer key, bytes just written). Raises UserError, and then has written nothing.
    """
    check_model_folder(source, config)
    files = legacy_files(config.num_layers)
    tables: dict[str, list[tuple[str, str]]] = {file: [] for file in files}
    for name in source.names():
        file, short = legacy_place(name, config.names)
        tables[file].append((short, name))
    with atomic_folder(target, num_bytes=source.num_bytes()) as folder:
        for file, table in tables.items():
            _write_layer(folder, file, source, table)
            progress(files[file], sum(source.weights[name].spec.num_bytes for _, name in table))
        copy_companions([source.path], folder, dtypes={source.dtype(name) for name in source.names()})
    return [target / file for file in files]


def _write_layer(folder: Path, file: str, source: ModelFolder, table: Sequence[tuple[str, str]]) -> FileRecord:
    """table: (name in the file, Hugging Face name)."""
    path = folder / file
    # Clones, because torch.save writes the whole storage under a tensor, which of a mapped file is more than the tensor.
    tensors: dict[str, Tensor] = {short: source.read(name).clone(memory_format=torch.contiguous_format) for short, name in table}
    with open(path, "xb") as stream:
        torch.save(tensors, stream)
        stream.flush()
        os.fsync(stream.fileno())
    return FileRecord(name=file, size=path.stat().st_size, sha256=sha256_of(path))
