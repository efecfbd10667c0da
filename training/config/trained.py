"""What --train, --base-quantization and --optimizer ask for: settings of adapters, and whether the packages and the linears exist.

Asked before any weight is read, so that a mistake costs nothing.
"""

import dataclasses

import torch

from modules.adapters import LoraSettings, check_targets, import_peft
from modules.model_config import ModelConfig
from modules.quantized import check_nf4_available
from modules.stage import meta_stage
from optim.build import AdamSettings
from optim.eight_bit import EightBitAdamW, check_bitsandbytes
from training.config.train import Config


def lora_settings(config: Config) -> LoraSettings | None:
    """None unless LoRA is trained. Raises UserError."""
    if config.train != "lora":
        return None
    targets = tuple(target for target in (part.strip() for part in config.lora_target_modules.split(",")) if target)
    return LoraSettings(rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout, target_modules=targets)


def check_assembly(config: Config, model_config: ModelConfig, device: torch.device) -> None:
    """What can be known before any weight is read: targets that exist, packages that are there. Raises UserError."""
    if config.train != "all":
        import_peft()
    settings = lora_settings(config)
    if settings is not None:
        check_targets(meta_stage(dataclasses.replace(model_config, num_layers=1), 0, 1), settings)
    if config.base_quantization == "nf4":
        check_nf4_available(device)
    if config.optimizer == "8bit-adam":
        check_bitsandbytes()


def import_packages(config: Config) -> None:
    """What assembling will import, beforehand. Raises UserError where it is missing."""
    if config.train != "all":
        import_peft()
    if config.optimizer == "8bit-adam":
        EightBitAdamW(AdamSettings(beta1=0.0, beta2=0.0, eps=1.0, weight_decay=0.0))
