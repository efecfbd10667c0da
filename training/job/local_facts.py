"""What one rank can find out alone, before it talks to anybody: its place, interface, device, and the model from its headers.

Reads no weight and writes nothing. Every mistake found here is a UserError; membership/announce.py takes it to the other ranks.
"""

import importlib.util
from dataclasses import dataclass

import torch

from checkpoint.model_folder import ModelFolder, check_model_folder, resolve_model_folder
from comms.codecs import check_width
from comms.interfaces import Interface, check_not_public, choose_interface, select_for_transport
from comms.place import Place, place_of
from modules.families import read_model_config
from modules.model_config import ModelConfig
from pipeline_parallel.partition import Cut, cut_by_num_layers, cut_by_stage_layers, even_cut, parse_stage_layers
from training.config.train import Config
from training.config.trained import check_assembly
from user_error import UserError


@dataclass(frozen=True, kw_only=True)
class LocalFacts:
    """What one rank found out without talking to anybody."""

    place: Place
    interface: Interface
    device: torch.device
    backend: str
    model: ModelFolder
    model_config: ModelConfig
    cut: Cut


def look_around(config: Config) -> LocalFacts:
    """Everything this rank can check alone. Raises UserError."""
    assert config.data_group_size is not None and config.rank is not None and config.model_name is not None, "parse_config filled these in"
    if config.rank == 0 and config.train_log_backend == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("--train-log-backend wandb needs the package wandb; install it with: pip install wandb")
    place = place_of(config.rank, dp_size=config.data_group_size, pp_size=config.num_stages)
    interface = choose_interface(config.net_interface, config.door.host)
    check_not_public(interface, allowed=config.allow_public_interface)
    select_for_transport(interface)
    device, backend = _device_and_backend(config)
    open_folder = ModelFolder.open if config.load_pretrained_model else ModelFolder.open_config
    model = open_folder(resolve_model_folder(config.model_name))
    model_config = read_model_config(model.config)
    check_model_folder(model, model_config)
    check_fit(config, model, model_config)
    check_assembly(config, model_config, device)
    cut = cut_of(config, model_config.num_layers)
    return LocalFacts(place=place, interface=interface, device=device, backend=backend, model=model, model_config=model_config, cut=cut)


def check_fit(config: Config, model: ModelFolder, model_config: ModelConfig) -> None:
    """What flags must have in common with the model, whose configuration is ``model_config``. Raises UserError."""
    if config.model_type not in (None, model_config.model_type):
        raise UserError(
            f"--model-type must be that of the model; it is {config.model_type}, {model.path / 'config.json'} says "
            f"{model.config.get('model_type')!r}, which is {model_config.model_type}. Leave it out, or give another --model-name"
        )
    if config.embedding_dim not in (None, model_config.width):
        raise UserError(
            f"--embedding-dim must be the model's width; it is {config.embedding_dim}, config.json says {model_config.width}. Leave it out"
        )
    if config.seq_length > model_config.num_positions:
        raise UserError(
            f"--seq-length must not exceed the model's positions; it is {config.seq_length}, config.json says "
            f"{model_config.num_positions}. "
            f"Use {model_config.num_positions} or less"
        )
    for wire_dtype in (config.wire_dtype, config.wire_dtype_grad or "none") if config.num_stages > 1 else ():
        check_width(wire_dtype, model_config.width)


def cut_of(config: Config, num_layers: int) -> Cut:
    """As the flags ask for; where it is to be measured, the even one until then."""
    if config.stage_layers is not None:
        return cut_by_stage_layers(num_layers, config.num_stages, parse_stage_layers(config.stage_layers))
    if config.num_layers is not None:
        return cut_by_num_layers(num_layers, config.num_stages, config.num_layers)
    return even_cut(num_layers, config.num_stages)


def _device_and_backend(config: Config) -> tuple[torch.device, str]:
    has_cuda = torch.cuda.is_available() if config.device != "cpu" else False
    if config.device == "cuda" and not has_cuda:
        raise UserError(
            "--device cuda needs a GPU that torch can use; torch.cuda.is_available() is false. Install the CUDA build of "
            "torch, or use --device cpu"
        )
    backend = config.dp_backend or ("nccl" if has_cuda else "gloo")
    if not has_cuda:
        if backend == "nccl":
            raise UserError("--dp-backend nccl carries CUDA tensors only, and this rank computes on the CPU; use --dp-backend gloo")
        return torch.device("cpu"), backend
    assert config.cuda_id is not None, "parse_config filled it in"
    if config.cuda_id >= torch.cuda.device_count():
        raise UserError(f"--cuda-id must be 0 .. {torch.cuda.device_count() - 1} on this host; it is {config.cuda_id}")
    torch.cuda.set_device(config.cuda_id)
    return torch.device("cuda", config.cuda_id), backend
