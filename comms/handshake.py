"""Who may talk to rank 0's door: both sides prove that they know the job's secret, without sending it, before anything else is read.

    hub  -> peer   {"hub": PROTOCOL, "challenge": A}
    peer -> hub    {"purpose": "rank" | "store", "who": words, "challenge": B, "answer": MAC("peer", purpose, A, B)}
    hub  -> peer   {"answer": MAC("hub", purpose, A, B)}          or, where the answer was wrong, {"refused": text}

A and B are random, so no old answer fits. From then on, for the purpose "rank", every line carries a MAC under a key of this connection,
with a counter: nobody can put a line in, repeat, leave out or change one. Nothing is encrypted (docs/security.md).

Promises: a line that was not sealed by the other end raises NotSealed. Left to others: reading and writing (hub.py, lifeline.py,
store_tunnel.py)."""

import hmac
import json
import secrets
from collections.abc import Mapping
from typing import Any

from comms.secret import Secret

PROTOCOL = "geo-clm-trainer/2"
MAX_LINE_BYTES = 2**20
PURPOSES = ("rank", "store")
MAX_WHO_CHARS = 200
_MAC_HEX = 64


class NotSealed(ValueError):
    """What came was not sent by the other end of this connection, or not in this order."""


class Challenge:
    """The hub's side of one connection. ``greeting`` goes out first; ``admit`` judges what comes back."""

    def __init__(self, secret: Secret) -> None:
        self._secret, self._nonce = secret, secrets.token_bytes(16)
        self.greeting = _line({"hub": PROTOCOL, "challenge": self._nonce.hex()})
        self.purpose = ""
        self.who = "somebody"

    def admit(self, line: bytes) -> tuple[bytes, "Session"] | None:
        """What to answer, and the session; None for a peer that does not know the secret. Raises ValueError for anything that is no answer
        at all."""
        said = _object(line)
        purpose, nonce = _text(said, "purpose"), bytes.fromhex(_text(said, "challenge"))
        if purpose not in PURPOSES or len(nonce) != 16:
            raise ValueError("not an answer to the challenge")
        self.who = "".join(c if c.isprintable() else "?" for c in _text(said, "who")[:MAX_WHO_CHARS])
        parts = (purpose.encode(), self._nonce, nonce)
        if not hmac.compare_digest(self._secret.mac(b"peer", *parts).hex().encode(), _text(said, "answer").encode()):
            return None
        self.purpose = purpose
        return _line({"answer": self._secret.mac(b"hub", *parts).hex()}), Session(self._secret.derive(b"session", *parts), is_hub=True)


class Reply:
    """The peer's side. ``line`` answers the hub's greeting; ``session`` judges what the hub says then."""

    def __init__(self, secret: Secret, purpose: str, who: str, greeting: bytes) -> None:
        """Raises ValueError unless ``greeting`` is a hub's."""
        said = _object(greeting)
        challenge = bytes.fromhex(_text(said, "challenge"))
        if said.get("hub") != PROTOCOL or len(challenge) != 16:
            raise ValueError("not a hub")
        nonce = secrets.token_bytes(16)
        self._secret, self._parts = secret, (purpose.encode(), challenge, nonce)
        answer = secret.mac(b"peer", *self._parts).hex()
        self.line = _line({"purpose": purpose, "who": who[:MAX_WHO_CHARS], "challenge": nonce.hex(), "answer": answer})

    def session(self, line: bytes) -> "Session | None":
        """None where the hub does not know the secret, or says that this side does not. Raises ValueError for what is no answer."""
        said = _object(line)
        if "refused" in said:
            return None
        expected = self._secret.mac(b"hub", *self._parts).hex()
        if not hmac.compare_digest(expected.encode(), _text(said, "answer").encode()):
            return None
        return Session(self._secret.derive(b"session", *self._parts), is_hub=False)


REFUSAL = json.dumps({"refused": "the answer does not fit this job's secret"}).encode() + b"\n"


class Session:
    """Seals the lines of one connection, and opens those of the other end. Not for several threads at once in one direction."""

    def __init__(self, key: Secret, *, is_hub: bool) -> None:
        self._key, self._out, self._in = key, b"hub" if is_hub else b"peer", b"peer" if is_hub else b"hub"
        self._num_sealed = self._num_opened = 0

    def seal(self, message: Mapping[str, Any]) -> bytes:
        """``message`` as a line: its MAC in hex, a space, JSON."""
        payload = json.dumps(message).encode()
        code = self._key.mac(self._out, self._num_sealed.to_bytes(8, "big"), payload)
        self._num_sealed += 1
        return code.hex().encode() + b" " + payload + b"\n"

    def open(self, line: bytes) -> dict[str, Any]:
        """Raises NotSealed."""
        code, payload = line[:_MAC_HEX], line[_MAC_HEX + 1 :].rstrip(b"\n")
        expected = self._key.mac(self._in, self._num_opened.to_bytes(8, "big"), payload).hex().encode()
        if not hmac.compare_digest(code, expected):
            raise NotSealed("a line that this job's other end did not send")
        self._num_opened += 1
        return _object(payload)


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError("too long a line")
    try:
        said = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(said, dict):
        raise ValueError("not an object")
    return said


def _text(said: Mapping[str, Any], name: str) -> str:
    value = said.get(name)
    if not isinstance(value, str) or not (value.isascii() or name == "who"):
        raise ValueError(f"no {name}")
    return value
