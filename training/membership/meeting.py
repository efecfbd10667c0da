"""From flags to a job whose ranks have met: every rank knows its place, its device and its peers, and hears when one of them is gone.

Order matters. First what this rank can check alone (interface, secret, device, the model's headers); then the hub, where a problem of one
rank reaches all of them; only then process groups. Nothing here reads a weight. A process may meet the others more than once: where a
connection breaks, or a lost rank comes back, everybody parts and comes to the same door again (MeetAgain). Promises: every failure is one
UserError, alike in meaning on all ranks, before anything was written; after meet() a lost peer either ends this process within moments,
whatever it is doing, or wakes it with MeetAgain."""

import contextlib
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from comms.connections import Connections
from comms.deadlines import DEADLINES, Deadlines
from comms.groups import join_process_group, make_groups
from comms.hub import Hub, Rules
from comms.interfaces import Unreachable
from comms.lifeline import Lifeline, Trouble
from comms.links import PeerLost
from comms.members import outlives
from comms.place import place_of, whole_replicas
from comms.rendezvous import Door, agent_store, check_door_is_here, listen
from comms.roster import Hello
from comms.secret import Secret
from comms.spans import COMING, Spans
from comms.store_tunnel import StoreTunnel, join_store, serve_store
from comms.transport import break_off_waits
from training.config.train import Config
from training.job.host_limits import explain_out_of_memory
from training.job.job import COLLECTIVE_TIMEOUT, Job, MeetAgain, exchange
from training.job.local_facts import LocalFacts, look_around
from training.job.threads import set_threads
from training.membership.announce import TELL_OTHERS_S, find_door, linger, make_hello, secret_of, tell_others
from training.membership.exits import end_process, see_it_leave
from training.membership.progress_display import say_who_is_missing, show_progress
from training.memory.allocator import keep_freed_memory
from user_error import UserError

log = logging.getLogger("trainer")

# for others to hear why this process ends, which it does in any case
TELL_LOSS_S = 2.0
TELL_INTERRUPTED_S = 3.0
DOOR_AGAIN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class _Host:
    """What rank 0 keeps open for the others."""

    door: Door
    hub: Hub
    store: dist.TCPStore


@dataclass(frozen=True, kw_only=True)
class _Arrival:
    """A rank whose job has formed. host: on rank 0; formed: what the hub said."""

    facts: LocalFacts
    host: _Host | None
    address: tuple[str, int]
    lifeline: Lifeline
    hello: Hello
    formed: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Return:
    """How this process comes back when it dies: whether a supervisor starts it again, and how often it has."""

    comes_back: bool = False
    attempt: int = 0


