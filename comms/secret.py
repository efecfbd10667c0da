"""The secret that the ranks of one job share: whoever knows it may come in, and nobody else.

It is read from a file or the environment, never from the command line, which every user of a machine can list. Promises: it appears in no
message, repr or pickle. Left to others: asking for it (handshake.py)."""

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from user_error import UserError

VARIABLE = "DIST_SECRET"
MIN_BYTES = 16
HOW_TO_MAKE = "(umask 077; python -c 'import secrets; print(secrets.token_hex(32))' > secret)"


class Secret:
    """A key for message authentication codes."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        assert len(key) >= MIN_BYTES, "short keys can be guessed"
        self._key = key

    def mac(self, *parts: bytes) -> bytes:
        """HMAC-SHA256 (RFC 2104) of ``parts``, each preceded by its length in 8 bytes, so that no two lists of parts look alike."""
        code = hmac.new(self._key, digestmod=hashlib.sha256)
        for part in parts:
            code.update(len(part).to_bytes(8, "big"))
            code.update(part)
        return code.digest()

    def derive(self, *parts: bytes) -> "Secret":
        """A key that only those can make who know this one and ``parts``."""
        return Secret(self.mac(*parts))

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not written anywhere")


def find_secret(file: str | None, *, is_loopback: bool, is_alone: bool, environment: Mapping[str, str] = os.environ) -> Secret:
    """The secret of ``file`` (--secret-file), else of DIST_SECRET, else, for ranks of one host, this user's own.

    is_alone: a job of one process, which nobody else may join. Raises UserError, which never shows what was read."""
    if file:
        return _of_file(Path(file).expanduser())
    if environment.get(VARIABLE):
        return Secret(_checked(environment[VARIABLE].strip().encode(), f"{VARIABLE} of the environment"))
    if is_alone:
        return Secret(secrets.token_bytes(32))
    if is_loopback:
        return _own_of_this_user(environment)
    raise UserError(
        f"ranks that meet over a network must share a secret, or anybody there could join them; neither --secret-file nor {VARIABLE} gives "
        f"one. Make it once, {HOW_TO_MAKE}, copy the file to every host, and pass --secret-file to every rank"
    )


def _of_file(path: Path) -> Secret:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(2**16)
    except OSError as error:
        raise UserError(f"--secret-file must name a file that can be read; {path}: {error.strerror}. Make one: {HOW_TO_MAKE}") from error
    if stat.S_ISREG(mode) and mode & 0o077:
        raise UserError(
            f"--secret-file must be readable by its owner alone; the mode of {path} is {stat.S_IMODE(mode):o}. Change it: chmod 600 {path}"
        )
    return Secret(_checked(content.strip(), f"--secret-file {path}"))


def _checked(key: bytes, where: str) -> bytes:
    if len(key) < MIN_BYTES:
        raise UserError(f"a secret must have at least {MIN_BYTES} characters, or it can be guessed; {where} has {len(key)}. {HOW_TO_MAKE}")
    return key


def _own_of_this_user(environment: Mapping[str, str]) -> Secret:
    """Made by whichever rank comes first, found by the others; other users of the machine cannot read it."""
    cache = environment.get("XDG_CACHE_HOME")
    path = (Path(cache) if cache else Path.home() / ".cache") / "geo-clm-trainer" / "loopback-secret"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            unnamed = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
            descriptor = os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(descriptor, secrets.token_hex(32).encode())
                os.close(descriptor)
                os.link(unnamed, path)  # fails where another rank was faster: then its secret counts
            except FileExistsError:
                pass
            finally:
                unnamed.unlink()
    except OSError as error:
        raise UserError(
            f"the ranks of one host share a secret of this user in {path}, and it cannot be made ({error.strerror}). Pass --secret-file to "
            f"every rank: {HOW_TO_MAKE}"
        ) from error
    return _of_file(path)
