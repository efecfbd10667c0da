"""What a run says before its first step: what was resolved, how the model is cut, which precisions are used and why."""

import dataclasses

import torch

from modules.stage import meta_stage
from training.compute.build import assemble_stage
from training.config.flags import flag_name
from training.config.precision import SHORT, precision_of
from training.config.shared import JobConfig
from training.config.train import Config
from training.job.job import Job
from training.job.report import table
from training.job.threads import threads_here
from training.layout.plan import PipelinePlan

DROPOUT_KEYS = ("_pdrop", "hidden_dropout", "attention_dropout")  # of GPT-J, of GPT-NeoX


def describe_run(config: Config, job: Job, first_step: int, plan: PipelinePlan, *, in_full: bool) -> str:
    """A few short tables for rank 0's log; not in_full: the two lines above them."""
    place = job.place
    where = f"{job.device}, {describe_threads(config, job)}" if job.device.type == "cpu" else str(job.device)
    dropouts = {name: value for name, value in job.model.config.items() if name.endswith(DROPOUT_KEYS) and value}
    lines = [
        f"{place.world_size} ranks: {place.pp_size} stage(s) ({config.pp_mode}) x {place.dp_size} replica(s) ({config.dp_mode}), "
        f"{job.backend} over {job.interface.name} ({job.interface.address}), rank 0 on {where}",
        f"starting at step {first_step} of {config.total_steps}",
    ]
    if not in_full:
        return "\n".join(lines)
    lines += [
        "configuration:",
        table([("flag", "value"), *_resolved_flags(config, job)]),
        "cut:",
        table([("stage", "layers", "parameters", "bytes", "micro-batches in flight"), *_cut_rows(config, job, plan)]),
        *plan.reasons,
        "precisions:",
        table([("of", "dtype", "why"), *_precisions(config, job)]),
        *([f"note: config.json asks for dropout ({dropouts}); --dropout decides, and it is 0"] if dropouts and not config.dropout else []),
    ]
    return "\n".join(lines)


def describe_threads(config: JobConfig, job: Job) -> str:
    """With how many threads this rank computes, and on whose word."""
    own_host = job.roster[job.place.rank]["host_id"]
    ranks_here = sum(entry["host_id"] == own_host for entry in job.roster)
    noun = "thread" if job.num_threads == 1 else "threads"
    why = threads_here(config.num_threads, ranks_here).why
    return f"{job.num_threads} compute {noun} per rank ({why})"


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


def _cut_rows(config: Config, job: Job, plan: PipelinePlan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for s, (first, last) in enumerate(job.cut):
        stage = meta_stage(job.model_config, first, last)
        held = assemble_stage(config, job.model_config, (first, last), torch.device("meta"), precision_of(config, job.device))
        parts = [
            *(["embeddings"] if stage.has_embeddings else []),
            f"{first}" if last - first == 1 else f"{first} .. {last - 1}",
            *(["head"] if stage.has_head else []),
        ]
        num_parameters = sum(p.numel() for p in stage.parameters())
        size = f"{sum(parameter.nbytes for parameter in held.parameters()):,}"
        rows.append((str(s), ", ".join(parts), f"{num_parameters:,}", size, f"at most {plan.in_flight[s]}"))
    return rows


def _precisions(config: Config, job: Job) -> list[tuple[str, ...]]:
    stored = "/".join(sorted({str(job.model.dtype(name)).removeprefix("torch.") for name in job.model.names()}))
    precision = precision_of(config, job.device)
    parameters, compute = SHORT[precision.parameters], SHORT[precision.compute]
    asked = "--fp16" if config.fp16 else "--bf16" if config.bf16 else "neither --fp16 nor --bf16"
    return [
        ("parameters", parameters, f"{asked}; {_kept(config, stored)}"),
        *_frozen(config),
        ("compute", compute, "hidden states; softmax, norms and loss add up in fp32" if compute == parameters else "a CPU is slow at fp16"),
        ("gradients", "fp32", f"added up over micro-batches and replicas, squared norms in fp64; {_scaling(config)}"),
        (
            "masters",
            "bf16 + 16 bits" if precision.master_bytes == 2 and config.train == "all" else "fp32",
            ("what the optimizer updates" if precision.master_bytes and config.train == "all" else "what is trained, itself")
            + (f", saved beside the {stored} files so that a resume is exact" if stored != "float32" and config.train == "all" else ""),
        ),
        ("moments", "8 bits" if config.optimizer == "8bit-adam" else "fp32", _where_updated(config, job)),
        ("wire, activations", *_on_wire(config, config.wire_dtype, "--wire-dtype", compute)),
        ("wire, gradients", *_on_wire(config, config.wire_dtype_grad, "--wire-dtype-grad", compute)),
        ("wire, replicas", "fp32", "what replicas exchange is never rounded"),
    ]


def _kept(config: Config, stored: str) -> str:
    return f"files keep the model folder's {stored}" if config.train == "all" else f"of what is frozen; --train {config.train} is fp32"


def _frozen(config: Config) -> list[tuple[str, ...]]:
    if config.base_quantization == "none":
        return []
    ends = "linears, embeddings and head" if config.quantize_ends else "linears of the layers"
    return [("frozen linears", config.base_quantization, f"{ends}; --base-quantization")]


def _where_updated(config: Config, job: Job) -> str:
    if config.optimizer_offload == "cpu" and job.device.type != "cpu":
        return "in host memory with the masters, and updated there (--optimizer-offload)"
    return f"--optimizer {config.optimizer}"


def _scaling(config: Config) -> str:
    if not config.fp16:
        return "no loss scale"
    if config.loss_scale is not None:
        return f"loss scale {config.loss_scale:g}"
    return f"loss scale {config.initial_loss_scale:g} to begin with"


def _on_wire(config: Config, dtype: str | None, flag: str, compute: str) -> tuple[str, str]:
    if config.num_stages == 1:
        return "-", "one stage sends nothing to another"
    if dtype in (None, "none"):
        return compute, "as computed: not rounded"
    return str(dtype), f"asked for ({flag}); rounding errors are in the log"
