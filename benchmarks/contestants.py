"""Who takes part where the computation is real: our pipeline, torch's and DeepSpeed's over the same stages, transformers in one process.

All of them draw the same weights, read the same tokens and make the same update (AdamW, clipping at 1), so all must report the same losses.
The peers' pipelines run our stage modules: what differs is the runtime alone. Legend: B micro-batch, T tokens, C width, N sequences."""

import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from bench import Sizes
from torch import Tensor, nn
from torch_peer import TorchSchedule

from comms.groups import Groups
from comms.place import Place
from comms.spans import Spans
from modules.gptj import GPTJConfig
from modules.linear import linears
from modules.lm_ops import Segments, next_token_targets
from modules.stage import Stage, draw_parameter, empty_stage
from optim.build import AdamSettings, AdamW
from pipeline_parallel.simulator import Durations
from training.compute.gradient import GlobalGradient, Schedule

LEARNING_RATE = 1e-4
CLIP_GRAD_NORM = 1.0


class Contestant(Protocol):
    """One rank of a variant."""

    def step(self) -> float:
        """One optimizer step. Returns the mean loss before it."""

    def pipeline(self) -> float:
        """Forwards and backwards of a step, nothing else. Returns when they were through (time.perf_counter)."""

    def forget(self) -> None:
        """Forget the gradients."""


def token_ids(sizes: Sizes) -> Tensor:
    """(N, T) int64, the same for all variants."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, sizes.vocab, (sizes.num_sequences, sizes.seq_length), generator=generator)


@torch.no_grad()
def draw(module: nn.Module, config: GPTJConfig) -> None:
    """The same values for a parameter of the same name, whoever holds it."""
    for name, parameter in module.named_parameters():
        draw_parameter(parameter, name, config, seed=0)


def drawn_stage(sizes: Sizes, first: int, last: int, dtype: torch.dtype = torch.float32) -> Stage:
    """Layers [first, last) with their values, rounded to ``dtype``."""
    config = GPTJConfig.from_hf(sizes.hf_config)
    stage = empty_stage(config, first, last, dtype=dtype)
    draw(stage, config)
    return stage


def _our_optimizer(stage: Stage) -> AdamW:
    """With the drawn values as masters, which those of a stage in half precision no longer are."""
    optimizer = AdamW(dict(stage.named_parameters()), AdamSettings(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01))
    for name, parameter in stage.named_parameters() if stage.compute_dtype != torch.float32 else ():
        values = torch.empty(parameter.shape)
        draw_parameter(values, name, stage.config, seed=0)
        optimizer.assign(name, values)
    return optimizer


class OurPipeline:
    """The trainer's own gradient, engine and update."""

    def __init__(self, sizes: Sizes, place: Place, groups: Groups, stage: Stage, mode: str) -> None:
        self._optimizer = _our_optimizer(stage)
        self._spans = Spans()
        self._gradient = GlobalGradient(
            place=place,
            groups=groups,
            stage=stage,
            spans=self._spans,
            peer_names=[place.at(rank).in_words for rank in range(place.world_size)],
            schedule=Schedule(mode=mode),  # type: ignore[arg-type]
            batch_size=sizes.num_sequences,
            micro_batch_size=sizes.micro_batch_size,
            seq_length=sizes.seq_length,
            clip_grad_norm=CLIP_GRAD_NORM,
        )
        ids = token_ids(sizes)
        positions = torch.arange(sizes.seq_length).expand_as(ids)
        self._tokens = torch.stack((ids, positions, next_token_targets(ids, positions)), dim=1)[None].int()  # (1, N, 3, T)
        self._num_targets = sizes.num_targets
        self.seconds_by_span: dict[str, float] = {}  # of the last pipeline()

    def step(self) -> float:
        decision = self._gradient.compute(self._tokens, self._num_targets)
        self._optimizer.step(LEARNING_RATE)
        self._gradient.forget()
        return decision.loss

    def pipeline(self) -> float:
        self._spans.start_recording()
        self._gradient.compute(self._tokens, self._num_targets)
        recorded = self._spans.stop_recording()
        end = next(span.start for span in recorded if span.name == "gradient norm")
        self.seconds_by_span = seconds_by_name(span for span in recorded if span.end <= end)
        return end

    def forget(self) -> None:
        self._gradient.forget()


def seconds_by_name(spans: Iterator[Any]) -> dict[str, float]:
    """The sum over all micro-batches, by what was done."""
    sums: dict[str, float] = {}
    for span in spans:
        sums[span.name] = sums.get(span.name, 0.0) + span.end - span.start
    return sums


class _PlainStage(nn.Module):
    """A stage that takes one tensor, for micro-batches of one document per sequence."""

    def __init__(self, stage: Stage, sizes: Sizes) -> None:
        super().__init__()
        self.stage = stage
        self._segments = Segments.from_positions(torch.arange(sizes.seq_length).expand(sizes.micro_batch_size, -1))

    def forward(self, x: Tensor) -> Tensor:
        """Ids (B, T) or hidden (B, T, C) to hidden (B, T, C)."""
        return self.stage(x, self._segments)


