"""The operations of a causal language model that deserve their own code: norms, rotary tables, packed attention, chunked loss.

What is promised: a document of a packed sequence never sees another one; the loss is a SUM over target tokens in fp32 (never a mean:
dividing is the caller's business, once, by the global count); the logits of a whole micro-batch never exist at once. Hidden states may be
fp32, bf16 or fp16, and the parameters of norm and head of another dtype: rotation, scores, softmax, norms, loss and the sums over rows that
make a parameter's gradient are formed in fp32, and rounded to the hidden states' dtype once. What is left to others: which tokens are
targets in the task's view (tasks/), scaling by the global count (training/).

Legend: B sequences of a micro-batch, T tokens, C width, H heads, D head width, V vocabulary rows, N flattened rows B*T, r rows of a
chunk of them.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules import gemm
from modules.dropout import Draw, SeededDropout, torch_seeded

IGNORED_TARGET = -100
HEAD_CHUNK_ROWS = 256
_SHORT = (torch.bfloat16, torch.float16)


class Past(Protocol):
    """What a layer has computed for the columns before these ones (modules/kv_cache.py)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, H, T, D) of the new columns. Returns what q finds in the past and in k and v: (B, H, T, D)."""


class Segments(NamedTuple):
    """Where the documents of a micro-batch lie, and where in its document every token stands.

    bounds: for each sequence b its documents as (start, end) token indices, covering [0, T) without gaps.
    positions: (B, T) int64, counted from 0 at every document start.
    draw: which micro-batch of which step this is, for dropout; None: nothing is dropped.
    past: where sequences grow token by token, what their earlier tokens left in the layer that is called; bounds are () then.
    """

    bounds: tuple[tuple[tuple[int, int], ...], ...]
    positions: Tensor
    draw: Draw | None = None
    past: Past | None = None

    @classmethod
    def from_positions(cls, positions: Tensor, draw: Draw | None = None) -> "Segments":
        """Derive the document bounds from ``positions`` (B, T): a document starts wherever the position is 0."""
        num_tokens = positions.shape[1]
        bounds = []
        for row in positions.cpu():
            starts = torch.nonzero(row == 0).flatten().tolist()
            assert starts and starts[0] == 0, "a packed sequence starts with position 0"
            bounds.append(tuple(zip(starts, [*starts[1:], num_tokens], strict=True)))
        return cls(tuple(bounds), positions.long(), draw)

    def to(self, device: torch.device) -> "Segments":
        """The same with the positions on ``device``."""
        return self._replace(positions=self.positions.to(device))


def next_token_targets(token_ids: Tensor, positions: Tensor) -> Tensor:
    """(B, T) ids and positions -> (B, T) int64 targets: the following token, or IGNORED_TARGET where a document ends.

    A document's first token (position 0) is never a target, nor is there one behind the last token of the sequence.
    """
    targets = torch.full_like(token_ids, IGNORED_TARGET, dtype=torch.int64)
    targets[:, :-1] = torch.where(positions[:, 1:] == 0, IGNORED_TARGET, token_ids[:, 1:].long())
    return targets


class _MixedLayerNorm(torch.autograd.Function):
    """A LayerNorm in fp32 between tensors of shorter dtypes. It keeps x as it came, and returns fp32 gradients of weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])  # what is not comes back as None
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad.float(), x.float(), weight.shape, mean, rstd, weight.float(), bias.float(), needed
        )
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, grad_bias, None


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, with weight and bias, which may be of another dtype than x: of a shorter one (fp16 on a CPU)
    or of fp32 where x is not (norms that are trained beside a frozen rest).

    torch's own adds up the gradients of weight and bias in the dtype of x on a CPU: in bf16 they are 7 % wrong after 4096 rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C). Returns the same shape and dtype. The gradients of weight and bias are fp32 where the dtypes differ and, on a CPU,
        where they are short; autograd rounds them to ``parameter.grad_dtype``."""
        is_short = x.dtype in _SHORT and x.device.type == "cpu"
        if x.dtype == self.weight.dtype and not is_short:
            return super().forward(x)
        y: Tensor = _MixedLayerNorm.apply(x, self.weight, self.bias, self.eps)
        return y


def rotary_table(num_positions: int, rotary_dim: int, base: float = 10000.0, device: torch.device | str = "cpu") -> Tensor:
    """exp(j * position * base**(-2i/rotary_dim)), (num_positions, rotary_dim/2) complex64 (RoFormer, arXiv:2104.09864, section 3.4.2).

    Always computed in fp32 here and never read from a file: half-precision tables in old checkpoints are off by up to 0.1 rad.
    """
    inverse_frequency = 1.0 / (base ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64, device=device).float() / rotary_dim))
    angles = torch.outer(torch.arange(num_positions, dtype=torch.int64, device=device).float(), inverse_frequency)
    return torch.complex(angles.cos(), angles.sin())


def rotate_interleaved(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the first 2 * rotary.shape[-1] channels of x (B, T, H, D); the rest passes through (GPT-J's convention).

    rotary: (B, T, 1, rotary_dim/2) complex64. One complex product reads and writes x once (a tenth of the time of real products of even
    and odd channels on a CPU), and so does its backward.
    """
    rotary_dim = 2 * rotary.shape[-1]
    turned = _at_least_fp32(x[..., :rotary_dim])  # (B, T, H, rotary_dim)
    if x.shape[-1] % 2:
        turned = turned.contiguous()  # a complex number starts at an even place
    pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2)))  # (B, T, H, rotary_dim/2)
    rotated = torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)  # (B, T, H, rotary_dim)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)  # (B, T, H, D)


