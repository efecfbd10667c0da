"""A cable between two hosts (network namespaces) that is cut, and a router on it that resets connections: what comes back in time costs
nothing, what does not is named by both, or gone without until it is back."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.namespaces import HOSTS, ip, start
from support.ranks import log_rows, losses, train, train_argv
from support.tiers import full

NUM_STEPS = 200


class TwoHosts:
    """A training of two ranks, one on each host, over "back"."""

    def __init__(self, folder: Path, **flags: Any) -> None:
        self.folder, self.run = folder, folder / "run"
        self.log = self.run / "train_log.jsonl"
        secret = folder / "secret"
        secret.touch(mode=0o600)
        secret.write_text("known to both hosts alone")
        flags |= {"checkpoint_path": self.run, "dist_url": "tcp://10.81.2.1:9124", "world_size": 2}
        flags |= {"secret_file": secret, "rendezvous_timeout": 60}
        self.processes = [start(rank, train_argv(**flags, rank=rank), folder) for rank in (0, 1)]

    def text(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.txt").read_text(errors="replace")

    @property
    def said(self) -> str:
        return "\n".join(self.text(rank) for rank in (0, 1))

    def wait_for_steps(self, num_steps: int) -> None:
        self.wait_until(lambda: self.log.exists() and len(self.log.read_text().splitlines()) > num_steps, 60)

    def wait_until(self, what: Callable[[], bool], within_s: float) -> None:
        give_up = time.monotonic() + within_s
        while not what():
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
    return flags_of(model_folder, tasks)


def flags_of(model_folder: Path, tasks: list[Path]) -> dict[str, Any]:
    sizes = {"seq_length": 32, "batch_size": 4, "micro_batch_size": 1, "total_steps": NUM_STEPS, "num_threads": 1}
    return {"model_name": model_folder, "task_name": tasks[0], "device": "cpu", "pipeline_group_size": 2, **sizes}


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


@full
def test_a_cable_that_is_mended_in_time_leaves_every_loss_as_it_was(
    hosts: list[TwoHosts], flags: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
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
    assert losses(job.run) == losses(undisturbed)


@pytest.fixture(scope="module")
def undisturbed(model_folder: Path, tasks: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    flags = {name: value for name, value in flags_of(model_folder, tasks).items() if name != "pipeline_group_size"}
    train(root / "ranks", stages=2, **flags, checkpoint_path=root / "run")
    return root / "run"


def nft(*words: str) -> None:
    subprocess.run(["ip", "netns", "exec", HOSTS[1], "nft", *words], check=True, capture_output=True)


@full
def test_connections_that_a_router_resets_cost_no_bit(
    hosts: list[TwoHosts], flags: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    """Every segment is answered by a reset for a while, on live connections and on new ones; twice in one run."""
    if shutil.which("nft") is None:
        pytest.skip("making a router that resets connections needs nftables")
    job = TwoHosts(tmp_path, **flags)
    hosts.append(job)
    nft("add table inet cut; add chain inet cut in { type filter hook input priority 0; }")
    for before in (3, 40):
        job.wait_for_steps(before)
        nft("add rule inet cut in iifname back meta l4proto tcp reject with tcp reset")
        time.sleep(0.7)
        nft("flush chain inet cut in")
    assert job.end(60) == [0, 0], job.said
    for rank in (0, 1):
        assert job.text(rank).count("All ranks meet again") >= 2 and "Traceback" not in job.text(rank), job.said
    assert losses(job.run) == losses(undisturbed)


@full
def test_a_replica_that_is_cut_off_is_gone_without_and_comes_back_in_the_same_process(
    hosts: list[TwoHosts], flags: dict[str, Any], tmp_path: Path
) -> None:
    del flags["pipeline_group_size"]
    flags |= {"data_group_size": 2, "total_steps": 100_000, "lr_schedule": "constant"}
    job = TwoHosts(tmp_path, **flags, peer_timeout=3, allow_replica_loss=True)
    hosts.append(job)
    job.wait_for_steps(3)
    pids = [process.pid for process in job.processes]
    cut()
    job.wait_until(lambda: "go on behind optimizer step" in job.text(0), 60)
    assert "with 1 of 2 replicas" in job.text(0), job.said
    mend()
    job.wait_until(lambda: "is taken in behind step" in job.text(0), 60)
    job.wait_for_steps(len(job.log.read_text().splitlines()) + 20)
    job.processes[1].terminate()
    assert job.end(60) == [0, 0], job.said
    assert [process.pid for process in job.processes] == pids
    assert "rank 1 (stage 0 of 1, replica 1 of 2) on host" in job.text(0) and "no sign of life for" in job.text(0)
    assert "at tcp://10.81.2.1:9124 has given no sign of life" in job.text(1), job.said
    rows = {row["step"]: row["loss"] for row in log_rows(job.run)}
    flags = {name: value for name, value in flags.items() if name != "data_group_size"} | {"total_steps": max(rows)}
    train(tmp_path / "ranks", replicas=2, **flags, checkpoint_path=tmp_path / "undisturbed")
    plain = {row["step"]: row["loss"] for row in log_rows(tmp_path / "undisturbed")}
    assert rows.keys() == plain.keys()
    assert all(loss == pytest.approx(plain[step], rel=1e-4) for step, loss in rows.items())
    assert all(loss == pytest.approx(plain[step], rel=1e-6) for step, loss in rows.items() if step < 200)


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
