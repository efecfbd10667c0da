"""AdamW whose moments are kept in 8 bits: 2 bytes a parameter in place of 8 (Dettmers et al. 2022, arXiv:2110.02861).

The arithmetic is bitsandbytes' block-wise kernel, on blocks of 256 elements of one parameter, so no cut of the model changes a bit.
Parameters of fewer than 4096 elements (norms, biases) keep fp32 moments, as in bitsandbytes' own optimizer: they are few and matter.
"""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from modules.optional import import_bitsandbytes
from optim.build import AdamSettings, FusedAdamW, State
from user_error import UserError

BLOCK_ELEMENTS = 256
LEAST_ELEMENTS = 4096
MOMENTS, SCALES = ("exp_avg", "exp_avg_sq"), ("absmax_exp_avg", "absmax_exp_avg_sq")


def check_bitsandbytes() -> None:
    """Raise UserError where the package is missing. Imports nothing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--optimizer 8bit-adam needs the package bitsandbytes; install it with: pip install bitsandbytes")


class EightBitAdamW:
    """An UpdateRule. State of a large parameter: exp_avg and exp_avg_sq as uint8 codes in its shape, their largest magnitudes per block
    (fp32) in absmax_exp_avg and absmax_exp_avg_sq, and "step"; of a small one as FusedAdamW's."""

    def __init__(self, settings: AdamSettings) -> None:
        """Raises UserError where the package is missing."""
        check_bitsandbytes()
        create_dynamic_map = import_bitsandbytes().create_dynamic_map
        self._settings, self._of_small = settings, FusedAdamW(settings)
        self._codes = {signed: create_dynamic_map(signed=signed).float() for signed in (True, False)}  # (256,) what a code stands for

    def new_state(self, parameter: Tensor, device: torch.device) -> State:
        """See UpdateRule."""
        if parameter.numel() < LEAST_ELEMENTS:
            return self._of_small.new_state(parameter, device)
        blocks = -(-parameter.numel() // BLOCK_ELEMENTS)
        codes = {kind: torch.zeros(parameter.shape, dtype=torch.uint8, device=device) for kind in MOMENTS}
        scales = {kind: torch.zeros(blocks, dtype=torch.float32, device=device) for kind in SCALES}
        return {**codes, **scales, "step": torch.zeros((), dtype=torch.float32, device=device)}

    def piece_of(self, state: State, piece: slice) -> State:
        """See UpdateRule; a piece starts at a block."""
        if SCALES[0] not in state:
            return self._of_small.piece_of(state, piece)
        assert piece.start % BLOCK_ELEMENTS == 0, "blocks are not cut"
        blocks = slice(piece.start // BLOCK_ELEMENTS, -(-piece.stop // BLOCK_ELEMENTS))
        codes = {kind: state[kind].view(-1)[piece] for kind in MOMENTS}
        return {**codes, **{kind: state[kind][blocks] for kind in SCALES}, "step": state["step"].clone()}

    def update(
        self, masters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State], *, learning_rate: float, decay: float
    ) -> None:
        """See UpdateRule."""
        small = [i for i, state in enumerate(states) if SCALES[0] not in state]
        if small:
            few = [masters[i] for i in small], [gradients[i] for i in small], [states[i] for i in small]
            self._of_small.update(*few, learning_rate=learning_rate, decay=decay)
        for i in sorted(set(range(len(states))) - set(small)):
            self._update_large(masters[i], gradients[i], states[i], learning_rate, decay)

    def _update_large(self, master: Tensor, gradient: Tensor, state: State, learning_rate: float, decay: float) -> None:
        state["step"] += 1
        settings = self._settings
        signed, unsigned = (self._codes[kind].to(master.device) for kind in (True, False))
        import_bitsandbytes().optimizer_update_8bit_blockwise(
            "adam",  # with decoupled decay: bitsandbytes' AdamW8bit calls it so
            gradient,
            master,
            state["exp_avg"],
            state["exp_avg_sq"],
            settings.beta1,
            settings.beta2,
            0.0,
            0.0,
            settings.eps,
            int(state["step"]),
            learning_rate,
            signed,
            unsigned,
            state["absmax_exp_avg"],
            state["absmax_exp_avg_sq"],
            decay,
        )
