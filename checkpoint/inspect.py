"""What a folder on disk is, and whether all of it is there: a training step, a model, or a whole --checkpoint-path.

    python -m checkpoint.inspect DIR [--verify] [--json]

Promises: nothing is changed; damage is reported and never a crash. Without --verify only headers and sizes are read; with it every byte.
Exit status: 0 all that was looked at is whole, 1 something is not (or DIR is none of the three), 2 the command line is wrong.

--json prints one object. What is not known is null. Of a step or a model:
    path, kind ("step" or "model"), is_complete, problems [one clause each], notes [what is worth knowing and no defect], verified (true:
        contents were compared with the manifest's sha256)
    model {family, num_layers, width, vocab_size, num_parameters}
    adapter {peft_type, rank, alpha, targets, base}, where the weights are those of adapters alone, else null
    training {step, position (sequences), optimizer_step, num_skipped, cut [[first, last) of each stage], grid {stages, replicas},
        num_threads (per rank), versions, loss_scale}; null for a model
    weight_dtypes {dtype: number of parameters in the files here}, has_masters, has_optimizer_states
    bytes {weights, train_state, other} and num_files {weights, train_state, other}: here; missing [names] and damaged [names]: of the
        files that must be here; on_other_hosts {files [names], bytes}: of the same step, and not here
Of a --checkpoint-path:
    path, kind ("checkpoint-path"), is_complete (there are steps and each is whole), steps [as above, newest first], newest_complete (a
        name), partials [{name, bytes}] (saves that were cut off or are going on), set_aside [{name, bytes}], lock_held_by (in words)
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint.adapter_folder import ADAPTER_CONFIG, LORA, is_adapter_folder, read_adapter
from checkpoint.atomic_folder import PARTIAL_SUFFIX, readable_bytes
from checkpoint.command import exit_status, expanded
from checkpoint.companions import CONFIG
from checkpoint.job_lock import LOCK_NAME, lock_holder
from checkpoint.manifest import MANIFEST, TRAIN_STATE, TRAINER_FILE, Manifest, file_problem, name_problems, read_manifest, step_folders
from checkpoint.model_folder import ModelFolder, check_model_folder, read_json_object
from checkpoint.tensor_file import FileRecord
from checkpoint.train_state import read_trainer_state
from checkpoint.weight_file import TensorSpec, open_weight_file
from comms.progress import counted
from modules.families import is_legacy_buffer, read_model_config
from modules.model_config import ModelConfig
from modules.stage import meta_stage
from user_error import UserError

Facts = dict[str, Any]
KINDS = ("weights", "train_state", "other")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
SET_ASIDE = re.compile(r"[0-9]+\.(set-aside|damaged)(\.[0-9]+)?")
TRAINING_KEYS = ("optimizer_step", "num_skipped", "cut", "grid", "num_threads", "versions", "loss_scale")


def inspect(path: Path, *, verify: bool = False) -> Facts:
    """The facts of the module's docstring. Raises UserError if ``path`` is neither a step nor a model nor a folder of steps."""
    if not path.is_dir():
        raise UserError(f"there is no folder {path}. Give a step folder, a model folder or a --checkpoint-path")
    files = {entry.name for entry in path.iterdir()}
    if {MANIFEST, CONFIG, TRAIN_STATE} & files or any(name.endswith(WEIGHT_SUFFIXES) for name in files):
        return inspect_folder(path, verify=verify)
    if step_folders(path) or LOCK_NAME in files or _named(path, r"\.[0-9]+" + re.escape(PARTIAL_SUFFIX)) or _named(path, SET_ASIDE.pattern):
        return inspect_root(path, verify=verify)
    if path.absolute().name.isdigit():
        return inspect_folder(path, verify=verify)  # a step that has lost everything
    raise UserError(f"{path} holds neither a model ({CONFIG}) nor a training step ({MANIFEST}) nor folders of steps. Check the path")


