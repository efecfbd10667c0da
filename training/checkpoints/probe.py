"""--verify-resume: what the weights of a checkpoint computed when it was saved, and whether they compute it again after a resume.

The probe is a forward and backward of the last batch with the saved weights, without an update: its loss and gradient norm. It is found
again bit for bit if weights, data, order of data, arithmetic and grid-independence are all what the trainer promises.
"""

import logging
import math
from typing import Any

import torch

from optim.decide import StepDecision
from training.config.train import Config
from training.job.job import Job
from user_error import UserError

log = logging.getLogger("trainer")

TOLERANCE = 1e-4  # relative, where a bit-equal result is not promised
ROUNDING = "--wire-dtype and the cut"
FUNCTION = "precision, quantisation and dropout"


def make_probe(
    job: Job, config: Config, decision: StepDecision, tokens_sha256: str | None, data_before: dict[str, Any] | None
) -> dict[str, Any]:
    """What trainer.json stores. tokens_sha256, data_before: rank 0's; the batch that was used, and where in the data it began."""
    return {
        "loss": decision.loss.hex(),
        "grad_norm": decision.grad_norm.hex(),
        "tokens_sha256": tokens_sha256,
        "data_before": data_before,
        "bits_depend_on": {
            "--micro-batch-size": config.micro_batch_size,
            "replicas": job.place.dp_size,
            "--gradient-accumulate-step": config.gradient_accumulate_step,
            "compute threads per rank": job.num_threads,
            "device": job.device.type,
            "torch": torch.__version__,
            "--loss-scale": config.loss_scale,
            ROUNDING: _rounding(job, config),
            FUNCTION: _function(config),
        },
    }


def _rounding(job: Job, config: Config) -> str:
    """Compressed links round where the model is cut."""
    dtypes = [dtype for dtype in (config.wire_dtype, config.wire_dtype_grad) if dtype not in (None, "none")]
    return f"{' and '.join(map(str, dtypes))} at {job.cut}" if dtypes and job.place.pp_size > 1 else "none"


def _function(config: Config) -> str:
    """What changes the numbers themselves, not their last bits. Noise depends on how the global batch is cut into micro-batches."""
    precision = "fp16" if config.fp16 else "bf16" if config.bf16 else "fp32"
    base = f"{config.base_quantization}{' with ends' if config.quantize_ends else ''}"
    noise = f"{config.dropout:g} and {config.lora_dropout if config.train == 'lora' else 0:g}"
    cut = f" in micro-batches of {config.micro_batch_size}" if config.dropout or (config.train == "lora" and config.lora_dropout) else ""
    return f"{precision}, base {base}, dropouts {noise}{cut}"


def check_probe(then: dict[str, Any], now: dict[str, Any]) -> None:
    """On rank 0. Raises UserError unless the probe was found again: to the bit, or within TOLERANCE where what bits depend on changed."""
    if then["tokens_sha256"] != now["tokens_sha256"]:
        raise UserError(
            "--verify-resume: the batch behind the checkpoint is another one now, so the data or its order changed in a way that nothing "
            "else noticed. Give the run its data back, or start anew in another --checkpoint-path"
        )
    changed = [
        f"{name} ({before} then, {now['bits_depend_on'].get(name)} now)"
        for name, before in then["bits_depend_on"].items()
        if now["bits_depend_on"].get(name) != before
    ]
    for what, why in ((ROUNDING, "compressed links round elsewhere than before"), (FUNCTION, "what is computed has changed")):
        if any(text.startswith(what) for text in changed):
            log.warning("this resume cannot be verified: %s. %s", why, "; ".join(changed))
            return
    values = [(name, float.fromhex(then[name]), float.fromhex(now[name])) for name in ("loss", "grad_norm")]
    differing = [
        f"{name} {before!r} then, {after!r} now"
        for name, before, after in values
        if (not math.isclose(before, after, rel_tol=TOLERANCE) if changed else then[name] != now[name])
    ]
    if differing:
        raise UserError(
            f"--verify-resume: the weights that were loaded do not compute what was stored with them: {'; '.join(differing)}. Resume with "
            "--verify-checkpoint, or from an older step"
        )
    how = f"within {TOLERANCE:g}, as {', '.join(changed)} changed" if changed else "bit for bit"
    log.info("verified: the last batch before the checkpoint gives the stored loss %.6g and gradient norm again, %s", values[0][1], how)
