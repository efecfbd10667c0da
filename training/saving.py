"""Checkpoints as a job of many ranks: who writes what, who waits for whom, and where a run resumes.

Replica 0 writes, each stage its own layers; rank 0 makes the folder, waits for all stages' records and commits. The ranks talk
through the store only, so nothing here is a collective of the device. What training reads (fp32 parameters, moments, data
position) is what is saved, keyed by layer."""

import json
import logging
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.job_lock import read_lock_token
from checkpoint.layer_store import StepWriter
from checkpoint.layered_folder import file_of_layer
from checkpoint.manifest import find_newest_step
from checkpoint.model_folder import ModelFolder, load_stage
from checkpoint.tensor_file import FileRecord
from checkpoint.train_state import load_train_state, pack_train_state, read_trainer_state
from modules.families import read_model_config
from modules.model_config import ModelConfig
from modules.stage import Stage
from optim.build import AdamW
from training.job import COLLECTIVE_TIMEOUT, Job
from user_error import UserError

log = logging.getLogger("trainer")

LOCK_VISIBLE_WITHIN_S = 5.0  # network filesystems show another host's file with a delay
SUM_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """A complete step and what its trainer.json says."""

    folder: Path
    step: int
    trainer: dict[str, Any]


def find_resume_point(root: Path, model_config: ModelConfig) -> ResumePoint | None:
    """On rank 0: the newest complete step of ``root``, None if there is none. Raises UserError if it is one of another model."""
    folder, warnings = find_newest_step(root)
    for warning in warnings:
        log.warning("%s", warning)
    if folder is None:
        return None
    saved = ModelFolder.open(folder)
    if saved.config.get("model_type") != model_config.hf_model_type:
        raise UserError(
            f"a run resumes its own model; {folder} is a checkpoint of model type {saved.config.get('model_type')!r}, "
            f"--model-name is {model_config.hf_model_type!r}. "
            "Use another --checkpoint-path"
        )
    saved_config = read_model_config(saved.config)
    differing = [
        f"{name} {value} and {getattr(model_config, name)}"
        for name, value in asdict(saved_config).items()
        if value != getattr(model_config, name)
    ]
    if differing:
        raise UserError(
            f"a run resumes its own model; {folder} and --model-name differ in {', '.join(differing)}. Use another --checkpoint-path"
        )
    trainer = read_trainer_state(folder)
    return ResumePoint(folder=folder, step=trainer["step"], trainer=trainer)


def check_same_data(point: ResumePoint, identity: Mapping[str, Any]) -> None:
    """Raises UserError, naming both values, unless the run that saved ``point`` read the same data in the same batches."""
    saved = point.trainer["data_identity"]
    differing = [f"{name}: then {saved.get(name)!r}, now {value!r}" for name, value in identity.items() if saved.get(name) != value]
    if differing:
        raise UserError(
            f"a run resumes with the data it began with; since {point.folder} these changed: {'; '.join(differing)}. "
            "Set them back, use another --checkpoint-path, or pass --allow-data-change to start the data over"
        )


def check_sees_lock(root: Path, token: str) -> None:
    """On every rank: --checkpoint-path must be the very folder that rank 0 has locked. Raises UserError."""
    give_up = time.monotonic() + LOCK_VISIBLE_WITHIN_S
    while read_lock_token(root) != token:
        if time.monotonic() < give_up:
            time.sleep(0.1)
            continue
        raise UserError(
            f"--checkpoint-path must be one folder that all hosts share; {root} on this host is not the one that rank 0 has locked. "
            "Mount the same folder on all hosts"
        )


def load_weights_and_state(stage: Stage, optimizer: AdamW, folder: Path) -> None:
    """Resume one stage from a step folder: parameters, from the fp32 masters where the file is narrower, and moments. Strict."""
    load_stage(stage, ModelFolder.open(folder))
    states = load_train_state(folder, stage)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            master = states[name].pop("master", None)
            if master is not None:
                parameter.copy_(master)
    optimizer.load_state(states)


