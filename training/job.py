"""From flags to a job whose ranks have met: every rank knows its place, its device and its peers, and hears when one of them is gone.

Order matters. First what this rank can check alone (interface, device, the model's headers); then the hub, where a problem of one
rank reaches all of them; only then process groups. Nothing here reads a weight. Promises: every failure is one UserError, alike
in meaning on all ranks, before anything was written; after meet() a lost peer ends this process within moments, whatever it is
doing."""

import contextlib
import json
import logging
import math
import os
import platform
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from comms.groups import Groups, join_process_group, make_groups
from comms.hub import Hello, Hub
from comms.lifeline import Lifeline
from comms.links import PeerLost, naming_the_peer
from comms.place import Place
from comms.rendezvous import Door, agent_store, check_door_is_here, join_store, listen, serve_store
from comms.spans import Spans
from training.allocator import keep_freed_memory
from training.config import Config, shared_flags
from training.local_facts import LocalFacts, look_around
from training.precision import SHORT, precision_of
from user_error import UserError

log = logging.getLogger("trainer")

EXIT_FAILED = 1
COLLECTIVE_TIMEOUT = timedelta(hours=6)  # a save or a long read of rank 0 fits in; deaths are noticed by the lifelines, in moments
TELL_OTHERS_S = 30.0
TELL_FLAGS_S = 10.0  # wrong flags are mostly wrong on all ranks alike
CAUSE_WAIT_S = 5.0
TELL_LOSS_S = 2.0
LAST_WORDS_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Job(LocalFacts):
    """A job that has formed. ``store`` is shared by all ranks; ``num_threads`` is what torch computes with here."""

    store: dist.Store
    groups: Groups
    lifeline: Lifeline
    roster: list[dict[str, Any]]
    num_threads: int
    spans: Spans

    @property
    def peer_names(self) -> list[str]:
        """How messages name every rank."""
        return [f"{self.place.at(rank).in_words} on host {entry['host']}" for rank, entry in enumerate(self.roster)]

    def wait_for_all(self) -> None:
        """Collective over all ranks: returns when all have called it, so that nobody's end is taken for a loss."""
        with self.spans.span("waiting for the other ranks"), naming_the_peer("waiting for the other ranks"):
            dist.barrier()


def all_say(job: Job, store: dist.Store, what: str, mine: Any) -> list[Any]:
    """Called by all ranks, once for each ``what`` in ``store``: everybody's ``mine`` (JSON), by rank."""
    store.set(f"{what}/{job.place.rank}", json.dumps(mine))
    keys = [f"{what}/{rank}" for rank in range(job.place.world_size)]
    store.wait(keys, COLLECTIVE_TIMEOUT)
    return [json.loads(store.get(key)) for key in keys]


@contextlib.contextmanager
def meet(config: Config) -> Iterator[Job]:
    """Collective over all ranks: the job, formed. On leaving the block without an error the ranks part; with one, the others are told.

    Raises UserError: this rank's own problem, or what the hub says of another's.
    """
    timeout = timedelta(seconds=config.rendezvous_timeout)
    try:
        facts = look_around(config)
        host = _open_door(config, facts, timeout) if facts.place.rank == 0 else None
    except UserError as error:
        tell_others(config, error, TELL_OTHERS_S)
        raise
    door = host.door if host is not None else _find_door(config.door, timeout)
    lifeline = Lifeline((door.host, door.port), deadline_s=config.rendezvous_timeout)
    try:
        formed = lifeline.join(_hello(config, facts, problem=None))
    except UserError as error:
        if host is not None:
            _linger(host.hub, error, TELL_OTHERS_S)
        raise
    spans = Spans()
    lifeline.watch(lambda text, restart_helps: _end_process(facts.place, spans, text, restart_helps))
    try:
        store = host.store if host is not None else join_store(formed["store"][0], formed["store"][1], timeout)
        job = _form(config, facts, formed["roster"], store, lifeline, spans)
        yield job
        job.wait_for_all()
    except BaseException as error:
        if isinstance(error, (PeerLost, RuntimeError)):
            lifeline.cause_of_loss(CAUSE_WAIT_S)  # if the hub knows who is gone, this process ends inside the wait, naming it
        lifeline.report_failure(_reason(error), restart_helps=not isinstance(error, UserError))
        if host is not None:
            host.hub.wait_until_loss_told(TELL_LOSS_S)
        if config.world_size == 1:  # a program may go on; a rank that others wait for may not, and would wait for them here
            if dist.is_initialized():
                dist.destroy_process_group()
            if host is not None:
                host.hub.close()
        raise
    lifeline.done()
    dist.destroy_process_group()
    if host is not None:
        host.hub.close()


