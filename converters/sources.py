"""What the path that a user gave a converter is, opened: a model of any layout, one of our steps, a relative's checkpoint, or an adapter.

Promises: the folder is whole as far as headers tell, and of the family that the script is for. What was passed over is said on stderr.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.adapter_folder import ADAPTER_CONFIG, Adapter, is_adapter_folder, read_adapter
from checkpoint.atomic_folder import PARTIAL_SUFFIX
from checkpoint.companions import CONFIG
from checkpoint.legacy_layers import is_layer_shard_folder
from checkpoint.manifest import MANIFEST, TRAIN_STATE, find_newest_step, step_folders, verify_step
from checkpoint.model_folder import WEIGHT_FILES, ModelFolder, check_model_folder, read_json_object, resolve_model_folder
from checkpoint.stage_checkpoints import has_stage_files, open_stage_checkpoint, stage_steps
from modules.families import FAMILIES, read_model_config
from modules.model_config import ModelConfig
from user_error import UserError

_CURE = "Give a step's folder, a model folder or a --checkpoint-path."


@dataclass(frozen=True, kw_only=True)
class Source:
    """An open source. layers_per_stage: of a relative's training checkpoint, else None."""

    folder: ModelFolder
    config: ModelConfig
    layers_per_stage: tuple[int, ...] | None = None


def open_source(path: Path, model_type: str, direction: str, config_name: str | None) -> Source:
    """Open ``path`` for the script convert_<direction>_<model_type>.py and prove from headers that it is a whole model.

    ``config_name``: a folder or hub name that has the config.json (and tokenizer) which ``path`` lacks. Raises UserError.
    """
    if not path.is_dir():
        raise UserError(f"there is no folder {path}. {_CURE}")
    if _is_stage_checkpoint(path):
        source = _open_stages(path, model_type, direction, config_name)
    else:
        source = _open_model(_newest_of_ours(path), model_type, direction, config_name)
    check_model_folder(source.folder, source.config)
    return source


def open_adapter(path: Path, config: ModelConfig) -> Adapter:
    """Open the adapter folder ``path``, or the newest complete step in it, and prove from headers that it fits ``config``.

    Raises UserError.
    """
    if not path.is_dir():
        raise UserError(f"there is no folder {path}. Give --merge-adapter an adapter's folder, or the --checkpoint-path of its training.")
    has_steps = not is_adapter_folder(path) and bool(step_folders(path))
    return read_adapter(_newest_of_ours(path) if has_steps or (path / MANIFEST).exists() else path, config)


def _is_stage_checkpoint(path: Path) -> bool:
    """True for a relative's step, and for a folder of such steps that is no model itself: a pytorch_model.bin beside them is none."""
    if has_stage_files(path):
        return True
    steps = stage_steps(path)
    if not steps:
        return False
    ours = [folder for folder in step_folders(path) if folder not in steps and (folder / MANIFEST).exists()]
    if ours:
        raise UserError(f"{path} holds checkpoints of two trainers, {steps[0].name} and {ours[0].name}. Give the folder of one step.")
    is_model = is_layer_shard_folder(path) or any((path / name).exists() for name in WEIGHT_FILES if name != "pytorch_model.bin")
    return not (is_model and (path / CONFIG).exists())


def _open_stages(path: Path, model_type: str, direction: str, config_name: str | None) -> Source:
    config_path = _config_folder([path, path.parent], config_name)
    hf_config = read_json_object(config_path / CONFIG)
    config = _family_config(hf_config, config_path, model_type, direction)
    checkpoint = open_stage_checkpoint(path, config)
    for reason in checkpoint.passed_over:
        print(f"warning: passed over a step: {reason}", file=sys.stderr)
    stages = checkpoint.layers_per_stage
    print(f"reading {checkpoint.folder}: {len(stages)} stage(s) of {' + '.join(map(str, stages))} layers; configuration of {config_path}")
    folder = ModelFolder.of(config_path, hf_config, checkpoint.weights, weights_path=checkpoint.folder)
    return Source(folder=folder, config=config, layers_per_stage=stages)


def _config_folder(candidates: Sequence[Path], config_name: str | None) -> Path:
    if config_name is not None:
        return resolve_model_folder(config_name, weights=False)
    for folder in candidates:
        if (folder / CONFIG).is_file():
            return folder
    what = f"{candidates[0]} is a checkpoint without {CONFIG} and tokenizer"
    raise UserError(f"{what}. Give a folder or hub name that has them, such as that of the model trained from, with --config-name")


def _open_model(path: Path, model_type: str, direction: str, config_name: str | None) -> Source:
    if is_adapter_folder(path) and not any((path / name).exists() for name in WEIGHT_FILES):
        named = read_json_object(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        base = f"{ascii(named)[1:-1]}, it says" if isinstance(named, str) and named else "the model that it was trained on"
        rule = f"{path} is an adapter, and not a model: it changes another one"
        raise UserError(f"{rule} ({base}). Give convert_to_hf_{model_type}.py that model as --ckpt-path, and this as --merge-adapter")
    config_path = path
    if config_name is not None and (path / CONFIG).is_file():
        print(f"note: {path} holds a {CONFIG} of its own, so --config-name is not read")
    elif config_name is not None:
        config_path = resolve_model_folder(config_name, weights=False)
    hf_config = read_json_object(config_path / CONFIG)
    config = _family_config(hf_config, config_path, model_type, direction)
    return Source(folder=ModelFolder.open(path, config_path=config_path), config=config)


def _family_config(hf_config: dict[str, Any], path: Path, model_type: str, direction: str) -> ModelConfig:
    """Raises UserError for another family, naming the script for it if there is one."""
    mine = next(family for family in FAMILIES if family.model_type == model_type)
    seen = hf_config.get("model_type")
    if seen == mine.hf_model_type:
        return read_model_config(hf_config)
    others = [family.model_type for family in FAMILIES if family.hf_model_type == seen]
    cure = f"Use convert_{direction}_{others[0]}.py." if others else f"Give a model of the family {mine.hf_model_type}."
    rule = f"convert_{direction}_{model_type}.py needs a model whose config.json says model_type {mine.hf_model_type}"
    raise UserError(f"{rule}; {path / CONFIG} says {seen!r}. {cure}")


def _newest_of_ours(path: Path) -> Path:
    """The folder to convert: ``path`` itself, or the newest complete step in it. Raises UserError if it is neither or not complete."""
    if (path / MANIFEST).exists() or (path / TRAIN_STATE).exists() or path.name.endswith(PARTIAL_SUFFIX):
        problems = verify_step(path) or verify_step(path, hashes=True, only=[entry.name for entry in path.iterdir()])
        if problems:
            raise UserError(f"{path} is no complete checkpoint: {'; '.join(problems[:5])}. Take an older step.")
        return path
    if any((path / name).exists() for name in (CONFIG, *WEIGHT_FILES, ADAPTER_CONFIG)) or is_layer_shard_folder(path):
        return path
    newest, warnings = find_newest_step(path)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if newest is None:
        seen = "none of its step folders is complete" if step_folders(path) else "it holds neither config.json nor step folders"
        raise UserError(f"{path} holds no checkpoint to convert: {seen}. {_CURE}")
    print(f"taking the newest complete step: {newest}")
    return newest
