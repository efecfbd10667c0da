"""The factor that keeps fp16 gradients between too small and too large (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

The loss is multiplied by it, so that small gradients do not become zero on their way back, and the gradients are divided by it before they
are used. Too large a factor makes some gradient infinite; the step is then skipped on all ranks alike (optim/decide.py), and the factor
falls. It follows from the decisions of the steps alone, so every rank keeps its own copy and all are equal. In fp32 and bf16 it is 1.
"""

from dataclasses import asdict, dataclass
from typing import Any

from user_error import UserError

LARGEST = 2.0**24  # beyond it nothing is gained: fp16 resolves 2**-24


@dataclass(frozen=True, kw_only=True)
class LossScaleSettings:
    """The flags --loss-scale (static, where it is given), --initial-loss-scale, --loss-scale-window (steps without an overflow until it
    doubles), --min-loss-scale, --loss-scale-hysteresis (overflows until it is halved, counted anew whenever it doubles)."""

    static: float | None
    initial: float
    window: int
    minimum: float
    hysteresis: int


class LossScale:
    """A number and how it follows the overflows; ``settings`` None: always 1."""

    def __init__(self, settings: LossScaleSettings | None) -> None:
        self._settings = settings
        self._is_dynamic = settings is not None and settings.static is None
        self.value = 1.0
        if settings is not None:
            self.value = settings.initial if settings.static is None else settings.static
        self._good_steps, self._overflows_left = 0, settings.hysteresis if settings is not None else 0

    @property
    def is_static(self) -> bool:
        """True if no overflow lowers it."""
        return not self._is_dynamic

    @property
    def is_at_minimum(self) -> bool:
        """True if another overflow would not lower it."""
        return self._settings is None or not self._is_dynamic or self.value <= self._settings.minimum

    def update(self, *, overflowed: bool) -> None:
        """Called after every optimizer step, with the same on all ranks."""
        if not self._is_dynamic:
            return
        assert self._settings is not None, "a dynamic scale has settings"
        if overflowed:
            self._good_steps = 0
            self._overflows_left -= 1
            if self._overflows_left <= 0:
                self.value = max(self.value / 2, self._settings.minimum)
            return
        self._good_steps += 1
        if self._good_steps >= self._settings.window:
            self._good_steps, self._overflows_left = 0, self._settings.hysteresis
            self.value = min(self.value * 2, LARGEST)

    def state(self) -> dict[str, Any]:
        """What a resume needs to go on with the same scale in every step; JSON."""
        return {
            "value": self.value,
            "good_steps": self._good_steps,
            "overflows_left": self._overflows_left,
            "settings": None if self._settings is None else asdict(self._settings),
        }

    def load(self, state: dict[str, Any] | float) -> None:
        """The reverse of state(), of a run with or without a scale (a number: of a version that had none). Where the scale was static, is
        static now, or is to begin with another value than it began with, it keeps its own. Raises UserError if ``state`` is none of ours.
        """
        if isinstance(state, (int, float)):
            return
        try:
            value, good_steps, left = float(state["value"]), int(state["good_steps"]), int(state["overflows_left"])
            was_dynamic = state["settings"] is not None and state["settings"]["static"] is None
            began_alike = self._settings is None or not was_dynamic or state["settings"]["initial"] == self._settings.initial
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint's loss scale cannot be read ({error!r}). Resume from an older step") from error
        if self._is_dynamic and was_dynamic and began_alike:
            assert self._settings is not None, "a dynamic scale has settings"
            self.value, self._good_steps, self._overflows_left = max(value, self._settings.minimum), good_steps, left
