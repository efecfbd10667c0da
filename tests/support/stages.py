"""Stages of the models on disk."""

from pathlib import Path

import torch

from checkpoint.model_folder import ModelFolder, load_stage
from modules.families import read_model_config
from modules.stage import Stage, empty_stage


def load(folder: Path, first: int = 0, last: int | None = None, dtype: torch.dtype = torch.float32) -> Stage:
    opened = ModelFolder.open(folder)
    config = read_model_config(opened.config)
    stage = empty_stage(config, first, config.num_layers if last is None else last, dtype=dtype)
    load_stage(stage, opened)
    return stage
