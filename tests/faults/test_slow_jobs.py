"""A healthy job may be as slow as it likes: nothing that was built against failures ends it, or makes its ranks meet again.

All limits but the one of silence are divided by 20, and what is slow here lasts several of them. At the size of a toy every limit would
be long enough."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.faults import Fault, all_end, both, fire, keep_connections, said, wait_until
from support.grids import num_rows, supervised, undisturbed
from support.namespaces import HOSTS
from support.ranks import Process, free_port, launch, log_rows, losses, train_argv
from support.tiers import full, sample

from checkpoint.layer_store import StepWriter
from comms.connections import Connections
from comms.deadlines import DEADLINES
from comms.interfaces import list_interfaces
from modules.stage import Stage
from tasks.mixture import Mixture
from training.compute.evaluator import Evaluator
from training.loop import Trainer
from training.membership import meeting
from training.start import weights

SHORT = DEADLINES.divided_by(20)
SLOW_S = 4.0  # several of them: to meet again 1.5 s, to make a group 1 s, for a handshake 1.5 s


def short(rank: int) -> None:
    meeting.DEADLINES = SHORT


def slow(owner: Any, name: str, on: int, stamps: Path, call: int = 1, slow_s: float = SLOW_S) -> Callable[[int], None]:
    """The ``call``-th call of ``owner.name`` takes ``slow_s`` longer on rank ``on``."""

    def before(rank: int) -> None:
        original, calls = getattr(owner, name), 0

        def slower(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if rank == on and calls == call:
                time.sleep(slow_s)
                (stamps / f"{getattr(owner, '__name__', owner)}.{name} on {rank}").touch()
            return original(*args, **kwargs)

        setattr(owner, name, slower)

    return before


def check_that_nothing_happened(ranks: list[Process]) -> None:
    assert [process.status for process in ranks] == [0] * len(ranks), said(ranks)
    assert not [process for process in ranks if "meet again" in process.text], said(ranks)


def test_slow_loads_steps_saves_evaluations_and_readers_are_no_failures(flags: dict[str, Any], tasks: list[Path], tmp_path: Path) -> None:
    flags |= {"total_steps": 4, "checkpoint_steps": 2, "async_checkpoint": False}
    flags |= {"evaluation_data": tasks[0], "evaluation_steps": 2, "max_eval_samples": 4}
    (stamps := tmp_path / "stamps").mkdir()
    places = [
        (weights, "load_weights", 1, 1),
        (Trainer, "__init__", 3, 1),
        (Stage, "forward", 2, 1),  # of the first step, when nobody knows how long a step takes
        (Stage, "forward", 1, 4),
        (Mixture, "next_sequence", 0, 20),
        (StepWriter, "write_layer", 1, 2),
        (StepWriter, "commit", 0, 1),
        (Evaluator, "mean_loss", 3, 1),
        (Trainer, "close", 2, 1),
    ]
    before = both(short, *(slow(owner, name, on, stamps, call) for owner, name, on, call in places))
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", before)
    all_end(ranks, 120)
    check_that_nothing_happened(ranks)
    names = {f"{getattr(owner, '__name__', owner)}.{name} on {on}" for owner, name, on, _ in places}
    assert {stamp.name for stamp in stamps.iterdir()} == names, "each of them was slow"


@sample(1)
@pytest.mark.parametrize("busy", [0, 1])
def test_a_rank_in_the_middle_of_a_long_computation_is_waited_for_where_all_meet_again(
    busy: int, flags: dict[str, Any], tmp_path: Path
) -> None:
    """A link breaks meanwhile. The others come to the next meeting at once; it beats, and comes when it has done."""
    flags |= {"data_group_size": 1, "world_size": 2, "total_steps": 6}
    stamp = tmp_path / "fired"

    def break_link(rank: int) -> None:
        made: list[Connections] = []
        keep_connections(made)
        forward, calls = Stage.forward, 0

        def long(self: Stage, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if rank == busy and calls == 7 and not stamp.exists():
                fire(Fault.LINK, stamp, made)
                time.sleep(2 * SLOW_S)
            return forward(self, *args, **kwargs)

        Stage.forward = long  # type: ignore[method-assign]

    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 2, tmp_path / "ranks", both(short, break_link))
    all_end(ranks, 90)
    assert stamp.exists() and [process.status for process in ranks] == [0, 0], said(ranks)
    assert "All ranks meet again" in ranks[0].text
    assert losses(tmp_path / "run") == losses(undisturbed(flags, tmp_path))


@full
def test_a_rank_that_brings_something_to_an_end_between_two_meetings_is_waited_for(flags: dict[str, Any], tmp_path: Path) -> None:
    """It ended with an error of its own, and closes files that a slow disk holds up; rank 0 does the same."""
    flags |= {"data_group_size": 1, "world_size": 2, "total_steps": 6}
    (stamps := tmp_path / "stamps").mkdir()
    stamp = tmp_path / "fired"

    def broken(rank: int) -> None:
        made: list[Connections] = []
        keep_connections(made)
        step = Trainer._one_step

        def fails(self: Trainer, *args: Any) -> Any:
            if self._optimizer_step == 3 and rank == 1 and not stamp.exists():
                fire(Fault.LINK, stamp, made)
            return step(self, *args)

        Trainer._one_step = fails  # type: ignore[method-assign]

    closing = [slow(meeting, "_leave_groups", rank, stamps) for rank in (0, 1)]
    before = both(short, supervised(0), broken, *closing)
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 2, tmp_path / "ranks", before)
    all_end(ranks, 90)
    assert stamp.exists() and len(list(stamps.iterdir())) == 2, said(ranks)
    assert [process.status for process in ranks] == [0, 0], said(ranks)


@full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_let_run_for_a_moment_now_and_then_is_alive(victim: int, flags: dict[str, Any], tmp_path: Path) -> None:
    """As on a machine that is overloaded, or under a debugger. Its beats arrive, so it computes, slowly."""
    flags |= {"data_group_size": 1, "world_size": 2, "total_steps": 60, "checkpoint_steps": 0}
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 2, tmp_path / "ranks", short)
    wait_until(lambda: num_rows(tmp_path / "run") > 2, 60, ranks)
    began = time.monotonic()
    while time.monotonic() - began < 15 and ranks[victim].poll() is None:
        os.kill(ranks[victim].pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.kill(ranks[victim].pid, signal.SIGCONT)
        time.sleep(0.02)
    assert ranks[victim].poll() is None, "it was slow while it had still work to do"
    all_end(ranks, 90)
    check_that_nothing_happened(ranks)


@full
def test_a_message_may_take_longer_than_any_limit(two_hosts: None, flags: dict[str, Any], tmp_path: Path) -> None:
    """24 kbit/s both ways between two hosts: an activation of 8 KB takes 3 s and shares the link with the beats."""
    flags |= {"data_group_size": 1, "world_size": 2, "total_steps": 2, "checkpoint_steps": 0, "net_interface": "back"}
    (secret := tmp_path / "secret").touch(mode=0o600)
    secret.write_text("known to both hosts alone")
    flags |= {"dist_url": f"tcp://10.81.2.1:{free_port()}", "secret_file": secret, "batch_size": 2}
    set_up = tmp_path / "is set up"

    def on_its_host(rank: int) -> None:
        with open(f"/var/run/netns/{HOSTS[rank]}") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
        wait_until(lambda: "back" in list_interfaces(), 10, [])  # the kernel says so a moment after it is up
        train = Trainer.run

        def run(self: Trainer, *args: Any) -> None:
            (tmp_path / f"ready{rank}").touch()
            wait_until(set_up.exists, 30, [])
            train(self, *args)

        Trainer.run = run  # type: ignore[method-assign]

    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 2, tmp_path / "ranks", both(short, on_its_host))
    wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)), 60, ranks)
    for host in HOSTS:
        slow_down = ["ip", "netns", "exec", host, "tc", "qdisc", "add", "dev", "back", "root", "tbf"]
        limit = subprocess.run([*slow_down, "rate", "24kbit", "burst", "2kb", "latency", "4000ms"], capture_output=True)
        if limit.returncode:
            all_end_now(ranks)
            pytest.skip(f"this machine slows no interface down: {limit.stderr.decode().strip()}")
    set_up.touch()
    all_end(ranks, 120)
    check_that_nothing_happened(ranks)
    rows = log_rows(tmp_path / "run")
    assert len(rows) == 2 and all(row["wire_bytes"] >= 8192 for row in rows)
    assert equal_losses(tmp_path, flags)


def equal_losses(tmp_path: Path, flags: dict[str, Any]) -> bool:
    plain = {name: value for name, value in flags.items() if name not in ("net_interface", "secret_file")}
    return losses(tmp_path / "run") == losses(undisturbed(plain, tmp_path))


def all_end_now(ranks: list[Process]) -> None:
    for process in ranks:
        process.kill()
