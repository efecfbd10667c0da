"""A cable between two hosts (network namespaces) that is cut: what comes back in time costs nothing, what does not is named by both."""

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import losses, train, train_argv
from test_namespaces import HOSTS, ip, start, two_hosts

__all__ = ["two_hosts"]  # the fixture: interfaces "front" (10.81.1.N) and "back" (10.81.2.N)

NUM_STEPS = 400


class TwoHosts:
    """A training of two stages, one on each host, over "back"."""

    def __init__(self, folder: Path, **flags: Any) -> None:
        self.folder, self.run = folder, folder / "run"
        secret = folder / "secret"
        secret.touch(mode=0o600)
        secret.write_text("known to both hosts alone")
        flags |= {"checkpoint_path": self.run, "dist_url": "tcp://10.81.2.1:9124", "world_size": 2, "pipeline_group_size": 2}
        flags |= {"secret_file": secret, "rendezvous_timeout": 60}
        self.processes = [start(rank, train_argv(**flags, rank=rank), folder) for rank in (0, 1)]

    def text(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.txt").read_text(errors="replace")

    @property
    def said(self) -> str:
        return "\n".join(self.text(rank) for rank in (0, 1))

    def wait_for_steps(self, num_steps: int) -> None:
        log, give_up = self.run / "train_log.jsonl", time.monotonic() + 60
        while not (log.exists() and len(log.read_text().splitlines()) > num_steps):
            assert time.monotonic() < give_up and all(process.poll() is None for process in self.processes), self.said
            time.sleep(0.02)

    def end(self, within_s: float) -> list[int]:
        give_up = time.monotonic() + within_s
        try:
            return [process.wait(max(0.1, give_up - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired as error:
            raise AssertionError(self.said) from error

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def flags(model_folder: Path, tasks: list[Path]) -> dict[str, Any]:
    sizes = {"seq_length": 32, "batch_size": 4, "micro_batch_size": 1, "total_steps": NUM_STEPS, "num_threads": 1}
    return {"model_name": model_folder, "task_name": tasks[0], "device": "cpu", **sizes}


@pytest.fixture
def hosts(two_hosts: None) -> Iterator[list[TwoHosts]]:
    jobs: list[TwoHosts] = []
    yield jobs
    for job in jobs:
        job.kill()


def cut() -> None:
    ip("-n", HOSTS[1], "link", "set", "back", "down")


def mend() -> None:
    ip("-n", HOSTS[1], "link", "set", "back", "up")


def test_a_cable_that_is_mended_in_time_leaves_every_loss_as_it_was(hosts: list[TwoHosts], flags: dict[str, Any], tmp_path: Path) -> None:
    job = TwoHosts(tmp_path, **flags, peer_timeout=20)
    hosts.append(job)
    job.wait_for_steps(3)
    cut()
    time.sleep(1)
    before = len(losses(job.run))
    time.sleep(4)
    assert len(losses(job.run)) == before < NUM_STEPS, "the cut did stop the training"
    mend()
    assert job.end(60) == [0, 0], job.said
    train(tmp_path / "ranks", stages=2, **flags, checkpoint_path=tmp_path / "undisturbed")
    assert losses(job.run) == losses(tmp_path / "undisturbed")


def test_a_cable_that_stays_cut_ends_both_and_each_names_the_other(hosts: list[TwoHosts], flags: dict[str, Any], tmp_path: Path) -> None:
    job = TwoHosts(tmp_path, **flags, peer_timeout=5)
    hosts.append(job)
    job.wait_for_steps(3)
    cut()
    assert job.end(5 + 8) == [75, 75], job.said
    assert "rank 1 (stage 1 of 2" in job.text(0), job.said
    assert "rank 0 (stage 0 of 2" in job.text(1) and "at tcp://10.81.2.1:9124" in job.text(1), job.said
    for rank in (0, 1):
        assert re.search(r"last heard of \d+\.\d s ago.* in ", job.text(rank)) and "Traceback" not in job.text(rank), job.said
