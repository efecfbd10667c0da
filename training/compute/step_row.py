"""What train_log.jsonl, the printed line and Weights & Biases say of an optimizer step."""

import math
from typing import Any

from optim.decide import StepDecision
from training.compute.feed import StepFeed
from training.compute.gradient import wire_report
from training.config.train import Config
from training.data.sources import drawn_so_far, sequences_per_step


def step_row(
    config: Config,
    decision: StepDecision,
    feed: StepFeed,
    *,
    step: int,
    optimizer_step: int,
    learning_rate: float,
    loss_scale: float,
    seconds: float,
    save_stall_s: float,
) -> dict[str, Any]:
    """Numbers that are not finite are None, as JSON has none of them. feed: rank 0's, with the state of the data; seconds: from the wait
    for data to the update; save_stall_s: that the training stood still for saves since the step before."""
    num_tokens = sequences_per_step(config) * config.seq_length
    wire = wire_report(decision)
    return {
        "step": step,
        "optimizer_step": optimizer_step,
        "loss": decision.loss if math.isfinite(decision.loss) else None,
        "lr": learning_rate,
        "grad_norm": decision.grad_norm if math.isfinite(decision.grad_norm) else None,
        "tokens": num_tokens,
        "target_tokens": feed.num_targets,
        "tokens_per_s": num_tokens / seconds,
        "data_wait_s": feed.data_wait_s,
        "data_wait_share": feed.data_wait_s / max(seconds, feed.data_wait_s),
        **drawn_so_far(feed.state),
        "save_stall_s": save_stall_s,
        "wire_bytes": wire.num_bytes,
        "wire_error": wire.activation_error,
        "wire_error_grad": wire.gradient_error,
        "loss_scale": loss_scale,
        "skipped": decision.skip,
    }
