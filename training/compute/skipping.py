"""Steps whose loss or gradient is not finite: they change nothing, on all ranks alike, and too many in a row end the run."""

import logging
import math

from optim.decide import StepDecision
from optim.loss_scale import LossScale
from user_error import UserError

log = logging.getLogger("trainer")


class SkippedSteps:
    """Counts them. num: of the whole run; loss_scale: the run's own, for what is said about it."""

    def __init__(self, num: int, loss_scale: LossScale, *, is_fp16: bool, most_in_a_row: int) -> None:
        self.num, self.in_a_row = num, 0
        self._loss_scale, self._is_fp16, self._most_in_a_row = loss_scale, is_fp16, most_in_a_row

    def count(self, decision: StepDecision) -> None:
        """After every step, on all ranks."""
        self.num += decision.skip
        self.in_a_row = self.in_a_row + 1 if decision.skip else 0

    @property
    def are_too_many(self) -> bool:
        """Whether the run must end (--max-skipped-steps)."""
        return self.in_a_row >= self._most_in_a_row

    def say(self, step: int, decision: StepDecision, loss_scale: float) -> None:
        """loss_scale: that of the skipped step."""
        what = "the loss" if not math.isfinite(decision.loss) else "the gradient"
        scale = ""
        if self._is_fp16:
            now = self._loss_scale.value
            scale = f"; loss scale {loss_scale:g}{f' -> {now:g}' if now != loss_scale else ''}"
        log.warning("step %d is skipped on all ranks: %s is not finite%s", step, what, scale)

    def error(self, step: int, kept: str) -> UserError:
        """What ends the run; ``kept``: a sentence about what was written for inspection, or ''."""
        return UserError(
            f"the loss or its gradient was not finite in {self.in_a_row} optimizer steps in a row (--max-skipped-steps), up "
            f"to step {step}; none of them changed the weights. {kept}{self._advice()}Lower --lr, lengthen the warm-up, or look at the "
            "data, and start again from the newest checkpoint"
        )

    def _advice(self) -> str:
        if not self._is_fp16:
            return ""
        if self._loss_scale.is_static:
            return f"--loss-scale {self._loss_scale.value:g} stays: give a smaller one, or leave it out so that it follows the overflows. "
        if self._loss_scale.is_at_minimum:
            return f"A loss scale of {self._loss_scale.value:g} goes no lower: use --bf16, which overflows where fp32 does. "
        lower = "raise --max-skipped-steps, or start again with a smaller --initial-loss-scale"
        return f"The loss scale has fallen to {self._loss_scale.value:g} and would fall on: {lower}. "
