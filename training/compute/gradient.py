"""The gradient of one optimizer step's global batch: where pipeline, replicas and the one decision meet.

Promises: after compute(), every rank's ``.grad`` is its layers' part of the gradient of (summed loss / global number of target
tokens), over all micro-batches, accumulation steps and replicas, clipped alike everywhere: what one process would have computed
on the same tokens."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from comms.codecs import Codec, WireDtype, make_codec
from comms.groups import Groups, PairGroups
from comms.links import Link, ProcessGroupLink
from comms.place import Place
from comms.spans import Spans
from comms.transport import make_transport
from data_parallel.allreduce import GradientBuckets
from modules.dropout import Draw
from modules.linear import WeightGradients, linears
from modules.lm_ops import Segments
from modules.stage import Stage, layer_keys
from optim.decide import NO_WISHES, StepDecision, Wishes, decide_step, layer_square
from pipeline_parallel.engine import MicroBatch, PipelineEngine
from pipeline_parallel.schedule import PipelineMode, order, warmup_forwards

LEAST_DEPTH = 4  # receives posted ahead, where the schedule asks for no more


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How micro-batches go through the pipeline and in which form: the flags of the same names, resolved. extra_warmup: per link."""

    mode: PipelineMode = "1f1b"
    extra_warmup: tuple[int, ...] = ()
    wire_dtype: WireDtype = "none"
    wire_dtype_grad: WireDtype = "none"


@dataclass(frozen=True, kw_only=True)
class WireReport:
    """What all stages sent to their neighbours in an optimizer step. The errors are relative to what was meant, measured on the first
    message of every link; None: no link, or nothing was rounded."""

    num_bytes: int
    activation_error: float | None
    gradient_error: float | None


