"""What of a stage is trained when not all of it is: low-rank adapters beside its linears, or its LayerNorms.

LoRA (Hu et al. 2021, arXiv:2106.09685) is peft's: its layers are injected into the blocks of a stage, so that what is trained here is what
``PeftModel.from_pretrained`` computes. Embeddings and head never get one.

Promises: afterwards everything else is frozen; what is trained is float32 whatever the dtype beside it (an update of 1e-5 is lost in bf16),
on the device of its base; fresh adapters depend on seed and name alone, so no cut changes them.
Left to others: the noise of --lora-dropout (dropout.py), files (checkpoint/adapter_folder.py).

A parameter has three names. In the adapted stage: ``transformer.h.17.attn.q_proj.lora_A.default.weight`` (``default`` is peft's name of
the adapter) beside ``transformer.h.17.attn.q_proj.base_layer.weight``. Stored: the same without ``.default`` and ``.base_layer``
(modules.stage.stored_name). In peft's files: that behind ``base_model.model.``, and a LayerNorm's inside ``ln_tuning_layers``.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modules.linear import Linear
from modules.optional import without_bitsandbytes
from modules.stage import Stage, stored_name
from user_error import UserError

ALL_LINEAR = "all-linear"
LORA_A, LORA_B = "lora_A", "lora_B"
_ADAPTER, _BASE = "default", "base_layer"
_PEFT_CASTS = "cast_input_dtype_enabled"
_PEFT_PREFIX, _PEFT_NORM = "base_model.model.", "ln_tuning_layers"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """y = base(x) + alpha / rank * B(A(dropout(x))), for the linears that end with one of ``target_modules``, or for ("all-linear",).

    Raises UserError for a rank, an alpha or a dropout that no adapter can have.
    """

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"the rank of LoRA must be at least 1; it is {self.rank}. Give one such as 8")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"the alpha of LoRA must be a number above 0; it is {self.alpha}. Give one such as 16")
        if not 0 <= self.dropout < 1:
            raise UserError(f"the dropout of LoRA must be at least 0 and below 1; it is {self.dropout}. Give one such as 0.05")

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank


def block_linears(stage: Stage) -> dict[str, nn.Linear]:
    """The linears of one layer, such as ``attn.q_proj``; every layer has the same. ``stage``: not adapted yet."""
    block = next(iter(stage.blocks.children()))
    return {name: part for name, part in block.named_modules() if isinstance(part, nn.Linear)}


def check_targets(stage: Stage, settings: LoraSettings) -> tuple[str, ...]:
    """Raise UserError unless every target of ``settings`` is a linear of the blocks; return the targets, "all-linear" written out, sorted.

    ``stage``: any one of the model, a meta stage of one layer too; not adapted yet.
    """
    linears = list(block_linears(stage))
    there_are = f"its layers have the linears {', '.join(name.rpartition('.')[2] for name in linears)}"
    if settings.target_modules == (ALL_LINEAR,):
        return tuple(sorted(name.rpartition(".")[2] for name in linears))
    wrong = [target for target in settings.target_modules if not any(ends_with(name, target) for name in linears)]
    if wrong or not settings.target_modules:
        what = f"{', '.join(map(repr, wrong))} {'is' if len(wrong) == 1 else 'are'} none" if wrong else "there is none"
        cure = f"Name some of these in --lora-target-modules, or {ALL_LINEAR} alone"
        raise UserError(f"the targets of LoRA must be linears of this {stage.config.model_type}, and {what}: {there_are}. {cure}")
    return tuple(sorted(set(settings.target_modules)))


def ends_with(module_name: str, target: str) -> bool:
    """How peft understands a target: the module's name, or whole parts at its end."""
    return module_name == target or module_name.endswith(f".{target}")