def inspect_root(root: Path, *, verify: bool = False) -> Facts:
    """The facts of a --checkpoint-path."""
    steps = [inspect_folder(folder, verify=verify, must_be_step=True) for folder in step_folders(root)]
    whole = [Path(facts["path"]).name for facts in steps if facts["is_complete"]]
    return {
        "path": str(root),
        "kind": "checkpoint-path",
        "is_complete": bool(steps) and len(whole) == len(steps),
        "steps": steps,
        "newest_complete": whole[0] if whole else None,
        "partials": [_with_size(folder) for folder in _named(root, r"\.[0-9]+" + re.escape(PARTIAL_SUFFIX))],
        "set_aside": [_with_size(folder) for folder in _named(root, SET_ASIDE.pattern)],
        "lock_held_by": lock_holder(root),
    }


def inspect_folder(folder: Path, *, verify: bool = False, must_be_step: bool = False) -> Facts:
    """The facts of a step or a model. ``must_be_step``: it lies where only steps named by their number may."""
    problems: list[str] = []
    manifest = None
    is_step = must_be_step or (folder / TRAIN_STATE).is_dir() or folder.absolute().name.isdigit()
    if is_step or (folder / MANIFEST).exists():
        try:
            manifest = read_manifest(folder)
            is_step = must_be_step or manifest.step is not None or (folder / TRAIN_STATE).is_dir()
        except UserError as error:
            problems.append(str(error))
    missing, damaged, away = _compare(folder, manifest, verify, problems)
    if manifest is not None and is_step and (must_be_step or manifest.step is None or folder.absolute().name.isdigit()):
        problems += name_problems(folder.absolute(), manifest)
    trainer = _trainer(folder, manifest, problems) if is_step else {}
    config, specs = _model(folder, problems)
    adapter = _adapter_facts(folder)
    state = _headers(sorted((folder / TRAIN_STATE).glob("*.safetensors")))
    kept = {kind: _files_of_kind(folder, kind) for kind in KINDS}
    return {
        "path": str(folder),
        "kind": "step" if is_step else "model",
        "is_complete": not problems,
        "problems": problems,
        "notes": _notes(folder, manifest, is_step, verify),
        "verified": verify and manifest is not None,
        "model": None if config is None else _model_facts(config),
        "adapter": adapter,
        "training": _training_facts(manifest, trainer) if is_step else None,
        "weight_dtypes": _dtypes(specs),
        "has_masters": any(name.startswith("master/") for name in state) if is_step else None,
        "has_optimizer_states": any(name.startswith("exp_avg/") for name in state) if is_step else None,
        "bytes": {kind: sum(_size(path) for path in paths) for kind, paths in kept.items()},
        "num_files": {kind: len(paths) for kind, paths in kept.items()},
        "missing": missing,
        "damaged": damaged,
        "on_other_hosts": {"files": [record.name for record in away], "bytes": sum(record.size for record in away)},
    }


def _compare(
    folder: Path, manifest: Manifest | None, verify: bool, problems: list[str]
) -> tuple[list[str], list[str], Sequence[FileRecord]]:
    """The files of the manifest: (missing here, damaged, in the folders of other hosts alone). Adds what is wrong to ``problems``."""
    if manifest is None:
        return [], [], []
    away = [record for name, record in sorted(manifest.elsewhere.items()) if not (folder / name).exists()]
    near = [record for name, record in sorted(manifest.everywhere.items()) if record not in away]
    missing: list[str] = []
    damaged: list[str] = []
    total = sum(record.size for record in near)
    with counted(f"verifying {folder.name}", total) as progress:
        for record in near:
            if problem := file_problem(folder, record, hashes=verify, progress=progress):
                (damaged if (folder / record.name).exists() else missing).append(record.name)
                problems.append(problem)
    if away:
        names = ", ".join(record.name for record in away)
        cure = "Put the hosts' folders together: python -m checkpoint.gather HOSTDIR... --out DIR"
        problems.append(f"only one host's part is here; {len(away)} files are in the folders of other hosts: {names}. {cure}")
    if manifest.step is not None and TRAINER_FILE not in manifest.everywhere:
        problems.append(f"{MANIFEST} does not list {TRAINER_FILE}")
    return missing, damaged, away


