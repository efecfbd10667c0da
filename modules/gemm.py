"""The matrix product behind every linear of the model, on the fastest kernel that this torch and this processor have.

Why not F.linear on a CPU in fp32: it calls MKL, which gives AMD processors its AVX2 kernels. oneDNN, which torch's x86 builds carry too,
takes AVX-512 wherever the processor has it (twice the speed on Zen 5), and its bits do not depend on where a tensor lies (they do on
shapes, on layouts and, for some shapes, on the number of threads). For fp32, torch reaches it only through an operator made for its
own compiler; where a build lacks that, and on every other device, F.linear computes the same product.

Why not F.linear on a CPU in bf16: oneDNN has kernels for bf16 from AVX-512 on. On a processor with AVX2 alone (Zen 3, and laptops) torch
falls back to loops of its own, which take 6 times as long as fp32 for x W, and 260 times for x W^T, a product of every backward. There
both sides are widened to fp32, block by block, which changes none of their values, and the sums are rounded once.

oneDNN compiles a kernel for every new shape: some ms, and a block on the heap that may keep a freed one beside it from being used again.
Callers therefore keep to few shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WIDENED_BYTES = 16 << 20  # of a block of the weight in fp32, with the results that it makes
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_HAS_BF16 = not hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) @ weight (N, K).T + bias (N,): (..., N), contiguous. A transposed ``weight`` costs nothing, a transposed ``x`` a copy.

    Not differentiable: for use inside autograd functions, where the gradients are linear(dy, weight.t()) and linear(dy.t(), x.t()).
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if x.dtype == torch.float32:
        return _in_fp32(x, weight, bias)
    if x.dtype == torch.bfloat16 and not _HAS_BF16:
        return _widened(x, weight, bias)
    return F.linear(x, weight, bias)


def _in_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _HAS_ONEDNN:
        return F.linear(x, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same with all sums in fp32, in the dtype of ``x``."""
    y = x.new_empty((*x.shape[:-1], len(weight)))  # (..., N)
    wide = x.float()  # (..., K)
    rows = max(1, WIDENED_BYTES // (4 * (weight.shape[1] + x.shape[:-1].numel())))
    for first in range(0, len(weight), rows):
        block = slice(first, first + rows)
        y[..., block] = _in_fp32(wide, weight[block].float(), None if bias is None else bias[block].float())
    return y
