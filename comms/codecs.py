"""How a tensor looks on the wire between two stages: as computed, or compressed, as one flat uint8 message per micro-batch.

Between sites the wire is the slowest part of the pipeline: half or a quarter of the bytes is nearly half or a quarter of the transfer.
What is sent is activations forwards and their gradients backwards, both (B, T, C). Legend: B micro-batch, T tokens, C width,
G values that share a scale, N = B*T*C/G groups.

    none         the bytes of the tensor as they are                                                        bit-exact
    bf16, fp16   the tensor, rounded to that type                                                           2 bytes a value
    int8         values int8 (N, G) | zeros up to a multiple of 64 | scales fp32 (N,)    G = C              1 + 4/C bytes a value
    int4         values int8 (N, 32) | zeros up to a multiple of 64 | scales bf16 (N,)   G = 64             17/32 bytes a value

int8 and int4 are symmetric: scale = largest magnitude of the group / L, with L = 127 or 7; value = round(x / scale), ties to even;
x is read back as value * scale. A scale is rounded to its type on the wire before it is used, so both ends use the same one; that of
int4 is bf16, since fp16 would underflow for gradients. No scale is below 2^-126 (the smallest normal number of fp32 and bf16), so that
1/scale is finite: a group of zeros has that scale, and is read back as zeros. No clamp is needed: a bf16 scale can be 2^-8 too small,
and 7 * (1 + 2^-8) still rounds to 7. int4 has two values in a byte: byte j of a group is 16 * (value j + 32) + (value j), -119 to 119.

Promises
- A value that is inf or nan is never hidden, so a step that overflowed is still noticed by the vote: with bf16 and fp16 that value is
  read back as inf or nan, with int8 and int4 every value of its group is.
- The same tensor gives the same bytes, whatever the message held before. (Values of a group that holds inf or nan have no meaning,
  and may differ between machine types.)
- What decode returns has storage of its own, 64-byte aligned (torch's allocator), as bit-equality needs.

Limits: with fp16, values beyond 65504 become inf (and are noticed), and values below 3e-8 become zero (and are not), so gradients need
a loss scale. Rounding up can turn values within 0.4 % of the largest finite one of a type into inf (and they are noticed).

Left to others: what is sent, when, and whether the error is worth it (``relative_error_sums`` measures it).
"""

from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

import torch
from torch import Tensor

from user_error import UserError

WireDtype = Literal["none", "bf16", "fp16", "int8", "int4"]

INT4_GROUP = 64
ALIGNMENT_BYTES = 64
SMALLEST_SCALE = 2.0**-126
COMPUTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")
# Values worked on at a time. CPU: 512 KB of fp32 stay in the L2 cache from the first pass to the last, twice as fast as whole tensors;
# a GPU wants few launches.
BLOCK = {"cpu": 2**17, "cuda": 2**22}


class Codec(Protocol):
    """Turns a tensor of one shape and dtype into a message and back. Not to be used by two threads at once: scratch memory is shared."""

    num_bytes: int  # of every message, exactly
    is_lossless: bool  # the message is the tensor's own bytes

    def encode(self, x: Tensor, message: Tensor) -> None:
        """Write x (shape, dtype) into all of ``message`` (num_bytes,) uint8, which is on the same device."""

    def decode(self, message: Tensor) -> Tensor:
        """The tensor (shape, dtype) that ``message`` (num_bytes,) uint8 stands for, in storage of its own."""


def check_width(wire_dtype: WireDtype, width: int) -> None:
    """Raise UserError if tensors of this width (C) cannot be sent as ``wire_dtype``. Needs nothing loaded."""
    if wire_dtype == "int4" and width % INT4_GROUP:
        raise UserError(
            f"int4 (--wire-dtype, --wire-dtype-grad) gives {INT4_GROUP} neighbouring values one scale, so the model's width must be a "
            f"multiple of {INT4_GROUP}, but it is {width}: use int8 in place of int4 with this model"
        )


