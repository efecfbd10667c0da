"""Two tiers of tests: `make test` holds every promise once, `make test-all` every case of it.

What is only in the second is marked ``full``; of a test marked ``sample``, `make test` runs some
cases, drawn by a seed that pytest prints first. The seed follows from the commit, so that each commit draws others
and CI can be repeated: pytest --tier quick --sample-seed N.
"""

import os
import random
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

SEED_VARIABLE, TIER_VARIABLE = "TEST_SAMPLE_SEED", "TEST_TIER"
QUICK, REST, ALL = TIERS = ("quick", "rest", "all")
QUICK_EXAMPLES = 30  # of a fuzz test
full = pytest.mark.full  # in make test-all alone
partly = (
    pytest.mark.partly
)  # make test tries some of what it loops over, see drawn() and num_examples()


def seed_of_commit() -> int:
    """The first digits of HEAD; 0 outside of a repository."""
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return int(done.stdout, 16) if done.returncode == 0 else 0


def sample(keep: int, *, by: str | None = None) -> pytest.MarkDecorator:
    """Of the cases of a parametrized test `make test` runs ``keep``; by: the name of a parameter, of
    each value of which so many are run."""
    return pytest.mark.sample(keep, by=by)


def left_out(cases: Sequence[Mapping[str, Any]], keep: int, by: str | None, key: str) -> list[int]:
    """Numbers of the cases of a test that are not drawn. cases: the values of each one's parameters,
    by name; key: of the test, so that tests draw apart from each other."""
    groups: dict[str, list[int]] = {}
    for number, values in enumerate(cases):
        groups.setdefault("" if by is None else str(values[by]), []).append(number)
    chosen = {
        number
        for group, numbers in groups.items()
        for number in _draw(numbers, keep, f"{key} {group}")
    }
    return [number for number in range(len(cases)) if number not in chosen]


def _draw(items: Sequence[int], keep: int, key: str) -> list[int]:
    """``keep`` of ``items``, or all where there are no more, by the seed and ``key``."""
    generator = random.Random(f"{os.environ.get(SEED_VARIABLE, '0')} {key} {len(items)}")
    return generator.sample(items, min(keep, len(items)))


def mark_what_is_left_out(items: Sequence[pytest.Function]) -> None:
    """``full`` for the cases of tests with ``sample`` that are not drawn."""
    by_test: dict[str, list[pytest.Function]] = {}
    for item in items:
        if item.get_closest_marker("sample") is not None:
            by_test.setdefault(item.nodeid.split("[")[0], []).append(item)
    for test, cases in by_test.items():
        marker = cases[0].get_closest_marker("sample")
        values = [case.callspec.params for case in cases]
        for number in left_out(values, marker.args[0], marker.kwargs["by"], test):
            cases[number].add_marker(full)


def drawn(items: Iterable[Any], keep: int, *, key: str = "") -> list[Any]:
    """What a test that is marked ``partly`` loops over: all ``items``, or in `make test` ``keep`` of
    them, in their order. key: for tests that are to draw apart from each other."""
    items = list(items)
    if os.environ.get(TIER_VARIABLE) != QUICK or len(items) <= keep:
        return items
    return [items[number] for number in sorted(_draw(range(len(items)), keep, key))]


def num_examples(of_all: int) -> int:
    """Of a fuzz test, marked ``partly``, that tries ``of_all`` in `make test-all`."""
    return min(of_all, QUICK_EXAMPLES) if os.environ.get(TIER_VARIABLE) == QUICK else of_all


def is_in(tier: str, *, is_full: bool, is_partly: bool) -> bool:
    """Whether a test runs. The rest: what `make test` left out, wholly or in part."""
    if tier == ALL:
        return True
    return is_full or is_partly if tier == REST else not is_full
