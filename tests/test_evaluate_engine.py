"""Losses of whole sequences out of the running stages: Hugging Face's numbers, the same bits at every cut, no trace in the training."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from conftest import make_model
from harness import example_tokens, run_ranks
from safetensors.torch import load_file, save_file
from test_parity import load
from transformers import AutoModelForCausalLM

from checkpoint.model_folder import ModelFolder, load_stage
from comms.groups import join_process_group, make_groups
from comms.links import PeerLost
from comms.place import place_of
from comms.spans import Spans
from modules.families import read_model_config
from modules.lm_ops import IGNORED_TARGET, Segments, best_of_each_row, losses_of_tokens
from modules.quantized import Int8Linear
from modules.stage import Stage, compute_dtype
from pipeline_parallel.partition import even_cut
from training.config import Config
from training.forward_only import ForwardOnly
from training.gradient import GlobalGradient, Schedule, wire_report
from training.job import COLLECTIVE_TIMEOUT, Job

SEQ_LENGTH, NUM_SEQUENCES = 24, 8


def gradient_of(stage: Stage, rank: int, store: dist.Store, num_stages: int, schedule: Schedule, **more: Any) -> GlobalGradient:
    place = place_of(rank, dp_size=1, pp_size=num_stages)
    join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
    return GlobalGradient(
        place=place,
        groups=make_groups(place, "gloo", COLLECTIVE_TIMEOUT),
        stage=stage,
        spans=Spans(),
        peer_names=[f"rank {r}" for r in range(num_stages)],
        schedule=schedule,
        batch_size=NUM_SEQUENCES,
        seq_length=SEQ_LENGTH,
        clip_grad_norm=0,
        **{"micro_batch_size": 1, **more},
    )
