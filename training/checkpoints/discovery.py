"""Where a run goes on: the newest step that is complete over all hosts together.

Each rank says which files of a step it sees, and all put that together in the same way.

Promises: nothing of a step is loaded before all of it was found, in full size (and, with --verify-checkpoint, with the right hash); what
makes a step unusable is said with file and reason, and the next older one is looked at. Left to others: loading (loading.py).
"""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch.distributed as dist

from checkpoint.companions import CONFIG
from checkpoint.manifest import (
    TRAIN_STATE,
    TRAINER_FILE,
    Manifest,
    file_problem,
    name_problems,
    newest_first,
    read_manifest,
    step_positions,
)
from checkpoint.model_folder import read_json_object
from checkpoint.tensor_file import FileRecord
from checkpoint.train_state import read_trainer_state
from modules.families import read_model_config
from modules.model_config import ModelConfig
from training.job.job import COLLECTIVE_TIMEOUT, Job, all_say
from user_error import UserError

log = logging.getLogger("trainer")

_COUNTS = ("step", "position", "optimizer_step", "num_skipped", "sequences_per_step", "num_threads")  # of trainer.json
_LARGEST_COUNT = 2**63
_PROBE: dict[str, Any] = {"tokens_sha256": (str, NoneType), "data_before": (dict, NoneType), "bits_depend_on": dict}
_BEST: dict[str, Any] = {"step": int, "metric": str, "value": (int, float), "loss": (int, float), "data": str}


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """A complete step, equal on all ranks. folder: its name (or path, for --resume PATH) as this rank sees it. sees: which files of the
    checkpoint each rank has on its own disk. trainer, config: what trainer.json and config.json say."""

    folder: Path
    records: dict[str, FileRecord]
    sees: tuple[frozenset[str], ...]
    trainer: dict[str, Any]
    config: dict[str, Any]

    @property
    def step(self) -> int:
        """In accumulation steps of the run that saved it."""
        return int(self.trainer["step"])

    @property
    def position(self) -> int:
        """In sequences."""
        return int(self.trainer["position"])

    @property
    def has_optimizer(self) -> bool:
        """False for a checkpoint that was saved with --checkpoint-optimizer false."""
        return any(name.startswith(f"{TRAIN_STATE}/") and name != TRAINER_FILE for name in self.records)

    def provider(self, name: str, rank: int) -> int:
        """Who gives the file ``name`` to ``rank``: itself if it sees it, else the lowest rank that does."""
        if name not in self.records:
            cure = "Resume from another step"
            raise UserError(f"{self.folder} lacks a part of this model: its manifest lists no {name}. {cure}")
        return rank if name in self.sees[rank] else min(other for other, names in enumerate(self.sees) if name in names)


@dataclass(frozen=True, kw_only=True)
class _Sight:
    """What one rank sees of one step: files present in full size, or the reason why it sees none, and what is wrong with others.

    copy: equal for ranks that look at the very same folder of the same host."""

    copy: str
    everywhere: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find_resume_point(
    job: Job, root: Path, *, only: str | None, hashes: bool, is_required: bool = True, label: str = ""
) -> ResumePoint | None:
    """Called by all ranks: the newest step in ``root`` (or the one named ``only``) that is complete over all ranks; None if there is none.
    label: another one where the same is asked of another root.

    Raises UserError if ``only`` is not there or not complete, or all that is there is unusable; None then too unless ``is_required``.
    """
    store = dist.PrefixStore(f"resume/{label}/{is_required}", job.store)
    in_sight = all_say(job, store, "steps", step_positions(root))
    refused: list[str] = []
    for name in [only] if only is not None else newest_in_sight(in_sight):
        copy = f"{job.roster[job.place.rank]['host_id']}:{os.path.realpath(root / name)}"
        sights = [_Sight(**s) for s in all_say(job, store, f"sight/{name}", asdict(_look_at(root / name, copy)))]
        point, problem = _put_together(job, store, root / name, sights, hashes)
        if point is not None:
            if job.place.rank == 0:
                for text in refused:
                    log.warning("%s", text)
            return point
        refused.append(f"passed over {root / name}, it is no complete checkpoint: {problem}")
    if refused and is_required:
        text = "; ".join(refused).replace("passed over ", "") if only is not None else "; ".join(refused)
        cure = "Name another step" if only is not None else "Repair one of them, or pass --resume none to start over; nothing is deleted"
        raise UserError(f"there are checkpoints in {root}, and none can be resumed: {text.rstrip('.')}. {cure}")
    return None


