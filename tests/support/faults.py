"""Faults to plant in a forked rank: what, on which rank, in which phase. Each leaves a stamp when it fires, so that no test can pass on a
fault that did not."""

import enum
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.ranks import Process

from checkpoint.layer_store import StepWriter
from comms.connections import Connections
from data_parallel import allreduce
from data_parallel.allreduce import GradientBuckets
from modules.stage import Stage
from optim.build import AdamW
from pipeline_parallel.engine import PipelineEngine
from training import loop
from training.compute import gradient
from training.compute.evaluator import Evaluator
from training.membership import meeting
from training.start import weights

SAYS_SO_S = 1.3  # a beat goes out every half second: by then the hub knows what the victim is in


class Fault(enum.Enum):
    """What happens to a rank."""

    KILL = "kill"  # SIGKILL
    FREEZE = "freeze"  # SIGSTOP
    RAISE = "raise"  # an exception, as of a user's task
    MEMORY = "memory"
    HANG = "hang"  # its main thread waits for ever, the process lives
    LINK = "link"  # all its connections to other ranks end


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Where: in the ``call``-th call of ``owner.name`` on the victim; if given, in the first call of ``inner`` (owner, name) within that,
    which is inside of the span. says: what messages call it."""

    owner: Any
    name: str
    call: int
    says: str
    inner: tuple[Any, str] | None = None


PHASES = {
    "rendezvous": Phase(owner=meeting.Meetings, name="_form", call=1, says="starting"),
    "loading": Phase(owner=weights, name="load_weights", call=1, says="loading weights"),
    "forward": Phase(owner=PipelineEngine, name="_forward", call=6, says="step 3, forward of micro-batch 1", inner=(Stage, "forward")),
    "backward": Phase(
        owner=PipelineEngine, name="_backward", call=6, says="step 3, backward of micro-batch 1", inner=(torch.Tensor, "backward")
    ),
    "allreduce": Phase(owner=GradientBuckets, name="finish", call=3, says="step 3, allreduce", inner=(allreduce, "naming_the_peer")),
    "agreeing": Phase(owner=loop.GlobalGradient, name="compute", call=3, says="step 3, agreeing", inner=(gradient, "decide_step")),
    "decided": Phase(owner=loop.GlobalGradient, name="scale_as_decided", call=3, says="step 3, "),
    "optimizer": Phase(owner=AdamW, name="step", call=3, says="step 3, update"),
    "saving": Phase(owner=StepWriter, name="write_layer", call=3, says="step 3, saving a checkpoint"),
    "evaluation": Phase(owner=Evaluator, name="mean_loss", call=1, says="step 4, evaluating"),
    "last step": Phase(owner=loop.GlobalGradient, name="forget", call=8, says="step 8, update"),
}


def plant(fault: Fault, phase: str, victim: int, stamp: Path) -> Callable[[int], None]:
    """For harness.launch(before=...): the fault fires once on rank ``victim``, leaving the time in ``stamp``."""
    where = PHASES[phase]

    def before(rank: int) -> None:
        made: list[Connections] = []
        keep_connections(made)
        if rank != victim:
            return
        original, calls, is_armed = getattr(where.owner, where.name), 0, False

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls, is_armed
            calls += 1
            if calls == where.call and not stamp.exists():
                if where.inner is None:
                    fire(fault, stamp, made)
                is_armed = where.inner is not None
            return original(*args, **kwargs)

        setattr(where.owner, where.name, counted)
        if where.inner is None:
            return
        inside = getattr(*where.inner)

        def fatal(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_armed
            if is_armed:
                is_armed = False
                fire(fault, stamp, made)
            return inside(*args, **kwargs)

        setattr(*where.inner, fatal)

    return before


def both(*befores: Callable[[int], None]) -> Callable[[int], None]:
    def before(rank: int) -> None:
        for one in befores:
            one(rank)

    return before


def keep_connections(made: list[Connections]) -> None:
    """So that a fault can break them."""
    create = Connections.__init__

    def remembered(self: Connections, **kwargs: Any) -> None:
        create(self, **kwargs)
        made.append(self)

    Connections.__init__ = remembered  # type: ignore[method-assign]


def fire(fault: Fault, stamp: Path, made: list[Connections]) -> None:
    if fault in (Fault.KILL, Fault.FREEZE):
        time.sleep(SAYS_SO_S)
    stamp.write_text(repr(time.time()))
    if fault is Fault.KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault is Fault.FREEZE:
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault is Fault.RAISE:
        raise ZeroDivisionError("a task of the user's")
    if fault is Fault.MEMORY:
        raise MemoryError("a machine that is too small")
    if fault is Fault.HANG:
        time.sleep(3600)
    if fault is Fault.LINK:
        made[-1].break_all()


def wait_until(what: Callable[[], object], within_s: float, processes: list[Process]) -> None:
    give_up = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < give_up, "\n".join(process.text for process in processes)
        time.sleep(0.01)


def all_end(processes: list[Process], within_s: float) -> None:
    """None of them stays behind, whatever happens."""
    give_up = time.monotonic() + within_s
    try:
        for process in processes:
            process.wait(max(0.1, give_up - time.monotonic()))
    finally:
        for process in processes:
            process.kill()


def stop(processes: list[Process], within_s: float = 60) -> None:
    """As a SIGTERM at one of them does: all stop behind the same step, saved."""
    os.kill(processes[-1].pid, signal.SIGTERM)
    all_end(processes, within_s)


def said(processes: list[Process]) -> str:
    return "\n".join(f"--- {process.status}\n{process.text}" for process in processes)
