"""A plain Hugging Face folder out of any model folder: what save_pretrained would write, streamed tensor by tensor.

Promises: the same bytes in every tensor (or the same values in another dtype), no training state, nothing of ours in the folder; it appears
as a whole or not at all.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from checkpoint.atomic_folder import plan_digest, resumable_folder
from checkpoint.companions import copy_companions
from checkpoint.layered_folder import write_index
from checkpoint.model_folder import ModelFolder, check_model_folder
from checkpoint.tensor_file import TensorSource, write_tensor_file
from modules.model_config import ModelConfig
from modules.stage import in_model_order


def write_hf_folder(
    source: ModelFolder,
    target: Path,
    config: ModelConfig,
    *,
    max_shard_bytes: int,
    progress: Callable[[int], object] = lambda num_bytes: None,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write ``source`` into ``target`` (missing or empty) as ``dtype`` (None: each tensor as it is) and return the weight files.

    ``progress`` hears the bytes just written. The same call after a kill continues with the first file that was not finished. Raises
    UserError if a value does not fit ``dtype``.
    """
    check_model_folder(source, config)
    shards = shards_of(source, config, max_shard_bytes=max_shard_bytes, dtype=dtype)
    total_bytes = sum(tensor.num_bytes for shard in shards.values() for tensor in shard)
    plan = plan_digest(source, "hugging face", dtype, max_shard_bytes)
    with resumable_folder(target, plan=plan, num_bytes=total_bytes) as folder:
        for file, shard in shards.items():
            if folder.keeps(file):
                progress(sum(tensor.num_bytes for tensor in shard))
            folder.once(file, partial(write_tensor_file, folder.path / file, shard, relative_to=folder.path, progress=progress))
        if len(shards) > 1:
            weight_map = {tensor.name: file for file, shard in shards.items() for tensor in shard}
            write_index(folder.path, weight_map, total_bytes)
        copy_companions([source.path], folder.path, dtypes={tensor.dtype for shard in shards.values() for tensor in shard})
    return [target / file for file in shards]


def shards_of(
    source: ModelFolder, config: ModelConfig, *, max_shard_bytes: int, dtype: torch.dtype | None
) -> dict[str, list[TensorSource]]:
    """File name -> the weights that write_hf_folder puts into it, in model order."""
    names = in_model_order(source.names(), config.num_layers)
    shards = cut_into_shards([source.weights[name].source(name, dtype) for name in names], max_shard_bytes)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def cut_into_shards(tensors: Sequence[TensorSource], max_shard_bytes: int) -> list[list[TensorSource]]:
    """Fill shards in the given order up to ``max_shard_bytes``; a tensor that is larger alone makes a shard of its own."""
    shards: list[list[TensorSource]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.num_bytes for other in shards[-1]) + tensor.num_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    return shards
