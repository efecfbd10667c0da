"""What comes back by itself: a rank that its supervisor starts again, a replica that was lost and returns, and a run with ten faults in it.

The supervisors of most tests are the test: it starts the lost rank again as a supervisor does, from a process that has imported torch,
which takes a fifth of a second instead of ten (supervisor.py itself: test_supervise.py)."""

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.faults import Fault, all_end, keep_connections, plant, said, stop, wait_until
from support.grids import check_bits, num_rows, supervised, undisturbed
from support.ranks import Process, equal_files, launch, log_rows, losses, train_argv
from support.tiers import full, sample

from comms.connections import Connections
from pipeline_parallel.engine import PipelineEngine


@sample(1)
@pytest.mark.parametrize(
    ("phase", "victim"),
    [
        *(("loading", 0), ("backward", 0), ("backward", 1), ("backward", 2), ("backward", 3)),
        *(("saving", 0), ("saving", 1), ("agreeing", 3), ("last step", 1)),
    ],
)
def test_a_rank_that_is_started_again_finds_the_others_waiting(phase: str, victim: int, flags: dict[str, Any], tmp_path: Path) -> None:
    flags |= {"total_steps": 8}
    stamp = tmp_path / "fired"
    fault = plant(Fault.KILL, phase, victim, stamp)

    def before(rank: int) -> None:
        supervised(0)(rank)
        fault(rank)

    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", before)
    wait_until(stamp.exists, 60, ranks)
    assert ranks[victim].wait(10) == -signal.SIGKILL
    again = launch(lambda _: train_argv(**flags, rank=victim), 1, tmp_path / "ranks", supervised(1))[0]
    others = [process for rank, process in enumerate(ranks) if rank != victim]
    all_end([again, *others], 90)
    assert [process.status for process in (again, *others)] == [0] * 4, said([again, *others])
    first = again if victim == 0 else ranks[0]
    assert re.search(r"optimizer step \d+ is done, \d+\.\d s after the job was interrupted", first.text), first.text
    check_bits(flags, tmp_path)


@sample(1)
@pytest.mark.parametrize(
    ("stages", "replicas", "accumulation", "victim", "phase"),
    [(2, 2, 1, 3, "backward"), (2, 2, 2, 2, "agreeing"), (1, 3, 1, 2, "allreduce"), (1, 3, 2, 1, "optimizer")],
)
def test_a_replica_is_gone_without_and_taken_back(
    stages: int, replicas: int, accumulation: int, victim: int, phase: str, flags: dict[str, Any], tmp_path: Path
) -> None:
    world = stages * replicas
    flags |= {"pipeline_group_size": stages, "data_group_size": replicas, "world_size": world, "dropout": 0.1, "checkpoint_steps": 0}
    flags |= {"gradient_accumulate_step": accumulation, "total_steps": 10_000, "allow_replica_loss": True, "lr_schedule": "constant"}
    stamp = tmp_path / "fired"
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), world, tmp_path / "ranks", plant(Fault.KILL, phase, victim, stamp))
    wait_until(stamp.exists, 60, ranks)
    ranks[victim].wait(10)
    wait_until(lambda: f"with {replicas - 1} of {replicas} replicas" in ranks[0].text, 30, ranks)
    here = num_rows(tmp_path / "run")
    wait_until(lambda: num_rows(tmp_path / "run") > here + 5, 30, ranks)
    again = launch(lambda _: train_argv(**flags, rank=victim), 1, tmp_path / "ranks")[0]
    others = [process for rank, process in enumerate(ranks) if rank != victim]
    wait_until(lambda: "a replica is back and is taken in behind step" in ranks[0].text, 60, [again, *others])
    here = num_rows(tmp_path / "run")
    wait_until(lambda: num_rows(tmp_path / "run") > here + 5, 30, [again, *others])
    stop([*others, again])
    assert [process.status for process in (again, *others)] == [0] * world, said([again, *others])
    flags |= {"total_steps": log_rows(tmp_path / "run")[-1]["step"]}
    plain = {row["step"]: row["loss"] for row in log_rows(undisturbed(flags, tmp_path))}
    ours = log_rows(tmp_path / "run")
    assert [row["step"] for row in ours] == sorted(plain), "no step is missing and none done twice"
    assert all(row["loss"] == pytest.approx(plain[row["step"]], rel=1e-6) for row in ours)
    assert any(row["loss"] != plain[row["step"]] for row in ours), "sums in another order round otherwise: the replica was missing"
    assert {row["target_tokens"] for row in ours} != {0}


