"""A model with an adapter in it, as a ModelFolder: the weights of both, put together one at a time when somebody reads them.

    W + scaling * B A    a linear with LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1)
    the adapter's        a LayerNorm that was trained

Promises: names, shapes and dtypes are the base's, so whoever writes a ModelFolder writes this one; what is merged is float32 (float64 if
the base is) and is rounded once, by the writer; the memory of one weight in float32. What the adapter does not touch are the base's bytes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.adapter_folder import Adapter
from checkpoint.manifest import sha256_of
from checkpoint.model_folder import ModelFolder
from checkpoint.tensor_file import CHUNK_BYTES, own_memory
from checkpoint.weight_file import StoredWeight, TensorSpec
from modules.adapters import adapter_names, merge_into
from user_error import UserError


class MergedModel(ModelFolder):
    """``base`` with ``adapter``: opened by the same checks, converted by the same writers."""

    def __init__(self, base: ModelFolder, adapter: Adapter) -> None:
        """Both have been proven to fit the same model. Reads the adapter; raises UserError if it holds a number that is not finite."""
        _check_finite(adapter)
        merged = {name: _with_adapter(weight, name, adapter) for name, weight in base.weights.items()}
        super().__init__(base.path, base.config, merged, dropped=base.dropped, weights_path=base.weights_path)
        self.num_merged = sum(isinstance(weight.file, _Computed) for weight in merged.values())
        self._adapter = adapter

    def digest(self) -> str:
        """As of every ModelFolder, and of the adapter's bytes: a conversion is not continued with another adapter."""
        return hashlib.sha256(json.dumps([super().digest(), *map(sha256_of, self._adapter.files)]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Computed:
    """A WeightFile of one weight that is made when it is read. ``name`` says how, for whoever prints where a weight comes from."""

    path: Path
    name: str
    spec: TensorSpec
    compute: Callable[[], Tensor]

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {self.name: self.spec}

    def read(self, name: str) -> Tensor:
        assert name == self.name, f"{name} is not {self.name}"
        return self.compute()


def _with_adapter(weight: StoredWeight, name: str, adapter: Adapter) -> StoredWeight:
    module, _, leaf = name.rpartition(".")
    sides = adapter_names(module)
    if name in adapter.weights:
        trained = adapter.weights[name]
        path, how, compute = trained.file.path, trained.name, partial(adapter.read, name)
    elif leaf == "weight" and sides[0] in adapter.weights:
        path, how = weight.file.path, f"{weight.name} + {adapter.scaling:g} * lora_B @ lora_A"
        compute = partial(_merged, weight, adapter, *sides)
    else:
        return weight
    return StoredWeight(_Computed(path=path, name=how, spec=weight.spec, compute=compute), how)


def _merged(weight: StoredWeight, adapter: Adapter, name_of_a: str, name_of_b: str) -> Tensor:
    """(C_out, C_in), by blocks of rows, each of which gives the memory of the base's rows back."""
    a, b = adapter.read(name_of_a), adapter.read(name_of_b)
    source = weight.source(weight.name)
    base = source.read()
    result = own_memory(base.shape, torch.promote_types(base.dtype, torch.float32))
    num_rows = max(1, CHUNK_BYTES // (base.shape[1] * result.itemsize))
    for target, rows, of_b in zip(result.split(num_rows), base.split(num_rows), b.split(num_rows), strict=True):
        target.copy_(rows)
        source.release(rows)
        merge_into(target, a, of_b, adapter.scaling)
    return result


def _check_finite(adapter: Adapter) -> None:
    broken = [name for name in adapter.weights if not bool(torch.isfinite(adapter.read(name)).all())]
    if broken:
        what = f"{adapter.path} holds numbers that are not finite, in {len(broken)} tensors such as {broken[0]}"
        raise UserError(f"{what}: its training had diverged. Take an older step.")
