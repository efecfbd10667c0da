"""What the parts of a model hold in memory all the time they are trained: parameters, gradients, masters and moments.

Counted on stages without storage, which are built as those that train.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch

from modules.model_config import ModelConfig
from modules.stage import EMBEDDINGS, LM_HEAD, Stage, layer_key_of_index, meta_stage
from optim.build import AdamW

ADAMW_FP32_BYTES = 16  # per parameter: weight 4, gradient 4, two moments 8


class ParameterCounts(NamedTuple):
    """Of one layer, of the embeddings, of the head with the final norm."""

    layer: int
    embeddings: int
    head: int


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """From shapes alone."""
    whole = meta_stage(dataclasses.replace(config, num_layers=1), 0, 1)
    counts = {key: sum(p.numel() for _, p in named) for key, named in whole.parameters_by_layer()}
    return ParameterCounts(counts[layer_key_of_index(0)], counts[EMBEDDINGS], counts[LM_HEAD])


@dataclass(frozen=True, kw_only=True)
class HeldBytes:
    """What one layer, the embeddings and the head with the final norm take all the time, as far as it lies on the device.

    embeddings_gradient, head_gradient: of one micro-batch, which exists whole before it is added; 0 where frozen."""

    layer: int
    embeddings: int
    head: int
    embeddings_gradient: int
    head_gradient: int


def held_bytes(stage: Stage, optimizer: AdamW) -> HeldBytes:
    """Of a stage of one layer, embeddings and head, on the meta device too, and the optimizer of what is trained in it."""
    held = {key: sum(parameter.nbytes for _, parameter in parameters) for key, parameters in stage.parameters_by_layer()}
    gradients = dict.fromkeys(held, 0)
    masters, states = optimizer.masters(), optimizer.state()
    for key, trained in stage.trained_by_layer():
        for name, parameter in trained:
            gradients[key] += parameter.numel() * torch.float32.itemsize
            if masters[name].device == parameter.device:
                held[key] += masters[name].bytes_beside + sum(tensor.nbytes for tensor in states[name].values() if tensor.ndim)
        held[key] += gradients[key]
    layer = layer_key_of_index(0)
    return HeldBytes(
        layer=held[layer],
        embeddings=held[EMBEDDINGS],
        head=held[LM_HEAD],
        embeddings_gradient=gradients[EMBEDDINGS],
        head_gradient=gradients[LM_HEAD],
    )


def held_in_fp32(config: ModelConfig) -> HeldBytes:
    """Where all of the model is trained in fp32 by AdamW."""
    layer, embeddings, head = (count * ADAMW_FP32_BYTES for count in count_parameters(config))
    return HeldBytes(layer=layer, embeddings=embeddings, head=head, embeddings_gradient=embeddings // 4, head_gradient=head // 4)
