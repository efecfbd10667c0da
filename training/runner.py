"""A training over all meetings of its ranks: what is kept when they part and meet again, and where they go on.

::

    meet -> build from a checkpoint -> train -----------------------------------------> part
      ^            ^                     |
      |            |                     a connection broke, a replica was lost or is back, a rank was started anew
      |            |                     |
      |            +-- somebody has no state: all go back to the newest checkpoint, every process stays warm
      +------------+-- all have: they go on with what they hold, from the last optimizer step
"""

import contextlib
import dataclasses
import gc
import logging
import time
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from comms.links import PeerLost
from comms.place import place_of
from training.checkpoints.ram_snapshots import find_rescue_folders
from training.checkpoints.shared_folders import Folders, find_folders
from training.config.train import Config
from training.data.epochs import with_total_steps
from training.job.host_limits import Limits
from training.job.job import Job, MeetAgain, all_say
from training.job.report import set_up_logging
from training.job.stopping import StopRequest
from training.layout.plan import agree_on_plan
from training.layout.summary import describe_run
from training.loop import Trainer
from training.membership.meeting import Meetings, Return
from training.membership.recovery import Standing, common_ground
from training.membership.supervisor import Supervised
from training.memory.fitting import check_training_fits
from training.start.agreement import agree, claim_folder
from training.timeline.tracing import check_trace_path
from user_error import UserError

log = logging.getLogger("trainer")

MOST_REPLAYS = 8  # meetings in a row from which no optimizer step comes
LONGEST_PAUSE_S = 16.0  # before such a meeting: 0, 1, 2, 4 ...
SOUND = (MeetAgain, PeerLost, dist.DistError)  # after any other error what this rank holds may be half of an update


class Rounds:
    """One rank's training. run() is its whole life."""

    def __init__(self, config: Config, supervised: Supervised | None, stop_request: StopRequest) -> None:
        self._config, self._supervised = config, supervised
        returns = Return(comes_back=supervised is not None, attempt=supervised.attempt if supervised is not None else 0)
        self._meetings = Meetings(config, goes_on=True, returns=returns, is_asked_to_stop=lambda: stop_request.name is not None)
        self._stop_request = stop_request
        self._meetings.holds_state = lambda: self._trainer is not None and self._trainer.standing is not None
        self._trainer: Trainer | None = None
        self._folders: Folders | None = None
        self._folders_of: tuple[int, ...] = ()  # the members of the meeting in which they were found
        self._rescue: Folders | None = None
        self._held = ExitStack()  # what belongs to the trainer: locks, data files
        self._lost_at = supervised.lost_at if supervised is not None else None  # as time.time()
        began_at = supervised.began_at if supervised is not None else None
        self._limits = Limits(max_seconds=config.max_seconds, min_free_memory=config.min_free_memory, began_at=began_at)
        self._run_token: str | None = None  # on rank 0: what marks the steps of this run
        self._num_replays = 0

    def run(self) -> None:
        """Train to the end. Raises UserError, PeerLost."""
        with contextlib.closing(self), contextlib.closing(self._meetings):
            while True:
                self._meetings.num_fruitless = self._num_replays
                try:
                    with self._meetings.meet() as job:
                        self._one_meeting(job)
                    return
                except MeetAgain as again:
                    self._lost_at = self._lost_at or time.time()
                    if not isinstance(again.__cause__, SOUND):
                        self.close()
                    self._check_progress(again)

    def close(self) -> None:
        """Let go of the trainer and of what belongs to it."""
        self._trainer, trainer = None, self._trainer
        if trainer is not None:
            trainer.close()
        self._held.close()
        self._held = ExitStack()

    def _one_meeting(self, job: Job) -> None:
        config, place = self._config, job.place
        assert config.rank is not None and config.data_group_size is not None, "complete() filled these in"
        set_up_logging(str(place_of(config.rank, dp_size=config.data_group_size, pp_size=config.num_stages)))
        job.spans.enter_phase("preparing data and checkpoints")
        own = None if self._trainer is None else self._trainer.standing
        said = all_say(job, job.store, "standing", [None if own is None else own.as_json(), self._folders_of])
        standings = [None if one is None else Standing.from_json(one) for one, _ in said]
        ground = common_ground(standings)
        if ground is not None and self._trainer is not None and self._folders is not None:
            if any(tuple(members) != job.members for _, members in said):
                self._folders, self._rescue = find_folders(job, self._root), find_rescue_folders(job, config)
                self._folders_of = job.members
            self._trainer.go_on(job, ground, self._folders, self._rescue)
            if place.rank == 0:
                missing = "" if job.is_whole else f" with {place.dp_size} of {job.num_replicas} replicas"
                log.info("all ranks have met again%s and go on behind optimizer step %d", missing, ground.optimizer_step)
        elif not self._build(job):
            return
        assert self._trainer is not None, "built or kept"
        self._trainer.replica_is_back = self._meetings.replica_is_back
        self._trainer.on_step = self._on_step
        self._trainer.run(self._stop_request)

    @property
    def _root(self) -> Path:
        assert self._config.checkpoint_path is not None, "parse_config requires it"
        return Path(self._config.checkpoint_path)

    def _build(self, job: Job) -> bool:
        """From the newest checkpoint, or the beginning. False if there is nothing to do."""
        self.close()
        is_first = self._folders is None
        if not is_first:
            gc.collect()  # the old trainer's weights and moments hang in cycles; the new one would need the memory beside them
        config = self._config
        if config.profiling == "tidy_profiling" and job.place.rank == 0:
            check_trace_path(config.trace_file)
        check_training_fits(job, config, is_first=is_first)
        config = with_total_steps(job, config)
        start, desk = agree(job, config, self._held, run_token=self._run_token)
        self._run_token = desk.run_token if desk is not None else None
        if start.is_finished:
            if job.place.rank == 0:
                log.info("nothing to do: %s is at step %d and --total-steps is %d", config.checkpoint_path, start.step, config.total_steps)
            return False
        job.spans.enter_phase("measuring layers and links")
        plan = agree_on_plan(job, config)
        job = dataclasses.replace(job, cut=plan.cut)
        claim_folder(job, config, self._root, start, desk)
        job.spans.enter_phase("loading weights")
        self._folders, self._rescue, self._folders_of = start.folders, start.rescue, job.members
        self._trainer = Trainer(job, config, start, desk, plan, self._limits)
        if job.place.rank == 0:
            log.info("%s", describe_run(config, job, start.step, plan, in_full=is_first))
        return True

    def _on_step(self, optimizer_step: int) -> None:
        self._num_replays = 0
        if self._lost_at is not None:
            if self._config.rank == 0:
                log.info("optimizer step %d is done, %.1f s after the job was interrupted", optimizer_step, time.time() - self._lost_at)
            self._lost_at = None
        if self._supervised is not None:
            self._supervised.pipe.step(optimizer_step)

    def _check_progress(self, again: MeetAgain) -> None:
        """Raises UserError where meeting after meeting brings no step."""
        self._num_replays += 1
        if self._num_replays > MOST_REPLAYS:
            error = UserError(
                f"the ranks have met {self._num_replays} times and did not get through a single optimizer step in between; last: {again}. "
                "See what stands between their hosts, and start the job again: it resumes from its newest checkpoint"
            )
            error.restart_helps = True
            raise error from again
        give_up = time.monotonic() + min(LONGEST_PAUSE_S, 2.0 ** (self._num_replays - 2)) if self._num_replays > 1 else 0.0
        while time.monotonic() < give_up and self._stop_request.name is None:
            time.sleep(0.1)
