"""What make test leaves to make test-all: cases drawn by a seed, each group with its own, and nothing lost between the two."""

from collections import Counter
from typing import Any

import pytest
from support.tiers import SEED_VARIABLE, TIER_VARIABLE, TIERS, drawn, full, is_in, num_examples, sampled

CASES = [(phase, victim) for phase in ("loading", "backward", "saving") for victim in range(4)]


def quick(cases: list[Any]) -> list[Any]:
    return [case for case in cases if not isinstance(case, type(pytest.param()))]


def test_one_case_of_each_group_is_quick_and_all_others_are_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Counter()
    for seed in range(40):
        monkeypatch.setenv(SEED_VARIABLE, str(seed))
        found = sampled(CASES, group=lambda case: case[0])
        assert [case[0] for case in quick(found)] == ["loading", "backward", "saving"]
        assert [case if isinstance(case, tuple) and len(case) == 2 else case.values for case in found] == CASES
        drawn.update(quick(found))
    assert set(drawn) == set(CASES), "every case has its turn"


def test_the_same_seed_draws_the_same_and_no_group_moves_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SEED_VARIABLE, "7")
    first = quick(sampled(CASES, 2, group=lambda case: case[0]))
    assert first == quick(sampled(CASES, 2, group=lambda case: case[0])) and len(first) == 6
    fewer = quick(sampled(CASES[:8], 2, group=lambda case: case[0]))
    assert fewer == first[:4]
    assert quick(sampled([1, 2], 5)) == [1, 2]


def test_values_that_are_no_tuples_are_cases_too() -> None:
    found = sampled(["a", "b", "c"], 1)
    assert len(quick(found)) == 1
    assert all(case.marks == (full.mark,) or case.marks == (full,) for case in found if case not in quick(found))


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