@sample(1)
@pytest.mark.parametrize("victim", [0, 1])
def test_the_replica_of_rank_0_cannot_be_missed(victim: int, flags: dict[str, Any], tmp_path: Path) -> None:
    flags |= {"allow_replica_loss": True}
    stamp = tmp_path / "fired"
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", plant(Fault.KILL, "backward", victim, stamp))
    all_end(ranks, 90)
    assert stamp.exists()
    assert [process.status for process in ranks] == [-signal.SIGKILL if rank == victim else 75 for rank in range(4)], said(ranks)
    assert f"rank {victim} (stage {victim} of 2, replica 0 of 2)" in ranks[3].text


def break_links_sometimes(seed: int, attempt: int, num: int, stamps: Path) -> Callable[[int], None]:
    """``num`` times in the life of the run, in the backwards of this rank: every connection it has."""
    draw = random.Random(f"{seed} {attempt}")

    def before(rank: int) -> None:
        supervised(attempt)(rank)
        made: list[Connections] = []
        keep_connections(made)
        backward = PipelineEngine._backward

        def sometimes(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.004)
            if draw.random() < 0.02 and len(list(stamps.glob("link*"))) < num:
                (stamps / f"link{time.time()}").touch()
                made[-1].break_all()
            return backward(*args, **kwargs)

        PipelineEngine._backward = sometimes  # type: ignore[method-assign]

    return before


@full
def test_ten_faults_at_random_cost_no_bit(flags: dict[str, Any], tmp_path: Path) -> None:
    """Five kills, rank 0's among them, and five broken links, at times drawn by a seed."""
    seed, num_kills, num_links = 7, 5, 5
    draw, stamps = random.Random(seed), tmp_path / "stamps"
    stamps.mkdir()
    flags |= {"total_steps": 180, "checkpoint_steps": 10, "keep_checkpoints": 2, "lr_schedule": "constant"}
    run = tmp_path / "run"

    def start(rank: int, attempt: int) -> Process:
        before = break_links_sometimes(seed + rank, attempt, num_links, stamps)
        return launch(lambda _: train_argv(**flags, rank=rank), 1, tmp_path / "ranks", lambda _: before(rank))[0]

    ranks = [start(rank, 0) for rank in range(4)]
    attempts, killed = [0] * 4, 0
    next_kill = 15
    give_up = time.monotonic() + 200
    try:
        while any(process.poll() is None for process in ranks):
            assert time.monotonic() < give_up, said(ranks)
            rows = num_rows(run)
            if killed < num_kills and rows >= next_kill:
                victim = 0 if killed == 2 else draw.randrange(4)
                if ranks[victim].poll() is None:
                    os.kill(ranks[victim].pid, signal.SIGKILL)
                    killed += 1
                    next_kill = rows + draw.randrange(10, 30)
            for rank, process in enumerate(ranks):
                if process.poll() not in (None, 0):
                    attempts[rank] += 1
                    ranks[rank] = start(rank, attempts[rank])
            time.sleep(0.02)
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    assert [process.status for process in ranks] == [0] * 4, said(ranks)
    assert killed == num_kills and len(list(stamps.glob("link*"))) == num_links
    plain = undisturbed({**flags, "keep_checkpoints": 0}, tmp_path)
    expected = dict(zip(range(1, 181), losses(plain), strict=True))
    assert all(row["loss"] == expected[row["step"]] for row in log_rows(run))
    assert equal_files(run / "180", plain / "180") == []


@pytest.mark.parametrize(
    ("rank", "flag"), [(0, {"net_interface": "wg9"}), (1, {"net_interface": "wg9"}), (0, {"dist_url": "tcp://192.0.2.9:29500"})]
)
def test_an_interface_that_is_away_at_a_restart_is_waited_for(
    rank: int, flag: dict[str, Any], flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 75, with which a supervisor goes on; at the first start it is a mistake."""
    monkeypatch.setenv("DIST_SECRET", "a secret of this test alone")
    (process,) = launch(lambda _: train_argv(**{**flags, **flag}, rank=rank), 1, tmp_path / "ranks", supervised(1))
    all_end([process], 60)
    assert process.status == 75, process.text
    assert "wg9" in process.text or "192.0.2.9" in process.text
    assert "telling the other ranks" not in process.text


def test_ranks_that_wait_for_a_lost_one_can_be_stopped(flags: dict[str, Any], tmp_path: Path) -> None:
    stamp = tmp_path / "fired"
    fault = plant(Fault.KILL, "backward", 3, stamp)

    def before(rank: int) -> None:
        supervised(0)(rank)
        fault(rank)

    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", before)
    others = ranks[:3]
    try:
        wait_until(lambda: all("All ranks meet again" in process.text for process in others), 60, ranks)
        time.sleep(0.5)
        for process in others:
            os.kill(process.pid, signal.SIGTERM)
        assert [process.wait(20) for process in others] == [130] * 3, said(others)
        assert "interrupted" in others[0].text
    finally:
        for process in ranks:
            process.kill()
