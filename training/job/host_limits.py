"""What ends a run before its last step without anybody asking: its time is over, or its host runs out of memory.

Asked once per step on every rank. A reason becomes a vote, as a signal does (stopping.py): all ranks finish the step, save and end well,
where the kernel would have killed one of them. And what an allocation that failed all the same says to the user."""

import logging
import re
import time
from pathlib import Path

import psutil
import torch

log = logging.getLogger("trainer")

GIB = 2**30
CGROUPS = Path("/sys/fs/cgroup")
MEMORY_SHARE = 0.9  # the rest: buffers of links, temporaries of single operations, fragmentation
POLL_S = 1.0  # reading /proc more often tells nothing new


class Limits:
    """max_seconds: from began_at on (seconds as time.time(), None: now); None for no limit. min_free_memory: GiB of this host, 0 for
    none."""

    def __init__(self, *, max_seconds: float | None, min_free_memory: float, began_at: float | None = None) -> None:
        self._began = self._polled_at = time.monotonic()
        if began_at is not None:
            self._began -= max(0.0, time.time() - began_at)
        self._max_seconds, self._min_free = max_seconds, min_free_memory * GIB
        self._has_warned = False
        self._short: str | None = None

    def reason(self) -> str | None:
        """Why this rank wants all to stop, in words that follow "stopped by"; None if it does not."""
        now = time.monotonic()
        if self._max_seconds is not None and now - self._began >= self._max_seconds:
            return f"--max-seconds {self._max_seconds:g}"
        if self._min_free and self._short is None and now - self._polled_at >= POLL_S:
            self._polled_at = now
            self._look_at_memory(free_memory())
        return self._short

    def _look_at_memory(self, free: int) -> None:
        if free < self._min_free:
            self._short = (
                f"want of memory: {free / GIB:.2f} GiB of this host's are free (--min-free-memory {self._min_free / GIB:g}); before the "
                "kernel would have killed a process"
            )
            log.error("%s", f"all ranks stop behind this step for {self._short}")
        elif free < 2 * self._min_free and not self._has_warned:
            self._has_warned = True
            log.warning("only %.2f GiB of this host's memory are free; below %.2f all ranks will stop", free / GIB, self._min_free / GIB)


def free_memory(cgroups: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may still take: what the host has available, or what is left of the limit of a cgroup it is in."""
    free = psutil.virtual_memory().available
    try:
        entries = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return free
    for _, controllers, name in (entry for entry in entries if len(entry) == 3):
        path = name.lstrip("/")
        if controllers == "":
            folder, limit, used, cache = cgroups / path, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            folder, limit, used, cache = cgroups / "memory" / path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        while True:  # the limit of any group around it counts
            left = _left(folder, limit, used, cache)
            free = free if left is None else min(free, left)
            if folder in (cgroups, cgroups / "memory"):
                break
            folder = folder.parent
    return free


def _left(folder: Path, limit: str, used: str, cache: str) -> int | None:
    """None where the group has no limit, or is not to be seen."""
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        found = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    if not most.isdecimal():
        return None
    return max(0, int(most) - now + (int(found[1]) if found else 0))


def default_memory_limit(device: torch.device, ranks_here: int) -> int:
    """Bytes this rank may plan with: MEMORY_SHARE of what is free now, on its GPU, or on its host (in its control group, where that
    is tighter) divided by the ``ranks_here`` that share it. Call it on all ranks before any of them takes much."""
    if device.type == "cuda":
        return int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
    room = free_memory()
    return int(MEMORY_SHARE * max(0, room)) // ranks_here


def explain_out_of_memory(error: BaseException) -> str | None:
    """What to do where ``error`` says that memory has run out; None for any other error."""
    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        what = "the GPU's memory is too small for this stage"
    elif isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        what = "this host's memory is too small for this stage"
    else:
        return None
    found = re.search(r"[Tt]ried to allocate ([0-9.]+ ?[KMGT]?i?B|[0-9]+ bytes)", text)
    asked = f" ({found[1]} more were asked for)" if found else ""
    return (
        f"{what}{asked}. Take a smaller --micro-batch-size, --recompute layer, more stages (--pipeline-group-size), or --train lora with "
        "--base-quantization int8; python -m training.memory says beforehand what a stage takes"
    )
