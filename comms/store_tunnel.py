"""torch's TCPStore behind the door: it listens on 127.0.0.1 alone, and what reaches it has answered the challenge.

TCPStore left to itself looks up the name of every client (seconds each with a slow resolver, during which nobody else is served) and lets
anybody read, set and delete keys. So on rank 0 the hub hands connections on to it that have proved to know the secret, and on every rank
the client talks to a tunnel of its own process that does the proving::

    TCPStore client -> 127.0.0.1: tunnel (this file) == network, rank 0's door ==> hub -> 127.0.0.1: TCPStore

The tunnel takes connections of its own process only. Closing it wakes whatever waits in the store, with an error."""

import asyncio
import contextlib
import ctypes
import functools
import socket
import threading
from datetime import timedelta

import torch.distributed as dist

from comms.connections import of_tcp, own_sockets
from comms.deadlines import Deadlines
from comms.handshake import MAX_LINE_BYTES, Reply
from comms.secret import Secret
from comms.transport import NO_LIMIT

LOOPBACK = "127.0.0.1"
PIECE_BYTES = 2**16


@functools.cache
def _look_up_once() -> None:
    """torch asks the resolver for the name behind the first store connection of a process, ::ffff:127.0.0.1, and waits for it: 5 s and more
    where nobody answers. So a thread of this process makes the first one, and has no name servers."""

    def make() -> None:
        libc = ctypes.CDLL(None)
        libc.__res_state.restype = ctypes.c_void_p
        libc.__res_init()
        # struct __res_state of resolv.h, each thread's own: int retrans, retry; unsigned long options; int nscount; ...
        (ctypes.c_int * 5).from_address(libc.__res_state())[4] = 0
        _serve(timedelta(seconds=1))

    if hasattr(ctypes.CDLL(None), "__res_state"):  # glibc
        thread = threading.Thread(target=make, name="look-up", daemon=True)
        thread.start()
        thread.join()


def serve_store(timeout: timedelta) -> dist.TCPStore:
    """On rank 0: the server, at a free port (``.port``) of 127.0.0.1 and nowhere else."""
    _look_up_once()
    return _serve(timeout)


def _serve(timeout: timedelta) -> dist.TCPStore:
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach())


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    """On rank 0: bytes both ways between a peer and the store at ``port``, until either ends. Raises OSError."""
    store_reader, store_writer = await asyncio.open_connection(LOOPBACK, port)
    await _both_ways(reader, writer, store_reader, store_writer)


class StoreTunnel:
    """On every rank, from construction to close(): a local port whose connections end in rank 0's store."""

    def __init__(self, door: tuple[str, int], secret: Secret, who: str, deadlines: Deadlines) -> None:
        self.deadlines = deadlines
        self._door, self._secret, self._who = door, secret, who
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port = int(self._listener.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._run, name="store-tunnel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all connections; may be called from any thread, more than once."""
        with contextlib.suppress(RuntimeError):  # closed already
            self._loop.call_soon_threadsafe(self._stop.set)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._serve_one, sock=self._listener)
        await self._stop.wait()
        server.close()
        for writer in list(self._open):
            writer.transport.abort()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if not _is_of_this_process(writer.get_extra_info("peername")):
                return
            far_reader, far_writer = await asyncio.wait_for(self._let_in(), self.deadlines.handshake_s)
            await _both_ways(reader, writer, far_reader, far_writer)
        except (OSError, ValueError, asyncio.TimeoutError, asyncio.CancelledError):
            pass  # the client sees its connection end, and its caller asks the lifeline why
        finally:
            self._open.discard(writer)
            writer.close()

    async def _let_in(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that ends in the store. Raises OSError, ValueError."""
        reader, writer = await asyncio.open_connection(*self._door, limit=MAX_LINE_BYTES)
        try:
            reply = Reply(self._secret, "store", self._who, await reader.readline())
            writer.write(reply.line)
            if reply.session(await reader.readline()) is None:
                raise ValueError("the door does not know this job's secret, or does not let this side in")
        except BaseException:
            writer.close()
            raise
        self._open.add(writer)
        return reader, writer


def join_store(tunnel: StoreTunnel) -> dist.TCPStore:
    """A client of rank 0's store. Raises torch's DistError when it does not answer within deadlines.answer_s: that is how long a client
    tries in vain to reach a tunnel that was closed under it. What it asks for afterwards it waits for without a limit, until the tunnel
    is closed."""
    _look_up_once()
    answer = timedelta(seconds=tunnel.deadlines.answer_s)
    store = dist.TCPStore(LOOPBACK, tunnel.port, is_master=False, wait_for_workers=False, timeout=answer)
    store.set_timeout(NO_LIMIT)
    return store


def another_connection(store: dist.Store, deadlines: Deadlines) -> dist.Store:
    """To the same store, for another thread. Raises torch's DistError as join_store() does."""
    store.set_timeout(timedelta(seconds=deadlines.answer_s))  # which the copy inherits, for its connection too
    try:
        own = store.clone()  # type: ignore[attr-defined]
    finally:
        store.set_timeout(NO_LIMIT)
    own.set_timeout(NO_LIMIT)
    return own


def _is_of_this_process(peer: tuple[str, int]) -> bool:
    """Asks this process's own sockets: reading the system's table of all takes so long that somebody who calls without end would keep this
    process's own clients waiting."""
    host, port = peer[:2]

    def is_peer(connection: socket.socket, is_listener: bool) -> bool:
        own = connection.getsockname()
        return bool(own[1] == port and own[0].removeprefix("::ffff:") == host)  # torch's sockets may be of IPv6

    return any(of_tcp(inode, at, is_peer, False) for inode, at in own_sockets().items())


async def _both_ways(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, far_reader: asyncio.StreamReader, far_writer: asyncio.StreamWriter
) -> None:
    """Until one side ends; then both are closed."""
    there, back = asyncio.create_task(_pump(reader, far_writer)), asyncio.create_task(_pump(far_reader, writer))
    try:
        await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (there, back):
            task.cancel()
        await asyncio.gather(there, back, return_exceptions=True)
        far_writer.close()
        writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(PIECE_BYTES):
        writer.write(piece)
        await writer.drain()
