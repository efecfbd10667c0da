"""Stages that only compute forwards: losses and generated tokens of a model that is not trained, without gradients, buckets or optimizer.

What GlobalGradient is to a training, ForwardOnly is to an evaluation by itself. What is in flight is what one batch of sequences needs.
"""

from torch import Tensor

from comms.groups import make_closing_group
from modules.stage import Stage
from pipeline_parallel.decode import Decoder
from pipeline_parallel.engine import PipelineEngine
from training.compute.gradient import LEAST_DEPTH, link_to_neighbour, micro_batches_of, wire_codecs
from training.job.job import COLLECTIVE_TIMEOUT, Job


class ForwardOnly:
    """One rank's stage with its links. Links send hidden states as they are."""

    def __init__(self, job: Job, stage: Stage, *, batch_size: int, micro_batch_size: int, seq_length: int) -> None:
        """batch_size: sequences per replica and call of evaluate(), a multiple of micro_batch_size; micro_batch_size: those that a stage
        computes at once; seq_length: of all of them, in tokens."""
        assert batch_size % micro_batch_size == 0, "a batch is a whole number of micro-batches"
        self._job, self._stage = job, stage
        self._batch_size, self._micro_batch_size = batch_size, micro_batch_size
        self._device = next(stage.parameters()).device
        self._decoder: Decoder | None = None
        codecs = wire_codecs("none", "none", (micro_batch_size, seq_length, stage.config.width), self._device, stage.compute_dtype)
        previous, following = (
            link_to_neighbour(job.place, pair, codecs, self._device, job.peer_names, depth=LEAST_DEPTH, is_next=is_next)
            for pair, is_next in ((job.groups.to_previous, False), (job.groups.to_next, True))
        )
        self._links = [link for link in (previous, following) if link is not None]
        self._engine = PipelineEngine(stage=stage, previous=previous, following=following, spans=job.spans)

    def evaluate(self, tokens: Tensor) -> Tensor:
        """As GlobalGradient.evaluate: tokens (n, 3, T) int32 of this replica to (n,) float64, 0 but on the last stage. Raises PeerLost."""
        assert len(tokens) <= self._batch_size, f"{len(tokens)} sequences at once, where {self._batch_size} were said to come"
        return self._engine.evaluate(micro_batches_of(tokens, self._micro_batch_size, self._device)).flatten()

    def decoder(self, batch_size: int) -> Decoder:
        """As make_decoder; closed with this."""
        assert self._decoder is None, "one decoder, whose groups are made once"
        self._decoder = make_decoder(self._job, self._stage, batch_size)
        return self._decoder

    def close(self) -> None:
        """Nothing more will be computed."""
        for part in (*self._links, self._decoder):
            if part is not None:
                part.close()


def make_decoder(job: Job, stage: Stage, batch_size: int) -> Decoder:
    """Collective over all ranks, as it may make a group: the decoder of this rank's ``stage``. batch_size: sequences per replica that are
    under way at once."""
    with job.connections.recorded():
        closing_group = make_closing_group(job.place, job.groups, job.backend, COLLECTIVE_TIMEOUT, job.connect_timeout)
    job.watch_connections()
    return Decoder(
        place=job.place,
        groups=job.groups,
        closing_group=closing_group,
        stage=stage,
        spans=job.spans,
        peer_names=job.peer_names,
        batch_size=batch_size,
    )
