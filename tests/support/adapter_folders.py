"""Adapters for the tiny models of conftest.py: made here, written as folders, and opened by peft."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from checkpoint.adapter_folder import adapter_config, write_adapter
from checkpoint.model_folder import ModelFolder, load_stage
from modules.adapters import LoraSettings, adapter_parameters, add_lora, draw_adapters, train_layernorms
from modules.families import read_model_config
from modules.lm_ops import Segments
from modules.model_config import ModelConfig
from modules.stage import Stage, empty_stage

FAMILIES = ("gptj", "gptneox")
SOME_TARGETS = {"gptj": ("q_proj", "v_proj"), "gptneox": ("query_key_value", "dense")}
NUM_LAYERS = 4  # of the tiny models
NORMS = {"gptj": ["ln_1", "ln_f"], "gptneox": ["final_layer_norm", "input_layernorm", "post_attention_layernorm"]}
LINEARS = {
    "gptj": ["fc_in", "fc_out", "k_proj", "out_proj", "q_proj", "v_proj"],
    "gptneox": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
}
IDS = torch.arange(3, 27).reshape(2, 12) * 11 % 320


def settings_for(family: str, *, rank: int = 4, alpha: float = 8.0, targets: tuple[str, ...] | None = None) -> LoraSettings:
    return LoraSettings(rank=rank, alpha=alpha, dropout=0.0, target_modules=SOME_TARGETS[family] if targets is None else targets)


def config_of(folder: Path) -> ModelConfig:
    return read_model_config(ModelFolder.open(folder).config)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Stage:
    """The whole model as one stage."""
    config = config_of(folder)
    stage = empty_stage(config, 0, config.num_layers, dtype=dtype)
    load_stage(stage, ModelFolder.open(folder))
    return stage


@torch.no_grad()
def move(stage: Stage, seed: int = 0) -> None:
    """Give what is trained values as after a training: no B is zero any more, no norm what it was."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(stage).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def adapted(folder: Path, settings: LoraSettings | None, dtype: torch.dtype = torch.float32) -> Stage:
    """The model of ``folder`` with adapters (None: trained LayerNorms) that have moved."""
    stage = load(folder, dtype)
    if settings is None:
        train_layernorms(stage)
    else:
        add_lora(stage, settings)
        draw_adapters(stage, seed=1)
    move(stage)
    return stage


def write_folder(folder: Path, stage: Stage, settings: LoraSettings | None, base: Path) -> Path:
    folder.mkdir()
    tensors = {name: parameter.detach() for name, parameter in adapter_parameters(stage).items()}
    write_adapter(folder, tensors, adapter_config(stage.config, settings, base_model=str(base)))
    return folder


def make_adapter(folder: Path, base: Path, settings: LoraSettings | None) -> Path:
    """An adapter folder of the model in ``base``."""
    return write_folder(folder, adapted(base, settings), settings, base)


def peft_model(base: Path, adapter: Path, **how: Any) -> peft.PeftModel:
    """transformers' model with the adapter, as a user loads it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")  # of LayerNorms; peft looks for their fan-in
        return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, **how).eval()


def segments() -> Segments:
    return Segments.from_positions(torch.arange(IDS.shape[1]).expand(IDS.shape))


def logits(model: Stage | nn.Module) -> Tensor:
    """Of IDS (2, 12), ours or theirs: (2, 12, 320)."""
    if isinstance(model, Stage):
        return model.logits(model(IDS, segments()))
    result: Tensor = model(IDS).logits
    return result


def distance(seen: Tensor, expected: Tensor) -> float:
    """Relative."""
    return ((seen.float() - expected.float()).norm() / expected.float().norm()).item()
