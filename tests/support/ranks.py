"""What the tests share: tiny models and data, ranks as forked processes, and runs of the trainer's own main().

Ranks are forked from the test process, which has imported torch already: four ranks start in 0.2 s, against 11 s when each
imports for itself. torch computes with one thread in the parent (conftest.py), because OpenMP's pool does not survive a fork."""

import contextlib
import gc
import itertools
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modules.lm_ops import IGNORED_TARGET, next_token_targets

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SHARED = REPOSITORY.parent / "shared"


# Of each worker of pytest-xdist its own, below those from which the system takes ports for outgoing connections.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw8").removeprefix("gw")) % 9
_PORTS = itertools.islice(itertools.cycle(range(10_000 + 2_000 * _WORKER, 12_000 + 2_000 * _WORKER)), os.getpid() % 2_000, None)


def free_port() -> int:
    """A port that nobody listens on, and that nobody else who runs at the same time will take."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a cycle does not end")


@dataclass
class Process:
    """A forked rank; its stdout and stderr go to ``output``."""

    pid: int
    output: Path
    status: int | None = None

    def poll(self) -> int | None:
        """Exit status (negative: the signal that killed it), None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, timeout_s: float) -> int:
        give_up = time.monotonic() + timeout_s
        while self.poll() is None:
            if time.monotonic() > give_up:
                self.kill()
                raise AssertionError(f"process {self.pid} did not end within {timeout_s} s; it said:\n{self.text}")
            time.sleep(0.01)
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")


def fork(work: Callable[[], int], output: Path) -> Process:
    """Run ``work`` in a forked child whose exit status is what it returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Process(pid, output)
    status = 99
    gc.freeze()  # what the test process has imported is no garbage here: looking through it takes a rank most of a second
    try:
        descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - pytest has replaced them by its captures
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def run_ranks(work: Callable[[int, dist.Store], None], world_size: int, folder: Path, timeout_s: float = 60) -> None:
    """Fork ``world_size`` ranks; each gets its rank and a store. Fails with the output of whichever failed."""
    port = free_port()

    def rank_main(rank: int) -> int:
        store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
        work(rank, store)
        store.add("done", 1)
        while rank == 0 and int(store.get("done")) < world_size:  # the store lives in rank 0
            time.sleep(0.005)
        return 0

    processes = [fork(lambda rank=rank: rank_main(rank), folder / f"rank{rank}.txt") for rank in range(world_size)]  # type: ignore[misc]
    give_up = time.monotonic() + timeout_s
    try:
        while True:
            statuses = [process.poll() for process in processes]
            for process, status in zip(processes, statuses, strict=True):
                assert not status, process.text  # the others may wait for it
            if None not in statuses:
                return
            assert time.monotonic() < give_up, "not all ranks ended in time:\n" + "\n".join(process.text for process in processes)
            time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()


def train_argv(**flags: Any) -> list[str]:
    """A command line from keywords: total_steps=4 -> --total-steps 4."""
    return [part for name, value in flags.items() if value is not None for part in (f"--{name.replace('_', '-')}", str(value))]


def launch(
    argv_of_rank: Callable[[int], Sequence[str]], world_size: int, folder: Path, before: Callable[[int], None] | None = None
) -> list[Process]:
    """Fork ranks that run dist_clm_train.main. ``before`` runs in each child first (to plant a fault)."""
    import dist_clm_train

    return launch_main(lambda argv: dist_clm_train.main(argv), argv_of_rank, world_size, folder, before)


def launch_main(
    main: Callable[[Sequence[str]], int],
    argv_of_rank: Callable[[int], Sequence[str]],
    world_size: int,
    folder: Path,
    before: Callable[[int], None] | None = None,
) -> list[Process]:
    """The same of any script's main, which the caller looks up late: ``before`` may have replaced it."""

    def rank_main(rank: int) -> int:
        if before is not None:
            before(rank)
        return main(list(argv_of_rank(rank)))

    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*.txt")))
    return [fork(lambda rank=rank: rank_main(rank), folder / f"{number:03d}_rank{rank}.txt") for rank in range(world_size)]  # type: ignore[misc]


def train(
    folder: Path,
    *,
    stages: int = 1,
    replicas: int = 1,
    expect: int | None = 0,
    timeout_s: float = 90,
    before: Callable[[int], None] | None = None,
    **flags: Any,
) -> list[Process]:
    """Train to the end in stages x replicas forked ranks; all must end with ``expect``. Returns the ended processes."""
    import dist_clm_train

    return run_script(
        lambda argv: dist_clm_train.main(argv),
        folder,
        stages=stages,
        replicas=replicas,
        expect=expect,
        timeout_s=timeout_s,
        before=before,
        **flags,
    )


