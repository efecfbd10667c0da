"""Where a rank stands when its meeting has broken off, and where all of them go on from. Pure.

A step is decided by one all-reduce. If any rank has its result, all ranks have given theirs to it, so all have the whole gradient of that
step. A rank that did not get the result therefore needs no gradient again: it takes the decision from one that has it, updates, and stands
where the others stand, to the bit. If nobody has the result, everybody plays the step again, from weights that nobody has changed.

All that holds of the ranks of one meeting. A replica that was gone without has had no part in what the others decided meanwhile."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from optim.decide import StepDecision, Wishes


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Of one rank. optimizer_step: the last one whose update it has done; decision: of that step, None before the first one here;
    settled: the last step behind which all is done that comes behind a step (evaluation, checkpoint); evaluated: the last step behind
    which an evaluation has ended. decided_in: the meeting in which that last step was decided, or the state was loaded; meeting: the last
    one that this rank was in."""

    optimizer_step: int
    decision: StepDecision | None
    settled: int
    evaluated: int = -1
    decided_in: str
    meeting: str

    def as_json(self) -> dict[str, Any]:
        """For all_say()."""
        return {**self.__dict__, "decision": None if self.decision is None else asdict(self.decision)}

    @classmethod
    def loaded(cls, optimizer_step: int, meeting: str) -> "Standing":
        """With all others, from a checkpoint or the beginning."""
        return cls(optimizer_step=optimizer_step, decision=None, settled=optimizer_step, decided_in=meeting, meeting=meeting)

    def behind(self, optimizer_step: int, decision: StepDecision) -> "Standing":
        """After that update, in the meeting where it was decided."""
        return replace(self, optimizer_step=optimizer_step, decision=decision, decided_in=self.meeting)

    def on(self, ground: "CommonGround", meeting: str) -> "Standing":
        """With all others, in a new meeting."""
        return replace(self, settled=ground.settled, evaluated=ground.evaluated, decided_in=ground.decided_in, meeting=meeting)

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> "Standing":
        """What another rank's as_json() gave."""
        decision = said["decision"]
        if decision is not None:
            decision = StepDecision(**{**decision, "wishes": Wishes(**decision["wishes"]), "sums": tuple(decision["sums"])})
        return cls(**{**said, "decision": decision})


@dataclass(frozen=True, kw_only=True)
class CommonGround:
    """Equal on all ranks. optimizer_step: where all stand once those one step behind have made up for it with ``decision``; settled,
    evaluated: as in Standing, of all. decided_in: as in Standing, of that step."""

    optimizer_step: int
    decision: StepDecision | None
    settled: int
    evaluated: int
    decided_in: str


def common_ground(standings: Sequence[Standing | None]) -> CommonGround | None:
    """Where the ranks go on from with what they hold in memory; None where one of them holds nothing, or they are too far apart, so that
    all must go back to a checkpoint."""
    known = [standing for standing in standings if standing is not None]
    if len(known) < len(standings):
        return None
    first = max(known, key=lambda standing: standing.optimizer_step)
    behind = [standing for standing in known if standing.optimizer_step < first.optimizer_step]
    if any(standing.optimizer_step < first.optimizer_step - 1 for standing in behind) or (behind and first.decision is None):
        return None
    if any((standing.meeting if standing in behind else standing.decided_in) != first.decided_in for standing in known):
        return None
    return CommonGround(
        optimizer_step=first.optimizer_step,
        decision=first.decision,
        settled=-1 if behind else min(standing.settled for standing in known),
        evaluated=min(standing.evaluated for standing in known),
        decided_in=first.decided_in,
    )
