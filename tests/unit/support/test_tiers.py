"""What make test leaves to make test-all: cases drawn by a seed, each group with its own, and nothing lost between the two."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.ranks import REPOSITORY
from support.tiers import SEED_VARIABLE, TIER_VARIABLE, TIERS, drawn, full, is_in, left_out, num_examples

CASES = [{"phase": phase, "victim": victim} for phase in ("loading", "backward", "saving") for victim in range(4)]


def chosen(keep: int, by: str | None, key: str = "a test") -> list[int]:
    others = left_out(CASES, keep, by, key)
    return [number for number in range(len(CASES)) if number not in others]


def test_one_case_of_each_group_is_drawn_and_every_case_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Counter[int] = Counter()
    for seed in range(60):
        monkeypatch.setenv(SEED_VARIABLE, str(seed))
        found = chosen(1, "phase")
        assert [CASES[number]["phase"] for number in found] == ["loading", "backward", "saving"]
        times.update(found)
    assert set(times) == set(range(len(CASES)))


def test_the_same_seed_draws_the_same_and_tests_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SEED_VARIABLE, "7")
    assert chosen(2, None) == chosen(2, None) and len(chosen(2, None)) == 2
    assert len({tuple(chosen(2, None, f"test {n}")) for n in range(20)}) > 5
    assert chosen(50, None) == list(range(len(CASES)))


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("is_partly", [False, True])
def test_the_two_halves_of_the_suite_are_the_whole(is_full: bool, is_partly: bool) -> None:
    runs = {tier: is_in(tier, is_full=is_full, is_partly=is_partly) for tier in TIERS}
    assert runs["all"] and (runs["quick"] or runs["rest"])
    assert runs["quick"] is not is_full
    assert runs["rest"] is (is_full or is_partly), "what loops over a part runs again, over all"


def test_a_quick_fuzz_test_tries_thirty_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIER_VARIABLE, "quick")
    assert (num_examples(150), num_examples(8)) == (30, 8)
    monkeypatch.setenv(TIER_VARIABLE, "rest")
    assert num_examples(150) == 150


def test_a_quick_loop_goes_over_some_in_their_order_and_another_key_over_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIER_VARIABLE, "all")
    assert drawn(range(50), 5) == list(range(50))
    monkeypatch.setenv(TIER_VARIABLE, "quick")
    monkeypatch.setenv(SEED_VARIABLE, "3")
    found = drawn(range(50), 5)
    assert len(found) == 5 and found == sorted(set(found)) == drawn(range(50), 5)
    assert found != drawn(range(50), 5, key="another")
    assert drawn([3, 1], 5) == [3, 1]


@full
def test_pytest_runs_what_the_tier_says_prints_the_seed_and_repeats_it(tmp_path: Path) -> None:
    """On a matrix of the faults, which is collected and not run."""

    def collected(*options: str) -> tuple[list[str], str]:
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--collect-only", "-q", "-p", "no:cacheprovider", *options]
        done = subprocess.run([*command, "tests/faults/test_faults.py"], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        killed = [line for line in done.stdout.splitlines() if "::test_a_killed_rank" in line]
        return killed, done.stdout

    quick, said = collected("--tier", "quick", "--sample-seed", "5")
    assert "to run the same tests: --tier quick --sample-seed 5" in said
    rest, _ = collected("--tier", "rest", "--sample-seed", "5")
    whole, _ = collected()
    phases = {line.split("[")[1].rsplit("-", 1)[0] for line in whole}
    assert len(quick) == len(phases) and {line.split("[")[1].rsplit("-", 1)[0] for line in quick} == phases
    assert sorted(quick + rest) == sorted(whole) and not set(quick) & set(rest)
    assert collected("--tier", "quick", "--sample-seed", "5")[0] == quick
    others = [collected("--tier", "quick", "--sample-seed", str(seed))[0] for seed in (6, 7)]
    assert any(other != quick for other in others)
