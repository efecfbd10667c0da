"""An adapter on disk, in peft's form: adapter_config.json beside adapter_model.safetensors, which PeftModel.from_pretrained loads on the
Hugging Face model it was trained on.

LoRA is written as peft's LORA, trained LayerNorms as its LN_TUNING, which names norms by the ends of their names and so takes the final one
too. Promises: reading proves from headers that the folder holds exactly the adapters that its configuration and the model ask for; whatever
of peft would change the arithmetic and is not implemented here is refused by its name, also what peft will invent later; no pickle is read.
Left to others: adding adapters into a model (adapter_merge.py), which step is taken and what else lies in its folder.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint.model_folder import WEIGHT_DTYPES, listed, read_json_object
from checkpoint.tensor_file import FileRecord, TensorSource, write_json_file, write_tensor_file
from checkpoint.weight_file import FETCH_AGAIN, StoredWeight, is_text, open_weight_file
from modules.adapters import (
    LoraSettings,
    adapter_names,
    adapter_shapes,
    check_targets,
    ends_with,
    from_peft_name,
    import_peft,
    peft_name,
)
from modules.model_config import ModelConfig
from modules.stage import meta_stage
from user_error import UserError

ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LORA, LAYERNORM = "LORA", "LN_TUNING"  # peft's peft_type
_LARGEST = 2**31  # of rank and alpha, either of which a file claims to be larger only by mistake
# What an adapter_config.json may say: it is read here, or does not change what is computed from the tensors. All else must be off.
_READ_OR_HARMLESS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "r", "lora_alpha", "lora_dropout", "use_rslora", "runtime_config", "layers_pattern"),
    *("loftq_config", "corda_config", "eva_config", "lora_ga_config"),  # of ways to begin, which init_lora_weights must choose
    *("megatron_core", "qalora_group_size"),  # parameters of what megatron_config and use_qalora turn on
    "fan_in_fan_out",  # peft turns it off for an nn.Linear
}
_HARMLESS_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")  # the others take their part out of the base's weight


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter folder, open. config: its adapter_config.json. weights: by their stored names (modules.adapters).

    lora: None for trained LayerNorms. scaling: the factor of B A, alpha / rank or, with use_rslora, alpha / sqrt(rank) (arXiv:2312.03732).
    """

    path: Path
    config: Mapping[str, Any]
    weights: Mapping[str, StoredWeight]
    lora: LoraSettings | None
    scaling: float

    @property
    def base_model(self) -> str | None:
        """Folder or hub name of the model it was trained on, as it says itself."""
        name = self.config.get("base_model_name_or_path")
        return name if is_text(name) and name else None

    @property
    def files(self) -> list[Path]:
        """The two that it is made of."""
        return [self.path / ADAPTER_CONFIG, self.path / ADAPTER_WEIGHTS]

    def read(self, name: str) -> Tensor:
        """A tensor by its stored name, as it lies in the mapped file: copy what you keep."""
        weight = self.weights[name]
        return weight.file.read(weight.name)


def is_adapter_folder(path: Path) -> bool:
    """True for a folder that says how to adapt a model."""
    return (path / ADAPTER_CONFIG).is_file()


def adapter_config(model: ModelConfig, settings: LoraSettings | None, *, base_model: str) -> dict[str, Any]:
    """The adapter_config.json of adapters of ``model``: LoRA with ``settings``, or the LayerNorms with None.

    base_model: the folder or hub name that PeftModel's users are to load first. Targets are written out, as other programs expect them.
    Raises UserError for targets that match nothing, or without peft.
    """
    peft = import_peft()
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True}
    stage = meta_stage(model, model.num_layers - 1, model.num_layers)  # with the final norm
    if settings is None:
        norms = {name.rpartition(".")[2] for name, part in stage.named_modules() if isinstance(part, nn.LayerNorm)}
        config = peft.LNTuningConfig(target_modules=sorted(norms), **common)
    else:
        alpha = int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha  # peft calls it an int
        targets = list(check_targets(stage, settings))
        config = peft.LoraConfig(r=settings.rank, lora_alpha=alpha, lora_dropout=settings.dropout, target_modules=targets, **common)
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=_plain))
    return plain


