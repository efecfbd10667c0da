"""A model folder sharded by layer: one file per layer, index, configuration, tokenizer and, last, the manifest.

It is a Hugging Face folder with unusual file names. A training checkpoint is the same plus train_state (layer_store.py).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from checkpoint.atomic_folder import atomic_folder
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


def write_model_folder(
    source: ModelFolder, target: Path, config: ModelConfig, progress: Callable[[str, int], object] = lambda key, num_bytes: None
) -> Path:
    """Write ``source`` as a layer-sharded model folder ``target`` with manifest, tensor by tensor, every weight's dtype kept.

    ``progress`` hears (layer key, bytes just written). ``target`` must be missing or empty; it appears as a whole or not at all.
    """
    check_model_folder(source, config)
    by_layer: dict[str, list[TensorSource]] = {key: [] for key in layer_keys(config.num_layers)}
    for name in source.names():
        by_layer[layer_key(name)].append(source.tensor_source(name))
    with atomic_folder(target, num_bytes=source.num_bytes()) as folder:
        records = [
            write_tensor_file(folder / file_of_layer(key), sources, relative_to=folder, progress=partial(progress, key))
            for key, sources in by_layer.items()
        ]
        weight_map = {s.name: file_of_layer(key) for key, sources in by_layer.items() for s in sources}
        finish_folder(folder, records, weight_map, [source.path], step=None)
    return target


def finish_folder(
    folder: Path, records: Sequence[FileRecord], weight_map: Mapping[str, str], copy_from: Sequence[Path], *, step: int | None
) -> None:
    """Complete a folder that holds the layers' files: index, configuration, tokenizer, a strict check of it all, and last the manifest."""
    specs = [spec for file in sorted(set(weight_map.values())) for spec in open_weight_file(folder / file).specs.values()]
    index = {"metadata": {"total_size": sum(spec.num_bytes for spec in specs)}, "weight_map": dict(sorted(weight_map.items()))}
    index_record = write_json_file(folder / INDEX, index, relative_to=folder)
    companions = copy_companions(copy_from, folder, dtypes={spec.dtype for spec in specs})
    written = ModelFolder.open(folder)
    check_model_folder(written, read_model_config(written.config))
    write_manifest(folder, [*records, index_record, *companions], step)
