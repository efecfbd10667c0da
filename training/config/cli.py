"""From a command line to a Config whose flags fit together.

``parse_config`` gathers every problem that flags alone can have and raises them once; what needs the disk, the network or the model is
checked where it is opened, still before any weight is loaded."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from comms.rendezvous import parse_dist_url
from optim.loss_scale import LARGEST as LARGEST_LOSS_SCALE
from pipeline_parallel.partition import parse_stage_layers
from training.config.data_flags import data_problems
from training.config.flags import flag_name, parse_flags, parse_known_flags
from training.config.shared import JobConfig
from training.config.train import Config
from training.config.trained import lora_settings
from user_error import UserError

AnyConfig = TypeVar("AnyConfig", bound=JobConfig)

_AT_LEAST_ZERO = (
    *("warmup_steps", "checkpoint_steps", "keep_checkpoints", "cuda_id"),
    *("evaluation_steps", "evaluation_num_batch", "show_samples"),
    *("max_restarts", "rescue_interval", "min_free_memory"),
    *("lr", "min_lr", "weight_decay", "clip_grad_norm", "seed"),
)
_AT_LEAST_ONE = (
    *("pipeline_group_size", "data_group_size", "num_layers", "world_size"),
    *("batch_size", "micro_batch_size", "gradient_accumulate_step", "total_steps"),
    *("logging_steps", "num_threads", "embedding_dim", "profiling_steps"),
    *("max_skipped_steps", "loss_scale_window", "loss_scale_hysteresis"),
    *("max_train_samples", "max_eval_samples", "evaluation_batch_size", "evaluation_max_new_tokens", "packing_group", "shuffle_window"),
)


def parse_config(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> Config:
    """Flags (and --config FILE.yaml) to a Config whose grid and steps fit. Raises one UserError with every problem found."""
    about = "Fine-tune a causal language model over pipeline stages and replicas; start one process per device."
    return complete(parse_flags(Config, argv, about), environment)


def complete(config: Config, environment: Mapping[str, str] = os.environ) -> Config:
    """``config`` with what can be left out filled in. Raises one UserError with every problem that its values have."""
    config = fill_in(config, environment)
    problems = [
        *_missing(config),
        *_not_offered(config),
        *_out_of_range(config),
        *_not_trainable(config),
        *_not_fitting(config),
        *data_problems(config),
        *_not_evaluable(config),
    ]
    if problems:
        listing = "".join(f"\n- {problem}" for problem in problems)
        raise UserError(problems[0] if len(problems) == 1 else f"{len(problems)} problems:{listing}")
    return config


def parse_meeting_point(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> Config | None:
    """What of a command line says where the ranks meet, however wrong the rest of it is; None if that part is wrong too.

    For a rank that cannot start and would like to tell those who wait for it.
    """
    names = (
        *("config", "rank", "world_size", "dist_url", "pipeline_group_size", "data_group_size", "rendezvous_timeout"),
        *("secret_file", "net_interface"),
    )
    try:
        config = fill_in(Config(**parse_known_flags(Config, argv, names)), environment)
        _ = config.door
    except UserError:
        return None
    return config


def fill_in(config: AnyConfig, environment: Mapping[str, str]) -> AnyConfig:
    """What the environment and the grid say where flags were left out. Raises UserError for an environment that says no numbers."""
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
    if isinstance(config, Config):
        found["wire_dtype_grad"] = config.wire_dtype_grad or config.wire_dtype
    return dataclasses.replace(config, **{"rank": config.rank or 0, "cuda_id": config.cuda_id or 0, **found})


def _missing(config: Config) -> list[str]:
    wanted: dict[str, object] = {"--model-name": config.model_name, "--checkpoint-path": config.checkpoint_path}
    if config.rank == 0:
        wanted["--task-name"] = config.task_name  # rank 0 alone reads data
    wanted["--total-steps (or --num-train-epochs)"] = config.total_steps or config.num_train_epochs
    return [f"{name} is required; pass it or put it into --config" for name, value in wanted.items() if value is None or value == ""]


def _not_evaluable(config: Config) -> list[str]:
    """What evaluations while training need; rank 0 alone is given their data, so the others cannot miss it."""
    problems = []
    if config.rank == 0 and config.evaluation_data is None:
        unread = ("evaluation_steps", "evaluation_metric", "evaluation_num_batch", "evaluation_batch_size", "max_eval_samples", "keep_best")
        problems = [
            f"{flag_name(field.name)} is for evaluations, and --evaluation-data names nothing to evaluate on. Leave it out, or add that"
            for field in dataclasses.fields(Config)
            if field.name in unread and getattr(config, field.name) != field.default
        ]
    size, micro = config.evaluation_batch_size, config.micro_batch_size
    if size is not None and micro >= 1 and size % micro:
        problems.append(f"--micro-batch-size must divide --evaluation-batch-size; {micro} does not divide {size}")
    return problems


def _not_offered(config: Config) -> list[str]:
    rules = [
        (
            config.dp_backend == "nccl" and config.device == "cpu",
            "--dp-backend nccl carries CUDA tensors only, and --device is cpu; use --dp-backend gloo",
        ),
    ]
    return [text for holds, text in rules if holds]


def out_of_range(config: JobConfig, at_least_zero: Sequence[str], at_least_one: Sequence[str]) -> list[str]:
    """Of the fields named, those whose value is less, or no number."""
    problems = []
    for name in at_least_one:
        value = getattr(config, name)
        if value is not None and value < 1:
            problems.append(f"{flag_name(name)} must be at least 1; it is {value}")
    for name in at_least_zero:
        value = getattr(config, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            problems.append(f"{flag_name(name)} must be 0 or more; it is {value}")
    if not re.fullmatch(r"auto|[0-9]+(\.[0-9]+)?", config.peer_timeout) or (
        config.peer_timeout != "auto" and float(config.peer_timeout) < 1
    ):
        problems.append(f"--peer-timeout must be auto or a number of seconds from 1; it is {config.peer_timeout!r}")
    if not (config.rendezvous_timeout > 0 and math.isfinite(config.rendezvous_timeout)):
        problems.append(f"--rendezvous-timeout must be above 0 seconds; it is {config.rendezvous_timeout}")
    return problems


def _out_of_range(config: Config) -> list[str]:
    problems = out_of_range(config, _AT_LEAST_ZERO, _AT_LEAST_ONE)
    if not re.fullmatch(r"auto|[0-9]{1,4}", config.extra_warmup_forwards):
        problems.append(f"--extra-warmup-forwards must be auto or a whole number of 0 .. 9999; it is {config.extra_warmup_forwards!r}")
    if config.max_seconds is not None and not (config.max_seconds > 0 and math.isfinite(config.max_seconds)):
        problems.append(f"--max-seconds must be above 0; it is {config.max_seconds}")
    if config.allow_replica_loss and (config.data_group_size or 1) < 2:
        problems.append(f"--allow-replica-loss needs replicas (--data-group-size) to go on with; there is {config.data_group_size or 1}")
    if not config.resume.strip():
        problems.append("--resume must be auto, none, a step's number or the folder of a checkpoint; it is empty")
    if config.memory_limit is not None and not 0 < config.memory_limit <= 2**20:
        problems.append(f"--memory-limit must be above 0 GiB and at most {2**20}; it is {config.memory_limit}")
    if config.seq_length < 2:
        problems.append(f"--seq-length must be at least 2, or there is nothing to predict; it is {config.seq_length}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            problems.append(f"--{name.replace('_', '-')} must be 0 or more and below 1; it is {getattr(config, name)}")
    if not (config.adam_eps > 0 and math.isfinite(config.adam_eps)):
        problems.append(f"--adam-eps must be above 0; it is {config.adam_eps}")
    if not 0 <= config.dropout < 1:
        problems.append(f"--dropout must be 0 or more and below 1; it is {config.dropout}")
    for name in ("loss_scale", "initial_loss_scale", "min_loss_scale"):
        value = getattr(config, name)
        if value is not None and not 0 < value <= LARGEST_LOSS_SCALE:
            problems.append(f"{flag_name(name)} must be above 0 and at most {LARGEST_LOSS_SCALE:.0f}; it is {value}")
    if config.warmup_proportion is not None and not 0 <= config.warmup_proportion <= 1:
        problems.append(f"--warmup-proportion must be 0 .. 1; it is {config.warmup_proportion}")
    return problems


def _read_by_nobody(config: Config) -> list[str]:
    """Flags that were changed and would make no difference, with what they belong to."""
    scaling = ("initial_loss_scale", "loss_scale_window", "min_loss_scale", "loss_scale_hysteresis")
    rules = [
        (config.train != "lora", ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"), "--train lora"),
        (not config.fp16, scaling, "--fp16"),
        (config.fp16 and config.loss_scale is not None, scaling, "a loss scale that follows the overflows, without --loss-scale"),
        (not config.bf16, ("master_weights",), "--bf16"),
    ]
    return [
        f"{flag_name(field.name)} is for {belongs_to}; nothing else reads it. Leave it out, or add that"
        for is_unread, names, belongs_to in rules
        for field in dataclasses.fields(Config)
        if is_unread and field.name in names and getattr(config, field.name) != field.default
    ]


def _not_trainable(config: Config) -> list[str]:
    """What is to be trained, and in which precision."""
    problems = []
    if config.train == "all" and config.base_quantization != "none":
        problems.append(
            f"--base-quantization {config.base_quantization} is for weights that are not trained, and --train all trains every one. Use "
            "--train lora or --train layernorm, or leave it out"
        )
    if config.quantize_ends and config.base_quantization == "none":
        problems.append("--quantize-ends adds to --base-quantization, which is none. Leave it out, or give --base-quantization int8")
    if config.train != "all" and not config.load_pretrained_model:
        problems.append(
            f"--train {config.train} adapts a model's weights, and with --load-pretrained-model false none are read. Leave one of them out"
        )
    problems += _read_by_nobody(config)
    if config.train == "lora":
        try:
            lora_settings(config)
        except UserError as error:
            problems.append(f"--lora-rank, --lora-alpha, --lora-dropout: {error}")
    if config.fp16 and config.bf16:
        problems.append("--fp16 and --bf16 are two precisions of the same parameters; pass one of them")
    if config.loss_scale is not None and not config.fp16:
        problems.append("--loss-scale is for --fp16, whose gradients would vanish without one; nothing else reads it. Leave it out")
    if config.min_loss_scale > config.initial_loss_scale > 0:
        problems.append(
            f"--min-loss-scale must not exceed --initial-loss-scale; {config.min_loss_scale} is more than {config.initial_loss_scale}"
        )
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
