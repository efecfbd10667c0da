"""The sockets under the process groups, so that a rank which waits in one of them can be woken.

A wait in gloo knows no interruption: abort() of a group leaves it waiting (torch 2.13), and its own time-out is that of the longest save.
What ends it at once is the end of its connection, as if the peer had died. So the sockets that come into being while groups are made are
remembered, and break_all() shuts them down. Linux only, as /proc is.

gloo's listeners stay open for the whole job and take whoever connects: each stranger costs a descriptor that is never given back, and where
they run out gloo ends the process. So once the groups are made their listeners answer nobody any more.

gloo closes its end of a connection that has ended, and tells whoever waits for a message on it, unless the message had begun to travel. So
has_lost_one() looks for sockets that are there no more. It looks only at connections of which another rank has recorded the other end: what
some library opens and closes meanwhile is never taken for a lost link. And gloo itself closes none while it is in use, for no wait of ours
has a time limit that could pass (transport.py)."""

import contextlib
import ctypes
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")

_KEEP_ALIVE_PROBES = 60
_SO_ATTACH_FILTER = 26  # of Linux; the socket module has no name for it
_BPF_RETURN_CONSTANT = 0x06  # of linux/filter.h: BPF_RET | BPF_K


class Connections:
    """Of one meeting. Not for groups that are made on two threads at once. of_gloo: whether the groups are gloo's, which has made all its
    connections when recorded() ends, so that its listeners may turn strangers away; NCCL makes some later, and ends some."""

    def __init__(self, *, of_gloo: bool = False) -> None:
        self._of_gloo = of_gloo
        self._before: dict[int, list[int]] | None = None
        self._recorded: frozenset[int] = frozenset()
        self._ends: dict[int, tuple[str, str]] = {}  # of what may be gloo's: own address and the other one
        self._between_ranks: frozenset[int] = frozenset()
        self._is_broken = False
        self.num_recorded = 0

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
            self.num_recorded += 1
            if self._of_gloo:
                for inode, at in made.items():
                    if (ends := of_tcp(inode, at, _ends, None)) and ports.isdisjoint(of_tcp(inode, at, _ports, ports)):
                        self._ends[inode] = ends
                    of_tcp(inode, at, _outlast, None)
                    of_tcp(inode, at, _turn_strangers_away, None)
            if self._is_broken:
                self.break_all()

    @property
    def ends(self) -> list[tuple[str, str]]:
        """Both addresses of every connection that may be one between ranks, the own one first: what the other ranks are told."""
        return list(self._ends.values())

    def watch(self, ends_of_others: Iterable[Iterable[Sequence[str]]]) -> None:
        """From now on has_lost_one() looks at those whose other end is among the ``ends`` of another rank. A connection that was translated
        on its way is not among them: its end is noticed by whoever uses it, and by nobody else."""
        others = {(theirs, own) for ends in ends_of_others for own, theirs in ends}
        self._between_ranks |= {inode for inode, ends in self._ends.items() if ends in others}

    def has_lost_one(self) -> bool:
        """Whether a connection between this rank and another has ended: its socket is there no more. Asked now and then, on any thread."""
        try:
            return not self._between_ranks <= own_sockets().keys()
        except OSError:  # no descriptor is left to look with
            return False

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


def _ends(connection: socket.socket, is_listener: bool) -> tuple[str, str] | None:
    return None if is_listener else (_in_words(connection.getsockname()), _in_words(connection.getpeername()))


def _in_words(address: tuple[Any, ...]) -> str:
    """Of an IPv4 address in the form of IPv6 the former, and without a scope, which each host counts for itself."""
    return f"{str(address[0]).removeprefix('::ffff:').partition('%')[0]}:{address[1]}"


def _listening_port(connection: socket.socket, is_listener: bool) -> int:
    return int(connection.getsockname()[1]) if is_listener else 0


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
