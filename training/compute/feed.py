"""Token ids on their way from the one reader to every rank, one optimizer step ahead.

Rank 0 alone reads data, so files are needed on one host and the order of sequences does not depend on the grid. While step n
computes, those of step n + 1 travel (24 KB per 2048 tokens), to every stage: the first needs ids, the last targets, all of them
where documents begin.

An optimizer step is A*R shares of N sequences, dealt to the replicas in turn: sequence i is in share i // N, which belongs to replica
(i // N) % R. Where the job goes on with fewer replicas than R, the same shares are dealt to those, some of which then get one more.

Legend: A accumulation steps, R replicas the job was started with, N sequences of a replica's batch, T tokens, S shares of one replica.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from comms.links import naming_the_peer
from comms.place import Place
from comms.transport import wait_for
from tasks.packing import NUM_PLANES
from tasks.prefetch import StepReader
from user_error import UserError

HEADER_INTS = 1  # number of targets of the global step; 0: the data ends here


@dataclass(frozen=True, kw_only=True)
class StepFeed:
    """One replica's share of an optimizer step. num_targets counts the whole global batch; the rest is rank 0's: the state of the data
    behind this step, the sha256 of its tokens in their order over the whole global batch, seconds waited."""

    tokens: Tensor  # (S, N, 3, T) int32 on the CPU: ids, positions, targets (see tasks/packing.py)
    num_targets: int
    state: dict[str, Any] | None
    sha256: str | None
    data_wait_s: float
    whole: np.ndarray | None = None  # on rank 0: the global batch in the order of the data, (A*R*N, 3, T) int32


class TokenFeed:
    """Call order: start(), then next() once per step, on all ranks alike."""

    def __init__(
        self,
        *,
        place: Place,
        group: dist.ProcessGroup,
        reader: StepReader | None,
        shape: tuple[int, int, int],
        num_steps: int,
        device: torch.device,
    ) -> None:
        """shape: (A*R, N, T). num_steps: optimizer steps still to come. reader: on rank 0."""
        assert (reader is not None) == (place.rank == 0), "rank 0, and only it, reads"
        self._place, self._group, self._reader, self._shape = place, group, reader, shape
        self._steps_left = num_steps
        self._wire_device = device if dist.get_backend(group) == "nccl" else torch.device("cpu")
        self._coming: Callable[[], StepFeed] | None = None
        self.error: UserError | None = None  # on rank 0: why the data ended

    def start(self) -> None:
        """Set the next step on its way: sent by rank 0, awaited by the others. Called once; next() does so from then on."""
        self._steps_left -= 1
        self._coming = self._send() if self._reader is not None else self._receive()

    def next(self) -> StepFeed | None:
        """The step that is due; the one after it is sent meanwhile. None, on all ranks, if the data cannot go on (``error`` on rank
        0 says why).
        """
        assert self._coming is not None, "start() comes first"
        due = self._coming()
        if due.num_targets == 0:
            self._coming = None
            return None
        if self._steps_left > 0:
            self.start()
        return due

    def _send(self) -> Callable[[], StepFeed]:
        assert self._reader is not None, "only rank 0 sends"
        num_shares, n, t = self._shape
        try:
            step = self._reader.next()
            tokens, num_targets, state, wait = step.tokens, step.num_targets, step.state, step.data_wait_s
            if num_targets == 0:
                raise UserError(
                    "an optimizer step needs at least one target token; no document of this one has any. Give longer texts, or "
                    "completions that the sequences are long enough to reach"
                )
        except UserError as error:
            self.error = error
            tokens, num_targets, state, wait = np.zeros((num_shares * n, NUM_PLANES, t), np.int32), 0, None, 0.0
        shares = torch.from_numpy(tokens).view(num_shares, n, NUM_PLANES, t)
        sends = []
        for rank in range(1, self._place.world_size):
            dealt = shares[self._place.at(rank).dp :: self._place.dp_size].reshape(-1)
            message = torch.cat([torch.tensor([num_targets], dtype=torch.int32), dealt])
            message = message.to(self._wire_device)
            with naming_the_peer(f"sending tokens to rank {rank}"):
                sends.append((dist.isend(message, dst=rank, group=self._group), message))
        sha256 = hashlib.sha256(tokens.tobytes()).hexdigest()
        own = StepFeed(
            tokens=shares[:: self._place.dp_size].contiguous(),
            num_targets=num_targets,
            state=state,
            sha256=sha256,
            whole=tokens,
            data_wait_s=wait,
        )

        def wait_until_sent() -> StepFeed:
            with naming_the_peer("sending tokens to the other ranks"):
                for work, _ in sends:
                    wait_for(work, self._group)
            return own

        return wait_until_sent

    def _receive(self) -> Callable[[], StepFeed]:
        num_shares, n, t = self._shape
        num_own = len(range(self._place.dp, num_shares, self._place.dp_size))
        message = torch.empty(HEADER_INTS + num_own * n * NUM_PLANES * t, dtype=torch.int32, device=self._wire_device)
        with naming_the_peer("asking rank 0 for tokens"):
            work = dist.irecv(message, src=0, group=self._group)

        def wait_until_here() -> StepFeed:
            with naming_the_peer("waiting for tokens from rank 0"):
                wait_for(work, self._group)
            here = message.cpu()
            tokens = here[HEADER_INTS:].view(num_own, n, NUM_PLANES, t)
            return StepFeed(tokens=tokens, num_targets=int(here[0]), state=None, sha256=None, data_wait_s=0.0)

        return wait_until_here
