"""Pipelines whose stages compute by sleeping: what is measured is the runtime and the link, not the cores that happen to be there.

A stage sleeps for its forward and its backward, and lets go of the interpreter meanwhile, as a real kernel does; messages are real.
Allocating and copying a message counts as part of the sleep. Ours runs in the trainer's engine over the trainer's links; torch's schedules
run the same stages. Legend: B micro-batch, T tokens, C width, M micro-batches, S stages."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from bench import spread
from contestants import seconds_by_name
from torch import Tensor, nn
from torch_peer import TorchSchedule

from comms.groups import Groups
from comms.links import Link, ProcessGroupLink
from comms.place import Place
from comms.probe import LinkTimes, time_link
from comms.spans import Spans
from comms.transport import Transport, make_transport
from modules.linear import WeightGradients
from modules.lm_ops import Segments
from pipeline_parallel.engine import MicroBatch, PipelineEngine
from pipeline_parallel.schedule import extra_warmup_for, order, warmup_forwards
from pipeline_parallel.simulator import Durations
from training.compute.gradient import LEAST_DEPTH, Schedule, wire_codecs

CPU = torch.device("cpu")
NUM_LINEARS = 24  # of a stage: four layers of GPT-J; the weight gradient of a micro-batch is as many pieces


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every stage does with a micro-batch, seconds, and the shape of its messages."""

    shape: tuple[int, int, int]  # (B, T, C)
    durations: Durations

    @property
    def compute_s(self) -> float:
        """Forward and backward."""
        return self.durations.forward + self.durations.backward + self.durations.weight_grad


class Sleeper:
    """Sleeps that end at a given time after their start, and by how much they came late."""

    def __init__(self) -> None:
        self.late_s: list[float] = []

    def until(self, end: float) -> None:
        time.sleep(max(0.0, end - time.perf_counter()))
        self.late_s.append(time.perf_counter() - end)


class SleepingWeightGradients(WeightGradients):
    """Left-over weight gradients that take their time. What a piece sleeps too long, the next one sleeps less."""

    def __init__(self, seconds: float) -> None:
        super().__init__(on_final=lambda parameter: None)
        self._piece_s, self._too_long = seconds / NUM_LINEARS, 0.0
        self._pieces: deque[int] = deque()

    def leave_all(self) -> None:
        """Those of the micro-batch whose backward runs."""
        self._pieces.extend([self.micro_batch] * NUM_LINEARS)

    @property
    def next_micro_batch(self) -> int | None:
        return self._pieces[0] if self._pieces else None

    def add_next(self) -> None:
        self._pieces.popleft()
        end = time.perf_counter() + self._piece_s - self._too_long
        time.sleep(max(0.0, end - time.perf_counter()))
        self._too_long = time.perf_counter() - end


