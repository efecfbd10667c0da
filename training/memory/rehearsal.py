"""One micro-batch through a stage without numbers: which bytes are alive when, found out by running the code that trains.

A formula for activations would have to be told of every change to a layer. Here the layer itself runs, on tensors that have shapes, dtypes
and no storage: fake CPU tensors for a CPU, tensors of the meta device for a GPU, which need none. Every operation's results are counted
from when they are made until nobody holds them, autograd included, so what is kept for the backward, what recomputation frees and what the
head and dequantised blocks take for a moment are all found by the same count.

What the count does not see: scratch memory inside one operation (packing inside a matrix product, a fused kernel's workspace) and what the
allocator rounds up. On a GPU attention is taken to be a fused kernel, which keeps q, k, v, its output and a number per row; torch's kernel
for a CPU keeps the same, but in fp32 whatever the layer computes in, and with --dropout every probability. Sequences are taken to hold two
documents, as packed ones hold at least: their outputs are joined, which is one hidden state more than a single document costs.

Legend: B sequences of a micro-batch, T tokens, C width, H heads, D head width, n layers of a stage.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from comms.spans import Spans
from data_parallel.allreduce import GradientBuckets
from modules.dropout import AmbientDropout, Draw, SeededDropout
from modules.linear import WeightGradients, linears
from modules.lm_ops import Segments, next_token_targets
from modules.model_config import ModelConfig
from modules.stage import Stage
from training.compute.build import assemble_stage
from training.config.precision import precision_of
from training.config.train import Config

META = torch.device("meta")
FEWEST_LAYERS, MORE_LAYERS = 2, 3  # rehearsed with; what more of them take goes on in a straight line


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Bytes of one micro-batch on one stage, all above what the stage holds before it comes.

    kept: from its forward to its backward; forward, loss, backward: the most while that runs (loss and backward include ``kept``);
    left_by_loss: what the loss holds for the backward, kept excluded; left_over: what waits for its weight gradients behind the
    backward (zb).
    """

    kept: int
    forward: int
    loss: int
    left_by_loss: int
    backward: int
    left_over: int


def rehearse(config: Config, model_config: ModelConfig, layers: tuple[int, int], device: torch.device) -> Rehearsal:
    """What a micro-batch of ``config`` takes on a stage of ``layers`` [first, last) that computes on ``device`` (its type counts; a GPU
    need not be there). A stage of many layers costs no longer than one of three. Raises UserError as assemble_stage does."""
    num_layers = layers[1] - layers[0]
    before, behind = int(layers[0] > 0), int(layers[1] < model_config.num_layers)

    def of(n: int) -> Rehearsal:
        return _rehearse(config, replace(model_config, num_layers=before + n + behind), (before, before + n), device)

    if num_layers <= MORE_LAYERS:
        return of(num_layers)
    few, more = of(FEWEST_LAYERS), of(MORE_LAYERS)
    steps = (num_layers - FEWEST_LAYERS) // (MORE_LAYERS - FEWEST_LAYERS)

    def of_all(name: str) -> int:
        return int(getattr(few, name) + steps * (getattr(more, name) - getattr(few, name)))

    return Rehearsal(**{field.name: of_all(field.name) for field in fields(Rehearsal)})


