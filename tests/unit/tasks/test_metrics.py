"""What answers are worth: verdicts, counts, the confusion matrix and McNemar's test, against values worked out by hand."""

import math

import pytest

from tasks.metrics import NO_LABEL, Counts, Verdict, confusion, judge, mcnemar, perplexity

LABELS = ("cat", "dog", "eel")


@pytest.mark.parametrize(
    ("answer", "expected", "labels", "ended", "verdict"),
    [
        ("cat", "cat", LABELS, True, "right"),
        ("dog", "cat", LABELS, True, "wrong"),
        ("cow", "cat", LABELS, True, "badly formed"),
        ("", "cat", LABELS, True, "badly formed"),
        ("Cat", "cat", LABELS, True, "badly formed"),  # to the character
        ("cat", "cat", LABELS, False, "right"),  # the first line is what counts, and it is whole
        ("4", "4", None, True, "right"),
        ("5", "4", None, True, "wrong"),
        ("4", "4", None, False, "badly formed"),  # it might have gone on as 42
    ],
)
def test_an_answer_gets_one_verdict(answer: str, expected: str, labels: tuple[str, ...] | None, ended: bool, verdict: Verdict) -> None:
    assert judge(answer, expected, labels, ended=ended) == verdict


def test_badly_formed_answers_count_as_not_right() -> None:
    counts = Counts.of(["right", "wrong", "badly formed", "right"])
    assert (counts.right, counts.wrong, counts.badly_formed, counts.total, counts.accuracy) == (2, 1, 1, 4, 0.5)
    assert str(counts) == "accuracy 50.00%: 2 of 4 right, 1 wrong, 1 badly formed"
    assert Counts.of([]).accuracy == 0.0


def test_the_published_mark_is_shown_as_published() -> None:
    assert "82.46%: 8107 of 9832 right" in str(Counts(right=8107, wrong=1725, badly_formed=0))


def test_perplexity_ends_in_infinity_instead_of_an_error() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_a_confusion_matrix_has_a_column_for_what_is_no_label() -> None:
    pytest.importorskip("sklearn")
    expected = ["cat", "cat", "cat", "dog", "dog", "eel"]
    answered = ["cat", "dog", "cow", "dog", "dog", "moo"]
    found = confusion(expected, answered, LABELS)
    assert found.labels == (*LABELS, NO_LABEL)
    assert found.matrix == ((1, 1, 0, 1), (0, 2, 0, 0), (0, 0, 0, 1))
    # cat: precision 1/1, recall 1/3, so 1/2; dog: 2/3 and 2/2, so 4/5; eel: never answered, so 0.
    assert found.macro_f1 == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)


def test_without_such_answers_there_is_no_such_column_and_unseen_labels_keep_their_place() -> None:
    pytest.importorskip("sklearn")
    found = confusion(["dog", "cat"], ["dog", "dog"], LABELS)
    assert found.labels == LABELS
    assert found.matrix == ((0, 1, 0), (0, 1, 0), (0, 0, 0))
    assert found.macro_f1 == pytest.approx((0 + 2 / 3 + 0) / 3)
    assert found.as_json() == {"labels": [*LABELS], "matrix": [[0, 1, 0], [0, 1, 0], [0, 0, 0]], "macro_f1": found.macro_f1}


def pairs(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    kinds = [(True, True)] * both + [(True, False)] * only_first + [(False, True)] * only_second + [(False, False)] * neither
    return [first for first, _ in kinds], [second for _, second in kinds]


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 5), (1, 5), (4, 4), (12, 5), (5, 12), (1, 0)])
def test_mcnemar_is_twice_the_tail_of_a_fair_coin(only_first: int, only_second: int) -> None:
    pytest.importorskip("scipy")
    found = mcnemar(*pairs(3, only_first, only_second, 2))
    assert (found.both_right, found.only_first, found.only_second, found.neither) == (3, only_first, only_second, 2)
    tosses = only_first + only_second
    tail = sum(math.comb(tosses, heads) for heads in range(min(only_first, only_second) + 1)) / 2**tosses
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))


def test_models_that_never_disagree_do_not_differ() -> None:
    assert mcnemar(*pairs(4, 0, 0, 3)).p_value == 1.0


def test_a_comparison_says_who_is_a_and_who_is_b() -> None:
    pytest.importorskip("scipy")
    said = str(mcnemar(*pairs(5, 3, 1, 1)))
    assert said.startswith("A 8 of 10 right (80.00%), B 6 of 10 (60.00%); only A right: 3, only B right: 1;")
    assert said.endswith("p = 0.625")
