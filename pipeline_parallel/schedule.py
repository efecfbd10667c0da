"""Who computes what in which order, as pure data.

Every mode plays, on every stage, all forwards in micro-batch order and all backwards in micro-batch order: gradients are added in one
order, so the sum has the same bits in any mode and for any cut. What differs is how they interleave. For S = 2 stages and M = 4
micro-batches (a place is a unit of time; a whole backward takes two, of which zb leaves one for later)::

    gpipe  stage 0  F0 F1 F2 F3 .  .  .  B0 B0 B1 B1 B2 B2 B3 B3
           stage 1  .  F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3
    1f1b   stage 0  F0 F1 .  .  B0 B0 F2 B1 B1 F3 B2 B2 .  B3 B3
           stage 1  .  F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3
    zb     stage 0  F0 F1 .  B0 W0 F2 B1 W1 F3 B2 W2 B3 W3
           stage 1  .  F0 B0 F1 B1 W0 F2 B2 W1 F3 B3 W2 W3

GPipe: Huang et al. 2019, arXiv:1811.06965. 1F1B: Narayanan et al. 2021, arXiv:2104.04473, section 2.2. zb, after Qi et al. 2023,
arXiv:2401.10241 (ZB-H1): a backward gives the gradient of its input first, for which the stage before waits.

1F1B holds as few micro-batches as it can, and so every link's round trip stands between a forward and its backward.
``extra_warmup[j]`` lets every stage before link j run that many more forwards ahead; with enough of them the round trip of a
long link is never waited for.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

PipelineMode = Literal["gpipe", "1f1b", "zb"]

NEGLIGIBLE_WAIT = 0.02  # of a micro-batch's compute; not worth the memory of another micro-batch in flight


class Action(NamedTuple):
    """F: forward, B: backward, W: the weight gradients of micro-batch ``i``. In zb, B gives the gradient of the stage's input and
    leaves the weight gradients for W; elsewhere B is the whole backward."""

    kind: Literal["F", "B", "W"]
    i: int


def order(
    mode: PipelineMode,
    *,
    stage: int,
    num_stages: int,
    num_micro_batches: int,
    num_accumulation_steps: int = 1,
    extra_warmup: Sequence[int] = (),
) -> tuple[Action, ...]:
    """What ``stage`` does in one optimizer step, in order.

    num_micro_batches: of one accumulation step; gpipe empties the pipeline after each, the other modes go through without a stop, so
    micro-batches are counted over all of them: i = accumulation step * num_micro_batches + index. extra_warmup: one entry
    per link between stages, () for none. In zb a W may run earlier than it stands here, whenever the next message is not there yet.
    """
    assert 0 <= stage < num_stages and num_micro_batches >= 1 and num_accumulation_steps >= 1, "a stage of a pipeline with work to do"
    assert len(extra_warmup) in (0, num_stages - 1), "one number of extra warm-up forwards per link"
    if mode == "gpipe":
        starts = range(0, num_accumulation_steps * num_micro_batches, num_micro_batches)
        return tuple(Action(kind, start + i) for start in starts for kind in ("F", "B") for i in range(num_micro_batches))
    total = num_accumulation_steps * num_micro_batches
    actions = _one_forward_one_backward(total, warmup_forwards(stage, num_stages, extra_warmup))
    if mode == "1f1b":
        return tuple(actions)
    return tuple(_with_weight_gradients(actions, max_in_flight=1 + warmup_forwards(0, num_stages, extra_warmup)))


def warmup_forwards(stage: int, num_stages: int, extra_warmup: Sequence[int] = ()) -> int:
    """Forwards that ``stage`` runs ahead of its first backward in 1f1b and zb: one, and the extra ones, for every link behind it."""
    return (num_stages - 1 - stage) + sum(extra_warmup[stage:])


def extra_warmup_for(*, latency_s: float, transfer_s: float, compute_s: float) -> int:
    """ceil((2 * latency + transfer) / compute): further micro-batches a link needs in flight so that nobody waits for it.

    latency_s: one way; transfer_s: an activation's and its gradient's together; compute_s: forward and backward of one micro-batch on
    the slowest stage, whose pace the pipeline keeps. A wait below NEGLIGIBLE_WAIT of the compute counts as none."""
    assert compute_s > 0, "computing takes time"
    return max(0, math.ceil((2 * latency_s + transfer_s) / compute_s - NEGLIGIBLE_WAIT))


def _one_forward_one_backward(total: int, warmup: int) -> list[Action]:
    """Warm up with forwards only, then one forward and one backward in turn, then the backwards that are left."""
    warmup = min(warmup, total)
    steady = itertools.chain.from_iterable((Action("F", warmup + i), Action("B", i)) for i in range(total - warmup))
    return [
        *(Action("F", i) for i in range(warmup)),
        *steady,
        *(Action("B", i) for i in range(total - warmup, total)),
    ]


def _with_weight_gradients(actions: list[Action], max_in_flight: int) -> list[Action]:
    """Put every W as late as memory allows: a micro-batch is in flight from its F to its W, and no stage holds more of them than the
    first one does in 1f1b anyway."""
    placed: list[Action] = []
    num_forward = num_backward = num_weight = 0
    for action in actions:
        if action.kind == "F":
            if num_forward - num_weight == max_in_flight:
                assert num_weight < num_backward, "1f1b never holds more than max_in_flight itself"
                placed.append(Action("W", num_weight))
                num_weight += 1
            num_forward += 1
        else:
            num_backward += 1
        placed.append(action)
    return [*placed, *(Action("W", i) for i in range(num_weight, num_backward))]