def _trainer(folder: Path, manifest: Manifest | None, problems: list[str]) -> Facts:
    """trainer.json; {} and a problem, unless there is one already, if it cannot be read."""
    try:
        return read_trainer_state(folder)
    except UserError as error:
        if not problems or manifest is None:
            problems.append(str(error))
        return {}


def _model(folder: Path, problems: list[str]) -> tuple[ModelConfig | None, Mapping[str, TensorSpec]]:
    """Configuration and headers, as far as they can be read. A folder that is whole in all else must be a whole model."""
    found: list[str] = []
    config = None
    specs: Mapping[str, TensorSpec] = {}
    try:
        config = read_model_config(read_json_object(folder / CONFIG))
        if is_adapter_folder(folder):
            read_adapter(folder, config)
            return config, _headers(sorted(folder.glob("l*.safetensors")))
        model = ModelFolder.open(folder)
        specs = {name: TensorSpec(dtype=model.dtype(name), shape=model.shape(name)) for name in model.names()}
        check_model_folder(model, config)
    except UserError as error:
        found.append(str(error))
    if not problems:
        problems += found
    return config, specs or _headers(sorted(folder.glob("*.safetensors")))


def _adapter_facts(folder: Path) -> Facts | None:
    """Of a folder of adapters, from its configuration as it stands there."""
    if not is_adapter_folder(folder):
        return None
    try:
        config = read_json_object(folder / ADAPTER_CONFIG)
    except UserError:
        return {}  # read_adapter reports it
    names = {"peft_type": "peft_type", "rank": "r", "alpha": "lora_alpha", "targets": "target_modules", "base": "base_model_name_or_path"}
    return {name: config.get(key) for name, key in names.items()}


def _headers(files: Sequence[Path]) -> dict[str, TensorSpec]:
    """The tensors of those files whose header can be read."""
    specs: dict[str, TensorSpec] = {}
    for file in files:
        try:
            specs |= open_weight_file(file).specs
        except UserError:
            continue  # the manifest, or ModelFolder.open, has reported it
    return {name: spec for name, spec in specs.items() if not is_legacy_buffer(name)}


def _notes(folder: Path, manifest: Manifest | None, is_step: bool, verify: bool) -> list[str]:
    notes = []
    if is_step and manifest is not None and manifest.step is not None and not folder.absolute().name.isdigit():
        notes.append(f"a run resumes only from folders named by their step: this one would have to be called {manifest.step}")
    if verify and manifest is None:
        notes.append(f"contents cannot be verified without a {MANIFEST}; the headers of the files have been")
    return notes


def _model_facts(config: ModelConfig) -> Facts:
    return {
        "family": config.model_type,
        "num_layers": config.num_layers,
        "width": config.width,
        "vocab_size": config.vocab_size,
        "num_parameters": num_parameters(config),
    }


def num_parameters(config: ModelConfig) -> int:
    """From one and two layers, so that the answer costs the same for any depth that a damaged file may claim."""
    one, two = (
        sum(parameter.numel() for parameter in meta_stage(dataclasses.replace(config, num_layers=n), 0, n).parameters()) for n in (1, 2)
    )
    return one + (config.num_layers - 1) * (two - one)


def _training_facts(manifest: Manifest | None, trainer: Facts) -> Facts:
    step = trainer.get("step") if manifest is None else manifest.step
    position = trainer.get("position") if manifest is None or manifest.position is None else manifest.position
    return {"step": step, "position": position, **{key: trainer.get(key) for key in TRAINING_KEYS}}


