"""Healthy jobs on a machine that is far too busy: does any of them meet again, or end?

    python benchmarks/false_alarms.py --model demo_output/pretrained/tiny-gptj \\
        --data demo_output/data/stdlib_sources.jsonl > false_alarms.json

Starts --runs short trainings of two stages x two replicas beside --busy loops, --at-once of them at
a time. Ranks are forked from this process, which has imported torch. Every second job gets the limits
of comms/deadlines.py divided by --divide-by (all but that of silence), and one load, one micro-batch,
one save and one evaluation that last longer than each of them that is not about progress. A job that
is well ends with status 0 on every rank, and no line says "meet again".

Also reported: the longest time between two beats as rank 0's hub hears them, by what the rank did.
A third of the limit of silence is the most that it may be."""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import machine
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "tests"))

from support.ranks import Process, fork, train_argv  # noqa: E402

from checkpoint.layer_store import StepWriter  # noqa: E402
from comms.deadlines import DEADLINES, Deadlines  # noqa: E402
from comms.heartbeat import Beat, Pulse  # noqa: E402
from modules.stage import Stage  # noqa: E402
from training.compute.evaluator import Evaluator  # noqa: E402
from training.membership import meeting  # noqa: E402
from training.start import weights  # noqa: E402

WORLD_SIZE = 4
LONGEST_RUN_S = 900.0
# what the heartbeat waits for is progress, and these are about that
OF_PROGRESS = ("silent_s", "step_s", "first_step_s", "outside_s")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One job. slow_s: how long what is slow in it takes; None: nothing is."""

    number: int
    deadlines: Deadlines
    slow_s: float | None


def plan(options: argparse.Namespace) -> list[Run]:
    """All jobs, quick and slow ones in turn."""
    short = DEADLINES.divided_by(options.divide_by)
    bounded = {k: v for k, v in vars(short).items() if k not in OF_PROGRESS}
    slow_s = 1.1 * max(s for name, s in bounded.items() if name != "answer_s")
    return [
        Run(number=n, deadlines=short, slow_s=slow_s)
        if n % 2
        else Run(number=n, deadlines=DEADLINES, slow_s=None)
        for n in range(options.runs)
    ]


def slow_down(run: Run, rank: int) -> None:
    """In a rank: each rank is slow at something else."""
    places: list[tuple[Any, str]] = [
        (weights, "load_weights"),
        (Stage, "forward"),
        (StepWriter, "write_layer"),
        (Evaluator, "mean_loss"),
    ]
    owner, name = places[(rank + run.number // 2) % WORLD_SIZE]
    original, is_first = getattr(owner, name), True

    def slower(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_first
        if is_first:
            is_first = False
            assert run.slow_s is not None
            time.sleep(run.slow_s)
        return original(*args, **kwargs)

    setattr(owner, name, slower)


def keep_gaps() -> dict[str, float]:
    """In rank 0: the longest time between two beats of a rank, by what it did before; filled as they come."""
    longest: dict[str, float] = {}
    feel = Pulse.feel

    def felt(self: Pulse, beat: Beat, now: float) -> None:
        if self.beat is not None:
            doing = re.sub(r"\d+", "N", self.beat.doing)
            longest[doing] = max(longest.get(doing, 0.0), now - self.came_at)
        feel(self, beat, now)

    Pulse.feel = felt  # type: ignore[method-assign]
    return longest


def start(options: argparse.Namespace, run: Run, folder: Path) -> list[Process]:
    """The ranks of one job."""
    flags = {
        "model_name": options.model,
        "task_name": options.data,
        "evaluation_data": options.data,
        "max_eval_samples": 4,
        "evaluation_steps": 2,
        "checkpoint_path": folder / "run",
        "total_steps": 4,
        "checkpoint_steps": 2,
        "seq_length": 32,
        "batch_size": 2,
        "micro_batch_size": 1,
        "num_threads": 1,
        "device": "cpu",
        "pipeline_group_size": 2,
        # measuring layers and links would be most of the work
        "stage_layers": "2,2",
        "extra_warmup_forwards": 0,
        "data_group_size": 2,
        "world_size": WORLD_SIZE,
        "dist_url": f"tcp://127.0.0.1:{10_000 + (os.getpid() * 7 + run.number) % 20_000}",
    }

    def rank_main(rank: int) -> int:
        import dist_clm_train

        meeting.DEADLINES = run.deadlines
        if run.slow_s is not None:
            slow_down(run, rank)
        gaps = keep_gaps() if rank == 0 else {}
        status = dist_clm_train.main(train_argv(**flags, rank=rank))
        if rank == 0:  # not before: a disk that is slow would keep the hub from hearing beats
            (folder / "gaps.json").write_text(json.dumps(gaps))
        return status

    def forked(rank: int) -> Process:
        return fork(lambda: rank_main(rank), folder / f"rank{rank}.txt")

    return [forked(rank) for rank in range(WORLD_SIZE)]


def outcome(run: Run, ranks: list[Process], folder: Path, seconds: float) -> dict[str, Any]:
    """What became of a job that has ended, or has not."""
    for rank in ranks:
        rank.kill()
    text = "\n".join(rank.text for rank in ranks)
    statuses = [rank.status for rank in ranks]
    is_well = statuses == [0] * WORLD_SIZE and "meet again" not in text
    gaps = folder / "gaps.json"
    return {
        "number": run.number,
        "is_slow": run.slow_s is not None,
        "statuses": statuses,
        "num_meetings_again": ranks[0].text.count("meet again"),
        "seconds": round(seconds, 1),
        "longest_gaps_s": json.loads(gaps.read_text()) if gaps.exists() else {},
        **({} if is_well else {"said": text[-4000:]}),
    }


@contextlib.contextmanager
def busy_loops(number: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""

    def compute() -> int:
        while os.getppid() == parent:
            sum(range(10_000))
        return 0

    parent = os.getpid()
    loops = [fork(compute, Path(os.devnull)) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()


def all_runs(options: argparse.Namespace, show: Callable[[], None]) -> list[dict[str, Any]]:
    """Start all of them, so many at a time. No thread: this process forks."""
    found: list[dict[str, Any]] = []
    waiting, under_way = plan(options), []
    last_start = time.monotonic() + 60 * options.most_minutes
    with tempfile.TemporaryDirectory() as root, busy_loops(options.busy):
        while waiting or under_way:
            if time.monotonic() > last_start:
                waiting.clear()
            if waiting and len(under_way) < options.at_once:
                run = waiting.pop(0)
                folder = Path(root) / str(run.number)
                folder.mkdir()
                under_way.append((run, start(options, run, folder), folder, time.monotonic()))
                continue
            for job in list(under_way):
                run, ranks, folder, began = job
                seconds = time.monotonic() - began
                statuses = [rank.poll() for rank in ranks]
                if None not in statuses or any(statuses) or seconds > LONGEST_RUN_S:
                    time.sleep(5.0 if any(statuses) else 0.0)  # for the others to say why
                    found.append(outcome(run, ranks, folder, seconds))
                    under_way.remove(job)
                    show()
            time.sleep(0.2)
    return found


def longest_of(runs: list[dict[str, Any]]) -> dict[str, float]:
    """By what a rank did, over all runs, the longest first."""
    longest: dict[str, float] = {}
    for run in runs:
        for doing, seconds in run.pop("longest_gaps_s").items():
            longest[doing] = max(longest.get(doing, 0.0), round(seconds, 2))
    return dict(sorted(longest.items(), key=lambda item: -item[1]))


def main() -> int:
    """JSON on stdout; status 1 where a healthy job met again or ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a model folder")
    parser.add_argument("--data", type=Path, required=True, help="a file of documents")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--busy", type=int, default=16, help="loops beside the jobs")
    parser.add_argument("--at-once", type=int, default=3, help="jobs at a time")
    parser.add_argument("--most-minutes", type=float, default=38.0, help="then no job is begun")
    parser.add_argument("--divide-by", type=float, default=5.0, help="of the limits of slow jobs")
    options = parser.parse_args()
    options.model, options.data = options.model.absolute(), options.data.absolute()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    began = time.monotonic()
    tqdm.monitor_interval = 0  # no thread
    with tqdm(total=options.runs, unit=" jobs", file=sys.stderr) as bar:
        runs = all_runs(options, bar.update)
    longest = longest_of(runs)
    alarms = [run for run in runs if "said" in run]
    result = {
        "machine": machine(),
        "busy_loops": options.busy,
        "seconds": round(time.monotonic() - began),
        "runs_asked_for": options.runs,
        "runs": len(runs),
        "slow_runs": sum(run["is_slow"] for run in runs),
        "false_alarms": len(alarms),
        "longest_gap_s": max(longest.values(), default=None),
        "limit_of_silence_s": DEADLINES.silent_s,
        "longest_gaps_s": dict(list(longest.items())[:12]),
        "alarms": alarms,
        "seconds_per_run": [run["seconds"] for run in runs],
    }
    print(json.dumps(result, indent=1))
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
