"""A stage: the layers [first, last) of a model as one plain nn.Module, under their Hugging Face names with global indices.

Because the names are global (``transformer.h.17.attn.q_proj.weight`` also on a stage that holds only layer 17), checkpoints, adapters and
quantisation need no renaming, and a stage built with first=0, last=num_layers *is* the whole model. A stage does not know its rank.

Legend: B sequences of a micro-batch, T tokens, C width, V vocabulary rows.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.gptj import GPTJBlock, GPTJConfig, initial_std
from modules.lm_ops import Segments, chunked_cross_entropy, rotary_table

EMBEDDINGS, LM_HEAD = "embeddings", "lm_head"


def layer_keys(num_layers: int) -> list[str]:
    """The units in which weights are stored, reduced and normed, in model order: embeddings, layer_00 .. layer_{L-1}, lm_head."""
    return [EMBEDDINGS, *(layer_key_of_index(i) for i in range(num_layers)), LM_HEAD]


def layer_key_of_index(index: int) -> str:
    """The key of transformer layer ``index``; at least two digits, more where needed."""
    return f"layer_{index:02d}"


def layer_key(parameter_name: str) -> str:
    """The layer key a parameter belongs to. The final LayerNorm belongs to lm_head: it runs on the stage that has the head."""
    parts = parameter_name.split(".")
    if parts[:2] == ["transformer", "h"]:
        return layer_key_of_index(int(parts[2]))
    return EMBEDDINGS if parts[:2] == ["transformer", "wte"] else LM_HEAD


class _Transformer(nn.Module):
    """The name ``transformer.`` of GPT-J's parameters; no computation of its own."""

    def __init__(self, config: GPTJConfig, layers: range, *, embeddings: bool, final_norm: bool) -> None:
        super().__init__()
        if embeddings:
            self.wte = nn.Embedding(config.vocab_size, config.width)
        self.h = nn.ModuleDict({str(i): GPTJBlock(config) for i in layers})
        if final_norm:
            self.ln_f = nn.LayerNorm(config.width, eps=config.layer_norm_epsilon)


class Stage(nn.Module):
    """Layers [first, last) of a GPT-J; with first == 0 also the embeddings, with last == num_layers also ln_f and the head."""

    def __init__(self, config: GPTJConfig, first: int, last: int) -> None:
        assert 0 <= first < last <= config.num_layers, (
            f"a stage holds at least one layer of the model: [{first}, {last}) of {config.num_layers}"
        )
        super().__init__()
        self.config, self.first, self.last = config, first, last
        self.transformer = _Transformer(config, range(first, last), embeddings=self.has_embeddings, final_norm=self.has_head)
        if self.has_head:
            self.lm_head = nn.Linear(config.width, config.vocab_size)
        self._rotary: Tensor | None = None
        self.recomputes = False  # True: only the inputs of layers are kept for the backward, which computes each layer's forward again

    @property
    def has_embeddings(self) -> bool:
        return self.first == 0

    @property
    def has_head(self) -> bool:
        return self.last == self.config.num_layers

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """Token ids (B, T) where the stage has the embeddings, else hidden states (B, T, C), to hidden states (B, T, C) before ln_f."""
        if self.has_embeddings:
            x = self.transformer.wte(x)  # (B, T, C)
        rotary = self._rotary_at(segments.positions.to(x.device))
        for block in self.transformer.h.children():
            if self.recomputes:  # Chen et al. 2016, arXiv:1604.06174; no layer draws random numbers, so there is no state to keep
                x = checkpoint(block, x, segments, rotary, use_reentrant=False, preserve_rng_state=False)  # (B, T, C)
            else:
                x = block(x, segments, rotary)  # (B, T, C)
        return x

    def loss_sum(self, hidden: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
        """scale * summed cross entropy of the last stage's hidden (B, T, C) against targets (B, T) int64; a float64 scalar."""
        normed = self.transformer.ln_f(hidden)  # (B, T, C)
        return chunked_cross_entropy(normed.flatten(0, 1), self.lm_head.weight, self.lm_head.bias, targets.flatten(), scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, T, C) of the last stage to logits (B, T, V)."""
        return self.lm_head(self.transformer.ln_f(hidden))

    def parameters_by_layer(self) -> Iterator[tuple[str, list[tuple[str, nn.Parameter]]]]:
        """(layer key, [(name, parameter)...]) in model order: embeddings, layers, head."""
        grouped: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.named_parameters():
            grouped.setdefault(layer_key(name), []).append((name, parameter))
        for key in layer_keys(self.config.num_layers):
            if key in grouped:
                yield key, grouped[key]

    def _rotary_at(self, positions: Tensor) -> Tensor:
        """The rotation at ``positions`` (B, T): (B, T, 1, rotary_dim/2) complex64."""
        if self._rotary is None or self._rotary.device != positions.device:
            self._rotary = rotary_table(self.config.num_positions, self.config.rotary_dim, device=positions.device)
        return self._rotary[positions][:, :, None]


def empty_stage(config: GPTJConfig, first: int, last: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Stage:
    """A stage with storage of its own and undefined values. torch's allocator aligns every tensor to 64 bytes, as bit-equality needs."""
    return meta_stage(config, first, last).to(dtype).to_empty(device=device)


def meta_stage(config: GPTJConfig, first: int, last: int) -> Stage:
    """A stage without storage, for names and shapes."""
    with torch.device("meta"):
        return Stage(config, first, last)


def draw_parameter(parameter: Tensor, name: str, config: GPTJConfig, seed: int) -> None:
    """Fill ``parameter`` in place with its initial value, from a generator seeded by (seed, name) alone: no cut and no order changes it."""
    if ".ln_" in name and name.endswith(".weight"):
        parameter.fill_(1.0)
        return
    std = initial_std(name, config)
    if std == 0.0:
        parameter.zero_()
        return
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))
