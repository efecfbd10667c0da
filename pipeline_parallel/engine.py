"""Plays a schedule on one stage: takes what the neighbours send, computes, sends on.

One path for first, middle and last stage: a missing neighbour is a missing link. Promises: gradients of the step are ADDED to
``.grad`` in micro-batch order; everything put has left when ``run`` or ``evaluate``, which plays forwards alone, returns. Left to others:
dividing by the global target count (it comes in as ``scale``), replicas (data_parallel/), the optimizer.

Legend: B sequences of a micro-batch, T tokens, C width, M micro-batches.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from comms.links import Link
from comms.spans import Spans
from modules.linear import WeightGradients
from modules.lm_ops import Segments
from modules.stage import Stage
from pipeline_parallel.schedule import Action


class MicroBatch(NamedTuple):
    """token_ids (B, T) int64, the documents in them, and targets (B, T) int64: what each position is to predict, or IGNORED_TARGET; on the
    device of the stage."""

    token_ids: Tensor
    segments: Segments
    targets: Tensor


class PipelineEngine:
    """One stage of one pipeline and its links. weight_gradients: where the stage's linears leave theirs, needed for orders with W."""

    def __init__(
        self, *, stage: Stage, previous: Link | None, following: Link | None, spans: Spans, weight_gradients: WeightGradients | None = None
    ) -> None:
        assert stage.has_embeddings == (previous is None), "the first stage, and only it, has the embeddings"
        assert stage.has_head == (following is None), "the last stage, and only it, has the head"
        self._stage, self._previous, self._following, self._spans = stage, previous, following, spans
        self._weight_gradients = weight_gradients
        self._in_flight: dict[int, tuple[Tensor, Tensor]] = {}  # micro-batch -> input, output of this stage

    def run(
        self,
        actions: Sequence[Action],
        micro_batches: Sequence[MicroBatch],
        *,
        scale: float,
        before_last_backward: Callable[[], None] | None = None,
    ) -> Tensor:
        """One optimizer step: all forwards and backwards of ``micro_batches``, on all stages of the pipeline at once.

        Returns on the last stage the SUM of ``scale`` * loss over the step's targets (float64 scalar), elsewhere 0.
        ``before_last_backward`` is called right before the backward after which no gradient of this step changes any more. Raises
        PeerLost."""
        loss = torch.zeros((), dtype=torch.float64, device=next(self._stage.parameters()).device)
        for link in (self._previous, self._following):
            if link is not None:
                link.post(len(micro_batches))
        done = self._spans.start_part(len(micro_batches), "micro-batches")
        for kind, i in actions:
            if kind == "F":
                self._forward(i, micro_batches[i])
            elif kind == "W":
                self._add_weight_gradients(i)
            else:
                is_last = i == len(micro_batches) - 1  # backwards run in micro-batch order
                if is_last and before_last_backward is not None:
                    before_last_backward()
                loss += self._backward(i, micro_batches[i], scale, is_last)
                done.add()
        with self._spans.span("waiting for sends"):
            for link in (self._previous, self._following):
                if link is not None:
                    link.flush()
        return loss

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Forwards alone of ``micro_batches``, M of B sequences each, on all stages of the pipeline at once, in the messages of a step.

        Returns on the last stage for every sequence the sum of -log p of its targets, (M, B) float64, elsewhere zeros. Between two calls of
        run() it leaves everything as it was. A stage may be done with all of them before the next one takes the first: M bounds what it
        holds, as it does for gpipe. Raises PeerLost."""
        shape = (len(micro_batches), len(micro_batches[0].token_ids)) if micro_batches else (0, 0)
        losses = torch.zeros(shape, dtype=torch.float64, device=next(self._stage.parameters()).device)
        if self._previous is not None:
            self._previous.post(len(micro_batches))
        for i, micro_batch in enumerate(micro_batches):
            x = micro_batch.token_ids  # (B, T)
            if self._previous is not None:
                with self._spans.span("receiving activations", i):
                    x = self._previous.take(i)  # (B, T, C)
            with self._spans.span("forward", i):
                y = self._stage(x, micro_batch.segments)  # (B, T, C)
            if self._following is not None:
                with self._spans.span("sending activations", i):
                    self._following.put(i, y)
            else:
                with self._spans.span("loss", i):
                    losses[i] = self._stage.row_losses(y, micro_batch.targets)
        if self._following is not None:
            with self._spans.span("waiting for sends"):
                self._following.flush()
        return losses

    def _forward(self, i: int, micro_batch: MicroBatch) -> None:
        x = micro_batch.token_ids  # (B, T)
        if self._previous is not None:
            x = self._take(self._previous, i, "receiving activations").requires_grad_()  # (B, T, C)
        with self._spans.span("forward", i):
            y = self._stage(x, micro_batch.segments)  # (B, T, C)
        if self._following is not None:
            with self._spans.span("sending activations", i):
                self._following.put(i, y)
        self._in_flight[i] = (x, y)

    def _backward(self, i: int, micro_batch: MicroBatch, scale: float, is_last: bool) -> Tensor | float:
        """The head and the loss run here, not in the forward: their logits and gradients then never wait for their turn."""
        x, y = self._in_flight.pop(i)
        if self._weight_gradients is not None:
            self._weight_gradients.micro_batch, self._weight_gradients.is_final = i, is_last
        loss: Tensor | float = 0.0
        if self._following is None:
            with self._spans.span("loss", i):
                loss = self._stage.loss_sum(y, micro_batch.targets, scale)
            with self._spans.span("backward", i):
                loss.backward()
            loss = loss.detach()
        else:
            grad = self._take(self._following, i, "receiving gradients")  # (B, T, C)
            with self._spans.span("backward", i):
                y.backward(grad)
        if self._previous is not None:
            assert x.grad is not None, "the stage's input takes part in its output"
            with self._spans.span("sending gradients", i):
                self._previous.put(i, x.grad)
        return loss

    def _take(self, link: Link, i: int, doing: str) -> Tensor:
        """Message i of ``link``; weight gradients that were left over fill the time until it is here."""
        left_over = self._weight_gradients
        if left_over is not None and left_over.next_micro_batch is not None and not link.is_here(i):
            with self._spans.span("weight gradient", left_over.next_micro_batch):
                while left_over.next_micro_batch is not None and not link.is_here(i):
                    left_over.add_next()
        with self._spans.span(doing, i):
            return link.take(i)

    def _add_weight_gradients(self, i: int) -> None:
        """All that micro-batch i, and those before it, have left over and no gap has taken."""
        left_over = self._weight_gradients
        assert left_over is not None, "an order with W needs somewhere to leave weight gradients"
        with self._spans.span("weight gradient", i):
            while left_over.next_micro_batch is not None and left_over.next_micro_batch <= i:
                left_over.add_next()
