"""What a save keeps, and for how long: the flags of checkpoints, and which step is the best one."""

from dataclasses import dataclass

from comms.spans import KEEPING, SAVING, WAITING_FOR_CHECKPOINT


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """The flags --async-checkpoint, --checkpoint-optimizer and --keep-checkpoints (0: all)."""

    is_async: bool
    with_optimizer: bool
    keep: int
    is_snapshot: bool = False  # of those nobody needs to hear

    @property
    def kind(self) -> str:
        """For messages."""
        return "snapshot" if self.is_snapshot else "checkpoint"

    @property
    def waits(self) -> tuple[str, ...]:
        """The spans in which a rank waits for what is being written."""
        return (KEEPING,) if self.is_snapshot else (SAVING, WAITING_FOR_CHECKPOINT)


@dataclass(frozen=True, kw_only=True)
class Best:
    """What --keep-best spares: the step whose evaluation was the best so far, by which number, and that number."""

    step: int
    metric: str
    value: float
    loss: float  # decides between equal accuracies
    data: str  # hex digits of what was evaluated: numbers of other data cannot be compared
