"""The sockets under the process groups, so that a rank which waits in one of them can be woken.

A wait in gloo knows no interruption: abort() of a group leaves it waiting (torch 2.13), and its own time-out is that of the longest save.
What ends it at once is the end of its connection, as if the peer had died. So the sockets that come into being while groups are made are
remembered, and break_all() shuts them down. Linux only, as /proc is.

gloo's listeners stay open for the whole job and take whoever connects: each stranger costs a descriptor that is never given back, and where
they run out gloo ends the process. So once the groups are made their listeners answer nobody any more.

gloo closes its end of a connection that has ended, and tells whoever waits for a message on it, unless the message had begun to travel. So
has_lost_one() looks for sockets that are there no more."""

import contextlib
import ctypes
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

_T = TypeVar("_T")

_GREETING_BYTES = 8  # of gloo, which drops a stranger that has sent less and holds on to one that has sent another
_BYTES_AT = struct.Struct("=120xQQ")  # in struct tcp_info of linux/tcp.h: tcpi_bytes_acked, tcpi_bytes_received
_KEEP_ALIVE_PROBES = 60
_SO_ATTACH_FILTER = 26  # of Linux; the socket module has no name for it
_BPF_RETURN_CONSTANT = 0x06  # of linux/filter.h: BPF_RET | BPF_K


class Connections:
    """Of one meeting. Not for groups that are made on two threads at once. of_gloo: whether the groups are gloo's, which has made all its
    connections when recorded() ends, so that its listeners may turn strangers away; NCCL makes some later, and ends some."""

    def __init__(self, *, of_gloo: bool = False) -> None:
        self._of_gloo = of_gloo
        self._looking = threading.Lock()
        self._before: dict[int, list[int]] | None = None
        self._recorded: frozenset[int] = frozenset()
        self._of_groups: frozenset[int] = frozenset()  # of all that were made meanwhile, those that may be gloo's
        self._greeted: frozenset[int] = frozenset()  # those of them on which gloo has spoken
        self._is_broken = False

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Around the making of process groups."""
        self._before = own_sockets()
        # of the door, the store and its tunnel, where others connect meanwhile
        ports = {of_tcp(inode, at, _listening_port, 0) for inode, at in self._before.items()} - {0}
        try:
            yield
        finally:
            made = {inode: at for inode, at in own_sockets().items() if inode not in self._before}
            self._recorded |= frozenset(made)
            self._before = None
            if self._of_gloo:
                self._of_groups |= {inode for inode, at in made.items() if ports.isdisjoint(of_tcp(inode, at, _ports, ports))}
                self.has_lost_one()
                for inode, at in made.items():
                    of_tcp(inode, at, _outlast, None)
                    of_tcp(inode, at, _turn_strangers_away, None)
            if self._is_broken:
                self.break_all()

    def has_lost_one(self) -> bool:
        """Whether a connection of gloo's has ended: one on which it has spoken is there no more. Asked now and then, on any thread."""
        with self._looking:  # one that another thread finds meanwhile would be missing among those that are here
            try:
                here = own_sockets()
            except OSError:  # no descriptor is left to look with
                return False
            unknown = self._of_groups - self._greeted
            self._greeted |= {i for i in unknown if i in here and of_tcp(i, here[i], _bytes_exchanged, 0) >= _GREETING_BYTES}
            return not self._greeted <= here.keys()

    def break_all(self) -> None:
        """Shut every connection down; those of a group that is just being made, too. Any thread may call it, more than once."""
        self._is_broken = True
        before, recorded = self._before, self._recorded
        for inode, at in own_sockets().items():
            if inode in recorded or (before is not None and inode not in before):
                of_tcp(inode, at, _shut_down, None)


def own_sockets() -> dict[int, list[int]]:
    """inode -> descriptors of this process's sockets. The inode is a socket's own for as long as it lives; descriptors are used again."""
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            status = os.stat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found.setdefault(status.st_ino, []).append(int(name))
    return found


def keep_alive(connection: socket.socket, *, probes: int = 5) -> None:
    """Let the kernel probe a silent connection after 15 s and every 10 s: routers then do not forget it, and it ends when that many probes
    have gone unanswered."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", probes)):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def of_tcp(inode: int, at: list[int], act: Callable[[socket.socket, bool], _T], otherwise: _T) -> _T:
    """What ``act`` returns for the socket ``inode`` and whether it is a listener; ``otherwise`` where it is not TCP's, or has been closed.
    at: its descriptors a moment ago, of which some may stand for another one now."""
    for descriptor in at:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as copy:
            is_tcp = copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM
            if is_tcp and os.fstat(copy.fileno()).st_ino == inode:
                return act(copy, bool(copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)))
    return otherwise


def _shut_down(connection: socket.socket, is_listener: bool) -> None:
    if not is_listener:  # gloo ends the process over a broken one
        connection.shutdown(socket.SHUT_RDWR)


def _ports(connection: socket.socket, is_listener: bool) -> frozenset[int]:
    """At both ends."""
    return frozenset((connection.getsockname()[1], 0 if is_listener else connection.getpeername()[1]))


def _listening_port(connection: socket.socket, is_listener: bool) -> int:
    return int(connection.getsockname()[1]) if is_listener else 0


def _bytes_exchanged(connection: socket.socket, is_listener: bool) -> int:
    if is_listener:
        return 0
    state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_AT.size)
    return sum(_BYTES_AT.unpack(state)) if len(state) == _BYTES_AT.size else 0


def _outlast(connection: socket.socket, is_listener: bool) -> None:
    """Nobody speaks on a connection of gloo for minutes, and a router between must not forget it; how long a cut may last is for others to
    decide, who notice sooner."""
    if not is_listener:
        keep_alive(connection, probes=_KEEP_ALIVE_PROBES)


def _turn_strangers_away(connection: socket.socket, is_listener: bool) -> None:
    """Let the kernel drop what comes to a listener, unanswered. Connections that were made stay as they are."""
    if is_listener:
        instruction = ctypes.create_string_buffer(struct.pack("=HBBI", _BPF_RETURN_CONSTANT, 0, 0, 0))  # keep 0 bytes of every packet
        program = struct.pack("@HP", 1, ctypes.addressof(instruction))  # struct sock_fprog: how many, where
        connection.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
