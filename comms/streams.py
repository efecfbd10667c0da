"""Copies between a device and pinned host memory beside the computation, for messages that travel over the host (CUDA over gloo).

On a CPU there is nothing to copy and nothing to wait for; both kinds have the same two calls, so that a link is written once.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


def _nothing_to_wait_for() -> None:
    return None


class CopyStreams(Protocol):
    """Moves flat uint8 messages. Every call returns at once, with a function that blocks the host until the source may be reused
    (to_device) or the result may be read (to_host)."""

    def to_host(self, message: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """The message in host memory, ordered behind the work already given to the current stream."""

    def to_device(self, message: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """The message on the device; work given to the current stream from now on sees it."""


class NoCopies:
    """The device is the host: messages are handed through."""

    def to_host(self, message: Tensor) -> tuple[Tensor, Callable[[], None]]:
        return message, _nothing_to_wait_for

    def to_device(self, message: Tensor) -> tuple[Tensor, Callable[[], None]]:
        return message, _nothing_to_wait_for


class SideStreams:
    """One CUDA stream per direction, so that neither copy waits for the other or for the computation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_host(self, message: Tensor) -> tuple[Tensor, Callable[[], None]]:
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        on_host = torch.empty(message.shape, dtype=message.dtype, pin_memory=True)  # from torch's cache of pinned blocks
        with torch.cuda.stream(self._out):
            on_host.copy_(message, non_blocking=True)
            done = self._out.record_event()
        message.record_stream(self._out)
        return on_host, done.synchronize

    def to_device(self, message: Tensor) -> tuple[Tensor, Callable[[], None]]:
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._in):
            on_device = torch.empty(message.shape, dtype=message.dtype, device=self._device)  # a block of the side stream's own
            on_device.copy_(message, non_blocking=True)
            done = self._in.record_event()
        on_device.record_stream(current)
        current.wait_event(done)
        return on_device, done.synchronize


def copy_streams(device: torch.device) -> CopyStreams:
    """What a link over the host needs on ``device``."""
    return SideStreams(device) if device.type == "cuda" else NoCopies()
