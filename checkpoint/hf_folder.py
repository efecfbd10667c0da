"""A plain Hugging Face folder out of any model folder: what save_pretrained would write, streamed tensor by tensor.

Promises: the same bytes in every tensor, no training state, nothing of ours in the folder; it appears as a whole or not at all.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from checkpoint.atomic_folder import atomic_folder
from checkpoint.companions import copy_companions
from checkpoint.model_folder import ModelFolder, check_model_folder
from checkpoint.tensor_file import TensorSource, write_json_file, write_tensor_file
from modules.model_config import ModelConfig
from modules.stage import layer_key, layer_keys


def write_hf_folder(
    source: ModelFolder,
    target: Path,
    config: ModelConfig,
    *,
    max_shard_bytes: int,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> list[Path]:
    """Write ``source`` into ``target`` (missing or empty) and return the weight files. ``progress`` hears the bytes just written."""
    check_model_folder(source, config)
    layers = layer_keys(config.num_layers)
    in_model_order = sorted(source.names(), key=lambda name: (layers.index(layer_key(name)), name))
    shards = cut_into_shards([source.tensor_source(name) for name in in_model_order], max_shard_bytes)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(files) == 1:
        files = ["model.safetensors"]
    with atomic_folder(target, num_bytes=source.num_bytes()) as folder:
        for file, shard in zip(files, shards, strict=True):
            write_tensor_file(folder / file, shard, relative_to=folder, progress=progress)
        if len(shards) > 1:
            weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": source.num_bytes()}, "weight_map": dict(sorted(weight_map.items()))}
            write_json_file(folder / "model.safetensors.index.json", index, relative_to=folder)
        copy_companions([source.path], folder, dtypes={source.dtype(name) for name in source.names()})
    return [target / file for file in files]


def cut_into_shards(tensors: Sequence[TensorSource], max_shard_bytes: int) -> list[list[TensorSource]]:
    """Fill shards in the given order up to ``max_shard_bytes``; a tensor that is larger alone makes a shard of its own."""
    shards: list[list[TensorSource]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.num_bytes for other in shards[-1]) + tensor.num_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    return shards
