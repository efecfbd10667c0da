"""A rank that dies, freezes, hangs or runs out of memory, in whatever phase, ends the job: all others exit non-zero within seconds, name it
and what it was doing, and no process stays behind. (What comes back by itself: test_coming_back.py, test_links_that_drop.py.)"""

import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.faults import PHASES, Fault, all_end, plant, said, wait_until
from support.ranks import Process, free_port, launch, train, train_argv
from support.tiers import full, sample
from tqdm import tqdm
from tqdm.std import TqdmDefaultWriteLock

from checkpoint.layer_store import StepWriter
from comms.heartbeat import BEAT_S
from pipeline_parallel.engine import PipelineEngine
from training.job import job
from training.membership import announce

DEADLINE_S = 10.0


@pytest.fixture
def flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Of a shorter job, whose door every test chooses itself."""
    del flags["dist_url"]
    return {**flags, "total_steps": 8}


def start(flags: dict[str, Any], tmp_path: Path, fault: Fault, phase: str, victim: int) -> tuple[list[Process], Path, int]:
    """A job of 2 x 2 ranks; the stamp that the fault leaves; the port of the door."""
    stamp, port = tmp_path / "fired", free_port()
    flags = {**flags, "dist_url": f"tcp://127.0.0.1:{port}"}
    processes = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", plant(fault, phase, victim, stamp))
    return processes, stamp, port


def named(victim: int) -> str:
    return f"rank {victim} (stage {victim % 2} of 2, replica {victim // 2} of 2)"


KILLED = [(phase, victim) for phase in PHASES for victim in range(4) if phase != "saving" or victim < 2]  # replica 0 alone saves


@sample(1, by="phase")
@pytest.mark.parametrize(("phase", "victim"), KILLED)
def test_a_killed_rank_is_named_by_all_others_with_what_it_was_doing(
    phase: str, victim: int, flags: dict[str, Any], tasks: list[Path], tmp_path: Path
) -> None:
    if phase == "evaluation":
        flags |= {"evaluation_data": tasks[0], "evaluation_steps": 4, "max_eval_samples": 4}
    processes, stamp, port = start({**flags, "async_checkpoint": phase != "saving"}, tmp_path, Fault.KILL, phase, victim)
    wait_until(stamp.exists, 60, processes)
    all_end(processes, DEADLINE_S)
    assert processes[victim].status == -signal.SIGKILL
    host = socket.gethostname()
    for rank, process in enumerate(processes):
        if rank == victim:
            continue
        assert process.status == 75, said(processes)
        assert "Traceback" not in process.text, process.text
        if victim > 0:
            assert f"{named(victim)} is gone: process {processes[victim].pid} on host {host}" in process.text, process.text
        else:
            assert f"{named(0)} on host {host}, at tcp://127.0.0.1:{port}" in process.text, process.text
            assert " is gone" in process.text, process.text
        assert re.search(rf"last heard of \d\.\d s ago.* in {re.escape(PHASES[phase].says)}", process.text), process.text
        assert "resumes from its newest checkpoint" in process.text
    assert not [c for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN]


@sample(1)
@pytest.mark.parametrize("victim", [0, 3])
def test_a_death_that_resets_connections_is_a_death(victim: int, flags: dict[str, Any], tmp_path: Path) -> None:
    """As the kernel does where a process dies with something unread."""
    processes, stamp, _ = start(flags, tmp_path, Fault.FREEZE, "backward", victim)
    wait_until(stamp.exists, 60, processes)
    time.sleep(4 * BEAT_S)  # what is sent to it meanwhile stays unread
    processes[victim].kill()
    all_end(processes, DEADLINE_S)
    for rank, process in enumerate(processes):
        if rank != victim:
            assert process.status == 75, said(processes)
            assert named(victim) in process.text and " is gone" in process.text, process.text
            assert "All ranks meet again" not in process.text, process.text


@full
def test_a_rank_0_that_stood_still_does_not_blame_those_who_gave_it_up(flags: dict[str, Any], tmp_path: Path) -> None:
    processes, stamp, _ = start({**flags, "peer_timeout": 4}, tmp_path, Fault.FREEZE, "backward", 0)
    wait_until(stamp.exists, 60, processes)
    wait_until(lambda: all(process.poll() == 75 for process in processes[1:]), 20, processes)
    os.kill(processes[0].pid, signal.SIGCONT)
    all_end(processes, DEADLINE_S)
    assert processes[0].status == 75
    assert re.search(r"Rank 0 itself had stood still for \d+ s", processes[0].text), processes[0].text
    assert "dmesg" not in processes[0].text


@sample(1)
@pytest.mark.parametrize(("phase", "victim"), [("forward", 1), ("optimizer", 2), ("loading", 3), ("backward", 0)])
def test_a_frozen_rank_is_given_up_by_all_others_and_ends_when_it_wakes(
    phase: str, victim: int, flags: dict[str, Any], tmp_path: Path
) -> None:
    processes, stamp, _ = start({**flags, "peer_timeout": 3}, tmp_path, Fault.FREEZE, phase, victim)
    others = [process for rank, process in enumerate(processes) if rank != victim]
    try:
        wait_until(stamp.exists, 60, processes)
        frozen_at = time.monotonic()
        wait_until(lambda: all(process.poll() is not None for process in others), 20, processes)
        assert time.monotonic() - frozen_at < 3 + 6
        for process in others:
            assert process.status == 75 and "no sign of life for" in process.text, said(processes)
            assert named(victim) in process.text
            assert PHASES[phase].says in process.text
        os.kill(processes[victim].pid, signal.SIGCONT)
        assert processes[victim].wait(20) != 0
        assert "Traceback" not in processes[victim].text
    finally:
        for process in processes:
            process.kill()


@sample(1)
@pytest.mark.parametrize("victim", [0, 3])
def test_a_rank_that_lives_and_does_not_get_on_is_named(victim: int, flags: dict[str, Any], tmp_path: Path) -> None:
    processes, stamp, _ = start({**flags, "peer_timeout": 3}, tmp_path, Fault.HANG, "optimizer", victim)
    wait_until(stamp.exists, 60, processes)
    all_end(processes, 25)
    for process in processes:
        assert process.status == 75, said(processes)
        assert f"{named(victim)} on host" in process.text and "lives but has not got on for" in process.text, process.text
        assert "step 3, update" in process.text


@sample(1)
@pytest.mark.parametrize(("phase", "victim"), [("forward", 1), ("loading", 0), ("agreeing", 2)])
def test_an_exception_of_a_users_code_is_shown_there_and_on_rank_0(phase: str, victim: int, flags: dict[str, Any], tmp_path: Path) -> None:
    processes, stamp, _ = start(flags, tmp_path, Fault.RAISE, phase, victim)
    all_end(processes, 60)
    assert stamp.exists()
    for rank, process in enumerate(processes):
        assert process.status == (70 if rank == victim else 75), said(processes)
        assert "ZeroDivisionError: a task of the user's" in process.text
        assert ("Traceback" in process.text) == (rank in (0, victim)), process.text
        assert rank == victim or named(victim) in process.text


@pytest.mark.parametrize("victim", [0, 2])
def test_want_of_memory_is_explained_on_all_ranks(victim: int, flags: dict[str, Any], tmp_path: Path) -> None:
    processes, stamp, _ = start(flags, tmp_path, Fault.MEMORY, "forward", victim)
    all_end(processes, 60)
    assert stamp.exists()
    assert [process.status for process in processes] == [70 if rank == victim else 75 for rank in range(4)], said(processes)
    for process in processes:
        assert "--micro-batch-size" in process.text and "MemoryError" in process.text, process.text


def test_ranks_with_other_code_are_refused_before_anything_is_done(flags: dict[str, Any], tmp_path: Path) -> None:
    def before(rank: int) -> None:
        if rank == 3:
            announce.code_version = lambda: "0123456789ab"

    url = f"tcp://127.0.0.1:{free_port()}"
    processes = launch(lambda rank: train_argv(**flags, rank=rank, dist_url=url), 4, tmp_path / "ranks", before)
    all_end(processes, 30)
    for process in processes:
        assert process.status == 1 and "differ in code: " in process.text and "'0123456789ab'" in process.text, process.text


def test_a_defect_on_one_rank_shows_its_traceback_there_and_its_name_on_the_others(flags: dict[str, Any], tmp_path: Path) -> None:
    def before(rank: int) -> None:
        if rank == 2:

            def broken(*_: Any) -> None:
                raise ZeroDivisionError("a defect of ours")

            PipelineEngine._forward = broken  # type: ignore[method-assign]

    url = f"tcp://127.0.0.1:{free_port()}"
    processes = launch(lambda rank: train_argv(**flags, rank=rank, dist_url=url), 4, tmp_path / "ranks", before)
    all_end(processes, 30)
    for rank, process in enumerate(processes):
        assert process.status == (70 if rank == 2 else 75)
        assert "ZeroDivisionError: a defect of ours" in process.text
        assert ("Traceback" in process.text) == (rank in (0, 2))
        assert rank == 2 or "rank 2 (stage 0 of 2, replica 1 of 2)" in process.text


def test_a_restart_at_once_on_the_same_port_works(flags: dict[str, Any], tmp_path: Path) -> None:
    url, stamp = f"tcp://127.0.0.1:{free_port()}", tmp_path / "died"
    killed = launch(
        lambda rank: train_argv(**flags, rank=rank, dist_url=url), 4, tmp_path / "ranks", plant(Fault.KILL, "backward", 0, stamp)
    )
    all_end(killed, 40)
    assert stamp.exists()
    again = launch(lambda rank: train_argv(**flags, rank=rank, dist_url=url), 4, tmp_path / "ranks")
    all_end(again, 60)
    assert [process.status for process in again] == [0, 0, 0, 0], again[0].text


def test_strangers_at_the_door_do_not_disturb_the_ranks_that_meet(flags: dict[str, Any], tmp_path: Path) -> None:
    """Silent, talking and vanishing connections to --dist-url, before and while the ranks meet."""
    import socket

    port = free_port()
    flags = {**flags, "dist_url": f"tcp://127.0.0.1:{port}", "total_steps": 2}
    processes = launch(lambda rank: train_argv(**flags, rank=rank), 3, tmp_path / "ranks")
    strangers = []
    give_up = time.monotonic() + 20
    while len(strangers) < 60 and time.monotonic() < give_up:
        try:
            strangers.append(socket.create_connection(("127.0.0.1", port), timeout=1))
        except OSError:
            time.sleep(0.05)
    assert len(strangers) == 60
    for n, stranger in enumerate(strangers):
        if n % 3 == 0:
            stranger.sendall((b"GET / HTTP/1.0\r\n\r\n", b"\x80\x04.\n", b'{"rank": 3}\n', b"[" * 70000)[n // 3 % 4])
        elif n % 3 == 1:
            stranger.close()
    processes += launch(lambda _: train_argv(**flags, rank=3), 1, tmp_path / "ranks")
    all_end(processes, 60)
    assert [process.status for process in processes] == [0, 0, 0, 0], "\n".join(p.text for p in processes)
    for stranger in strangers:
        stranger.close()


def test_a_rank_whose_terminal_is_gone_still_ends(flags: dict[str, Any], tmp_path: Path) -> None:
    """Its stderr is a closed pipe: the message about the lost rank goes nowhere, the process must end all the same."""
    stamp = tmp_path / "died"
    die = plant(Fault.KILL, "forward", 1, stamp)

    def before(rank: int) -> None:
        die(rank)
        if rank == 2:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 2)

    url = f"tcp://127.0.0.1:{free_port()}"
    processes = launch(lambda rank: train_argv(**flags, rank=rank, dist_url=url), 4, tmp_path / "ranks", before)
    all_end(processes, 40)
    assert stamp.exists() and processes[2].status not in (0, None)


def test_a_rank_that_dies_while_it_writes_a_line_does_not_silence_those_forked_later(flags: dict[str, Any], tmp_path: Path) -> None:
    """tqdm's own lock is a semaphore which forked processes share, and which the kernel frees for no dead owner."""
    tqdm.set_lock(TqdmDefaultWriteLock())  # as where the parent of the ranks has shown a bar

    def dies_writing(_: int) -> None:
        def last_line(text: str, file: Any = None) -> None:
            with tqdm.get_lock():
                os.kill(os.getpid(), signal.SIGKILL)

        tqdm.write = last_line  # type: ignore[method-assign]

    alone = {**flags, "pipeline_group_size": 1, "data_group_size": 1, "world_size": 1, "total_steps": 1}
    train(tmp_path / "killed", expect=-signal.SIGKILL, before=dies_writing, **alone)
    (later,) = train(tmp_path / "later", timeout_s=30, **alone)
    assert "starting at step" in later.text


