"""The families of models this house trains, and what is known of a weight by its name alone, whichever family it is of."""

from collections.abc import Mapping
from typing import Any

from modules.gptj import GPTJConfig
from modules.gptneox import GPTNeoXConfig
from modules.model_config import ModelConfig
from user_error import UserError

FAMILIES: tuple[type[GPTJConfig] | type[GPTNeoXConfig], ...] = (GPTJConfig, GPTNeoXConfig)


def read_model_config(config: Mapping[str, Any]) -> ModelConfig:
    """A Hugging Face ``config.json`` of any family. Raises UserError for another one, and for what would be computed differently."""
    for family in FAMILIES:
        if config.get("model_type") == family.hf_model_type:
            return family.from_hf(config)
    known = " or ".join(family.hf_model_type for family in FAMILIES)
    raise UserError(f"the model_type in config.json must be {known}; it is {config.get('model_type')!r}. Give a model of these families")


def is_legacy_buffer(name: str) -> bool:
    """True for the causal masks and rotary tables that old files carry as tensors: dropped on read, never written."""
    return any(family.names.is_buffer(name) for family in FAMILIES)


def canonical_name(name: str, config: Mapping[str, Any]) -> str:
    """The name of a weight as Hugging Face's own files spell it (a GPT-NeoX head is embed_out.weight, in some files lm_head.weight)."""
    for family in FAMILIES:
        if config.get("model_type") == family.hf_model_type:
            return family.names.canonical(name)
    return name
