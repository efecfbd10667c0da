"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745; also Pythia and RedPajama-INCITE): configuration and blocks under Hugging Face names.

A block is x + attention(norm1(x)) + mlp(norm2(x)) where the residual is parallel, else y + mlp(norm2(y)) of y = x + attention(norm1(x)).

Legend: B sequences of a micro-batch, T tokens, C width, H heads, D head width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from modules.dropout import SeededDropout
from modules.linear import Linear
from modules.lm_ops import LayerNorm, Segments, packed_causal_attention, rotate_halves
from modules.model_config import GELU_OF_ACTIVATION, ModelConfig, ModelNames, check_rules, read_numbers
from user_error import UserError

_DEFAULTS: dict[str, Any] = {  # those of transformers, where its GPTNeoXConfig leaves a key out
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
}
_DEFAULT_ROTARY = {"rotary_pct": 0.25, "rotary_emb_base": 10000}


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(ModelConfig):
    """A GPT-NeoX. ``gelu``: the approximation of torch's gelu; "none" is the exact one."""

    parallel_residual: bool
    gelu: Literal["none", "tanh"]
    attention_bias: bool

    model_type = "gptneox"
    hf_model_type = "gpt_neox"
    names = ModelNames(
        trunk="gpt_neox",
        embeddings="embed_in",
        layers="layers",
        final_norm="final_layer_norm",
        head="embed_out",
        buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
        other_heads=("lm_head",),  # what transformers 5 calls it in memory, and some writers in files
    )
    head_has_bias = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GPTNeoXConfig":
        """Read a Hugging Face GPT-NeoX ``config.json``. Raises UserError for what this implementation would compute differently.

        ``use_parallel_residual`` left out means true, as in transformers: the 20B file has no such key. The rotary settings are read in
        their old form (rotary_pct, rotary_emb_base) and their new one (rope_parameters); a file that holds both must hold the same.
        """
        if config.get("model_type") != cls.hf_model_type:
            seen = f"this one says {config.get('model_type')!r}"
            raise UserError(f"--model-type gptneox needs a model whose config.json says model_type {cls.hf_model_type}; {seen}")
        counts = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
        numbers = read_numbers(config, "GPT-NeoX", counts=counts, positives=("layer_norm_eps", "initializer_range"), defaults=_DEFAULTS)
        rotary_pct, rotary_base = _rotary(config)
        width, num_heads = numbers["hidden_size"], numbers["num_attention_heads"]
        rotary_dim = int(width // num_heads * rotary_pct)
        activation = config.get("hidden_act", "gelu")
        flags = {name: config.get(name, True) for name in ("use_parallel_residual", "attention_bias")}
        check_rules(
            [
                (str(activation) in GELU_OF_ACTIVATION, f"hidden_act {activation!r} (only {', '.join(GELU_OF_ACTIVATION)})"),
                (not config.get("tie_word_embeddings", False), "tie_word_embeddings true (the head must have its own weight)"),
                (width % num_heads == 0, f"hidden_size {width} that num_attention_heads {num_heads} does not divide"),
                (
                    2 <= rotary_dim <= width // num_heads and rotary_dim % 2 == 0,
                    f"rotary_pct {rotary_pct} of head width {width // num_heads} (must turn an even number of channels, at least 2)",
                ),
                *((isinstance(value, bool), f"{name} {value!r} (true or false)") for name, value in flags.items()),
            ]
        )
        return cls(
            vocab_size=numbers["vocab_size"],
            num_positions=numbers["max_position_embeddings"],
            width=width,
            num_layers=numbers["num_hidden_layers"],
            num_heads=num_heads,
            inner_width=numbers["intermediate_size"],
            rotary_dim=rotary_dim,
            rotary_base=rotary_base,
            layer_norm_epsilon=numbers["layer_norm_eps"],
            initializer_range=numbers["initializer_range"],
            parallel_residual=flags["use_parallel_residual"],
            gelu=GELU_OF_ACTIVATION[activation],
            attention_bias=flags["attention_bias"],
        )

    def block(self) -> "GPTNeoXBlock":
        return GPTNeoXBlock(self)


def both_rotary_forms(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the rotary settings in the old and in the new form.

    transformers 5 writes the new one alone, and 4.x, which does not know it, then silently computes with its default of .25.
    """
    rotary_pct, rotary_base = _rotary(config)
    new_form = {"rope_type": "default", **(config.get("rope_parameters") or {})}
    new_form |= {"rope_theta": rotary_base, "partial_rotary_factor": rotary_pct}
    return {**config, "rotary_pct": rotary_pct, "rotary_emb_base": rotary_base, "rope_parameters": new_form}


def _rotary(config: Mapping[str, Any]) -> tuple[float, float]:
    """(share of a head's channels that turn, base of the frequencies), whichever form of keys they stand in. Raises UserError."""
    stated = dict(config)
    for place in ("rope_parameters", "rope_scaling"):  # transformers 5 takes either, and what stands in it
        inner = config.get(place) or {}
        kind = inner.get("rope_type", inner.get("type", "default")) if isinstance(inner, Mapping) else None
        check_rules([(kind == "default", f"{place} {inner!r} (rotary positions of type default only)")])
        stated |= {f"{place}.{key}": value for key, value in inner.items()}
    found: list[float] = []
    for old, new in (("rotary_pct", "partial_rotary_factor"), ("rotary_emb_base", "rope_theta")):
        keys = [key for key in (old, new, f"rope_parameters.{new}", f"rope_scaling.{new}") if stated.get(key) is not None] or [old]
        values = read_numbers(stated, "GPT-NeoX", counts=(), positives=keys, defaults=_DEFAULT_ROTARY)
        if len(set(values.values())) > 1:
            seen = " and ".join(f"{key} {value}" for key, value in values.items())
            raise UserError(f"config.json says two things of the rotary positions: {seen}. Keep the one the model was trained with")
        found.append(values[keys[0]])
    rotary_pct, rotary_base = found
    check_rules([(rotary_pct <= 1, f"rotary_pct {rotary_pct} (a share of a head's channels, at most 1)")])
    return rotary_pct, rotary_base


class GPTNeoXAttention(nn.Module):
    """Causal self-attention with rotary positions; one linear for q, k and v: its rows are q, k, v of head 0, then of head 1 ..."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.num_heads, self.head_width = config.num_heads, config.head_width
        self.query_key_value = Linear(config.width, 3 * config.width, bias=config.attention_bias)
        self.dense = Linear(config.width, config.width, bias=config.attention_bias)
        self.attention_dropout = SeededDropout(config.dropout)

    def forward(self, x: Tensor, segments: Segments, rotary: Tensor) -> Tensor:
        """x (B, T, C); rotary (B, T, 1, rotary_dim/2) complex64. Returns (B, T, C)."""
        batch, tokens, _ = x.shape
        per_head = self.query_key_value(x).view(batch, tokens, self.num_heads, 3 * self.head_width)  # (B, T, H, 3D)
        q, k, v = per_head.split(self.head_width, dim=-1)  # (B, T, H, D) each
        q = rotate_halves(q, rotary).transpose(1, 2)  # (B, H, T, D)
        k = rotate_halves(k, rotary).transpose(1, 2)  # (B, H, T, D)
        y = packed_causal_attention(q, k, v.transpose(1, 2), segments, self.attention_dropout)  # (B, H, T, D)
        return self.dense(y.transpose(1, 2).flatten(2))  # (B, T, C)


class GPTNeoXMLP(nn.Module):
    """dense_4h_to_h(gelu(dense_h_to_4h(x)))."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.gelu = config.gelu
        self.dense_h_to_4h = Linear(config.width, config.inner_width)
        self.dense_4h_to_h = Linear(config.inner_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C). Returns (B, T, C)."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate=self.gelu))


class GPTNeoXBlock(nn.Module):
    """One layer. Attention and MLP each have a norm of their own, also where both read the same input."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.input_layernorm = LayerNorm(config.width, eps=config.layer_norm_epsilon)
        self.post_attention_layernorm = LayerNorm(config.width, eps=config.layer_norm_epsilon)
        self.attention = GPTNeoXAttention(config)
        self.mlp = GPTNeoXMLP(config)
        self.post_attention_dropout, self.post_mlp_dropout = SeededDropout(config.dropout), SeededDropout(config.dropout)

    def forward(self, x: Tensor, segments: Segments, rotary: Tensor) -> Tensor:
        """x (B, T, C); rotary (B, T, 1, rotary_dim/2) complex64. Returns (B, T, C)."""
        draw = segments.draw
        attended = self.post_attention_dropout(self.attention(self.input_layernorm(x), segments, rotary), draw)  # (B, T, C)
        if self.parallel_residual:
            return self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(x)), draw) + attended + x
        x = x + attended
        return x + self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(x)), draw)
