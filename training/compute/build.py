"""The stage that this rank trains, put together from the flags: precision, what is frozen and in how many bits, adapters, dropout.

    meta stage -> frozen linears quantised -> storage -> adapters or trained norms -> values, weight by weight as they are read

Promises: whatever is frozen is filled straight from the mapped files, so memory stays one tensor above the result. Left to others: which
files (training/checkpoints/loading.py), the optimizer (optim/).
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint.adapter_folder import ADAPTER_CONFIG, adapter_config
from checkpoint.companions import read_companions
from checkpoint.layer_store import StepWeights
from checkpoint.model_folder import ModelFolder
from checkpoint.tensor_file import json_bytes
from checkpoint.weight_file import TensorSpec
from comms.spans import Spans
from modules.adapters import add_lora, check_targets, draw_adapters, train_layernorms
from modules.dropout import seed_lora_dropout
from modules.model_config import ModelConfig
from modules.quantized import quantize_linears, quantized_parts
from modules.stage import Stage, meta_stage, stored_name
from optim.build import AdamSettings, AdamW
from optim.eight_bit import EightBitAdamW
from training.config.flags import flag_name
from training.config.precision import Precision
from training.config.train import Config
from training.config.trained import lora_settings
from user_error import UserError


def assemble_stage(config: Config, model_config: ModelConfig, layers: tuple[int, int], device: torch.device, precision: Precision) -> Stage:
    """layers: [first, last). Storage without values, but for fresh adapters; on the meta device without those."""
    stage = meta_stage(dataclasses.replace(model_config, dropout=config.dropout), *layers).to(precision.parameters)
    stage.compute_dtype = precision.compute
    if config.base_quantization != "none":
        quantize_linears(
            stage,
            config.base_quantization,
            with_ends=config.quantize_ends,
            bias_dtype=precision.parameters,
            embedding_dtype=stage.compute_dtype,
        )
    stage.to_empty(device=device)
    settings = lora_settings(config)
    if settings is not None:
        add_lora(stage, settings)
        if device.type != "meta":
            draw_adapters(stage, config.seed)
        seed_lora_dropout(stage)
    elif config.train == "layernorm":
        train_layernorms(stage)
    stage.recomputes = config.recompute == "layer"
    return stage


def make_optimizer(config: Config, stage: Stage, precision: Precision) -> AdamW:
    """Over what is trained, by stored names."""
    settings = AdamSettings(beta1=config.adam_beta1, beta2=config.adam_beta2, eps=config.adam_eps, weight_decay=config.weight_decay)
    trained = {name: parameter for _, layer in stage.trained_by_layer() for name, parameter in layer}
    return AdamW(
        trained,
        settings,
        rule=EightBitAdamW(settings) if config.optimizer == "8bit-adam" else None,
        masters=precision.masters,
        device=torch.device("cpu") if config.optimizer_offload == "cpu" else None,
    )


class WeightTaker:
    """Where the weights of a model folder go, by their stored names."""

    def __init__(self, stage: Stage, optimizer: AdamW | None) -> None:
        """optimizer: None where nothing is trained."""
        self._optimizer = optimizer
        whole = meta_stage(stage.config, stage.first, stage.last)
        self.shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}  # of what a folder must hold for this stage
        self._parameters = {stored_name(name): parameter for name, parameter in stage.named_parameters()}
        parts = quantized_parts(stage)
        self._fill: dict[str, Callable[[Tensor, str], None]] = {f"{stored_name(name)}.weight": part.fill_ for name, part in parts.items()}
        self._trained = set() if optimizer is None else set(optimizer.masters())

    @torch.no_grad()
    def take(self, name: str, values: Tensor) -> None:
        """``values``: in any floating dtype, maybe in a mapped file; copied, rounded or quantised. Raises UserError for what is not finite
        and would be quantised."""
        if self._parameters[name].dtype == torch.float16:
            _check_fits_fp16(name, values)
        if self._optimizer is not None and name in self._trained:
            self._optimizer.assign(name, values)
        elif name in self._fill:
            self._fill[name](values, name)
            return
        else:
            parameter: nn.Parameter = self._parameters[name]
            parameter.copy_(values)


def _check_fits_fp16(name: str, values: Tensor) -> None:
    """Raise UserError for a weight that would become infinite: every step would then be skipped."""
    largest = max(abs(float(bound)) for bound in torch.aminmax(values))
    if largest > torch.finfo(torch.float16).max:
        raise UserError(f"--fp16 holds numbers up to 65504, and {name} has {largest:g}. Use --bf16, which holds what fp32 does")


def step_weights(config: Config, model: ModelFolder, model_config: ModelConfig) -> StepWeights:
    """What a checkpoint holds: the whole model, or what is trained of it, which is fp32."""
    if config.train == "all":
        return StepWeights.of(model)
    stage = meta_stage(model_config, 0, model_config.num_layers)
    settings = lora_settings(config)
    if settings is not None:
        add_lora(stage, settings)
    else:
        train_layernorms(stage)
    trained = (entry for _, layer in stage.trained_by_layer() for entry in layer)
    return StepWeights(specs={name: TensorSpec(dtype=torch.float32, shape=parameter.shape) for name, parameter in trained}, is_adapter=True)


def step_companions(config: Config, model: ModelFolder, model_config: ModelConfig, tokenizer: Path) -> dict[str, bytes]:
    """On rank 0: the files beside the weights of a checkpoint; for adapters peft's configuration too."""
    contents = read_companions([model.path, tokenizer], dtypes={model.dtype(name) for name in model.names()})
    if config.train != "all":
        assert config.model_name is not None, "parse_config requires it"
        base = config.model_name if not Path(config.model_name).exists() else str(model.path.absolute())
        contents[ADAPTER_CONFIG] = json_bytes(adapter_config(model_config, lora_settings(config), base_model=base))
    return dict(contents)