def _dtypes(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """How many parameters there are of each dtype."""
    counts: dict[str, int] = {}
    for spec in specs.values():
        name = str(spec.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + spec.shape.numel()
    return dict(sorted(counts.items()))


def _files_of_kind(folder: Path, kind: str) -> list[Path]:
    if kind == "train_state":
        return [path for path in (folder / TRAIN_STATE).glob("*") if path.is_file()]
    files = [path for path in folder.iterdir() if path.is_file()]
    return [path for path in files if path.name.endswith(WEIGHT_SUFFIXES) == (kind == "weights")]


def _named(root: Path, pattern: str) -> list[Path]:
    """The folders in ``root`` whose names are such, sorted."""
    return sorted(entry for entry in root.iterdir() if re.fullmatch(pattern, entry.name) and entry.is_dir())


def _with_size(folder: Path) -> Facts:
    return {"name": folder.name, "bytes": sum(_size(path) for path in folder.rglob("*") if path.is_file())}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a running job may delete it meanwhile
        return 0


def in_words(facts: Facts) -> list[str]:
    """The facts of a folder, as lines for people."""
    return _root_in_words(facts) if facts["kind"] == "checkpoint-path" else _folder_in_words(facts)


def _folder_in_words(facts: Facts) -> list[str]:
    model, training, sizes, counts, away = (facts[key] for key in ("model", "training", "bytes", "num_files", "on_other_hosts"))
    rows = [("model", _model_in_words(model) if model else f"unknown: no {CONFIG} of a known family can be read")]
    if training:
        rows += _training_rows(training)
    if facts["adapter"] is not None:
        rows.append(("adapter", _adapter_in_words(facts["adapter"])))
    dtypes = " and ".join(facts["weight_dtypes"]) or "none that can be read"
    rows.append(("weights", f"{readable_bytes(sizes['weights'])} in {_files(counts['weights'])}, {dtypes}"))
    if facts["kind"] == "step":
        states = "optimizer states" if facts["has_optimizer_states"] else "no optimizer states"
        masters = "fp32 masters" if facts["has_masters"] else "no fp32 masters" + (" (the weights are fp32)" if dtypes == "float32" else "")
        rows.append(("training state", f"{readable_bytes(sizes['train_state'])} in {_files(counts['train_state'])}, {states}, {masters}"))
    rows.append(("other", f"{readable_bytes(sizes['other'])} in {_files(counts['other'])}"))
    if away["files"]:
        rows.append(("on other hosts", f"{readable_bytes(away['bytes'])} in {_files(len(away['files']))}"))
    what = "a training step" if facts["kind"] == "step" else "a model without training state"
    how = "complete" + (", every byte verified" if facts["verified"] else "") if facts["is_complete"] else _defect(facts)
    lines = [f"{facts['path']}: {what}, {how}", *(f"  {name:<16}{text}" for name, text in rows)]
    return [*lines, *(f"  problem: {text}" for text in facts["problems"]), *(f"  note: {text}" for text in facts["notes"])]


def _defect(facts: Facts) -> str:
    if facts["on_other_hosts"]["files"] and len(facts["problems"]) == 1:
        return "one host's part, whole in itself; the rest is on other hosts"
    return f"NOT complete ({_counted(len(facts['problems']), 'problem')}, listed below)"


def _model_in_words(model: Facts) -> str:
    size = f"{model['num_layers']} layers of width {model['width']}, vocabulary {model['vocab_size']}"
    return f"{model['family']}, {size}, {_number(model['num_parameters'])} parameters"


def _adapter_in_words(adapter: Facts) -> str:
    targets = ", ".join(map(str, adapter["targets"])) if isinstance(adapter.get("targets"), list) else "unknown targets"
    size = f"rank {adapter.get('rank')}, alpha {adapter.get('alpha')}, " if adapter.get("peft_type") == LORA else ""
    return f"{adapter.get('peft_type')}, {size}on {targets}, of {adapter.get('base')}; the weights here are its own alone"


def _training_rows(training: Facts) -> list[tuple[str, str]]:
    """What is known of the run that wrote a step."""
    counts = [
        (f"step {training['step']}", training["step"]),
        (_counted(training["position"], "sequence"), training["position"]),
        (_counted(training["optimizer_step"], "optimizer step"), training["optimizer_step"]),
        (f"{training['num_skipped']} of them skipped", training["num_skipped"]),
    ]
    rows = [("training", ", ".join(text for text, value in counts if value is not None) or "unknown")]
    grid, versions, writers = training["grid"], training["versions"], []
    if isinstance(grid, dict):
        writers.append(f"{_counted(grid.get('stages'), 'stage')} x {_counted(grid.get('replicas'), 'replica')}")
    with_cut = isinstance(training["cut"], list) and all(isinstance(layers, list) and len(layers) == 2 for layers in training["cut"])
    if with_cut:
        writers.append("layers " + " ".join(f"[{first}, {last})" for first, last in training["cut"]))
    if training["num_threads"] is not None:
        writers.append(f"{_counted(training['num_threads'], 'thread')} per rank")
    if isinstance(versions, dict):
        writers.append(" ".join(f"{name} {version}" for name, version in versions.items()))
    scale = training["loss_scale"]
    if isinstance(scale, dict) and scale.get("settings") is not None:
        writers.append(f"loss scale {scale.get('value')}")
    return rows + ([("written by", ", ".join(writers))] if writers else [])


def _root_in_words(facts: Facts) -> list[str]:
    num_steps = len(facts["steps"])
    newest = f"the newest complete one is {facts['newest_complete']}" if facts["newest_complete"] else "none of them is complete here"
    lines = [f"{facts['path']}: {_counted(num_steps, 'step')}, {newest if num_steps else 'nothing to resume'}"]
    for step in facts["steps"]:
        training = step["training"]
        size = readable_bytes(sum(step["bytes"].values()))
        at = f"{training['position']} sequences" if training["position"] is not None else ""
        state = "complete" + (", verified" if step["verified"] else "") if step["is_complete"] else _first_problem(step)
        lines.append(f"  {Path(step['path']).name:<12}{at:>18}{size:>10}  {state}")
    holder = facts["lock_held_by"]
    for rest in facts["partials"]:
        what = "a save that is going on, or was cut off" if holder else "a save that was cut off; the next run here removes it"
        lines.append(f"  {rest['name']:<12}{'':>18}{readable_bytes(rest['bytes']):>10}  {what}")
    for rest in facts["set_aside"]:
        lines.append(
            f"  {rest['name']:<12}{'':>18}{readable_bytes(rest['bytes']):>10}  set aside, never resumed from; delete it when you like"
        )
    return [*lines, f"  lock: {'held by ' + holder if holder else 'free, no job is running here as far as this host sees'}"]


def _first_problem(step: Facts) -> str:
    if step["on_other_hosts"]["files"] and len(step["problems"]) == 1:
        return f"one host's part, whole in itself; {_files(len(step['on_other_hosts']['files']))} are on other hosts"
    more = len(step["problems"]) - 1
    return f"NOT complete: {step['problems'][0]}" + (f" (and {more} more: inspect {step['path']})" if more else "")


def _number(count: int) -> str:
    return next(f"{count / unit:.3g}{name}" if unit else str(count) for unit, name in ((1e9, " G"), (1e6, " M"), (0, "")) if count >= unit)


def _files(count: int) -> str:
    return _counted(count, "file")


def _counted(count: object, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv``; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint.inspect", description="Say what a checkpoint or model folder holds.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a step folder, a model folder or a --checkpoint-path")
    parser.add_argument("--verify", action="store_true", help="read everything and compare it with the sha256 of the manifest")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    arguments = parser.parse_args(argv)

    def work() -> int:
        facts = inspect(expanded(arguments.folder), verify=arguments.verify)
        text = json.dumps(facts, indent=2) if arguments.json else "\n".join(in_words(facts))
        print(text.encode(errors="backslashreplace").decode())  # a damaged file may hold what cannot be printed
        return 0 if facts["is_complete"] else 1

    return exit_status(work, before_error="error: ")


if __name__ == "__main__":
    sys.exit(main())
