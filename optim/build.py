"""AdamW over the parameters of a stage, with its state addressed by parameter name.

Decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101) on matrices and embeddings; LayerNorms and biases (every tensor of one
dimension) are not decayed. Updates are element-wise on fp32 masters (masters.py), so no cut of the model changes them. How a piece of a
parameter is updated is a rule: fused AdamW with fp32 moments here, moments in 8 bits in eight_bit.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from optim.masters import Master, MasterForm

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """The flags --adam-beta1 --adam-beta2 --adam-eps --weight-decay."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class UpdateRule(Protocol):
    """How fp32 masters are updated, element by element."""

    def new_state(self, parameter: Tensor, device: torch.device) -> State:
        """Of one parameter before its first update, on ``device``: its moments, and "step", an fp32 scalar."""

    def piece_of(self, state: State, piece: slice) -> State:
        """Views of the part of ``state`` that belongs to a piece of the flattened parameter; "step" is a copy."""

    def update(
        self, masters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State], *, learning_rate: float, decay: float
    ) -> None:
        """Change masters and moments in place, and count "step" on. gradients: fp32, in the shapes of the masters."""


class FusedAdamW:
    """torch's fused AdamW (four times its default on a CPU) with fp32 moments."""

    def __init__(self, settings: AdamSettings) -> None:
        self._settings = settings

    def new_state(self, parameter: Tensor, device: torch.device) -> State:
        pin = device.type == "cpu" and parameter.device.type == "cuda"
        moments = {
            kind: torch.zeros(parameter.shape, dtype=torch.float32, device=device, pin_memory=pin) for kind in ("exp_avg", "exp_avg_sq")
        }
        return {**moments, "step": torch.zeros((), dtype=torch.float32, device=device)}

    def piece_of(self, state: State, piece: slice) -> State:
        moments = {kind: state[kind].view(-1)[piece] for kind in ("exp_avg", "exp_avg_sq")}
        return {**moments, "step": state["step"].clone()}

    def update(
        self, masters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State], *, learning_rate: float, decay: float
    ) -> None:
        adamw(
            list(masters),
            list(gradients),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self._settings.beta1,
            beta2=self._settings.beta2,
            lr=learning_rate,
            weight_decay=decay,
            eps=self._settings.eps,
            maximize=False,
        )


class AdamW:
    """The optimizer of one stage: masters, their states, and the learning rate given per step."""

    def __init__(
        self,
        named_parameters: Mapping[str, nn.Parameter],
        settings: AdamSettings,
        *,
        rule: UpdateRule | None = None,
        masters: MasterForm = "split",
        device: torch.device | None = None,
    ) -> None:
        """named_parameters: those that are trained. rule: default FusedAdamW. masters: of parameters in half precision. device: where
        masters and states lie and are updated; None: beside each parameter."""
        self._parameters = dict(named_parameters)
        self._weight_decay = settings.weight_decay
        self._rule: UpdateRule = rule or FusedAdamW(settings)
        self._masters = {name: Master(parameter, masters, device=device) for name, parameter in self._parameters.items()}
        self._states = {name: self._rule.new_state(parameter, self._masters[name].device) for name, parameter in self._parameters.items()}

    def assign(self, name: str, values: Tensor) -> None:
        """Give the parameter ``name`` and its master their values, from any floating dtype."""
        self._masters[name].assign(values)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update from the current gradients."""
        for decays in (True, False):
            names = [name for name, parameter in self._parameters.items() if (parameter.ndim >= 2) == decays]
            decay = self._weight_decay if decays else 0.0
            own = [name for name in names if self._masters[name].is_own]
            if own:
                masters, gradients = [self._parameters[name].detach() for name in own], [self._gradient(name) for name in own]
                self._rule.update(masters, gradients, [self._states[name] for name in own], learning_rate=learning_rate, decay=decay)
            for name in names:
                if not self._masters[name].is_own:
                    self._step_in_pieces(name, learning_rate, decay)

    def _step_in_pieces(self, name: str, learning_rate: float, decay: float) -> None:
        """So that a master that must be put together never exists whole."""
        master, state, gradient = self._masters[name], self._states[name], self._gradient(name).view(-1)
        for piece in master.pieces():
            values, part = master.read(piece), self._rule.piece_of(state, piece)
            self._rule.update([values], [gradient[piece].to(master.device)], [part], learning_rate=learning_rate, decay=decay)
            master.write(piece, values)
        state["step"] += 1

    def _gradient(self, name: str) -> Tensor:
        gradient = self._parameters[name].grad
        assert gradient is not None and gradient.dtype == torch.float32, f"{name} has no fp32 gradient"
        return gradient

    def masters(self) -> dict[str, Master]:
        """By parameter name."""
        return self._masters

    def state(self) -> dict[str, State]:
        """By parameter name, the optimizer's own tensors: "step" (fp32 scalar) and, with FusedAdamW, exp_avg and exp_avg_sq (shape of the
        parameter, fp32)."""
        return {name: dict(state) for name, state in self._states.items()}

    @torch.no_grad()
    def load_state(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The reverse of state(), of some parameters: values are copied, bit for bit."""
        for name in states:
            own = self._states[name]
            assert set(states[name]) == set(own), f"{name} has {sorted(states[name])}, not {sorted(own)}"
            for kind, tensor in own.items():
                tensor.copy_(states[name][kind])
