"""What must be settled before any weight is loaded: who sees which checkpoint folder, where the run goes on, and on rank 0 tokenizer
and data.

Promises: when agree() returns, all ranks know the same starting point and every folder is locked by this job; a UserError of one rank has
reached the others through the hub instead. After claim_folder(), what is newer than the starting point has been renamed, so that no later
resume takes it for this run's."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.job_lock import JobLock
from checkpoint.layer_store import StepWriter, prepared_steps, remove_partials, set_aside
from checkpoint.manifest import MANIFEST, step_positions
from checkpoint.model_folder import read_json_object
from checkpoint.tensor_file import explained_disk_errors
from tasks.mixture import Mixture
from training.checkpoints.discovery import ResumePoint, check_same_model, find_resume_point, newest_in_sight
from training.checkpoints.ram_snapshots import find_rescue, find_rescue_folders, forget_snapshots
from training.checkpoints.shared_folders import Folders, find_folders, remove_tokens
from training.compute.build import base_fingerprint, check_same_training
from training.config.flags import flag_name
from training.config.train import Config
from training.data.sources import OLDER_IDENTITY, TextEncoder, data_identity, load_text_encoder, open_mixture, sequences_per_step
from training.evaluation.during_training import ValidationData, open_validation
from training.job.job import Job, all_say
from training.membership.supervisor import Supervised
from user_error import UserError

log = logging.getLogger("trainer")

RUN_FILE = ".run.json"  # in the folder that rank 0 sees: which run has begun here
STEP_NUMBER = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Equal on all ranks. point: where the run goes on, None for a fresh run; the counters as of there, ``step`` in this run's
    accumulation steps, ``position`` in sequences."""

    folders: Folders
    point: ResumePoint | None
    rescue: Folders | None = None  # who sees whose host memory, with --rescue-interval
    is_rescue: bool = False  # whether ``point`` is a snapshot there
    step: int = 0
    optimizer_step: int = 0
    num_skipped: int = 0
    position: int = 0
    is_finished: bool = False
    newer: tuple[str, ...] = ()  # the steps in --checkpoint-path that this run will not have come from
    probe: dict[str, Any] | None = None  # what --verify-resume expects of the first batch that is read, which is then not trained on


@dataclass(frozen=True, kw_only=True)
class ReadingDesk:
    """What only rank 0 has: the tokenizer, the data opened at its position, what a later resume must find unchanged (base_model: where
    adapters are trained), and what marks the steps of this run."""

    encoder: TextEncoder
    mixture: Mixture
    position: dict[str, Any]
    identity: dict[str, Any]
    probe: dict[str, Any] | None
    run_token: str
    base_model: str | None
    validation: ValidationData | None


def agree(job: Job, config: Config, cleanup: ExitStack, *, run_token: str | None = None) -> tuple[Start, ReadingDesk | None]:
    """Called by all ranks once the job has formed. Locks and data files are released by ``cleanup``. run_token: on rank 0, where this
    process has begun the run already, and all go back to its newest checkpoint."""
    assert config.checkpoint_path is not None, "parse_config requires it"
    root = Path(config.checkpoint_path)
    with explained_disk_errors(root):
        holds_a_model = (root / "config.json").exists()
    if holds_a_model:
        raise UserError(
            f"--checkpoint-path must be a folder of this job's own, and {root} holds a model (config.json). Give another folder"
        )
    folders = find_folders(job, root)
    if job.place.rank in folders.keepers:
        cleanup.enter_context(JobLock(root))
    if job.place.rank == 0 and len(folders.groups) > 1:
        hosts = [f"rank{'s' * (len(group) > 1)} {', '.join(map(str, group))} on {job.roster[group[0]]['host']}" for group in folders.groups]
        log.info("--checkpoint-path is %d folders: of %s; each keeps the layers of its own ranks", len(hosts), "; of ".join(hosts))
    in_sight = _complete_commits(job, folders, root)
    rescue = find_rescue_folders(job, config)
    token, is_restart = all_say(
        job, dist.PrefixStore("start", job.store), "run", _run_token(root, run_token) if job.place.rank == 0 else None
    )[0]
    point = _find_point(job, config, root, token, is_restart)
    snapshot = None
    if rescue is not None and (is_restart or config.resume == "auto"):
        last = (token if is_restart else _last_token(root)) if job.place.rank == 0 else None
        snapshot = find_rescue(job, config, point, last)
        point = snapshot or point
    start = dataclasses.replace(_counters(config, folders, point), rescue=rescue, is_rescue=snapshot is not None)
    if point is not None:
        check_same_model(point, job.model_config)
        check_same_training(config, job.model_config, point.trainer["flags"], point.folder, has_optimizer=point.has_optimizer)
    base = None if start.is_finished else _agree_on_base(job, config, point)
    desk = _open_desk(job, config, start, token, base, cleanup) if job.place.rank == 0 and not start.is_finished else None
    newer = [] if start.is_rescue else _newer(in_sight, root, point)  # a snapshot is newer than all of them, and came of them
    probe = all_say(job, dist.PrefixStore("start", job.store), "probe", desk.probe if desk is not None else None)[0]
    return dataclasses.replace(start, probe=probe, newer=tuple(newer)), desk