def rotate_halves(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate channel i with channel i + rotary_dim/2 of the first rotary_dim channels of x (B, T, H, D); the rest passes (GPT-NeoX).

    rotary: (B, T, 1, rotary_dim/2) complex64.
    """
    half = rotary.shape[-1]
    cos, sin = rotary.real, rotary.imag  # (B, T, 1, rotary_dim/2)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second = _at_least_fp32(first), _at_least_fp32(second)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(x.dtype)  # (B, T, H, D)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _SHORT else x


def packed_causal_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, dropout: SeededDropout | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each document; q, k, v and the result are (B, H, T, D). ``dropout`` acts on the probabilities.

    One call per document: on a CPU that is four times faster than a dense block mask, and what stands beside a document in its sequence
    cannot reach it even by rounding.
    """
    if segments.past is not None:
        return segments.past.attend(q, k, v)  # (B, H, T, D)
    num_tokens = q.shape[2]
    if all(len(documents) == 1 for documents in segments.bounds):
        return _causal_attention(q, k, v, segments.draw, dropout)  # (B, H, T, D)
    rows = []
    for b, documents in enumerate(segments.bounds):
        assert documents[-1][1] == num_tokens, "document bounds must cover the sequence"
        pieces = [
            _causal_attention(q[b : b + 1, :, s:e], k[b : b + 1, :, s:e], v[b : b + 1, :, s:e], segments.draw, dropout, b, s)
            for s, e in documents
        ]
        rows.append(torch.cat(pieces, dim=2))  # (1, H, T, D)
    return torch.cat(rows, dim=0)  # (B, H, T, D)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, draw: Draw | None, dropout: SeededDropout | None, *where: int) -> Tensor:
    """Of one document, or of sequences that are one each. ``where`` in the micro-batch it lies."""
    dtype = q.dtype
    if dtype in _SHORT and q.device.type == "cpu":
        # torch's CPU kernel rounds the probabilities, and adds up the gradients of k and v, in the dtype it is given
        q, k, v = q.float(), k.float(), v.float()
    if draw is None or dropout is None or not dropout.is_active(draw):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).to(dtype)
    with torch_seeded(q.device, dropout.seed(draw, *where)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout.p).to(dtype)


class FrozenHead(Protocol):
    """A head whose weight is no plain tensor (modules/quantized.py) and gets no gradient."""

    def product(self, x: Tensor) -> Tensor:
        """x (r, C) to logits (r, V) in fp32, in memory that the caller may overwrite."""

    def product_transposed(self, grad: Tensor) -> Tensor:
        """The gradient of logits (r, V) to that of x (r, C), in the same dtype."""


class _DenseHead:
    """The same of a weight (V, C) and a bias (V,) or None, in the dtype of the hidden states."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def product(self, x: Tensor) -> Tensor:
        return gemm.linear(x, self._weight, self._bias).float()

    def product_transposed(self, grad: Tensor) -> Tensor:
        return gemm.linear(grad, self._weight.t())


def _head_of(dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None, quantized_head: FrozenHead | None) -> FrozenHead:
    """What multiplies hidden states of ``dtype``: a weight with or without bias, or a quantized_head."""
    if quantized_head is not None:
        return quantized_head
    assert weight is not None, "a head is a weight or a quantized_head"
    return _DenseHead(weight.to(dtype), None if bias is None else bias.to(dtype))


def _losses_and_softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-log p (r, 1) fp32 of targets (r,) under logits (r, V) fp32, which are overwritten; it has no meaning where there is no target. And
    what else softmax consists of: exponentials (r, V), over the logits, and their sums (r, 1)."""
    of_target = logits.gather(1, targets.where(targets != IGNORED_TARGET, 0)[:, None])  # (r, 1)
    largest = logits.amax(1, keepdim=True)  # (r, 1)
    exponentials = logits.sub_(largest).exp_()  # (r, V), over the logits
    normaliser = exponentials.sum(1, keepdim=True)  # (r, 1)
    return largest + normaliser.log() - of_target, exponentials, normaliser


