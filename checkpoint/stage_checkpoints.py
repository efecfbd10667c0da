"""Training checkpoints of this trainer's public relatives: one torch file per pipeline stage, the state dict of an nn.Sequential.

    <root>/latest                                 text: the number of a step
    <root>/checkpoint_<step>/ or <root>/<step>/   prank_0_checkpoint.pt, prank_1_checkpoint.pt ..  (and optimizer files, not read)

A key is ``<k>.<name>``: k counts the parts of the stage, name is the short one of legacy_layers.py. The first stage begins with the
embeddings, the last ends with the head, the rest are layers in order; so the cut is found in the files and needs no flag.
Promises: what is returned is every layer of the model, once, in order; else a UserError names the stage and the file. Their writers do not
wait for each other, so ``latest`` may name a step of which a stage is missing: such a step is passed over, in words.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from checkpoint.legacy_layers import hugging_face_name
from checkpoint.weight_file import StoredWeight, WeightFile, open_weight_file
from modules.families import FAMILIES
from modules.model_config import ModelConfig, ModelNames
from modules.stage import EMBEDDINGS, LM_HEAD, layer_key_of_index
from user_error import UserError

LATEST = "latest"
MAX_LISTED = 10
_STAGE_FILE = re.compile(r"prank_(0|[1-9][0-9]{0,8})_checkpoint\.pt")
_STEP_FOLDER = re.compile(r"(?:checkpoint_)?([0-9]{1,18})")
_KEY = re.compile(r"([0-9]{1,9})\.(.+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class StageCheckpoint:
    """A complete one. weights: (Hugging Face name, where it lies) of every tensor, old buffers too."""

    folder: Path
    weights: tuple[tuple[str, StoredWeight], ...]
    layers_per_stage: tuple[int, ...]
    passed_over: tuple[str, ...] = ()


def has_stage_files(folder: Path) -> bool:
    """True if ``folder`` is a step of this layout, complete or not."""
    return folder.is_dir() and any(entry.name.startswith("prank_") and entry.suffix == ".pt" for entry in folder.iterdir())


def stage_steps(root: Path) -> list[Path]:
    """The steps of this layout in ``root``, complete or not, newest first."""
    found = [(int(match[1]), entry) for entry in root.iterdir() if (match := _STEP_FOLDER.fullmatch(entry.name)) and has_stage_files(entry)]
    return [folder for _, folder in sorted(found, reverse=True)]


def open_stage_checkpoint(path: Path, config: ModelConfig) -> StageCheckpoint:
    """``path``: a step's folder, or a root of steps, of which the one that ``latest`` names is taken, or the newest complete one before it.

    Raises UserError if there is none.
    """
    if has_stage_files(path):
        return _open_step(path, config)
    steps, passed_over = stage_steps(path), []
    named = _latest(path)
    if named is not None:
        passed_over += [f"{folder}: {path / LATEST} does not name it yet" for folder in steps if _number(folder) > named]
        if named not in map(_number, steps):
            passed_over.append(f"step {named}: {path / LATEST} names it, but it is not there")
        steps = [folder for folder in steps if _number(folder) <= named]
    for folder in steps:
        try:
            checkpoint = _open_step(folder, config)
        except UserError as error:
            passed_over.append(str(error))
            continue
        return StageCheckpoint(
            folder=folder,
            weights=checkpoint.weights,
            layers_per_stage=checkpoint.layers_per_stage,
            passed_over=tuple(passed_over),
        )
    raise UserError(f"no step in {path} is complete: {' | '.join(passed_over)}")


def _latest(root: Path) -> int | None:
    """The step that ``root``/latest names; None without such a file, or if it names none."""
    try:
        if not (root / LATEST).is_file():  # a pipe would be waited for
            return None
        text = (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _number(folder: Path) -> int:
    match = _STEP_FOLDER.fullmatch(folder.name)
    assert match is not None, f"{folder} was found by its number"
    return int(match[1])


def _open_step(folder: Path, config: ModelConfig) -> StageCheckpoint:
    """All stages of one step, strictly."""
    found = {int(match[1]): entry for entry in folder.iterdir() if (match := _STAGE_FILE.fullmatch(entry.name))}
    missing = [f"prank_{s}_checkpoint.pt" for s in _gaps(found, at_least=1)]
    if missing:
        cure = "Each machine writes only its own stages: copy them all into one folder, or take an older step."
        raise UserError(f"{folder} is incomplete: {', '.join(missing)} missing, of a model in at least {len(found) + 1} stages. {cure}")
    weights: list[tuple[str, StoredWeight]] = []
    layers_per_stage: list[int] = []
    files: list[WeightFile] = []
    for stage in sorted(found):
        file = open_weight_file(found[stage])
        files.append(file)
        parts = _parts(file, config.names)
        _check_ends(file, parts, is_first=stage == 0, is_last=stage == max(found))
        first = sum(layers_per_stage)
        layer_positions = [k for k, kind in enumerate(parts) if kind == "layer"]
        keys = {k: layer_key_of_index(first + place) for place, k in enumerate(layer_positions)}
        keys |= {k: kind for k, kind in enumerate(parts) if kind != "layer"}
        for name in file.specs:
            k, short = _split(file, name)
            weights.append((hugging_face_name(keys[k], short, config.names), StoredWeight(file, name)))
        layers_per_stage.append(len(layer_positions))
    _check_dtypes(files, config.names)
    if sum(layers_per_stage) != config.num_layers:
        seen = f"the stages of {folder} hold {' + '.join(map(str, layers_per_stage))} = {sum(layers_per_stage)} layers"
        cure = "Give the config.json of this very model with --config-name, or all stages of one run."
        raise UserError(f"{seen}, and the config.json of the model says {config.num_layers}. {cure}")
    return StageCheckpoint(folder=folder, weights=tuple(weights), layers_per_stage=tuple(layers_per_stage))


def _gaps(numbers: Collection[int], *, at_least: int = 0) -> list[int]:
    """The first few that lack of 0 .. the largest of ``numbers``, which a stranger's file may make very large; of 0 .. at_least - 1."""
    stop = max(max(numbers, default=-1) + 1, at_least)
    return list(islice((k for k in range(stop) if k not in numbers), MAX_LISTED))