def newest_in_sight(in_sight: Sequence[Mapping[str, int | None]]) -> list[str]:
    """The names of all steps that any rank sees, newest first. in_sight: what each rank found (``step_positions``)."""
    positions: dict[str, int | None] = {}
    for steps in in_sight:
        for name, position in steps.items():
            known = positions.get(name)
            positions[name] = position if known is None else known if position is None else max(known, position)
    return newest_first(positions)


def _look_at(folder: Path, copy: str) -> _Sight:
    try:
        manifest: Manifest = read_manifest(folder)
    except UserError as error:
        return _Sight(copy=copy, problems=[str(error)] if folder.exists() else [])
    wrong_name = name_problems(folder, manifest) if folder.name.isdecimal() else []
    if wrong_name:
        return _Sight(copy=copy, problems=wrong_name)
    everywhere = manifest.everywhere
    problems = {name: file_problem(folder, record) for name, record in everywhere.items()}
    return _Sight(
        copy=copy,
        everywhere={name: [record.size, record.sha256] for name, record in everywhere.items()},
        names=[name for name, problem in problems.items() if problem is None],
        problems=[text for name, text in problems.items() if text is not None and name in manifest.here],
    )


def _put_together(job: Job, store: dist.Store, folder: Path, sights: list[_Sight], hashes: bool) -> tuple[ResumePoint | None, str | None]:
    """Equal on all ranks: the point, or why there is none."""
    tables: list[dict[str, Any]] = []
    for sight in sights:
        if sight.everywhere and sight.everywhere not in tables:
            tables.append(sight.everywhere)
    problems = [text for sight in sights for text in sight.problems]
    if not tables:
        return None, problems[0] if problems else f"there is no folder {folder}"
    reason = None
    for number, table in enumerate(tables):  # several: a host that was away has an older save of the same number
        same = [sight if sight.everywhere == table else _Sight(copy=sight.copy) for sight in sights]
        point, why = _from_table(job, dist.PrefixStore(str(number), store), folder, same, table, hashes)
        if point is not None:
            return point, None
        reason = reason or why
    differ = " (and its manifests on different hosts list different files)" if len(tables) > 1 else ""
    return None, f"{reason}{differ}"


def _from_table(
    job: Job, store: dist.Store, folder: Path, sights: list[_Sight], table: dict[str, Any], hashes: bool
) -> tuple[ResumePoint | None, str | None]:
    """As _put_together, of the hosts whose manifests list the files of ``table``."""
    problems = [text for sight in sights for text in sight.problems]
    records = {name: FileRecord(name=name, size=size, sha256=sha256) for name, (size, sha256) in table.items()}
    sees = [set(sight.names) for sight in sights]
    if hashes:
        for rank, wrong in enumerate(all_say(job, store, f"hashes/{folder.name}", _wrong_hashes(job, folder, records, sights))):
            problems += wrong.values()
            for other, sight in enumerate(sights):
                if sight.copy == sights[rank].copy:
                    sees[other] -= set(wrong)
    lacking = sorted(set(records) - set().union(*sees))
    if lacking:
        named = next((text for text in problems if text.startswith(lacking[0])), f"{lacking[0]} is on none of the hosts")
        return None, named + (f" (and {len(lacking) - 1} more files)" if len(lacking) > 1 else "")
    contents: dict[str, dict[str, Any]] = {}
    for name in (TRAINER_FILE, CONFIG):
        said = _from_lowest(job, store, folder, sees, name)
        if "problem" in said:
            return None, str(said["problem"])
        contents[name] = said["content"]
    point = ResumePoint(
        folder=folder,
        records=records,
        sees=tuple(frozenset(names) for names in sees),
        trainer=contents[TRAINER_FILE],
        config=contents[CONFIG],
    )
    return point, None


def _wrong_hashes(job: Job, folder: Path, records: Mapping[str, FileRecord], sights: list[_Sight]) -> dict[str, str]:
    """name -> what is wrong with it. The ranks that see one copy of the step share its files out among them."""
    own = sights[job.place.rank]
    sharers = [rank for rank, sight in enumerate(sights) if sight.copy == own.copy]
    share = sorted(own.names)[sharers.index(job.place.rank) :: len(sharers)]
    with job.spans.part("checking the checkpoint's sha256", sum(records[name].size for name in share), "bytes") as part:
        problems = {name: file_problem(folder, records[name], hashes=True, progress=part.add) for name in share}
    return {name: text for name, text in problems.items() if text is not None}


