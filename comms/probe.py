"""How long a message takes between two neighbours, measured once at the start, with what the engine will use.

The schedule wants to know: a link whose round trip takes as long as k micro-batches needs k more of them in flight.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from comms.links import naming_the_peer
from comms.transport import Transport

NUM_ROUNDS = 4  # the first also wakes the connection up
ROUND_TRIPS = 2 * NUM_ROUNDS  # small messages, then full ones
SMALL_BYTES = 64
MOST_BYTES = 4 * 2**20  # of a timed message; what is larger is extrapolated


@dataclass(frozen=True, kw_only=True)
class LinkTimes:
    """Seconds, the best of NUM_ROUNDS. latency_s: one way; transfer_s: what an activation and its gradient take beyond that, together."""

    latency_s: float
    transfer_s: float


def time_link(
    transport: Transport,
    *,
    leads: bool,
    num_bytes: tuple[int, int],
    device: torch.device,
    peer_in_words: str,
    progress: Callable[[int], object] = lambda num_round_trips: None,
) -> LinkTimes:
    """Called by both neighbours at the same time; ``leads`` on the one nearer to the embeddings, whose clock counts.

    num_bytes: of an activation, which goes out, and of a gradient, which comes back. progress: hears of every one of the ROUND_TRIPS.
    Raises PeerLost."""

    def round_trip(sizes: tuple[int, ...]) -> float:
        seconds = _round_trip(transport, leads, sizes, device)
        progress(1)
        return seconds

    share = min(1.0, MOST_BYTES / max(num_bytes))
    small, full = (SMALL_BYTES, SMALL_BYTES), tuple(max(SMALL_BYTES, int(n * share)) for n in num_bytes)
    with naming_the_peer(f"measuring the link to {peer_in_words}"):
        empty = min(round_trip(small) for _ in range(NUM_ROUNDS))
        filled = min(round_trip(full) for _ in range(NUM_ROUNDS))
    return LinkTimes(latency_s=empty / 2, transfer_s=max(0.0, filled - empty) / share)


def _round_trip(transport: Transport, leads: bool, num_bytes: tuple[int, ...], device: torch.device) -> float:
    there, back = num_bytes if leads else num_bytes[::-1]
    inbox = transport.buffer(back)  # held until the message is in it
    answer = transport.receive(inbox, 0)
    message = torch.zeros(there, dtype=torch.uint8, device=device)
    started = time.perf_counter()
    if not leads:
        answer.result()
    sent = transport.send(message, 0)
    if leads:
        answer.result()
    sent.result()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