def claim_folder(job: Job, config: Config, root: Path, start: Start, desk: ReadingDesk | None) -> None:
    """Called by all ranks when nothing can be refused any more: what is newer than the start gets another name, and the run its mark."""
    if job.place.rank in start.folders.keepers:
        for name in start.newer:
            if (root / name).is_dir():
                log.warning("%s is newer than the start of this run and is kept as %s", root / name, set_aside(root / name))
    if desk is not None:
        _note_run(root, desk.run_token)
    if start.rescue is not None:
        forget_snapshots(job, config, start.rescue, start.point)
    job.wait_for_all()


def _complete_commits(job: Job, folders: Folders, root: Path) -> list[dict[str, int | None]]:
    """Called by all ranks: clear away what a killed job left, and return the steps in every rank's sight.

    A step that one host has committed was ready on all of them: where the job was killed before the rename, it is done now.
    """
    store = dist.PrefixStore("start", job.store)
    is_keeper = job.place.rank in folders.keepers
    before = all_say(job, store, "before", step_positions(root))
    if is_keeper:
        # a position says which of two steps of one number it is
        committed = {step for steps in before for step in steps.items()} - set(before[job.place.rank].items())
        for name, position in prepared_steps(root):
            if position is not None and (name, position) in committed:
                log.info("completing %s, which was cut off after other hosts had theirs", StepWriter(root, int(name)).commit())
        for name in remove_partials(root):
            log.info("removed %s, the rest of a save that was cut off", root / name)
        remove_tokens(root)
    all_say(job, store, "tidy", True)
    return all_say(job, store, "after", step_positions(root))


def _run_token(root: Path, known_here: str | None) -> tuple[str, bool]:
    """On rank 0: what marks the steps of this run, and whether it goes on with a run that had begun in ``root``: in this process, or in one
    that torchrun or the supervisor has restarted."""
    if known_here is not None:
        return known_here, True
    path, launcher, supervised = root / RUN_FILE, _launcher(), Supervised.from_environment()
    is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    is_counted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0  # not where another node's agent went away or came
    if (is_torchrun or (supervised is not None and supervised.attempt > 0)) and path.is_file():
        try:
            known = read_json_object(path)
        except UserError:  # cut off while it was written
            known = {}
        same_id = is_counted and launcher["run_id"] not in (None, "none") and known.get("run_id") == launcher["run_id"]
        same_agent = is_torchrun and known.get("agent") == launcher["agent"]
        same_supervisor = supervised is not None and known.get("supervisor") == supervised.run_id
        if "token" in known and (same_id or same_agent or same_supervisor):
            return str(known["token"]), True
    return secrets.token_hex(8), False


def _last_token(root: Path) -> str | None:
    """On rank 0: of the run that began last in ``root``."""
    with contextlib.suppress(UserError):
        token = read_json_object(root / RUN_FILE).get("token") if (root / RUN_FILE).is_file() else None
        return token if isinstance(token, str) else None
    return None


def _note_run(root: Path, token: str) -> None:
    """On rank 0, when nothing is refused any more: what _run_token of a restart looks for."""
    with contextlib.suppress(OSError):  # a full disk can still be resumed from
        (root / RUN_FILE).write_text(json.dumps({"token": token, **_launcher()}))


