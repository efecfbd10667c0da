"""The trainer's flags as one frozen dataclass. The only file of the house that knows of a command line.

Lower rooms are handed values, never this object. ``parse_config`` gathers every problem that flags alone can have and raises them
once; what needs the disk, the network or the model is checked where it is opened, still before any weight is loaded. ``python -m
training.config`` prints docs/flags.md."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from comms.codecs import WireDtype
from comms.rendezvous import DEFAULT_DIST_URL, Door, door_of_torchrun, parse_dist_url
from pipeline_parallel.partition import parse_stage_layers
from pipeline_parallel.schedule import PipelineMode
from training.flags import describe_flags, flag, parse_flags, parse_known_flags
from user_error import UserError

_MODEL, _MEETING, _GRID, _DATA, _STEPS, _OPTIMIZER, _SAVING, _REPORT, _MACHINE = (
    "model",
    "meeting",
    "grid",
    "data",
    "steps",
    "optimizer",
    "checkpoints",
    "report",
    "machine",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One field per flag; None where a flag was left out and its value is found later (see the help text)."""

    model_name: str | None = flag(None, "the model: a layer-sharded folder, a Hugging Face folder or a hub name; required", group=_MODEL)
    tokenizer_name: str | None = flag(None, "the tokenizer: a folder or hub name; left out: the one in --model-name", group=_MODEL)
    model_type: Literal["gptj", "gptneox"] | None = flag(
        None,
        "the model's family, only checked (gptneox: also Pythia, RedPajama-INCITE); left out: as config.json says",
        group=_MODEL,
    )
    embedding_dim: int | None = flag(None, "width of the model, only checked; left out: as config.json says", group=_MODEL)
    load_pretrained_model: bool = flag(
        True, "true: start from the model's weights; false: draw them, seeded by (--seed, parameter name)", group=_MODEL
    )

    dist_url: str | None = flag(
        None, f"tcp://HOST:PORT where rank 0 listens and all meet; left out: torchrun's, else {DEFAULT_DIST_URL}", group=_MEETING
    )
    rank: int | None = flag(None, "this process's number, 0 .. world size - 1; left out: RANK of the environment, else 0", group=_MEETING)
    world_size: int | None = flag(
        None, "processes of the whole job; left out: WORLD_SIZE of the environment, else stages x replicas", group=_MEETING
    )
    net_interface: str | None = flag(
        None, "the network interface for all traffic of this process; left out: the one that routes to --dist-url", group=_MEETING
    )
    dp_backend: Literal["nccl", "gloo"] | None = flag(
        None, "transport of ALL links, between stages too; left out: nccl on CUDA, gloo on CPU", group=_MEETING
    )
    rendezvous_timeout: float = flag(
        300.0, "seconds within which all ranks must have come, else the missing ones are named", group=_MEETING
    )

    pipeline_group_size: int = flag(1, "stages of the pipeline", group=_GRID)
    data_group_size: int | None = flag(None, "replicas of the pipeline; left out: world size / stages", group=_GRID)
    num_layers: int | None = flag(None, "layers per stage N: stage s holds [s*N, min((s+1)*N, L)); left out: see --partition", group=_GRID)
    stage_layers: str | None = flag(None, "layers of each stage by hand, such as 6,8,8,6; left out: see --partition", group=_GRID)
    partition: Literal["even", "measured"] = flag(
        "even",
        "even: stages differ by one layer at most; measured: times layers, embeddings and head on every rank at the start and takes the "
        "cut whose slowest stage is fastest, within --memory-limit",
        group=_GRID,
    )
    memory_limit: float | None = flag(
        None,
        "GiB of tensors this rank's stage may take, for --partition measured; left out: 90 % of what is free at the start",
        group=_GRID,
    )
    pp_mode: PipelineMode = flag(
        "1f1b",
        "gpipe: all forwards, then all backwards; 1f1b: in turn, so that few micro-batches are held; zb: 1f1b whose weight gradients "
        "are left for the time spent waiting; the same bits in all of them",
        group=_GRID,
    )
    extra_warmup_forwards: str = flag(
        "auto",
        "in 1f1b and zb: micro-batches further ahead, per link behind a stage, that hide a long link's round trip and cost memory; auto: "
        "as many as the latency, transfer and compute measured at the start ask for",
        group=_GRID,
    )
    recompute: Literal["none", "layer"] = flag(
        "none",
        "layer: keep only the inputs of layers for the backward and compute each forward twice; the same bits; in zb, what the "
        "weight gradients need is kept from the backward until their turn",
        group=_GRID,
    )
    wire_dtype: WireDtype = flag(
        "none",
        "form in which activations travel between stages; none: as computed (fp32); int8: a scale per row; int4: one per 64 values, which "
        "must divide the model's width",
        group=_GRID,
    )
    wire_dtype_grad: WireDtype | None = flag(None, "the same for the gradients that travel back; left out: as --wire-dtype", group=_GRID)
    dp_mode: Literal["allreduce"] = flag("allreduce", "how replicas agree on gradients", group=_GRID)

    task_name: str | None = flag(
        None,
        "what to train on: FILE[:WEIGHT],... (.jsonl, .jsonl.zst, paths or URLs, records with a text); weights are token shares, "
        "1.0 where left out, normalised. Read by rank 0 alone; required there",
        group=_DATA,
    )
    seq_length: int = flag(1024, "token ids per sequence; documents are packed into it and never see each other", group=_DATA)
    on_bad_record: Literal["error", "skip"] = flag(
        "error", "a malformed record stops the job, naming file:line, or is skipped and counted", group=_DATA
    )
    allow_data_change: bool = flag(
        False, "resume although task list, seed, sequence length, tokenizer or batch changed: the data starts over", group=_DATA
    )

    batch_size: int = flag(8, "sequences per replica and accumulation step", group=_STEPS)
    micro_batch_size: int = flag(1, "sequences that go through a stage at once; divides --batch-size", group=_STEPS)
    gradient_accumulate_step: int = flag(1, "accumulation steps per optimizer step", group=_STEPS)
    total_steps: int | None = flag(
        None, "accumulation steps of the whole run, earlier runs that it resumes included; required", group=_STEPS
    )
    warmup_steps: int | None = flag(None, "accumulation steps over which the learning rate rises; left out: 0", group=_STEPS)
    warmup_proportion: float | None = flag(None, "the same as a share of --total-steps, 0 .. 1", group=_STEPS)

    optimizer: Literal["adam", "8bit-adam"] = flag(
        "adam", "adam: AdamW, fused, fp32 (8bit-adam comes with a later version)", group=_OPTIMIZER
    )
    lr: float = flag(1e-5, "peak learning rate", group=_OPTIMIZER)
    min_lr: float = flag(0.0, "learning rate of the last update (which changes nothing at 0)", group=_OPTIMIZER)
    lr_schedule: Literal["linear", "cosine", "constant"] = flag(
        "linear", "how the rate falls after the warm-up, over optimizer steps", group=_OPTIMIZER
    )
    weight_decay: float = flag(0.01, "decoupled decay, not on LayerNorms and biases", group=_OPTIMIZER)
    adam_beta1: float = flag(0.9, "decay of the first moment", group=_OPTIMIZER)
    adam_beta2: float = flag(0.999, "decay of the second moment", group=_OPTIMIZER)
    adam_eps: float = flag(1e-6, "term added to the denominator", group=_OPTIMIZER)
    clip_grad_norm: float = flag(1.0, "largest norm of the gradient over all stages; 0: no clipping", group=_OPTIMIZER)
    fp16: bool = flag(False, "half precision with loss scaling (comes with a later version)", group=_OPTIMIZER)
    seed: int = flag(42, "seed of fresh weights and of the data order", group=_OPTIMIZER)

    checkpoint_path: str | None = flag(
        None, "folder of this job's checkpoints and log, shared by all hosts; resumed from its newest step; required", group=_SAVING
    )
    checkpoint_steps: int = flag(0, "accumulation steps between checkpoints; 0: only the final one", group=_SAVING)

    logging_steps: int = flag(10, "accumulation steps between printed lines", group=_REPORT)
    train_log_backend: Literal["print", "wandb"] = flag(
        "print", "print, or Weights & Biases besides (WANDB_NAME, WANDB_MODE=offline are honoured)", group=_REPORT
    )
    project_name: str = flag("geo-clm-trainer", "the Weights & Biases project", group=_REPORT)
    profiling: Literal["no-profiling", "tidy_profiling"] = flag(
        "no-profiling",
        "tidy_profiling: write one Chrome/Perfetto trace of all ranks; draw it with python -m training.timeline TRACE --png FILE",
        group=_REPORT,
    )
    profiling_steps: int = flag(
        5, "optimizer steps in the trace: the second and those after it (a run without as many more: its last ones)", group=_REPORT
    )
    trace_path: str | None = flag(None, "file of the trace; left out: trace.json in --checkpoint-path", group=_REPORT)

    device: Literal["auto", "cpu", "cuda"] = flag("auto", "what this process computes on; auto: CUDA where there is one", group=_MACHINE)
    cuda_id: int | None = flag(None, "index of this process's GPU; left out: LOCAL_RANK of the environment, else 0", group=_MACHINE)
    num_threads: int | None = flag(None, "compute threads of this process on a CPU; left out: cores // ranks on this host", group=_MACHINE)

    @property
    def num_stages(self) -> int:
        return self.pipeline_group_size

    @property
    def extra_warmup(self) -> int | None:
        """--extra-warmup-forwards per link; None for auto."""
        return None if self.extra_warmup_forwards == "auto" else int(self.extra_warmup_forwards)

    @property
    def trace_file(self) -> Path:
        """Where --profiling tidy_profiling writes."""
        return Path(self.trace_path) if self.trace_path else Path(self.checkpoint_path or "") / "trace.json"

    @property
    def door(self) -> Door:
        """Where the ranks meet; parse_config has made dist_url a valid one or left it to torchrun."""
        if self.dist_url is not None:
            return parse_dist_url(self.dist_url)
        alone = Door(host="127.0.0.1", port=0)  # a single process meets nobody: any free port
        return door_of_torchrun() or (alone if self.world_size == 1 else parse_dist_url(DEFAULT_DIST_URL))


