"""A link carries micro-batches between two neighbouring stages: activations one way, their gradients the other.

Why not plain send/recv: gloo is a rendezvous protocol, so a receive that is posted late exposes a round trip plus the transfer
for every micro-batch; one that was posted before exposes nothing. A link therefore posts receives ``depth`` ahead into reused
wire buffers and waits for its sends only at the end of the step.

Promises: messages arrive in the order of their index, each as one flat message in the codec of its direction; ``take`` returns storage of
its own (64-byte aligned, as bit-equality needs); a lost neighbour raises PeerLost that names it. Left to others: what is sent, and when
(pipeline_parallel/).

``Link`` is the interface; torch.distributed is its first implementation and stays inside comms/transport.py.
"""

import re
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from comms.codecs import Codec, relative_error_sums
from comms.transport import Pending, Transport

NUM_TAGS = 1024  # of a MessageStream; far more than it ever has under way


class PeerLost(ConnectionError):
    """A neighbour does not answer any more. The text names it and what was awaited from it."""


@dataclass(frozen=True, kw_only=True)
class WireStats:
    """What a link has sent. difference_square, square: sums over the sampled messages of (sent - meant)^2 and meant^2, float64; their
    ratio's square root is the relative error. Both are 0 where the codec changes nothing."""

    num_bytes: int = 0
    difference_square: float = 0.0
    square: float = 0.0


class Link(Protocol):
    """Both directions between this stage and one neighbour. Message i of a step is micro-batch i of that step."""

    def post(self, num_messages: int) -> None:
        """Announce the step: ``num_messages`` will be taken. Called by both neighbours before the first message of a step."""

    def is_here(self, i: int) -> bool:
        """Whether take(i), the next one, would return at once."""

    def take(self, i: int) -> Tensor:
        """Message i from the neighbour, in storage of its own. Blocks until it is there."""

    def put(self, i: int, message: Tensor) -> None:
        """Send message i. Returns at once; ``message`` must not be written to before flush()."""

    def flush(self) -> None:
        """Wait until everything put so far has left. Called once at the end of a step."""

    def pop_stats(self) -> WireStats:
        """What was sent since the last call."""

    def close(self) -> None:
        """Nothing is exchanged any more."""


class ProcessGroupLink:
    """A link over a transport, one codec per direction. depth: receives that are posted ahead."""

    def __init__(self, *, transport: Transport, send_codec: Codec, recv_codec: Codec, peer_in_words: str, depth: int) -> None:
        assert depth >= 1, "at least one receive must be posted"
        self._transport, self._send_codec, self._recv_codec = transport, send_codec, recv_codec
        self._peer_in_words = peer_in_words
        self._buffers = [transport.buffer(recv_codec.num_bytes) for _ in range(depth)]
        self._receives: deque[tuple[int, Pending]] = deque()
        self._sends: deque[tuple[int, Pending]] = deque()
        self._num_messages = self._next_post = 0
        self._stats = WireStats()

    def post(self, num_messages: int) -> None:
        assert not self._receives, "the messages of the step before were not all taken"
        self._num_messages, self._next_post = num_messages, 0
        for _ in range(min(len(self._buffers), num_messages)):
            self._post_next()

    def _post_next(self) -> None:
        i = self._next_post
        with self._naming_the_peer(f"posting the receive of micro-batch {i} from"):
            self._receives.append((i, self._transport.receive(self._buffer(i), i)))
        self._next_post += 1

    def _buffer(self, i: int) -> Tensor:
        return self._buffers[i % len(self._buffers)]

    def is_here(self, i: int) -> bool:
        expected, pending = self._receives[0]
        assert expected == i, f"messages are taken in order: next is {expected}, not {i}"
        return pending.done()

    def take(self, i: int) -> Tensor:
        expected, pending = self._receives.popleft()
        assert expected == i, f"messages are taken in order: next is {expected}, not {i}"
        with self._naming_the_peer(f"waiting for micro-batch {i} from"):
            pending.result()
        encoded, wait_until_read = self._transport.on_device(self._buffer(i))
        message = self._recv_codec.decode(encoded)
        wait_until_read()
        if self._next_post < self._num_messages:
            self._post_next()
        return message

    def put(self, i: int, message: Tensor) -> None:
        message = message.detach().contiguous()
        if self._send_codec.is_lossless:
            encoded = message.view(-1).view(torch.uint8)  # sent from where it lies
        else:
            encoded = torch.empty(self._send_codec.num_bytes, dtype=torch.uint8, device=message.device)
            self._send_codec.encode(message, encoded)
        self._count(i, message, encoded)
        while self._sends and self._sends[0][1].done():
            self._finish_send()
        with self._naming_the_peer(f"sending micro-batch {i} to"):
            self._sends.append((i, self._transport.send(encoded, i)))

    def flush(self) -> None:
        while self._sends:
            self._finish_send()

    def _finish_send(self) -> None:
        i, pending = self._sends.popleft()
        with self._naming_the_peer(f"sending micro-batch {i} to"):
            pending.result()

    def pop_stats(self) -> WireStats:
        stats, self._stats = self._stats, WireStats()
        return stats

    def _count(self, i: int, message: Tensor, encoded: Tensor) -> None:
        difference_square = square = 0.0
        if i == 0 and not self._send_codec.is_lossless:  # one message of a step tells; decoding all of them would cost time
            difference_square, square = relative_error_sums(message, self._send_codec.decode(encoded))
        self._stats = WireStats(
            num_bytes=self._stats.num_bytes + encoded.numel(),
            difference_square=self._stats.difference_square + difference_square,
            square=self._stats.square + square,
        )

    def close(self) -> None:
        self._receives.clear()
        self._sends.clear()
        self._transport.close()

    def _naming_the_peer(self, doing: str) -> "naming_the_peer":
        return naming_the_peer(f"{doing} {self._peer_in_words}")


