"""GPT-J (Wang & Komatsuzaki 2021): configuration and blocks under their Hugging Face parameter names.

Own blocks, because the blocks of transformers change their signature between releases and have no fused attention for GPT-J; the classes of
transformers are the oracle in tests. A block is one residual: x + attention(ln_1(x)) + mlp(ln_1(x)).

Legend: B sequences of a micro-batch, T tokens, C width, H heads, D head width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from modules.dropout import Draw, SeededDropout
from modules.linear import Linear
from modules.lm_ops import LayerNorm, Segments, packed_causal_attention, rotate_interleaved
from modules.model_config import GELU_OF_ACTIVATION, ModelConfig, ModelNames, check_rules, read_numbers
from user_error import UserError

_DEFAULTS: dict[str, Any] = {"n_positions": 2048, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02}  # those of transformers
_ACTIVATIONS = [name for name, gelu in GELU_OF_ACTIVATION.items() if gelu == "tanh"]


@dataclass(frozen=True, kw_only=True)
class GPTJConfig(ModelConfig):
    """A GPT-J."""

    model_type = "gptj"
    hf_model_type = "gptj"
    names = ModelNames(
        trunk="transformer", embeddings="wte", layers="h", final_norm="ln_f", head="lm_head", buffers=("attn.bias", "attn.masked_bias")
    )
    head_has_bias = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GPTJConfig":
        """Read a Hugging Face GPT-J ``config.json``. Raises UserError for what this implementation would compute differently."""
        if config.get("model_type") != cls.hf_model_type:
            seen = f"this one says {config.get('model_type')!r}"
            raise UserError(f"--model-type gptj needs a model whose config.json says model_type {cls.hf_model_type}; {seen}")
        counts = ["vocab_size", "n_embd", "n_layer", "n_head", "rotary_dim", "n_positions"]
        if config.get("n_inner") is not None:
            counts.append("n_inner")
        positives = ("layer_norm_epsilon", "initializer_range")
        numbers = read_numbers(config, "GPT-J", counts=counts, positives=positives, defaults=_DEFAULTS)
        width, num_heads, rotary_dim = numbers["n_embd"], numbers["n_head"], numbers["rotary_dim"]
        activation = config.get("activation_function", "gelu_new")
        check_rules(
            [
                (activation in _ACTIVATIONS, f"activation_function {activation!r} (only {', '.join(_ACTIVATIONS)})"),
                (not config.get("tie_word_embeddings", False), "tie_word_embeddings true (the head must have its own weight)"),
                (width % num_heads == 0, f"n_embd {width} that n_head {num_heads} does not divide"),
                (rotary_dim <= width // num_heads and rotary_dim % 2 == 0, f"rotary_dim {rotary_dim} (even, 2 .. n_embd/n_head)"),
            ]
        )
        return cls(
            vocab_size=numbers["vocab_size"],
            num_positions=numbers["n_positions"],
            width=width,
            num_layers=numbers["n_layer"],
            num_heads=num_heads,
            inner_width=numbers.get("n_inner") or 4 * width,
            rotary_dim=rotary_dim,
            rotary_base=10000.0,
            layer_norm_epsilon=numbers["layer_norm_epsilon"],
            initializer_range=numbers["initializer_range"],
        )

    def block(self) -> "GPTJBlock":
        return GPTJBlock(self)


class GPTJAttention(nn.Module):
    """Causal self-attention with rotary positions on the first rotary_dim channels of every head; four linears without bias."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.num_heads, self.head_width = config.num_heads, config.head_width
        self.q_proj = Linear(config.width, config.width, bias=False)
        self.k_proj = Linear(config.width, config.width, bias=False)
        self.v_proj = Linear(config.width, config.width, bias=False)
        self.out_proj = Linear(config.width, config.width, bias=False)
        self.attn_dropout, self.resid_dropout = SeededDropout(config.dropout), SeededDropout(config.dropout)

    def forward(self, x: Tensor, segments: Segments, rotary: Tensor) -> Tensor:
        """x (B, T, C); rotary (B, T, 1, rotary_dim/2) complex64. Returns (B, T, C)."""
        batch, tokens, _ = x.shape
        heads = (batch, tokens, self.num_heads, self.head_width)
        q = rotate_interleaved(self.q_proj(x).view(heads), rotary).transpose(1, 2)  # (B, H, T, D)
        k = rotate_interleaved(self.k_proj(x).view(heads), rotary).transpose(1, 2)  # (B, H, T, D)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, H, T, D)
        y = packed_causal_attention(q, k, v, segments, self.attn_dropout).transpose(1, 2).flatten(2)  # (B, T, C)
        return self.resid_dropout(self.out_proj(y), segments.draw)


class GPTJMLP(nn.Module):
    """fc_out(gelu(fc_in(x))) with the tanh approximation of gelu."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.fc_in = Linear(config.width, config.inner_width)
        self.fc_out = Linear(config.inner_width, config.width)
        self.dropout = SeededDropout(config.dropout)

    def forward(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """x (B, T, C). Returns (B, T, C)."""
        return self.dropout(self.fc_out(F.gelu(self.fc_in(x), approximate="tanh")), draw)


class GPTJBlock(nn.Module):
    """One layer: the attention and the MLP read the same normalised input and both add to the residual."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.width, eps=config.layer_norm_epsilon)
        self.attn = GPTJAttention(config)
        self.mlp = GPTJMLP(config)

    def forward(self, x: Tensor, segments: Segments, rotary: Tensor) -> Tensor:
        """x (B, T, C); rotary (B, T, 1, rotary_dim/2) complex64. Returns (B, T, C)."""
        h = self.ln_1(x)
        return self.attn(h, segments, rotary) + self.mlp(h, segments.draw) + x
