"""Training state on disk, per layer: what the optimizer reads besides the weights, under the weights' names.

    <step>/train_state/<layer key>.safetensors    exp_avg/<name>, exp_avg_sq/<name>, step/<name>, and master/<name> where it is needed
    <step>/train_state/trainer.json               all that is not a tensor, written by StepWriter.commit

``master/<name>`` is the fp32 tensor that the optimizer updates; it is stored only where the weight file, in the model's own dtype, would
round it. Names are the weights' own, so state is found again at any pipeline degree. Loads are strict and copy: bit for bit what was
saved.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.manifest import TRAINER_FILE
from checkpoint.model_folder import listed, read_json_object
from checkpoint.weight_file import WeightFile
from user_error import UserError

TRAINER_FORMAT = 2
MOMENTS = ("exp_avg", "exp_avg_sq")


def pack_train_state(
    masters: Mapping[str, Tensor], optimizer_state: Mapping[str, Mapping[str, Any]], file_dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """The tensors of one layer's training state, for StepWriter.write_train_state. Nothing is copied: write them before the next update.

    masters: name -> the fp32 tensor that the optimizer updates (the parameter itself where that is fp32). optimizer_state: name -> AdamW's
    state of it (step, exp_avg, exp_avg_sq), or {} where no update has happened yet: zeros are stored, which is what AdamW starts from.
    file_dtypes: name -> dtype of the weight in the layer's file.
    """
    tensors: dict[str, Tensor] = {}
    for name, master in masters.items():
        assert master.dtype == torch.float32, f"the optimizer updates fp32 tensors; {name} is {master.dtype}"
        state = optimizer_state.get(name, {})
        for moment in MOMENTS:
            tensors[f"{moment}/{name}"] = state[moment] if state else torch.zeros_like(master)
        tensors[f"step/{name}"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32)
        if file_dtypes[name] != torch.float32:
            tensors[f"master/{name}"] = master
    return tensors


def read_layer_state(
    file: WeightFile, shapes: Mapping[str, torch.Size], file_dtypes: Mapping[str, torch.dtype]
) -> dict[str, dict[str, Tensor]]:
    """name -> {"exp_avg", "exp_avg_sq", "step"[, "master"]} for every parameter of a layer, on the CPU in storage of its own.

    shapes: of the layer's parameters. file_dtypes: of the same in the layer's weight file; "master" is there where that is not fp32.
    Raises UserError listing what is missing, extra or of a wrong shape or dtype.
    """
    expected: dict[str, torch.Size] = {}
    for name, shape in shapes.items():
        kinds = [*MOMENTS, "master"] if file_dtypes[name] != torch.float32 else list(MOMENTS)
        expected |= {f"{kind}/{name}": shape for kind in kinds} | {f"step/{name}": torch.Size()}
    wrong = [n for n, spec in sorted(file.specs.items()) if n in expected and (spec.shape, spec.dtype) != (expected[n], torch.float32)]
    problems = [
        *listed("missing", sorted(set(expected) - set(file.specs))),
        *listed("extra", sorted(set(file.specs) - set(expected))),
        *listed("wrong shape or dtype", wrong),
    ]
    if problems:
        raise UserError(f"the training state in {file.path} does not fit this model: {'; '.join(problems)}. Resume from an older step.")
    loaded: dict[str, dict[str, Tensor]] = {}
    for stored in expected:
        kind, _, name = stored.partition("/")
        loaded.setdefault(name, {})[kind] = _own(file.read(stored))
    return loaded


def read_trainer_state(step_folder: Path) -> dict[str, Any]:
    """What commit was given as ``trainer``. Raises UserError if it is missing, unreadable or of another format than this version's."""
    content = read_json_object(step_folder / TRAINER_FILE)
    if content.pop("format", None) != TRAINER_FORMAT:
        seen = f"{step_folder / TRAINER_FILE} was written by another version (this one reads format {TRAINER_FORMAT})"
        raise UserError(f"{seen}. Resume with that version, or from another step.")
    return content


def _own(mapped: Tensor) -> Tensor:
    """A copy in torch's own, 64-byte aligned storage: kernels round differently on what lies at other addresses."""
    return torch.empty_like(mapped).copy_(mapped)
