"""Few-shot prompts: worked examples in front of the one that is asked.

Which examples an example is shown is decided by (seed, the asked example's number) alone, so a run repeats, and so do its parts. An example
is never shown itself: pool entries of the same text as the asked one are left out, wherever they come from.
"""

import dataclasses
from collections.abc import Sequence
from random import Random

from tasks.examples import Example, Piece
from user_error import UserError

SEPARATOR = "\n\n"


class Shots:
    """A pool of worked examples, and how many of them a prompt shows."""

    def __init__(self, pool: Sequence[Example], *, num_shots: int, seed: int, balanced: bool = False) -> None:
        """balanced: the shots go through the labels in turn, in an order of their own for every prompt. Raises UserError for a pool that
        is too small, or has no labels to balance."""
        assert num_shots >= 0, f"at least no shot at all, not {num_shots}"
        self._num_shots, self._seed = num_shots, seed
        self._by_label: list[list[Example]] = []
        if not num_shots:
            return
        unlabelled = sum(example.label is None for example in pool)
        if balanced and unlabelled:
            raise UserError(
                f"--balance-shots goes through the labels; {unlabelled} of {len(pool)} examples to show have none. Leave it out, or show "
                "examples of a task with labels"
            )
        groups: dict[str, list[Example]] = {}
        for example in pool:
            groups.setdefault(str(example.label) if balanced else "", []).append(example)
        self._by_label = [groups[label] for label in sorted(groups)]
        if num_shots >= len(pool):
            raise UserError(
                f"--num-shots must be below the number of examples to show; it is {num_shots}, and there are {len(pool)}. Give "
                "fewer shots, or another --shots-from"
            )

    def in_front_of(self, example: Example, number: int) -> Example:
        """``example``, the ``number``-th of the evaluation, behind its shots. Its label and its own pieces stay as they are. Raises
        UserError if too few other examples are left to show."""
        if not self._num_shots:
            return example
        draw, asked = Random(f"shots/{self._seed}/{number}"), example.text
        groups = [self._others(group, asked, draw) for group in self._by_label]
        draw.shuffle(groups)
        shots: list[Example] = []
        while len(shots) < self._num_shots and any(groups):
            shots += [group.pop() for group in groups if group]
        if len(shots) < self._num_shots:
            raise UserError(
                f"--num-shots {self._num_shots} needs as many examples other than the asked one; there are {len(shots)}. Give "
                "fewer shots, or another --shots-from"
            )
        shown = shots[: self._num_shots]
        draw.shuffle(shown)
        prefix = "".join(shot.text + SEPARATOR for shot in shown)
        return dataclasses.replace(example, pieces=(Piece(prefix, False), *example.pieces))

    def _others(self, group: list[Example], asked: str, draw: Random) -> list[Example]:
        """As many of ``group`` as a prompt shows, or all, whose text is not ``asked``. Looks at a few only, as a pool may be a whole
        training set and every prompt asks: more are drawn where too many were that text."""
        num = self._num_shots + 1
        while True:
            drawn = draw.sample(group, min(num, len(group)))
            others = [shot for shot in drawn if shot.text != asked][: self._num_shots]
            if len(others) == self._num_shots or num >= len(group):
                return others
            num *= 2
