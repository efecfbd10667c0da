"""A linear layer that can leave its weight gradient for later (zero bubble, arXiv:2401.10241).

Why own: splitting a backward with autograd's own means runs parts of it twice (15 % more CPU time, and nearly three times as much
with recomputation); returning the input's gradient and queueing the weight's costs nothing, and a frozen weight queues nothing.

Promises: a left-over gradient is formed by the operation an immediate one is formed by and then added to ``.grad``, in the order in which
they were left over, so that no bit depends on when that happens. Autograd's hooks know nothing of it (they are called when the backward
is through, with nothing added): ``on_final`` takes their place.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules import gemm

NARROW = 8  # times more outputs than inputs


class _LeftOver(NamedTuple):
    micro_batch: int
    is_final: bool
    linear: "Linear"
    x: Tensor  # (N, C_in)
    grad: Tensor  # (N, C_out)


class WeightGradients:
    """First in, first out: the weight gradients that the backwards of a stage have left over. ``micro_batch`` and ``is_final`` (no later
    micro-batch of this optimizer step will add to any gradient) are set by whoever runs the backwards."""

    def __init__(self, on_final: Callable[[Tensor], None]) -> None:
        """on_final: called with a parameter when its gradient of this step is complete."""
        self._on_final = on_final
        self._left_over: deque[_LeftOver] = deque()
        self.micro_batch, self.is_final = 0, False

    def leave(self, linear: "Linear", x: Tensor, grad: Tensor) -> None:
        """Called by a backward. x (..., C_in), grad (..., C_out); both are kept until their turn."""
        self._left_over.append(_LeftOver(self.micro_batch, self.is_final, linear, x.flatten(0, -2), grad.flatten(0, -2)))

    @property
    def num_bytes(self) -> int:
        """What the entries keep from being freed."""
        tensors = [tensor for left_over in self._left_over for tensor in (left_over.x, left_over.grad)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    @property
    def next_micro_batch(self) -> int | None:
        """Whose turn it is; None when nothing is left over."""
        return self._left_over[0].micro_batch if self._left_over else None

    @torch.no_grad()
    def add_next(self) -> None:
        """Form the oldest gradient that was left over and add it. The unit is one linear of one micro-batch, so a gap is filled closely."""
        _, is_final, linear, x, grad = self._left_over.popleft()
        if linear.weight.requires_grad:
            _add(linear.weight, _weight_gradient(grad, x))  # (C_out, C_in)
            if is_final:
                self._on_final(linear.weight)
        if linear.bias is not None and linear.bias.requires_grad:
            _add(linear.bias, _column_sums(grad))  # (C_out,)
            if is_final:
                self._on_final(linear.bias)


def _weight_gradient(rows: Tensor, x: Tensor) -> Tensor:
    """rows (N, C_out), x (N, C_in): rows.T @ x, (C_out, C_in). Of a narrow input (LoRA's B) as the transpose of x.T @ rows: kernels are up
    to 14 times faster with the short side first."""
    if rows.shape[1] >= NARROW * x.shape[1]:
        return gemm.linear(x.t(), rows.t()).t()
    return gemm.linear(rows.t(), x.t())


def _column_sums(rows: Tensor) -> Tensor:
    """(N, C) to (C,), added up and returned in fp32."""
    return rows.sum(0, dtype=torch.float32)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias; its backward forms the gradients of weight and bias, or leaves them over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left_over_to: WeightGradients | None, linear: "Linear") -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.left_over_to, ctx.linear = left_over_to, linear
        return gemm.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors  # (..., C_in), (C_out, C_in)
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_x = gemm.linear(grad, weight.to(grad.dtype).t()) if need_x else None  # (..., C_in)
        if ctx.left_over_to is not None:
            if need_weight or need_bias:
                ctx.left_over_to.leave(ctx.linear, x, grad)
            return grad_x, None, None, None, None
        rows = grad.flatten(0, -2)  # (N, C_out)
        grad_weight = _weight_gradient(rows, x.flatten(0, -2)) if need_weight else None  # (C_out, C_in)
        return grad_x, grad_weight, _column_sums(rows) if need_bias else None, None, None


class Linear(nn.Linear):
    """nn.Linear; while ``weight_gradients`` is set, its backward leaves the gradients of weight and bias to that queue.

    It computes in the dtype of its input: a weight that is stored in another one (fp16 on a CPU) is converted for the moment. The gradient
    of a weight is rounded to that dtype once per micro-batch, and added up in the dtype of ``.grad``.
    """

    weight_gradients: WeightGradients | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C_in). Returns (..., C_out)."""
        y: Tensor = _Linear.apply(x, self.weight, self.bias, self.weight_gradients, self)
        return y


def linears(module: nn.Module) -> list[Linear]:
    """Every Linear inside ``module``: those whose weight gradients can be left over."""
    return [part for part in module.modules() if isinstance(part, Linear)]