class GlobalGradient:
    """One rank's stage with its links and buckets. batch_size: sequences per replica and accumulation step."""

    def __init__(
        self,
        *,
        place: Place,
        groups: Groups,
        stage: Stage,
        spans: Spans,
        peer_names: list[str],
        schedule: Schedule,
        batch_size: int,
        micro_batch_size: int,
        seq_length: int,
        clip_grad_norm: float,
        dropout_seed: int | None = None,
    ) -> None:
        """peer_names: of every rank, for messages. clip_grad_norm: 0 does not clip. dropout_seed: None where nothing is dropped. Raises
        UserError for a codec that does not fit."""
        self._dropout_seed = dropout_seed
        self._place, self._spans, self._schedule = place, spans, schedule
        self._micro_batch_size, self._clip_grad_norm = micro_batch_size, clip_grad_norm
        self._num_micro_batches = batch_size // micro_batch_size
        self._layers = layer_keys(stage.config.num_layers)
        self._device = next(stage.parameters()).device
        shape = (micro_batch_size, seq_length, stage.config.width)
        self._codecs = wire_codecs(schedule.wire_dtype, schedule.wire_dtype_grad, shape, self._device, stage.compute_dtype)
        self._to_previous = self._link(groups.to_previous, peer_names, is_next=False)
        self._to_next = self._link(groups.to_next, peer_names, is_next=True)
        leaving = [part for part in linears(stage) if part.weight.requires_grad] if schedule.mode == "zb" else []
        self._buckets = GradientBuckets(
            stage.trained_by_layer(),
            groups=groups.replicas,
            spans=spans,
            added_elsewhere=[parameter for linear in leaving for parameter in linear.parameters() if parameter.requires_grad],
        )
        weight_gradients = WeightGradients(self._buckets.complete) if schedule.mode == "zb" else None
        for linear in leaving:
            linear.weight_gradients = weight_gradients
        self._engine = PipelineEngine(
            stage=stage, previous=self._to_previous, following=self._to_next, spans=spans, weight_gradients=weight_gradients
        )

    def _link(self, pair: PairGroups | None, peer_names: list[str], *, is_next: bool) -> Link | None:
        first_stage = self._place.pp if is_next else self._place.pp - 1
        depth = self._depth(first_stage)
        return link_to_neighbour(self._place, pair, self._codecs, self._device, peer_names, depth=depth, is_next=is_next)

    def _depth(self, first_stage: int) -> int:
        """Receives posted ahead on the link behind ``first_stage``: as many messages as may be under way on it at once."""
        if self._schedule.mode == "gpipe":
            return self._num_micro_batches
        return max(LEAST_DEPTH, 1 + warmup_forwards(first_stage, self._place.pp_size, self._schedule.extra_warmup))

    def compute(
        self,
        tokens: Tensor,
        num_targets: int,
        *,
        step: int = 0,
        loss_scale: float = 1.0,
        wishes: Wishes = NO_WISHES,
    ) -> StepDecision:
        """Collective over all ranks. tokens: this replica's share, (A, N, 3, T) int32, for A accumulation steps of N sequences
        ([:, :, 0] ids, [:, :, 1] positions, [:, :, 2] targets or IGNORED_TARGET); num_targets: of the whole global batch; step: optimizer
        step, which decides what dropout draws; loss_scale: see optim/loss_scale.py, no longer in the
        gradients when this returns, unless the step is to be skipped; wishes: what this rank asks
        all to do behind this step.
        Gradients are added to what ``.grad`` holds (see forget()). Raises PeerLost."""
        actions = order(
            self._schedule.mode,
            stage=self._place.pp,
            num_stages=self._place.pp_size,
            num_micro_batches=self._num_micro_batches,
            num_accumulation_steps=len(tokens),
            extra_warmup=self._schedule.extra_warmup,
        )
        micro_batches = self._micro_batches(tokens, step)
        loss = self._engine.run(actions, micro_batches, scale=loss_scale / num_targets, before_last_backward=self._buckets.arm)
        self._buckets.finish()
        with self._spans.span("gradient norm"):
            squares = {}
            if self._place.dp == 0:
                squares = {key: layer_square(flats, loss_scale) for key, flats in self._buckets.flat_gradients()}
        with self._spans.span("agreeing on the step"):
            decision = decide_step(
                place=self._place,
                layers=self._layers,
                squares=squares,
                loss=loss.item() / loss_scale,
                clip_grad_norm=self._clip_grad_norm,
                device=self._device,
                wishes=wishes,
                sums=self._wire_sums(),
            )
        self.scale_as_decided(decision, loss_scale)
        return decision

    def scale_as_decided(self, decision: StepDecision, loss_scale: float) -> None:
        """Clip, and take the loss scale out. Called by compute(), and where compute() has lost its peers before it heard their decision,
        with the one that another rank has heard: the gradient was whole by then (membership/recovery.py)."""
        factor = decision.clip_factor / loss_scale
        if factor != 1.0 and not decision.skip:
            for _, flats in self._buckets.flat_gradients():
                for flat in flats:
                    flat.mul_(factor)

    def evaluate(self, tokens: Tensor) -> Tensor:
        """Collective over the ranks of a pipeline. tokens: (n, 3, T) int32 of this replica, as in compute(), n a multiple of the
        micro-batch. Nothing is dropped, and nothing of what compute() finds later is changed, its report of the wire included.

        Returns on the last stage of each sequence the sum of -log p of its targets, (n,) float64, elsewhere zeros. Raises PeerLost."""
        losses = self._engine.evaluate(micro_batches_of(tokens, self._micro_batch_size, self._device))  # (M, B)
        for link in (self._to_next, self._to_previous):
            if link is not None:
                link.pop_stats()
        return losses.flatten()

    def _wire_sums(self) -> tuple[float, ...]:
        """Of this rank: bytes sent, then squared difference and square of the sampled activations, then of the gradients."""
        sums = [0.0] * 5
        for link, place in ((self._to_next, 1), (self._to_previous, 3)):
            if link is not None:
                stats = link.pop_stats()
                sums[0] += stats.num_bytes
                sums[place] += stats.difference_square
                sums[place + 1] += stats.square
        return tuple(sums)

    def close(self) -> None:
        """Nothing more will be computed; another one may be made of the same stage."""
        self._buckets.close()
        for link in (self._to_previous, self._to_next):
            if link is not None:
                link.close()

    def forget(self) -> None:
        """Set every gradient to 0 for the next step."""
        self._buckets.zero()

    def _micro_batches(self, tokens: Tensor, step: int) -> list[MicroBatch]:
        """tokens (A, N, 3, T) int32 to micro-batches on the stage's device, in the order of their accumulation steps."""
        micro_batches = []
        for accumulation_step, batch in enumerate(tokens):
            first = (accumulation_step * self._place.dp_size + self._place.dp) * self._num_micro_batches  # as the data is dealt to replicas
            for number, piece in enumerate(batch.split(self._micro_batch_size), start=first):
                draw = None if self._dropout_seed is None else Draw(seed=self._dropout_seed, step=step, micro_batch=number)
                micro_batches.append(_micro_batch(piece, self._device, draw))
        return micro_batches