@dataclass(frozen=True, kw_only=True)
class _Host:
    """What rank 0 keeps open for the others."""

    door: Door
    hub: Hub
    store: dist.TCPStore


def _open_door(config: Config, facts: LocalFacts, timeout: timedelta) -> _Host:
    """On rank 0: hub and store, listening on the chosen interface's address and nowhere else. Raises UserError."""
    door = config.door
    address = facts.interface.address if door.agent_prefix else check_door_is_here(door, facts.interface)
    listener = listen(address, 0 if door.agent_prefix else door.port)
    store, store_port = serve_store(address, timeout)
    hub_port = listener.getsockname()[1]
    hub = Hub(
        listener,
        world_size=facts.place.world_size,
        deadline_s=config.rendezvous_timeout,
        formed={"store": [address, store_port]},
        describe=lambda rank: facts.place.at(rank).in_words,
    )
    if door.agent_prefix:
        try:
            agent_store(door, timeout).set("hub", f"{address}:{hub_port}")
        except dist.DistError as error:
            raise UserError(
                f"rank 0 must reach torchrun's store at {door}; it cannot ({error}). Start the job through torchrun again"
            ) from error
    return _Host(door=Door(host=address, port=hub_port), hub=hub, store=store)


def _form(config: Config, facts: LocalFacts, roster: list[dict[str, Any]], store: dist.Store, lifeline: Lifeline, spans: Spans) -> Job:
    own = roster[facts.place.rank]
    ranks_here = sum(entry["host_id"] == own["host_id"] for entry in roster)
    num_threads = config.num_threads or max(1, len(os.sched_getaffinity(0)) // ranks_here)
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    text = (
        f"the ranks have met, but {facts.place.in_words} did not get its connections to the others over {facts.interface.name} within "
        f"{config.rendezvous_timeout:.0f} s (--rendezvous-timeout). Let any firewall between the hosts pass all ports of that interface"
    )
    too_late = threading.Timer(config.rendezvous_timeout, _end_process, [facts.place, spans, text, False])
    too_late.daemon = True
    too_late.start()
    try:
        join_process_group(facts.place, dist.PrefixStore("groups", store), facts.backend, COLLECTIVE_TIMEOUT)
        groups = make_groups(facts.place, facts.backend, COLLECTIVE_TIMEOUT)
    finally:
        too_late.cancel()
    return Job(
        **{name: getattr(facts, name) for name in LocalFacts.__dataclass_fields__},
        store=dist.PrefixStore("job", store),
        groups=groups,
        lifeline=lifeline,
        roster=roster,
        num_threads=num_threads,
        spans=spans,
    )


def _hello(config: Config, facts: LocalFacts | None, problem: str | None) -> Hello:
    assert config.rank is not None and config.world_size is not None, "parse_config filled these in"
    plan: dict[str, Any] = {}
    if facts is not None:
        plan = {
            **shared_flags(config),
            "transport": facts.backend,
            "hidden states": SHORT[precision_of(config, facts.device).compute],  # --fp16 has other ones on a CPU
            "model (configuration and tensor shapes)": facts.model.digest(),
            "torch version": torch.__version__.split("+")[0],
            "python version": ".".join(platform.python_version_tuple()[:2]),
        }
    return Hello(
        rank=config.rank,
        world_size=config.world_size,
        host=socket.gethostname(),
        host_id=f"{socket.gethostname()}/{_boot_id()}",
        pid=os.getpid(),
        address=facts.interface.address if facts is not None else "",
        is_loopback=facts is not None and facts.interface.is_loopback,
        plan=plan,
        problem=problem,
    )


def _boot_id() -> str:
    """Tells hosts of one name apart; containers of one machine share it, as they share its cores."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted (Ctrl-C)"
    return str(error) if isinstance(error, (UserError, PeerLost)) else f"{type(error).__name__}: {error}"


def tell_others(config: Config, problem: UserError, within_s: float) -> None:
    """Best effort, at most ``within_s``: let the ranks that would wait for this one hear why it does not come. Shows ``problem``
    here first.
    """
    if config.world_size in (None, 1):
        return
    assert config.world_size is not None, "checked above"
    log.error("error: %s", problem)
    problem.was_shown = True
    asked_s = config.rendezvous_timeout
    timeout = timedelta(seconds=min(asked_s, within_s) if math.isfinite(asked_s) and asked_s > 0 else within_s)
    with contextlib.suppress(UserError, OSError, dist.DistError):
        if config.rank != 0:
            _say_to_hub(config, problem, timeout)
            return
        door = config.door
        try:
            listener = listen(door.host, 0 if door.agent_prefix else door.port)
        except UserError:  # perhaps another rank 0 of this job sits there: then it should hear of this one
            _say_to_hub(config, problem, timeout)
            return
        hub = Hub(
            listener,
            world_size=config.world_size,
            deadline_s=timeout.total_seconds(),
            formed={},
            describe=lambda rank: f"rank {rank}",
            problem=f"rank 0 (host {socket.gethostname()}): {problem}",
        )
        if door.agent_prefix:
            agent_store(door, timeout).set("hub", f"{door.host}:{listener.getsockname()[1]}")
        _linger(hub, problem, within_s)


def _say_to_hub(config: Config, problem: UserError, timeout: timedelta) -> None:
    door = _find_door(config.door, timeout)
    Lifeline((door.host, door.port), deadline_s=timeout.total_seconds()).join(_hello(config, None, str(problem)))


def _linger(hub: Hub, problem: UserError, within_s: float) -> None:
    """On rank 0, before it ends: the ranks that are still starting would otherwise wait for it in vain."""
    if not problem.was_shown:
        log.error("error: %s", problem)
        problem.was_shown = True
    log.info("telling the other ranks, for at most %.0f s", within_s)
    hub.wait_until_refusal_told(within_s)
    hub.close()


def _find_door(door: Door, timeout: timedelta) -> Door:
    """Where rank 0's hub is: at --dist-url, or where it told torchrun's store. Raises UserError when it did not in time."""
    if not door.agent_prefix:
        return door
    try:
        host, _, port = agent_store(door, timeout).get("hub").decode().rpartition(":")
    except dist.DistError as error:
        raise UserError(
            f"rank 0 must announce itself through torchrun's store at {door} within {timeout.total_seconds():.0f} s; it did not ({error})"
        ) from error
    return Door(host=host, port=int(port))


def _end_process(place: Place, spans: Spans, text: str, restart_helps: bool) -> None:
    """Called on the lifeline's thread. The main thread may hang in a wait that nothing can cancel, so the process ends here and now."""
    threading.Timer(LAST_WORDS_S, os._exit, [EXIT_FAILED]).start()  # also if nobody reads our stderr any more
    try:
        where = f"This was noticed during {spans.in_words} on {place.in_words}. " if restart_helps else ""
        advice = (
            "The job cannot go on; start it again with the same command and it resumes from its newest checkpoint." if restart_helps else ""
        )
        log.error("%s", f"{text.rstrip('.')}. {where}{advice}".rstrip())
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(EXIT_FAILED)
