"""The five choices of precision, from the flags and the device: parameters, compute, gradients, masters, wire.

    flag      parameters   hidden states               gradients   masters                    wire between stages
    (none)    fp32         fp32                        fp32        the parameters             fp32
    --bf16    bf16         bf16                        fp32        bf16 + 16 bits, or fp32    bf16
    --fp16    fp16         fp16, on a CPU fp32         fp32        fp32                       as the hidden states

Attention scores, softmax, norms and the loss add up in fp32 in all of them; --wire-dtype compresses the wire further.
"""

from dataclasses import dataclass

import torch

from modules.stage import compute_dtype
from optim.loss_scale import LossScaleSettings
from optim.masters import MasterForm
from training.config.train import Config

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
GRADIENT_BYTES = 4  # per parameter that is trained


@dataclass(frozen=True, kw_only=True)
class Precision:
    """``loss_scale`` None: gradients need none."""

    parameters: torch.dtype
    compute: torch.dtype
    masters: MasterForm
    loss_scale: LossScaleSettings | None

    @property
    def master_bytes(self) -> int:
        """Per parameter, beside the parameter itself."""
        if self.parameters == torch.float32:
            return 0
        return 2 if self.parameters == torch.bfloat16 and self.masters == "split" else 4


def precision_of(config: Config, device: torch.device) -> Precision:
    """What ``config`` asks for on ``device``."""
    parameters = torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else torch.float32
    loss_scale = None
    if config.fp16:
        loss_scale = LossScaleSettings(
            static=config.loss_scale,
            initial=config.initial_loss_scale,
            window=config.loss_scale_window,
            minimum=config.min_loss_scale,
            hysteresis=config.loss_scale_hysteresis,
        )
    return Precision(parameters=parameters, compute=compute_dtype(parameters, device), masters=config.master_weights, loss_scale=loss_scale)
