"""The hub: a small server in rank 0's process where all ranks meet, and that notices at once when one of them is gone.

Every rank connects to it before any process group exists, says who it is and what it was started with, and keeps the connection
for the whole job. So a wrong world size, a rank taken twice or different flags are named to everybody within a second (bare torch
waits out its time-outs and names nobody); and since the kernel closes a dead process's connection whatever it was doing, a killed
rank is known in milliseconds in any phase, without heartbeats that a busy interpreter could miss.

Wire format: one JSON object per line, both ways; nothing else is ever parsed.

    hub     -> rank   {"hub": PROTOCOL}                                  greeting
    rank    -> hub    Hello                                              who I am
    hub     -> rank   {"formed": {...}} | {"refused": text}              verdict, once all are there or something is wrong
    rank    -> hub    {"failed": text, "restart_helps": bool} | {"done": true}            at the end
    hub     -> rank   {"lost": rank, "text": text, "restart_helps": bool}                 somebody is gone

Left to others: the client side (lifeline.py), process groups (groups.py), frozen peers.
"""

import asyncio
import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

PROTOCOL = "geo-clm-trainer/1"
HELLO_TIMEOUT_S = 10.0
MAX_LINE_BYTES = 2**20
LAST_WORDS_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a rank tells the hub. ``plan`` must be equal on all ranks; ``problem`` is a mistake found on this rank alone, else None."""

    rank: int
    world_size: int
    host: str
    host_id: str
    pid: int
    address: str
    is_loopback: bool
    plan: dict[str, Any]
    problem: str | None = None

    @property
    def in_words(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @classmethod
    def from_json(cls, line: bytes) -> "Hello":
        """Raises ValueError, KeyError or TypeError for anything that is not a Hello."""
        fields = json.loads(line)
        hello = cls(**{name: fields[name] for name in cls.__dataclass_fields__})
        kinds = {"rank": int, "world_size": int, "pid": int, "host": str, "host_id": str, "address": str, "is_loopback": bool, "plan": dict}
        wrong = [name for name, kind in kinds.items() if type(getattr(hello, name)) is not kind]
        if wrong or not isinstance(hello.problem, (str, type(None))):
            raise TypeError(f"not what a rank says of itself: {wrong or 'problem'}")
        return hello


@dataclass
class _Member:
    hello: Hello
    writer: asyncio.StreamWriter
    is_done: bool = False


@dataclass
class _Verdict:
    formed: dict[str, Any] | None = None
    refused: str | None = None
    members: dict[int, _Member] = field(default_factory=dict)


class Hub:
    """The server. Runs on a thread of rank 0's process from construction to close().

    listener: a bound, listening socket that becomes the hub's. formed: what every rank is told with the roster (the store's
    address). describe: rank -> words such as "rank 3 (stage 1 of 2, replica 1 of 2)". problem: a mistake that rank 0 found on its
    own; the hub then only tells it to everybody who comes."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        world_size: int,
        deadline_s: float,
        formed: Mapping[str, Any],
        describe: Callable[[int], str],
        problem: str | None = None,
    ) -> None:
        self._world_size, self._deadline_s, self._formed, self._describe = world_size, deadline_s, formed, describe
        self._verdict = _Verdict(refused=problem)
        self._num_others_told, self._deadline_passed = 0, False
        self._others_told, self._all_done, self._loss_told = threading.Event(), threading.Event(), threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(listener,), name="hub", daemon=True)
        self._thread.start()

    def wait_until_refusal_told(self, timeout_s: float) -> None:
        """Block until all other ranks have come and heard the refusal, at most ``timeout_s``; ranks that missed the deadline are not
        awaited.
        """
        self._others_told.wait(LAST_WORDS_S if self._deadline_passed else timeout_s)

    def wait_until_loss_told(self, timeout_s: float) -> None:
        """Block until the members have heard that one of them is lost, at most ``timeout_s``: what rank 0 does before it ends itself."""
        self._loss_told.wait(timeout_s)

    def close(self, timeout_s: float = 60.0) -> None:
        """End the server once all members have said they are done, at most ``timeout_s`` later: they would take its end for a death."""
        if self._verdict.formed is not None:
            self._all_done.wait(timeout_s)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout_s)

    def _run(self, listener: socket.socket) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._serve_one, sock=listener, limit=MAX_LINE_BYTES, backlog=512)
        deadline = asyncio.create_task(self._refuse_at_deadline())
        await self._stop.wait()
        deadline.cancel()
        server.close()

    async def _refuse_at_deadline(self) -> None:
        await asyncio.sleep(self._deadline_s)
        if self._verdict.formed is None and self._verdict.refused is None:
            self._deadline_passed = True
            missing = [self._describe(rank) for rank in range(self._world_size) if rank not in self._verdict.members]
            self._refuse(
                f"all {self._world_size} ranks must arrive within {self._deadline_s:.0f} s (--rendezvous-timeout); missing: "
                f"{', '.join(missing)}. Start them with the same --dist-url, or see what stopped them"
            )

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        member = None
        try:
            keep_alive(writer.get_extra_info("socket"))
            _send(writer, {"hub": PROTOCOL})
            hello = Hello.from_json(await asyncio.wait_for(reader.readline(), HELLO_TIMEOUT_S))
            member = self._admit(hello, writer)
            if member is not None:
                await self._listen(member, reader)
        except (ValueError, KeyError, TypeError, RecursionError, OSError, asyncio.TimeoutError):
            pass  # a stranger, or one of ours that died: _gone tells them apart
        finally:
            if member is not None:
                self._gone(member)
            writer.close()

    def _admit(self, hello: Hello, writer: asyncio.StreamWriter) -> _Member | None:
        verdict = self._verdict
        if verdict.formed is not None:
            text = f"this --dist-url belongs to a job that is already running with all its ranks; {hello.in_words} is one too many"
            _send(writer, {"refused": f"{text}. Give every process of a job its own --rank, and another job another port"})
            return None
        if hello.problem is not None and hello.rank == 0 and hello.world_size != self._world_size:
            _send(writer, {"refused": "another job is meeting here"})  # a rank 0 of that size cannot be ours: it shall not end this job
            return None
        if verdict.refused is None:
            problem = self._problem_with(hello)
            if problem is None:
                member = verdict.members[hello.rank] = _Member(hello, writer)
                self._form_if_complete()
                return member
            self._refuse(problem)
        self._tell_refusal(writer, hello.rank)
        return None

    def _problem_with(self, hello: Hello) -> str | None:
        members = self._verdict.members
        if (
            hello.problem is not None and hello.rank == 0
        ):  # the hub lives in rank 0's process, and a problem of that one does not come by wire
            return (
                f"two processes say they are rank 0: pid {os.getpid()} on {socket.gethostname()} and pid {hello.pid} on {hello.host}. "
                "Give every process its own --rank or, if these are two jobs, each its own port. "
                f"The second one says: {hello.problem}"
            )
        if hello.problem is not None:
            return f"{hello.in_words}: {hello.problem}"
        if hello.world_size != self._world_size:
            return (
                f"all ranks must agree on --world-size; {hello.in_words} was started with {hello.world_size}, rank 0 with "
                f"{self._world_size}"
            )
        if not 0 <= hello.rank < self._world_size:
            return f"--rank must be 0 .. {self._world_size - 1}; {hello.in_words} is outside"
        if hello.rank in members:
            first = members[hello.rank].hello
            return (
                f"every process needs its own --rank; rank {hello.rank} is taken twice: by pid {first.pid} on {first.host} and pid "
                f"{hello.pid} on {hello.host}"
            )
        for other in members.values():
            differing = sorted(k for k in {*hello.plan, *other.hello.plan} if hello.plan.get(k) != other.hello.plan.get(k))
            if differing:
                seen = "; ".join(f"{k}: {other.hello.plan.get(k)!r} and {hello.plan.get(k)!r}" for k in differing)
                return (
                    f"all ranks must be started alike; {other.hello.in_words} and {hello.in_words} differ in {seen}. Start all ranks "
                    "with the same flags, model and versions"
                )
            if (hello.is_loopback or other.hello.is_loopback) and hello.host_id != other.hello.host_id:
                return (
                    f"ranks on several hosts cannot meet over a loopback interface; {other.hello.in_words} uses {other.hello.address}, "
                    f"{hello.in_words} uses {hello.address}. Pass --net-interface with one that connects the hosts"
                )
        return None

    def _form_if_complete(self) -> None:
        members = self._verdict.members
        if len(members) < self._world_size:
            return
        roster = [asdict(members[rank].hello) for rank in range(self._world_size)]
        for entry in roster:
            del entry["plan"]
        self._verdict.formed = {**self._formed, "roster": roster}
        for member in members.values():
            _send(member.writer, {"formed": self._verdict.formed})

    def _refuse(self, text: str) -> None:
        self._verdict.refused = text
        for rank, member in self._verdict.members.items():
            self._tell_refusal(member.writer, rank)

    def _tell_refusal(self, writer: asyncio.StreamWriter, rank: int) -> None:
        _send(writer, {"refused": self._verdict.refused})
        self._num_others_told += rank != 0
        if self._num_others_told >= self._world_size - 1:
            self._others_told.set()

    async def _listen(self, member: _Member, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            if not isinstance(message, dict):
                raise TypeError("a member sends objects")
            if message.get("done"):
                self._ended(member)
            elif "failed" in message:
                self._ended(member)
                text = f"{self._describe(member.hello.rank)} on host {member.hello.host} stopped: {message['failed']}"
                self._tell_others(member, text, restart_helps=bool(message.get("restart_helps")))

    def _gone(self, member: _Member) -> None:
        if member.is_done or self._verdict.refused is not None:
            return
        rank, hello = member.hello.rank, member.hello
        if self._verdict.formed is None:
            self._refuse(f"{hello.in_words} went away while the ranks were meeting")
            return
        self._ended(member)
        text = f"{self._describe(rank)} is gone: process {hello.pid} on host {hello.host} ended without a word"
        self._tell_others(member, text, restart_helps=True)

    def _ended(self, member: _Member) -> None:
        member.is_done = True
        if all(m.is_done for m in self._verdict.members.values()):
            self._all_done.set()

    def _tell_others(self, source: _Member, text: str, *, restart_helps: bool) -> None:
        for rank, member in sorted(self._verdict.members.items(), reverse=True):  # rank 0, whose process holds this thread, last
            if member is not source and rank != source.hello.rank:
                _send(member.writer, {"lost": source.hello.rank, "text": text, "restart_helps": restart_helps})
        self._loss_told.set()


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel probe a silent connection: routers then do not forget it, and a peer that is cut off shows after about a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 5)):  # seconds, seconds, probes
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _send(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    """Small enough for the socket's buffer: asyncio hands it to the kernel at once."""
    writer.write(json.dumps(message).encode() + b"\n")
