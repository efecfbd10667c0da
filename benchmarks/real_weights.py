"""Random weights of real shapes, written tensor by tensor, and folders of them compared bit by bit.

For real_scale.py. A weight depends on (seed, its name) alone, so what went in can be drawn again
after its file is gone. At most two tensors are in memory at a time: the one that is drawn, and the
part of a mapped file that it is held against."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from checkpoint.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from checkpoint.hf_folder import cut_into_shards
from checkpoint.layered_folder import write_index
from checkpoint.model_folder import ModelFolder
from checkpoint.tensor_file import TensorSource, write_tensor_file
from checkpoint.weight_file import open_weight_file
from modules.families import read_model_config
from modules.stage import in_model_order, meta_stage
from user_error import UserError

SHARD_BYTES = 5 * 10**9
STD = 0.02
_BLOCK = 1 << 23  # values that are drawn or compared at once
_MB = 10**6

Progress = Callable[[int], object]


def _gptj(**sizes: int) -> dict[str, Any]:
    return {
        "model_type": "gptj",
        "architectures": ["GPTJForCausalLM"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_inner": None,
        "n_positions": 2048,
        "rotary": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        **{f"{kind}_pdrop": 0.0 for kind in ("attn", "embd", "resid")},
        **sizes,
    }


def _neox(
    width: int, layers: int, heads: int, vocab: int, activation: str = "gelu"
) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
    }


# The public shapes, and the smallest one, for tests and for trying the script.
MODELS: dict[str, dict[str, Any]] = {
    "gpt-j-6b": _gptj(n_embd=4096, n_layer=28, n_head=16, rotary_dim=64, vocab_size=50400),
    "gpt-neox-20b": _neox(6144, 44, 64, 50432, "gelu_fast"),
    "pythia-1.4b": _neox(2048, 24, 16, 50304),
    "pythia-1b": _neox(2048, 16, 8, 50304),
    "pythia-410m": _neox(1024, 24, 16, 50304),
    "tiny-gptj": _gptj(n_embd=64, n_layer=4, n_head=4, rotary_dim=8, vocab_size=50400),
    "tiny-neox": _neox(64, 4, 4, 50432),
}


def weights_of(config: Mapping[str, Any], seed: int) -> dict[str, TensorSource]:
    """All weights in fp16, by Hugging Face names, in model order. Each is drawn when it is read."""
    model = read_model_config(config)
    shapes = {
        name: p.shape for name, p in meta_stage(model, 0, model.num_layers).named_parameters()
    }
    names = in_model_order(shapes, model.num_layers)
    dtype = torch.float16
    return {
        n: TensorSource(
            name=n, dtype=dtype, shape=shapes[n], read=partial(drawn, n, shapes[n], seed)
        )
        for n in names
    }


def drawn(name: str, shape: torch.Size, seed: int) -> Tensor:
    """N(0, .02) in fp16, around 1 for the weights of LayerNorms."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    is_scale = len(shape) == 1 and name.endswith("weight")
    result = torch.empty(shape, dtype=torch.float16)
    for part in result.view(-1).split(_BLOCK):
        part.copy_(
            torch.empty(part.shape).normal_(1.0 if is_scale else 0.0, STD, generator=generator)
        )
    return result


def bytes_of(config: Mapping[str, Any]) -> int:
    """Of the weights in fp16."""
    return sum(source.num_bytes for source in weights_of(config, 0).values())


def make_model(
    folder: Path,
    config: Mapping[str, Any],
    seed: int,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda n: None,
) -> None:
    """Write a Hugging Face folder without a tokenizer. ``progress`` hears of bytes just written."""
    folder.mkdir(parents=True)
    sources = weights_of(config, seed)
    shards = cut_into_shards(list(sources.values()), max_shard_bytes)
    names = {
        f"model-{k:05d}-of-{len(shards):05d}.safetensors": shard
        for k, shard in enumerate(shards, start=1)
    }
    for file, shard in names.items():
        write_tensor_file(folder / file, shard, relative_to=folder, progress=progress)
    weight_map = {source.name: file for file, shard in names.items() for source in shard}
    write_index(folder, weight_map, sum(source.num_bytes for source in sources.values()))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a folder was found to be. changed: the share of merged weights' values that moved."""

    num_equal: int
    differing: Sequence[str]
    num_merged: int = 0
    changed: float = 0.0

    @property
    def in_words(self) -> str:
        """Such as ``285 tensors equal``."""
        if self.differing:
            return f"{len(self.differing)} TENSORS DIFFER: {'; '.join(self.differing[:3])}"
        merged = (
            f", {self.num_merged} merged as W + s BA ({self.changed:.0%} of values moved)"
            if self.num_merged
            else ""
        )
        return f"{self.num_equal} tensors equal{merged}"


