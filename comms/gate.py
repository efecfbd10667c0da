"""The gate: takes every connection to rank 0's door, lets those in that know the job's secret, and hands them on by purpose.

Strangers cost a file descriptor each for a few seconds and nothing else: no thread, no look-up of names, no line longer than a greeting. Of
more than MAX_STRANGERS at a time the oldest go, so that there is room for ours. Promises: nothing a peer says is looked at before its
answer to the challenge is right. Left to others: ranks (hub.py), the store (store_tunnel.py)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from comms.connections import keep_alive
from comms.handshake import MAX_LINE_BYTES, REFUSAL, Challenge, Session
from comms.secret import Secret
from comms.store_tunnel import pass_on

log = logging.getLogger("trainer")

MAX_STRANGERS = 128
STRANGERS_NAMED = 5  # in the log; the others are counted


class Gate:
    """serve_one() is for asyncio.start_server. on_rank: called with reader, writer and session of a rank that was let in; may raise OSError
    and ValueError. store_port: of the store on 127.0.0.1, None where there is none."""

    def __init__(
        self,
        secret: Secret,
        store_port: int | None,
        on_rank: Callable[[asyncio.StreamReader, asyncio.StreamWriter, Session], Awaitable[None]],
        *,
        handshake_s: float,
    ) -> None:
        self._handshake_s = handshake_s
        self._secret, self._store_port, self._on_rank = secret, store_port, on_rank
        self._strangers: dict[asyncio.StreamWriter, None] = {}
        self._num_refused = 0
        self.last_refused = ""  # who came last with another secret, in words

    async def serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its first byte to its last."""
        try:
            keep_alive(writer.get_extra_info("socket"))
            self._make_room_for(writer)
            session, purpose = await asyncio.wait_for(self._shake_hands(reader, writer), self._handshake_s)
            if purpose == "rank":
                await self._on_rank(reader, writer, session)
            elif self._store_port is not None:
                await pass_on(reader, writer, self._store_port)
        except (ValueError, OSError, asyncio.TimeoutError, asyncio.CancelledError):
            pass  # a stranger, one of ours that went away, or the server ends; asyncio would log each
        finally:
            self._strangers.pop(writer, None)
            writer.close()

    def _make_room_for(self, writer: asyncio.StreamWriter) -> None:
        self._strangers[writer] = None
        while len(self._strangers) > MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.transport.abort()

    async def _shake_hands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[Session, str]:
        """Raises ValueError for a stranger."""
        challenge = Challenge(self._secret)
        writer.write(challenge.greeting)
        admitted = challenge.admit(await reader.readline())
        if admitted is None:
            writer.write(REFUSAL)
            self._name_stranger(challenge.who, writer)
            raise ValueError("does not know the secret")
        self._strangers.pop(writer, None)
        answer, session = admitted
        writer.write(answer)
        return session, challenge.purpose

    def _name_stranger(self, who: str, writer: asyncio.StreamWriter) -> None:
        self._num_refused += 1
        peer = writer.get_extra_info("peername") or ("somewhere",)
        self.last_refused = f"{who} from {peer[0]}"
        if self._num_refused <= STRANGERS_NAMED:
            more = "; further ones are not listed" if self._num_refused == STRANGERS_NAMED else ""
            log.warning(
                "refused a connection from %s, which says it is %s: it does not know this job's secret (--secret-file)%s",
                peer[0],
                who,
                more,
            )


async def read_line(reader: asyncio.StreamReader) -> bytes:
    """The next line of somebody who was let in, b"" at the end; it may be longer than the reader's own limit, which holds for strangers.
    Raises ValueError for a line longer than MAX_LINE_BYTES."""
    line = b""
    while not line.endswith(b"\n"):
        try:
            line += await reader.readuntil(b"\n")
        except asyncio.LimitOverrunError as overrun:
            line += await reader.readexactly(overrun.consumed)
        except asyncio.IncompleteReadError as end:
            return line + end.partial
        if len(line) > MAX_LINE_BYTES:
            raise ValueError("too long a line")
    return line
