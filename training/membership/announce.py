"""What a rank says at the door: who it is, or, where it cannot start, why; so that those who would wait for it hear at once."""

import contextlib
import logging
import math
import os
import platform
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from comms.hub import Hub
from comms.interfaces import choose_interface
from comms.lifeline import Lifeline
from comms.rendezvous import Door, agent_store, listen
from comms.roster import Hello
from comms.secret import Secret, find_secret
from training.config.precision import SHORT, precision_of
from training.config.train import Config, shared_flags
from training.job.code_version import code_version
from training.job.local_facts import LocalFacts
from user_error import UserError

log = logging.getLogger("trainer")

TELL_OTHERS_S = 30.0
TELL_FLAGS_S = 10.0  # wrong flags are mostly wrong on all ranks alike


def make_hello(
    config: Config, facts: LocalFacts | None, problem: str | None, *, comes_back: bool = False, attempt: int = 0, meeting: str = ""
) -> Hello:
    """What this rank says of itself. facts: None where it did not come as far as to know any; ``problem`` says why. comes_back, attempt,
    meeting: see Hello."""
    assert config.rank is not None and config.world_size is not None, "parse_config filled these in"
    plan: dict[str, Any] = {}
    if facts is not None:
        plan = {
            **shared_flags(config),
            "transport": facts.backend,
            "hidden states": SHORT[precision_of(config, facts.device).compute],  # --fp16 has other ones on a CPU
            "model (configuration and tensor shapes)": facts.model.digest(),
            "torch version": torch.__version__.split("+")[0],
            "code": code_version(),
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
        comes_back=comes_back,
        attempt=attempt,
        meeting=meeting,
    )


def _boot_id() -> str:
    """Tells hosts of one name apart; containers of one machine share it, as they share its cores."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


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
            secret=secret_of(config),
            world_size=config.world_size,
            deadline_s=timeout.total_seconds(),
            store_port=None,
            describe=lambda rank: f"rank {rank}",
            problem=f"rank 0 (host {socket.gethostname()}): {problem}",
        )
        if door.agent_prefix:
            agent_store(door, timeout).set("hub", f"{door.host}:{listener.getsockname()[1]}")
        linger(hub, problem, within_s)


def secret_of(config: Config) -> Secret:
    """The secret that this rank of the job must know. Raises UserError."""
    is_loopback = choose_interface(None, config.door.host).is_loopback  # where the door is, whatever --net-interface says
    return find_secret(config.secret_file, is_loopback=is_loopback, is_alone=config.world_size == 1)


def _say_to_hub(config: Config, problem: UserError, timeout: timedelta) -> None:
    door = find_door(config.door, timeout)
    lifeline = Lifeline((door.host, door.port), secret_of(config), deadline_s=timeout.total_seconds())
    lifeline.join(make_hello(config, None, str(problem)))


def linger(hub: Hub, problem: UserError, within_s: float) -> None:
    """On rank 0, before it ends: the ranks that are still starting would otherwise wait for it in vain."""
    if not problem.was_shown:
        log.error("error: %s", problem)
        problem.was_shown = True
    log.info("telling the other ranks, for at most %.0f s", within_s)
    hub.wait_until_refusal_told(within_s)
    hub.close()


def find_door(door: Door, timeout: timedelta) -> Door:
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
