"""Small GPT-Js and GPT-NeoXs with the real number of layers, and the layouts of this trainer's relatives, written by hand.

The names below are those of their modules (docs/converters.md), not taken from the code under test.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from support.checkpoints import TOKENIZER, TOKENS, tensors_of
from torch import Tensor

import converters.from_hf
import converters.to_hf

FAMILIES = ("gptj", "gptneox")
NUM_LAYERS = {"gptj": 28, "gptneox": 44}
TRUNK = {"gptj": "transformer", "gptneox": "gpt_neox"}
LAYERS = {"gptj": "transformer.h", "gptneox": "gpt_neox.layers"}
EMBEDDINGS = {"gptj": ["wte.weight"], "gptneox": ["embed_in.weight"]}
NORM = {"gptj": ["ln_f.weight", "ln_f.bias"], "gptneox": ["final_layer_norm.weight", "final_layer_norm.bias"]}
HEAD = {"gptj": ["lm_head.weight", "lm_head.bias"], "gptneox": ["embed_out.weight"]}
BLOCK = {
    "gptj": [
        *("ln_1.weight", "ln_1.bias", "attn.k_proj.weight", "attn.v_proj.weight", "attn.q_proj.weight", "attn.out_proj.weight"),
        *("mlp.fc_in.weight", "mlp.fc_in.bias", "mlp.fc_out.weight", "mlp.fc_out.bias"),
    ],
    "gptneox": [
        *("input_layernorm.weight", "input_layernorm.bias", "post_attention_layernorm.weight", "post_attention_layernorm.bias"),
        *("attention.query_key_value.weight", "attention.query_key_value.bias", "attention.dense.weight", "attention.dense.bias"),
        *("mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias", "mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"),
    ],
}


def make_hf(
    family: str, folder: Path, *, dtype: torch.dtype = torch.float16, num_layers: int | None = None, **how: Any
) -> dict[str, Tensor]:
    """A random model with a tokenizer in ``folder``; returns its tensors as they lie on disk. ``how``: for save_pretrained."""
    torch.manual_seed(0)
    num_layers = NUM_LAYERS[family] if num_layers is None else num_layers
    model: torch.nn.Module
    if family == "gptj":
        sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": num_layers, "n_head": 2, "rotary_dim": 4}
        model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes, bos_token_id=0, eos_token_id=1))
    else:
        sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": num_layers, "num_attention_heads": 2, "intermediate_size": 40}
        more = {"max_position_embeddings": 16, "rotary_pct": 0.5, "bos_token_id": 0, "eos_token_id": 1}
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, **how)
    for name, text in TOKENIZER.items():
        (folder / name).write_text(text)
    weights = tensors_of(folder)
    assert len(weights) == len(BLOCK[family]) * num_layers + len(EMBEDDINGS[family] + NORM[family] + HEAD[family])
    return weights


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(TOKENS).logits


def buffers(family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What old versions of transformers left in one layer; ``.half()`` makes -inf of masked_bias."""
    masked = torch.tensor(-1e9, dtype=torch.float32).to(dtype)
    if family == "gptj":
        return {"attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool), "attn.masked_bias": masked}
    frequencies = torch.ones(4, dtype=dtype)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    return {"attention.bias": mask, "attention.masked_bias": masked, "attention.rotary_emb.inv_freq": frequencies}


def embeddings_part(family: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[f"{TRUNK[family]}.{name}"] for name in EMBEDDINGS[family]}


def layer_part(family: str, weights: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    mine = {name: weights[f"{LAYERS[family]}.{i}.{name}"] for name in BLOCK[family]}
    return mine | buffers(family, next(iter(mine.values())).dtype)


def head_part(family: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[f"{TRUNK[family]}.{name}"] for name in NORM[family]} | {name: weights[name] for name in HEAD[family]}


def write_layer_shards(family: str, hf: Path, folder: Path, weights: dict[str, Tensor], num_layers: int | None = None) -> Path:
    """A relative's model folder: buffers in the layers, an nn.Parameter in the embeddings."""
    folder.mkdir()
    for name in ("config.json", *TOKENIZER):
        (folder / name).write_text((hf / name).read_text())
    embeddings = {name: torch.nn.Parameter(tensor) for name, tensor in embeddings_part(family, weights).items()}
    torch.save(embeddings, folder / "pytorch_embs.pt")
    for i in range(NUM_LAYERS[family] if num_layers is None else num_layers):
        torch.save(layer_part(family, weights, i), folder / f"pytorch_{i}.pt")
    torch.save(head_part(family, weights), folder / "pytorch_lm_head.pt")
    return folder


def write_stages(family: str, folder: Path, weights: dict[str, Tensor], cut: Sequence[int]) -> Path:
    """A relative's training checkpoint: stage s holds cut[s] layers, in the state dict of an nn.Sequential."""
    folder.mkdir(parents=True)
    first = 0
    for stage, count in enumerate(cut):
        parts = [layer_part(family, weights, i) for i in range(first, first + count)]
        parts = [embeddings_part(family, weights)] * (stage == 0) + parts + [head_part(family, weights)] * (stage == len(cut) - 1)
        state = OrderedDict((f"{k}.{name}", tensor) for k, part in enumerate(parts) for name, tensor in part.items())
        state._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]  # as nn.Module.state_dict leaves it
        torch.save(state, folder / f"prank_{stage}_checkpoint.pt")
        torch.save({"state": {0: {"step": 1}}, "param_groups": []}, folder / f"prank_{stage}_optimizer.pt")
        first += count
    assert first <= NUM_LAYERS[family]
    (folder / "meta.json").write_text(json.dumps({"step": 100}))
    return folder


def from_hf(family: str, source: Path, save_dir: Path, *more: str) -> int:
    return converters.from_hf.main(family, ["--model-name", str(source), "--save-dir", str(save_dir), *more])


def to_hf(family: str, source: Path, target: Path, *more: str) -> int:
    return converters.to_hf.main(family, ["--ckpt-path", str(source), "--save-path", str(target), *more])


Converter = Callable[..., int]
