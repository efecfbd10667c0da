"""A model folder sharded by layer: one file per layer, index, configuration, tokenizer and, last, the manifest.

It is a Hugging Face folder with unusual file names. A training checkpoint is the same plus train_state (layer_store.py).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from checkpoint.atomic_folder import plan_digest, resumable_folder
from checkpoint.companions import copy_companions
from checkpoint.manifest import write_manifest
from checkpoint.model_folder import ModelFolder, check_model_folder
from checkpoint.tensor_file import FileRecord, TensorSource, write_json_file, write_tensor_file
from checkpoint.weight_file import open_weight_file
from modules.families import read_model_config
from modules.model_config import ModelConfig
from modules.stage import layer_key, layer_keys

INDEX = "model.safetensors.index.json"


def file_of_layer(key: str) -> str:
    """The file that holds a layer, of weights and (inside train_state) of training state."""
    return f"{key}.safetensors"


def write_index(folder: Path, weight_map: Mapping[str, str], num_bytes: int) -> FileRecord:
    """Write Hugging Face's index of a folder of several files: weight name -> file, and the bytes of all weights."""
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return write_json_file(folder / INDEX, index, relative_to=folder)


def write_model_folder(
    source: ModelFolder,
    target: Path,
    config: ModelConfig,
    progress: Callable[[str, int], object] = lambda key, num_bytes: None,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write ``source`` as a layer-sharded model folder ``target`` with manifest, tensor by tensor, as ``dtype`` (None: each as it is).

    ``progress`` hears (layer key, bytes just written). ``target`` must be missing or empty; it appears as a whole or not at all, and the
    same call after a kill continues with the first layer that was not finished. Raises UserError if a value does not fit ``dtype``.
    """
    check_model_folder(source, config)
    by_layer: dict[str, list[TensorSource]] = {key: [] for key in layer_keys(config.num_layers)}
    for name in source.names():
        by_layer[layer_key(name)].append(source.weights[name].source(name, dtype))
    num_bytes = {key: sum(s.num_bytes for s in sources) for key, sources in by_layer.items()}
    plan = plan_digest(source, "layers", dtype)
    with resumable_folder(target, plan=plan, num_bytes=sum(num_bytes.values())) as folder:
        records = []
        for key, sources in by_layer.items():
            file = file_of_layer(key)
            if folder.keeps(file):
                progress(key, num_bytes[key])
            write = partial(write_tensor_file, folder.path / file, sources, relative_to=folder.path, progress=partial(progress, key))
            records.append(folder.once(file, write))
        weight_map = {s.name: file_of_layer(key) for key, sources in by_layer.items() for s in sources}
        finish_folder(folder.path, records, weight_map, [source.path], step=None)
    return target


def finish_folder(
    folder: Path, records: Sequence[FileRecord], weight_map: Mapping[str, str], copy_from: Sequence[Path], *, step: int | None
) -> None:
    """Complete a folder that holds the layers' files: index, configuration, tokenizer, a strict check of it all, and last the manifest."""
    specs = [spec for file in sorted(set(weight_map.values())) for spec in open_weight_file(folder / file).specs.values()]
    index_record = write_index(folder, weight_map, sum(spec.num_bytes for spec in specs))
    companions = copy_companions(copy_from, folder, dtypes={spec.dtype for spec in specs}, with_padding=True)
    written = ModelFolder.open(folder)
    check_model_folder(written, read_model_config(written.config))
    write_manifest(folder, [*records, index_record, *companions], step)
