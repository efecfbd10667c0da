"""What a run says before its first step: what was resolved, how the model is cut, which precisions are used and why."""

import dataclasses

import torch

from modules.stage import meta_stage
from training.config import Config
from training.flags import flag_name
from training.job import Job
from training.plan import PipelinePlan
from training.report import table

DROPOUT_KEYS = ("_pdrop", "hidden_dropout", "attention_dropout")  # of GPT-J, of GPT-NeoX


def describe_run(config: Config, job: Job, first_step: int, plan: PipelinePlan) -> str:
    """A few short tables for rank 0's log."""
    place = job.place
    where = f"{job.device}, {job.num_threads} compute thread(s) per rank" if job.device.type == "cpu" else str(job.device)
    dropouts = {name: value for name, value in job.model.config.items() if name.endswith(DROPOUT_KEYS) and value}
    lines = [
        f"{place.world_size} ranks: {place.pp_size} stage(s) ({config.pp_mode}) x {place.dp_size} replica(s) ({config.dp_mode}), "
        f"{job.backend} over {job.interface.name} ({job.interface.address}), rank 0 on {where}",
        f"starting at step {first_step} of {config.total_steps}",
        "configuration:",
        table([("flag", "value"), *_resolved_flags(config, job)]),
        "cut:",
        table([("stage", "layers", "parameters", "fp32 bytes", "micro-batches in flight"), *_cut_rows(job, plan)]),
        *plan.reasons,
        "precisions:",
        table([("of", "dtype", "why"), *_precisions(config, job)]),
        *([f"note: config.json asks for dropout ({dropouts}); this version trains without"] if dropouts else []),
    ]
    return "\n".join(lines)


def _resolved_flags(config: Config, job: Job) -> list[tuple[str, ...]]:
    """Every flag with the value in force, also where it was left out."""
    in_force = {
        **dataclasses.asdict(config),
        "tokenizer_name": config.tokenizer_name or config.model_name,
        "dist_url": config.dist_url or config.door,
        "net_interface": job.interface.name,
        "dp_backend": job.backend,
        "device": job.device,
        "num_threads": job.num_threads,
        "embedding_dim": job.model_config.width,
    }
    return [(flag_name(name), "-" if value is None else str(value)) for name, value in in_force.items()]


def _cut_rows(job: Job, plan: PipelinePlan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for s, (first, last) in enumerate(job.cut):
        stage = meta_stage(job.model_config, first, last)
        parts = [
            *(["embeddings"] if stage.has_embeddings else []),
            f"{first}" if last - first == 1 else f"{first} .. {last - 1}",
            *(["head"] if stage.has_head else []),
        ]
        num_parameters = sum(p.numel() for p in stage.parameters())
        size = f"{num_parameters * torch.float32.itemsize:,}"
        rows.append((str(s), ", ".join(parts), f"{num_parameters:,}", size, f"at most {plan.in_flight[s]}"))
    return rows


def _precisions(config: Config, job: Job) -> list[tuple[str, ...]]:
    stored = "/".join(sorted({str(job.model.dtype(name)).removeprefix("torch.") for name in job.model.names()}))
    return [
        ("parameters", "fp32", f"computed with directly; files keep the model folder's {stored}"),
        ("compute", "fp32", "this version computes in fp32 on every device"),
        ("gradients", "fp32", "as computed; squared norms are summed in fp64"),
        (
            "masters",
            "fp32",
            "the parameters themselves" + ("" if stored == "float32" else f", saved beside the {stored} files so that a resume is exact"),
        ),
        ("wire, activations", *_on_wire(config, config.wire_dtype, "--wire-dtype")),
        ("wire, gradients", *_on_wire(config, config.wire_dtype_grad, "--wire-dtype-grad")),
        ("wire, replicas", "fp32", "what replicas exchange is never rounded"),
    ]


def _on_wire(config: Config, dtype: str | None, flag: str) -> tuple[str, str]:
    if config.num_stages == 1:
        return "-", "one stage sends nothing to another"
    if dtype in (None, "none"):
        return "fp32", "as computed: not rounded"
    return str(dtype), f"asked for ({flag}); rounding errors are in the log"
