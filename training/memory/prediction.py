"""How much memory each stage of a run will take, by part, before anything is started; and what it took in the end.

    python -m training.memory --model-name MODEL --pipeline-group-size 2 [any other flag of the trainer] [--json]

Reads config.json alone: no weight, no data, no other rank, and --device cuda needs no GPU. Flags that do not matter here (--task-name,
--checkpoint-path, --total-steps) may be left out; --device auto is cpu.

How a stage's total comes about. Weights, masters, moments and gradients are counted on the stage itself, built on the meta device by the
code that builds it for training; activations are found by a rehearsal (rehearsal.py). With k micro-batches in flight:

    resident   weights + masters + moments + gradients + receive buffers
    in flight  k * (what a micro-batch keeps from its forward to its backward; zb: or to its weight gradients, where that is more)
    total      resident + in flight + the most that any of these phases adds to both:
                 forward   of the last of the k      loss and head      backward
                 update    one piece of a parameter (nothing is in flight: subtracted)
                 loading   one weight on its way in (no gradients yet, and nothing in flight: subtracted)

That last summand is told apart as the activations of the layer that is recomputed, the logits and gradients of the head, and the rest
(temporary: the gradient of a weight before it is added, dequantised blocks, what a layer computes on the way). Left out: scratch memory
inside single operations, what allocators round up and cannot use, the process itself with its libraries, token ids.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint.command import exit_status
from checkpoint.model_folder import ModelFolder, resolve_model_folder
from comms.transport import GlooTransport, NcclTransport
from modules.families import read_model_config
from modules.model_config import ModelConfig
from modules.quantized import CHUNK_BYTES
from modules.stage import Stage, meta_stage
from optim.build import AdamW
from optim.masters import Master
from pipeline_parallel.partition import Cut, size_in_words
from pipeline_parallel.schedule import warmup_forwards
from training.checkpoints.host_copy import layers_of
from training.compute.build import assemble_stage, make_optimizer
from training.compute.gradient import LEAST_DEPTH, wire_codecs
from training.compute.in_flight import asked_extra_warmup, in_flight_of
from training.config.cli import parse_config
from training.config.flags import parse_known_flags
from training.config.precision import GRADIENT_BYTES, Precision, precision_of
from training.config.train import Config
from training.job.local_facts import check_fit, cut_of
from training.job.report import table
from training.memory.rehearsal import META, AliveBytes, Rehearsal, bytes_of, rehearse

_FP32 = torch.float32.itemsize
_DEVICE_PARTS = {
    "weights_trained": "weights, trained",
    "weights_frozen": "weights, frozen",
    "weights_quantized": "weights, quantised",
    "weight_scales": "scales of those",
    "masters": "masters",
    "moments": "moments",
    "gradients": "gradients",
    "wire": "receive buffers",
    "activations_in_flight": "activations in flight",
    "recomputed_layer": "of the recomputed layer",
    "head": "logits and head",
    "temporary": "temporary",
}
_HOST_PARTS = {
    "host_masters": "host: masters",
    "host_moments": "host: moments",
    "host_wire": "host: receive buffers",
    "host_copy": "host: copy for checkpoints",
}


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Predicted bytes of one stage, every replica alike. masters: beside the parameters; wire: receive buffers of the links; host_copy: of
    an asynchronous checkpoint, on the ranks that write one. host_*: in host memory, which on a CPU is the same memory. peak: the phase in
    which the total is reached, "forward", "loss", "backward", "update" or "loading"."""

    first: int
    last: int
    in_flight: int
    on_host: bool
    peak: str
    weights_trained: int
    weights_frozen: int
    weights_quantized: int
    weight_scales: int
    masters: int
    moments: int
    gradients: int
    wire: int
    activations_in_flight: int
    recomputed_layer: int
    head: int
    temporary: int
    host_masters: int = 0
    host_moments: int = 0
    host_wire: int = 0
    host_copy: int = 0

    @property
    def weights(self) -> int:
        """In all forms, scales included."""
        return self.weights_trained + self.weights_frozen + self.weights_quantized + self.weight_scales

    @property
    def host(self) -> int:
        """Of the parts in host memory."""
        return sum(getattr(self, name) for name in _HOST_PARTS)

    @property
    def total(self) -> int:
        """At the peak, on the device that computes; where that is the CPU the host's parts too."""
        return sum(getattr(self, name) for name in _DEVICE_PARTS) + (self.host if self.on_host else 0)