class AliveBytes(TorchDispatchMode):
    """Within, counts the bytes of storages that operations make: those ``alive`` now, and the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self._peak = 0
        self._known = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage())  # was there before
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes()).atexit = False
        self._peak = max(self._peak, self.alive)
        return result

    def _forget(self, num_bytes: int) -> None:
        self.alive -= num_bytes

    def pop_peak(self) -> int:
        """The most since the last call."""
        peak, self._peak = self._peak, self.alive
        return peak


def bytes_of(tensors: list[Tensor]) -> int:
    """Of the storages of these tensors, each counted once; on any device, meta too."""
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def _rehearse(config: Config, model_config: ModelConfig, layers: tuple[int, int], device: torch.device) -> Rehearsal:
    stage = assemble_stage(config, model_config, layers, META, precision_of(config, device))
    with _without_values(stage, device) as where:
        buckets = GradientBuckets(stage.trained_by_layer(), groups=(), spans=Spans())
        if config.pp_mode == "zb":
            queue = WeightGradients(lambda _: None)
            for linear in linears(stage):
                linear.weight_gradients = queue if linear.weight.requires_grad else None
        shape = (config.micro_batch_size, config.seq_length)  # (B, T)
        tokens = torch.zeros(shape, dtype=torch.int64, device=where)
        draw = Draw(seed=0, step=0, micro_batch=0) if where.type == "cpu" else None  # on meta stand-ins drop, whatever the draw
        documents = ((0, shape[1] // 2), (shape[1] // 2, shape[1]))
        segments = Segments((documents,) * shape[0], torch.zeros_like(tokens), draw)
        with AliveBytes() as bytes_alive:
            _one_micro_batch(stage, tokens, segments, bytes_alive)  # makes what later ones find: the table of rotations
            if config.pp_mode == "zb":
                while queue.next_micro_batch is not None:
                    queue.add_next()
            found = _one_micro_batch(stage, tokens, segments, bytes_alive)
        del buckets
    return found


def _one_micro_batch(stage: Stage, tokens: Tensor, segments: Segments, bytes_alive: AliveBytes) -> Rehearsal:
    """As pipeline_parallel/engine.py treats it."""
    before = bytes_alive.alive
    bytes_alive.pop_peak()
    x = tokens  # (B, T)
    if not stage.has_embeddings:
        x = torch.empty((*tokens.shape, stage.config.width), dtype=stage.compute_dtype, device=tokens.device).requires_grad_()  # (B, T, C)
    y = stage(x, segments)  # (B, T, C)
    kept, forward = bytes_alive.alive - before, bytes_alive.pop_peak() - before
    loss_peak = left_by_loss = 0
    if stage.has_head:
        targets = next_token_targets(tokens, segments.positions)  # (B, T)
        loss = stage.loss_sum(y, targets)
        loss_peak, left_by_loss = bytes_alive.pop_peak() - before, bytes_alive.alive - before - kept
        one = torch.tensor(1.0, dtype=torch.float64, device=tokens.device)  # a known number: the backward looks at it
        loss.backward(one)
        del loss, one, targets
    else:
        y.backward(torch.empty_like(y))
    backward = bytes_alive.pop_peak() - before
    del x, y
    return Rehearsal(
        kept=kept,
        forward=forward,
        loss=loss_peak,
        left_by_loss=left_by_loss,
        backward=backward,
        left_over=bytes_alive.alive - before,
    )


@contextmanager
def _without_values(stage: Stage, device: torch.device) -> Iterator[torch.device]:
    """Within, ``stage``, which is on the meta device, computes as it would on ``device``; where its tensors then seem to be."""
    if device.type == "cpu":
        with FakeTensorMode():
            _move_to(stage, device)
            yield device
        return
    _stand_in_for_dropout(stage)
    for block in stage.blocks.children():
        block.forward = _with_fused_attention(block.forward)
    yield META


def _move_to(stage: Stage, device: torch.device) -> None:
    """Parameters one by one: nn.Module.to cannot swap fake ones."""
    for module in stage.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            there = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module.register_parameter(name, nn.Parameter(there, requires_grad=parameter.requires_grad))


class _DropoutWithoutDraw(nn.Module):
    """Keeps what SeededDropout and AmbientDropout keep; the meta device has no generators."""

    def forward(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """x (...). Returns the same shape and dtype."""
        return (x * torch.empty(x.shape, dtype=torch.bool, device=x.device)).div_(1.0)


def _stand_in_for_dropout(stage: Stage) -> None:
    for name, part in list(stage.named_modules()):
        of_attention = name.endswith((".attn_dropout", ".attention_dropout"))  # inside the fused kernel, which keeps a seed
        if isinstance(part, (SeededDropout, AmbientDropout)) and part.p > 0 and not of_attention:
            stage.set_submodule(name, _DropoutWithoutDraw())


def _with_fused_attention(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Around each block, not around everything: a backward, in which blocks are computed again, runs outside of function modes."""

    def within(*args: Any) -> Tensor:
        with _FusedAttention():
            return forward(*args)

    return within


class _FusedAttention(TorchFunctionMode):
    """Attention as a GPU's fused kernel keeps it; the meta device would choose the one that keeps every probability."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FusedAttentionBytes.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _FusedAttentionBytes(torch.autograd.Function):
    """The allocations of FlashAttention-2 (Dao 2023, arXiv:2307.08691, section 3.2), no arithmetic."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, head_width = q.shape
        y = torch.empty((batch, tokens, heads, head_width), dtype=q.dtype, device=q.device).transpose(1, 2)  # (B, H, T, D)
        logsumexp = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, y, logsumexp)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *_ = ctx.saved_tensors
        sums = torch.empty(q.shape, dtype=torch.float32, device=q.device)  # of dq over blocks of keys
        grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        del sums
        return grads