def write_adapter(folder: Path, tensors: Mapping[str, Tensor | TensorSource], config: Mapping[str, Any]) -> list[FileRecord]:
    """Write ``tensors``, by their stored names, and ``config`` into the existing ``folder``; the records of the two new files.

    Memory: one tensor where they are TensorSources. The configuration comes last: without it the folder is no adapter.
    """
    return [write_adapter_weights(folder, tensors), write_json_file(folder / ADAPTER_CONFIG, config, relative_to=folder)]


def write_adapter_weights(folder: Path, tensors: Mapping[str, Tensor | TensorSource]) -> FileRecord:
    """The first file of write_adapter, for who writes adapter_config.json among other files of its kind."""
    return write_tensor_file(folder / ADAPTER_WEIGHTS, [_source(name, tensors[name]) for name in sorted(tensors)], relative_to=folder)


def merge_layer_files(paths: Iterable[Path]) -> dict[str, TensorSource]:
    """The tensors of several files of stored names, such as one per layer, to be read when they are written.

    Raises UserError for a file that is missing or damaged, and for a name that comes twice.
    """
    found: dict[str, StoredWeight] = {}
    for path in paths:
        file = open_weight_file(path)
        for name in file.specs:
            if name in found:
                both = f"{found[name].file.path} and {path}"
                raise UserError(f"every tensor must be in one file, and {name} is in two: {both}. Remove the file of another run.")
            found[name] = StoredWeight(file, name)
    return {name: weight.source(name) for name, weight in found.items()}


def read_adapter(folder: Path, model: ModelConfig) -> Adapter:
    """Open the adapter in ``folder`` and prove from its header that it holds exactly what it says, for ``model``.

    Raises UserError for what is no adapter folder, is of another model, or asks for more than LoRA on linears or trained LayerNorms.
    """
    if not is_adapter_folder(folder):
        rule = f"{folder} is no adapter folder: it holds no {ADAPTER_CONFIG}"
        raise UserError(f"{rule}. Give a folder that peft's save_pretrained or this trainer wrote, or a --checkpoint-path of such.")
    config = read_json_object(folder / ADAPTER_CONFIG)
    kind, where = config.get("peft_type"), folder / ADAPTER_CONFIG
    if kind not in (LORA, LAYERNORM):
        raise UserError(f"an adapter must be of peft's type {LORA} or {LAYERNORM}; {where} says {kind!r}, which cannot be used here")
    _check_features(config, where)
    targets = _targets(config, where)
    lora = _lora_settings(config, targets, where) if kind == LORA else None
    expected = _expected_shapes(model, targets, lora, where)
    weights = _open_weights(folder)
    _check_tensors(weights, expected, folder, model)
    scaling = 1.0 if lora is None else lora.alpha / (math.sqrt(lora.rank) if config.get("use_rslora") else lora.rank)
    return Adapter(path=folder, config=config, weights={name: weights[name] for name in expected}, lora=lora, scaling=scaling)


def _plain(value: Any) -> list[Any]:
    """For json.dumps: sets, sorted so that the same settings give the same bytes."""
    assert isinstance(value, (set, frozenset)), f"adapter_config.json holds no {type(value).__name__}"
    return sorted(value)


def _source(name: str, tensor: Tensor | TensorSource) -> TensorSource:
    if isinstance(tensor, TensorSource):
        return dataclasses.replace(tensor, name=peft_name(name))
    return TensorSource.of(peft_name(name), tensor)


def _open_weights(folder: Path) -> dict[str, StoredWeight]:
    """By stored names."""
    if not (folder / ADAPTER_WEIGHTS).is_file() and (folder / ADAPTER_PICKLE).is_file():
        cure = "Load it with peft where you trust it and save it again with save_pretrained"
        raise UserError(f"adapters are read as safetensors, and {folder / ADAPTER_PICKLE} is a pickle, which can hold code. {cure}")
    file = open_weight_file(folder / ADAPTER_WEIGHTS)
    return {from_peft_name(name): StoredWeight(file, name) for name in file.specs}