def predict_stages(
    config: Config,
    model_config: ModelConfig,
    cut: Cut,
    in_flight: Sequence[int],
    device: torch.device,
    file_dtypes: Mapping[str, torch.dtype] | None = None,
) -> list[StageMemory]:
    """By stage. in_flight: the most micro-batches whose activations it holds; device: its type counts, and need not be there; file_dtypes:
    of the model's weights by name, which checkpoints keep (None: fp32). Nothing is allocated. Raises UserError as assemble_stage does."""
    rehearsals: dict[tuple[bool, bool, int], tuple[Rehearsal, int]] = {}
    stages = []
    for s, (first, last) in enumerate(cut):
        alike = (first == 0, last == model_config.num_layers, last - first)
        if alike not in rehearsals:
            rehearsal = rehearse(config, model_config, (first, last), device)
            rehearsals[alike] = (rehearsal, _bytes_recomputed(config, model_config, device))
        stages.append(_predict(config, model_config, (s, first, last), in_flight[s], device, file_dtypes or {}, *rehearsals[alike]))
    return stages


def predict_stage(config: Config, model_config: ModelConfig, cut: Cut, s: int, in_flight: int, device: torch.device) -> StageMemory:
    """The same of stage ``s`` alone, for the rank that computes it."""
    first, last = cut[s]
    rehearsal = rehearse(config, model_config, (first, last), device)
    return _predict(
        config, model_config, (s, first, last), in_flight, device, {}, rehearsal, _bytes_recomputed(config, model_config, device)
    )


def _predict(
    config: Config,
    model_config: ModelConfig,
    where: tuple[int, int, int],
    in_flight: int,
    device: torch.device,
    file_dtypes: Mapping[str, torch.dtype],
    rehearsal: Rehearsal,
    recomputed: int,
) -> StageMemory:
    """where: (stage, first layer, last layer)."""
    s, first, last = where
    precision = precision_of(config, device)
    stage = assemble_stage(config, model_config, (first, last), META, precision)
    is_offloaded = config.optimizer_offload == "cpu" and device.type != "cpu"  # a CPU's masters lie in its memory anyway
    optimizer = make_optimizer(dataclasses.replace(config, optimizer_offload="none"), stage, precision)
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    masters = _bytes_of_masters(optimizer)
    if is_offloaded:  # whole, also beside fp32 parameters
        masters = sum(parameter.numel() for parameter in trained) * _FP32
    moments = bytes_of([tensor for state in optimizer.state().values() for tensor in state.values()])
    on_device, on_host = _wire_bytes(config, model_config, s, device)
    held = in_flight * max(rehearsal.kept, rehearsal.left_over)
    gradients = sum(parameter.numel() for parameter in trained) * GRADIENT_BYTES
    loading = _bytes_while_loading(config, model_config, stage, precision, file_dtypes, device)
    extra = {
        "forward": rehearsal.forward - rehearsal.kept,
        "loss": rehearsal.loss - rehearsal.kept,
        "backward": rehearsal.backward - rehearsal.kept,
        "update": _bytes_of_update(optimizer) - held,
        "loading": loading - gradients - held,
    }
    peak = max(extra, key=lambda phase: extra[phase])
    of_layer = min(recomputed, extra[peak]) if peak == "backward" else 0
    of_head = {"loss": extra[peak], "backward": min(rehearsal.left_by_loss, extra[peak] - of_layer)}.get(peak, 0)
    return StageMemory(
        first=first,
        last=last,
        in_flight=in_flight,
        on_host=device.type == "cpu",
        peak=peak,
        **_bytes_of_weights(stage),
        masters=0 if is_offloaded else masters,
        moments=0 if is_offloaded else moments,
        gradients=gradients,
        wire=on_device,
        activations_in_flight=held,
        recomputed_layer=of_layer,
        head=of_head,
        temporary=extra[peak] - of_layer - of_head,
        host_masters=masters if is_offloaded else 0,
        host_moments=moments if is_offloaded else 0,
        host_wire=on_host,
        host_copy=_bytes_of_host_copy(config, stage, optimizer, file_dtypes),
    )