class MessageStream:
    """One direction between this stage and another, for messages of unequal sizes: both ends know the size of each by themselves.

    The one end puts and flushes, the other posts, as early as it knows a size, and takes, in the order of the posts. Numbers go round, so
    that gloo's tables of tags stay small; messages of a number overtake each other neither there nor in nccl.
    """

    def __init__(self, transport: Transport, peer_in_words: str) -> None:
        self._transport, self._peer_in_words = transport, peer_in_words
        self._receives: deque[tuple[Tensor, Pending]] = deque()
        self._sends: deque[Pending] = deque()
        self._num_posted = self._num_put = 0

    def post(self, num_bytes: int) -> None:
        """Ask for the next message."""
        buffer = self._transport.buffer(num_bytes)
        with naming_the_peer(f"posting a receive from {self._peer_in_words}"):
            self._receives.append((buffer, self._transport.receive(buffer, self._num_posted % NUM_TAGS)))
        self._num_posted += 1

    def take(self) -> Tensor:
        """The next message that was posted, uint8, in storage of its own, on the transport's device. Blocks until it is there."""
        buffer, pending = self._receives.popleft()
        with naming_the_peer(f"waiting for a message from {self._peer_in_words}"):
            pending.result()
        message, wait_until_read = self._transport.on_device(buffer)
        wait_until_read()
        return message

    def put(self, message: Tensor) -> None:
        """Send all bytes of ``message``. Returns at once; it must not be written to before flush()."""
        while self._sends and self._sends[0].done():
            self._finish_send()
        with naming_the_peer(f"sending a message to {self._peer_in_words}"):
            self._sends.append(self._transport.send(message.contiguous().view(-1).view(torch.uint8), self._num_put % NUM_TAGS))
        self._num_put += 1

    def flush(self) -> None:
        """Wait until everything put so far has left."""
        while self._sends:
            self._finish_send()

    def close(self) -> None:
        """Nothing is exchanged any more."""
        self._receives.clear()
        self._sends.clear()
        self._transport.close()

    def _finish_send(self) -> None:
        with naming_the_peer(f"sending a message to {self._peer_in_words}"):
            self._sends.popleft().result()


class naming_the_peer:  # noqa: N801 - used as a context manager function, a class so that the hot path makes no generator
    """Turn torch.distributed's nameless RuntimeError inside the block into PeerLost that says who and what."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            cause = re.sub(r"^\[[^\]]*\] ?", "", str(error).splitlines()[0])  # less the path of the source file it was compiled from
            cause = cause.partition(". This is typically")[0]  # gloo's advice is to look at the other rank, which we name
            raise PeerLost(f"the exchange failed while {self._doing}: {cause}") from error
