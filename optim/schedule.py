"""Learning-rate curves over optimizer steps. Pure."""

import math
from dataclasses import dataclass
from typing import Literal

CurveName = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """peak, minimum: learning rates; num_warmup_steps, num_steps: optimizer steps (not accumulation steps).

    Warm-up rises as n / (num_warmup_steps + 1) over updates n = 1 .. num_warmup_steps. The update after it runs at the peak, the
    last one (n = num_steps) at the minimum: progress between them is (n - 1 - num_warmup_steps) / (num_steps - 1 -
    num_warmup_steps). A schedule that has room for one update behind its warm-up spends it at the peak."""

    peak: float
    minimum: float
    num_warmup_steps: int
    num_steps: int
    curve: CurveName

    def at(self, update: int) -> float:
        """The rate of the ``update``-th update, counted from 1."""
        assert update >= 1, "updates are counted from 1"
        if update <= self.num_warmup_steps:
            return self.peak * update / (self.num_warmup_steps + 1)
        progress = min(1.0, (update - 1 - self.num_warmup_steps) / max(1, self.num_steps - 1 - self.num_warmup_steps))
        if self.curve == "constant":
            return self.peak
        remaining = 1.0 - progress if self.curve == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.minimum + (self.peak - self.minimum) * remaining
