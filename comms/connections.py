"""The sockets under the process groups, so that a rank which waits in one of them can be woken.

A wait in gloo knows no interruption: abort() of a group leaves it waiting (torch 2.13), and its own time-out is that of the longest save.
What ends it at once is the end of its connection, as if the peer had died. So the sockets that come into being while groups are made are
remembered, and break_all() shuts them down. Linux only, as /proc is."""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator


class Connections:
    """Of one meeting. Not for groups that are made on two threads at once."""

    def __init__(self) -> None:
        self._before: frozenset[int] | None = None
        self._recorded: frozenset[int] = frozenset()
        self._is_broken = False

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Around the making of process groups."""
        self._before = frozenset(_sockets())
        try:
            yield
        finally:
            self._recorded |= frozenset(_sockets()) - self._before
            self._before = None
            if self._is_broken:
                self.break_all()

    def break_all(self) -> None:
        """Shut every connection down; those of a group that is just being made, too. Any thread may call it, more than once."""
        self._is_broken = True
        before, recorded = self._before, self._recorded
        for inode, descriptor in _sockets().items():
            if inode in recorded or (before is not None and inode not in before):
                _shut_down(descriptor)


def _sockets() -> dict[int, int]:
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
