"""The sockets under the process groups, so that a rank which waits in one of them can be woken.

A wait in gloo knows no interruption: abort() of a group leaves it waiting (torch 2.13), and its own time-out is that of the longest save.
What ends it at once is the end of its connection, as if the peer had died. So the sockets that come into being while groups are made are
remembered, and break_all() shuts them down. Linux only, as /proc is.

gloo's listeners stay open for the whole job and take whoever connects: each stranger costs a descriptor that is never given back, and where
they run out gloo ends the process. So once the groups are made their listeners answer nobody any more."""

import contextlib
import ctypes
import os
import socket
import stat
import struct
from collections.abc import Iterator

_SO_ATTACH_FILTER = 26  # of Linux; the socket module has no name for it
_BPF_RETURN_CONSTANT = 0x06  # of linux/filter.h: BPF_RET | BPF_K


class Connections:
    """Of one meeting. Not for groups that are made on two threads at once. turns_strangers_away: whether the listeners of groups answer
    nobody once recorded() ends; for gloo, which has made all its connections by then, and not for NCCL, which makes some later."""

    def __init__(self, *, turns_strangers_away: bool = False) -> None:
        self._turns_strangers_away = turns_strangers_away
        self._before: frozenset[int] | None = None
        self._recorded: frozenset[int] = frozenset()
        self._is_broken = False

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Around the making of process groups."""
        self._before = frozenset(own_sockets())
        try:
            yield
        finally:
            made = {inode: descriptor for inode, descriptor in own_sockets().items() if inode not in self._before}
            self._recorded |= frozenset(made)
            self._before = None
            if self._turns_strangers_away:
                for descriptor in made.values():
                    _turn_strangers_away(descriptor)
            if self._is_broken:
                self.break_all()

    def break_all(self) -> None:
        """Shut every connection down; those of a group that is just being made, too. Any thread may call it, more than once."""
        self._is_broken = True
        before, recorded = self._before, self._recorded
        for inode, descriptor in own_sockets().items():
            if inode in recorded or (before is not None and inode not in before):
                _shut_down(descriptor)


def own_sockets() -> dict[int, int]:
    """inode -> descriptor of this process's sockets. The inode is a socket's own for as long as it lives; descriptors are used again."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            status = os.stat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[status.st_ino] = int(name)
    return found


def _shut_down(descriptor: int) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as copy:
        is_tcp = copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM
        if is_tcp and not copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # gloo ends the process over a broken listener
            copy.shutdown(socket.SHUT_RDWR)


def _turn_strangers_away(descriptor: int) -> None:
    """Where ``descriptor`` is a listener, let the kernel drop what comes to it, unanswered. Connections that were made stay as they are."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as copy:
        is_tcp = copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM
        if is_tcp and copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            instruction = ctypes.create_string_buffer(struct.pack("=HBBI", _BPF_RETURN_CONSTANT, 0, 0, 0))  # keep 0 bytes of every packet
            program = struct.pack("@HP", 1, ctypes.addressof(instruction))  # struct sock_fprog: how many, where
            copy.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