def _bytes_recomputed(config: Config, model_config: ModelConfig, device: torch.device) -> int:
    """What one layer keeps for its backward, if it is computed a second time for that; else 0."""
    if config.recompute != "layer":
        return 0
    plain = dataclasses.replace(config, recompute="none")
    four = dataclasses.replace(model_config, num_layers=4)
    return rehearse(plain, four, (1, 3), device).kept - rehearse(plain, four, (1, 2), device).kept


def _bytes_of_weights(stage: Stage) -> dict[str, int]:
    parts = dict.fromkeys(("weights_trained", "weights_frozen", "weights_quantized", "weight_scales"), 0)
    for name, parameter in stage.named_parameters():
        if name.endswith(".weight_scale"):
            part = "weight_scales"
        elif not parameter.is_floating_point():
            part = "weights_quantized"
        else:
            part = "weights_trained" if parameter.requires_grad else "weights_frozen"
        parts[part] += parameter.nbytes
    return parts


def _bytes_of_masters(optimizer: AdamW) -> int:
    return sum(master.parts[-1].nbytes for master in optimizer.masters().values() if not master.is_own)


def _bytes_of_update(optimizer: AdamW) -> int:
    """Beside what is there all the time: a piece of a master that is put together, changed and taken apart."""

    def of(master: Master) -> int:
        with AliveBytes() as bytes_alive, torch.no_grad():
            piece = next(iter(master.pieces()))
            master.write(piece, master.read(piece))
        return bytes_alive.pop_peak()

    return max((of(master) for master in optimizer.masters().values() if not master.is_own), default=0)


def _bytes_while_loading(
    config: Config,
    model_config: ModelConfig,
    stage: Stage,
    precision: Precision,
    file_dtypes: Mapping[str, torch.dtype],
    device: torch.device,
) -> int:
    """On the device that computes, of one weight on its way from a file or a generator: there the largest, drawn in fp32 into a second
    tensor, or as it lies in the mapped file."""
    if device.type != "cpu":
        return 3 * CHUNK_BYTES if config.base_quantization != "none" else 0
    largest = {name: p.numel() for name, p in meta_stage(model_config, stage.first, stage.last).named_parameters()}
    if not config.load_pretrained_model:
        return 2 * _FP32 * max(largest.values())
    return max(count * file_dtypes.get(name, torch.float32).itemsize for name, count in largest.items())


def _wire_bytes(config: Config, model_config: ModelConfig, s: int, device: torch.device) -> tuple[int, int]:
    """Of the buffers of receives that stage ``s`` posts ahead: (on the device, in pinned host memory)."""
    shape = (config.micro_batch_size, config.seq_length, model_config.width)  # (B, T, C)
    computed = precision_of(config, device).compute
    activations, gradients = wire_codecs(
        config.wire_dtype, config.wire_dtype_grad or config.wire_dtype, shape, torch.device("cpu"), computed
    )
    is_nccl = device.type != "cpu" and config.dp_backend != "gloo"
    max_depth = (NcclTransport if is_nccl else GlooTransport).max_depth
    total = 0
    for link, codec in ((s - 1, activations), (s, gradients)):
        if 0 <= link < config.num_stages - 1:
            num_micro_batches = config.batch_size // config.micro_batch_size
            ahead = max(LEAST_DEPTH, 1 + warmup_forwards(link, config.num_stages, asked_extra_warmup(config)))
            total += min(max_depth, num_micro_batches if config.pp_mode == "gpipe" else ahead) * codec.num_bytes
    return (total, 0) if is_nccl or device.type == "cpu" else (0, total)


def _bytes_of_host_copy(config: Config, stage: Stage, optimizer: AdamW, file_dtypes: Mapping[str, torch.dtype]) -> int:
    """The last checkpoint of a run makes no copy."""
    if not (config.async_checkpoint and config.checkpoint_steps):
        return 0
    names = [name for _, layer in stage.trained_by_layer() for name, _ in layer]
    dtypes = {name: file_dtypes.get(name, torch.float32) if config.train == "all" else torch.float32 for name in names}
    layers = layers_of(stage, optimizer, dtypes, with_optimizer=config.checkpoint_optimizer)
    tensors = [tensor for layer in layers.values() for tensor in (*layer.weights.values(), *layer.train_state.values())]
    return bytes_of([part for tensor in tensors for part in ((tensor,) if isinstance(tensor, Tensor) else tensor.parts)])