def _launcher() -> dict[str, Any]:
    supervised = Supervised.from_environment()
    supervisor = supervised.run_id if supervised is not None else None
    return {"run_id": os.environ.get("TORCHELASTIC_RUN_ID"), "agent": os.getppid(), "supervisor": supervisor}


def _find_point(job: Job, config: Config, root: Path, token: str, is_restart: bool) -> ResumePoint | None:
    """Called by all ranks: what --resume asks for; where torchrun or the supervisor has restarted this very run, its own newest step, if it
    has saved one."""
    store, hashes = dist.PrefixStore("start", job.store), config.verify_checkpoint
    mode: str = all_say(job, store, "mode", config.resume)[0]
    if is_restart and mode != "auto":
        point = find_resume_point(job, root, only=None, hashes=hashes, is_required=False)
        if point is not None and point.trainer.get("run_token") == token:
            if job.place.rank == 0:
                log.info("restarted: going on from the newest checkpoint of this run, not with --resume %s", mode)
            return point
    if mode == "none":
        return None
    if mode == "auto":
        return find_resume_point(job, root, only=None, hashes=hashes)
    if STEP_NUMBER.fullmatch(mode):
        return find_resume_point(job, root, only=str(int(mode)), hashes=hashes)
    is_path = config.resume not in ("auto", "none") and not STEP_NUMBER.fullmatch(config.resume)
    return _find_point_at(job, Path(config.resume if is_path else mode), hashes)  # each rank may have its own spelling of a path


def _find_point_at(job: Job, path: Path, hashes: bool) -> ResumePoint:
    store = dist.PrefixStore("start", job.store)
    if str(path).startswith("~"):
        path = Path(os.path.expanduser(path))
    path = path.absolute()
    is_step = any(all_say(job, store, "is a step", (path / MANIFEST).is_file()))
    names = set(all_say(job, store, "resume from", path.name))
    if is_step and len(names) > 1:
        raise UserError(f"--resume must name the same step on all ranks; it is {' and '.join(sorted(names))}. Give copies the same name")
    point = find_resume_point(job, path.parent if is_step else path, only=path.name if is_step else None, hashes=hashes)
    if point is None:
        rule = "--resume must be auto, none, a step's number or the folder of a checkpoint"
        raise UserError(f"{rule}; {path} holds no checkpoint. Check the path")
    return point


def _newer(in_sight: list[dict[str, int | None]], root: Path, point: ResumePoint | None) -> list[str]:
    """The steps of this job's folder that a run from ``point`` will not have come from."""
    ordered = newest_in_sight(in_sight)
    if point is None:
        return ordered
    if point.folder.parent.absolute() == root.absolute() and point.folder.name in ordered:
        return ordered[: ordered.index(point.folder.name)]
    return ordered  # another run's


def _counters(config: Config, folders: Folders, point: ResumePoint | None) -> Start:
    assert config.total_steps is not None, "parse_config requires it"
    if point is None:
        return Start(folders=folders, point=None)
    optimizer_step = int(point.trainer["optimizer_step"])
    step = optimizer_step * config.gradient_accumulate_step
    return Start(
        folders=folders,
        point=point,
        step=step,
        optimizer_step=optimizer_step,
        num_skipped=int(point.trainer["num_skipped"]),
        position=point.position,
        is_finished=step >= config.total_steps,
    )


def _agree_on_base(job: Job, config: Config, point: ResumePoint | None) -> str | None:
    """Called by all ranks: what the weights are that all read from --model-name; None if nobody reads any. Raises UserError if ranks see
    other weights than rank 0, or adapters others than they were trained beside."""
    if point is not None and config.train == "all":
        return None
    found = all_say(job, dist.PrefixStore("start", job.store), "base", base_fingerprint(config, job.model, job.spans))
    others = [rank for rank, base in enumerate(found) if base != found[0]]
    if others:
        raise UserError(
            f"all ranks read the same model; {job.place.at(others[0]).in_words} on host {job.roster[others[0]]['host']} has other weights "
            f"under --model-name than rank 0. Give every host the same copy of the model folder"
        )
    if point is not None and point.trainer.get("base_model") != found[0]:
        raise UserError(
            f"adapters belong to the model they were trained on; the weights of --model-name {config.model_name} are not those that "
            f"{point.folder} was trained beside. Give that model, or use another --checkpoint-path"
        )
    return found[0]


