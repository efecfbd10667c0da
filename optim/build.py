"""AdamW over the parameters of a stage, with its state addressed by parameter name.

Decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101) on matrices and embeddings; LayerNorms and biases (every tensor of one
dimension) are not decayed. Updates are element-wise, so no cut of the model changes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """The flags --adam-beta1 --adam-beta2 --adam-eps --weight-decay."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class AdamW:
    """torch's fused AdamW (four times its default on a CPU) with the learning rate given per step and state by name."""

    def __init__(self, named_parameters: Mapping[str, nn.Parameter], settings: AdamSettings) -> None:
        self._named = dict(named_parameters)
        decayed = [p for p in self._named.values() if p.ndim >= 2]
        plain = [p for p in self._named.values() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
        )

    def step(self, learning_rate: float) -> None:
        """One update from the current gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """By parameter name: exp_avg and exp_avg_sq (shape of the parameter, fp32) and step (fp32 scalar); {} before the first update."""
        return {name: dict(self._optimizer.state.get(parameter, {})) for name, parameter in self._named.items()}

    def load_state(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The reverse of state(); the tensors become the optimizer's own."""
        assert set(states) == set(self._named), "optimizer states are strict: one per parameter of the stage"
        for name, parameter in self._named.items():
            state = states[name]
            self._optimizer.state[parameter] = {
                "step": state["step"].to(parameter.device),
                "exp_avg": state["exp_avg"].to(parameter.device),
                "exp_avg_sq": state["exp_avg_sq"].to(parameter.device),
            }
