"""Tiny random GPT-Js on disk and one-process saves, for the tests of checkpoint/ and of the converters."""

import builtins
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPTJConfig as HFConfig
from transformers import GPTJForCausalLM

from checkpoint.companions import read_companions
from checkpoint.layer_store import StepWeights, StepWriter
from checkpoint.model_folder import ModelFolder, load_stage
from checkpoint.tensor_file import FileRecord
from checkpoint.train_state import pack_train_state
from modules.gptj import GPTJConfig
from modules.stage import Stage, empty_stage

TOKENS = torch.arange(12).reshape(2, 6)
TOKENIZER = {"tokenizer.json": '{"version": "1.0"}', "tokenizer_config.json": "{}", "merges.txt": "#version: 0.2\n"}


def hf_model(num_layers: int = 3, dtype: torch.dtype = torch.float32) -> GPTJForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": num_layers, "n_head": 4, "rotary_dim": 4}
    return GPTJForCausalLM(HFConfig(**sizes, bos_token_id=0, eos_token_id=1)).to(dtype).eval()


def save_hf(model: GPTJForCausalLM, folder: Path, **how: object) -> Path:
    """save_pretrained plus the files of a (nonsense) tokenizer."""
    model.save_pretrained(folder, **how)
    for name, text in TOKENIZER.items():
        (folder / name).write_text(text)
    return folder


def with_bin_files(folder: Path, *shards: dict[str, Tensor]) -> Path:
    """Replace the weights of ``folder`` by pytorch_model.bin or, for several shards, by .bin shards with an index."""
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    if len(shards) == 1:
        torch.save(shards[0], folder / "pytorch_model.bin")
        return folder
    names = [f"pytorch_model-{i:05d}-of-{len(shards):05d}.bin" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        torch.save(shard, folder / name)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files, read by the safetensors package."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and torch.equal(as_bytes(a[name]), as_bytes(b[name]))
        for name in a
    )


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def loaded_stage(folder: Path, first: int = 0, last: int | None = None) -> Stage:
    model = ModelFolder.open(folder)
    config = GPTJConfig.from_hf(model.config)
    stage = empty_stage(config, first, config.num_layers if last is None else last)
    load_stage(stage, model)
    return stage


def adamw_state(stage: Stage, num_steps: int) -> dict[str, dict[str, Tensor]]:
    """What AdamW holds after ``num_steps`` updates with made-up gradients; the stage's weights move with them."""
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(num_steps)
    for _ in range(num_steps):
        for parameter in stage.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    fresh = {
        name: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p), "step": torch.tensor(0.0)}
        for name, p in stage.named_parameters()
    }
    return {name: {**fresh[name], **optimizer.state.get(parameter, {})} for name, parameter in stage.named_parameters()}


def write_parts(writer: StepWriter, model: Path, stage: Stage, state: dict[str, dict[str, Tensor]]) -> list[FileRecord]:
    """What the rank of one stage does between begin and prepare."""
    dtypes = {name: ModelFolder.open(model).dtype(name) for name, _ in stage.named_parameters()}
    records = []
    for key, parameters in stage.parameters_by_layer():
        weights = {name: parameter.detach() for name, parameter in parameters}
        state = state or adamw_state(stage, 0)
        records.append(writer.write_layer(key, weights, dtypes))
        records.append(writer.write_train_state(key, pack_train_state(weights, state, dtypes)))
    return records


def finish_step(
    writer: StepWriter,
    records: Sequence[FileRecord],
    copy_from: Sequence[Path],
    *,
    elsewhere: Sequence[FileRecord] = (),
    position: int | None = None,
    **trainer: object,
) -> Path:
    """What the keeper of a folder does after all writers: prepare and commit."""
    model = ModelFolder.open(copy_from[0])
    writer.prepare(
        [*records, *writer.write_companions(read_companions(copy_from, dtypes={model.dtype(name) for name in model.names()}))],
        elsewhere,
        position=writer.step if position is None else position,
        weights=StepWeights.of(model),
        trainer={"step": writer.step, **trainer},
        visible_within_s=0.2,
    )
    return writer.commit()


def save_step(
    root: Path,
    step: int,
    model: Path,
    stage: Stage,
    state: dict[str, dict[str, Tensor]] | None = None,
    position: int | None = None,
) -> Path:
    """A whole save, in one process."""
    writer = StepWriter(root, step)
    writer.begin()
    return finish_step(writer, write_parts(writer, model, stage, state or {}), [model], position=position)


def killed_at(k: int, action: Callable[[], object]) -> bool:
    """Run ``action`` in a child that kills itself (-9) just before its k-th call that changes the disk; in a write, after half of it.

    False if the action has fewer such calls and came to its end.
    """
    child = os.fork()
    if child == 0:
        _arm(k)
        try:
            action()
        except BaseException:
            os._exit(3)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the child of kill point {k} failed with status {status}"
    return status != 0


def _arm(k: int) -> None:
    calls = iter(range(k))

    def point(before_death: Callable[[], object] = lambda: None) -> None:
        if next(calls, None) is None:
            before_death()
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate", "pwrite"):
        real = getattr(os, name)
        setattr(os, name, lambda *args, real=real, **kwargs: (point(), real(*args, **kwargs))[1])
    real_open = builtins.open

    class Dying:
        """A file opened for writing."""

        def __init__(self, file) -> None:
            self.file, self.num_writes = file, 0

        def write(self, data) -> int:
            self.num_writes += 1
            if self.num_writes <= 2:  # a header and a first tensor; the later ones differ in nothing
                point(lambda: (self.file.write(data[: len(data) // 2]), self.file.flush()))
            return self.file.write(data)

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    def dying_open(path, mode="r", *args, **kwargs):
        if set(mode).isdisjoint("wxa+"):
            return real_open(path, mode, *args, **kwargs)
        point()
        return Dying(real_open(path, mode, *args, **kwargs))

    builtins.open = dying_open
