"""How many threads this process computes with on a CPU, and on whose word."""

import logging
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

log = logging.getLogger("trainer")

VARIABLE = "OMP_NUM_THREADS"
MOST = 4096  # more is a slip of the hand, and OpenMP would try


class Threads(NamedTuple):
    """why: whose word the number is, for the log. ignored: what OMP_NUM_THREADS says, where that is
    no number of threads; else ""."""

    number: int
    why: str
    ignored: str = ""


def compute_threads(flag: int | None, environment: Mapping[str, str], cores: int, ranks_here: int) -> Threads:
    """``flag`` (--num-threads), else OMP_NUM_THREADS, else the ``cores`` shared by the ranks here.

    A list such as 4,2 is for nested regions, of which there are none: its first number counts.
    torchrun sets OMP_NUM_THREADS to 1 itself where a host has several workers, so there a 1 is
    nobody's word.
    """
    if flag is not None:
        return Threads(flag, "--num-threads")
    said = environment.get(VARIABLE, "").strip()
    first = re.fullmatch(r"0*([1-9][0-9]{0,3})\s*(,.*)?", said)
    number = int(first[1]) if first else 0
    if 1 <= number <= MOST and not (said == "1" and _has_torchruns_one(environment)):
        return Threads(number, VARIABLE)
    shared = max(1, cores // ranks_here)
    counted = f"{_counted(cores, 'core')} / {_counted(ranks_here, 'rank')} here"
    return Threads(shared, counted, said if said and number not in range(1, MOST + 1) else "")


def threads_here(flag: int | None, ranks_here: int) -> Threads:
    """The same of this process: its environment, and the cores that it may run on."""
    return compute_threads(flag, os.environ, len(os.sched_getaffinity(0)), ranks_here)


def set_threads(flag: int | None, ranks_here: int) -> int:
    """Let torch compute with as many, and return the number. Warns where OMP_NUM_THREADS is set and
    not followed, because it is no number of threads."""
    threads = threads_here(flag, ranks_here)
    if threads.ignored:
        log.warning(
            "%s must be a number of threads, 1 .. %d; it is %s and is ignored: %d (%s)",
            VARIABLE,
            MOST,
            ascii(threads.ignored),
            threads.number,
            threads.why,
        )
    torch.set_num_threads(threads.number)
    return threads.number


def _has_torchruns_one(environment: Mapping[str, str]) -> bool:
    is_torchrun = "TORCHELASTIC_RUN_ID" in environment
    return is_torchrun and environment.get("LOCAL_WORLD_SIZE", "1") != "1"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
