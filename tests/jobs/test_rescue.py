"""Snapshots in host memory: a run whose ranks died goes on from the last of them, to the bit, without a checkpoint on disk."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ranks import Process, equal_files, free_port, launch, log_rows, train, train_argv
from support.tiers import full

from training.checkpoints.ram_snapshots import HOST_MEMORY, rescue_folder

pytestmark = pytest.mark.skipif(not HOST_MEMORY.is_dir(), reason=f"this host has no {HOST_MEMORY}")

NUM_STEPS = 40


@pytest.fixture
def flags(model_folder: Path, tasks: list[Path], tmp_path: Path) -> Iterator[dict[str, Any]]:
    run = tmp_path / "run"
    yield {
        "model_name": model_folder,
        "task_name": tasks[0],
        "checkpoint_path": run,
        "seq_length": 32,
        "batch_size": 4,
        "micro_batch_size": 2,
        "total_steps": NUM_STEPS,
        "pipeline_group_size": 2,
        "world_size": 2,
        "device": "cpu",
        "num_threads": 1,
        "rendezvous_timeout": 60,
        "rescue_interval": 0.05,
    }
    shutil.rmtree(rescue_folder(run), ignore_errors=True)


def snapshots(root: Path) -> list[int]:
    folder = rescue_folder(root)
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []


def start(flags: dict[str, Any], tmp_path: Path) -> list[Process]:
    url = f"tcp://127.0.0.1:{free_port()}"

    def slowly(rank: int) -> None:
        from pipeline_parallel.engine import PipelineEngine

        run = PipelineEngine.run

        def slow(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.05)
            return run(*args, **kwargs)

        PipelineEngine.run = slow  # type: ignore[method-assign]

    return launch(lambda rank: train_argv(**flags, rank=rank, dist_url=url), 2, tmp_path / "ranks", slowly)


def test_a_run_whose_ranks_all_died_goes_on_from_its_snapshot_bit_for_bit(flags: dict[str, Any], tmp_path: Path) -> None:
    run = Path(flags["checkpoint_path"])
    processes = start(flags, tmp_path)
    give_up = time.monotonic() + 60
    while not any(step >= 5 for step in snapshots(run)):
        assert time.monotonic() < give_up and processes[0].poll() is None, processes[0].text
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    kept = snapshots(run)[-1]
    assert not [p for p in run.iterdir() if p.name.isdecimal()], "nothing was saved on disk"
    done_before = log_rows(run)[-1]["step"]
    again = train(tmp_path / "again", stages=2, **{n: v for n, v in flags.items() if n not in ("world_size", "pipeline_group_size")})
    assert f"going on from a snapshot in host memory, of step {kept}" in again[0].text
    rows = log_rows(run)
    assert [row["step"] for row in rows] == [*range(1, done_before + 1), *range(kept + 1, NUM_STEPS + 1)], "it began behind the snapshot"
    undisturbed = tmp_path / "undisturbed"
    plain = {n: v for n, v in flags.items() if n not in ("world_size", "pipeline_group_size", "rescue_interval")}
    train(tmp_path / "plain", stages=2, **{**plain, "checkpoint_path": undisturbed})
    expected = {row["step"]: row["loss"] for row in log_rows(undisturbed)}
    assert all(row["loss"] == expected[row["step"]] for row in rows)
    assert equal_files(run / str(NUM_STEPS), undisturbed / str(NUM_STEPS)) == []
    assert snapshots(run) == [], "a run that has ended leaves nothing in the host's memory"


@full
def test_a_fresh_run_takes_no_snapshot_of_an_older_one(flags: dict[str, Any], tmp_path: Path) -> None:
    run = Path(flags["checkpoint_path"])
    processes = start(flags, tmp_path)
    give_up = time.monotonic() + 60
    while not snapshots(run):
        assert time.monotonic() < give_up and processes[0].poll() is None, processes[0].text
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    grid = {n: v for n, v in flags.items() if n not in ("world_size", "pipeline_group_size")}
    again = train(tmp_path / "again", stages=2, **{**grid, "resume": "none"})
    assert "snapshot" not in again[0].text
    assert [row["step"] for row in log_rows(run)][-NUM_STEPS:] == list(range(1, NUM_STEPS + 1))


def test_snapshots_are_for_this_user_alone(flags: dict[str, Any], tmp_path: Path) -> None:
    grid = {n: v for n, v in flags.items() if n not in ("world_size", "pipeline_group_size")}
    train(tmp_path / "ranks", stages=1, **{**grid, "total_steps": 2})
    assert rescue_folder(flags["checkpoint_path"]).parent.stat().st_mode & 0o077 == 0