# May differ between the ranks of one job: who and where a process is, and paths, which each host may spell its own way.
PER_RANK_FLAGS = frozenset(
    {
        *("rank", "world_size", "dist_url", "net_interface", "rendezvous_timeout", "cuda_id", "num_threads", "device"),
        *("model_name", "tokenizer_name", "task_name", "checkpoint_path", "trace_path", "memory_limit"),
        *("train_log_backend", "project_name", "logging_steps"),
    }
)
_AT_LEAST_ONE = (
    *("pipeline_group_size", "data_group_size", "num_layers", "world_size"),
    *("batch_size", "micro_batch_size", "gradient_accumulate_step", "total_steps"),
    *("logging_steps", "num_threads", "embedding_dim", "profiling_steps"),
)


def shared_flags(config: Config) -> dict[str, Any]:
    """The flags that must be equal on all ranks, by flag name; the hub compares them before anything else happens."""
    return {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(config).items() if name not in PER_RANK_FLAGS}


def parse_config(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> Config:
    """Flags (and --config FILE.yaml) to a Config whose grid and steps fit. Raises one UserError with every problem found."""
    config = _fill_in(
        parse_flags(Config, argv, "Fine-tune a causal language model over pipeline stages and replicas; start one process per device."),
        environment,
    )
    problems = [*_missing(config), *_not_offered(config), *_out_of_range(config), *_not_fitting(config)]
    if problems:
        listing = "".join(f"\n- {problem}" for problem in problems)
        raise UserError(problems[0] if len(problems) == 1 else f"{len(problems)} problems:{listing}")
    return config


def parse_meeting_point(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> Config | None:
    """What of a command line says where the ranks meet, however wrong the rest of it is; None if that part is wrong too.

    For a rank that cannot start and would like to tell those who wait for it.
    """
    names = ("config", "rank", "world_size", "dist_url", "pipeline_group_size", "data_group_size", "rendezvous_timeout")
    try:
        config = _fill_in(Config(**parse_known_flags(Config, argv, names)), environment)
        _ = config.door
    except UserError:
        return None
    return config


def _fill_in(config: Config, environment: Mapping[str, str]) -> Config:
    found: dict[str, Any] = {}
    for name, variable in (("rank", "RANK"), ("world_size", "WORLD_SIZE"), ("cuda_id", "LOCAL_RANK")):
        if getattr(config, name) is None and variable in environment:
            if not environment[variable].isdigit():
                raise UserError(
                    f"{variable} of the environment must be a whole number; it is {environment[variable]!r}. Set it right or pass "
                    f"--{name.replace('_', '-')}"
                )
            found[name] = int(environment[variable])
    stages, replicas = config.pipeline_group_size, config.data_group_size
    world_size = found.get("world_size", config.world_size)
    if world_size is None:
        world_size = found["world_size"] = stages * (replicas or 1)
    if replicas is None and stages >= 1 and world_size % stages == 0:
        found["data_group_size"] = world_size // stages
    found["wire_dtype_grad"] = config.wire_dtype_grad or config.wire_dtype
    return dataclasses.replace(config, **{"rank": config.rank or 0, "cuda_id": config.cuda_id or 0, **found})


def _missing(config: Config) -> list[str]:
    wanted = {"--model-name": config.model_name, "--checkpoint-path": config.checkpoint_path, "--total-steps": config.total_steps}
    if config.rank == 0:
        wanted["--task-name"] = config.task_name  # rank 0 alone reads data
    return [f"{name} is required; pass it or put it into --config" for name, value in wanted.items() if value is None or value == ""]


def _not_offered(config: Config) -> list[str]:
    rules = [
        (config.fp16, "--fp16 is not there yet: this version computes in fp32; leave it out"),
        (config.optimizer == "8bit-adam", "--optimizer 8bit-adam is not there yet; use --optimizer adam"),
        (
            config.dp_backend == "nccl" and config.device == "cpu",
            "--dp-backend nccl carries CUDA tensors only, and --device is cpu; use --dp-backend gloo",
        ),
    ]
    return [text for holds, text in rules if holds]


def _out_of_range(config: Config) -> list[str]:
    problems = []
    for name in _AT_LEAST_ONE:
        value = getattr(config, name)
        if value is not None and value < 1:
            problems.append(f"--{name.replace('_', '-')} must be at least 1; it is {value}")
    for name in ("warmup_steps", "checkpoint_steps", "cuda_id", "lr", "min_lr", "weight_decay", "clip_grad_norm", "seed"):
        value = getattr(config, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            problems.append(f"--{name.replace('_', '-')} must be 0 or more; it is {value}")
    if not re.fullmatch(r"auto|[0-9]{1,4}", config.extra_warmup_forwards):
        problems.append(f"--extra-warmup-forwards must be auto or a whole number of 0 .. 9999; it is {config.extra_warmup_forwards!r}")
    if config.memory_limit is not None and not 0 < config.memory_limit <= 2**20:
        problems.append(f"--memory-limit must be above 0 GiB and at most {2**20}; it is {config.memory_limit}")
    if config.seq_length < 2:
        problems.append(f"--seq-length must be at least 2, or there is nothing to predict; it is {config.seq_length}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            problems.append(f"--{name.replace('_', '-')} must be 0 or more and below 1; it is {getattr(config, name)}")
    if not (config.adam_eps > 0 and math.isfinite(config.adam_eps)):
        problems.append(f"--adam-eps must be above 0; it is {config.adam_eps}")
    if not (config.rendezvous_timeout > 0 and math.isfinite(config.rendezvous_timeout)):
        problems.append(f"--rendezvous-timeout must be above 0 seconds; it is {config.rendezvous_timeout}")
    if config.warmup_proportion is not None and not 0 <= config.warmup_proportion <= 1:
        problems.append(f"--warmup-proportion must be 0 .. 1; it is {config.warmup_proportion}")
    return problems


def _not_fitting(config: Config) -> list[str]:
    problems = []
    stages, replicas, world_size = config.pipeline_group_size, config.data_group_size, config.world_size
    if replicas is None:
        problems.append(
            f"the world size must be stages x replicas; --world-size {world_size} is no multiple of --pipeline-group-size {stages}"
        )
    elif stages * replicas != world_size:
        problems.append(
            f"--world-size must be --pipeline-group-size x --data-group-size; {world_size} is not {stages} x {replicas} = "
            f"{stages * replicas}. "
            f"Start {stages * replicas} processes with --world-size {stages * replicas}, or change the grid"
        )
    if config.micro_batch_size >= 1 and config.batch_size % config.micro_batch_size:
        problems.append(f"--micro-batch-size must divide --batch-size; {config.micro_batch_size} does not divide {config.batch_size}")
    if config.total_steps is not None and config.gradient_accumulate_step >= 1 and config.total_steps % config.gradient_accumulate_step:
        fitting = -(-config.total_steps // config.gradient_accumulate_step) * config.gradient_accumulate_step
        problems.append(
            "--total-steps counts accumulation steps and must be a multiple of --gradient-accumulate-step; "
            f"{config.total_steps} is none of "
            f"{config.gradient_accumulate_step}. Use {fitting}"
        )
    if config.pp_mode == "gpipe" and config.extra_warmup_forwards != "auto":
        problems.append("--extra-warmup-forwards is for --pp-mode 1f1b and zb; gpipe runs all forwards ahead anyway. Leave it out")
    if config.trace_path is not None and config.profiling != "tidy_profiling":
        problems.append("--trace-path is where --profiling tidy_profiling writes; nothing else does. Leave it out, or ask for profiling")
    if config.memory_limit is not None and config.partition != "measured":
        problems.append("--memory-limit is what --partition measured keeps to; nothing else reads it. Leave it out, or measure the cut")
    cuts = {"--num-layers": config.num_layers, "--stage-layers": config.stage_layers}
    cuts["--partition measured"] = None if config.partition == "even" else config.partition
    given = [name for name, value in cuts.items() if value is not None]
    if len(given) > 1:
        problems.append(f"the cut into stages can be asked for in one way only; {' and '.join(given)} are given. Leave one out")
    if config.stage_layers is not None:
        try:
            parse_stage_layers(config.stage_layers)
        except UserError as error:
            problems.append(str(error))
    if config.warmup_steps is not None and config.warmup_proportion is not None:
        problems.append("--warmup-steps and --warmup-proportion say the same thing; pass one of them")
    if config.warmup_steps is not None and config.total_steps is not None and config.warmup_steps > config.total_steps:
        problems.append(f"--warmup-steps must not exceed --total-steps; {config.warmup_steps} is more than {config.total_steps}")
    if config.min_lr > config.lr >= 0:
        problems.append(f"--min-lr must not exceed --lr; {config.min_lr} is more than {config.lr}")
    if config.dist_url is not None:
        try:
            parse_dist_url(config.dist_url)
        except UserError as error:
            problems.append(str(error))
    return problems


if __name__ == "__main__":
    print(
        "# Flags of dist_clm_train.py\n\nMade by `python -m training.config > docs/flags.md`. Any of them can stand in "
        "`--config FILE.yaml` by name.\n"
    )
    print(describe_flags(Config), end="")
