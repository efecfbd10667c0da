"""Runs of two stages x two replicas whose end is compared with that of a run that nothing disturbed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.ranks import equal_files, log_rows, losses, train

from training import api
from training.membership.supervisor import Supervised


class NoPipe:
    """In place of a supervisor's."""

    def step(self, optimizer_step: int) -> None:
        pass


def supervised(attempt: int) -> Callable[[int], None]:
    def before(rank: int) -> None:
        lost_at = time.time() if attempt else None
        worker = Supervised(run_id="a test", attempt=attempt, lost_at=lost_at, began_at=time.time(), pipe=NoPipe())  # type: ignore[arg-type]
        api.Supervised = type("_", (), {"from_environment": staticmethod(lambda: worker)})  # type: ignore[assignment,misc]

    return before


def undisturbed(flags: dict[str, Any], tmp_path: Path) -> Path:
    own = ("pipeline_group_size", "data_group_size", "world_size", "dist_url", "rendezvous_timeout", "allow_replica_loss", "peer_timeout")
    plain = {name: value for name, value in flags.items() if name not in own}
    path = tmp_path / "undisturbed"
    train(tmp_path / "again", stages=flags["pipeline_group_size"], replicas=flags["data_group_size"], **{**plain, "checkpoint_path": path})
    return path


def check_bits(flags: dict[str, Any], tmp_path: Path) -> None:
    run, plain = tmp_path / "run", undisturbed(flags, tmp_path)
    expected = dict(zip(range(1, flags["total_steps"] + 1), losses(plain), strict=True))
    assert {row["step"]: row["loss"] for row in log_rows(run)} == expected
    assert all(row["loss"] == expected[row["step"]] for row in log_rows(run)), "what was played again, too"
    last = str(flags["total_steps"])
    assert equal_files(run / last, plain / last) == []


def num_rows(run: Path) -> int:
    """Of a run that goes on: its last line may not be whole yet."""
    log = run / "train_log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0
