"""The flags of dist_clm_eval.py as one frozen dataclass, and from a command line to one whose flags fit together.

What it shares with the trainer has the trainer's names and meanings. ``python -m training.evaluation_config`` prints
docs/evaluation_flags.md."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from training.config.cli import fill_in, out_of_range
from training.config.data_flags import reading_problems
from training.config.flags import flag, parse_flags
from training.config.shared import ReadingConfig
from training.config.train import Config
from user_error import UserError

EVALUATION, SHOTS, RESULT = "evaluation", "few-shot prompts", "results"
METRICS = ("perplexity", "accuracy", "labels")
ABOUT = "Evaluate a checkpoint, a Hugging Face folder or an adapter; start one process per device, or a single one."

_AT_LEAST_ZERO = ("num_shots", "cuda_id", "seed")
_AT_LEAST_ONE = (
    *("pipeline_group_size", "data_group_size", "num_layers", "world_size", "embedding_dim", "num_threads"),
    *("max_eval_samples", "max_new_tokens", "batch_size", "micro_batch_size"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(ReadingConfig):
    """Everything that an evaluation can be told, what it shares with a training included."""

    evaluation_data: str | None = flag(
        None,
        "what to evaluate on, written as the trainer's --task-name, weights left out; read by rank 0 alone; required there",
        group=EVALUATION,
    )
    metric: str = flag(
        "perplexity",
        "one or more of perplexity, accuracy, labels, with commas. perplexity: of all target tokens; accuracy: of answers "
        "generated greedily; "
        "labels: of the label that the model finds likeliest, the log-likelihoods of all its tokens added up",
        group=EVALUATION,
    )
    max_eval_samples: int | None = flag(None, "records of each source that are used, drawn by --seed; left out: all", group=EVALUATION)
    seq_length: int | None = flag(
        None, "token ids per sequence, the longest prompt included; left out: as many as the model has positions", group=EVALUATION
    )
    loss_on: Literal["all", "completion"] = flag(
        "all", "perplexity: of which tokens: all; or of completions and their ends, prompts left out", group=EVALUATION
    )
    packing: Literal["documents", "concat", "none"] = flag(
        "documents",
        "perplexity: how documents share sequences, as the trainer's --packing; none and documents give the same",
        group=EVALUATION,
    )
    long_documents: Literal["split", "truncate"] = flag(
        "split", "perplexity: a document longer than a sequence goes on in further ones; or loses its end", group=EVALUATION
    )
    max_new_tokens: int = flag(16, "accuracy: tokens after which a generated answer ends without an end", group=EVALUATION)
    batch_size: int = flag(8, "sequences per replica that go through the stages together", group=EVALUATION)
    micro_batch_size: int = flag(
        1, "perplexity and labels: sequences that go through a stage at once; divides --batch-size", group=EVALUATION
    )

    num_shots: int = flag(0, "worked examples in front of every prompt, drawn by --seed", group=SHOTS)
    shots_from: str | None = flag(
        None, "where they are from, written as --evaluation-data; left out: the other records of the evaluation itself", group=SHOTS
    )
    balance_shots: bool = flag(False, "go through the labels in turn", group=SHOTS)

    json: str | None = flag(None, "file for all results as one JSON object; - for standard output", group=RESULT)
    output: str | None = flag(
        None, "file for one JSON object per example: prompt, expected, generated, verdict, log-likelihoods", group=RESULT
    )
    confusion_png: str | None = flag(None, "picture of the confusion matrix (needs matplotlib)", group=RESULT)
    compare: str | None = flag(
        None, "instead of evaluating: two files of --output, with a comma, to compare by McNemar's test: A.jsonl,B.jsonl", group=RESULT
    )

    @property
    def metrics(self) -> tuple[str, ...]:
        """--metric, taken apart."""
        return tuple(name.strip() for name in self.metric.split(",") if name.strip())

    def for_job(self) -> Config:
        """What the rooms that training and evaluation share are told."""
        shared: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(ReadingConfig)}
        shortest = 2  # rank 0 finds the length from the data, and checks it then
        return Config(**shared, seq_length=shortest, batch_size=self.batch_size, micro_batch_size=self.micro_batch_size)


def parse_eval_config(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> EvalConfig:
    """Flags (and --config FILE.yaml) to an EvalConfig that fits. Raises one UserError with every problem found."""
    return complete_eval(parse_flags(EvalConfig, argv, ABOUT), environment)


def complete_eval(config: EvalConfig, environment: Mapping[str, str] = os.environ) -> EvalConfig:
    """``config`` with what can be left out filled in. Raises one UserError with every problem that its values have."""
    if config.compare is not None:
        return config
    config = fill_in(config, environment)
    problems = [*_missing(config), *out_of_range(config, _AT_LEAST_ZERO, _AT_LEAST_ONE), *_not_fitting(config)]
    problems += reading_problems(config, [config.evaluation_data, config.shots_from])
    if problems:
        listing = "".join(f"\n- {problem}" for problem in problems)
        raise UserError(problems[0] if len(problems) == 1 else f"{len(problems)} problems:{listing}")
    return config


def _missing(config: EvalConfig) -> list[str]:
    wanted = {"--model-name": config.model_name}
    if config.rank == 0:
        wanted["--evaluation-data"] = config.evaluation_data
    return [f"{name} is required; pass it or put it into --config" for name, value in wanted.items() if not value]


def _not_fitting(config: EvalConfig) -> list[str]:
    problems = []
    unknown = [name for name in config.metrics if name not in METRICS]
    if unknown or not config.metrics:
        problems.append(f"--metric must be one or more of {', '.join(METRICS)}, with commas; it is {config.metric!r}")
    if config.micro_batch_size >= 1 and config.batch_size % config.micro_batch_size:
        problems.append(f"--micro-batch-size must divide --batch-size; {config.micro_batch_size} does not divide {config.batch_size}")
    if config.seq_length is not None and config.seq_length < 2:
        problems.append(f"--seq-length must be at least 2, or there is nothing to predict; it is {config.seq_length}")
    if not config.num_shots and (config.shots_from is not None or config.balance_shots):
        problems.append(
            "--shots-from and --balance-shots are for few-shot prompts, and --num-shots is 0. Leave them out, or give --num-shots"
        )
    if config.confusion_png is not None and not {"accuracy", "labels"} & set(config.metrics):
        problems.append("--confusion-png draws answers, and --metric asks for none. Add accuracy or labels to it, or leave it out")
    files = [file for file in (config.json, config.output, config.confusion_png) if file not in (None, "-")]
    if len(set(files)) < len(files):
        problems.append("--json, --output and --confusion-png must be different files, or one would overwrite another. Give each its own")
    if config.fp16 and config.bf16:
        problems.append("--fp16 and --bf16 are two precisions of the same parameters; pass one of them")
    if config.quantize_ends and config.base_quantization == "none":
        problems.append("--quantize-ends adds to --base-quantization, which is none. Leave it out, or give --base-quantization int8")
    return problems
