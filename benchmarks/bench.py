"""What the benchmarks share: rounds in turning order, a process per variant, forked ranks, and what of a rank is reported.

Variants are compared within a round only, because a machine's speed drifts; every variant of the real computation runs in a process
of its own, so that its memory is its own. Ranks are forked from a parent that has imported torch and computed nothing (0.2 s for all
of them); each counts its time on the machine's one monotonic clock.
"""

import argparse
import json
import mmap
import os
import platform
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

START_MARGIN_S = 0.003  # from "all are here" to the common start
POLL_S = 0.0002


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model that is computed and the batch of one optimizer step."""

    width: int = 512
    layers: int = 8
    vocab: int = 8192
    seq_length: int = 256
    micro_batches: int = 8
    micro_batch_size: int = 2
    steps: int = 3  # measured ones, after one that is not

    @property
    def num_sequences(self) -> int:
        return self.micro_batches * self.micro_batch_size

    @property
    def num_targets(self) -> int:
        return self.num_sequences * (self.seq_length - 1)

    @property
    def tokens_per_micro_batch(self) -> int:
        return self.micro_batch_size * self.seq_length

    @property
    def tokens_per_step(self) -> int:
        return self.num_sequences * self.seq_length

    @property
    def hf_config(self) -> dict[str, Any]:
        """The model's config.json."""
        return {
            "model_type": "gptj",
            "n_embd": self.width,
            "n_layer": self.layers,
            "n_head": 8,
            "rotary_dim": min(64, self.width // 8),
            "n_positions": self.seq_length,
            "vocab_size": self.vocab,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """--width, --layers and so on."""
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)


def sizes_of(options: argparse.Namespace) -> Sizes:
    """What add_size_options asked for."""
    return Sizes(**{field.name: getattr(options, field.name) for field in fields(Sizes)})


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, minimum, maximum."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def turning(names: Sequence[str], n: int) -> list[str]:
    """The order of round n: each name comes first in turn."""
    start = n % len(names)
    return [*names[start:], *names[:start]]


def run_rounds(names: Sequence[str], run: Callable[[str], Result], num_rounds: int) -> list[dict[str, Result]]:
    """Every name once per round, in an order that turns; what ``run`` returned, by round and name."""
    rounds: list[dict[str, Result]] = []
    for n in range(num_rounds):
        rounds.append({})
        for name in turning(names, n):
            print(f"round {n + 1} of {num_rounds}: {name} (load {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)
            rounds[-1][name] = run(name)
    return rounds


def run_in_own_process(script: str, kind: str, given: Mapping[str, Any], sizes: Sizes) -> Any:
    """``script --variant {kind, given, sizes}``: the value its last line of output stands for. Its errors go to ours."""
    variant = json.dumps({"kind": kind, "given": given, "sizes": asdict(sizes)})
    done = subprocess.run([sys.executable, script, "--variant", variant], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def answer_and_end(value: Any) -> None:
    """What run_in_own_process reads. Ends the process without tearing anything down."""
    print(json.dumps(value))
    sys.stdout.flush()
    os._exit(0)


def fork_ranks(ranks: Sequence[int], rank_main: Callable[[int], Any]) -> list[Any]:
    """Run rank_main(rank) in a forked process per rank; what each returned, by way of JSON. Raises RuntimeError when one fails."""
    children = []
    for rank in ranks:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            _be_a_rank(rank, rank_main, write_end)
        os.close(write_end)
        children.append((rank, pid, read_end))
    answers = []
    for rank, _, read_end in children:
        with open(read_end) as pipe:
            text = pipe.read()
        if not text:
            for _, pid, _ in children:
                os.kill(pid, signal.SIGKILL)
            raise RuntimeError(f"rank {rank} failed; its error stands above")
        answers.append(json.loads(text))
    for _, pid, _ in children:
        os.waitpid(pid, 0)
    return answers


def _be_a_rank(rank: int, rank_main: Callable[[int], Any], write_end: int) -> None:
    code = 1
    try:
        text = json.dumps(rank_main(rank))
        with open(write_end, "w") as pipe:
            pipe.write(text)
        code = 0
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Gate:
    """Where all ranks of one machine start at the same instant of its monotonic clock, whatever network lies between them: a barrier
    over a link would itself take a round trip and let them go at different times."""

    def __init__(self, file: Path, rank: int, num_ranks: int) -> None:
        """file: the same for all, on one machine."""
        self._rank, self._num_ranks = rank, num_ranks
        self._count, self._last_start = 0, 0.0
        self._slot = struct.Struct("<d")
        with open(file, "ab+") as opened:
            opened.truncate((num_ranks + 1) * self._slot.size)
            self._memory = mmap.mmap(opened.fileno(), (num_ranks + 1) * self._slot.size)

    def arrive(self) -> None:
        """Say that this rank is here, once more."""
        self._count += 1
        self._write(self._rank, self._count)

    def all_are_here(self) -> bool:
        """Whether every rank has arrived as often as this one."""
        return all(self._read(rank) >= self._count for rank in range(self._num_ranks))

    def start_together(self) -> float:
        """Arrive, wait for all, then for the common start, which is returned (time.perf_counter)."""
        self.arrive()
        while not self.all_are_here():
            time.sleep(POLL_S)
        if self._rank == 0:
            self._write(self._num_ranks, time.perf_counter() + START_MARGIN_S)
        while (start := self._read(self._num_ranks)) <= self._last_start:
            time.sleep(POLL_S)
        self._last_start = start
        time.sleep(max(0.0, start - time.perf_counter()))
        return start

    def _write(self, slot: int, value: float) -> None:
        self._slot.pack_into(self._memory, slot * self._slot.size, value)

    def _read(self, slot: int) -> float:
        return float(self._slot.unpack_from(self._memory, slot * self._slot.size)[0])


def time_steps(step: Callable[[], object], num_steps: int) -> list[float]:
    """Seconds of each call."""
    durations = []
    for _ in range(num_steps):
        started = time.perf_counter()
        step()
        durations.append(time.perf_counter() - started)
    return durations


def peak_rss_mib() -> float:
    """Of this process, ever: VmHWM. A forked process begins with its parent's pages."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def machine() -> dict[str, Any]:
    """What figures depend on."""
    import torch

    return {
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
