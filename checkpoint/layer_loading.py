"""One layer of a training checkpoint into a stage: weights, fp32 masters and optimizer states, strictly.

Left to others: where the two files lie, in this host's folder or another's (training/resuming.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from checkpoint.model_folder import listed
from checkpoint.train_state import read_layer_state
from checkpoint.weight_file import WeightFile
from user_error import UserError


@torch.no_grad()
def load_layer(
    parameters: Sequence[tuple[str, nn.Parameter]], weights: WeightFile, state: WeightFile | None
) -> dict[str, dict[str, Tensor]]:
    """Copy a layer's weights into ``parameters``, from the masters where the weight file is narrower; return name -> optimizer state.

    ``state`` None (a checkpoint without optimizer states): the weights alone, and {}. Copies, because kernels round differently on what
    lies at the addresses of a mapped file. Raises UserError listing what is missing, extra or of a wrong shape or dtype, before anything
    is copied.
    """
    expected = dict(parameters)
    wrong = [n for n in expected if n in weights.specs and weights.specs[n].shape != expected[n].shape]
    problems = [
        *listed("missing", sorted(set(expected) - set(weights.specs))),
        *listed("extra", sorted(set(weights.specs) - set(expected))),
        *listed("wrong shape", wrong),
    ]
    if problems:
        raise UserError(f"{weights.path} does not fit this model: {'; '.join(problems)}. Resume from an older step.")
    file_dtypes = {name: weights.specs[name].dtype for name in expected}
    states = {} if state is None else read_layer_state(state, {n: p.shape for n, p in expected.items()}, file_dtypes)
    for name, parameter in expected.items():
        master = states[name].pop("master", None) if states else None
        parameter.data.copy_(weights.read(name) if master is None else master)
    return states