class EmulatedStage(nn.Module):
    """What PipelineEngine wants of a stage. While ``weight_gradients`` is set, the backward leaves them over."""

    def __init__(self, work: Work, place: Place, weight_gradients: SleepingWeightGradients | None = None) -> None:
        super().__init__()
        self.has_embeddings, self.has_head = place.is_first_stage, place.is_last_stage
        self.durations, self.weight_gradients, self.sleeper = work.durations, weight_gradients, Sleeper()
        self.weight = nn.Parameter(torch.zeros(1))
        self.hidden = torch.randn(work.shape, generator=torch.Generator().manual_seed(place.rank))  # (B, T, C)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """Anything on the first stage, else hidden (B, T, C), to hidden (B, T, C)."""
        y: Tensor = _Compute.apply(None if self.has_embeddings else x, self.weight, self)
        return y

    def loss_sum(self, hidden: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
        """Nothing; its gradient is a fixed one (B, T, C)."""
        loss: Tensor = _Loss.apply(hidden, self.hidden)
        return loss


class _Compute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor | None, weight: Tensor, stage: EmulatedStage) -> Tensor:
        end = time.perf_counter() + stage.durations.forward
        ctx.stage, ctx.is_first = stage, x is None
        y = (stage.hidden if x is None else x).clone()  # (B, T, C)
        stage.sleeper.until(end)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        stage, left_over = ctx.stage, ctx.stage.weight_gradients
        end = time.perf_counter() + stage.durations.backward + (stage.durations.weight_grad if left_over is None else 0.0)
        grad_x = None if ctx.is_first else grad_outputs[0].clone()  # (B, T, C)
        if left_over is not None:
            left_over.leave_all()
        stage.sleeper.until(end)
        return grad_x, None, None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return torch.zeros((), dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


class OurEmulation:
    """One rank of our pipeline: links as training/compute/gradient.py makes them, and the engine over an emulated stage."""

    def __init__(self, work: Work, place: Place, groups: Groups, schedule: Schedule, num_micro_batches: int) -> None:
        self._work, self._place, self._groups, self._schedule, self._num = work, place, groups, schedule, num_micro_batches
        left_over = SleepingWeightGradients(work.durations.weight_grad) if schedule.mode == "zb" else None
        self.stage, self.spans = EmulatedStage(work, place, left_over), Spans(record=True)
        self._engine = PipelineEngine(
            stage=self.stage,  # type: ignore[arg-type]
            previous=self._link(place.pp - 1) if place.pp > 0 else None,
            following=self._link(place.pp) if not place.is_last_stage else None,
            spans=self.spans,
            weight_gradients=left_over,
        )
        self._actions = order(
            schedule.mode,
            stage=place.pp,
            num_stages=place.pp_size,
            num_micro_batches=num_micro_batches,
            extra_warmup=schedule.extra_warmup,
        )
        ids = torch.zeros(1, 2, dtype=torch.int64)
        self._micro_batches = [MicroBatch(ids, Segments.from_positions(torch.arange(2)[None]), ids)] * num_micro_batches

    def _link(self, first_stage: int) -> Link:
        """The link behind ``first_stage``, from this end."""
        ahead = self._num if self._schedule.mode == "gpipe" else 1 + self._warmup(first_stage)
        activations, gradients = wire_codecs(self._schedule.wire_dtype, self._schedule.wire_dtype_grad, self._work.shape, CPU)
        is_next = first_stage == self._place.pp
        return ProcessGroupLink(
            transport=transport_of(self._place, self._groups, is_next=is_next),
            send_codec=activations if is_next else gradients,
            recv_codec=gradients if is_next else activations,
            peer_in_words=self._place.at(self._place.rank + (1 if is_next else -1)).in_words,
            depth=max(LEAST_DEPTH, ahead),
        )

    def _warmup(self, first_stage: int) -> int:
        return warmup_forwards(first_stage, self._place.pp_size, self._schedule.extra_warmup)

    def run(self) -> float:
        """One step. Returns when it was through (time.perf_counter)."""
        self.spans.recorded.clear()
        self._engine.run(self._actions, self._micro_batches, scale=1.0)
        return time.perf_counter()

    def diagnosis(self) -> dict[str, Any]:
        """Of the last step: seconds by what was done; over all steps: how late sleeps ended."""
        seconds = {name: round(s, 4) for name, s in seconds_by_name(iter(self.spans.recorded)).items()}
        return {"seconds_by_span": seconds, "sleeps_late_ms": milliseconds(self.stage.sleeper.late_s)}


class TorchEmulation:
    """One rank of torch's schedule over the same kind of stage."""

    def __init__(self, kind: str, work: Work, place: Place, num_micro_batches: int) -> None:
        self._stage = EmulatedStage(work, place)
        self._batch = torch.zeros(num_micro_batches, 1)
        hidden = torch.zeros(work.shape, requires_grad=True)  # (B, T, C)
        self._schedule = TorchSchedule(
            kind,
            self._stage,
            place=place,
            num_micro_batches=num_micro_batches,
            example_in=self._batch[:1] if place.is_first_stage else hidden,
            example_out=hidden,
            loss_fn=self._stage.loss_sum,
        )

    def run(self) -> float:
        """One step. Returns when it was through (time.perf_counter)."""
        self._schedule.run(self._batch, self._batch)
        return time.perf_counter()

    def diagnosis(self) -> dict[str, Any]:
        """How late sleeps ended."""
        return {"sleeps_late_ms": milliseconds(self._stage.sleeper.late_s)}


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """spread() in milliseconds."""
    return {key: round(1e3 * value, 3) for key, value in spread(seconds).items()}


def transport_of(place: Place, groups: Groups, *, is_next: bool) -> Transport:
    """To the following or to the previous stage."""
    pair = groups.to_next if is_next else groups.to_previous
    assert pair is not None, "there is a neighbour on that side"
    return make_transport(
        send_group=pair.activations if is_next else pair.gradients,
        recv_group=pair.gradients if is_next else pair.activations,
        peer=place.rank + (1 if is_next else -1),
        device=CPU,
    )


def measure_links(place: Place, groups: Groups, num_bytes: int) -> list[LinkTimes]:
    """Every link's times for messages of num_bytes, the same list on all ranks. Collective."""
    found = torch.zeros(place.pp_size - 1, 2, dtype=torch.float64)
    for is_next in (False, True):  # a rank turns to the next link when it is through with the one before: so they follow each other
        if place.is_last_stage if is_next else place.is_first_stage:
            continue
        transport = transport_of(place, groups, is_next=is_next)
        times = time_link(transport, leads=is_next, num_bytes=(num_bytes, num_bytes), device=CPU, peer_in_words="the neighbour")
        transport.close()
        if is_next:
            found[place.pp] = torch.tensor([times.latency_s, times.transfer_s])
    dist.all_reduce(found)
    return [LinkTimes(latency_s=latency, transfer_s=transfer) for latency, transfer in found.tolist()]


def extra_warmup_of(links: list[LinkTimes], work: Work) -> tuple[int, ...]:
    """What the trainer's ``auto`` comes to."""
    return tuple(extra_warmup_for(latency_s=t.latency_s, transfer_s=t.transfer_s, compute_s=work.compute_s) for t in links)
