"""The matrix product behind every linear of the model, on the fastest fp32 kernel that this torch has.

Why not F.linear on a CPU: it calls MKL, which gives AMD processors its AVX2 kernels. oneDNN, which torch's x86 builds carry too, takes
AVX-512 wherever the processor has it (twice the speed on Zen 5), and its bits do not depend on where a tensor lies (they do on
shapes, on layouts and, for some shapes, on the number of threads). For fp32, torch reaches it only through an operator made for its
own compiler; where a build lacks that, and on every other device, F.linear computes the same product.

oneDNN compiles a kernel for every new shape: some ms, and a block on the heap that may keep a freed one beside it from being used again.
Callers therefore keep to few shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) @ weight (N, K).T + bias (N,): (..., N), contiguous. A transposed ``weight`` costs nothing, a transposed ``x`` a copy.

    Not differentiable: for use inside autograd functions, where the gradients are linear(dy, weight.t()) and linear(dy.t(), x.t()).
    """
    if _HAS_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)
