"""Two tiers of tests: `make test` holds every promise once, `make test-all` every case of it.

What is only in the second is marked ``full``; of a matrix, `make test` runs some cases, drawn by a
seed that pytest prints first. The seed follows from the commit, so that each commit draws others
and CI can be repeated: pytest --tier quick --sample-seed N.
"""

import os
import random
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

SEED_VARIABLE, TIER_VARIABLE = "TEST_SAMPLE_SEED", "TEST_TIER"
QUICK, REST, ALL = TIERS = ("quick", "rest", "all")
QUICK_EXAMPLES = 30  # of a fuzz test
full = pytest.mark.full  # in make test-all alone
partly = pytest.mark.partly  # make test tries some of what it loops over, see drawn() and num_examples()


def seed_of_commit() -> int:
    """The first digits of HEAD; 0 outside of a repository."""
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return int(done.stdout, 16) if done.returncode == 0 else 0


def sampled(cases: Iterable[Any], keep: int = 1, *, group: Callable[[Any], object] = lambda case: None) -> list[Any]:
    """All ``cases`` of a parametrize, of which `make test` runs ``keep`` of each ``group``.

    A case is a value or a tuple of values, as parametrize takes them. A case is drawn by the seed
    and its group alone, so that other matrices do not change what is drawn here.
    """
    cases = list(cases)
    groups: dict[object, list[int]] = {}
    for number, case in enumerate(cases):
        groups.setdefault(group(case), []).append(number)
    seed = os.environ.get(SEED_VARIABLE, "0")
    chosen: set[int] = set()
    for key, numbers in groups.items():
        draw = random.Random(f"{seed} {key} {len(numbers)}")
        chosen |= set(draw.sample(numbers, min(keep, len(numbers))))
    return [case if number in chosen else _marked(case) for number, case in enumerate(cases)]


def _marked(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=full)


def drawn(items: Iterable[Any], keep: int, *, key: str = "") -> list[Any]:
    """What a test that is marked ``partly`` loops over: all ``items``, or in `make test` ``keep`` of
    them, in their order. key: for tests that are to draw apart from each other."""
    items = list(items)
    if os.environ.get(TIER_VARIABLE) != QUICK or len(items) <= keep:
        return items
    draw = random.Random(f"{os.environ.get(SEED_VARIABLE, '0')} {key} {len(items)}")
    return [items[number] for number in sorted(draw.sample(range(len(items)), keep))]


def num_examples(of_all: int) -> int:
    """Of a fuzz test, marked ``partly``, that tries ``of_all`` in `make test-all`."""
    return min(of_all, QUICK_EXAMPLES) if os.environ.get(TIER_VARIABLE) == QUICK else of_all


def is_in(tier: str, *, is_full: bool, is_partly: bool) -> bool:
    """Whether a test runs. The rest: what `make test` left out, wholly or in part."""
    if tier == ALL:
        return True
    return is_full or is_partly if tier == REST else not is_full