def check_same_training(
    config: Config, model_config: ModelConfig, saved_flags: Mapping[str, Any], folder: Path, *, has_optimizer: bool
) -> None:
    """Raise UserError if the checkpoint in ``folder`` holds another part of the model than ``config`` trains, or moments in another form.

    saved_flags: those of the run that wrote it; flags that it did not know had their defaults.
    """
    then = {field.name: saved_flags.get(field.name, field.default) for field in dataclasses.fields(Config)}
    rule = f"a run goes on training what it began with; {folder} was saved with"
    cure = "Set it back, or use another --checkpoint-path"
    names = ["train"] if then["train"] != config.train or config.train != "lora" else ["lora_rank", "lora_alpha", "lora_target_modules"]
    differing = [name for name in names if then[name] != getattr(config, name)]
    if differing == ["lora_target_modules"]:  # all-linear may have been written out
        stage = meta_stage(dataclasses.replace(model_config, num_layers=1), 0, 1)
        both = (lora_settings(config), lora_settings(dataclasses.replace(config, lora_target_modules=then["lora_target_modules"])))
        if len({check_targets(stage, settings) for settings in both if settings is not None}) == 1:
            differing = []
    if differing:
        said = ", ".join(f"{flag_name(name)} {then[name]}, now it is {getattr(config, name)}" for name in differing)
        raise UserError(f"{rule} {said}. {cure}")
    if has_optimizer and then["optimizer"] != config.optimizer:
        raise UserError(
            f"moments in 8 bits and in fp32 are not each other's; {folder} was saved with --optimizer {then['optimizer']}, now it is "
            f"{config.optimizer}. {cure}"
        )


def base_fingerprint(config: Config, model: ModelFolder, spans: Spans) -> str | None:
    """What the weights that are read from --model-name are, the same on all ranks if they read the same; None where they are drawn."""
    if not config.load_pretrained_model:
        return None
    if model.is_int8:
        return f"8 bits, {model.digest()}"  # to read 8-bit files takes as long as to train a step
    with spans.part("comparing the models of all ranks", len(model.names()), "weights") as part:
        return model.fingerprint(part.add)
