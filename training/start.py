"""What must be settled before any weight is loaded: rank 0 looks at folder, tokenizer, data and earlier checkpoints, and tells
everybody the outcome.

Promises: when agree() returns, all ranks know the same starting point; a UserError of rank 0 has reached the others through the
hub instead."""

import json
import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoint.job_lock import JobLock
from checkpoint.layer_store import remove_partials
from checkpoint.tensor_file import explained_disk_errors
from tasks.mixture import Mixture
from training.config import Config
from training.data import TextEncoder, data_identity, load_text_encoder, open_mixture
from training.job import COLLECTIVE_TIMEOUT, Job
from training.saving import ResumePoint, check_same_data, check_sees_lock, find_resume_point
from user_error import UserError

log = logging.getLogger("trainer")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Equal on all ranks. resume_folder: name of the step folder inside --checkpoint-path, None for a fresh run; counters as of that
    step.
    """

    lock_token: str
    resume_folder: str | None
    step: int
    optimizer_step: int
    num_skipped: int
    is_finished: bool


@dataclass(frozen=True, kw_only=True)
class ReadingDesk:
    """What only rank 0 has: the tokenizer, the opened data at its position, and what a later resume must find unchanged."""

    encoder: TextEncoder
    mixture: Mixture
    identity: dict[str, Any]


def agree(job: Job, config: Config, cleanup: ExitStack) -> tuple[Start, ReadingDesk | None]:
    """Called by all ranks once the job has formed; rank 0 decides. Lock and data files are released by ``cleanup``."""
    assert config.checkpoint_path is not None, "parse_config requires it"
    root = Path(config.checkpoint_path)
    desk = None
    if job.place.rank == 0:
        start, desk = _settle(job, config, root, cleanup)
        job.store.set("start", json.dumps(asdict(start)))
    else:
        job.store.wait(["start"], COLLECTIVE_TIMEOUT)
        start = Start(**json.loads(job.store.get("start")))
    check_sees_lock(root, start.lock_token)
    job.wait_for_all()  # rank 0 of a finished run would otherwise give the lock back before the others have looked
    return start, desk


def _settle(job: Job, config: Config, root: Path, cleanup: ExitStack) -> tuple[Start, ReadingDesk | None]:
    with explained_disk_errors(root):
        holds_a_model = (root / "config.json").exists()
    if holds_a_model:
        raise UserError(
            f"--checkpoint-path must be a folder of this job's own, and {root} holds a model (config.json). Give another folder"
        )
    lock = cleanup.enter_context(JobLock(root))
    for name in remove_partials(root):
        log.info("removed %s, the rest of a save that was cut off", root / name)
    point = find_resume_point(root, job.model_config)
    assert config.total_steps is not None, "parse_config requires it"
    is_finished = point is not None and point.step >= config.total_steps
    start = Start(
        lock_token=lock.token,
        resume_folder=point.folder.name if point else None,
        step=point.step if point else 0,
        optimizer_step=point.trainer["optimizer_step"] if point else 0,
        num_skipped=point.trainer["num_skipped"] if point else 0,
        is_finished=is_finished,
    )
    if is_finished:
        return start, None
    if point is not None:
        log.info("resuming from %s", point.folder)
    encoder = load_text_encoder(config, job.model.path, job.model_config.vocab_size)
    identity = data_identity(config, encoder)
    mixture = open_mixture(config, encoder, _data_position(config, point, identity))
    cleanup.callback(mixture.close)
    if point is not None and point.trainer["num_threads"] != job.num_threads:
        log.warning(
            "%s was computed with %d threads per rank, this run has %d: the last bits of the losses may change",
            point.folder,
            point.trainer["num_threads"],
            job.num_threads,
        )
    return start, ReadingDesk(encoder=encoder, mixture=mixture, identity=identity)


def _data_position(config: Config, point: ResumePoint | None, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Where in the data to go on; None: at its beginning."""
    if point is None:
        return None
    saved_accumulation = point.trainer["data_identity"]["--gradient-accumulate-step"]
    if saved_accumulation != config.gradient_accumulate_step:
        raise UserError(
            f"--gradient-accumulate-step must stay what it was, because steps are counted in it; {point.folder} was saved with "
            f"{saved_accumulation}, now it is {config.gradient_accumulate_step}. Set it back, or use another --checkpoint-path"
        )
    if config.allow_data_change and point.trainer["data_identity"] != identity:
        log.warning("the data changed since %s and starts over (--allow-data-change)", point.folder)
        return None
    if not config.allow_data_change:
        check_same_data(point, identity)
    position: dict[str, Any] = point.trainer["data"]
    return position
