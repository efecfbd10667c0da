"""Training state on disk, per layer: what the optimizer reads besides the weights, under the weights' names.

    <step>/train_state/<layer key>.safetensors    KIND/<name> for every kind of the optimizer's state, and master/<name> where it is needed
    <step>/train_state/trainer.json               all that is not a tensor, written by StepWriter.commit

AdamW's kinds are exp_avg, exp_avg_sq (fp32, in the shape of the weight) and step (an fp32 scalar). ``master/<name>`` is the fp32 tensor
that the optimizer updates; it is stored only where the weight file, in the model's own dtype, would round it. Names are the weights' own,
so state is found again at any pipeline degree. Loads are strict and copy: bit for bit what was saved.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.manifest import TRAINER_FILE
from checkpoint.model_folder import listed, read_json_object
from checkpoint.tensor_file import Composed
from checkpoint.weight_file import TensorSpec, WeightFile
from user_error import UserError

TRAINER_FORMAT = 2
MASTER = "master"

StateSpecs = Mapping[str, Mapping[str, TensorSpec]]  # parameter -> kind -> dtype and shape


def pack_train_state(
    masters: Mapping[str, Tensor | Composed], optimizer_state: Mapping[str, Mapping[str, Tensor]], file_dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor | Composed]:
    """The tensors of one layer's training state, for StepWriter.write_train_state. Nothing is copied: write them before the next update.

    masters: name -> the fp32 tensor that the optimizer updates (the parameter itself where that is fp32). optimizer_state: name -> kind ->
    tensor, of these names at least. file_dtypes: name -> dtype of the weight in the layer's file.
    """
    tensors: dict[str, Tensor | Composed] = {}
    for name, master in masters.items():
        assert master.dtype == torch.float32, f"the optimizer updates fp32 tensors; {name} is {master.dtype}"
        tensors |= {f"{kind}/{name}": tensor for kind, tensor in optimizer_state[name].items()}
        if file_dtypes[name] != torch.float32:
            tensors[f"{MASTER}/{name}"] = master
    return tensors


def read_layer_state(
    file: WeightFile, specs: StateSpecs, progress: Callable[[int], object] = lambda num_bytes: None
) -> dict[str, dict[str, Tensor]]:
    """name -> kind -> tensor for every parameter of a layer, on the CPU in storage of its own.

    specs: of the optimizer's state, and of "master" where the weight file is not fp32. ``progress`` hears the bytes just read. Raises
    UserError listing what is missing, extra or of a wrong shape or dtype.
    """
    expected = {f"{kind}/{name}": spec for name, kinds in specs.items() for kind, spec in kinds.items()}
    wrong = [n for n, spec in sorted(file.specs.items()) if n in expected and spec != expected[n]]
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
        progress(file.specs[stored].num_bytes)
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