def describe(prediction: StageMemory, measured: int) -> str:
    """One line for the log: the total against ``measured`` bytes, and what it is made of."""
    parts = {
        "weights": prediction.weights,
        "masters": prediction.masters,
        "moments": prediction.moments,
        "gradients": prediction.gradients,
        "activations": prediction.activations_in_flight + prediction.recomputed_layer,
        "head": prediction.head,
        "wire": prediction.wire,
        "temporary": prediction.temporary,
        **({"on the host": prediction.host} if prediction.on_host else {}),
    }
    said = ", ".join(f"{name} {size_in_words(num_bytes)}" for name, num_bytes in parts.items() if num_bytes)
    return f"memory of this stage: predicted {size_in_words(prediction.total)}, measured peak {size_in_words(measured)} ({said})"


def _parse(argv: Sequence[str]) -> Config:
    """The trainer's own parsing, with values for what it insists on and nobody here reads. Raises UserError."""
    names = ("checkpoint_path", "task_name", "total_steps", "device", "gradient_accumulate_step", "warmup_steps")
    given = parse_known_flags(Config, argv, names)
    needed = {"checkpoint_path": "none", "task_name": "none"}
    if given["total_steps"] is None:
        every = max(1, given["gradient_accumulate_step"])
        needed["total_steps"] = str(every * -(-max(1, given["warmup_steps"] or 1) // every))
    filled = [f"--{name.replace('_', '-')}={value}" for name, value in needed.items() if given.get(name) is None]
    return parse_config([*argv, *filled, *(["--device=cpu"] if given["device"] == "auto" else [])], environment={})


def _in_words(config: Config, stages: Sequence[StageMemory]) -> str:
    rows: list[tuple[str, ...]] = [
        ("stage", *(str(s) for s in range(len(stages)))),
        ("layers", *(f"{stage.first} .. {stage.last - 1}" for stage in stages)),
        ("micro-batches in flight", *(str(stage.in_flight) for stage in stages)),
    ]
    for name, words in {**_DEVICE_PARTS, **_HOST_PARTS}.items():
        if any(getattr(stage, name) for stage in stages):
            rows.append((words, *(size_in_words(getattr(stage, name)) for stage in stages)))
    rows.append((f"total on the {config.device}", *(size_in_words(stage.total) for stage in stages)))
    rows.append(("reached in", *(stage.peak for stage in stages)))
    notes = []
    if config.num_stages > 1 and config.partition == "measured":
        notes.append("the cut is the even one: --partition measured finds its own when the ranks meet")
    if config.num_stages > 1 and config.extra_warmup is None and config.pp_mode != "gpipe":
        notes.append("--extra-warmup-forwards auto is taken as 0; on a long link more micro-batches are in flight")
    return "\n".join([table(rows), *(f"  note: {note}" for note in notes)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv``; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.memory",
        description="Predict the memory of every stage of a run from config.json alone.",
        epilog="Besides: --model-name MODEL and any other flag of dist_clm_train.py, see docs/flags.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs: bytes")
    arguments, flags = parser.parse_known_args(argv)

    def work() -> int:
        config = _parse(flags)
        assert config.model_name is not None, "parse_config requires it"
        model = ModelFolder.open_config(resolve_model_folder(config.model_name, weights=False))
        model_config = read_model_config(model.config)
        check_fit(config, model, model_config)
        file_dtypes = {name: model.dtype(name) for name in model.names()}
        cut, in_flight = cut_of(config, model_config.num_layers), in_flight_of(config, asked_extra_warmup(config))
        stages = predict_stages(config, model_config, cut, in_flight, torch.device(config.device), file_dtypes)
        if arguments.json:
            facts = [{**dataclasses.asdict(stage), "host": stage.host, "total": stage.total} for stage in stages]
            print(json.dumps({"device": config.device, "stages": facts}, indent=2))
        else:
            print(_in_words(config, stages))
        return 0

    return exit_status(work, before_error="error: ")
