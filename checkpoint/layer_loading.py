"""One layer of a training checkpoint into a stage: weights, fp32 masters and optimizer states, strictly.

Left to others: where the two files lie, in this host's folder or another's (training/checkpoints/discovery.py).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from checkpoint.model_folder import listed
from checkpoint.train_state import MASTER, StateSpecs, read_layer_state
from checkpoint.weight_file import TensorSpec, WeightFile
from user_error import UserError


def load_layer(
    shapes: Mapping[str, torch.Size],
    weights: WeightFile,
    state: WeightFile | None,
    specs: StateSpecs,
    assign: Callable[[str, Tensor], None],
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> dict[str, dict[str, Tensor]]:
    """Hand every weight of a layer to ``assign``, the master where the weight file is narrower; return name -> optimizer state.

    shapes: of the weights. specs: of their optimizer states. ``state`` None (a checkpoint without optimizer states): the weights alone, and
    {}. What ``assign`` gets may lie in a mapped file: it copies, because kernels round differently on what lies at such addresses.
    ``progress`` hears the bytes just loaded. Raises UserError listing what is missing, extra or of a wrong shape or dtype, before anything
    is handed out.
    """
    expected = dict(shapes)
    wrong = [n for n in expected if n in weights.specs and weights.specs[n].shape != expected[n]]
    problems = [
        *listed("missing", sorted(set(expected) - set(weights.specs))),
        *listed("extra", sorted(set(weights.specs) - set(expected))),
        *listed("wrong shape", wrong),
    ]
    if problems:
        raise UserError(f"{weights.path} does not fit this model: {'; '.join(problems)}. Resume from an older step.")
    states: dict[str, dict[str, Tensor]] = {}
    if state is not None:
        masters = {
            name: {MASTER: TensorSpec(dtype=torch.float32, shape=shape)}
            for name, shape in expected.items()
            if weights.specs[name].dtype != torch.float32
        }
        states = read_layer_state(state, {name: {**specs[name], **masters.get(name, {})} for name in expected}, progress)
    for name in expected:
        master = states[name].pop(MASTER, None) if states else None
        assign(name, weights.read(name) if master is None else master)
        progress(weights.specs[name].num_bytes)
    return states
