"""torchrun's elastic restarts, on one node and on two: whoever dies, the agents start all workers again, and the run ends as if nothing had
happened. The nodes are two agents of one machine; their workers are forks of this process (warm_python.py)."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.ranks import REPOSITORY, free_port, log_rows, losses, train, train_argv
from support.tiers import full
from support.warm_python import warm_python

from comms.rendezvous import door_of_torchrun

NUM_STEPS = 60


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with warm_python(tmp_path_factory.mktemp("warm")) as program:
        yield program


@pytest.fixture
def flags(model_folder: Path, tasks: list[Path], tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name": model_folder,
        "task_name": tasks[0],
        "checkpoint_path": tmp_path / "run",
        "seq_length": 32,
        "batch_size": 4,
        "micro_batch_size": 2,
        "total_steps": NUM_STEPS,
        "checkpoint_steps": 5,
        "pipeline_group_size": 2,
        "device": "cpu",
        "num_threads": 1,
        "rendezvous_timeout": 60,
    }


class Node:
    """An agent with its workers."""

    def __init__(self, python: Path, flags: dict[str, Any], output: Path, *, rank: int, nodes: int, workers: int, port: int) -> None:
        self.output, self.rank, self.port = output, rank, port
        agent = ["-m", "torch.distributed.run", "--nnodes", nodes, "--node-rank", rank, "--nproc-per-node", workers]
        agent += ["--master-addr", "127.0.0.1", "--master-port", port, "--max-restarts", 3, "--monitor-interval", 0.1]
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                [str(part) for part in (sys.executable, *agent, "dist_clm_train.py", *train_argv(**flags))],
                cwd=REPOSITORY,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHON_EXEC": str(python), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def workers(self) -> list[psutil.Process]:
        """What stands for the trainers of this node (warm_python's clients): killed, they take these with them."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                if "dist_clm_train.py" not in process.cmdline() or "torch.distributed.run" in process.cmdline():
                    continue
            except psutil.Error:
                continue
            if (environment.get("MASTER_PORT"), environment.get("GROUP_RANK")) == (str(self.port), str(self.rank)):
                found.append(process)
        return found

    def kill_a_worker(self) -> None:
        self.workers()[0].kill()

    def kill(self) -> None:
        """The whole node: agent first, so that it starts nothing again."""
        self.process.kill()
        self.process.wait()
        for worker in self.workers():
            worker.kill()


def wait_for_checkpoint(run: Path, step: int, nodes: list[Node]) -> None:
    give_up = time.monotonic() + 90
    while not (run / str(step) / "manifest.json").exists():
        assert time.monotonic() < give_up, "\n".join(node.text for node in nodes)
        time.sleep(0.02)


def check(run: Path, flags: dict[str, Any], tmp_path: Path, replicas: int) -> None:
    """The run ended, and every loss is that of a run in which nothing happened."""
    assert log_rows(run)[-1]["step"] == NUM_STEPS
    undisturbed = tmp_path / "undisturbed"
    grid = {name: value for name, value in flags.items() if name not in ("pipeline_group_size", "rendezvous_timeout")}
    train(tmp_path / "ranks", stages=2, replicas=replicas, **{**grid, "checkpoint_path": undisturbed})
    expected = dict(zip(range(1, NUM_STEPS + 1), losses(undisturbed), strict=True))
    assert {row["step"]: row["loss"] for row in log_rows(run)} == expected


def end_well(nodes: list[Node]) -> None:
    try:
        for node in nodes:
            assert node.process.wait(120) == 0, "\n".join(n.text for n in nodes)
    finally:
        for node in nodes:
            node.kill()


@full
def test_one_node_starts_all_its_workers_again_after_a_kill(python: Path, flags: dict[str, Any], tmp_path: Path) -> None:
    node = Node(python, flags, tmp_path / "node.txt", rank=0, nodes=1, workers=4, port=free_port())
    run = Path(flags["checkpoint_path"])
    try:
        wait_for_checkpoint(run, 5, [node])
        node.kill_a_worker()
    finally:
        end_well([node])
    assert "resuming from" in node.text, node.text
    check(run, flags, tmp_path, replicas=2)


@full
@pytest.mark.parametrize("victim", [0, 1])
def test_two_nodes_go_on_after_a_worker_of_either_was_killed(victim: int, python: Path, flags: dict[str, Any], tmp_path: Path) -> None:
    """Agents count restarts each for itself, and the counts part: the ranks must meet all the same."""
    port, run = free_port(), Path(flags["checkpoint_path"])
    nodes = [Node(python, flags, tmp_path / f"node{rank}.txt", rank=rank, nodes=2, workers=1, port=port) for rank in range(2)]
    try:
        for step in (5, 20):  # twice
            wait_for_checkpoint(run, step, nodes)
            nodes[victim].kill_a_worker()
    finally:
        end_well(nodes)
    assert nodes[0].text.count("resuming from") == 2, nodes[0].text
    check(run, flags, tmp_path, replicas=1)


@full
def test_a_node_that_was_lost_whole_is_started_again_by_hand(python: Path, flags: dict[str, Any], tmp_path: Path) -> None:
    """Its new agent counts restarts from 0, the other one goes on counting."""
    port, run = free_port(), Path(flags["checkpoint_path"])
    nodes = [Node(python, flags, tmp_path / f"node{rank}.txt", rank=rank, nodes=2, workers=1, port=port) for rank in range(2)]
    try:
        wait_for_checkpoint(run, 5, nodes)
        nodes[1].kill()
        nodes[1] = Node(python, flags, tmp_path / "node1.txt", rank=1, nodes=2, workers=1, port=port)
    finally:
        end_well(nodes)
    check(run, flags, tmp_path, replicas=1)


def test_the_ranks_of_a_job_look_in_one_place_whatever_their_agents_count() -> None:
    agent = {"MASTER_ADDR": "h", "MASTER_PORT": "5", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    doors = {str(door_of_torchrun({**agent, "TORCHELASTIC_RESTART_COUNT": count})) for count in "012"}
    assert len(doors) == 1
