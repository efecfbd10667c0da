"""Who computes what in which order, as pure data.

Backwards run in micro-batch order in every schedule, so that gradients are added in one order and the sum has the same bits for any cut.

GPipe (Huang et al. 2019, arXiv:1811.06965) with S = 2 stages and M = 3 micro-batches::

    stage 0   F0 F1 F2 .  .  B0 B1 B2
    stage 1   .  F0 F1 F2 B0 B1 B2
"""

from typing import Literal, NamedTuple

Kind = Literal["gpipe"]


class Action(NamedTuple):
    """F: forward, B: backward of micro-batch ``i``."""

    kind: Literal["F", "B"]
    i: int


def order(kind: Kind, num_micro_batches: int) -> tuple[Action, ...]:
    """What one stage does in a step, in order."""
    assert kind == "gpipe", f"unknown schedule {kind!r}"
    forwards = tuple(Action("F", i) for i in range(num_micro_batches))
    backwards = tuple(Action("B", i) for i in range(num_micro_batches))
    return forwards + backwards
