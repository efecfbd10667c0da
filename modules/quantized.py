"""Frozen linears and embeddings whose weights lie in 8 or 4 bits: what lets a 6B model train adapters on an 11 GB card.

Int8: row c of a weight is scale[c] * q[c], q in [-127, 127], scale[c] = max |row c| / 127. Rounding is all that is lost: activations stay
what they are, where LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339) rounds those too and then has to keep outliers apart. NF4 (Dettmers
et al. 2023, arXiv:2305.14314, section 3) is bitsandbytes'.

Promises: a weight is turned back into numbers block by block of rows, at most BLOCK_BYTES at a time, in the dtype of the activations; a
backward keeps nothing, neither the input nor a copy of the weight; weights and biases get no gradients. Filling takes a weight that may
be a view of a mapped file, a few MiB at a time. Bits depend on no more than those of modules/gemm.py do. What is left to others: reading
the weights (checkpoint/), and that nothing converts a filled module to another dtype, scales included (asserted).

Legend: N rows of activations, C_in and C_out a linear's widths, r rows of a block of a weight, V vocabulary rows, C width.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules import gemm
from modules.linear import Linear
from modules.optional import import_bitsandbytes
from user_error import UserError

BLOCK_BYTES = 16 << 20  # of a weight in the dtype of the activations, at most (or one row)
CHUNK_BYTES = 16 << 20  # of a weight in fp32 while a module is filled; about three are alive at a time, and of NF4 some in bitsandbytes
NF4_BLOCK = 64  # consecutive elements of the flattened weight that share an entry of weight_scale
Kind = Literal["int8", "nf4"]


class _FrozenProduct(torch.autograd.Function):
    """x @ weight.T + bias of a frozen linear. The module itself is all that is kept: what it is filled with never changes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: "QuantizedLinear") -> Tensor:
        ctx.linear = linear
        return linear._product(x, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.linear.product_transposed(grad) if ctx.needs_input_grad[0] else None, None


class QuantizedLinear(nn.Linear):
    """What Int8Linear and Nf4Linear have in common. An nn.Linear, because peft knows where to put an adapter by that."""

    weight_scale: nn.Parameter  # fp32
    _row_multiple = 1  # blocks of rows start at multiples of it

    def __init__(
        self, in_features: int, out_features: int, *, bias_dtype: torch.dtype | None, device: torch.device | str | None = None
    ) -> None:
        """bias_dtype: None for no bias. Values are undefined before fill_, and those of the bias before it is copied to."""
        nn.Module.__init__(self)  # nn.Linear's own would draw a floating-point weight
        self.in_features, self.out_features = in_features, out_features
        self._allocate(device)
        self.register_parameter("bias", None if bias_dtype is None else _frozen(torch.empty(out_features, dtype=bias_dtype, device=device)))

    @classmethod
    def like(cls, linear: nn.Linear, bias_dtype: torch.dtype) -> "QuantizedLinear":
        """An empty one of the shape of ``linear``, where that lies; with a bias if ``linear`` has one."""
        of_bias = None if linear.bias is None else bias_dtype
        return cls(linear.in_features, linear.out_features, bias_dtype=of_bias, device=linear.weight.device)

    @torch.no_grad()
    def fill_(self, weight: Tensor, name: str = "the weight") -> None:
        """Quantise ``weight`` (C_out, C_in), of any floating dtype and device. Raises UserError, with ``name``, if it is not finite."""
        assert weight.shape == (self.out_features, self.in_features), f"{name} is {tuple(weight.shape)}, not that of {self}"
        self._check_scale()
        for rows, values in _chunks(weight, self.weight.device, self._row_multiple, name):
            self._pack(rows, values)

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """The weight as it is multiplied with, (C_out, C_in) fp32, whole."""
        weight = torch.empty((self.out_features, self.in_features), dtype=torch.float32, device=self.weight.device)
        for rows, values, factors in self._blocks(weight):
            weight[rows] = values if factors is None else values * factors[:, None]
        return weight

    @torch.no_grad()
    def product(self, x: Tensor) -> Tensor:
        """x (N, C_in) @ weight.T + bias: (N, C_out) fp32, with the sums formed as in x's dtype. No gradient."""
        return self._product(x, torch.float32)

    @torch.no_grad()
    def product_transposed(self, grad: Tensor) -> Tensor:
        """grad (N, C_out) @ weight: (N, C_in) in grad's dtype; the blocks of rows are added up in fp32, in their order. No gradient."""
        total: Tensor | None = None  # (N, C_in) fp32
        for rows, values, factors in self._blocks(grad):
            of_rows = grad[:, rows] if factors is None else (grad[:, rows] * factors).to(grad.dtype)  # (N, r)
            part = gemm.linear(of_rows.contiguous(), values.t()).float()  # (N, C_in)
            total = part if total is None else total.add_(part)
        assert total is not None, "a linear has rows"
        return total.to(grad.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C_in) fp32, bf16 or fp16. Returns (..., C_out) in the same dtype."""
        y: Tensor = _FrozenProduct.apply(x.reshape(-1, self.in_features), self)  # (N, C_out)
        return y.view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (N, C_in) @ weight.T + bias: (N, C_out), scaled and added up in fp32 before the rounding to ``dtype``."""
        y = torch.empty((len(x), self.out_features), dtype=dtype, device=x.device)
        bias = None if self.bias is None else self.bias.float()
        for rows, values, factors in self._blocks(x):
            part = gemm.linear(x, values).float()  # (N, r)
            if factors is not None:
                part.mul_(factors)
            y[:, rows] = part if bias is None else part.add_(bias[rows])
        return y

    def _blocks(self, like: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(rows, their values (r, C_in) in the dtype of ``like``, what each row is still to be multiplied by (r,) fp32 or None), in order.
        The next block may lie where this one does."""
        self._check_scale()
        ranges = _row_ranges(self.out_features, self.in_features * like.dtype.itemsize, BLOCK_BYTES, self._row_multiple)
        buffer = torch.empty((ranges[0].stop, self.in_features), dtype=like.dtype, device=like.device)
        for rows in ranges:
            yield rows, *self._unpack(rows, buffer[: rows.stop - rows.start])

    def _check_scale(self) -> None:
        assert self.weight_scale.dtype == torch.float32, f"scales are fp32; somebody has converted these to {self.weight_scale.dtype}"

    def _allocate(self, device: torch.device | str | None) -> None:
        """Make weight and weight_scale."""
        raise NotImplementedError

    def _pack(self, rows: slice, values: Tensor) -> None:
        """Store ``values`` (r, C_in) fp32 as ``rows``."""
        raise NotImplementedError

    def _unpack(self, rows: slice, buffer: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values and factors of ``rows``, as _blocks yields them; the values in ``buffer`` (r, C_in) or in memory of their own."""
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """A frozen linear of int8 rows: ``weight`` (C_out, C_in) int8, ``weight_scale`` (C_out,) fp32, ``bias`` (C_out,) or None.

    The products are formed with the int8 numbers themselves, which every floating dtype holds exactly, and scaled afterwards in fp32. In
    fp16 sums of those could overflow where y does not: there a row is multiplied by the power of two below its scale (as exact), and
    afterwards by the rest, which is in [1, 2); so a sum is never larger than the y it becomes. (Nothing smaller than 2**-24 is in fp16:
    the power stays above, where no sum of less than 100 000 terms can overflow.)
    In a backward in fp16 a gradient is multiplied by that rest first, and overflows from 32 752 on: for the loss scale to notice.
    """

    def _allocate(self, device: torch.device | str | None) -> None:
        self.weight = _frozen(torch.empty((self.out_features, self.in_features), dtype=torch.int8, device=device))
        self.weight_scale = _frozen(torch.empty(self.out_features, dtype=torch.float32, device=device))

    def _pack(self, rows: slice, values: Tensor) -> None:
        self.weight[rows], self.weight_scale[rows] = _int8_rows(values)

    def _unpack(self, rows: slice, buffer: Tensor) -> tuple[Tensor, Tensor | None]:
        values, factors = buffer.copy_(self.weight[rows]), self.weight_scale[rows]
        if values.dtype == torch.float16:
            bounded = factors.clamp(2.0**-24, 2.0**9)  # 127 * 2**9 is still a number in fp16
            powers = bounded / (2 * torch.frexp(bounded).mantissa)  # (r,), exactly 2**floor(log2(bounded))
            values.mul_(powers.to(torch.float16)[:, None])
            factors = factors / powers
        return values, factors


class Nf4Linear(QuantizedLinear):
    """A frozen linear in bitsandbytes' NF4: element i of the flattened weight is a number of 4 bits that stands for one of 16 values, times
    the largest magnitude of its NF4_BLOCK neighbours. ``weight`` (num_blocks, NF4_BLOCK / 2) uint8, two elements each (zeros fill up the
    last block), ``weight_scale`` (num_blocks,) fp32, ``bias`` (C_out,) or None. The 16 values are bitsandbytes' own and no state.

    bitsandbytes multiplies by the scale itself and rounds to the dtype of the activations. Raises UserError where it is not installed;
    check_nf4_available asks whether it can do this on a device.
    """

    def _allocate(self, device: torch.device | str | None) -> None:
        _bitsandbytes_functional()
        num_blocks = -(-self.out_features * self.in_features // NF4_BLOCK)
        self._row_multiple = NF4_BLOCK // math.gcd(NF4_BLOCK, self.in_features)  # that many rows are whole blocks
        self.weight = _frozen(torch.empty((num_blocks, NF4_BLOCK // 2), dtype=torch.uint8, device=device))
        self.weight_scale = _frozen(torch.empty(num_blocks, dtype=torch.float32, device=device))

    def _pack(self, rows: slice, values: Tensor) -> None:
        blocks = self._blocks_of(rows)
        missing = (blocks.stop - blocks.start) * NF4_BLOCK - values.numel()
        packed, state = _quantize_nf4(nn.functional.pad(values.flatten(), (0, missing)))
        self.weight[blocks], self.weight_scale[blocks] = packed.view(-1, NF4_BLOCK // 2), state

    def _unpack(self, rows: slice, buffer: Tensor) -> tuple[Tensor, Tensor | None]:
        blocks = self._blocks_of(rows)
        flat = _dequantize_nf4(self.weight[blocks], self.weight_scale[blocks], buffer.dtype).flatten()
        return flat[: buffer.numel()].view(buffer.shape), None

    def _blocks_of(self, rows: slice) -> slice:
        return slice(rows.start * self.in_features // NF4_BLOCK, -(-rows.stop * self.in_features // NF4_BLOCK))


class Int8Embedding(nn.Embedding):
    """Frozen embeddings of int8 rows: ``weight`` (V, C) int8, ``weight_scale`` (V,) fp32. ``out_dtype``: of the rows it returns."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, out_dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        """Values are undefined before fill_."""
        weight = torch.empty((num_embeddings, embedding_dim), dtype=torch.int8, device=device)
        super().__init__(num_embeddings, embedding_dim, _weight=weight, _freeze=True)
        self.weight_scale = _frozen(torch.empty(num_embeddings, dtype=torch.float32, device=device))
        self.out_dtype = out_dtype

    @classmethod
    def like(cls, embedding: nn.Embedding, out_dtype: torch.dtype) -> "Int8Embedding":
        """An empty one of the shape of ``embedding``, where that lies."""
        return cls(embedding.num_embeddings, embedding.embedding_dim, out_dtype=out_dtype, device=embedding.weight.device)

    @torch.no_grad()
    def fill_(self, weight: Tensor, name: str = "the weight") -> None:
        """Quantise ``weight`` (V, C), of any floating dtype and device. Raises UserError, with ``name``, if it is not finite."""
        assert weight.shape == self.weight.shape, f"{name} is {tuple(weight.shape)}, not that of {self}"
        for rows, values in _chunks(weight, self.weight.device, 1, name):
            self.weight[rows], self.weight_scale[rows] = _int8_rows(values)

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """All rows, (V, C) fp32."""
        return self.weight * self.weight_scale[:, None]

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) int. Returns their rows (..., C) in out_dtype, scaled in fp32 and rounded once."""
        assert self.weight_scale.dtype == torch.float32, f"scales are fp32; somebody has converted these to {self.weight_scale.dtype}"
        return (self.weight[ids] * self.weight_scale[ids][..., None]).to(self.out_dtype)  # (..., C)


def quantize_linears(
    module: nn.Module, kind: Kind, *, with_ends: bool, bias_dtype: torch.dtype, embedding_dtype: torch.dtype = torch.float32
) -> None:
    """Replace every Linear of the blocks of ``module``, a stage on the meta device, by its empty quantised form under the same name.

    with_ends: also embeddings and head, which become int8 with either kind: an error there reaches every logit, and 4 bits make a large
    one. Norms stay. bias_dtype: of the biases; embedding_dtype: of the hidden states that Int8Embedding returns. Then come to_empty, fill_
    of all quantized_parts, and copies to what else there is.
    """
    of_blocks: type[QuantizedLinear] = Int8Linear if kind == "int8" else Nf4Linear
    for name, part in list(module.named_modules()):
        new: QuantizedLinear | Int8Embedding
        if isinstance(part, Linear):
            new = of_blocks.like(part, bias_dtype)
        elif with_ends and type(part) is nn.Linear:
            new = Int8Linear.like(part, bias_dtype)
        elif with_ends and type(part) is nn.Embedding:
            new = Int8Embedding.like(part, embedding_dtype)
        else:
            continue
        assert new.weight.is_meta, f"{name} has values already, which would be lost: quantise on the meta device, then fill"
        module.set_submodule(name, new)


def quantized_parts(module: nn.Module) -> dict[str, QuantizedLinear | Int8Embedding]:
    """The quantised modules inside ``module`` by name: those whose ``<name>.weight`` is to be given to fill_ as it is read."""
    return {name: part for name, part in module.named_modules() if isinstance(part, (QuantizedLinear, Int8Embedding))}


def check_nf4_available(device: torch.device | str) -> None:
    """Raises UserError unless the installed bitsandbytes quantises to NF4 and back on ``device``, found out by doing it."""
    _bitsandbytes_functional()
    values = torch.linspace(-1, 1, NF4_BLOCK, device=device)
    try:
        back = _dequantize_nf4(*_quantize_nf4(values), torch.float32).flatten()
        error = (back - values).abs().max().item()
        what = f"gave back numbers that are off by {error:.3g}"
    except (RuntimeError, OSError, AttributeError) as failure:  # no kernel for the device, no native library, a release without the call
        error, what = math.inf, f"said: {failure}"
    if not error < 0.16:  # half the widest gap between two of the 16 values is .152
        raise UserError(
            f"--base-quantization nf4 needs a bitsandbytes that can quantise on {device}; the installed one {what}. "
            "Install a build for this device (pip install -U bitsandbytes), or use --base-quantization int8."
        )


def _bitsandbytes_functional() -> Any:
    try:
        return import_bitsandbytes()
    except ImportError as failure:
        raise UserError(
            f"--base-quantization nf4 needs the package bitsandbytes, which cannot be imported ({failure}). "
            "pip install bitsandbytes, or use --base-quantization int8."
        ) from failure


def _quantize_nf4(flat: Tensor) -> tuple[Tensor, Tensor]:
    """(n * NF4_BLOCK,) fp32 -> (n, NF4_BLOCK / 2) uint8 and (n,) fp32."""
    packed, state = _bitsandbytes_functional().quantize_4bit(flat, blocksize=NF4_BLOCK, quant_type="nf4")
    return packed.view(-1, NF4_BLOCK // 2), state.absmax


def _dequantize_nf4(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, NF4_BLOCK / 2) uint8 and (n,) fp32 -> (n, NF4_BLOCK) of ``dtype``."""
    functional = _bitsandbytes_functional()
    shape = torch.Size((len(packed), NF4_BLOCK))
    state = functional.QuantState(absmax=absmax, shape=shape, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype)
    values: Tensor = functional.dequantize_4bit(packed.reshape(-1, 1), state)  # a column, as quantize_4bit gives: (1, n) means transposed
    return values


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _int8_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """(r, C) fp32, finite -> (r, C) int8 and scales (r,) fp32, such that |values - q * scale| <= scale / 2. A row of zeros has scale 0."""
    least, most = torch.aminmax(values, dim=1)
    scales = torch.maximum(-least, most) / 127
    divisors = torch.where(scales == 0, 1.0, scales)
    return (values / divisors[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales  # (the clamp is for subnormal scales)


def _chunks(weight: Tensor, device: torch.device, row_multiple: int, name: str) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their values in fp32 on ``device``), CHUNK_BYTES at a time; the values may be a view of ``weight`` itself. Raises UserError
    where they are not finite."""
    for rows in _row_ranges(len(weight), weight.shape[1] * 4, CHUNK_BYTES, row_multiple):
        values = weight[rows].to(device).to(torch.float32)
        least, most = torch.aminmax(values)
        if not bool(torch.isfinite(torch.stack((least, most))).all()):  # NaN is the least and the most of everything
            row, column = torch.nonzero(~torch.isfinite(values))[0].tolist()
            seen = f"{name} holds {values[row, column].item()} in row {rows.start + row}, column {column}"
            raise UserError(f"a weight to be quantised must be finite; {seen}. Fetch the model again from its source.")
        yield rows, values


def _row_ranges(num_rows: int, bytes_per_row: int, most_bytes: int, multiple: int) -> list[slice]:
    """[0, num_rows) in slices of at most ``most_bytes`` (or ``multiple`` rows), as alike as can be, as each length is a kernel to compile;
    all start at multiples of ``multiple``."""
    most = max(1, most_bytes // bytes_per_row // multiple) * multiple
    num_slices = -(-num_rows // most)
    length = -(-num_rows // (num_slices * multiple)) * multiple
    return [slice(start, min(start + length, num_rows)) for start in range(0, num_rows, length)]
