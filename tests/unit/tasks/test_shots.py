"""Few-shot prompts: drawn by seed and number, never the asked example itself, and as cheap from a whole training set as from a few rows."""

from collections import Counter

import pytest
from support.packing import answered, text

from tasks.examples import Example, Piece
from tasks.shots import SEPARATOR, Shots
from user_error import UserError

LABELS = ("no", "perhaps", "yes")


def pool_of(num: int, labels: tuple[str, ...] = LABELS) -> list[Example]:
    return [answered(f"question {n}:", f" {labels[n % len(labels)]}") for n in range(num)]


def shots_of(example: Example) -> list[str]:
    *shots, _ = example.text.split(SEPARATOR)
    return shots


def test_shots_stand_before_the_prompt_and_leave_the_asked_example_as_it_was() -> None:
    pool = pool_of(9)
    asked = answered("what now:", " yes")
    shown = Shots(pool, num_shots=3, seed=5).in_front_of(asked, 0)
    assert shown.text.endswith(SEPARATOR + asked.text)
    assert shown.pieces[1:] == asked.pieces
    assert not shown.pieces[0].is_target, "an answer that is shown is given, not asked for"
    assert (shown.completion, shown.label) == (asked.completion, asked.label)
    shots = shots_of(shown)
    assert len(set(shots)) == 3
    assert set(shots) <= {example.text for example in pool}


def test_seed_and_number_alone_decide() -> None:
    pool, asked = pool_of(50), answered("what now:", " yes")
    shots = Shots(pool, num_shots=4, seed=5)
    once = [shots.in_front_of(asked, number) for number in range(20)]
    again = [Shots(pool, num_shots=4, seed=5).in_front_of(asked, number) for number in reversed(range(20))]
    assert once == again[::-1]
    assert len({example.text for example in once}) == 20
    assert once != [Shots(pool, num_shots=4, seed=6).in_front_of(asked, number) for number in range(20)]


def test_no_shot_leaves_the_example_alone() -> None:
    asked = answered("what now:", " yes")
    assert Shots([], num_shots=0, seed=5).in_front_of(asked, 0) is asked


@pytest.mark.parametrize("balanced", [False, True])
def test_an_example_is_never_shown_itself_nor_its_duplicates(balanced: bool) -> None:
    same, others = answered("question x:", " yes"), pool_of(6)
    shots = Shots([same] * 300 + others, num_shots=5, seed=1, balanced=balanced)
    for number in range(50):
        shown = shots_of(shots.in_front_of(same, number))
        assert len(set(shown)) == 5
        assert same.text not in shown


def test_every_other_example_is_shown_about_as_often() -> None:
    pool = pool_of(12)
    shots = Shots(pool, num_shots=3, seed=2)
    seen = Counter(shot for number in range(1100) for shot in shots_of(shots.in_front_of(pool[0], number)))
    assert set(seen) == {example.text for example in pool[1:]}
    assert max(abs(count - 300) for count in seen.values()) < 75, seen  # 5 standard deviations of 1100 draws with p = 3/11


def test_balanced_shots_go_through_the_labels() -> None:
    pool = [*pool_of(2, ("yes", "no")), *(answered(f"common {n}:", " no") for n in range(500))]
    pool += [answered(f"rare {n}:", " perhaps") for n in range(3)]
    shots = Shots(pool, num_shots=4, seed=3, balanced=True)
    firsts = set()
    for number in range(40):
        shown = shots_of(shots.in_front_of(answered("what now:", " yes"), number))
        labels = [shot.rpartition(" ")[2] for shot in shown]
        assert set(Counter(labels)) == set(LABELS)
        assert max(Counter(labels).values()) == 2
        firsts.add(labels[0])
    assert firsts == set(LABELS), "no label has a place of its own"


def test_a_label_that_runs_out_leaves_its_turns_to_the_others() -> None:
    pool = [answered("only one:", " yes"), *(answered(f"common {n}:", " no") for n in range(9))]
    shown = shots_of(Shots(pool, num_shots=4, seed=3, balanced=True).in_front_of(answered("what now:", " yes"), 0))
    assert Counter(shot.rpartition(" ")[2] for shot in shown) == {"yes": 1, "no": 3}


class CountedReads(Example):
    """An example that counts how often its text is put together."""

    reads = 0

    @property
    def text(self) -> str:
        CountedReads.reads += 1
        return super().text


@pytest.mark.parametrize("balanced", [False, True])
def test_a_prompt_does_not_read_the_whole_pool(balanced: bool) -> None:
    """392,702 examples in the pool and 9,832 prompts that each look at all of them took hours."""
    pool: list[Example] = [CountedReads(pieces=example.pieces, label=example.label) for example in pool_of(5000)]
    shots = Shots(pool, num_shots=4, seed=1, balanced=balanced)
    CountedReads.reads = 0
    for number in range(10):
        shots.in_front_of(answered("what now:", " yes"), number)
    assert CountedReads.reads <= 10 * (3 * 5 + 4)


@pytest.mark.parametrize(
    ("pool", "balanced", "wanted"),
    [
        (pool_of(3), False, r"--num-shots must be below .*; it is 3, and there are 3"),
        ([], False, r"it is 3, and there are 0"),
        ([*pool_of(4), text("no label")], True, r"--balance-shots goes through the labels; 1 of 5 examples to show have none"),
    ],
)
def test_a_pool_that_does_not_do_is_refused(pool: list[Example], balanced: bool, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        Shots(pool, num_shots=3, seed=0, balanced=balanced)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_pool_of_duplicates_says_how_many_others_there_are(balanced: bool) -> None:
    same = answered("question x:", " yes")
    shots = Shots([same] * 40 + pool_of(2), num_shots=3, seed=0, balanced=balanced)
    with pytest.raises(UserError, match=r"--num-shots 3 needs as many examples other than the asked one; there are 2"):
        shots.in_front_of(same, 0)


def test_what_is_asked_keeps_everything_but_its_prompt() -> None:
    pool = [Example(pieces=(Piece(f"q{n}", False), Piece(f" a{n}", True))) for n in range(3)]
    asked = Example(pieces=(Piece("q", False), Piece(" a", True)), label="a", as_good=("a", "b"))
    shown = Shots(pool, num_shots=2, seed=0).in_front_of(asked, 0)
    assert (shown.label, shown.as_good, shown.pieces[1:]) == (asked.label, asked.as_good, asked.pieces)