def micro_batches_of(tokens: Tensor, micro_batch_size: int, device: torch.device) -> list[MicroBatch]:
    """tokens (n, 3, T) int32 to micro-batches on ``device``, for forwards in which nothing is dropped."""
    assert len(tokens) % micro_batch_size == 0, f"{len(tokens)} sequences are no whole number of micro-batches of {micro_batch_size}"
    return [_micro_batch(piece, device) for piece in tokens.split(micro_batch_size)] if len(tokens) else []


def _micro_batch(piece: Tensor, device: torch.device, draw: Draw | None = None) -> MicroBatch:
    """Of (B, 3, T) int32."""
    segments = Segments.from_positions(piece[:, 1], draw).to(device)
    return MicroBatch(piece[:, 0].long().to(device), segments, piece[:, 2].long().to(device))


def link_to_neighbour(
    place: Place,
    pair: PairGroups | None,
    codecs: tuple[Codec, Codec],
    device: torch.device,
    peer_names: list[str],
    *,
    depth: int,
    is_next: bool,
) -> Link | None:
    """This stage's link to the next stage or to the previous one; None where ``pair`` is, at an end of the pipeline. codecs: those of
    wire_codecs. depth: receives posted ahead."""
    if pair is None:
        return None
    peer = place.rank + (1 if is_next else -1)
    activations, gradients = codecs
    transport = make_transport(
        send_group=pair.activations if is_next else pair.gradients,
        recv_group=pair.gradients if is_next else pair.activations,
        peer=peer,
        device=device,
    )
    return ProcessGroupLink(
        transport=transport,
        send_codec=activations if is_next else gradients,
        recv_codec=gradients if is_next else activations,
        peer_in_words=peer_names[peer],
        depth=min(depth, transport.max_depth),
    )


def wire_codecs(
    wire_dtype: WireDtype, wire_dtype_grad: WireDtype, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Codec, Codec]:
    """Of activations and of gradients, both (B, T, C) and computed in ``dtype``."""
    activations = make_codec(wire_dtype, shape=shape, dtype=dtype, device=device)
    same = wire_dtype == wire_dtype_grad
    return activations, activations if same else make_codec(wire_dtype_grad, shape=shape, dtype=dtype, device=device)


def wire_report(decision: StepDecision) -> WireReport:
    """What of a step's decision tells about the links between stages."""
    num_bytes, *squares = decision.sums
    return WireReport(num_bytes=int(num_bytes), activation_error=_relative(*squares[:2]), gradient_error=_relative(*squares[2:]))


def _relative(difference_square: float, square: float) -> float | None:
    is_known = square > 0 and math.isfinite(square) and math.isfinite(difference_square)
    return math.sqrt(difference_square / square) if is_known else None