def _loss_of_rows(logits: Tensor, targets: Tensor, scale: float, grad_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Summed loss (float64) of logits (r, V) fp32, which are overwritten; and scale times its gradient in ``grad_dtype``, if not None."""
    is_target = targets != IGNORED_TARGET  # (r,)
    columns = targets.where(is_target, 0)[:, None]  # (r, 1)
    factors = (is_target * scale)[:, None]  # (r, 1) fp32
    losses, exponentials, normaliser = _losses_and_softmax(logits, targets)  # (r, 1), (r, V), (r, 1)
    loss = losses.double().where(is_target[:, None], 0.0).sum()
    if grad_dtype is None:
        return loss, None
    # d(scale * sum of losses)/d(logits) = scale * (softmax - one_hot), written over them too, and rounded once
    grad_logits = exponentials.mul_(factors / normaliser)
    return loss, grad_logits.scatter_add_(1, columns, -factors).to(grad_dtype)  # (r, V)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and its gradients in one pass over row chunks, so that at most (HEAD_CHUNK_ROWS, V) logits exist at a time.

    The gradients are formed while the logits are at hand: recomputing them in backward would cost the head's GEMM once more. They are
    those of a unit incoming gradient; another one is multiplied in at the end.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        quantized_head: FrozenHead | None,
    ) -> Tensor:
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        head = _head_of(hidden.dtype, weight, bias, quantized_head)
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias, dtype=sum_dtype) if need_bias and bias is not None else None
        grad_dtype = hidden.dtype if need_hidden or need_weight or need_bias else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(targets), HEAD_CHUNK_ROWS):
            rows = slice(start, start + HEAD_CHUNK_ROWS)
            x = hidden[rows]  # (r, C)
            losses, grad_logits = _loss_of_rows(head.product(x), targets[rows], scale, grad_dtype)
            loss += losses
            if grad_logits is None:
                continue
            if grad_hidden is not None:
                grad_hidden[rows] = head.product_transposed(grad_logits)
            if need_weight:
                part = gemm.linear(grad_logits.t(), x.t())  # (V, C)
                grad_weight = part.to(sum_dtype) if grad_weight is None else grad_weight.add_(part)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=sum_dtype)
            del grad_logits  # or it would lie beside the next chunk's logits
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        (grad_output,) = grad_outputs
        grads, ctx.grads = ctx.grads, None
        is_unit = grad_output.device.type == "cpu" and grad_output.item() == 1.0  # elsewhere .item() would wait for the device
        if not is_unit:
            grads = tuple(None if g is None else g.mul_(grad_output) for g in grads)  # in place: a weight's is as large as the weight
        return (*grads, None, None, None)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    scale: float = 1.0,
    quantized_head: FrozenHead | None = None,
) -> Tensor:
    """scale * SUM over target rows of -log softmax(hidden @ weight.T + bias)[target], a float64 scalar.

    hidden (N, C) fp32, bf16 or fp16; weight (V, C) and bias (V,) or None, computed with in the dtype of hidden whatever their own;
    quantized_head: in place of both, which are None. targets (N,) int64 with IGNORED_TARGET where there is none: such rows (one per
    document) cost as much as others, as leaving them out would give every micro-batch another shape, and a GPU a reason to wait.

    Differentiable in hidden, weight and bias; a frozen weight gets no gradient computed. The gradients of weight and bias are added up over
    chunks and returned in fp32 (autograd rounds them to ``parameter.grad_dtype``). ``scale`` (1 / global target count, times a loss scale)
    enters before the gradients are rounded. Memory beyond inputs and gradients does not depend on N: a few HEAD_CHUNK_ROWS * V fp32; for
    a trained weight its gradient from one chunk; for a weight of another dtype the weight in that of hidden.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, scale, quantized_head)
    return loss


@torch.no_grad()
def losses_of_tokens(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, targets: Tensor, quantized_head: FrozenHead | None = None
) -> Tensor:
    """-log softmax(hidden @ weight.T + bias)[target] of every row, (N,) float64, 0 where there is no target.

    As chunked_cross_entropy, also in memory, but not differentiable and not added up.
    """
    head = _head_of(hidden.dtype, weight, bias, quantized_head)
    losses = torch.zeros(len(targets), dtype=torch.float64, device=hidden.device)
    for start in range(0, len(targets), HEAD_CHUNK_ROWS):
        rows = slice(start, start + HEAD_CHUNK_ROWS)
        of_rows, *_ = _losses_and_softmax(head.product(hidden[rows]), targets[rows])  # (r, 1)
        losses[rows] = of_rows[:, 0].double().where(targets[rows] != IGNORED_TARGET, 0.0)
    return losses


@torch.no_grad()
def best_of_each_row(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, quantized_head: FrozenHead | None = None
) -> tuple[Tensor, Tensor]:
    """The column of the largest logit of every row, the first of equal ones, (N,) int64; and by how much it exceeds the second, (N,) fp32.

    hidden (N, C); of as many rows at a time as in chunked_cross_entropy.
    """
    head = _head_of(hidden.dtype, weight, bias, quantized_head)
    best, margins = [], []
    for x in hidden.split(HEAD_CHUNK_ROWS):
        logits = head.product(x)  # (r, V) fp32
        largest, columns = logits.max(1, keepdim=True)  # (r, 1) each
        second = logits.scatter_(1, columns, -torch.inf).amax(1, keepdim=True)  # (r, 1)
        best.append(columns[:, 0])
        margins.append((largest - second)[:, 0])
    return torch.cat(best), torch.cat(margins)