def _check_features(config: Mapping[str, Any], where: Path) -> None:
    """Raise UserError for what is on and neither read nor harmless, features that this version has not heard of among them."""
    on = [key for key, value in config.items() if key not in {*_READ_OR_HARMLESS, "bias", "init_lora_weights"} and value]
    if config.get("bias", "none") != "none":
        on.append("bias")
    beginning = config.get("init_lora_weights", True)
    if not any(beginning is known or (isinstance(beginning, str) and beginning == known) for known in _HARMLESS_BEGINNINGS):
        on.append("init_lora_weights")
    if on:
        seen = ", ".join(f"{ascii(key)[1:-1]} {json.dumps(config[key])[:60]}" for key in sorted(on))
        cure = "Merge it with peft itself (merge_and_unload) and convert the model that gives"
        raise UserError(f"{where} asks for what is not implemented here: {seen}. {cure}")


def _targets(config: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    targets = config.get("target_modules")
    if not (isinstance(targets, list) and targets and all(is_text(target) and target for target in targets)):
        seen = json.dumps(targets)[:60]
        cure = "Write the names out; what is trained here, and what peft saves of 'all-linear', has them"
        raise UserError(f"target_modules in {where} must be a list of names, a pattern is not understood; it is {seen}. {cure}")
    return tuple(sorted(set(targets)))


def _lora_settings(config: Mapping[str, Any], targets: Sequence[str], where: Path) -> LoraSettings:
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    numbers = [value for value in (rank, alpha, dropout) if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < 3 or not isinstance(rank, int) or not all(abs(value) < _LARGEST for value in numbers):
        seen = json.dumps([rank, alpha, dropout])[:60]
        raise UserError(
            f"{where} must say r, lora_alpha and lora_dropout as numbers that an adapter can have; they are {seen}. {FETCH_AGAIN}"
        )
    try:
        return LoraSettings(rank=rank, alpha=float(numbers[1]), dropout=float(numbers[2]), target_modules=tuple(targets))
    except UserError as error:
        raise UserError(f"{where} is no adapter's: {error}") from error


def _expected_shapes(model: ModelConfig, targets: Sequence[str], lora: LoraSettings | None, where: Path) -> dict[str, torch.Size]:
    """Stored name -> shape of all that an adapter of ``model`` with these targets holds."""
    modules = dict(meta_stage(model, 0, model.num_layers).named_modules())
    matched = {name: part for name, part in modules.items() if any(ends_with(name, target) for target in targets)}
    wanted: type[nn.Module] = nn.Linear if lora is not None else nn.LayerNorm
    usable = sorted({name.rpartition(".")[2] for name, part in modules.items() if isinstance(part, wanted)})
    others = [f"{name} (a {type(part).__name__})" for name, part in matched.items() if not isinstance(part, wanted)]
    if not matched or others:
        seen = "; ".join(listed("adapts also", others)) if others else f"names {', '.join(targets[:8])}, and none of them is there"
        rule = f"the targets of {where} must be among the {wanted.__name__}s of this {model.model_type}, {', '.join(usable)}"
        raise UserError(f"{rule}; it {seen}. Give an adapter of this model.")
    shapes: dict[str, torch.Size] = {}
    for name, part in matched.items():
        if lora is None:
            shapes |= {f"{name}.{leaf}": parameter.shape for leaf, parameter in part.named_parameters()}
        else:
            assert isinstance(part, nn.Linear)
            shapes |= dict(zip(adapter_names(name), adapter_shapes(part, lora.rank), strict=True))
    return shapes


def _check_tensors(weights: Mapping[str, StoredWeight], expected: Mapping[str, torch.Size], folder: Path, model: ModelConfig) -> None:
    specs = {name: weight.spec for name, weight in weights.items()}
    common = sorted(set(specs) & set(expected))
    shapes = [
        f"{name} is {list(specs[name].shape)}, must be {list(expected[name])}" for name in common if specs[name].shape != expected[name]
    ]
    problems = [
        *listed("missing", sorted(set(expected) - set(specs))),
        *listed("extra", sorted(set(specs) - set(expected))),
        *listed("wrong shape", shapes),
        *listed("not floating-point", [f"{name} is {specs[name].dtype}" for name in common if specs[name].dtype not in WEIGHT_DTYPES]),
    ]
    if problems:
        rule = (
            f"{folder} must hold exactly the adapters that its {ADAPTER_CONFIG} says, for {model.num_layers} layers of width {model.width}"
        )
        raise UserError(f"{rule}, but: {'; '.join(problems)}. Give an adapter of this model, or its model.")
