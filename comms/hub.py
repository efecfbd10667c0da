"""The hub: a small server in rank 0's process where all ranks meet, and that notices at once when one of them is gone.

Every rank connects to it before any process group exists, proves that it knows the job's secret (handshake.py), says who it is and what it
was started with (roster.py), and keeps the connection for as long as this meeting lasts. So a stranger, a wrong world size, a rank taken
twice or different flags are named within a second (bare torch waits out its time-outs and names nobody); and since the kernel closes a dead
process's connection whatever it was doing, a killed rank is known in milliseconds in any phase. Beats over the same connection tell of
frozen ranks and cut networks (heartbeat.py).

One JSON object per line, both ways, sealed; nothing else is ever parsed.

    rank    -> hub    Hello                                               who I am
    hub     -> rank   {"formed": {...}} | {"refused": text} | {"wait": text} | {"again": text}        verdict, once all are there
    rank    -> hub    {"beat": Beat}                                      twice a second
    hub     -> rank   {"tick": words}                                     as often: I live, and this is what rank 0 does
    rank    -> hub    {"failed": text, "restart_helps": bool, "trace": text} | {"broken": text} | {"done": true}       at the end
    hub     -> rank   {"end": true}                                       everybody is done
    hub     -> rank   {"lost": rank, "text": text, "restart_helps": bool, "trace": text}              the job ends
    hub     -> rank   {"again": text}                                     everybody parts and meets again, at the same door

Left to others: the client side (lifeline.py), process groups (groups.py), what a rank does then (training/).
"""

import asyncio
import contextlib
import logging
import math
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from comms.gate import Gate, read_line
from comms.handshake import Session
from comms.heartbeat import BEAT_S, Beat, Pulse, Standstill, find_overdue, find_silent, stuck_after_s
from comms.members import Member, Rules, Verdict, outlives
from comms.roster import Hello, find_problem, not_alike
from comms.secret import Secret
from comms.spans import COMING

log = logging.getLogger("trainer")

LAST_WORDS_S = 1.0
MOST_UNREAD_BYTES = 2**12  # of a connection; longer lines are read in pieces, once it is known who sends them


