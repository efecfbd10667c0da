"""What a run keeps of itself: checkpoints in its folder, and between them snapshots in the memory of its hosts.

A snapshot (--rescue-interval) is a checkpoint like any other, in a folder of the host's memory filesystem: written by the same hands, found
and collected by the same eyes, gone when the host is. All replicas of a stage hold the same bits, so each host that has one keeps its
snapshot without a byte on the network: with the replicas of a stage on two hosts it outlives one of them, with one replica the process
alone."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.stage import Stage
from optim.build import AdamW
from training.checkpoints.ram_snapshots import rescue_folder
from training.checkpoints.save_options import Best, SaveOptions
from training.checkpoints.saver import Saver
from training.checkpoints.shared_folders import Folders
from training.compute.build import step_weights
from training.config.train import Config
from training.job.job import Job, all_say

RETRY_S = 60.0  # where a save that others wait for came to nothing


class Keeping:
    """One rank's part in it. Called by all ranks alike. saved_step: the step of the newest checkpoint that was begun, None for none."""

    def __init__(self, config: Config, stage: Stage, optimizer: AdamW, saved_step: int | None) -> None:
        assert config.checkpoint_path is not None, "parse_config requires it"
        self._config, self._stage, self._optimizer = config, stage, optimizer
        self._root = Path(config.checkpoint_path)
        self.saved_step = saved_step
        self._owes_save = False  # one was cut off
        self._stall_s = 0.0  # of the training, since anybody asked
        self._kept_at = time.monotonic()
        self._failed_at = -RETRY_S

    def connect(self, job: Job, folders: Folders, rescue: Folders | None, companions: dict[str, bytes] | None) -> None:
        """Collective over all ranks, at the start of a meeting. rescue: who sees whose host memory, None without --rescue-interval.
        companions: on rank 0, the files beside the weights of a step, by name."""
        config = self._config
        self._rescue: Saver | None = None

        def saver(name: str, root: Path, found: Folders, keep: int) -> Saver:
            options = SaveOptions(
                is_async=config.async_checkpoint, with_optimizer=config.checkpoint_optimizer, keep=keep, is_snapshot=name == "rescue"
            )
            weights = step_weights(config, job.model, job.model_config)
            return Saver(job, found, root, self._stage, self._optimizer, options, weights=weights, companions=companions, name=name)

        self._checkpoints = saver("save", self._root, folders, config.keep_checkpoints)
        if rescue is not None:
            self._rescue = saver("rescue", rescue_folder(self._root), rescue, 1)

    def give_up(self) -> bool:
        """In place of wait(), where the ranks have lost each other: whether a checkpoint was cut off by that."""
        if self._rescue is not None:
            self._rescue.give_up()
        return self._checkpoints.give_up()

    def make_up(self, job: Job) -> None:
        """Collective over all ranks, when they have met again: a checkpoint that was cut off is written behind the next step instead."""
        was_cut_off = self.give_up()
        said = all_say(job, job.store, "saves cut off", [was_cut_off or self._owes_save, self.saved_step])
        self._owes_save = any(owes for owes, _ in said)
        if self._owes_save:
            self.saved_step = None
        else:
            self.saved_step = said[0][1]  # rank 0 has waited for every host's part; others may not have come to that save

    def prepare(self) -> None:
        """After an update: see Saver.prepare()."""
        if self._config.checkpoint_steps:
            self._checkpoints.prepare()
        if self._rescue is not None:
            self._rescue.prepare()

    def is_due(self, before: int, step: int) -> bool:
        """Whether to save behind ``step``, the one after ``before``."""
        every = self._config.checkpoint_steps
        return self._owes_save or (every > 0 and step // every > before // every)

    def save(self, step: int, position: int, trainer: Mapping[str, Any] | None, *, is_last: bool, best: Best | None) -> None:
        """A checkpoint: see Saver.save()."""
        self._stall_s += self._checkpoints.save(step, position, trainer, is_last=is_last, best=best)
        self.saved_step, self._owes_save, self._kept_at = step, False, time.monotonic()

    @property
    def wants_snapshot(self) -> bool:
        """Whether --rescue-interval is over since anything was kept. Rank 0's clock decides for all, in the next step's reduction."""
        return self._rescue is not None and time.monotonic() - self._kept_at >= self._config.rescue_interval

    def snapshot(self, step: int, position: int, trainer: Mapping[str, Any] | None) -> None:
        """Into the hosts' memory, if that step is not kept already."""
        if self._rescue is not None and self.saved_step != step:
            self._stall_s += self._rescue.save(step, position, trainer)
            self._kept_at = time.monotonic()

    def pop_stall_s(self) -> float:
        """Seconds that the training stood still for saves since the last call."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    def wait(self) -> None:
        """Until nothing is being saved: see Saver.wait()."""
        self._checkpoints.wait()
        if self._rescue is not None:
            self._rescue.wait()

    def wait_for_all(self, job: Job, step: int) -> bool:
        """Collective over all ranks, behind ``step``, of which a save was begun: until that has ended; whether the checkpoint exists."""
        exists = all(all_say(job, job.store, f"kept/{step}", self._checkpoints.wait()))
        if not exists:
            self._failed_at = time.monotonic()
        return exists

    @property
    def has_room(self) -> bool:
        """Whether no save has lately come to nothing in wait_for_all()."""
        return time.monotonic() - self._failed_at >= RETRY_S

    def finish(self) -> None:
        """wait(), after the last checkpoint, which outdates the snapshots. Raises StepNotSaved if that one came to nothing."""
        self._checkpoints.finish()
        if self._rescue is not None:
            self._rescue.give_up()
            if self._rescue.keeps:
                shutil.rmtree(rescue_folder(self._root), ignore_errors=True)