class Meetings:
    """All meetings of one process in one job. goes_on: whether a broken link or a lost rank may end in another meeting; else the job
    ends."""

    def __init__(
        self,
        config: Config,
        *,
        goes_on: bool,
        returns: Return | None = None,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
        deadlines: Deadlines | None = None,
    ) -> None:
        """is_asked_to_stop: while ranks wait for each other; KeyboardInterrupt is raised then."""
        self._deadlines = (deadlines or DEADLINES).for_peer_timeout(config.peer_timeout_s)
        self._config, self._returns, self._is_asked_to_stop = config, returns or Return(), is_asked_to_stop
        self._wants_to_go_on = goes_on and config.world_size != 1
        self.spans = Spans()
        self._goes_on = False
        self._facts: LocalFacts | None = None
        self._secret: Secret | None = None
        self._port = 0  # of rank 0's door where torchrun's store says which: the same one in every meeting
        self._dead: frozenset[int] = frozenset()
        self._has_left = threading.Event()  # the main thread, a meeting that has broken off
        self._takes_in = False  # the next one: all ranks have agreed on it
        self._number, self._meeting = 0, ""
        self._left: Lifeline | None = None  # of the meeting before, over which this rank beats until it comes to the next one
        self._hub_before: Hub | None = None  # on rank 0: which hears those who have not left that meeting
        self.num_fruitless = 0  # meetings in a row that came to nothing
        self._refused_s = math.inf
        self._deadline_s = config.rendezvous_timeout  # of the next meeting
        self.replica_is_back: Callable[[], bool] = lambda: False  # on rank 0: whether one is waiting to be taken back
        self.holds_state: Callable[[], bool] = lambda: False  # whether this process could go on from what it has in memory

    @contextlib.contextmanager
    def meet(self) -> Iterator[Job]:
        """Collective over all ranks: the job, formed. On leaving the block without an error the ranks part for good; with one, the others
        are told, unless the error came of a trouble after which all meet again: then MeetAgain is raised instead.

        Raises UserError: this rank's own problem, or what the hub says of another's. PeerLost where rank 0 is gone; KeyboardInterrupt.
        """
        arrived = self._arrive()
        facts, host, lifeline = arrived.facts, arrived.host, arrived.lifeline
        assert self._secret is not None, "found on arrival"
        connections = Connections(of_gloo=facts.backend == "gloo")
        tunnel = StoreTunnel(arrived.address, self._secret, arrived.hello.in_words, self._deadlines)

        def on_trouble(trouble: Trouble) -> None:
            if not (trouble.meets_again and self._goes_on):
                end_process(facts, self.spans, trouble)
            log.warning("%s", f"{trouble.text.rstrip('.')}. All ranks meet again")
            connections.break_all()
            break_off_waits()
            tunnel.close()
            self._has_left.clear()
            leaving = (facts, self.spans, trouble, self._has_left, self._deadlines.waits_s)
            threading.Thread(target=see_it_leave, args=leaving, name="leaving", daemon=True).start()

        def host_lives(was_cut: bool) -> bool:
            entry = arrived.formed["roster"][0]
            return outlives(entry["pid"], entry["host_id"], own_host_id=arrived.hello.host_id, was_cut=was_cut)

        number, self._number, self._meeting = self._number, self._number + 1, arrived.formed["meeting"]
        host_returns = self._expect_again(arrived.formed)
        host_in_words = f"{facts.place.at(0).in_words} on host {arrived.formed['roster'][0]['host']},"
        lifeline.watch(
            on_trouble,
            lambda: self.spans.beat,
            host_returns=host_returns,
            has_lost_connection=connections.has_lost_one,
            outlasts_silence=self._goes_on and self._config.allow_replica_loss,  # it may be this replica that is cut off
            host_lives=host_lives,
            host_in_words=host_in_words,
        )
        try:
            job = self._form(facts, arrived.formed, join_store(tunnel), lifeline, connections, number)
            self.replica_is_back = (lambda: host.hub.replica_is_back) if host is not None else (lambda: False)
            with show_progress(None if host is None else lambda: host.hub.beats, facts.place):
                yield job
                self.spans.enter_phase("waiting for the others to end")
                lifeline.finish()
        except BaseException as error:
            self._part_in_trouble(error, lifeline, host)
            raise
        finally:
            tunnel.close()
        _leave_groups()
        if host is not None:
            host.hub.close()

    def _arrive(self) -> _Arrival:
        """At the door, until all ranks are there. Raises UserError, PeerLost, KeyboardInterrupt."""
        config = self._config
        timeout = timedelta(seconds=config.rendezvous_timeout)
        try:
            if self._facts is None:
                self._facts = look_around(config)
            facts = self._facts
            self._goes_on = self._wants_to_go_on and facts.backend == "gloo"  # a wait in NCCL is not ended by its sockets
            if self._secret is None:
                self._secret = secret_of(config)
            host = self._open_door_in_time(facts, timeout) if facts.place.rank == 0 else None
        except UserError as error:
            if isinstance(error, Unreachable) and self._returns.attempt > 0:  # it was there before, and may come back
                error.restart_helps = True
            if not error.restart_helps:  # else they wait
                tell_others(config, error, TELL_OTHERS_S)
            raise
        door = host.door if host is not None else find_door(config.door, timeout)
        address = (door.host, door.port)
        is_known = self._number + self._returns.attempt > 0
        lifeline = Lifeline(address, self._secret, deadline_s=self._deadline_s, deadlines=self._deadlines, is_known=is_known)
        hello = make_hello(
            config,
            facts,
            problem=None,
            comes_back=self._returns.comes_back,
            attempt=self._returns.attempt,
            meeting=self._meeting if self.holds_state() else "",
        )
        self._leave_the_one_before()
        try:
            with say_who_is_missing(None if host is None else lambda: host.hub.lost, facts.place):
                formed = lifeline.join(
                    hello,
                    on_wait=lambda text: log.info("%s", text),
                    refused_s=self._refused_s,
                    is_asked_to_stop=self._ends_waiting(),
                )
        except (UserError, KeyboardInterrupt) as error:
            if isinstance(error, UserError) and host is not None:
                linger(host.hub, error, TELL_OTHERS_S)
            if not self._is_asked_to_stop():
                raise
            if host is not None:
                host.hub.close()
            tell_others(config, UserError("it was interrupted, and the job with it"), TELL_INTERRUPTED_S)
            raise KeyboardInterrupt from error
        if self._hub_before is not None:
            self._hub_before.close()
            self._hub_before = None
        return _Arrival(facts=facts, host=host, address=address, lifeline=lifeline, hello=hello, formed=formed)

    def close(self) -> None:
        """Where the process goes on and the job does not: leave nothing behind of a meeting that has broken off."""
        self._leave_the_one_before()
        if self._hub_before is not None:
            self._hub_before.close()
            self._hub_before = None

    def _leave_the_one_before(self) -> None:
        """Only now: until here its beats have said that this rank lives, whatever it had to bring to an end first."""
        if self._left is not None:
            self._left.leave()
            self._left = None

    def _ends_waiting(self) -> Callable[[], bool]:
        """Whether to come to no meeting any more. A request to stop that came before is heard behind the next step, which saves what this
        rank holds; one that comes while it waits for others ends that at once."""
        came_before = self._is_asked_to_stop() and self.holds_state()
        # where nobody will be started anew, the hub itself says when a rank that is missing does not come any more
        is_short = self._deadline_s <= self._deadlines.link_back_s
        give_up = math.inf if is_short else time.monotonic() + self._deadlines.link_back_s
        return lambda: self._is_asked_to_stop() and not (came_before and time.monotonic() < give_up)

    def _open_door_in_time(self, facts: LocalFacts, timeout: timedelta) -> _Host:
        """_open_door(); where it was open before, an address that is gone or a port that is taken may only be so for a moment."""
        give_up = time.monotonic() + (self._deadline_s if self._number else 0.0)
        while True:
            try:
                return self._open_door(facts, timeout)
            except UserError as error:
                if time.monotonic() >= give_up or self._is_asked_to_stop():
                    error.restart_helps = self._number + self._returns.attempt > 0
                    raise
            time.sleep(DOOR_AGAIN_S)

    def _expect_again(self, formed: dict[str, Any]) -> bool:
        """What the next meeting is given, if there is one; whether to wait for rank 0 to open it where that is lost."""
        config = self._config
        host_returns = self._goes_on and bool(formed["host_comes_back"])
        self._refused_s = math.inf if host_returns else self._deadlines.refused_s
        if not any(entry["comes_back"] for entry in formed["roster"]) and not config.allow_replica_loss:
            self._deadline_s = min(config.rendezvous_timeout, self._deadlines.link_back_s)  # nobody will be started anew
        return host_returns

    def _part_in_trouble(self, error: BaseException, lifeline: Lifeline, host: _Host | None) -> None:
        """Raises MeetAgain where the job goes on."""
        trouble = None
        if isinstance(error, MeetAgain):  # all ranks decided it together
            if host is not None:
                host.hub.meet_again(str(error))
            trouble = lifeline.trouble(COLLECTIVE_TIMEOUT.total_seconds())
        elif not isinstance(error, UserError):
            wait_s = self._deadlines.cause_s if isinstance(error, (PeerLost, RuntimeError)) else 0.0
            if isinstance(error, (PeerLost, dist.DistError)):
                wait_s += 2 * self._deadlines.silent_s  # rank 0 answers, or is given up
                if lifeline.trouble(0.0) is None:  # nobody is known to be gone
                    lifeline.report_broken(_reason(error))
            trouble = lifeline.trouble(wait_s)
        if trouble is not None and trouble.meets_again and self._goes_on and not isinstance(error, KeyboardInterrupt):
            self._left = lifeline
            self._has_left.set()
            self.spans.enter_phase(COMING)
            self._takes_in = isinstance(error, MeetAgain)
            if not isinstance(error, (MeetAgain, PeerLost, dist.DistError)):
                log.warning("%s", f"{_reason(error)}, while this meeting ended")
            if host is not None:
                self._dead = host.hub.lost
                self._hub_before = host.hub
            _leave_groups()
            raise MeetAgain(trouble.text) from error
        self._has_left.set()
        trace = "" if isinstance(error, (UserError, PeerLost)) else "".join(traceback.format_exception(error))
        lifeline.report_failure(_reason(error), restart_helps=not isinstance(error, UserError), trace=trace)
        if isinstance(error, UserError) and lifeline.trouble(0.0) is not None:  # the others are on their way to the next meeting
            if host is not None:
                host.hub.close()
            tell_others(self._config, error, TELL_OTHERS_S)
        if host is not None:
            host.hub.wait_until_loss_told(TELL_LOSS_S)
        if self._config.world_size == 1:  # a program may go on; a rank that others wait for may not, and would wait for them here
            _leave_groups()
            lifeline.leave()  # which the hub waits for
            if host is not None:
                host.hub.close()

    def _open_door(self, facts: LocalFacts, timeout: timedelta) -> _Host:
        """On rank 0: the hub, listening on the chosen interface's address and nowhere else, and the store behind it. Raises UserError."""
        door = self._config.door
        assert self._secret is not None, "found before"
        address = facts.interface.address if door.agent_prefix else check_door_is_here(door, facts.interface)
        if self._hub_before is not None:
            self._hub_before.retire()
        listener = listen(address, self._port if door.agent_prefix else door.port)
        self._port = listener.getsockname()[1]
        store = serve_store(timeout)
        hub = Hub(
            listener,
            secret=self._secret,
            world_size=facts.place.world_size,
            deadline_s=self._deadline_s,
            store_port=store.port,
            describe=lambda rank: facts.place.at(rank).in_words,
            rules=self._rules(facts),
            before=self._hub_before,
        )
        if door.agent_prefix and self._number == 0:
            try:
                agent_store(door, timeout).set("hub", f"{address}:{self._port}")
            except dist.DistError as error:
                raise UserError(
                    f"rank 0 must reach torchrun's store at {door}; it cannot ({error}). Start the job through torchrun again"
                ) from error
        return _Host(door=Door(host=address, port=self._port), hub=hub, store=store)

    def _rules(self, facts: LocalFacts) -> Rules:
        config, place = self._config, facts.place

        def who_goes_on(present: frozenset[int]) -> list[int]:
            return whole_replicas(present, dp_size=place.dp_size, pp_size=place.pp_size) if config.allow_replica_loss else []

        return Rules(
            may_meet_again=self._goes_on,
            who_goes_on=who_goes_on,
            takes_in=self._takes_in,
            dead=self._dead,
            grace_s=self._deadlines.link_back_s if self._number else 0.0,
            is_first_meeting=self._number == 0,
            deadlines=self._deadlines,
        )

    def _form(
        self, facts: LocalFacts, formed: dict[str, Any], store: dist.Store, lifeline: Lifeline, connections: Connections, number: int
    ) -> Job:
        config, roster = self._config, formed["roster"]
        members = [entry["rank"] for entry in roster]
        place = place_of(members.index(facts.place.rank), dp_size=len(members) // facts.place.pp_size, pp_size=facts.place.pp_size)
        ranks_here = sum(entry["host_id"] == roster[place.rank]["host_id"] for entry in roster)
        num_threads = set_threads(config.num_threads, ranks_here)
        keep_freed_memory()
        text = (
            f"the ranks have met, but {facts.place.in_words} did not get its connections to the others over {facts.interface.name} in "
            "time. Let any firewall between the hosts pass all ports of that interface"
        )
        trouble = Trouble(text=text, restart_helps=number + self._returns.attempt > 0)  # they have been made before
        # what follows is short for all of them, once all are here
        num_fruitless = max(exchange(place, dist.PrefixStore("form", store), "here", self.num_fruitless))
        connect_s = self._deadlines.connect_s * 2 ** max(0, num_fruitless - 1)
        connect_timeout = timedelta(seconds=connect_s) if self._goes_on else None
        too_late = threading.Timer(config.rendezvous_timeout, end_process, [facts, self.spans, trouble])
        too_late.daemon = True
        too_late.start()
        try:
            with connections.recorded():
                join_process_group(place, dist.PrefixStore("groups", store), facts.backend, COLLECTIVE_TIMEOUT, connect_timeout)
                groups = make_groups(place, facts.backend, COLLECTIVE_TIMEOUT, connect_timeout)
        except RuntimeError as error:  # of gloo and the store
            raise PeerLost(f"{text} ({str(error).partition(chr(10))[0]})") from error
        finally:
            too_late.cancel()
        own = {name: getattr(facts, name) for name in LocalFacts.__dataclass_fields__}
        job = Job(
            **{**own, "place": place},
            store=dist.PrefixStore("job", store),
            groups=groups,
            connections=connections,
            lifeline=lifeline,
            roster=roster,
            num_replicas=facts.place.dp_size,
            num_threads=num_threads,
            spans=self.spans,
            number=number,
            meeting=formed["meeting"],
            connect_timeout=connect_timeout,
            deadlines=self._deadlines,
        )
        job.watch_connections()
        return job


def _leave_groups() -> None:
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # of broken connections
            dist.destroy_process_group()


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted (Ctrl-C)"
    if isinstance(error, (UserError, PeerLost)):
        return str(error)
    advice = explain_out_of_memory(error)
    return f"{type(error).__name__}: {error}" + (f". {advice[0].upper()}{advice[1:]}" if advice else "")