def add_lora(stage: Stage, settings: LoraSettings) -> None:
    """Put adapters beside the targets, in place, and freeze everything else. Their values are undefined: draw or load them.

    ``stage``: with values or on the meta device, its linears nn.Linear of any dtype, 8-bit ones too. No random number is drawn. Convert the
    stage to its dtype before, or the adapters are converted with it. Their weights are fp32 and, as everywhere, they compute in the dtype
    of their input; peft would widen it for each of them, which on a CPU took a fifth of a bf16 step. Raises UserError for targets that
    match nothing, or without peft.
    """
    targets = check_targets(stage, settings)
    peft = import_peft()
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=list(targets))
    # Into the blocks, because a stage is not what peft takes things with a ``config`` for; on meta, because peft draws from torch's
    # one generator and then rounds to the dtype of the base.
    with without_bitsandbytes():
        peft.inject_adapter_in_model(config, stage.blocks, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    stage.requires_grad_(False)
    for part in list(stage.modules()):
        if hasattr(part, LORA_A) and hasattr(part, _BASE):
            device = part.get_parameter(f"{_BASE}.weight").device
            for side in (LORA_A, LORA_B):
                adapters = part.get_submodule(side)
                assert isinstance(adapters, nn.ModuleDict), "peft keeps adapters by name"
                adapters[_ADAPTER] = _of_our_own(adapters[_ADAPTER], device)
            setattr(part, _PEFT_CASTS, False)


def _of_our_own(linear: nn.Module, device: torch.device) -> Linear:
    """``linear`` as a Linear without values."""
    c_out, c_in = linear.get_parameter("weight").shape
    return Linear(c_in, c_out, bias=False, device="meta", dtype=torch.float32).to_empty(device=device)


@torch.no_grad()
def draw_adapters(stage: Stage, seed: int) -> None:
    """Fill the adapters of ``stage`` as peft does: A uniform within 1/sqrt(fan in) (kaiming_uniform_ with a = sqrt 5), B zero.

    A comes from a generator seeded by (seed, stored name) alone, on the CPU: no cut, rank or device changes it.
    """
    for name, parameter in adapter_parameters(stage).items():
        if _side(name) == LORA_A:
            digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            bound = 1 / math.sqrt(parameter.shape[1])
            parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
        elif _side(name) == LORA_B:
            parameter.zero_()


def train_layernorms(stage: Stage) -> None:
    """Make the LayerNorms of ``stage`` float32 and trained, those of the layers and the final one, and freeze everything else."""
    stage.requires_grad_(False)
    for part in stage.modules():
        if isinstance(part, nn.LayerNorm):
            part.to(torch.float32).requires_grad_(True)


def adapter_parameters(stage: Stage) -> dict[str, nn.Parameter]:
    """Stored name -> parameter of all that is trained, in the order of the stage."""
    return {stored_name(name): parameter for name, parameter in stage.named_parameters() if parameter.requires_grad}


def peft_name(stored: str) -> str:
    """What peft's adapter_model.safetensors calls an adapter or a trained LayerNorm."""
    if _side(stored) is not None:
        return f"{_PEFT_PREFIX}{stored}"
    module, _, leaf = stored.rpartition(".")
    return f"{_PEFT_PREFIX}{module}.{_PEFT_NORM}.{leaf}"


def from_peft_name(name: str) -> str:
    """The stored name; of a name that peft would not give, something that is no stored name either."""
    stored = name.removeprefix(_PEFT_PREFIX).replace(f".{_PEFT_NORM}.", ".")
    return stored if peft_name(stored) == name else f"{name} (not named as peft does)"


def adapter_names(module_name: str) -> tuple[str, str]:
    """The stored names of A and B beside the linear ``module_name``."""
    return f"{module_name}.{LORA_A}.weight", f"{module_name}.{LORA_B}.weight"


def adapter_shapes(linear: nn.Linear, rank: int) -> tuple[torch.Size, torch.Size]:
    """Of A (rank, C_in) and B (C_out, rank)."""
    return torch.Size((rank, linear.in_features)), torch.Size((linear.out_features, rank))


def merge_into(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
    """weight (rows, C_in) += scaling * b (rows, rank) @ a (rank, C_in), in place and in the dtype of ``weight``."""
    weight.addmm_(b.to(weight.dtype), a.to(weight.dtype), alpha=scaling)


def import_peft() -> Any:
    """The package. Raises UserError, with what to install, where it is missing."""
    try:
        with without_bitsandbytes():
            import peft
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise UserError("LoRA and adapter folders need the package peft, and it is not installed. Run: pip install peft") from error
    return peft


def _side(stored: str) -> str | None:
    parts = stored.split(".")
    return parts[-2] if len(parts) > 1 and parts[-2] in (LORA_A, LORA_B) else None
