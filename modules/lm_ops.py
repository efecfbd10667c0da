"""The three operations of a causal language model that deserve their own code: rotary tables, packed attention, chunked loss.

Everything here is a function of tensors. What is promised: a document of a packed sequence never sees another one; the loss is a SUM over
target tokens in fp32 (never a mean: dividing is the caller's business, once, by the global count); the logits of a whole micro-batch never
exist at once. What is left to others: which tokens are targets in the task's view (tasks/), scaling by the global count (training/).

Legend: B sequences of a micro-batch, T tokens, C width, H heads, D head width, V vocabulary rows, N flattened rows B*T, r rows of a
chunk of them.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modules import gemm

IGNORED_TARGET = -100
HEAD_CHUNK_ROWS = 256


class Segments(NamedTuple):
    """Where the documents of a micro-batch lie, and where in its document every token stands.

    bounds: for each sequence b its documents as (start, end) token indices, covering [0, T) without gaps.
    positions: (B, T) int64, counted from 0 at every document start.
    """

    bounds: tuple[tuple[tuple[int, int], ...], ...]
    positions: Tensor

    @classmethod
    def from_positions(cls, positions: Tensor) -> "Segments":
        """Derive the document bounds from ``positions`` (B, T): a document starts wherever the position is 0."""
        num_tokens = positions.shape[1]
        bounds = []
        for row in positions.cpu():
            starts = torch.nonzero(row == 0).flatten().tolist()
            assert starts and starts[0] == 0, "a packed sequence starts with position 0"
            bounds.append(tuple(zip(starts, [*starts[1:], num_tokens], strict=True)))
        return cls(tuple(bounds), positions.long())

    def to(self, device: torch.device) -> "Segments":
        """The same with the positions on ``device``."""
        return Segments(self.bounds, self.positions.to(device))


def next_token_targets(token_ids: Tensor, positions: Tensor) -> Tensor:
    """(B, T) ids and positions -> (B, T) int64 targets: the following token, or IGNORED_TARGET where a document ends.

    A document's first token (position 0) is never a target, nor is there one behind the last token of the sequence.
    """
    targets = torch.full_like(token_ids, IGNORED_TARGET, dtype=torch.int64)
    targets[:, :-1] = torch.where(positions[:, 1:] == 0, IGNORED_TARGET, token_ids[:, 1:].long())
    return targets


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
    turned = x[..., :rotary_dim]  # (B, T, H, rotary_dim)
    if x.shape[-1] % 2:
        turned = turned.contiguous()  # a complex number starts at an even place
    pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2)))  # (B, T, H, rotary_dim/2)
    rotated = torch.view_as_real(pairs * rotary).flatten(-2)  # (B, T, H, rotary_dim)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)  # (B, T, H, D)


def rotate_halves(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate channel i with channel i + rotary_dim/2 of the first rotary_dim channels of x (B, T, H, D); the rest passes (GPT-NeoX).

    rotary: (B, T, 1, rotary_dim/2) complex64.
    """
    half = rotary.shape[-1]
    cos, sin = rotary.real, rotary.imag  # (B, T, 1, rotary_dim/2)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)  # (B, T, H, D)


def packed_causal_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each document; q, k, v and the result are (B, H, T, D).

    One call per document: on a CPU that is four times faster than a dense block mask, and what stands beside a document in its sequence
    cannot reach it even by rounding.
    """
    num_tokens = q.shape[2]
    if all(len(documents) == 1 for documents in segments.bounds):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
    rows = []
    for b, documents in enumerate(segments.bounds):
        assert documents[-1][1] == num_tokens, "document bounds must cover the sequence"
        pieces = [
            F.scaled_dot_product_attention(q[b : b + 1, :, s:e], k[b : b + 1, :, s:e], v[b : b + 1, :, s:e], is_causal=True)
            for s, e in documents
        ]
        rows.append(torch.cat(pieces, dim=2))  # (1, H, T, D)
    return torch.cat(rows, dim=0)  # (B, H, T, D)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and its gradients in one pass over row chunks, so that at most (HEAD_CHUNK_ROWS, V) logits exist at a time.

    The gradients are formed while the logits are at hand: recomputing them in backward would cost the head's GEMM once more. They are
    those of a unit incoming gradient; another one is multiplied in at the end.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float) -> Tensor:
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias) if need_bias and bias is not None else None
        is_target = targets != IGNORED_TARGET  # (N,)
        columns = targets.where(is_target, 0)[:, None]  # (N, 1)
        factors = (is_target * scale)[:, None]  # (N, 1) fp32
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(targets), HEAD_CHUNK_ROWS):
            rows = slice(start, start + HEAD_CHUNK_ROWS)
            x = hidden[rows]  # (r, C)
            logits = gemm.linear(x, weight, bias).float()  # (r, V)
            of_target = logits.gather(1, columns[rows])  # (r, 1)
            largest = logits.amax(1, keepdim=True)  # (r, 1)
            exponentials = logits.sub_(largest).exp_()  # (r, V), over the logits
            normaliser = exponentials.sum(1, keepdim=True)  # (r, 1)
            losses = largest + normaliser.log() - of_target  # (r, 1)
            loss += losses.double().where(is_target[rows, None], 0.0).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            # d(scale * sum of losses)/d(logits) = scale * (softmax - one_hot), written over them too
            grad_logits = exponentials.mul_(factors[rows] / normaliser)
            grad_logits = grad_logits.scatter_add_(1, columns[rows], -factors[rows]).to(weight.dtype)  # (r, V)
            if grad_hidden is not None:
                grad_hidden[rows] = gemm.linear(grad_logits, weight.t())
            if need_weight:
                part = gemm.linear(grad_logits.t(), x.t())  # (V, C)
                grad_weight = part if grad_weight is None else grad_weight.add_(part)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad_output,) = grad_outputs
        grads, ctx.grads = ctx.grads, None
        is_unit = grad_output.device.type == "cpu" and grad_output.item() == 1.0  # elsewhere .item() would wait for the device
        if not is_unit:
            grads = tuple(None if g is None else g * grad_output.to(g.dtype) for g in grads)
        return (*grads, None, None)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float = 1.0) -> Tensor:
    """scale * SUM over target rows of -log softmax(hidden @ weight.T + bias)[target], a float64 scalar.

    hidden (N, C), weight (V, C), bias (V,) or None, targets (N,) int64 with IGNORED_TARGET where there is none. Ignored rows (one
    per document) cost as much as others: to leave them out would give every micro-batch another shape, and a GPU a reason to wait.
    Differentiable in hidden, weight and bias; a frozen weight gets no gradient computed. ``scale`` (1 / global target count, times a loss
    scale) enters before the gradients are rounded. Memory beyond inputs and gradients: HEAD_CHUNK_ROWS * V fp32.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, scale)
    return loss
