"""One job per folder: an exclusive lock that names its owner and that the kernel takes back when the owner dies, however it dies.

A file that merely exists would survive kill -9 and lock everybody out; flock(2) is bound to the open file and cannot. The file's content
only says who holds it, and its random token lets the other ranks prove that they see this very folder and not a namesake on their own
disk.
"""

import datetime
import errno
import fcntl
import getpass
import json
import os
import secrets
import socket
from pathlib import Path
from typing import Any

from checkpoint.tensor_file import explained_disk_errors
from user_error import UserError

LOCK_NAME = ".lock"
MAX_OWNER_BYTES = 65536  # of what says who holds a lock; a longer file is none of ours


class JobLock:
    """``with JobLock(folder):`` or acquire() .. release(). The lock is this process's: forked children drop their copy of it at birth."""

    def __init__(self, folder: Path, *, path: Path | None = None) -> None:
        """``path``: the lock's file where it cannot lie in ``folder``, because that one will be renamed; default: .lock in it."""
        self.folder, self.path = folder, path or folder / LOCK_NAME
        self.token = secrets.token_hex(16)
        self._descriptor: int | None = None

    def acquire(self) -> "JobLock":
        """Make the folder if it is not there, and lock it. Raises UserError naming the owner if another job holds it."""
        assert self._descriptor is None, "this lock is held already"
        with explained_disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = self._locked_descriptor()
            while not _is_open_as(descriptor, self.path):  # its owner removed the file between our open and our lock (remove)
                os.close(descriptor)
                descriptor = self._locked_descriptor()
        self._descriptor = descriptor
        self._write_owner(descriptor)
        os.register_at_fork(after_in_child=self._close)
        return self

    def release(self) -> None:
        """Free the lock; the file stays, unless ``remove`` was called, with the last owner's name in it: its room on a disk that has
        filled up meanwhile is what lets the next owner write his."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._close()

    def remove(self) -> None:
        """Unlink the file while the lock is held: whoever is waiting with the old file sees that it is gone, and takes a new one."""
        assert self._descriptor is not None, "only its owner removes a lock"
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> "JobLock":
        return self.acquire() if self._descriptor is None else self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def _locked_descriptor(self) -> int:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                seen = f"one job at a time may write into a folder, and {self.folder} is held by {_owner(self.path)}"
                raise UserError(f"{seen}. Wait for it, stop it, or give another folder.") from error
            seen = f"{self.folder} lies on a filesystem without locks ({error.strerror})"
            raise UserError(f"{seen}. Mount it with flock, or give another folder.") from error
        return descriptor

    def _write_owner(self, descriptor: int) -> None:
        started_at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "user": _user(), "started_at": started_at, "token": self.token}
        with explained_disk_errors(self.path):
            content = json.dumps(owner).encode()
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
            os.fsync(descriptor)

    def _close(self) -> None:
        """Close without unlocking: a flock ends when the last copy of its descriptor is closed, or with LOCK_UN."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock_holder(root: Path) -> str | None:
    """Who holds ``root``'s lock, in words; None if nobody does, as far as this host sees."""
    try:
        descriptor = os.open(root / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a question; closing gives it back at once
        return None
    except BlockingIOError:
        pass
    except OSError:
        return None  # a filesystem without locks: no job can hold one
    finally:
        os.close(descriptor)
    return _owner(root / LOCK_NAME)


def read_lock_token(folder: Path) -> str | None:
    """The token of the job that holds ``folder``'s lock; None if this host sees no such lock file, or one without an owner."""
    token = _content(folder / LOCK_NAME).get("token")
    return token if isinstance(token, str) else None


def _is_open_as(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _content(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_OWNER_BYTES))
    except (OSError, ValueError, RecursionError):  # not there, no file, or nothing of ours: its owner may be just writing it
        return {}
    return content if isinstance(content, dict) else {}


def _owner(path: Path) -> str:
    owner = _content(path)
    if not owner:
        return "a job that has not yet written its name"
    pid, user, host, started_at = (ascii(owner.get(name)).strip("'")[:64] for name in ("pid", "user", "host", "started_at"))
    return f"process {pid} of {user} on {host}, started at {started_at}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        return str(os.getuid())
