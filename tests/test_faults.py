"""A rank that dies, in whatever phase, ends the job within 10 s: the others exit non-zero, name it, and no process stays behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import REPOSITORY, Process, free_port, launch, log_rows, losses, train, train_argv
from tqdm import tqdm
from tqdm.std import TqdmDefaultWriteLock

from checkpoint.layer_store import StepWriter
from comms.links import ProcessGroupLink
from data_parallel.allreduce import GradientBuckets
from pipeline_parallel.engine import PipelineEngine
from training import job, loop, meeting, start

DEADLINE_S = 10.0

# phase -> the method in whose third call (first, where it is called once) the victim dies
PHASES: dict[str, tuple[Any, str, int]] = {
    "meeting": (meeting.Meetings, "_form", 1),
    "preparing": (start, "find_folders", 1),
    "loading": (loop, "load_weights", 1),
    "forward": (PipelineEngine, "_forward", 3),
    "backward": (PipelineEngine, "_backward", 3),
    "allreduce": (GradientBuckets, "finish", 2),
    "sending": (ProcessGroupLink, "put", 3),
    "deciding": (loop.GlobalGradient, "forget", 2),
    "saving": (StepWriter, "write_layer", 2),
    "ending": (job.Job, "wait_for_all", 1),
}


@pytest.fixture
def flags(model_folder: Path, tasks: list[Path], tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name": model_folder,
        "task_name": tasks[0],
        "checkpoint_path": tmp_path / "run",
        "seq_length": 32,
        "batch_size": 4,
        "micro_batch_size": 2,
        "total_steps": 8,
        "checkpoint_steps": 3,
        "pipeline_group_size": 2,
        "data_group_size": 2,
        "world_size": 4,
        "device": "cpu",
        "num_threads": 1,
        "rendezvous_timeout": 60,
    }


def die_in(phase: str, victim: int, stamp: Path) -> Callable[[int], None]:
    """A fault for harness.launch: SIGKILL of the victim itself, noting when."""

    def before(rank: int) -> None:
        owner, name, wanted = PHASES[phase]
        original, calls = getattr(owner, name), 0

        def fatal(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if rank == victim and calls == wanted:
                stamp.write_text(repr(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, fatal)

    return before


def all_end(processes: list[Process], within_s: float) -> None:
    give_up = time.monotonic() + within_s
    try:
        for process in processes:
            process.wait(max(0.1, give_up - time.monotonic()))
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_rank_ends_the_job_within_10_s_and_is_named_by_all(phase: str, victim: int, flags: dict[str, Any], tmp_path: Path) -> None:
    if phase == "saving" and victim >= 2:
        pytest.skip("replica 0 alone writes checkpoints")
    stamp = tmp_path / "died"
    url = f"tcp://127.0.0.1:{free_port()}"
    processes = launch(lambda rank: train_argv(**flags, rank=rank, dist_url=url), 4, tmp_path / "ranks", die_in(phase, victim, stamp))
    give_up = time.monotonic() + 40
    while not stamp.exists():
        assert time.monotonic() < give_up, "the fault must fire: " + "\n".join(p.text for p in processes)
        time.sleep(0.01)
    all_end(processes, DEADLINE_S)
    assert processes[victim].status == -signal.SIGKILL
    for rank, process in enumerate(processes):
        if rank != victim:
            assert process.status not in (0, None), process.text
            assert f"rank {victim} " in process.text, process.text
            assert "Traceback" not in process.text, process.text


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
    killed = launch(lambda rank: train_argv(**flags, rank=rank, dist_url=url), 4, tmp_path / "ranks", die_in("backward", 0, stamp))
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
    die = die_in("forward", 1, stamp)

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
    """Rank 0 commits slowly; the others wait in a collective and must not take it for lost. (The real limit is six hours.)"""
    assert job.COLLECTIVE_TIMEOUT.total_seconds() >= 6 * 3600

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


def launch_for_real(argv: list[str], output: Path, **environment: str) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *argv], cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )


def test_torchrun_launches_and_restarts_after_a_kill(flags: dict[str, Any], tmp_path: Path) -> None:
    """torchrun holds MASTER_PORT itself; after a kill its agent starts all workers again and they resume."""
    grid = {name: value for name, value in flags.items() if name not in ("world_size", "rendezvous_timeout")}
    several = {**grid, "total_steps": 60, "checkpoint_steps": 5}
    log = tmp_path / "torchrun.txt"
    process = launch_for_real(
        [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "4",
            "--max-restarts",
            "1",
            "--master-port",
            str(free_port()),
            "dist_clm_train.py",
            *train_argv(**several),
        ],
        log,
        OMP_NUM_THREADS="1",
    )
    run = Path(flags["checkpoint_path"])
    give_up = time.monotonic() + 90
    while not (run / "5" / "manifest.json").exists():
        assert time.monotonic() < give_up and process.poll() is None, log.read_text()
        time.sleep(0.05)
    victim = next(p for p in psutil.Process(process.pid).children(recursive=True) if "dist_clm_train.py" in " ".join(p.cmdline()))
    victim.kill()
    try:
        assert process.wait(120) == 0, log.read_text()
    finally:
        process.kill()
    assert log_rows(run)[-1]["step"] == 60
    assert (run / "60" / "manifest.json").exists()
    undisturbed = tmp_path / "undisturbed"
    train(
        tmp_path / "again",
        stages=2,
        replicas=2,
        **{**several, "checkpoint_path": undisturbed, "pipeline_group_size": 2, "data_group_size": 2},
    )
    assert {row["step"]: row["loss"] for row in log_rows(run)} == dict(zip(range(1, 61), losses(undisturbed), strict=True))


def test_no_process_and_no_port_stays_behind(flags: dict[str, Any], tmp_path: Path) -> None:
    port, stamp = free_port(), tmp_path / "died"
    processes = launch(
        lambda rank: train_argv(**flags, rank=rank, dist_url=f"tcp://127.0.0.1:{port}"), 4, tmp_path / "ranks", die_in("forward", 1, stamp)
    )
    pids = {process.pid for process in processes}
    children = {child.pid for pid in pids if psutil.pid_exists(pid) for child in psutil.Process(pid).children(recursive=True)}
    all_end(processes, 40)
    assert not [pid for pid in pids | children if psutil.pid_exists(pid)]
    assert not [c for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN]
