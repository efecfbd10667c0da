"""What forward and backward cost here: every rank trains two random layers for a moment, the first stage's ranks the embeddings
too, the last stage's the head and the loss.

An even cut knows neither that the head of a large vocabulary costs as much as several layers nor that one machine is slower than the
next, and a step takes as long as its slowest stage. From what is measured here training/layout/plan.py lays out the pipeline.

Promises: the code that is timed is the code that trains (modules/stage.py); no more memory than the stage will need anyway; torch's
random state and thread count stay as they are. Left to others: the optimizer's update and the sum over replicas, once per step, and the
wire.

Legend: B sequences of a micro-batch, T tokens, C width, V vocabulary rows.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comms.spans import Spans
from modules.linear import WeightGradients, linears
from modules.lm_ops import HEAD_CHUNK_ROWS, Segments
from modules.model_config import ModelConfig
from modules.stage import Stage, empty_stage
from pipeline_parallel.partition import Cut, StageCost, explain_cut, size_in_words, stage_bytes, stage_seconds
from training.job.report import table
from training.memory.held import HeldBytes, held_in_fp32
from user_error import UserError

MIN_ROUNDS = 3
WARM_UP_SHARE = 0.25  # of the budget
NOISE_ELEMENTS = 2**16


@dataclass(frozen=True, kw_only=True)
class MeasuredCosts:
    """Of one rank, per micro-batch: lower quartiles over ``num_rounds`` timed rounds. embeddings_s, head_s: forward and backward, 0
    where not measured. layer_activation_bytes: what one layer keeps between forward and backward where it does not recompute;
    layer_left_over_bytes: between backward and weight gradients, where those are left for later."""

    layer_forward_s: float
    layer_backward_s: float
    embeddings_s: float = 0.0
    head_s: float = 0.0
    layer_activation_bytes: int = 0
    layer_left_over_bytes: int = 0
    num_rounds: int = 0

    @property
    def layer_s(self) -> float:
        """Forward and backward of one layer."""
        return self.layer_forward_s + self.layer_backward_s


def empty_stage_of(config: ModelConfig, layers: tuple[int, int], device: torch.device) -> Stage:
    """A stage in fp32, all of it trained."""
    return empty_stage(config, *layers, device=device)


Build = Callable[[ModelConfig, tuple[int, int], torch.device], Stage]  # a stage as it is trained, of layers [first, last), without values


def measure_costs(
    config: ModelConfig,
    /,
    *,
    device: torch.device,
    micro_batch_size: int,
    seq_length: int,
    with_embeddings: bool = True,
    with_head: bool = True,
    recomputes: bool = False,
    memory_limit_bytes: int,
    budget_s: float,
    others_measure: Callable[[], bool] = lambda: False,
    build: Build = empty_stage_of,
    held: HeldBytes | None = None,
    spans: Spans | None = None,
) -> MeasuredCosts:
    """Time forward and backward of one layer, and of the embeddings and the head if asked, on this rank alone, as ``build`` makes them.
    held: what they take while they are trained (left out: in fp32, all of it). recomputes: as Stage.recomputes; the second forward is part
    of the backward's seconds. spans: where this rank says how far it is. A rank whose memory_limit_bytes are too few for a single layer
    (and the embeddings, the head) measures nothing: no cut will fit it.

    A round runs all of them one after the other, as a stage does, so that none finds the caches to itself. Rounds go on for
    ``budget_s``, for at least MIN_ROUNDS (a model with slow layers takes longer), and then while ``others_measure()``: a rank that
    stopped early would leave the slower ones a quieter host than training will. Memory, all of it freed again: weights and
    gradients of two layers (with AdamW a single one takes as much), of the embeddings and the head, and the activations of two layers.
    """
    held = held or held_in_fp32(config)
    if held.layer + with_embeddings * held.embeddings + with_head * held.head > memory_limit_bytes:
        return MeasuredCosts(layer_forward_s=0.0, layer_backward_s=0.0)
    try:
        trial = _Trial(config, device, (micro_batch_size, seq_length), build, with_embeddings=with_embeddings, with_head=with_head)
        num_computations = (MIN_ROUNDS + 1) * (2 + with_head + with_embeddings)
        with (spans or Spans()).part("measuring layers", num_computations, "computations") as part:
            return _measure(trial, device, recomputes, budget_s, others_measure, part.add)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"measuring two layers with micro-batches of {micro_batch_size} x {seq_length} tokens needs more memory than {device} has. "
            "Use a smaller --micro-batch-size or --seq-length, or cut by hand with --stage-layers"
        ) from error
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def describe_cut(costs: Sequence[StageCost], cut: Cut, in_flight: Sequence[int]) -> str:
    """A table of the stages and, in a sentence, why they are cut so: against the even cut, and what memory had to say."""
    seconds, needed = stage_seconds(costs, cut), stage_bytes(costs, cut, in_flight)
    rows: list[tuple[str, ...]] = [("stage", "layers", "ms per micro-batch", "share of slowest", "memory needed", "memory available")]
    for s, (first, last) in enumerate(cut):
        layers = f"{first}" if last - first == 1 else f"{first} .. {last - 1}"
        parts = [*(["embeddings"] if s == 0 else []), layers, *(["head"] if s == len(cut) - 1 else [])]
        share = f"{seconds[s] / max(seconds):.0%}" if max(seconds) > 0 else "-"
        available = size_in_words(costs[s].memory_limit_bytes)
        rows.append((str(s), ", ".join(parts), f"{seconds[s] * 1e3:.1f}", share, size_in_words(needed[s]), available))
    return f"{table(rows)}\n  {explain_cut(costs, cut, in_flight)}"


class _Trial:
    """The parts of a stage, with random weights, and one micro-batch. Its methods are the steps of a round, in a stage's order."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        shape: tuple[int, int],
        build: Build,
        *,
        with_embeddings: bool,
        with_head: bool,
    ) -> None:
        """shape: (B, T)."""
        self.with_embeddings, self.with_head = with_embeddings, with_head
        generator = torch.Generator().manual_seed(0)
        self.token_ids = torch.randint(config.vocab_size, shape, generator=generator).to(device)  # (B, T)
        self.pair = build(dataclasses.replace(config, num_layers=4), (1, 3), device)
        hidden = torch.randn(*shape, config.width, generator=generator)
        self.hidden = hidden.to(device, self.pair.compute_dtype)  # (B, T, C), also as a gradient
        self.segments = Segments.from_positions(torch.arange(shape[1]).expand(shape)).to(device)
        _fill(self.pair, generator)
        ends = dataclasses.replace(config, num_layers=2)  # the layers of these two never get storage
        self.first, self.last = (build(ends, layers, torch.device("meta")) for layers in ((0, 1), (1, 2)))
        used = [
            *([self.first.embeddings] if with_embeddings else []),
            *([self.last.final_norm, self.last.head] if with_head else []),
        ]
        for part in used:
            _fill(part.to_empty(device=device), generator)

    def layers_forward(self) -> None:
        self.x = self.hidden.clone().requires_grad_()  # (B, T, C)
        self.y = self.pair(self.x, self.segments)  # (B, T, C)

    def head(self) -> None:
        hidden = self.y.detach().requires_grad_()  # (B, T, C)
        self.last.loss_sum(hidden, self.token_ids, 1.0 / self.token_ids.numel()).backward()

    def layers_backward(self) -> None:
        self.y.backward(self.hidden)

    def embeddings(self) -> None:
        rows = self.first.embeddings(self.token_ids).to(self.hidden.dtype)  # (B, T, C)
        if rows.requires_grad:
            rows.backward(self.hidden)

    def bytes_kept_per_layer(self) -> int:
        """Of the storages that a forward saves for its backward, weights excepted."""
        weights = {p.untyped_storage().data_ptr() for p in self.pair.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.layers_forward()
        del self.x, self.y  # and with them what was kept
        return -(-sum(kept.values()) // 2)

    def bytes_left_over_per_layer(self) -> int:
        """Of the inputs and gradients that wait for the weight gradients to be formed."""
        left_over = WeightGradients(lambda _: None)
        for linear in linears(self.pair):
            linear.weight_gradients = left_over
        self.layers_forward()
        self.layers_backward()
        for linear in linears(self.pair):
            linear.weight_gradients = None
        return -(-left_over.num_bytes // 2)


def _measure(
    trial: _Trial,
    device: torch.device,
    recomputes: bool,
    budget_s: float,
    others_measure: Callable[[], bool],
    progress: Callable[[int], object],
) -> MeasuredCosts:
    steps: dict[str, Callable[[], None]] = {
        "layer_forward_s": trial.layers_forward,
        **({"head_s": trial.head} if trial.with_head else {}),
        "layer_backward_s": trial.layers_backward,
        **({"embeddings_s": trial.embeddings} if trial.with_embeddings else {}),
    }
    started = time.perf_counter()
    rounds: list[dict[str, float]] = []
    with torch.enable_grad():
        kept, left_over = trial.bytes_kept_per_layer(), trial.bytes_left_over_per_layer()
        trial.pair.recomputes = recomputes
        _one_round(device, steps, progress)  # the first makes the gradients that later ones are added to
        if time.perf_counter() - started < WARM_UP_SHARE * budget_s:
            _one_round(device, steps, progress)
        while len(rounds) < MIN_ROUNDS or time.perf_counter() - started < budget_s or others_measure():
            rounds.append(_one_round(device, steps, progress))
    taken = {name: _lower_quartile([seconds[name] for seconds in rounds]) / (2 if name.startswith("layer") else 1) for name in steps}
    return MeasuredCosts(**taken, layer_activation_bytes=kept, layer_left_over_bytes=left_over, num_rounds=len(rounds))


def _lower_quartile(values: Sequence[float]) -> float:
    """What a round takes when nothing else comes in between; the median of few rounds on a busy host says more of the others."""
    return sorted(values)[(len(values) - 1) // 4]


def _one_round(device: torch.device, steps: Mapping[str, Callable[[], None]], progress: Callable[[int], object]) -> dict[str, float]:
    seconds = {}
    for name, step in steps.items():
        _finish(device)
        started = time.perf_counter()
        step()
        _finish(device)
        seconds[name] = time.perf_counter() - started
        progress(1)
    return seconds


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Values of the size of a fresh model's; one short run of random numbers over and over, because drawing billions takes long."""
    noise = torch.randn(NOISE_ELEMENTS, generator=generator) * 0.02
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        for piece in parameter.view(-1).split(NOISE_ELEMENTS):
            piece.copy_(noise[: len(piece)])


def stage_costs(
    measured: Sequence[Sequence[MeasuredCosts]],
    memory_limits: Sequence[int],
    config: ModelConfig,
    *,
    num_tokens: int,
    recomputes: bool,
    leaves_weight_gradients: bool,
    dtype: torch.dtype = torch.float32,
    held: HeldBytes | None = None,
) -> list[StageCost]:
    """By stage the most that any of its replicas needs. measured: by stage and replica; memory_limits: by stage, in bytes; num_tokens:
    of a micro-batch; leaves_weight_gradients: a micro-batch in flight may be one that waits for them (zb), recomputed or not;
    dtype: of hidden states; held: left out: all of the model in fp32."""
    held = held or held_in_fp32(config)
    fp32 = torch.float32.itemsize
    hidden = num_tokens * config.width * dtype.itemsize  # (B, T, C)
    logits = 2 * min(HEAD_CHUNK_ROWS, num_tokens) * config.vocab_size * fp32
    stages = []
    for costs, limit in zip(measured, memory_limits, strict=True):
        activations = max(cost.layer_activation_bytes for cost in costs)
        in_flight = hidden if recomputes else activations
        if leaves_weight_gradients:
            in_flight = max(in_flight, *(cost.layer_left_over_bytes for cost in costs))
        stages.append(
            StageCost(
                layer_s=max(cost.layer_s for cost in costs),
                embeddings_s=max(cost.embeddings_s for cost in costs),
                head_s=max(cost.head_s for cost in costs),
                layer_bytes=held.layer,
                embeddings_bytes=held.embeddings + held.embeddings_gradient,
                head_bytes=held.head + held.head_gradient + logits,
                fixed_bytes=activations if recomputes else 0,  # of the layer whose backward runs
                layer_bytes_in_flight=in_flight,
                output_bytes_in_flight=hidden,
                memory_limit_bytes=limit,
            )
        )
    return stages