def make_codec(wire_dtype: WireDtype, *, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> Codec:
    """The codec for tensors of this shape (..., C) and dtype on ``device``. Both neighbours make it from the same values.

    On a CUDA device int8 and int4 use cupy kernels where those are there, right and faster. Raises UserError as check_width does.
    """
    assert dtype in COMPUTED_DTYPES, f"activations are computed in one of {COMPUTED_DTYPES}, not in {dtype}"
    assert prod(shape) > 0, f"a message carries at least one value, shape is {shape}"
    check_width(wire_dtype, shape[-1])
    if wire_dtype == "none":
        return CastCodec(dtype, shape=shape, dtype=dtype)
    if wire_dtype == "bf16" or wire_dtype == "fp16":
        return CastCodec(torch.bfloat16 if wire_dtype == "bf16" else torch.float16, shape=shape, dtype=dtype)
    codec = GroupCodec(group_layout(wire_dtype, shape), shape=shape, dtype=dtype, device=device)
    if device.type == "cuda":
        from comms.cuda_codecs import with_faster_kernels  # only here, so that a CPU run never sees it

        return with_faster_kernels(codec)
    return codec


class CastCodec:
    """The tensor in another float type; ``none`` is the tensor in its own."""

    def __init__(self, on_wire: torch.dtype, *, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.num_bytes = prod(shape) * on_wire.itemsize
        self.is_lossless = on_wire == dtype
        self._on_wire, self._shape, self._dtype = on_wire, shape, dtype

    def encode(self, x: Tensor, message: Tensor) -> None:
        check_tensor(x, shape=self._shape, dtype=self._dtype)
        check_message(message, self.num_bytes)
        message.view(self._on_wire).view(self._shape).copy_(x.detach())

    def decode(self, message: Tensor) -> Tensor:
        check_message(message, self.num_bytes)
        return message.view(self._on_wire).view(self._shape).to(self._dtype, copy=True)


@dataclass(frozen=True, kw_only=True)
class GroupLayout:
    """Where int8 and int4 messages have their parts: values at byte 0, scales at ``scales_at``."""

    wire_dtype: Literal["int8", "int4"]
    num_groups: int  # N
    group_size: int  # G
    group_bytes: int  # of the values of one group
    largest: int  # L
    scale_dtype: torch.dtype

    @property
    def scales_at(self) -> int:
        """The byte at which the scales begin."""
        return -(-self.num_groups * self.group_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    @property
    def num_bytes(self) -> int:
        """Of the whole message."""
        return self.scales_at + self.num_groups * self.scale_dtype.itemsize

    def parts(self, message: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of a message: values (N, group_bytes) int8, the zeros after them, scales (N, 1) in their dtype."""
        values_end = self.num_groups * self.group_bytes
        values = message[:values_end].view(torch.int8).view(self.num_groups, self.group_bytes)
        scales = message[self.scales_at :].view(self.scale_dtype).view(self.num_groups, 1)
        return values, message[values_end : self.scales_at], scales


def group_layout(wire_dtype: Literal["int8", "int4"], shape: tuple[int, ...]) -> GroupLayout:
    """The layout of tensors of shape (..., C). Pure."""
    if wire_dtype == "int8":
        width = shape[-1]
        return GroupLayout(
            wire_dtype="int8",
            num_groups=prod(shape) // width,
            group_size=width,
            group_bytes=width,
            largest=127,
            scale_dtype=torch.float32,
        )
    return GroupLayout(
        wire_dtype="int4",
        num_groups=prod(shape) // INT4_GROUP,
        group_size=INT4_GROUP,
        group_bytes=INT4_GROUP // 2,
        largest=7,
        scale_dtype=torch.bfloat16,
    )


class GroupCodec:
    """int8 and int4 in torch operations: on any device, and what the cupy kernels are compared with."""

    def __init__(self, layout: GroupLayout, *, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.layout, self.shape, self.dtype, self.device = layout, shape, dtype, device
        self.num_bytes, self.is_lossless = layout.num_bytes, False
        num_groups = min(layout.num_groups, max(1, BLOCK[device.type] // layout.group_size))
        self._scratch = torch.empty(num_groups, layout.group_size, dtype=torch.float32, device=device)

    def encode(self, x: Tensor, message: Tensor) -> None:
        check_tensor(x, shape=self.shape, dtype=self.dtype)
        check_message(message, self.num_bytes)
        x = x.detach().reshape(self.layout.num_groups, self.layout.group_size)  # (N, G)
        values, zeros, scales = self.layout.parts(message)
        zeros.zero_()
        for block in self._blocks():
            self._encode_block(x[block], values[block], scales[block])

    def decode(self, message: Tensor) -> Tensor:
        check_message(message, self.num_bytes)
        values, _, scales = self.layout.parts(message)
        x = torch.empty(self.shape, dtype=self.dtype, device=message.device)
        groups = x.view(self.layout.num_groups, self.layout.group_size)  # (N, G)
        for block in self._blocks():
            self._decode_block(values[block], scales[block], groups[block])
        return x

    def _blocks(self) -> list[slice]:
        step = len(self._scratch)
        return [slice(first, first + step) for first in range(0, self.layout.num_groups, step)]

    def _encode_block(self, x: Tensor, values: Tensor, scales: Tensor) -> None:
        levels = self._scratch[: len(x)]  # (n, G) fp32
        if self.dtype != torch.float32:
            x = levels.copy_(x)
        # amax and amin let nan through, and take 1 ms where vector_norm(ord=inf) and aminmax, which are not vectorised, take 10
        magnitude = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())  # (n, 1) fp32
        # A product, since CUDA computes a division by a number as this product: the same bits everywhere.
        scales.copy_(magnitude.mul_(1 / self.layout.largest).clamp_(min=SMALLEST_SCALE))
        torch.mul(x, scales.float().reciprocal(), out=levels).round_()
        if self.layout.wire_dtype == "int4":
            low, high = levels.chunk(2, dim=-1)  # (n, 32) fp32 each
            levels = low.add_(high, alpha=16)
        values.copy_(levels)  # nan, if its group holds one, becomes any byte: the scale tells

    def _decode_block(self, values: Tensor, scales: Tensor, x: Tensor) -> None:
        levels = x if self.dtype == torch.float32 else self._scratch[: len(x)]  # (n, G) fp32
        if self.layout.wire_dtype == "int4":
            low, high = levels.chunk(2, dim=-1)  # (n, 32) fp32 each
            low.copy_(values)
            torch.mul(low, 1 / 16, out=high).round_()  # the low value is from -7 to 7, less than half of 16
            low.sub_(high, alpha=16)
        else:
            levels.copy_(values)
        levels.mul_(scales)  # 0 * inf is nan: no value of a group with an infinite scale is finite
        if levels is not x:
            x.copy_(levels)


def check_tensor(x: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Assert that x is what its codec was made for."""
    assert x.shape == shape and x.dtype == dtype, f"the codec was made for {shape} {dtype}, not for {tuple(x.shape)} {x.dtype}"


def check_message(message: Tensor, num_bytes: int) -> None:
    """Assert that a message has the size its codec gives it, and begins where its scales can be read in place."""
    assert message.shape == (num_bytes,) and message.dtype == torch.uint8, f"not ({num_bytes},) uint8: {message.shape} {message.dtype}"
    assert message.is_contiguous() and message.data_ptr() % 4 == 0, "a message lies in one piece, from a multiple of 4 bytes on"


def relative_error_sums(x: Tensor, decoded: Tensor) -> tuple[float, float]:
    """Sums of squares, in float64, of (x - decoded) and of x: a and b. Both add up over messages and ranks; relative error = sqrt(a / b).

    inf or nan in x makes them inf or nan: leave out the steps that were skipped. On CUDA this waits for the device.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=x.device)
    block = BLOCK[x.device.type]
    for part, read_back in zip(x.detach().reshape(-1).split(block), decoded.detach().reshape(-1).split(block), strict=True):
        exact = part.double()
        sums += torch.stack(((exact - read_back).square_().sum(), exact.square().sum()))
    error, square = sums.tolist()
    return error, square
