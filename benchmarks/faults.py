"""Seconds from a fault to its detection and to the next optimizer step, and useful steps per hour with a fault every so often.

    python benchmarks/faults.py --model demo_output/pretrained/tiny-gptj --data demo_output/data/stdlib_sources.jsonl > faults.json

Ranks are processes of their own, as users start them; a restart therefore counts the seconds in which Python imports torch.

"detection": from SIGKILL (or SIGSTOP) of one of four ranks, two stages of two replicas, to the end of each other one. What follows has two
ranks. "recovery": from SIGKILL to the next row of train_log.jsonl, and how many steps had to be done again; "supervised" goes on from
checkpoints every --checkpoint-steps, "rescue" from snapshots in memory, "replica" without the lost replica. "goodput": the highest step
that is reached in --seconds, with a SIGKILL of a random rank every --every seconds, as a share of an undisturbed run's, for --supervise
with snapshots and for torchrun with checkpoints, in turn (--rounds)."""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from bench import machine

REPOSITORY = Path(__file__).resolve().parent.parent
START_S = 120.0


class Job:
    """A training that does not end by itself. launcher: "hand" or "torchrun"."""

    def __init__(self, options: argparse.Namespace, folder: Path, *, launcher: str = "hand", num_ranks: int = 2, **flags: Any) -> None:
        self.run, self.port = folder / "run", random.randrange(20_000, 30_000)
        common = {
            "model_name": options.model,
            "task_name": options.data,
            "checkpoint_path": self.run,
            "total_steps": 10**6,
            "seq_length": 64,
            "batch_size": 4,
            "micro_batch_size": 1,
            "lr_schedule": "constant",
            "keep_checkpoints": 2,
            "num_threads": 1,
            "device": "cpu",
            "pipeline_group_size": 2,
            **flags,
        }
        argv = [f"--{name.replace('_', '-')}={value}" for name, value in common.items()]
        script = str(REPOSITORY / "dist_clm_train.py")
        if launcher == "torchrun":
            agent = ["-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", f"--master-port={self.port}", "--max-restarts=1000"]
            commands = [[sys.executable, *agent, "--monitor-interval=0.1", script, *argv]]
        else:
            meeting = [f"--world-size={num_ranks}", f"--dist-url=tcp://127.0.0.1:{self.port}"]
            commands = [[sys.executable, script, *argv, *meeting, f"--rank={rank}"] for rank in range(num_ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with (folder / "output.txt").open("ab") as output:
            self.processes = [subprocess.Popen(c, stdout=output, stderr=output, env=environment, cwd=REPOSITORY) for c in commands]

    def workers(self) -> list[psutil.Process]:
        """The ranks themselves, by rank, not those who start them."""
        found = []
        for process in self.processes:
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    command = one.cmdline()
                    if any(part.endswith("dist_clm_train.py") for part in command[1:3]) and "supervisor.py" not in " ".join(command):
                        found.append(one)
        return found

    def rows(self) -> list[dict[str, Any]]:
        log = self.run / "train_log.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []

    def wait_for_rows(self, num: int) -> list[dict[str, Any]]:
        give_up = time.monotonic() + START_S
        while len(rows := self.rows()) < num:
            assert time.monotonic() < give_up, f"no step within {START_S} s"
            time.sleep(0.02)
        return rows

    def end(self) -> None:
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
            process.wait()


@contextmanager
def running(options: argparse.Namespace, **flags: Any) -> Iterator[Job]:
    with tempfile.TemporaryDirectory() as folder:
        job = Job(options, Path(folder), **flags)
        try:
            yield job
        finally:
            job.end()


def detection(options: argparse.Namespace, number: signal.Signals, victim: int, **flags: Any) -> dict[str, Any]:
    """Seconds from the signal to the end of each other rank, by rank."""
    with running(options, num_ranks=4, data_group_size=2, **flags) as job:
        job.wait_for_rows(10)
        began = time.monotonic()
        os.kill(job.processes[victim].pid, number)
        seconds: dict[int, float] = {}
        while len(seconds) < 3:
            passed = time.monotonic() - began
            assert passed < START_S, f"ranks besides {[victim, *seconds]} are still there"
            ended = [rank for rank, process in enumerate(job.processes) if rank != victim and process.poll() is not None]
            seconds |= {rank: passed for rank in ended if rank not in seconds}
            time.sleep(0.005)
        return {"victim": victim, "seconds_of_rank": dict(sorted(seconds.items()))}


def recovery(options: argparse.Namespace, victim: int, **flags: Any) -> dict[str, float]:
    """Seconds from SIGKILL to the next step, and steps that were done twice."""
    with running(options, **flags) as job:
        before = len(job.wait_for_rows(options.warmup_steps))
        workers = job.workers()
        began = time.monotonic()
        workers[victim].kill()
        time.sleep(0.2)  # rows that were under way
        before = job.rows()
        after = job.wait_for_rows(len(before) + 1)[len(before)]
        return {"seconds": time.monotonic() - began, "steps_again": before[-1]["step"] - after["step"] + 1}


def goodput(options: argparse.Namespace, seed: int, *, kills: bool, **flags: Any) -> dict[str, float]:
    """Steps per hour from the first one on, and how many kills there were."""
    draw, num_kills = random.Random(seed), 0
    with running(options, **flags) as job:
        job.wait_for_rows(1)
        began = time.monotonic()
        while (passed := time.monotonic() - began) < options.seconds:
            if kills and passed >= (num_kills + 0.5) * options.every:
                workers = job.workers()
                if workers:
                    draw.choice(workers).kill()
                    num_kills += 1
            time.sleep(0.05)
        reached = max(row["step"] for row in job.rows())
        return {"steps_per_hour": reached / passed * 3600, "kills": num_kills}


def main() -> int:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3, help="of each detection and recovery")
    parser.add_argument("--checkpoint-steps", type=int, default=200)
    parser.add_argument("--warmup-steps", type=int, default=250, help="before a kill whose recovery is measured")
    parser.add_argument("--rescue-interval", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--every", type=float, default=60.0)
    options = parser.parse_args()
    times = range(options.repetitions)
    saved, ours = {"checkpoint_steps": options.checkpoint_steps}, {"supervise": True, "rescue_interval": options.rescue_interval}
    found: dict[str, Any] = {"machine": machine()}
    found["detection_s"] = {
        "kill": [detection(options, signal.SIGKILL, n % 4) for n in times],
        "freeze, --peer-timeout 5": [detection(options, signal.SIGSTOP, 1, peer_timeout=5) for _ in times[:1]],
        "freeze": [detection(options, signal.SIGSTOP, 1) for _ in times[:1]],
    }
    found["recovery"] = {
        "supervised": [recovery(options, n % 2, **saved, supervise=True) for n in times],
        "rescue": [recovery(options, n % 2, **saved, **ours) for n in times],
        "torchrun": [recovery(options, n % 2, **saved, launcher="torchrun") for n in times],
        "replica": [recovery(options, 1, pipeline_group_size=1, allow_replica_loss=True) for _ in times],
    }
    rounds = []
    for seed in range(options.rounds):
        variants = {
            "undisturbed": lambda seed=seed: goodput(options, seed, kills=False, **saved),
            "ours": lambda seed=seed: goodput(options, seed, kills=True, **saved, **ours),
            "torchrun": lambda seed=seed: goodput(options, seed, kills=True, **saved, launcher="torchrun"),
        }
        names = list(variants)[seed % 3 :] + list(variants)[: seed % 3]
        rounds.append({name: variants[name]() for name in names})
    found["goodput"] = {
        "rounds": rounds,
        **{
            f"{name} / undisturbed": statistics.median(r[name]["steps_per_hour"] / r["undisturbed"]["steps_per_hour"] for r in rounds)
            for name in ("ours", "torchrun")
        },
    }
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