def test_a_save_may_take_longer_than_any_step(flags: dict[str, Any], tmp_path: Path) -> None:
    """Rank 0 commits slowly; the others wait in a collective and must not take it for lost."""
    assert job.COLLECTIVE_TIMEOUT.days >= 30, "the heartbeat decides who is lost, and no time limit of a wait"

    def before(rank: int) -> None:
        commit = StepWriter.commit

        def slow(self: StepWriter, *args: Any, **kwargs: Any) -> Any:
            time.sleep(2)
            return commit(self, *args, **kwargs)

        StepWriter.commit = slow  # type: ignore[method-assign]

    train(tmp_path / "ranks", stages=2, replicas=2, before=before, **{**flags, "total_steps": 4})


def test_a_save_that_fails_leaves_no_rest_behind(flags: dict[str, Any], tmp_path: Path) -> None:
    def before(rank: int) -> None:
        from user_error import UserError

        def full(self: StepWriter, *_: Any) -> Any:
            (self.partial / "half a file").write_text("x")
            raise UserError("cannot write: No space left on device")

        StepWriter.write_train_state = full  # type: ignore[method-assign]

    (process,) = train(
        tmp_path / "ranks", expect=1, before=before, **{**flags, "pipeline_group_size": 1, "data_group_size": 1, "world_size": 1}
    )
    assert "No space left on device" in process.text and "Traceback" not in process.text
    assert sorted(path.name for path in Path(flags["checkpoint_path"]).iterdir()) == [".lock", ".run.json", "train_log.jsonl"]


def test_two_single_process_jobs_need_no_port_of_their_own(flags: dict[str, Any], tmp_path: Path) -> None:
    alone = {**flags, "pipeline_group_size": 1, "data_group_size": 1, "world_size": 1}
    processes = [
        process
        for n in range(2)
        for process in launch(lambda _, n=n: train_argv(**{**alone, "checkpoint_path": tmp_path / f"run{n}"}), 1, tmp_path / "ranks")
    ]
    all_end(processes, 60)
    assert [process.status for process in processes] == [0, 0], processes[1].text


def test_no_process_and_no_port_stays_behind(flags: dict[str, Any], tmp_path: Path) -> None:
    port, stamp = free_port(), tmp_path / "died"
    processes = launch(
        lambda rank: train_argv(**flags, rank=rank, dist_url=f"tcp://127.0.0.1:{port}"),
        4,
        tmp_path / "ranks",
        plant(Fault.KILL, "forward", 1, stamp),
    )
    pids = {process.pid for process in processes}
    children = {child.pid for pid in pids if psutil.pid_exists(pid) for child in psutil.Process(pid).children(recursive=True)}
    all_end(processes, 40)
    assert not [pid for pid in pids | children if psutil.pid_exists(pid)]
    assert not [c for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN]