def _loss_share(stage: Stage, hidden: Tensor, ids: Tensor, num_targets: int) -> Tensor:
    """Of a micro-batch (B, T, C), (B, T) in the mean over num_targets: with head and loss as our engine has them."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return stage.loss_sum(hidden, next_token_targets(ids, positions), 1.0 / num_targets)


class TorchPipeline:
    """torch.distributed.pipelining over our stages; clipping and update as torch does them."""

    def __init__(self, sizes: Sizes, place: Place, stage: Stage, kind: str) -> None:
        self._stage, self._optimizer = stage, _our_optimizer(stage)
        self._ids = token_ids(sizes)  # (N, T)
        hidden = torch.zeros(sizes.micro_batch_size, sizes.seq_length, sizes.width, requires_grad=True)  # (B, T, C)
        self._schedule = TorchSchedule(
            kind,
            _PlainStage(stage, sizes),
            place=place,
            num_micro_batches=sizes.micro_batches,
            example_in=self._ids[: sizes.micro_batch_size] if place.is_first_stage else hidden,
            example_out=hidden,
            loss_fn=lambda hidden, ids: _loss_share(stage, hidden, ids, sizes.num_targets),
        )

    def step(self) -> float:
        loss = self._schedule.run(self._ids, self._ids)
        gradients = [p.grad for p in self._stage.parameters() if p.grad is not None]
        votes = torch.stack((torch.nn.utils.get_total_norm(gradients).double().square(), torch.tensor(loss, dtype=torch.float64)))
        dist.all_reduce(votes)
        torch.nn.utils.clip_grads_with_norm_(self._stage.parameters(), CLIP_GRAD_NORM, votes[0].sqrt().float())
        self._optimizer.step(LEARNING_RATE)
        self.forget()
        return votes[1].item()

    def pipeline(self) -> float:
        self._schedule.run(self._ids, self._ids)
        return time.perf_counter()

    def forget(self) -> None:
        self._stage.zero_grad()


class TransformersProcess:
    """GPTJForCausalLM with plain autograd, clip_grad_norm_ and torch's fused AdamW, micro-batch by micro-batch, all cores it is given."""

    def __init__(self, sizes: Sizes) -> None:
        from transformers import GPTJConfig as TheirConfig
        from transformers import GPTJForCausalLM

        torch.manual_seed(0)
        self._model = GPTJForCausalLM(TheirConfig(**sizes.hf_config))
        draw(self._model, GPTJConfig.from_hf(sizes.hf_config))
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=LEARNING_RATE, fused=True)
        self._ids, self._sizes = token_ids(sizes), sizes

    def step(self) -> float:
        total = 0.0
        for piece in self._ids.split(self._sizes.micro_batch_size):
            loss = self._model(piece, labels=piece).loss / self._sizes.micro_batches
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total


class DeepSpeedPipeline:
    """DeepSpeed's PipelineModule (its 1F1B, clipping included) of as many layers as there are stages, each one of our stages."""

    def __init__(self, sizes: Sizes, place: Place, stage: Stage) -> None:
        import deepspeed  # installed by those who want this peer; not ours
        from deepspeed.pipe import PipelineModule

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        layers = [_PlainStage(stage, sizes) if s == place.pp else nn.Identity() for s in range(place.pp_size)]
        targets = sizes.num_targets // sizes.micro_batches  # it divides by the number of micro-batches itself
        model = PipelineModule(
            layers,
            num_stages=place.pp_size,
            loss_fn=lambda hidden, ids: _loss_share(stage, hidden, ids, targets).float(),
            partition_method="uniform",
        )
        settings = {
            "train_micro_batch_size_per_gpu": sizes.micro_batch_size,
            "gradient_accumulation_steps": sizes.micro_batches,
            "train_batch_size": sizes.num_sequences,
            "gradient_clipping": CLIP_GRAD_NORM,
            "steps_per_print": 10**9,
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self._ids, self._micro_batch_size = token_ids(sizes), sizes.micro_batch_size

    def step(self) -> float:
        pieces = ((piece, piece) for piece in self._ids.split(self._micro_batch_size))
        return float(self._engine.train_batch(data_iter=pieces))


class StageAlone:
    """Forward and backward of one micro-batch on one stage, with nobody to wait for."""

    def __init__(self, sizes: Sizes, stage: Stage) -> None:
        self._stage, self._num_targets = stage, sizes.num_targets
        self._ids = token_ids(sizes)[: sizes.micro_batch_size]  # (B, T)
        self._segments = Segments.from_positions(torch.arange(sizes.seq_length).expand_as(self._ids))
        self._hidden = torch.randn(*self._ids.shape, sizes.width, generator=torch.Generator().manual_seed(1))  # (B, T, C)
        self._hidden = self._hidden.to(stage.compute_dtype)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(input, output) of the stage."""
        x = self._ids if self._stage.has_embeddings else self._hidden.clone().requires_grad_()
        return x, self._stage(x, self._segments)

    def time_once(self) -> Durations:
        """Gradients are added to those that are there."""
        started = time.perf_counter()
        _, y = self.forward()
        forwarded = time.perf_counter()
        if self._stage.has_head:
            _loss_share(self._stage, y, self._ids, self._num_targets).backward()
        else:
            y.backward(self._hidden)
        through = time.perf_counter()
        left_over = next((linear.weight_gradients for linear in linears(self._stage)), None)
        if left_over is not None:
            left_over.is_final = False
            while left_over.next_micro_batch is not None:
                left_over.add_next()
        return Durations(forward=forwarded - started, backward=through - forwarded, weight_grad=time.perf_counter() - through)
