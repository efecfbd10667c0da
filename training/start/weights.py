"""What a run begins with: weights from the model, a checkpoint or a generator, the optimizer's state, and the curve of the learning
rate."""

import logging
import math
from fractions import Fraction
from pathlib import Path

import torch

from checkpoint.model_folder import load_weights
from modules.stage import Stage, draw_parameter
from optim.build import AdamW
from optim.loss_scale import LossScale
from optim.schedule import LearningRate
from training.checkpoints.loading import load_stage_state
from training.compute.build import WeightTaker
from training.config.train import Config
from training.job.job import Job
from training.start.agreement import Start

log = logging.getLogger("trainer")


def load_trained(job: Job, config: Config, start: Start, stage: Stage, optimizer: AdamW, loss_scale: LossScale) -> None:
    """Called by all ranks: fill stage, optimizer and loss scale with what the run starts from. Raises UserError, PeerLost."""
    assert config.checkpoint_path is not None, "parse_config requires it"
    taker = WeightTaker(stage, optimizer)
    is_whole_in_checkpoint = start.point is not None and config.train == "all"
    num_bytes = job.model.num_bytes(taker.shapes)
    if not is_whole_in_checkpoint and config.load_pretrained_model:
        quantised = "" if config.base_quantization == "none" else f" and quantising them ({config.base_quantization})"
        with job.spans.part(f"loading weights{quantised}", num_bytes, "bytes") as part:
            load_weights(job.model, taker.shapes, taker.take, part.add)
    elif not is_whole_in_checkpoint:
        with job.spans.part("drawing weights", num_bytes, "bytes") as part:
            for name, shape in taker.shapes.items():
                values = torch.empty(shape, dtype=torch.float32)
                draw_parameter(values, name, job.model_config, config.seed)
                taker.take(name, values)
                part.add(job.model.num_bytes([name]))
    if start.point is not None:
        load_stage_state(job, start.point, stage, optimizer, Path(config.checkpoint_path))
        loss_scale.load(start.point.trainer["loss_scale"])
        if config.fp16 and job.place.rank == 0:
            log.info("the loss scale goes on at %g", loss_scale.value)


def learning_rate_of(config: Config, num_updates: int) -> LearningRate:
    """The curve over ``num_updates`` optimizer steps that the flags ask for."""
    assert config.total_steps is not None, "parse_config requires it"
    warmup_steps = Fraction(config.warmup_steps or 0)
    if config.warmup_proportion is not None:
        warmup_steps = Fraction(str(config.warmup_proportion)) * config.total_steps  # 0.07 of 100 is 7, not 7.000000000000001
    num_warmup = math.ceil(warmup_steps / config.gradient_accumulate_step)
    return LearningRate(peak=config.lr, minimum=config.min_lr, num_warmup_steps=num_warmup, num_steps=num_updates, curve=config.lr_schedule)