def check_replicas_alike(job: Job, stage: Stage) -> None:
    """Called by all ranks: every replica of a stage must start from the same weights, or the sum of their gradients belongs to none.

    Each parameter is reduced to two checksums of its bits. Raises UserError on a replica that differs from replica 0.
    """
    if job.place.dp_size == 1:
        return
    sums = {name: _checksums(parameter) for name, parameter in stage.named_parameters()}
    job.store.set(f"weights/{job.place.pp}/{job.place.dp}", json.dumps(sums))
    if job.place.dp == 0:
        return
    key = f"weights/{job.place.pp}/0"
    job.store.wait([key], COLLECTIVE_TIMEOUT)
    first = json.loads(job.store.get(key))
    differing = [name for name in sums if sums[name] != first[name]]
    if differing:
        raise UserError(
            f"all replicas start from the same weights; {job.place.in_words} on host {job.roster[job.place.rank]['host']} has "
            "others than replica 0 in "
            f"{len(differing)} tensors, first {differing[0]}. Give every host the same copy of the model folder"
        )


def _checksums(parameter: Tensor) -> list[int]:
    """Sums of the 32-bit words of an fp32 tensor, plain and weighted by their place, modulo 2**64; in pieces that cost little memory."""
    plain = weighted = 0
    for piece in parameter.detach().flatten().split(SUM_CHUNK_ELEMENTS):
        words = piece.view(torch.int32).long()
        plain += int(words.sum())
        weighted = weighted * 31 + int((words * torch.arange(1, len(words) + 1, device=words.device)).sum())
    return [plain % 2**64, weighted % 2**64]


def save_step(
    job: Job, *, root: Path, step: int, stage: Stage, optimizer: AdamW, trainer: Mapping[str, Any], copy_from: list[Path]
) -> None:
    """Called by all ranks after the update of ``step``; replica 0 writes. ``trainer`` and ``copy_from`` are rank 0's.

    On rank 0 the step exists when this returns; the others may be ahead of the commit. Raises UserError (disk full, folder not shared).
    """
    if job.place.dp != 0:
        return
    writer = StepWriter(root, step)
    try:
        _write_and_commit(job, writer, stage, optimizer, trainer, copy_from)
    except UserError:
        if job.place.rank == 0:
            shutil.rmtree(writer.partial, ignore_errors=True)  # a disk that is full should not stay full of this
        raise


def _write_and_commit(
    job: Job, writer: StepWriter, stage: Stage, optimizer: AdamW, trainer: Mapping[str, Any], copy_from: list[Path]
) -> None:
    prefix = f"save/{writer.step}"
    if job.place.rank == 0:
        writer.begin()
        job.store.set(f"{prefix}/begun", "1")
    job.store.wait([f"{prefix}/begun"], COLLECTIVE_TIMEOUT)
    records: list[FileRecord] = []
    weight_map: dict[str, str] = {}
    states = optimizer.state()
    for key, parameters in stage.parameters_by_layer():
        weights = {name: parameter.detach() for name, parameter in parameters}
        dtypes = {name: job.model.dtype(name) for name in weights}
        records.append(writer.write_layer(key, weights, dtypes))
        records.append(writer.write_train_state(key, pack_train_state(weights, {name: states[name] for name in weights}, dtypes)))
        weight_map |= {name: file_of_layer(key) for name in weights}
    message = {"records": [asdict(record) for record in records], "weight_map": weight_map}
    job.store.set(f"{prefix}/stage{job.place.pp}", json.dumps(message))
    if job.place.rank != 0:
        return
    keys = [f"{prefix}/stage{pp}" for pp in range(job.place.pp_size)]
    job.store.wait(keys, COLLECTIVE_TIMEOUT)
    of_stages = [json.loads(job.store.get(key)) for key in keys]
    writer.commit(
        [FileRecord(**record) for message in of_stages for record in message["records"]],
        {name: file for message in of_stages for name, file in message["weight_map"].items()},
        copy_from,
        {
            "step": writer.step,
            "cut": [list(layers) for layers in job.cut],
            "num_threads": job.num_threads,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            **trainer,
        },
    )
    log.info("saved %s", writer.final)
