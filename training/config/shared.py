"""The flags that training and evaluation share: which model, where its ranks meet, how it is cut, in what it computes, how records are
read.

Lower rooms are handed values, never these objects. train.py and evaluation.py add what is theirs."""

import dataclasses
from typing import Literal

from comms.rendezvous import DEFAULT_DIST_URL, Door, door_of_torchrun, parse_dist_url
from training.config.flags import flag

MODEL, MEETING, GRID, RECORDS, PRECISION, TRAINED, MACHINE = (
    "model",
    "meeting",
    "grid",
    "records",
    "precision",
    "what is trained",
    "machine",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
    """One field per flag; None where a flag was left out and its value is found later (see the help text)."""

    model_name: str | None = flag(None, "the model: a layer-sharded folder, a Hugging Face folder or a hub name; required", group=MODEL)
    tokenizer_name: str | None = flag(None, "the tokenizer: a folder or hub name; left out: the one in --model-name", group=MODEL)
    model_type: Literal["gptj", "gptneox"] | None = flag(
        None,
        "the model's family, only checked (gptneox: also Pythia, RedPajama-INCITE); left out: as config.json says",
        group=MODEL,
    )
    embedding_dim: int | None = flag(None, "width of the model, only checked; left out: as config.json says", group=MODEL)
    load_pretrained_model: bool = flag(
        True, "true: start from the model's weights; false: draw them, seeded by (--seed, parameter name)", group=MODEL
    )

    dist_url: str | None = flag(
        None, f"tcp://HOST:PORT where rank 0 listens and all meet; left out: torchrun's, else {DEFAULT_DIST_URL}", group=MEETING
    )
    rank: int | None = flag(None, "this process's number, 0 .. world size - 1; left out: RANK of the environment, else 0", group=MEETING)
    world_size: int | None = flag(
        None, "processes of the whole job; left out: WORLD_SIZE of the environment, else stages x replicas", group=MEETING
    )
    net_interface: str | None = flag(
        None, "the network interface for all traffic of this process; left out: the one that routes to --dist-url", group=MEETING
    )
    dp_backend: Literal["nccl", "gloo"] | None = flag(
        None, "transport of ALL links, between stages too; left out: nccl on CUDA, gloo on CPU", group=MEETING
    )
    rendezvous_timeout: float = flag(300.0, "seconds within which all ranks must have come, else the missing ones are named", group=MEETING)
    peer_timeout: str = flag(
        "auto",
        "seconds without a sign of life, or without any progress inside a step, after which a rank is taken for lost; auto: 30 without a "
        "sign, and ten of the longest steps so far (five minutes at least) without progress",
        group=MEETING,
    )
    secret_file: str | None = flag(
        None,
        "file of the secret that the ranks of this job share, readable by you alone; left out: DIST_SECRET of the environment, else, over "
        "loopback, one of your own that is made once (docs/security.md)",
        group=MEETING,
    )
    allow_public_interface: bool = flag(
        False, "meet over an interface with an address of the public internet: what is sent can be read there", group=MEETING
    )

    pipeline_group_size: int = flag(1, "stages of the pipeline", group=GRID)
    data_group_size: int | None = flag(None, "replicas of the pipeline; left out: world size / stages", group=GRID)
    num_layers: int | None = flag(None, "layers per stage N: stage s holds [s*N, min((s+1)*N, L)); left out: see --partition", group=GRID)
    stage_layers: str | None = flag(None, "layers of each stage by hand, such as 6,8,8,6; left out: see --partition", group=GRID)

    fp16: bool = flag(
        False,
        "parameters and hidden states in fp16, with fp32 masters and a loss scale; a CPU, which is slow at it, computes in fp32",
        group=PRECISION,
    )
    bf16: bool = flag(False, "parameters and hidden states in bf16, with exact masters; gradients add up in fp32", group=PRECISION)
    base_quantization: Literal["none", "int8", "nf4"] = flag(
        "none",
        "form of the frozen linears for --train lora and layernorm: int8: 1 byte a weight, a scale per row; nf4: about 0.56 bytes (needs "
        "bitsandbytes)",
        group=TRAINED,
    )
    quantize_ends: bool = flag(False, "with --base-quantization: embeddings and head in int8 too", group=TRAINED)

    device: Literal["auto", "cpu", "cuda"] = flag("auto", "what this process computes on; auto: CUDA where there is one", group=MACHINE)
    cuda_id: int | None = flag(None, "index of this process's GPU; left out: LOCAL_RANK of the environment, else 0", group=MACHINE)
    num_threads: int | None = flag(
        None,
        "compute threads of this process on a CPU; left out: OMP_NUM_THREADS, else cores // ranks on this host",
        group=MACHINE,
    )

    @property
    def num_stages(self) -> int:
        return self.pipeline_group_size

    @property
    def peer_timeout_s(self) -> float | None:
        """--peer-timeout in seconds; None for auto."""
        return None if self.peer_timeout == "auto" else float(self.peer_timeout)

    @property
    def door(self) -> Door:
        """Where the ranks meet; parse_config has made dist_url a valid one or left it to torchrun."""
        if self.dist_url is not None:
            return parse_dist_url(self.dist_url)
        alone = Door(host="127.0.0.1", port=0)  # a single process meets nobody: any free port
        return door_of_torchrun() or (alone if self.world_size == 1 else parse_dist_url(DEFAULT_DIST_URL))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingConfig(JobConfig):
    """And how the records of data files become text."""

    task_module: str | None = flag(
        None, "a Python file with tasks of your own (docs/tasks.md), run on every rank that reads records", group=RECORDS
    )
    text_column: str | None = flag(
        None,
        "column of the text in the files of task classification: a name, or a number from 1 for files without a header; left out: text, "
        "sentence, message or sms",
        group=RECORDS,
    )
    label_column: str | None = flag(None, "column of the label, likewise; left out: label, category, class or intent", group=RECORDS)
    labels: str | None = flag(
        None,
        "labels of task classification, with commas; left out: those that each source has, so name them where training and evaluation data "
        "do not have the same",
        group=RECORDS,
    )
    classification_prompt: Literal["instruction", "raw"] = flag(
        "instruction", "task classification: instruction: names the labels and asks for one; raw: the text alone", group=RECORDS
    )
    on_bad_record: Literal["error", "skip"] = flag(
        "error", "a malformed record stops the job, naming file:line, or is skipped and counted", group=RECORDS
    )
    seed: int = flag(42, "seed of the data order, of fresh weights, and of the examples that few-shot prompts show", group=RECORDS)
