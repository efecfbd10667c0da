"""What a conversion will do, worked out from headers alone: where each weight comes from, where it goes, and what stays behind.

The writers (layered_folder.py, hf_folder.py, legacy_folder.py) follow the same tables; ``verify_copy`` holds what they wrote to the plan,
byte by byte and after the same rounding. A plan needs no weights, so a model of any size can be planned on any machine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from checkpoint.hf_folder import shards_of
from checkpoint.layered_folder import file_of_layer
from checkpoint.legacy_layers import legacy_place
from checkpoint.model_folder import ModelFolder, check_model_folder, listed
from checkpoint.weight_file import StoredWeight
from modules.model_config import ModelConfig
from modules.stage import in_model_order, layer_key
from user_error import UserError

Layout = Literal["layers", "legacy layers", "hugging face"]
COMPARED_AT_ONCE = 4 << 20  # elements


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One weight: its Hugging Face name, where it lies, where it goes."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    source_file: Path
    source_name: str
    file: str
    name_in_file: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """tensors: in model order. dropped: (name, file) of the old buffers that nobody reads."""

    tensors: tuple[PlannedTensor, ...]
    dropped: tuple[tuple[str, Path], ...]

    @property
    def files(self) -> list[str]:
        """The files of weights, in model order."""
        return list(dict.fromkeys(tensor.file for tensor in self.tensors))

    @property
    def num_bytes(self) -> int:
        """Of all weights as they will be written."""
        return sum(tensor.shape.numel() * tensor.dtype.itemsize for tensor in self.tensors)

    def lines(self) -> Iterator[str]:
        """The plan for a reader: a line per tensor, one per file and kind of what is dropped, and the sum."""
        for tensor in self.tensors:
            source = f"{tensor.source_file.name}: {tensor.source_name}"
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield f"{tensor.name} -> {tensor.file}: {tensor.name_in_file} {list(tensor.shape)} {dtype}   (from {source})"
        for name, path in self.dropped:
            yield f"dropped: {name}   (in {path.name}; a buffer of old versions, computed anew)"
        yield (
            f"{len(self.tensors)} tensors in {len(self.files)} files, {self.num_bytes / 1e9:.3f} GB; {len(self.dropped)} dropped; "
            "nothing was written"
        )


def plan_conversion(
    source: ModelFolder, config: ModelConfig, layout: Layout, *, dtype: torch.dtype | None = None, max_shard_bytes: int = 0
) -> Plan:
    """The plan for ``source``, written as ``dtype`` (None: each weight as it is). ``max_shard_bytes`` is for "hugging face".

    Raises UserError, as the writers do, if ``source`` does not hold exactly the weights of ``config``.
    """
    check_model_folder(source, config)
    place = _places(source, config, layout, dtype, max_shard_bytes)
    tensors = []
    for name in in_model_order(source.names(), config.num_layers):
        file, name_in_file = place(name)
        stored = source.weights[name]
        tensors.append(
            PlannedTensor(
                name=name,
                shape=source.shape(name),
                dtype=dtype or source.dtype(name),
                source_file=stored.file.path,
                source_name=stored.name,
                file=file,
                name_in_file=name_in_file,
            )
        )
    return Plan(tensors=tuple(tensors), dropped=tuple((name, stored.file.path) for name, stored in sorted(source.dropped.items())))


def verify_copy(source: ModelFolder, target: Path, plan: Plan, progress: Callable[[int], object] = lambda num_bytes: None) -> int:
    """Read ``target`` anew and compare every tensor with ``source``, rounded as planned, byte by byte. Returns how many there are.

    ``progress`` hears the bytes just compared. Raises UserError naming the tensors that differ.
    """
    written = ModelFolder.open(target)
    expected = {tensor.name: tensor for tensor in plan.tensors}
    wrong = listed("missing", sorted(set(expected) - set(written.names()))) + listed("extra", sorted(set(written.names()) - set(expected)))
    differing = []
    for name, tensor in expected.items():
        if name not in written.weights:
            continue
        stored = written.weights[name]
        is_in_place = (stored.file.path.name, stored.name) == (tensor.file, tensor.name_in_file)
        same_kind = stored.spec.shape == tensor.shape and stored.spec.dtype == tensor.dtype
        if not (is_in_place and same_kind and _same_bytes(source.weights[name], stored)):
            differing.append(name)
        progress(stored.spec.num_bytes)
    wrong += listed("not as in the source", differing)
    if wrong:
        cure = "Do not use it: check the disk, remove the folder and convert again."
        raise UserError(f"{target} was written and reads back differently: {'; '.join(wrong)}. {cure}")
    return len(expected)


def _places(
    source: ModelFolder, config: ModelConfig, layout: Layout, dtype: torch.dtype | None, max_shard_bytes: int
) -> Callable[[str], tuple[str, str]]:
    """Hugging Face name -> (file, name in it)."""
    if layout == "layers":
        return lambda name: (file_of_layer(layer_key(name)), name)
    if layout == "legacy layers":
        return lambda name: legacy_place(name, config.names)
    shards = shards_of(source, config, max_shard_bytes=max_shard_bytes, dtype=dtype)
    file_of = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    return lambda name: (file_of[name], name)


def _same_bytes(source: StoredWeight, written: StoredWeight) -> bool:
    """True if ``written`` holds what ``source`` holds, rounded to its dtype; NaNs and signed zeros included."""
    sources = source.source(source.name), written.source(written.name)
    vectors = [one.read().detach().reshape(-1) for one in sources]
    for parts in zip(*(vector.split(COMPARED_AT_ONCE) for vector in vectors), strict=True):
        a, b = (part.to(written.spec.dtype).view(torch.uint8) for part in parts)
        if not torch.equal(a, b):
            return False
        for one, part in zip(sources, parts, strict=True):
            one.release(part)
    return True
