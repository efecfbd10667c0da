"""The meeting place: one optimizer step after the other, from a formed job to the final checkpoint.

One step: tokens arrive -> the engine plays the schedule over all accumulation steps -> buckets are summed over replicas while the
last backward runs -> one reduction decides skip and clip alike on all ranks -> update -> log -> checkpoint when due. ``step``
counts accumulation steps wherever the user sees it; saves and the end fall on optimizer-step boundaries, at or after the step
that was asked for."""

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comms.spans import EVALUATING, KEEPING, SAVING, WAITING_FOR_CHECKPOINT, WAITING_FOR_DATA
from optim.decide import StepDecision, Wishes
from optim.loss_scale import LossScale
from training.checkpoints.manager import Keeping
from training.checkpoints.probe import check_probe, make_probe
from training.checkpoints.save_options import Best
from training.checkpoints.shared_folders import Folders
from training.compute.bad_batch import keep_bad_batch
from training.compute.build import assemble_stage, make_optimizer, step_companions
from training.compute.feed import StepFeed, TokenFeed
from training.compute.gradient import GlobalGradient
from training.compute.replicas import check_replicas_alike
from training.compute.skipping import SkippedSteps
from training.compute.step_row import step_row
from training.config.precision import precision_of
from training.config.train import Config
from training.config.trained import import_packages
from training.data.sources import sequences_per_step, start_reader
from training.evaluation.during_training import start_validation
from training.job.host_limits import Limits
from training.job.job import Job, MeetAgain
from training.job.report import Report
from training.job.stopping import StopRequest
from training.layout.plan import PipelinePlan
from training.membership.recovery import CommonGround, Standing
from training.memory.peak import PeakMemory
from training.start.agreement import ReadingDesk, Start
from training.start.weights import learning_rate_of, load_trained
from training.timeline.tracing import TidyProfiler, make_profiler
from user_error import UserError

log = logging.getLogger("trainer")

MEMORY_AFTER_UPDATES = 10  # by then a stage has needed all that it will
LAST_READ_S = 5.0  # for a reader whose data nobody reads any more
RANK_0_SAYS_S = 60.0  # why the job ends, which it does in any case


@dataclass(frozen=True, kw_only=True)
class _OpenStep:
    """The optimizer step that is being played. started: time.perf_counter()."""

    feed: StepFeed
    started: float
    learning_rate: float
    loss_scale: float