def _from_lowest(job: Job, store: dist.Store, folder: Path, sees: list[set[str]], name: str) -> dict[str, Any]:
    """A small JSON file of the step, read by the lowest rank that sees it, for all: {"content": ...} or {"problem": ...}."""
    if all(name not in names for names in sees):
        return {"problem": f"its manifest does not list {name}"}
    owner = min(rank for rank, names in enumerate(sees) if name in names)
    key = f"content/{folder.name}/{name}"
    if job.place.rank == owner:
        try:
            said: dict[str, Any] = {"content": _read_trainer(folder) if name == TRAINER_FILE else _read_config(job, folder)}
        except UserError as error:
            said = {"problem": str(error)}
        store.set(key, json.dumps(said))
    store.wait([key], COLLECTIVE_TIMEOUT)
    content = json.loads(store.get(key))
    assert isinstance(content, dict), "written above"
    return content


def _read_config(job: Job, folder: Path) -> dict[str, Any]:
    config = read_json_object(folder / CONFIG)
    try:
        if config.get("model_type") == job.model_config.hf_model_type:  # another model's is refused as such (check_same_model)
            read_model_config(config)
    except UserError as error:
        raise UserError(f"{folder / CONFIG} cannot be used: {error}") from error
    return config


def _read_trainer(folder: Path) -> dict[str, Any]:
    """trainer.json, and proof that whatever looks into it finds what it expects. Raises UserError naming the entries that are wrong."""
    trainer = read_trainer_state(folder)
    wrong = [name for name in _COUNTS if not (type(trainer.get(name)) is int and 0 <= trainer[name] < _LARGEST_COUNT)]
    wrong += [name for name in ("data", "data_identity", "flags") if not isinstance(trainer.get(name), dict)]
    wrong += [name for name in ("probe", "best") if not isinstance(trainer.get(name, {}), (dict, NoneType))]
    if "flags" not in wrong:
        wrong += [f"flags.{name}" for name, value in trainer["flags"].items() if not _is_flag(name, value)]
    if isinstance(trainer.get("probe"), dict) and "probe" not in wrong:
        wrong += [f"probe.{name}" for name, kind in _PROBE.items() if not isinstance(trainer["probe"].get(name), kind)]
        wrong += [f"probe.{name}" for name in ("loss", "grad_norm") if not _is_hex_float(trainer["probe"].get(name))]
    if isinstance(trainer.get("best"), dict) and "data" in trainer["best"]:  # older versions did not write that, and theirs is not read
        wrong += [f"best.{name}" for name, kind in _BEST.items() if not isinstance(trainer["best"].get(name), kind)]
        wrong += [f"best.{name}" for name in ("value", "loss") if not _is_finite(trainer["best"].get(name))]
        wrong += [f"best.{ascii(name)[1:-1]}" for name in trainer["best"] if name not in _BEST]
    scale = trainer.get("loss_scale")
    if isinstance(scale, dict):
        wrong += [f"loss_scale.{name}" for name in ("good_steps", "overflows_left") if type(scale.get(name)) is not int]
        wrong += ["loss_scale.value"] * (not _is_finite(scale.get("value")))
    elif not _is_finite(scale):  # a number in older versions
        wrong.append("loss_scale")
    if wrong:
        where = f"{folder / TRAINER_FILE} is damaged: it does not hold what this trainer writes under"
        raise UserError(f"{where} {', '.join(ascii(name)[1:-1] for name in dict.fromkeys(wrong[:8]))}")
    return trainer


def _is_flag(name: str, value: Any) -> bool:
    """Flags are compared and shown, which any plain value can be; one is also taken apart."""
    return isinstance(value, str) if name == "lora_target_modules" else isinstance(value, (str, int, float, NoneType))


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _is_hex_float(text: Any) -> bool:
    try:
        float.fromhex(text)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def check_same_model(point: ResumePoint, model_config: ModelConfig) -> None:
    """Raises UserError if the step is one of another model than --model-name."""
    cure = "Use another --checkpoint-path"
    if point.config.get("model_type") != model_config.hf_model_type:
        raise UserError(
            f"a run resumes its own model; {point.folder} is a checkpoint of model type {point.config.get('model_type')!r}, "
            f"--model-name is {model_config.hf_model_type!r}. {cure}"
        )
    saved = asdict(read_model_config(point.config))
    differing = [
        f"{name} {value} and {getattr(model_config, name)}" for name, value in saved.items() if value != getattr(model_config, name)
    ]
    if differing:
        raise UserError(f"a run resumes its own model; {point.folder} and --model-name differ in {', '.join(differing)}. {cure}")
