"""What answers are worth: each one judged, all of them counted, two models compared.

An answer is right if it equals the expected one to the character, after what the task makes of generated text (BoundTask.answer). Where the
task has a set of labels, an answer that is none of them is badly formed, and so is one that did not end within the tokens it was given.
Accuracy counts both as not right. Statistics are scikit-learn's and scipy's (optional packages, extra ``evaluation``), met at first use.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from user_error import UserError

Verdict = Literal["right", "wrong", "badly formed"]

NO_LABEL = "(no label)"  # the column of badly formed answers in a confusion matrix


def judge(answer: str, expected: str, labels: Sequence[str] | None, *, ended: bool = True) -> Verdict:
    """answer, expected: as BoundTask.answer gives them. labels: all that an answer may be, None: anything. ended: whether the model ended
    the text itself; with labels that does not matter, as the first line is what counts."""
    if answer == expected and (ended or labels is not None):
        return "right"
    if labels is not None:
        return "wrong" if answer in labels else "badly formed"
    return "wrong" if ended else "badly formed"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many answers got which verdict."""

    right: int
    wrong: int
    badly_formed: int

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Counts":
        found = Counter(verdicts)
        return cls(right=found["right"], wrong=found["wrong"], badly_formed=found["badly formed"])

    @property
    def total(self) -> int:
        return self.right + self.wrong + self.badly_formed

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 where there are none at all."""
        return self.right / max(1, self.total)

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.2%}: {self.right} of {self.total} right, {self.wrong} wrong, {self.badly_formed} badly formed"


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; inf where that is beyond float64."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """labels: of rows (expected) and columns (answered), the last column being NO_LABEL if any answer was none. matrix[r][c]: how many.
    macro_f1: the mean over the labels of each one's F1 score (scikit-learn's, 0 where a label was neither expected nor answered)."""

    labels: tuple[str, ...]
    matrix: tuple[tuple[int, ...], ...]
    macro_f1: float

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {"labels": list(self.labels), "matrix": [list(row) for row in self.matrix], "macro_f1": self.macro_f1}


def confusion(expected: Sequence[str], answered: Sequence[str], labels: Sequence[str]) -> Confusion:
    """Of answers to examples that all have a label of ``labels``. Raises UserError without scikit-learn."""
    metrics = import_sklearn_metrics()
    told = [answer if answer in labels else NO_LABEL for answer in answered]
    shown = [*labels, *([NO_LABEL] if NO_LABEL in told else [])]
    matrix = metrics.confusion_matrix(list(expected), told, labels=shown)
    macro_f1 = metrics.f1_score(list(expected), told, labels=list(labels), average="macro", zero_division=0.0)
    rows = tuple(tuple(int(count) for count in row) for row in matrix[: len(labels)])
    return Confusion(labels=tuple(shown), matrix=rows, macro_f1=float(macro_f1))


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Two models on the same examples. p_value: exact and two-sided, of as unequal a split of the examples that only one of them got right
    if either were as likely (McNemar 1947, doi:10.1007/BF02295996; exact form: the binomial test)."""

    both_right: int
    only_first: int
    only_second: int
    neither: int
    p_value: float

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return dict(vars(self))

    def __str__(self) -> str:
        total = self.both_right + self.only_first + self.only_second + self.neither
        first, second = self.both_right + self.only_first, self.both_right + self.only_second
        return (
            f"A {first} of {total} right ({first / max(1, total):.2%}), B {second} of {total} ({second / max(1, total):.2%}); "
            "only A right: "
            f"{self.only_first}, only B right: {self.only_second}; McNemar's exact test: p = {self.p_value:.3g}"
        )


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """first, second: which of the same examples each model got right. Raises UserError without scipy."""
    assert len(first) == len(second), "the same examples"
    found = Counter(zip(first, second, strict=True))
    only_first, only_second = found[True, False], found[False, True]
    p_value = 1.0
    if only_first + only_second:
        p_value = float(_import_scipy_stats().binomtest(only_first, only_first + only_second, 0.5).pvalue)
    return McNemar(
        both_right=found[True, True], only_first=only_first, only_second=only_second, neither=found[False, False], p_value=p_value
    )


def import_sklearn_metrics() -> Any:
    """scikit-learn's metrics. Raises UserError where it is not installed; whoever will need it asks before any weight is loaded."""
    try:
        from sklearn import metrics
    except ImportError as error:
        raise UserError(
            "a confusion matrix and macro-F1 need the package scikit-learn. Install it with: pip install scikit-learn"
        ) from error
    return metrics


def _import_scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise UserError("McNemar's test needs the package scipy. Install it with: pip install scipy") from error
    return stats
