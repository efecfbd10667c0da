"""A model folder seen in another dtype: the one place where a converter changes a value.

Rounding is to nearest, ties to even, as torch's ``to``. Promises: a finite value never silently becomes infinite (a UserError names the
tensor and the dtype that would hold it); weights are converted one at a time, when they are read, in chunks.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.hivemind_int8 import CHUNK_ELEMENTS, Int8File
from checkpoint.model_folder import ModelFolder
from checkpoint.weight_file import StoredWeight, TensorSpec, WeightFile
from user_error import UserError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def recast(source: ModelFolder, dtype: torch.dtype | None) -> ModelFolder:
    """``source`` with every weight as ``dtype``; None: as it is. Reading a weight raises UserError if it does not fit."""
    if dtype is None:
        return source
    files: dict[int, RecastFile] = {}
    weights = {}
    for name, stored in source.weights.items():
        if id(stored.file) not in files:
            files[id(stored.file)] = RecastFile(stored.file, dtype)
        weights[name] = StoredWeight(files[id(stored.file)], stored.name)
    return ModelFolder(source.path, source.config, weights, dropped=source.dropped, weights_path=source.weights_path)


class RecastFile:
    """A WeightFile over another one."""

    def __init__(self, inner: WeightFile, dtype: torch.dtype) -> None:
        self.path, self.inner, self._dtype = inner.path, inner, dtype
        self.specs: Mapping[str, TensorSpec] = {n: TensorSpec(dtype=dtype, shape=spec.shape) for n, spec in inner.specs.items()}

    def read(self, name: str) -> Tensor:
        """The weight as the new dtype, in memory of its own if that is another one."""
        if self.inner.specs[name].dtype == self._dtype:
            return self.inner.read(name)
        weight = torch.empty(self.specs[name].shape, dtype=self._dtype)
        flat, start = weight.reshape(-1), 0
        for chunk in _chunks(self.inner, name):
            piece = flat[start : start + len(chunk)]
            piece.copy_(chunk)
            if not torch.equal(piece.isfinite(), chunk.isfinite()):
                raise UserError(_overflow(self.path, name, chunk, self._dtype))
            start += len(chunk)
        return weight


def _chunks(file: WeightFile, name: str) -> Iterator[Tensor]:
    if isinstance(file, Int8File):
        return file.chunks(name)
    return iter(file.read(name).reshape(-1).split(CHUNK_ELEMENTS))


def _overflow(path: Path, name: str, chunk: Tensor, dtype: torch.dtype) -> str:
    short = next(key for key, value in DTYPES.items() if value == dtype)
    largest, limit = chunk[chunk.isfinite()].abs().max().item(), torch.finfo(dtype).max
    cure = "Use --dtype bf16, which holds numbers as large as fp32 does, or --dtype keep."
    if dtype != torch.float16:
        cure = "Use --dtype keep."
    return f"{name} in {path} does not fit {short}: it holds {largest:g}, and {short} ends at {limit:g}. {cure}"
