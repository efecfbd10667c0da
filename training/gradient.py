"""The gradient of one optimizer step's global batch: where pipeline, replicas and the one decision meet.

Promises: after compute(), every rank's ``.grad`` is its layers' part of the gradient of (summed loss / global number of target
tokens), over all micro-batches, accumulation steps and replicas, clipped alike everywhere: what one process would have computed
on the same tokens."""

import torch
from torch import Tensor

from comms.groups import Groups, PairGroups
from comms.links import Link, ProcessGroupLink
from comms.place import Place
from comms.spans import Spans
from data_parallel.allreduce import GradientBuckets
from modules.lm_ops import Segments
from modules.stage import Stage, layer_keys
from optim.decide import StepDecision, decide_step, layer_square
from pipeline_parallel.engine import MicroBatch, PipelineEngine
from pipeline_parallel.schedule import Kind, order

LINK_DEPTH = 4  # receives posted ahead; more buys nothing once a round trip is covered


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
        pp_mode: Kind,
        batch_size: int,
        micro_batch_size: int,
        seq_length: int,
        clip_grad_norm: float,
    ) -> None:
        """peer_names: of every rank, for messages. clip_grad_norm: 0 does not clip."""
        self._place, self._spans = place, spans
        self._micro_batch_size, self._clip_grad_norm = micro_batch_size, clip_grad_norm
        self._layers = layer_keys(stage.config.num_layers)
        self._device = next(stage.parameters()).device
        num_micro_batches = batch_size // micro_batch_size
        self._actions = order(pp_mode, num_micro_batches)

        def link(pair: PairGroups | None, peer: int, *, is_next: bool) -> Link | None:
            if pair is None:
                return None
            return ProcessGroupLink(
                send_group=pair.activations if is_next else pair.gradients,
                recv_group=pair.gradients if is_next else pair.activations,
                peer=peer,
                peer_in_words=peer_names[peer],
                shape=(micro_batch_size, seq_length, stage.config.width),
                dtype=torch.float32,
                device=self._device,
                depth=min(LINK_DEPTH, num_micro_batches),
            )

        self._engine = PipelineEngine(
            stage=stage,
            previous=link(groups.to_previous, place.rank - 1, is_next=False),
            following=link(groups.to_next, place.rank + 1, is_next=True),
            spans=spans,
        )
        self._buckets = GradientBuckets(stage.parameters_by_layer(), groups=groups.replicas, spans=spans)

    def compute(self, tokens: Tensor, num_targets: int) -> StepDecision:
        """Collective over all ranks. tokens: this replica's share, (A, N, 2, T) int32, for A accumulation steps of N sequences
        ([:, :, 0] ids, [:, :, 1] positions); num_targets: of the whole global batch. Gradients are added to what ``.grad`` holds
        (see forget()). Raises PeerLost."""
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        for a, batch in enumerate(tokens):
            is_last = a == len(tokens) - 1
            loss += self._engine.run(
                self._actions,
                self._micro_batches(batch),
                scale=1.0 / num_targets,
                before_last_backward=self._buckets.arm if is_last else None,
            )
        self._buckets.finish()
        with self._spans.span("agreeing on the step"):
            decision = decide_step(
                place=self._place,
                layers=self._layers,
                squares={key: layer_square(flats) for key, flats in self._buckets.flat_gradients()} if self._place.dp == 0 else {},
                loss=loss.item(),
                clip_grad_norm=self._clip_grad_norm,
                device=self._device,
            )
        if decision.clip_factor < 1.0 and not decision.skip:
            for _, flats in self._buckets.flat_gradients():
                for flat in flats:
                    flat.mul_(decision.clip_factor)
        return decision

    def forget(self) -> None:
        """Set every gradient to 0 for the next step."""
        self._buckets.zero()

    def _micro_batches(self, batch: Tensor) -> list[MicroBatch]:
        """batch (N, 2, T) int32 to N / micro_batch_size micro-batches on the stage's device."""
        return [
            MicroBatch(piece[:, 0].long().to(self._device), Segments.from_positions(piece[:, 1]).to(self._device))
            for piece in batch.split(self._micro_batch_size)
        ]
