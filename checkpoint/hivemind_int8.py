"""Weights in the blockwise 8-bit format of hivemind/gpt-j-6B-8bit, seen as ordinary weights.

A matrix ``<name>.weight`` is stored as uint8 indices into ``<name>.code`` (256 numbers between -1 and 1), and every 4096 consecutive
elements of the flattened matrix share one entry of ``<name>.absmax``; a last block may be short:

    value[i] = code[weight[i]] * absmax[i // 4096]

(dequantize_blockwise of bitsandbytes, CPU path; Dettmers et al. 2022, arXiv:2110.02861, section 2.) Biases and norms lie there plainly.
Promises: nothing is read before a weight is asked for; one weight at a time is in memory, and of the way there one chunk.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint.weight_file import StoredWeight, TensorSpec
from user_error import UserError

BLOCK_ELEMENTS = 4096
CHUNK_ELEMENTS = 256 * BLOCK_ELEMENTS
_INDICES, _ABSMAX, _CODE = ".weight", ".absmax", ".code"


class Int8File:
    """A WeightFile over the triples of other open files. Its weights are float32, the dtype of the formula."""

    def __init__(self, path: Path, triples: Mapping[str, tuple[StoredWeight, StoredWeight, StoredWeight]]) -> None:
        """triples: name of the weight -> (indices, absmax, code)."""
        self.path, self._triples = path, dict(triples)
        self.specs = {name: TensorSpec(dtype=torch.float32, shape=triple[0].spec.shape) for name, triple in triples.items()}

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The flattened weight in pieces, float32 (at most CHUNK_ELEMENTS,)."""
        stored, *scaling = self._triples[name]
        absmax, code = (other.file.read(other.name).to(torch.float32, copy=True) for other in scaling)
        for values, other in zip((absmax, code), scaling, strict=True):
            if not bool(torch.isfinite(values).all()):
                what = f"{other.name} in {other.file.path} holds numbers that are not finite"
                raise UserError(f"{what}, and every block of {name} is a multiple of one. Fetch the model again from its source.")
        indices = stored.file.read(stored.name).reshape(-1)  # last, so that it stays the one tensor of its file that is mapped
        for start in range(0, indices.numel(), CHUNK_ELEMENTS):
            # numpy's take is five times as fast as torch's index_select here (measured: 0.007 s to 0.034 s for 4 M elements).
            values = torch.from_numpy(np.take(code.numpy(), indices[start : start + CHUNK_ELEMENTS].numpy()))
            first, num_whole = start // BLOCK_ELEMENTS, len(values) // BLOCK_ELEMENTS
            whole, rest = values[: num_whole * BLOCK_ELEMENTS], values[num_whole * BLOCK_ELEMENTS :]
            whole.view(-1, BLOCK_ELEMENTS).mul_(absmax[first : first + num_whole, None])
            if len(rest):
                rest.mul_(absmax[first + num_whole])
            yield values

    def read(self, name: str) -> Tensor:
        """The weight, dequantised into memory of its own."""
        weight = torch.empty(self.specs[name].shape, dtype=torch.float32)
        flat, start = weight.reshape(-1), 0
        for chunk in self.chunks(name):
            flat[start : start + len(chunk)] = chunk
            start += len(chunk)
        return weight


def dequantised(weights: Mapping[str, StoredWeight], path: Path) -> dict[str, StoredWeight]:
    """``weights`` with every (weight, absmax, code) replaced by the one weight that they mean; all others as they are.

    ``path``: the folder, for messages. Raises UserError where the three do not fit each other. A part without the other two stays what it
    is, and will be refused as an unknown tensor or as one that is no floating-point weight.
    """
    bases = [name.removesuffix(_CODE) for name in weights if name.endswith(_CODE)]
    triples = {
        f"{base}{_INDICES}": (weights[f"{base}{_INDICES}"], weights[f"{base}{_ABSMAX}"], weights[f"{base}{_CODE}"])
        for base in bases
        if f"{base}{_INDICES}" in weights and f"{base}{_ABSMAX}" in weights
    }
    for name, (indices, absmax, code) in triples.items():
        num_blocks = -(-indices.spec.shape.numel() // BLOCK_ELEMENTS)
        fits = indices.spec.dtype == torch.uint8 and absmax.spec.shape == (num_blocks,) and code.spec.shape == (256,)
        if not (fits and absmax.spec.dtype.is_floating_point and code.spec.dtype.is_floating_point):
            rule = f"an 8-bit weight is uint8 with one absmax for every {BLOCK_ELEMENTS} elements, here [{num_blocks}], and a code of [256]"
            seen = ", ".join(f"{stored.name} {stored.spec.dtype} {list(stored.spec.shape)}" for stored in (indices, absmax, code))
            raise UserError(f"{path}: {name} cannot be read: {rule}; seen {seen}. Fetch the model again from its source.")
    file = Int8File(path, triples)
    bases = [name.removesuffix(_INDICES) for name in triples]
    consumed = {f"{base}{end}" for base in bases for end in (_INDICES, _ABSMAX, _CODE)}
    return {name: stored for name, stored in weights.items() if name not in consumed} | {name: StoredWeight(file, name) for name in triples}