def evaluate(
    folder: Path, *, stages: int = 1, replicas: int = 1, expect: int | None = 0, timeout_s: float = 90, **flags: Any
) -> list[Process]:
    """The same with dist_clm_eval.py."""
    import dist_clm_eval

    return run_script(
        lambda argv: dist_clm_eval.main(argv), folder, stages=stages, replicas=replicas, expect=expect, timeout_s=timeout_s, **flags
    )


def run_script(
    main: Callable[[Sequence[str]], int],
    folder: Path,
    *,
    stages: int,
    replicas: int,
    expect: int | None,
    timeout_s: float,
    before: Callable[[int], None] | None = None,
    **flags: Any,
) -> list[Process]:
    """One of the two scripts over forked ranks."""
    world_size = stages * replicas
    port = free_port()
    common = {
        "pipeline_group_size": stages,
        "data_group_size": replicas,
        "world_size": world_size,
        "dist_url": f"tcp://127.0.0.1:{port}",
        "num_threads": 1,
        "device": "cpu",
        "rendezvous_timeout": 30,
    }
    processes = launch_main(main, lambda rank: train_argv(**{**common, "rank": rank, **flags}), world_size, folder, before)
    try:
        for process in processes:
            status = process.wait(timeout_s)
            assert expect is None or status == expect, f"exit status {status}:\n" + "\n".join(p.text for p in processes)
    finally:
        for process in processes:
            process.kill()
    return processes


def eight_sequences(model_folder: Path, tasks: list[Path]) -> dict[str, Any]:
    """Eight sequences per optimizer step in micro-batches of one, eight accumulation steps of whatever size."""
    return {
        "model_name": model_folder,
        "task_name": f"{tasks[0]},{tasks[1]}:0.2",
        "seq_length": 32,
        "micro_batch_size": 1,
        "batch_size": 8,
        "lr": 1e-3,
        "lr_schedule": "constant",  # so that a run that stops early is the beginning of a longer one
        "total_steps": 4,
        "checkpoint_steps": 1,
        "logging_steps": 1,
    }


def train_on_hosts(
    tmp_path: Path, roots: list[Path], *, stages: int, expect: int = 0, before: Callable[[int], None] | None = None, **flags: Any
) -> list[Process]:
    """Ranks that each see the --checkpoint-path of their own entry in ``roots``, as hosts without a shared disk do."""
    common = {"pipeline_group_size": stages, "world_size": len(roots), "dist_url": f"tcp://127.0.0.1:{free_port()}", "num_threads": 1}
    common |= {"device": "cpu", "rendezvous_timeout": 30, **flags}
    processes = launch(lambda rank: train_argv(**common, rank=rank, checkpoint_path=roots[rank]), len(roots), tmp_path / "ranks", before)
    try:
        for process in processes:
            assert process.wait(90) == expect or expect is None, "\n".join(p.text for p in processes)
    finally:
        for process in processes:
            process.kill()
    return processes


def steps_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name[0].isdigit())


def log_rows(checkpoint_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (checkpoint_path / "train_log.jsonl").read_text().splitlines()]


def losses(checkpoint_path: Path) -> list[float]:
    return [row["loss"] for row in log_rows(checkpoint_path)]


def equal_files(one: Path, other: Path) -> list[str]:
    """Names of weight and state files that differ between two step folders; [] if all bytes are equal."""
    names = sorted(p.relative_to(one).as_posix() for p in one.rglob("*.safetensors"))
    assert names == sorted(p.relative_to(other).as_posix() for p in other.rglob("*.safetensors"))
    return [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]


def example_tokens(num_sequences: int, seq_length: int, vocab_size: int, seed: int = 0) -> tuple[torch.Tensor, int]:
    """(N, 3, T) int32 packed sequences whose documents, and so target counts, are of unequal length; and the number of targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(num_sequences, 3, seq_length, dtype=torch.int32)
    tokens[:, 0] = torch.randint(0, vocab_size, (num_sequences, seq_length), generator=generator)
    for n in range(num_sequences):
        starts, at = [], 0
        while at < seq_length:
            starts.append(at)
            at += int(torch.randint(1, 1 + 3 * (n + 1), (1,), generator=generator))
        for start, end in zip(starts, [*starts[1:], seq_length], strict=True):
            tokens[n, 1, start:end] = torch.arange(end - start)
    tokens[:, 2] = next_token_targets(tokens[:, 0], tokens[:, 1]).int()
    return tokens, int((tokens[:, 2] != IGNORED_TARGET).sum())
