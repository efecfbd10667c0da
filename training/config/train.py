"""The trainer's flags as one frozen dataclass. The only file of the house that knows of a command line.

Lower rooms are handed values, never this object. How a command line becomes one: cli.py. ``python -m training.config`` prints
docs/flags.md."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from comms.codecs import WireDtype
from pipeline_parallel.schedule import PipelineMode
from training.config.flags import flag
from training.config.shared import GRID, PRECISION, TRAINED, ReadingConfig

DATA, STEPS, VALIDATION, OPTIMIZER, SAVING, FAILURES, REPORT = (
    *("data", "steps", "validation", "optimizer", "checkpoints"),
    *("failures", "report"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ReadingConfig):
    """Everything that a training can be told, what it shares with an evaluation included."""

    partition: Literal["even", "measured"] = flag(
        "even",
        "even: stages differ by one layer at most; measured: times layers, embeddings and head on every rank at the start and takes the "
        "cut whose slowest stage is fastest, within --memory-limit",
        group=GRID,
    )
    memory_limit: float | None = flag(
        None,
        "GiB of tensors this rank's stage may take, for --partition measured; left out: 90 % of what is free at the start",
        group=GRID,
    )
    pp_mode: PipelineMode = flag(
        "1f1b",
        "gpipe: all forwards, then all backwards; 1f1b: in turn, so that few micro-batches are held; zb: 1f1b whose weight gradients "
        "are left for the time spent waiting; the same bits in all of them",
        group=GRID,
    )
    extra_warmup_forwards: str = flag(
        "auto",
        "in 1f1b and zb: micro-batches further ahead, per link behind a stage, that hide a long link's round trip and cost memory; auto: "
        "as many as the latency, transfer and compute measured at the start ask for",
        group=GRID,
    )
    recompute: Literal["none", "layer"] = flag(
        "none",
        "layer: keep only the inputs of layers for the backward and compute each forward twice; the same bits; in zb, what the "
        "weight gradients need is kept from the backward until their turn",
        group=GRID,
    )
    wire_dtype: WireDtype = flag(
        "none",
        "form in which activations travel between stages; none: as computed; int8: a scale per row; int4: one per 64 values, which "
        "must divide the model's width",
        group=GRID,
    )
    wire_dtype_grad: WireDtype | None = flag(None, "the same for the gradients that travel back; left out: as --wire-dtype", group=GRID)
    dp_mode: Literal["allreduce"] = flag("allreduce", "how replicas agree on gradients", group=GRID)

    task_name: str | None = flag(
        None,
        "what to train on: SOURCE[:WEIGHT],... or a YAML list of those. A source is a file (.jsonl, .json, .csv, .tsv, .parquet; the text "
        "formats also .zst or .gz), a folder, a glob, a URL, hf:DATASET[/CONFIG]@SPLIT, or TASK=SOURCE for one of the tasks in "
        "docs/tasks.md; weights are shares of sequences, 1.0 where left out, normalised. Read by rank 0 alone; required there",
        group=DATA,
    )
    seq_length: int = flag(1024, "token ids per sequence", group=DATA)
    loss_on: Literal["all", "completion"] = flag(
        "all", "which tokens are targets: all: prompts too; completion: what is to be answered, and its end, alone", group=DATA
    )
    packing: Literal["documents", "concat", "none"] = flag(
        "documents",
        "documents: several to a sequence, which never see each other; concat: one stream cut into blocks, whose documents do; "
        "none: one document to a sequence, the rest is padding",
        group=DATA,
    )
    packing_group: int = flag(1000, "--packing concat: documents that make one stream, of which the rest of a block is dropped", group=DATA)
    long_documents: Literal["split", "truncate"] = flag(
        "split", "a document longer than a sequence: goes on in the next one; or loses its end", group=DATA
    )
    shuffle_window: int = flag(
        10_000, "records among which sources that can only be read forwards are shuffled; others are as a whole", group=DATA
    )
    max_train_samples: int | None = flag(
        None, "records of each task that are used, drawn by --seed (of sources read forwards: the first); left out: all", group=DATA
    )
    balance_labels: bool = flag(False, "draw as many records of every label, for tasks that have labels", group=DATA)
    show_samples: int = flag(0, "sequences to print before training, as text, with what is no target marked", group=DATA)
    allow_data_change: bool = flag(
        False, "resume although task list, seed, sequence length or tokenizer changed: the data starts over", group=DATA
    )
    allow_batch_change: bool = flag(
        False, "resume with another global batch, from the same place in the data; the optimizer step goes on counting", group=DATA
    )

    batch_size: int = flag(8, "sequences per replica and accumulation step", group=STEPS)
    micro_batch_size: int = flag(1, "sequences that go through a stage at once; divides --batch-size", group=STEPS)
    gradient_accumulate_step: int = flag(1, "accumulation steps per optimizer step", group=STEPS)
    total_steps: int | None = flag(
        None,
        "accumulation steps of the whole run, earlier runs that it resumes included; this or --num-train-epochs is required",
        group=STEPS,
    )
    num_train_epochs: float | None = flag(
        None,
        "instead of --total-steps: until the task that lasts longest for its weight was passed this often; the records are tokenised once "
        "at the start to count the steps",
        group=STEPS,
    )
    warmup_steps: int | None = flag(None, "accumulation steps over which the learning rate rises; left out: 0", group=STEPS)
    warmup_proportion: float | None = flag(None, "the same as a share of --total-steps, 0 .. 1", group=STEPS)

    master_weights: Literal["split", "fp32"] = flag(
        "split",
        "split: a bf16 parameter and 16 more bits are its fp32 master, 4 bytes in all; fp32: whole masters, 6 bytes, the same bits (--fp16 "
        "always has those)",
        group=PRECISION,
    )
    loss_scale: float | None = flag(
        None, "the factor that keeps fp16 gradients from vanishing, for the whole run; left out: it follows the overflows", group=PRECISION
    )
    initial_loss_scale: float = flag(32768.0, "where the loss scale of --fp16 begins", group=PRECISION)
    loss_scale_window: int = flag(1000, "optimizer steps without an overflow until the loss scale doubles", group=PRECISION)
    min_loss_scale: float = flag(1.0, "the least that overflows reduce the loss scale to", group=PRECISION)
    loss_scale_hysteresis: int = flag(
        2, "overflows until the loss scale is halved, and with each further one again; counted anew when it doubles", group=PRECISION
    )

    train: Literal["all", "lora", "layernorm"] = flag(
        "all",
        "what is trained: all weights; lora: low-rank adapters beside frozen linears; layernorm: the LayerNorms alone. The latter two "
        "leave checkpoints of a few MB that peft reads",
        group=TRAINED,
    )
    lora_rank: int = flag(8, "rank of the adapters of --train lora", group=TRAINED)
    lora_alpha: float = flag(16.0, "the adapters' output is multiplied by alpha / rank", group=TRAINED)
    lora_dropout: float = flag(0.0, "share of an adapter's input that is dropped while training, 0 .. 1", group=TRAINED)
    lora_target_modules: str = flag(
        "all-linear",
        "the linears of a layer that get adapters: names such as q_proj,v_proj (GPT-NeoX: query_key_value,dense), or all-linear",
        group=TRAINED,
    )
    dropout: float = flag(
        0.0,
        "share of the embeddings' output, of attention weights and of what attention and MLP add that is dropped while training, 0 .. 1",
        group=TRAINED,
    )

    optimizer: Literal["adam", "8bit-adam"] = flag(
        "adam",
        "adam: AdamW, fused, fp32 moments; 8bit-adam: moments in 8 bits, 2 bytes a parameter (needs bitsandbytes; on a CPU its update "
        "takes some 30 times as long)",
        group=OPTIMIZER,
    )
    optimizer_offload: Literal["none", "cpu"] = flag(
        "none", "cpu: masters and moments lie in host memory and are updated there; for GPUs, on a CPU they do anyway", group=OPTIMIZER
    )
    lr: float = flag(1e-5, "peak learning rate", group=OPTIMIZER)
    min_lr: float = flag(0.0, "learning rate of the last update (which changes nothing at 0)", group=OPTIMIZER)
    lr_schedule: Literal["linear", "cosine", "constant"] = flag(
        "linear", "how the rate falls after the warm-up, over optimizer steps", group=OPTIMIZER
    )
    weight_decay: float = flag(0.01, "decoupled decay, not on LayerNorms and biases", group=OPTIMIZER)
    adam_beta1: float = flag(0.9, "decay of the first moment", group=OPTIMIZER)
    adam_beta2: float = flag(0.999, "decay of the second moment", group=OPTIMIZER)
    adam_eps: float = flag(1e-6, "term added to the denominator", group=OPTIMIZER)
    clip_grad_norm: float = flag(1.0, "largest norm of the gradient over all stages; 0: no clipping", group=OPTIMIZER)
    max_skipped_steps: int = flag(
        10,
        "optimizer steps in a row whose loss or gradient is not finite, and which change nothing, until the run gives up",
        group=OPTIMIZER,
    )

    evaluation_data: str | None = flag(
        None, "what to evaluate on, written as --task-name is, weights left out; read by rank 0 alone", group=VALIDATION
    )
    evaluation_steps: int = flag(0, "accumulation steps between evaluations; 0: after the last step only", group=VALIDATION)
    evaluation_metric: Literal["loss", "accuracy"] = flag(
        "loss",
        "loss: mean over target tokens, and perplexity; accuracy: besides, answers generated greedily, compared with the records' own",
        group=VALIDATION,
    )
    evaluation_num_batch: int = flag(0, "evaluation batches that are looked at, the first ones; 0: all", group=VALIDATION)
    evaluation_batch_size: int | None = flag(None, "sequences per replica and evaluation batch; left out: --batch-size", group=VALIDATION)
    evaluation_max_new_tokens: int = flag(16, "tokens after which a generated answer ends without an end", group=VALIDATION)
    max_eval_samples: int | None = flag(
        None, "records of each evaluation task that are used, drawn by --seed; left out: all", group=VALIDATION
    )
    keep_best: bool = flag(
        False, "save the step whenever its evaluation is the best so far, and never delete that one; best.json names it", group=VALIDATION
    )

    checkpoint_path: str | None = flag(
        None, "folder of this job's checkpoints and log, one that all hosts share or one on each; see --resume; required", group=SAVING
    )
    checkpoint_steps: int = flag(0, "accumulation steps between checkpoints; 0: only the final one", group=SAVING)
    async_checkpoint: bool = flag(
        True, "true: training goes on while a copy in host memory is written; false, or without room for it: training waits", group=SAVING
    )
    checkpoint_optimizer: bool = flag(
        True,
        "false: save weights without optimizer states, a third of the bytes or less; a resume starts fresh moments",
        group=SAVING,
    )
    keep_checkpoints: int = flag(0, "how many of the newest checkpoints stay; 0: all", group=SAVING)
    resume: str = flag(
        "auto",
        "auto: from the newest complete checkpoint in --checkpoint-path; none: from the start; a step's number; or the folder of a "
        "checkpoint elsewhere. Newer steps than that are kept under another name. Restarts by torchrun go on from what their run saved",
        group=SAVING,
    )
    verify_checkpoint: bool = flag(False, "compare the sha256 of every file before resuming, not only its size", group=SAVING)
    verify_resume: bool = flag(
        False,
        "store loss and gradient norm of the last batch with each checkpoint, and on resume compute them again and compare bit for bit; "
        "costs a step without update per checkpoint",
        group=SAVING,
    )

    max_restarts: int = flag(
        0,
        "restarts of this worker by a supervisor of its own when it, or a rank that it needs, is lost; the others wait for it, and all go "
        "on from the newest checkpoint; 0: none",
        group=FAILURES,
    )
    supervise: bool = flag(False, "the same without a limit", group=FAILURES)
    rescue_interval: float = flag(
        0.0,
        "seconds between snapshots of every stage in the memory of its host, from which a restart goes on; the replicas of a stage on "
        "several hosts make it outlive a host, one replica alone only the process; 0: none",
        group=FAILURES,
    )
    allow_replica_loss: bool = flag(
        False,
        "go on without a replica that is lost (not the one of rank 0), its share dealt to the others, and take it back when it returns",
        group=FAILURES,
    )
    max_seconds: float | None = flag(
        None,
        "stop after the step during which this time is over, saved, as on a signal; with a supervisor, since that began",
        group=FAILURES,
    )
    min_free_memory: float = flag(
        0.25,
        "GiB of this host's memory; where less is free, all ranks stop after the step, saved, before the kernel kills one; 0: never",
        group=FAILURES,
    )

    logging_steps: int = flag(10, "accumulation steps between printed lines", group=REPORT)
    train_log_backend: Literal["print", "wandb"] = flag(
        "print", "print, or Weights & Biases besides (WANDB_NAME, WANDB_MODE=offline are honoured)", group=REPORT
    )
    project_name: str = flag("geo-clm-trainer", "the Weights & Biases project", group=REPORT)
    profiling: Literal["no-profiling", "tidy_profiling"] = flag(
        "no-profiling",
        "tidy_profiling: write one Chrome/Perfetto trace of all ranks; draw it with python -m training.timeline TRACE --png FILE",
        group=REPORT,
    )
    profiling_steps: int = flag(
        5, "optimizer steps in the trace: the second and those after it (a run without as many more: its last ones)", group=REPORT
    )
    trace_path: str | None = flag(None, "file of the trace; left out: trace.json in --checkpoint-path", group=REPORT)

    @property
    def extra_warmup(self) -> int | None:
        """--extra-warmup-forwards per link; None for auto."""
        return None if self.extra_warmup_forwards == "auto" else int(self.extra_warmup_forwards)

    @property
    def trace_file(self) -> Path:
        """Where --profiling tidy_profiling writes."""
        return Path(self.trace_path) if self.trace_path else Path(self.checkpoint_path or "") / "trace.json"


# May differ between the ranks of one job: who and where a process is, and paths, which each host may spell its own way.
PER_RANK_FLAGS = frozenset(
    {
        *("rank", "world_size", "dist_url", "net_interface", "rendezvous_timeout", "cuda_id", "num_threads", "device"),
        *("secret_file", "max_restarts", "supervise", "min_free_memory"),
        *(
            "model_name",
            "tokenizer_name",
            "task_name",
            "task_module",
            "evaluation_data",
            "checkpoint_path",
            "trace_path",
            "memory_limit",
            "resume",
        ),
        *("train_log_backend", "project_name", "logging_steps"),
    }
)


def shared_flags(config: Config) -> dict[str, Any]:
    """The flags that must be equal on all ranks, by flag name; the hub compares them before anything else happens."""
    return {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(config).items() if name not in PER_RANK_FLAGS}
