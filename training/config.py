"""The trainer's flags as one frozen dataclass. The only file of the house that knows of a command line.

Lower rooms are handed values, never this object. How a command line becomes one: parsing.py. ``python -m training.config`` prints
docs/flags.md."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from comms.codecs import WireDtype
from comms.rendezvous import DEFAULT_DIST_URL, Door, door_of_torchrun, parse_dist_url
from pipeline_parallel.schedule import PipelineMode
from training.flags import describe_flags, flag

_MODEL, _MEETING, _GRID, _DATA, _STEPS, _TRAINED, _PRECISION, _OPTIMIZER, _SAVING, _REPORT, _MACHINE = (
    "model",
    "meeting",
    "grid",
    "data",
    "steps",
    "what is trained",
    "precision",
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
        "form in which activations travel between stages; none: as computed; int8: a scale per row; int4: one per 64 values, which "
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
        False, "resume although task list, seed, sequence length or tokenizer changed: the data starts over", group=_DATA
    )
    allow_batch_change: bool = flag(
        False, "resume with another global batch, from the same place in the data; the optimizer step goes on counting", group=_DATA
    )

    batch_size: int = flag(8, "sequences per replica and accumulation step", group=_STEPS)
    micro_batch_size: int = flag(1, "sequences that go through a stage at once; divides --batch-size", group=_STEPS)
    gradient_accumulate_step: int = flag(1, "accumulation steps per optimizer step", group=_STEPS)
    total_steps: int | None = flag(
        None, "accumulation steps of the whole run, earlier runs that it resumes included; required", group=_STEPS
    )
    warmup_steps: int | None = flag(None, "accumulation steps over which the learning rate rises; left out: 0", group=_STEPS)
    warmup_proportion: float | None = flag(None, "the same as a share of --total-steps, 0 .. 1", group=_STEPS)

    fp16: bool = flag(
        False,
        "parameters and hidden states in fp16, with fp32 masters and a loss scale; a CPU, which is slow at it, computes in fp32",
        group=_PRECISION,
    )
    bf16: bool = flag(False, "parameters and hidden states in bf16, with exact masters; gradients add up in fp32", group=_PRECISION)
    master_weights: Literal["split", "fp32"] = flag(
        "split",
        "split: a bf16 parameter and 16 more bits are its fp32 master, 4 bytes in all; fp32: whole masters, 6 bytes, the same bits (--fp16 "
        "always has those)",
        group=_PRECISION,
    )
    loss_scale: float | None = flag(
        None, "the factor that keeps fp16 gradients from vanishing, for the whole run; left out: it follows the overflows", group=_PRECISION
    )
    initial_loss_scale: float = flag(32768.0, "where the loss scale of --fp16 begins", group=_PRECISION)
    loss_scale_window: int = flag(1000, "optimizer steps without an overflow until the loss scale doubles", group=_PRECISION)
    min_loss_scale: float = flag(1.0, "the least that overflows reduce the loss scale to", group=_PRECISION)
    loss_scale_hysteresis: int = flag(
        2, "overflows until the loss scale is halved, and with each further one again; counted anew when it doubles", group=_PRECISION
    )

    train: Literal["all", "lora", "layernorm"] = flag(
        "all",
        "what is trained: all weights; lora: low-rank adapters beside frozen linears; layernorm: the LayerNorms alone. The latter two "
        "leave checkpoints of a few MB that peft reads",
        group=_TRAINED,
    )
    lora_rank: int = flag(8, "rank of the adapters of --train lora", group=_TRAINED)
    lora_alpha: float = flag(16.0, "the adapters' output is multiplied by alpha / rank", group=_TRAINED)
    lora_dropout: float = flag(0.0, "share of an adapter's input that is dropped while training, 0 .. 1", group=_TRAINED)
    lora_target_modules: str = flag(
        "all-linear",
        "the linears of a layer that get adapters: names such as q_proj,v_proj (GPT-NeoX: query_key_value,dense), or all-linear",
        group=_TRAINED,
    )
    dropout: float = flag(
        0.0,
        "share of the embeddings' output, of attention weights and of what attention and MLP add that is dropped while training, 0 .. 1",
        group=_TRAINED,
    )
    base_quantization: Literal["none", "int8", "nf4"] = flag(
        "none",
        "form of the frozen linears for --train lora and layernorm: int8: 1 byte a weight, a scale per row; nf4: about 0.56 bytes (needs "
        "bitsandbytes)",
        group=_TRAINED,
    )
    quantize_ends: bool = flag(False, "with --base-quantization: embeddings and head in int8 too", group=_TRAINED)

    optimizer: Literal["adam", "8bit-adam"] = flag(
        "adam", "adam: AdamW, fused, fp32 moments; 8bit-adam: moments in 8 bits, 2 bytes a parameter (needs bitsandbytes)", group=_OPTIMIZER
    )
    optimizer_offload: Literal["none", "cpu"] = flag(
        "none", "cpu: masters and moments lie in host memory and are updated there; for GPUs, on a CPU they do anyway", group=_OPTIMIZER
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
    max_skipped_steps: int = flag(
        10,
        "optimizer steps in a row whose loss or gradient is not finite, and which change nothing, until the run gives up",
        group=_OPTIMIZER,
    )
    seed: int = flag(42, "seed of fresh weights and of the data order", group=_OPTIMIZER)

    checkpoint_path: str | None = flag(
        None, "folder of this job's checkpoints and log, one that all hosts share or one on each; see --resume; required", group=_SAVING
    )
    checkpoint_steps: int = flag(0, "accumulation steps between checkpoints; 0: only the final one", group=_SAVING)
    async_checkpoint: bool = flag(
        True, "true: training goes on while a copy in host memory is written; false, or without room for it: training waits", group=_SAVING
    )
    checkpoint_optimizer: bool = flag(
        True,
        "false: save weights without optimizer states, a third of the bytes or less; a resume starts fresh moments",
        group=_SAVING,
    )
    keep_checkpoints: int = flag(0, "how many of the newest checkpoints stay; 0: all", group=_SAVING)
    resume: str = flag(
        "auto",
        "auto: from the newest complete checkpoint in --checkpoint-path; none: from the start; a step's number; or the folder of a "
        "checkpoint elsewhere. Newer steps than that are kept under another name. Restarts by torchrun go on from what their run saved",
        group=_SAVING,
    )
    verify_checkpoint: bool = flag(False, "compare the sha256 of every file before resuming, not only its size", group=_SAVING)
    verify_resume: bool = flag(
        False,
        "store loss and gradient norm of the last batch with each checkpoint, and on resume compute them again and compare bit for bit; "
        "costs a step without update per checkpoint",
        group=_SAVING,
    )

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
        *("model_name", "tokenizer_name", "task_name", "checkpoint_path", "trace_path", "memory_limit", "resume"),
        *("train_log_backend", "project_name", "logging_steps"),
    }
)


def shared_flags(config: Config) -> dict[str, Any]:
    """The flags that must be equal on all ranks, by flag name; the hub compares them before anything else happens."""
    return {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(config).items() if name not in PER_RANK_FLAGS}


if __name__ == "__main__":
    print(
        "# Flags of dist_clm_train.py\n\nMade by `python -m training.config > docs/flags.md`. Any of them can stand in "
        "`--config FILE.yaml` by name.\n"
    )
    print(describe_flags(Config), end="")