class Hub:
    """The server of one meeting. Runs on a thread of rank 0's process from construction to close().

    listener: a bound, listening socket that becomes the hub's. describe: rank -> words such as "rank 3 (stage 1 of 2, replica 1 of 2)".
    problem: a mistake that rank 0 found on its own; the hub then only tells it to everybody who comes. before: the hub of the meeting
    before this one, which still hears the ranks that have not left it."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        secret: Secret,
        world_size: int,
        deadline_s: float,
        store_port: int | None,
        describe: Callable[[int], str],
        rules: Rules | None = None,
        problem: str | None = None,
        before: "Hub | None" = None,
    ) -> None:
        self._before = before
        self._secret, self._world_size, self._deadline_s = secret, world_size, deadline_s
        self._describe, self._rules = describe, rules or Rules()
        self._deadlines = self._rules.deadlines
        self._gate = Gate(secret, store_port, self._serve_rank, handshake_s=self._deadlines.handshake_s)
        self._verdict = Verdict(refused=problem)
        self._num_others_told, self._deadline_passed, self._grace_passed = 0, False, False
        self._others_told, self._all_done, self._loss_told = threading.Event(), threading.Event(), threading.Event()
        self._replica_is_back, self._all_left, self._retired = threading.Event(), threading.Event(), threading.Event()
        self._heard: dict[int, float] = {}  # time.monotonic() of the last sign of each rank of this meeting
        self._again_at = math.inf  # time.monotonic()
        self._standstill = Standstill(time.monotonic())
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(listener,), name="hub", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> frozenset[int]:
        """The ranks that this meeting has found to be gone, or begun without."""
        gone = {rank for rank in range(self._world_size) if rank not in self._verdict.members and rank not in self._verdict.waiting}
        return frozenset(gone)

    @property
    def beats(self) -> dict[int, Beat]:
        """What every rank of this meeting has said of itself last. Any thread may ask."""
        return self._verdict.beats

    @property
    def replica_is_back(self) -> bool:
        """Whether all ranks of a replica that the job goes on without are waiting to be taken back. Any thread may ask."""
        return self._replica_is_back.is_set()

    def wait_until_refusal_told(self, timeout_s: float) -> None:
        """Block until all other ranks have come and heard the refusal, at most ``timeout_s``; ranks that missed the deadline are not
        awaited.
        """
        self._others_told.wait(LAST_WORDS_S if self._deadline_passed else timeout_s)

    def wait_until_loss_told(self, timeout_s: float) -> None:
        """Block until the members have heard that one of them is lost, at most ``timeout_s``: what rank 0 does before it ends itself."""
        self._loss_told.wait(timeout_s)

    def meet_again(self, text: str) -> None:
        """Let everybody part and come again; from any thread."""
        with contextlib.suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(self._again, text)

    def heard_at(self, rank: int) -> float:
        """time.monotonic() when ``rank``, which must come to the next meeting, was last known to be on its way: it beats and gets on, or
        has left this meeting. -inf for one that has never been here. Any thread may ask."""
        return self._heard.get(rank, -math.inf)

    def last_words(self, rank: int) -> str:
        """Such as `` (last heard of 31.2 s ago, for 310.0 s in step 12, forward of micro-batch 3)`` of a rank of this meeting.
        Any thread may ask."""
        member = self._verdict.members.get(rank)
        return "" if member is None else f" ({member.pulse.last_words(time.monotonic())})"

    def retire(self) -> None:
        """Where all are to meet again: give the port free for the next hub, and go on listening to those who have not left."""
        with contextlib.suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(self._retire)
            self._retired.wait()

    def close(self, timeout_s: float = 60.0) -> None:
        """End the server once all members have said they are done, at most ``timeout_s`` later: they would take its end for a death. Where
        they are to meet again it ends at once."""
        if self._verdict.formed is not None and self._verdict.again is None and self._all_done.wait(timeout_s):
            self._all_left.wait(self._deadlines.leaving_s)  # a connection that is closed under a beat would take the last word with it
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout_s)
        self._before = None

    def _run(self, listener: socket.socket) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(listener))
        finally:
            self._retired.set()
            self._loop.close()

    async def _serve(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._gate.serve_one, sock=listener, limit=MOST_UNREAD_BYTES, backlog=512)
        self._server = server
        works = [self._refuse_at_deadline(), self._feel_pulses(), *([self._form_after_grace()] if self._rules.grace_s else [])]
        timers = [asyncio.create_task(self._guarded(work)) for work in works]
        await self._stop.wait()
        self._retire()
        for member in self._verdict.waiting.values():
            member.send({"again": ""} if self._verdict.again is not None else {"refused": "the job has ended while this rank was waiting"})
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *timers, return_exceptions=True)

    def _retire(self) -> None:
        self._server.close()
        self._retired.set()

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """A defect of ours ends this meeting, visibly; a hub that has stopped to feel pulses would be worse than none."""
        try:
            await work
        except Exception:
            log.error("%s", traceback.format_exc())
            self._stop.set()

    async def _refuse_at_deadline(self) -> None:
        await self._wait_for_the_missing(self._deadline_s, min)
        while self._rules.grace_s and not self._grace_passed:  # perhaps the others can go on without those that are missing
            await asyncio.sleep(BEAT_S)
        if self._verdict.formed is None and self._verdict.refused is None:
            self._deadline_passed = True
            last_words = self._before.last_words if self._before is not None else lambda rank: ""
            missing = [f"{self._describe(rank)}{last_words(rank)}" for rank in self._missing]
            strangers = f". Not let in, for want of the job's secret: {self._gate.last_refused}" if self._gate.last_refused else ""
            self._refuse(
                f"all {self._world_size} ranks must arrive within {self._deadline_s:.0f} s "
                f"({'--rendezvous-timeout' if self._rules.is_first_meeting else 'to meet again'}); missing: "
                f"{', '.join(missing)}{strangers}. Start them with the same --dist-url, or see what stopped them",
                restart_helps=True,
            )

    async def _form_after_grace(self) -> None:
        await self._wait_for_the_missing(self._rules.grace_s, max)
        self._grace_passed = True
        self._form_if_ready()

    @property
    def _missing(self) -> list[int]:
        return [rank for rank in range(self._world_size) if rank not in self._verdict.members]

    async def _wait_for_the_missing(self, within_s: float, of: Callable[[list[float]], float]) -> None:
        """Until all have come, or one of the missing ranks (``of`` = min), or all of them that are not known to be lost (max), have given
        no sign for so long: here, or in the meeting before this one."""
        began, before = time.monotonic(), self._before
        while missing := self._missing:
            alive = [rank for rank in missing if rank not in self._rules.dead]
            heard = [max(self.heard_at(rank), began if before is None else before.heard_at(rank)) for rank in alive]
            now = time.monotonic()
            left = max(began, of(heard or [began])) + within_s - now
            if left <= 0:
                return
            pause = min(left, BEAT_S)
            await asyncio.sleep(pause)
            if (missed := time.monotonic() - now - pause) > BEAT_S:  # this process stood still, and has signs to read
                began += missed

    async def _serve_rank(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session: Session) -> None:
        hello = Hello.from_json(session.open(await asyncio.wait_for(read_line(reader), self._deadlines.handshake_s)))
        if not hello.is_signed(self._secret):
            raise ValueError("signed with another secret")
        member = self._admit(hello, writer, session)
        if member is None:
            return
        was_cut = False
        try:
            await self._listen(member, reader)
        except OSError:
            was_cut = True
        finally:
            if not self._stop.is_set():
                await self._gone(member, was_cut)

    def _admit(self, hello: Hello, writer: asyncio.StreamWriter, session: Session) -> Member | None:
        verdict, now = self._verdict, time.monotonic()
        member = Member(hello, writer, session, Pulse(came_at=now, moved_at=now))
        if verdict.again is not None:
            # rank 0 opens the next door when it has ended what it is in, if it gets on with that
            if now - max(self._again_at, self.heard_at(0)) > self._deadlines.link_back_s:
                member.send({"refused": f"rank 0 does not come to the next meeting{self.last_words(0)}", "restart_helps": True})
            else:
                member.send({"again": verdict.again})
            return None
        if verdict.formed is not None:
            return self._admit_late(member)
        if hello.problem is not None and hello.rank == 0 and hello.world_size != self._world_size:
            member.send({"refused": "another job is meeting here"})  # a rank 0 of that size cannot be ours: it shall not end this job
            return None
        host = verdict.members.get(0)
        if not self._rules.is_first_meeting and hello.rank != 0 and hello.problem is None and verdict.refused is None:
            if host is None:  # which speaks for the job
                member.send({"again": ""})
                return None
            if (problem := not_alike(hello, host.hello)) is not None:  # another job's: the seat stays free
                log.warning("%s is turned away: %s", hello.in_words, problem)
                member.send({"refused": problem})
                return None
        if verdict.refused is None:
            problem = find_problem(hello, {rank: other.hello for rank, other in verdict.members.items()}, self._world_size)
            if problem is None:
                verdict.members[hello.rank] = member
                self._form_if_ready()
                return member
            self._refuse(problem)
        self._tell_refusal(member)
        return None

    def _admit_late(self, member: Member) -> Member | None:
        """The ranks have met already: a lost one may come back, a broken connection may be made again, and anybody else is too many."""
        hello, members, waiting = member.hello, self._verdict.members, self._verdict.waiting
        known = members.get(hello.rank)
        if known is not None and hello.is_again(known.hello) and self._rules.may_meet_again:
            self._again(f"{self._describe(hello.rank)} on host {hello.host} has lost its connections and is back")
            member.send({"again": ""})
            return None
        is_missing = known is None and 0 <= hello.rank < self._world_size and hello.problem is None
        if not is_missing:
            text = f"this --dist-url belongs to a job that is already running with all its ranks; {hello.in_words} is one too many"
            member.send({"refused": f"{text}. Give every process of a job its own --rank, and another job another port"})
            return None
        problem = find_problem(hello, {rank: other.hello for rank, other in {**members, **waiting}.items()}, self._world_size)
        if problem is not None:
            member.send({"refused": problem})
            return None
        waiting[hello.rank] = member
        self._wait_to_be_taken_back(member)
        return member

    def _wait_to_be_taken_back(self, member: Member) -> None:
        member.send({"wait": "the job goes on without this replica, and takes it back when all its ranks are here"})
        here = {*self._verdict.members, *self._verdict.waiting}
        if len(self._who_goes_on(here)) > len(self._verdict.members):
            self._replica_is_back.set()

    def _who_goes_on(self, here: Collection[int]) -> list[int]:
        return list(range(self._world_size)) if len(here) == self._world_size else self._rules.who_goes_on(frozenset(here))

    def _form_if_ready(self) -> None:
        verdict, rules = self._verdict, self._rules
        if verdict.formed is not None or verdict.refused is not None or verdict.again is not None:
            return
        absent = frozenset(range(self._world_size)) - set(verdict.members)
        ranks = self._who_goes_on(verdict.members)
        if not rules.takes_in:
            held = verdict.members[0].hello.meeting if 0 in verdict.members else ""
            ranks = rules.who_goes_on(frozenset(r for r, m in verdict.members.items() if held and m.hello.meeting == held)) or ranks
        if not ranks or (absent and not self._grace_passed and not absent <= rules.dead):
            return
        roster = [verdict.members[rank].hello.entry for rank in ranks]
        verdict.formed = {"roster": roster, "host_comes_back": roster[0]["comes_back"], "meeting": secrets.token_hex(8)}
        verdict.waiting = {rank: member for rank, member in verdict.members.items() if rank not in ranks}
        verdict.members = {rank: verdict.members[rank] for rank in ranks}
        for member in verdict.members.values():
            member.send({"formed": verdict.formed})
        for member in verdict.waiting.values():
            self._wait_to_be_taken_back(member)

    def _refuse(self, text: str, *, restart_helps: bool = False) -> None:
        self._verdict.refused, self._verdict.restart_helps = text, restart_helps
        for member in self._verdict.members.values():
            self._tell_refusal(member)

    def _tell_refusal(self, member: Member) -> None:
        member.send({"refused": self._verdict.refused, "restart_helps": self._verdict.restart_helps})
        self._num_others_told += member.hello.rank != 0
        if self._num_others_told >= self._world_size - 1:
            self._others_told.set()

    async def _listen(self, member: Member, reader: asyncio.StreamReader) -> None:
        while line := await read_line(reader):
            message = member.session.open(line)
            if "beat" in message:
                self._feel(member, Beat.from_json(message["beat"]))
            elif message.get("done"):
                self._ended(member)
                if self._all_done.is_set():
                    for other in self._verdict.members.values():
                        other.send({"end": True})
            elif "broken" in message:
                self._loop.call_later(self._deadlines.suspicion_s, self._suspect, member, str(message["broken"]))
            elif "failed" in message:
                text = f"{self._name(member)} stopped: {message['failed']}"
                helps = bool(message.get("restart_helps"))
                self._lose(member, text, restart_helps=helps, trace=str(message.get("trace") or ""))

    def _feel(self, member: Member, beat: Beat) -> None:
        now = time.monotonic()
        member.pulse.feel(beat, now)
        is_short = beat.is_in_step or beat.doing == COMING
        limit = stuck_after_s(self._deadlines, beat.longest_step_s) if is_short else self._deadlines.outside_s
        if not member.pulse.is_stuck(now, limit):
            self._heard[member.hello.rank] = now

    def _suspect(self, member: Member, text: str) -> None:
        """An exchange failed a moment ago, and nobody is known to have died: a connection broke."""
        if self._is_over or self._all_done.is_set():
            return
        said = f"{self._name(member)} says: {text}"
        if self._rules.may_meet_again:
            self._again(f"a connection broke between ranks that all live; {said}")
        else:
            self._end(member, f"a connection broke; {said}", restart_helps=True)

    async def _gone(self, member: Member, was_cut: bool) -> None:
        verdict, rank = self._verdict, member.hello.rank
        if verdict.again is not None:
            self._heard[rank] = time.monotonic()  # it is on its way to the next meeting, or has died
            return
        if verdict.waiting.get(rank) is member:
            del verdict.waiting[rank]
            if len(self._who_goes_on({*verdict.members, *verdict.waiting})) <= len(verdict.members):
                self._replica_is_back.clear()  # else another replica is whole and waits
            return
        if self._all_done.is_set():
            member.has_left = True
            if all(m.has_left for m in verdict.members.values()):
                self._all_left.set()
        if member.is_done or verdict.refused is not None or verdict.members.get(rank) is not member:
            return
        if verdict.formed is None:
            self._heard[rank] = time.monotonic()
            del verdict.members[rank]
            if not member.hello.comes_back and self._rules.is_first_meeting:
                self._refuse(f"{member.hello.in_words} went away while the ranks were meeting")
            return
        now = time.monotonic()
        text = f"{self._describe(rank)} {member.gone(now, self._standstill.lately_s(now))}"
        hello, own_host_id = member.hello, verdict.members[0].hello.host_id
        lives = await asyncio.to_thread(outlives, hello.pid, hello.host_id, own_host_id=own_host_id, was_cut=was_cut)
        if self._is_over:
            return
        if lives and self._rules.may_meet_again:
            self._again(f"the connection to {self._name(member)} broke")
            return
        self._lose(member, text, restart_helps=True)

    async def _feel_pulses(self) -> None:
        self._standstill.look(time.monotonic())
        while True:
            await asyncio.sleep(BEAT_S)
            now = time.monotonic()
            verdict, slept = self._verdict, self._standstill.look(now)
            everybody = [*verdict.members.values(), *verdict.waiting.values()]
            host = verdict.members.get(0)
            for member in everybody:
                member.pulse.came_at += slept  # it was this process that stood still: nobody else is to blame for that time
                member.pulse.moved_at += slept
                member.send({"tick": host.pulse.beat.doing if host is not None and host.pulse.beat is not None else ""})
            if verdict.formed is None or self._is_over:
                continue
            pulses = {rank: member.pulse for rank, member in verdict.members.items() if not member.is_done}
            overdue = find_overdue(pulses, now, self._deadlines)
            if overdue is not None:
                member = verdict.members[overdue.rank]
                text = f"{self._name(member)} {overdue.why}"
                if overdue.all_wait and self._rules.may_meet_again:
                    self._again(f"all ranks wait for each other, so a connection has broken in silence; {text}")
                else:
                    self._lose(member, text, restart_helps=True)
            waiting = {rank: member.pulse for rank, member in verdict.waiting.items()}
            while (silent := find_silent(waiting, now, self._deadlines)) is not None:  # nobody waits for it
                del waiting[silent.rank]
                verdict.waiting[silent.rank].writer.transport.abort()

    @property
    def _is_over(self) -> bool:
        return self._verdict.again is not None or self._verdict.refused is not None or self._loss_told.is_set()

    def _name(self, member: Member) -> str:
        return f"{self._describe(member.hello.rank)} on host {member.hello.host}"

    def _ended(self, member: Member) -> None:
        member.is_done = True
        if all(m.is_done for m in self._verdict.members.values()):
            self._all_done.set()

    def _lose(self, member: Member, text: str, *, restart_helps: bool, trace: str = "") -> None:
        """A member will not go on: end the job, or let the others meet without it or wait for it."""
        verdict, rules = self._verdict, self._rules
        if self._is_over:
            return
        others = frozenset(verdict.members) - {member.hello.rank}
        goes_on = rules.may_meet_again and restart_helps and (rules.who_goes_on(others) or member.hello.comes_back)
        if goes_on and verdict.formed is not None:
            if trace:
                log.error("%s", trace)
            del verdict.members[member.hello.rank]
            member.send({"again": text})
            self._again(text)
        else:
            self._end(member, text, restart_helps=restart_helps, trace=trace)

    def _end(self, source: Member, text: str, *, restart_helps: bool, trace: str = "") -> None:
        self._ended(source)
        message = {"lost": source.hello.rank, "text": text, "restart_helps": restart_helps}
        everybody = {**self._verdict.members, **self._verdict.waiting}
        for rank, member in sorted(everybody.items(), reverse=True):  # rank 0, whose process holds this thread, last
            member.send({**message, "trace": trace} if rank == 0 and member is not source else message)
        self._loss_told.set()

    def _again(self, text: str) -> None:
        if self._is_over:
            return
        self._verdict.again, self._again_at = text, time.monotonic()
        everybody = {**self._verdict.members, **self._verdict.waiting}
        for _, member in sorted(everybody.items(), reverse=True):
            member.send({"again": text})
        self._loss_told.set()
