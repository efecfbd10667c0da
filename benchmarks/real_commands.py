"""The public commands, started as users start them, and watched: seconds, memory, silences.

For real_scale.py."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
POLL_S = 0.1
SAY_EVERY_S = 10.0
SILENCE_S = 3.0  # without a line: reported


class Broken(Exception):
    """A command did not end with 0. The argument says which, and shows the end of its output."""


@dataclass(kw_only=True)
class Ran:
    """What was seen of one command. peaks: resident bytes, by rank. silences: those over SILENCE_S,
    each with the line before it."""

    command: str
    seconds: float = 0.0
    statuses: list[int] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    silences: list[dict[str, Any]] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    beat_gaps: list[dict[str, Any]] = field(default_factory=list)


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """{"seq_length": 4} -> ["--seq-length=4"]."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def run_ranks(
    script: str,
    values: Mapping[str, Any],
    logs: Path,
    name: str,
    *,
    num_ranks: int | None = None,
    beat_gaps: bool = False,
) -> Ran:
    """``script`` with flags to its end, num_ranks times (None: once, without a rank). Outputs are
    ``logs``/``name``.rank*.txt. Raises Broken."""
    argv, gap_files = [str(REPOSITORY / script), *flags_of(values)], []
    if num_ranks is None:
        commands = [argv]
    else:
        meeting = [
            f"--world-size={num_ranks}",
            f"--dist-url=tcp://127.0.0.1:{random.randrange(20_000, 30_000)}",
        ]
        commands = [[*argv, *meeting, f"--rank={rank}"] for rank in range(num_ranks)]
        if beat_gaps:
            gap_files = [logs / f"{name}.rank{rank}.gaps.json" for rank in range(num_ranks)]
            wrapper = str(REPOSITORY / "benchmarks" / "beat_gaps.py")
            commands = [
                [wrapper, str(file), *c] for file, c in zip(gap_files, commands, strict=True)
            ]
    ran = _watch(commands, logs, name)
    ran.beat_gaps = [json.loads(file.read_text()) for file in gap_files if file.exists()]
    if any(ran.statuses):
        raise Broken(
            f"{ran.command} ended with {ran.statuses}:\n" + _ends(logs, name, len(commands))
        )
    return ran


def _watch(commands: Sequence[Sequence[str]], logs: Path, name: str) -> Ran:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    ran = Ran(
        command=" ".join([Path(commands[0][0]).name, *commands[0][1:]]),
        peaks=[0] * len(commands),
        load=[os.getloadavg()[0]],
    )
    files = [logs / f"{name}.rank{k}.txt" for k in range(len(commands))]
    print(f"[{name}] {ran.command}", flush=True)
    began = time.monotonic()
    processes = []
    try:
        for command, file in zip(commands, files, strict=True):
            with file.open("wb") as output:
                whole = [sys.executable, "-u", *command]
                processes.append(
                    subprocess.Popen(
                        whole, stdout=output, stderr=output, env=environment, cwd=REPOSITORY
                    )
                )
        _wait(processes, files, ran, name, began)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    ran.seconds = time.monotonic() - began
    ran.statuses = [process.returncode for process in processes]
    ran.load.append(os.getloadavg()[0])
    return ran


def _wait(
    processes: Sequence["subprocess.Popen[bytes]"],
    files: Sequence[Path],
    ran: Ran,
    name: str,
    began: float,
) -> None:
    """Look at memory and output until all have ended, and say now and then what came last."""
    size, grew_at, said_at, line = 0, began, began, "(the start)"
    while True:
        are_alive = [process.poll() is None for process in processes]
        now, new_size = time.monotonic(), sum(file.stat().st_size for file in files)
        for rank, process in enumerate(processes):
            ran.peaks[rank] = max(ran.peaks[rank], _peak_resident(process.pid))
        if new_size > size or not any(are_alive):
            if now - grew_at > SILENCE_S:
                seconds, at_s = round(now - grew_at, 1), round(grew_at - began, 1)
                ran.silences.append({"s": seconds, "at_s": at_s, "after": line})
            size, grew_at, line = new_size, now, last_line(files)
        if now - said_at > SAY_EVERY_S:
            peaks = ", ".join(f"{peak / 1e9:.1f}" for peak in ran.peaks)
            load = os.getloadavg()[0]
            print(f"[{name}] {now - began:.0f} s, {peaks} GB, load {load:.1f}: {line}", flush=True)
            said_at = now
        if not any(are_alive):
            return
        time.sleep(POLL_S)


def last_line(files: Sequence[Path]) -> str:
    """The newest that one of ``files`` holds."""
    written = [file for file in files if file.stat().st_size]
    newest = max(written, key=lambda file: file.stat().st_mtime_ns, default=None)
    if newest is None:
        return "(the start)"
    with newest.open("rb") as file:
        file.seek(max(0, newest.stat().st_size - 4000))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:140] for line in reversed(lines) if line.strip()), "(the start)")


def _peak_resident(pid: int) -> int:
    """VmHWM, which a trainer resets once: the caller keeps the largest. 0 after the process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0
    )


def _ends(logs: Path, name: str, num: int) -> str:
    return "\n".join(
        f"--- rank {k}\n"
        + "\n".join((logs / f"{name}.rank{k}.txt").read_text(errors="replace").splitlines()[-25:])
        for k in range(num)
    )


def predicted_memory(values: Mapping[str, Any]) -> list[int]:
    """Bytes by stage, as python -m training.memory says. Raises Broken."""
    argv = [sys.executable, "-m", "training.memory", "--json", *flags_of(values)]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Broken(
            f"python -m training.memory ended with {done.returncode}: {done.stderr[-2000:]}"
        )
    return [stage["total"] for stage in json.loads(done.stdout)["stages"]]


def memory_table(values: Mapping[str, Any]) -> str:
    """The same as users see it."""
    argv = [sys.executable, "-m", "training.memory", *flags_of(values)]
    return subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


@contextmanager
def busy_cores(num: int) -> Iterator[None]:
    """That many processes that compute and do nothing else, meanwhile."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def processor() -> dict[str, str]:
    """Its name, family and model, of /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    wanted = ("model name", "cpu family", "model")
    found = {
        line.split(":")[0].strip(): line.split(":", 1)[1].strip()
        for line in reversed(lines)
        if ":" in line
    }
    return {name: found[name] for name in wanted if name in found}
