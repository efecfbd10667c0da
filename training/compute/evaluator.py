"""Sequences and prompts of rank 0 through the stages of all ranks, and what came of them back: the common ground of evaluations inside a
training (evaluation/during_training.py) and of dist_clm_eval.py (evaluation/command.py).

Sequences go to all ranks in batches of the shape that the stages are made for; their losses come back in one reduction, in the order in
which they were given, and so are the same numbers on every rank and at every cut. Prompts are dealt to the replicas in turn. No random
number is drawn and no gradient touched.

Legend: R replicas, N sequences of a replica's batch, T tokens, P prompts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from comms.links import naming_the_peer
from comms.transport import wait_for
from modules.lm_ops import IGNORED_TARGET
from pipeline_parallel.decode import Generated
from tasks.packing import num_targets
from training.job.job import Job

HEADER_INTS = 4  # number of dimensions, then up to three sizes


class Stages(Protocol):
    """One rank's running stage: GlobalGradient while training, ForwardOnly elsewhere."""

    def evaluate(self, tokens: Tensor) -> Tensor:
        """tokens (N, 3, T) int32 of this replica to (N,) float64: -log p of each sequence's targets, added up; 0 but on the last stage."""


class Generator(Protocol):
    """pipeline_parallel.decode.Decoder."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | None,
        *,
        max_new_tokens: int,
        eos_token_id: int,
        progress: Callable[[int], object] = lambda num_tokens: None,
    ) -> list[Generated] | None:
        """See there."""


class Evaluator:
    """Called by all ranks alike; what is evaluated is given on rank 0 and None elsewhere."""

    def __init__(self, job: Job, stages: Stages, generator: Generator | None, *, batch_size: int) -> None:
        """batch_size: N, a multiple of the micro-batch. generator: where answers will be wanted."""
        self._place, self._spans = job.place, job.spans
        self._stages, self._generator, self._batch_size = stages, generator, batch_size
        self._device = job.device if job.backend == "nccl" else torch.device("cpu")

    def losses(self, sequences: Iterable[np.ndarray] | None, *, on_progress: Callable[[int], object] | None = None) -> Tensor:
        """Of every (3, T) int32 sequence the sum of -log p over its targets: (number of sequences,) float64, alike on all ranks.
        on_progress is called with the number of sequences done."""
        batches = self._batches(sequences) if sequences is not None else None
        own = slice(self._place.dp * self._batch_size, (self._place.dp + 1) * self._batch_size)
        found: list[Tensor] = []
        while True:
            batch, num = self._next(batches)
            if not num:
                break
            with self._spans.span("evaluating"):
                losses = torch.zeros(len(batch), dtype=torch.float64)
                losses[own] = self._stages.evaluate(torch.from_numpy(batch[own])).cpu()
            found.append(losses[:num])
            if on_progress is not None:
                on_progress(num)
        return self._add_up(torch.cat(found)) if found else torch.zeros(0, dtype=torch.float64)

    def mean_loss(self, sequences: Iterable[np.ndarray] | None, *, on_progress: Callable[[int], object] | None = None) -> tuple[float, int]:
        """Of all targets of (3, T) int32 sequences the mean of -log p in nats, and how many there are; alike on all ranks. As losses()."""
        total = 0

        def counted(given: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
            nonlocal total
            for planes in given:
                total += num_targets(planes[2])
                yield planes

        losses = self.losses(None if sequences is None else counted(sequences), on_progress=on_progress)
        total = self.agree(total)
        return math.fsum(losses.tolist()) / max(1, total), total

    def answers(
        self,
        prompts: Sequence[Sequence[int]] | None,
        *,
        max_new_tokens: int,
        eos_token_id: int,
        on_progress: Callable[[int], object] = lambda num_tokens: None,
    ) -> list[Generated]:
        """The greedy continuation of every prompt, alike on all ranks. prompts: ids, at least one each. on_progress: hears of the tokens of
        this rank's prompts that are done, see tokens_of()."""
        assert self._generator is not None, "made without a generator"
        flat = None if prompts is None else np.array([token for prompt in prompts for token in prompt], dtype=np.int32)
        ids = self._share(flat)
        lengths = self._share(None if prompts is None else np.array([len(prompt) for prompt in prompts], dtype=np.int32)).tolist()
        eos_token_id = int(self._share(None if prompts is None else np.array([eos_token_id], dtype=np.int32))[0])
        all_prompts = [piece.tolist() for piece in np.split(ids, np.cumsum(lengths)[:-1])] if lengths else []
        own = list(range(self._place.dp, len(all_prompts), self._place.dp_size))
        tokens = torch.zeros(len(all_prompts), 2 + max_new_tokens, dtype=torch.int64)  # length, whether it ended, ids
        margins = torch.zeros(len(all_prompts), dtype=torch.float64)
        if own:
            given = [all_prompts[number] for number in own] if self._place.pp == 0 else None
            generated = self._generator.generate(given, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, progress=on_progress)
            for number, one in zip(own, generated or [], strict=False):
                tokens[number, 0], tokens[number, 1], margins[number] = len(one.ids), one.ended, one.margin
                tokens[number, 2 : 2 + len(one.ids)] = torch.tensor(one.ids, dtype=torch.int64)
        tokens, margins = self._add_up(tokens), self._add_up(margins)
        return [
            Generated(ids=row[2 : 2 + row[0]], ended=bool(row[1]), margin=margin)
            for row, margin in zip(tokens.tolist(), margins.tolist(), strict=True)
        ]

    def tokens_of(self, num_prompts: int, max_new_tokens: int) -> int:
        """How many tokens this rank generates of so many prompts, all ranks together."""
        return len(range(self._place.dp, num_prompts, self._place.dp_size)) * max_new_tokens

    def agree(self, number: int) -> int:
        """Collective: rank 0's number."""
        return int(self._broadcast(torch.tensor([number]))[0])

    def _batches(self, sequences: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
        """(R*N, 3, T) int32 each, the last one filled up with sequences that have no target; and how many of them were given."""
        size, remaining = self._place.dp_size * self._batch_size, iter(sequences)
        while batch := list(islice(remaining, size)):
            filler = batch[0].copy()
            filler[2] = IGNORED_TARGET
            yield np.stack([*batch, *[filler] * (size - len(batch))]), len(batch)

    def _next(self, batches: Iterator[tuple[np.ndarray, int]] | None) -> tuple[np.ndarray, int]:
        """Collective: rank 0's next batch and how many of it count; nothing and 0 behind the last one."""
        batch, num = (None, 0) if batches is None else next(batches, (np.empty((0, 0, 0), dtype=np.int32), 0))
        num = int(self._share(None if batches is None else np.array([num], dtype=np.int32))[0])
        return self._share(batch) if num else np.empty((0, 0, 0), dtype=np.int32), num

    def _share(self, array: np.ndarray | None) -> np.ndarray:
        """Collective over all ranks: rank 0's int32 array of up to 3 dimensions; ``array`` is None elsewhere."""
        header = torch.zeros(HEADER_INTS, dtype=torch.int64)
        if array is not None:
            header[: 1 + array.ndim] = torch.tensor([array.ndim, *array.shape])
        header = self._broadcast(header)
        shape = [int(size) for size in header[1 : 1 + int(header[0])]]
        values = torch.empty(shape, dtype=torch.int32) if array is None else torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
        return self._broadcast(values).numpy() if values.numel() else values.numpy()

    def _broadcast(self, values: Tensor) -> Tensor:
        on_wire = values.to(self._device)
        with naming_the_peer("sharing what is to be evaluated"):
            wait_for(dist.broadcast(on_wire, src=0, async_op=True))
        return on_wire.cpu()

    def _add_up(self, values: Tensor) -> Tensor:
        """Collective: the sum over ranks, of values that all but one rank leave 0, so that no rounding comes in."""
        on_wire = values.to(self._device)
        with naming_the_peer("adding up an evaluation"):
            wait_for(dist.all_reduce(on_wire, async_op=True))
        return on_wire.cpu()