def _open_desk(job: Job, config: Config, start: Start, token: str, base: str | None, cleanup: ExitStack) -> ReadingDesk:
    """On rank 0. Raises UserError for tokenizers, data and batches that do not fit, and says what a resume changes."""
    encoder = load_text_encoder(config, job.model.path, job.model_config.vocab_size, loss_on=config.loss_on)
    mixture = open_mixture(config, encoder, job.spans)
    cleanup.callback(mixture.close)
    identity = data_identity(config, encoder, mixture)
    state, probe = None, None
    if start.point is not None:
        state, probe = _data_position(config, start.point, identity)
        if probe is not None and not start.point.has_optimizer and any(job.model.dtype(n) != torch.float32 for n in job.model.names()):
            log.warning("this resume cannot be verified: the weights were rounded to their files (--checkpoint-optimizer false)")
            state, probe = start.point.trainer["data"], None
        _say_what_changed(job, config, start, start.point)
    mixture.go_to(state)
    return ReadingDesk(
        encoder=encoder,
        mixture=mixture,
        position=mixture.state(),
        identity=identity,
        probe=probe,
        run_token=token,
        base_model=base,
        validation=open_validation(config, encoder, job.spans),
    )


def _data_position(config: Config, point: ResumePoint, identity: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Where in the data to go on (None: at its beginning), and the probe of --verify-resume if it can be repeated from there."""
    saved, now = point.trainer["sequences_per_step"], sequences_per_step(config)
    if saved != now and not config.allow_batch_change:
        raise UserError(
            f"a run goes on with its global batch (--batch-size x replicas x --gradient-accumulate-step); {point.folder} was saved with "
            f"{saved} sequences per optimizer step, now there are {now}. Set them so that the product is {saved}, or pass "
            "--allow-batch-change to go on from the same place in the data"
        )
    before: dict[str, Any] = {**OLDER_IDENTITY, **point.trainer["data_identity"]}
    differing = [f"{key}: then {before.get(key)!r}, now {value!r}" for key, value in identity.items() if before.get(key) != value]
    if differing and not config.allow_data_change:
        raise UserError(
            f"a run resumes with the data it began with; since {point.folder} these changed: {'; '.join(differing)}. "
            "Set them back, use another --checkpoint-path, or pass --allow-data-change to start the data over"
        )
    if differing:
        log.warning("the data changed since %s and starts over (--allow-data-change)", point.folder)
        return None, None
    position: dict[str, Any] = point.trainer["data"]
    if not config.verify_resume:
        return position, None
    probe: dict[str, Any] | None = point.trainer.get("probe")
    if probe is None or saved != now:
        why = "was saved without --verify-resume" if probe is None else "was saved with another global batch"
        log.warning("this resume cannot be verified: %s %s", point.folder, why)
        return position, None
    return probe["data_before"], probe


def _say_what_changed(job: Job, config: Config, start: Start, point: ResumePoint) -> None:
    log.info("resuming from %s", point.folder)
    if start.step != point.step:
        log.info(
            "steps count accumulation steps, of which an optimizer step now has %d: step %d of the checkpoint is step %d of this run",
            config.gradient_accumulate_step,
            point.step,
            start.step,
        )
    then, now = (
        "fp16" if flags.get("fp16") else "bf16" if flags.get("bf16") else "fp32" for flags in (point.trainer["flags"], vars(config))
    )
    if then != now:
        log.warning("%s was trained in %s and goes on in %s, from the same fp32 masters and moments", point.folder, then, now)
    for name in ("base_quantization", "quantize_ends", "dropout", "lora_dropout"):
        before = point.trainer["flags"].get(name, getattr(Config, name, None))
        if name in point.trainer["flags"] and before != getattr(config, name):
            log.warning("%s was trained with %s %s and goes on with %s", point.folder, flag_name(name), before, getattr(config, name))
    if not point.has_optimizer:
        log.warning(
            "%s holds no optimizer states (--checkpoint-optimizer false): Adam's moments start at zero, and weights are as exact as their "
            "files",
            point.folder,
        )
    if point.trainer["num_threads"] != job.num_threads:
        log.warning(
            "%s was computed with %d threads per rank, this run has %d: the last bits of the losses may change",
            point.folder,
            point.trainer["num_threads"],
            job.num_threads,
        )