def _check_dtypes(files: Sequence[WeightFile], names: ModelNames) -> None:
    """Raise UserError if the layers of two stages differ in dtype: they were saved by two runs."""
    first: dict[str, tuple[WeightFile, torch.dtype]] = {}
    for file in files:
        for name, spec in file.specs.items():
            short = _split(file, name)[1]
            other, dtype = first.setdefault(short, (file, spec.dtype))
            if dtype != spec.dtype and dtype.is_floating_point and not short.endswith(names.buffers):
                seen = f"{short} is {dtype} in {other.path} and {spec.dtype} in {file.path}"
                raise UserError(f"all stages must have one dtype, and {seen}: stages of two runs lie in one folder. Keep those of one.")


def _split(file: WeightFile, name: str) -> tuple[int, str]:
    match = _KEY.fullmatch(name)
    if match is None:
        raise UserError(f"{file.path} must hold names such as 0.{'ln_1.weight'}, of the parts of a stage; it holds {name}. Copy it again.")
    return int(match[1]), match[2]


def _parts(file: WeightFile, names: ModelNames) -> list[str]:
    """What lies at each position of a stage: EMBEDDINGS, LM_HEAD or "layer"."""
    inner: dict[int, set[str]] = {}
    for name in file.specs:
        k, short = _split(file, name)
        inner.setdefault(k, set()).add(short.partition(".")[0])
    gaps = _gaps(inner)
    if gaps:
        raise UserError(
            f"{file.path} must hold its stage's parts 0 to {max(inner)}; it lacks {gaps}. Copy it again, or take an older step."
        )
    return [_kind(file, inner[k], names) for k in range(len(inner))]


def _kind(file: WeightFile, components: Collection[str], names: ModelNames) -> str:
    for family in FAMILIES:
        foreign = {family.names.embeddings, family.names.final_norm} & set(components)
        if family.names != names and foreign:
            seen = f"{file.path} holds {sorted(foreign)[0]}, which is a part of a {family.hf_model_type}"
            raise UserError(f"{seen}. Use the script for it, convert_.._{family.model_type}.py, with its config.json")
    if names.embeddings in components:
        return EMBEDDINGS
    return LM_HEAD if {names.final_norm, names.head, *names.other_heads} & set(components) else "layer"


def _check_ends(file: WeightFile, parts: list[str], *, is_first: bool, is_last: bool) -> None:
    """The embeddings begin the first stage and nothing else; the head ends the last one and nothing else."""
    path = file.path
    if is_first and parts[:1] != [EMBEDDINGS]:
        raise UserError(f"{path} must begin with the embeddings, as the first stage does, and does not. Copy all stages of one run.")
    if EMBEDDINGS in parts[1 if is_first else 0 :]:
        raise UserError(f"{path} holds embeddings where a layer belongs: stages of two runs lie in one folder. Keep those of one.")
    if is_last and parts[-1:] != [LM_HEAD]:
        what = f"{path} is the last stage there is and does not end with the head: further stages are missing"
        raise UserError(f"{what}. Each machine writes only its own: copy them all into one folder, or take an older step.")
    if LM_HEAD in (parts[:-1] if is_last else parts):
        raise UserError(f"{path} holds a head before the last stage: stages of two runs lie in one folder. Keep those of one.")
