"""A link carries micro-batches between two neighbouring stages: activations one way, their gradients the other.

Why not plain send/recv: gloo is a rendezvous protocol, so a receive that is posted late exposes a round trip plus the transfer
for every micro-batch; one that was posted before exposes nothing. A link therefore posts receives ``depth`` ahead into reused
wire buffers and waits for its sends only at the end of the step.

Promises: messages arrive in the order of their index; ``take`` returns storage of its own (64-byte aligned, as bit-equality needs); a lost
neighbour raises PeerLost that names it. Left to others: what is sent, and when (pipeline_parallel/).

``Link`` is the interface; process groups are its first implementation and stay inside it.
"""

import re
from collections import deque
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class PeerLost(ConnectionError):
    """A neighbour does not answer any more. The text names it and what was awaited from it."""


class Link(Protocol):
    """Both directions between this stage and one neighbour. Message i of a step is micro-batch i of that step."""

    def post(self, num_messages: int) -> None:
        """Announce the step: ``num_messages`` will be taken. Called by both neighbours before the first message of a step."""

    def take(self, i: int) -> Tensor:
        """Message i from the neighbour, in storage of its own. Blocks until it is there."""

    def put(self, i: int, message: Tensor) -> None:
        """Send message i. Returns at once; ``message`` must not be written to before flush()."""

    def flush(self) -> None:
        """Wait until everything put so far has left. Called once at the end of a step."""

    def close(self) -> None:
        """Forget everything pending."""


class ProcessGroupLink:
    """A link over torch.distributed point-to-point, one process group per direction.

    shape, dtype: of every message in both directions. CUDA tensors over gloo are staged through pinned host memory.
    """

    def __init__(
        self,
        *,
        send_group: dist.ProcessGroup,
        recv_group: dist.ProcessGroup,
        peer: int,
        peer_in_words: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        depth: int,
    ) -> None:
        assert depth >= 1, "at least one receive must be posted"
        self._send_group, self._recv_group, self._peer, self._peer_in_words = send_group, recv_group, peer, peer_in_words
        self._device = device
        self._staged = device.type == "cuda" and dist.get_backend(recv_group) == "gloo"
        buffer_device = torch.device("cpu") if self._staged else device
        self._buffers = [torch.empty(shape, dtype=dtype, device=buffer_device, pin_memory=self._staged) for _ in range(depth)]
        self._receives: deque[tuple[int, dist.Work]] = deque()
        self._sends: list[tuple[int, dist.Work, Tensor]] = []  # the tensor stays referenced until its Work was waited for
        self._num_messages = self._next_post = 0

    def post(self, num_messages: int) -> None:
        assert not self._receives, "the messages of the step before were not all taken"
        self._num_messages, self._next_post = num_messages, 0
        for _ in range(min(len(self._buffers), num_messages)):
            self._post_next()

    def _post_next(self) -> None:
        i = self._next_post
        buffer = self._buffers[i % len(self._buffers)]
        with self._naming_the_peer(f"posting the receive of micro-batch {i} from"):
            work = dist.irecv(buffer, src=self._peer, group=self._recv_group, tag=i)
        assert work is not None, "both neighbours are members of the link's group"
        self._receives.append((i, work))
        self._next_post += 1

    def take(self, i: int) -> Tensor:
        expected, work = self._receives.popleft()
        assert expected == i, f"messages are taken in order: next is {expected}, not {i}"
        with self._naming_the_peer(f"waiting for micro-batch {i} from"):
            work.wait()
        buffer = self._buffers[i % len(self._buffers)]
        message = buffer.to(self._device) if self._staged else buffer.clone()
        if self._next_post < self._num_messages:
            self._post_next()
        return message

    def put(self, i: int, message: Tensor) -> None:
        message = message.detach().contiguous()
        if self._staged:
            message = message.cpu()
        with self._naming_the_peer(f"sending micro-batch {i} to"):
            work = dist.isend(message, dst=self._peer, group=self._send_group, tag=i)
        assert work is not None, "both neighbours are members of the link's group"
        self._sends.append((i, work, message))

    def flush(self) -> None:
        for i, work, _ in self._sends:
            with self._naming_the_peer(f"sending micro-batch {i} to"):
                work.wait()
        self._sends.clear()

    def close(self) -> None:
        self._receives.clear()
        self._sends.clear()

    def _naming_the_peer(self, doing: str) -> "naming_the_peer":
        return naming_the_peer(f"{doing} {self._peer_in_words}")


class naming_the_peer:  # noqa: N801 - used as a context manager function, a class so that the hot path makes no generator
    """Turn torch.distributed's nameless RuntimeError inside the block into PeerLost that says who and what."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            cause = re.sub(r"^\[[^\]]*\] ?", "", str(error).splitlines()[0])  # less the path of the source file it was compiled from
            raise PeerLost(f"the exchange failed while {self._doing}: {cause}") from error
