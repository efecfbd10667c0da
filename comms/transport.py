"""Messages between two ranks over torch.distributed: bytes in, bytes out, each with a handle that says when it is through.

gloo and nccl differ in all that matters here, and this file is the only place that knows. gloo: tags tell messages apart; the host
waits; a message's ``is_completed()`` never turns true before somebody waits, so a thread does; CUDA tensors travel through pinned
host memory. nccl: messages of a group run in the order they were issued; waiting is ordering streams, never the host.
"""

import contextlib
import ctypes
import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from comms.streams import copy_streams

# The heartbeat decides who is lost, never a time limit of a wait: a message of a slow rank, or on a slow link, takes as long as it takes.
NO_LIMIT = timedelta(days=30)


class Pending(Protocol):
    """A message under way (a concurrent.futures.Future is one)."""

    def done(self) -> bool:
        """True once it is through, or has failed."""

    def result(self) -> None:
        """Wait for it. Raises what it failed with; RuntimeError for a lost peer."""


class Transport(Protocol):
    """Sends and receives flat uint8 messages to and from one peer; message i of either direction carries tag i. max_depth: how many
    receives may be posted ahead with any use."""

    max_depth: int

    def buffer(self, num_bytes: int) -> Tensor:
        """Storage to receive into."""

    def receive(self, buffer: Tensor, i: int) -> Pending:
        """Ask for message i. Returns at once; ``buffer`` is not to be touched until it is through."""

    def send(self, message: Tensor, i: int) -> Pending:
        """Send message i. Returns at once; holds ``message``, which must not be written to, until it is through."""

    def on_device(self, buffer: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """A received message where the computation can read it, and a function that blocks until ``buffer`` may be used again."""

    def close(self) -> None:
        """Take nothing more. Does not wait."""


class _InOrder:
    """A thread that does what it is given, one after the other. A daemon: a wait that never ends must not keep the process alive."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], object], Future[None]] | None] = queue.SimpleQueue()
        self._open: dict[Future[None], None] = {}
        threading.Thread(target=self._run, name=name, daemon=True).start()
        with _threads_lock:
            _threads.add(self)

    def submit(self, job: Callable[[], object]) -> Pending:
        future: Future[None] = Future()
        self._open[future] = None
        self._jobs.put((job, future))
        return future

    def break_off(self) -> None:
        """Whoever waits for what was submitted waits no more. Called on any thread."""
        for future in list(self._open):
            with contextlib.suppress(InvalidStateError):  # it has just ended
                future.set_exception(RuntimeError("the connection was broken off"))

    def close(self) -> None:
        self._jobs.put(None)

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                job()
            except BaseException as error:  # whatever it is, raised again where the result is asked for: else that would wait for ever
                failure: BaseException | None = error
            else:
                failure = None
            with contextlib.suppress(InvalidStateError):  # it was broken off
                future.set_exception(failure) if failure is not None else future.set_result(None)
            self._open.pop(future, None)
            failure = None
            del item, job, future  # what was sent is freed now, not when the next job comes


_threads_lock = threading.Lock()
_threads: weakref.WeakSet[_InOrder] = weakref.WeakSet()  # of this process, which is in one job at a time, as torch.distributed is


def break_off_waits() -> None:
    """End every wait for a message, where connections have been shut down: gloo tells those who wait for a message that has not begun to
    come, or to go, and forgets those in the middle of one. Their threads stay behind, with what was under way."""
    with _threads_lock:
        threads = list(_threads)
    for thread in threads:
        thread.break_off()


def wait_without_limit(work: dist.Work | None, group: dist.ProcessGroup | None = None) -> None:
    """``work.wait()`` of an operation of ``group`` (None: of all), for as long as it takes.

    gloo has two time limits. Its collectives follow the one of the group (_set_pg_timeout). Its messages between two ranks keep the one
    with which the group was made, which is short (torch 2.13), and one that is over closes the connection. In NCCL a limit would make
    the host wait, where only the stream should.
    """
    group = group or dist.group.WORLD
    assert work is not None and group is not None, "this rank is a member of the group"
    if dist.get_backend(group) == "gloo":
        work.wait(NO_LIMIT)
    else:
        work.wait()


def wait_for(work: dist.Work | None, group: dist.ProcessGroup | None = None) -> None:
    """As wait_for_all(), for one; None: of the group of all."""
    group = group or dist.group.WORLD
    assert work is not None and group is not None, "this rank is a member of the group"
    wait_for_all({work: group})


def wait_for_all(works: Mapping[dist.Work, dist.ProcessGroup]) -> None:
    """``wait()`` for operations, each of its group, in this order; break_off_waits() ends it (with gloo). Raises what one of them failed
    with; RuntimeError for a lost peer."""

    def wait() -> None:
        for work, group in works.items():
            wait_without_limit(work, group)

    if all(work.is_completed() or dist.get_backend(group) != "gloo" for work, group in works.items()):
        wait()
        return
    thread = _InOrder("operations")
    try:
        thread.submit(wait).result()
    except RuntimeError:
        for work, group in works.items():
            if not work.is_completed():  # the destructor of its group would wait for it, for ever, at the end of the process too
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        raise
    finally:
        thread.close()


class GlooTransport:
    """Over the host's memory and network."""

    max_depth = 64

    def __init__(self, *, send_group: dist.ProcessGroup, recv_group: dist.ProcessGroup, peer: int, device: torch.device) -> None:
        self._send_group, self._recv_group, self._peer = send_group, recv_group, peer
        self._pinned = device.type == "cuda"
        self._streams = copy_streams(device)
        self._sender, self._watcher = _InOrder("sender"), _InOrder("watcher")

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def receive(self, buffer: Tensor, i: int) -> Pending:
        work = dist.irecv(buffer, src=self._peer, group=self._recv_group, tag=i)
        return self._watcher.submit(lambda: wait_without_limit(work, self._recv_group))

    def send(self, message: Tensor, i: int) -> Pending:
        on_host, copied = self._streams.to_host(message)

        def send_when_copied() -> None:
            copied()
            wait_without_limit(dist.isend(on_host, dst=self._peer, group=self._send_group, tag=i), self._send_group)

        return self._sender.submit(send_when_copied)

    def on_device(self, buffer: Tensor) -> tuple[Tensor, Callable[[], None]]:
        return self._streams.to_device(buffer)

    def close(self) -> None:
        self._sender.close()
        self._watcher.close()


class NcclTransport:
    """From GPU to GPU. Both ends issue the messages of a group in the same order, because each direction has a group of its own."""

    max_depth = 2  # one under way, one ready

    def __init__(self, *, send_group: dist.ProcessGroup, recv_group: dist.ProcessGroup, peer: int, device: torch.device) -> None:
        self._send_group, self._recv_group, self._peer, self._device = send_group, recv_group, peer, device

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def receive(self, buffer: Tensor, i: int) -> Pending:
        return _NcclPending(dist.irecv(buffer, src=self._peer, group=self._recv_group), buffer)

    def send(self, message: Tensor, i: int) -> Pending:
        return _NcclPending(dist.isend(message, dst=self._peer, group=self._send_group), message)

    def on_device(self, buffer: Tensor) -> tuple[Tensor, Callable[[], None]]:
        return buffer, lambda: None  # the next receive into it is ordered behind its readers by the streams

    def close(self) -> None:
        return None


class _NcclPending:
    """Keeps the tensor of a message alive until the message is through."""

    def __init__(self, work: dist.Work | None, message: Tensor) -> None:
        assert work is not None, "both neighbours are members of the group"
        self._work, self._message = work, message

    def done(self) -> bool:
        return self._work.is_completed()

    def result(self) -> None:
        self._work.wait()


def make_transport(*, send_group: dist.ProcessGroup, recv_group: dist.ProcessGroup, peer: int, device: torch.device) -> Transport:
    """The transport of these two groups, one per direction, whose members are this rank and ``peer``."""
    kind = NcclTransport if dist.get_backend(recv_group) == "nccl" else GlooTransport
    return kind(send_group=send_group, recv_group=recv_group, peer=peer, device=device)