def weights_in(folder: Path) -> dict[str, TensorSource]:
    """Of a folder that holds a model in any layout, by Hugging Face names."""
    return {name: weight.source(name) for name, weight in ModelFolder.open(folder).weights.items()}


def compare(
    expected: Mapping[str, TensorSource],
    seen: Mapping[str, TensorSource],
    *,
    adapter: Path | None = None,
    progress: Progress = lambda n: None,
) -> Comparison:
    """Every tensor, bit by bit. adapter: a peft folder that is merged in ``seen`` and not in
    ``expected``: then the tensors that it touches are W + s BA, rounded once to fp16."""
    touched = _pairs_of(adapter) if adapter is not None else {}
    scaling = _scaling_of(adapter) if adapter is not None else 0.0
    differing = [f"{name} is there once only" for name in sorted(expected.keys() ^ seen.keys())]
    moved, num_values = 0, 0
    for name in expected.keys() & seen.keys():
        if name in touched:
            fault, num_moved = _fault_of_merged(expected[name], seen[name], touched[name], scaling)
            moved, num_values = moved + num_moved, num_values + math.prod(expected[name].shape)
        else:
            fault = _fault_of(expected[name], seen[name])
        if fault:
            differing.append(f"{name}: {fault}")
        progress(expected[name].num_bytes)
    if touched.keys() - expected.keys():
        differing.append(
            f"the adapter touches {sorted(touched.keys() - expected.keys())[0]}, which is no weight"
        )
    num_merged = len(touched)
    num_equal = len(expected.keys() & seen.keys()) - num_merged - len(differing)
    return Comparison(
        num_equal=num_equal,
        differing=differing,
        num_merged=num_merged,
        changed=moved / max(1, num_values),
    )


def _fault_of(expected: TensorSource, seen: TensorSource) -> str:
    """'' for the same bits."""
    if (expected.dtype, expected.shape) != (seen.dtype, seen.shape):
        return f"{expected.dtype} {tuple(expected.shape)} became {seen.dtype} {tuple(seen.shape)}"
    num_wrong = 0
    blocks = zip(
        expected.read().reshape(-1).split(_BLOCK),
        seen.read().reshape(-1).split(_BLOCK),
        strict=True,
    )
    for a, b in blocks:
        bits_a, bits_b = a.view(torch.uint8), b.view(torch.uint8)
        if not torch.equal(bits_a, bits_b):
            num_wrong += int((bits_a != bits_b).view(-1, a.itemsize).any(1).sum())
        expected.release(a)
        seen.release(b)
    return f"{num_wrong} values differ" if num_wrong else ""


def _fault_of_merged(
    base: TensorSource, seen: TensorSource, pair: tuple[Tensor, Tensor], scaling: float
) -> tuple[str, int]:
    """What is wrong, '' for nothing, and how many values are not the base's. In float64."""
    if (base.dtype, base.shape) != (seen.dtype, seen.shape):
        return f"{base.dtype} {tuple(base.shape)} became {seen.dtype} {tuple(seen.shape)}", 0
    a, b = (side.double() for side in pair)
    before, after = base.read(), seen.read()
    rows = max(1, _BLOCK // base.shape[1])
    num_wrong = num_moved = 0
    for w, merged, of_b in zip(before.split(rows), after.split(rows), b.split(rows), strict=True):
        exact = w.double() + scaling * (of_b @ a)
        half_a_place = (
            exact.abs() * 2.0**-11 + 2.0**-25
        )  # fp16: 11 bits, and the spacing of its smallest numbers
        num_wrong += int(((merged.double() - exact).abs() > 1.001 * half_a_place + 1e-9).sum())
        num_moved += int((merged != w).sum())
        seen.release(merged)
    return (f"{num_wrong} values are not W + s BA" if num_wrong else ""), num_moved


def _pairs_of(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of the touched weight -> (A, B), from peft's file."""
    file = open_weight_file(adapter / ADAPTER_WEIGHTS)
    found = {}
    for name in file.specs:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[f"{module}.weight"] = (
                file.read(name),
                file.read(name.replace(".lora_A.", ".lora_B.")),
            )
    assert found, f"no pairs of LoRA in {adapter}"
    return found


def _scaling_of(adapter: Path) -> float:
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    return float(config["lora_alpha"]) / float(config["r"])


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raises UserError where the disk of ``folder`` has less than ``needed`` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{what} takes {needed / 1e9:.1f} GB of disk at most, and {folder} has {free / 1e9:.1f} GB. Give another --folder"
        )


def check_memory(needed: int, what: str, available: int | None = None) -> None:
    """Raises UserError where fewer bytes are available (None: as the system says)."""
    available = psutil.virtual_memory().available if available is None else available
    if available < needed:
        raise UserError(
            f"{what} takes about {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are "
            "available. Choose a smaller --model, or end what else runs"
        )