class Trainer:
    """One rank's share of the training, built from a formed job and an agreed start. It outlives the meeting it was built in: weights and
    optimizer stay, what talks to other ranks is made anew (go_on).

    replica_is_back: asked before every step, on rank 0; on_step: told of every optimizer step that is done."""

    replica_is_back: Callable[[], bool] = staticmethod(lambda: False)
    on_step: Callable[[int], None] = staticmethod(lambda optimizer_step: None)

    def __init__(self, job: Job, config: Config, start: Start, desk: ReadingDesk | None, plan: PipelinePlan, limits: Limits) -> None:
        """Collective over all ranks."""
        assert config.checkpoint_path is not None and config.total_steps is not None, "parse_config requires them"
        self._config, self._desk, self._plan, self._limits = config, desk, plan, limits
        self._root = Path(config.checkpoint_path)
        self._step, self._optimizer_step, self._position = start.step, start.optimizer_step, start.position
        self._num_updates_here = 0
        self._accumulate = config.gradient_accumulate_step
        self._num_updates = config.total_steps // self._accumulate
        precision = precision_of(config, job.device)
        import_packages(config)  # or their memory would count as the stage's
        self._peak_memory = PeakMemory(job.device)
        self._peak_memory.start()
        self._stage = assemble_stage(config, job.model_config, job.cut[job.place.pp], job.device, precision)
        self._optimizer = make_optimizer(config, self._stage, precision)
        self._loss_scale = LossScale(precision.loss_scale)
        load_trained(job, config, start, self._stage, self._optimizer, self._loss_scale)
        self._skipped = SkippedSteps(start.num_skipped, self._loss_scale, is_fp16=config.fp16, most_in_a_row=config.max_skipped_steps)
        check_replicas_alike(job, self._stage)
        self._learning_rate = learning_rate_of(config, self._num_updates)
        saved_best = start.point.trainer.get("best") if start.point is not None else None
        self._best = Best(**saved_best) if config.keep_best and saved_best and "data" in saved_best else None
        self._probe = start.probe
        self._data_position = desk.position if desk is not None else None  # on rank 0: behind the last step that was consumed
        self._data_before: dict[str, Any] | None = None  # and before it
        self._last_feed: StepFeed | None = None
        saved_step = start.step if start.point is not None and not start.is_rescue else None
        self._keeping = Keeping(config, self._stage, self._optimizer, saved_step)
        self._is_best = False
        self._standing = Standing.loaded(self._optimizer_step, job.meeting)
        self._open_step: _OpenStep | None = None
        self._profiler: TidyProfiler | None = None
        self._connect(job, start.folders, start.rescue)
        if config.profiling == "tidy_profiling":
            self._profiler = make_profiler(job, config, self._num_updates - self._optimizer_step)
        self._report = Report(
            place=job.place, folder=self._root, first_step=start.step, total_steps=config.total_steps, logging_steps=config.logging_steps
        )
        if config.train_log_backend == "wandb":
            self._report.start_wandb(config.project_name, self._root, dataclasses.asdict(config))

    def _connect(self, job: Job, folders: Folders, rescue: Folders | None) -> None:
        """Collective over all ranks: all that talks to other ranks, made for this meeting, from what does not."""
        config, desk = self._config, self._desk
        self._job = job
        job.spans.reads_data = job.place.rank == 0
        self._gradient = GlobalGradient(
            place=job.place,
            groups=job.groups,
            stage=self._stage,
            spans=job.spans,
            peer_names=job.peer_names,
            schedule=self._plan.schedule,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            seq_length=config.seq_length,
            clip_grad_norm=config.clip_grad_norm,
            dropout_seed=config.seed if config.dropout or (config.train == "lora" and config.lora_dropout) else None,
        )
        companions = None if desk is None else step_companions(config, job.model, job.model_config, desk.encoder.folder)
        self._keeping.connect(job, folders, rescue, companions)
        self._validation = start_validation(
            job, config, self._gradient, self._stage, desk.validation if desk is not None else None, self._root
        )
        self._reader = start_reader(config, desk.mixture, job.spans, shows_samples=job.number == 0) if desk is not None else None
        self._feed = TokenFeed(
            place=job.place,
            group=job.groups.tokens,
            reader=self._reader,
            shape=(self._accumulate * job.num_replicas, config.batch_size, config.seq_length),
            num_steps=self._num_updates - self._optimizer_step + (self._probe is not None),
            device=job.device,
        )

    @property
    def standing(self) -> Standing | None:
        """Where this rank stands, for the meeting after this one; None while --verify-resume has not ended, which then begins again."""
        return self._standing if self._probe is None else None

    def go_on(self, job: Job, ground: CommonGround, folders: Folders, rescue: Folders | None) -> None:
        """Collective over all ranks, in a new meeting: make up for the step that this rank alone may have missed, and connect anew.
        Weights and optimizer are what they were."""
        job = dataclasses.replace(job, cut=self._plan.cut)
        self._job = job
        if self._optimizer_step < ground.optimizer_step:
            assert ground.decision is not None and self._open_step is not None, "the others have decided the step that is open here"
            self._gradient.scale_as_decided(ground.decision, self._open_step.loss_scale)
            self._complete(ground.decision)
        self._disconnect(goes_on=True)
        self._open_step = None
        if self._desk is not None:
            self._desk.mixture.go_to(self._data_position)
        if self._profiler is not None:
            log.warning("the profile is given up: it cannot go on over a meeting")
            self._profiler = None
        self._standing = self._standing.on(ground, job.meeting)
        self._keeping.make_up(job)
        self._connect(job, folders, rescue)

    def run(self, stop_request: StopRequest) -> None:
        """Train to the end, save and report on the way."""
        with self._job.spans.span(WAITING_FOR_DATA):
            self._feed.start()
        if self._probe is not None:
            self._verify_resume(self._probe)
            self._probe = None
        stop_request.listen()
        if self._standing.settled != self._optimizer_step:
            self._settle(self._step - self._accumulate)
        while self._optimizer_step < self._num_updates:
            if self._profiler is not None:
                self._profiler.before_step()
            started = time.perf_counter()
            self._job.spans.enter_step(self._step + self._accumulate)
            feed = self._next_feed()
            if feed is None:
                self._stop_for_data()
            elif self._one_step(feed, started, stop_request).wishes.stop:
                break
        self._job.spans.enter_phase("ending")
        if self._profiler is not None:
            self._profiler.finish()
        if self._keeping.saved_step != self._step:
            self._save(is_last=True)
        with self._job.spans.span(WAITING_FOR_CHECKPOINT):
            self._keeping.finish()
        if self._optimizer_step < self._num_updates and self._job.place.rank == 0:
            asked = stop_request.name or self._limits.reason() or "a signal or a limit on another rank"
            log.info("stopped by %s at step %d, which is saved; the same command goes on from there", asked, self._step)

    def close(self) -> None:
        """Stop the reader and the links, end the progress line."""
        self._disconnect()
        self._keeping.give_up()
        self._report.close()

    def _disconnect(self, *, goes_on: bool = False) -> None:
        """goes_on: with the same data, which belongs to the reader until that has ended."""
        self._gradient.close()
        if self._validation is not None:
            self._validation.close()
        if self._reader is not None:
            self._reader.close(None if goes_on else LAST_READ_S)

    def _next_feed(self) -> StepFeed | None:
        with self._job.spans.span(WAITING_FOR_DATA):
            return self._feed.next()

    def _one_step(self, feed: StepFeed, started: float, stop_request: StopRequest) -> StepDecision:
        before = self._step
        self._open_step = step = _OpenStep(
            feed=feed,
            started=started,
            learning_rate=self._learning_rate.at(self._optimizer_step + 1),
            loss_scale=self._loss_scale.value,
        )
        decision = self._gradient.compute(
            feed.tokens,
            feed.num_targets,
            step=self._optimizer_step + 1,
            loss_scale=step.loss_scale,
            wishes=Wishes(
                stop=stop_request.name is not None or self._limits.reason() is not None,
                meet=self.replica_is_back() and self._keeping.has_room,
                snapshot=self._job.place.rank == 0 and self._keeping.wants_snapshot,
            ),
        )
        self._complete(decision)
        self._settle(before)
        if decision.wishes.snapshot:
            with self._job.spans.span(KEEPING):
                self._keeping.snapshot(self._step, self._position, self._trainer_state(None))
        if decision.wishes.meet and not decision.wishes.stop and self._optimizer_step < self._num_updates:
            self._part_for_a_replica()
        return decision

    def _complete(self, decision: StepDecision) -> None:
        """The update (or none) that was decided for the open step, and all that is counted and said of it."""
        step = self._open_step
        assert step is not None, "_one_step opened it"
        feed = step.feed
        with self._job.spans.span("update"):
            if not decision.skip:
                self._optimizer.step(step.learning_rate)
            self._gradient.forget()
        self._loss_scale.update(overflowed=decision.skip)
        self._optimizer_step += 1
        self._standing = self._standing.behind(self._optimizer_step, decision)
        self._open_step = None
        self._step += self._accumulate
        self._position += sequences_per_step(self._config)
        self._skipped.count(decision)
        self._data_before, self._data_position = self._data_position, feed.state
        self._last_feed = feed
        self._report.row(
            step_row(
                self._config,
                decision,
                feed,
                step=self._step,
                optimizer_step=self._optimizer_step,
                learning_rate=step.learning_rate,
                loss_scale=step.loss_scale,
                seconds=time.perf_counter() - step.started,
                save_stall_s=self._keeping.pop_stall_s(),
            )
        )
        self._num_updates_here += 1
        if self._num_updates_here == MEMORY_AFTER_UPDATES and self._job.place.dp == 0:
            self._say_memory()
        if decision.skip and self._job.place.rank == 0:
            self._skipped.say(self._step, decision, step.loss_scale)
        self.on_step(self._optimizer_step)

    def _settle(self, before: int) -> None:
        """All that comes behind a step, the one after step ``before``: evaluation, checkpoint, the end of a run that skips."""
        if not self._skipped.in_a_row:
            self._keeping.prepare()
        is_last = self._optimizer_step >= self._num_updates
        if self._validation and self._validation.is_due(before, self._step, is_last=is_last):
            if self._standing.evaluated != self._optimizer_step:  # else it ended before the ranks had to meet again
                self._is_best = self._evaluate()
            self._standing = dataclasses.replace(self._standing, evaluated=self._optimizer_step)
        else:
            self._is_best = False
        if (self._is_best or self._keeping.is_due(before, self._step)) and self._keeping.saved_step != self._step:
            self._save(is_last=is_last)
        if self._skipped.are_too_many:
            self._keeping.wait()
            self._job.wait_for_all()  # rank 0 may still be committing a checkpoint
            if self._job.place.rank > 0:
                self._job.lifeline.trouble(RANK_0_SAYS_S)  # rank 0 says why, and that ends this process
            raise self._skipped.error(self._step, self._keep_bad_batch())
        self._standing = dataclasses.replace(self._standing, settled=self._optimizer_step)

    def _keep_bad_batch(self) -> str:
        """On rank 0, where the step that ends the run was not finite: its batch, for inspection; a sentence that says where."""
        feed = self._last_feed
        if self._desk is None or feed is None or feed.whole is None:
            return ""
        return keep_bad_batch(self._root, self._step, feed.whole, self._desk.encoder.encoder.decode)

    def _part_for_a_replica(self) -> None:
        """Behind a step that all have done: what the returning ranks will begin with, and the others with them."""
        if self._keeping.saved_step != self._step:
            self._save()
        with self._job.spans.span(WAITING_FOR_CHECKPOINT):
            is_kept = self._keeping.wait_for_all(self._job, self._step)
        if is_kept:
            raise MeetAgain(f"a replica is back and is taken in behind step {self._step}")
        if self._job.place.rank == 0:
            log.warning("the replica that is back has to wait: what it would begin with could not be written")

    def _evaluate(self) -> bool:
        """Whether this step is the best so far, for --keep-best."""
        assert self._validation is not None, "only then it is due"
        with self._job.spans.part(EVALUATING):
            found = self._validation.run(self._step)
        self._report.evaluation(found.row(self._step), self._optimizer_step)
        was_found = self._best is not None and self._best.step == self._step  # before the ranks lost each other; others may have to, yet
        if not (self._config.keep_best and (was_found or found.is_better_than(self._best))):
            return False
        self._best = found.as_best(self._step)
        return True

    def _say_memory(self) -> None:
        from training.memory.prediction import describe, predict_stage  # what it needs of torch takes a second to import

        job = self._job
        measured = self._peak_memory.bytes()
        predicted = predict_stage(self._config, job.model_config, job.cut, job.place.pp, self._plan.in_flight[job.place.pp], job.device)
        kept = "" if job.device.type == "cuda" else "; a CPU's allocator keeps what was freed"
        log.info("%s%s", describe(predicted, measured), kept)

    def _save(self, *, is_last: bool = False) -> None:
        probe = self._compute_probe(self._last_feed) if self._config.verify_resume else None
        with self._job.spans.span(SAVING):
            self._keeping.save(self._step, self._position, self._trainer_state(probe), is_last=is_last, best=self._best)

    def _trainer_state(self, probe: dict[str, Any] | None) -> dict[str, Any] | None:
        """On rank 0: what trainer.json says beside what the saver adds."""
        if self._desk is None:
            return None
        return {
            "optimizer_step": self._optimizer_step,
            "num_skipped": self._skipped.num,
            "run_token": self._desk.run_token,
            "base_model": self._desk.base_model,
            "loss_scale": self._loss_scale.state(),
            "data": self._data_position,
            "data_identity": self._desk.identity,
            "sequences_per_step": sequences_per_step(self._config),
            "learning_rate": dataclasses.asdict(self._learning_rate),
            "flags": dataclasses.asdict(self._config),
            "probe": probe,
            "best": None if self._best is None else dataclasses.asdict(self._best),
        }

    def _compute_probe(self, feed: StepFeed | None) -> dict[str, Any] | None:
        """For --verify-resume: loss and gradient norm of the batch with the weights as they are; nothing is updated."""
        if feed is None:
            return None
        with self._job.spans.part("computing what a resume must find again"):
            decision = self._gradient.compute(feed.tokens, feed.num_targets, step=self._optimizer_step, loss_scale=self._loss_scale.value)
            self._gradient.forget()
        return make_probe(self._job, self._config, decision, feed.sha256, self._data_before)

    def _verify_resume(self, probe: dict[str, Any]) -> None:
        """For --verify-resume: read the batch of the probe again and compare. Raises UserError on rank 0, and so on all, if it differs."""
        feed = self._next_feed()
        if feed is None:
            self._stop_for_data()
            return
        self._data_before, self._data_position = self._data_position, feed.state
        found = self._compute_probe(feed)
        if self._job.place.rank == 0 and found is not None:
            check_probe(probe, found)
        self._job.wait_for_all()

    def _stop_for_data(self) -> None:
        """The data cannot go on: keep what was learnt, then stop on all ranks with rank 0's reason."""
        if self._profiler is not None:
            self._profiler.finish()
        if self._step > 0 and self._keeping.saved_step != self._step:
            self._save(is_last=True)
        self._keeping.finish()
        reason = self._feed.error
        if reason is None:
            self._job.lifeline.trouble(RANK_0_SAYS_S)  # rank 0 says why, and that ends this process
            reason = UserError("rank 0 ended the data; see its output")
        kept = f". Everything up to step {self._step} is saved" if self._step > 0 else ""
        raise UserError(f"{str(reason).rstrip('.')}{kept}")
