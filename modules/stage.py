"""A stage: the layers [first, last) of a model as one plain nn.Module, under their Hugging Face names with global indices.

Because the names are global (``transformer.h.17.attn.q_proj.weight`` also on a stage that holds only layer 17), checkpoints, adapters and
quantisation need no renaming, and a stage built with first=0, last=num_layers *is* the whole model. A stage does not know its rank.

Legend: B sequences of a micro-batch, T tokens, C width, V vocabulary rows.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.dropout import SeededDropout, name_dropouts
from modules.families import FAMILIES
from modules.kv_cache import KeyValueCache
from modules.lm_ops import IGNORED_TARGET, LayerNorm, Segments, best_of_each_row, chunked_cross_entropy, losses_of_tokens, rotary_table
from modules.model_config import ModelConfig
from modules.quantized import QuantizedLinear

EMBEDDINGS, LM_HEAD = "embeddings", "lm_head"
Part = TypeVar("Part", bound=nn.Module)


def layer_keys(num_layers: int) -> list[str]:
    """The units in which weights are stored, reduced and normed, in model order: embeddings, layer_00 .. layer_{L-1}, lm_head."""
    return [EMBEDDINGS, *(layer_key_of_index(i) for i in range(num_layers)), LM_HEAD]


def layer_key_of_index(index: int) -> str:
    """The key of transformer layer ``index``; at least two digits, more where needed."""
    return f"layer_{index:02d}"


def layer_key(parameter_name: str) -> str:
    """The layer key a parameter belongs to. The final LayerNorm belongs to lm_head: it runs on the stage that has the head."""
    for family in FAMILIES:
        index = family.names.layer_index(parameter_name)
        if index is not None:
            return layer_key_of_index(index)
        if parameter_name.startswith(f"{family.names.trunk}.{family.names.embeddings}."):
            return EMBEDDINGS
    return LM_HEAD


def in_model_order(names: Iterable[str], num_layers: int) -> list[str]:
    """The names of a model's weights by layer, and within a layer by name."""
    places = {key: place for place, key in enumerate(layer_keys(num_layers))}
    return sorted(names, key=lambda name: (places[layer_key(name)], name))


def stored_name(parameter_name: str) -> str:
    """What files call a parameter of a stage that has adapters: without peft's ``.base_layer`` and ``.default``."""
    return ".".join(part for part in parameter_name.split(".") if part not in ("base_layer", "default"))


class Stage(nn.Module):
    """Layers [first, last) of a model; with first == 0 also the embeddings, with last == num_layers also the final norm and the head."""

    def __init__(self, config: ModelConfig, first: int, last: int) -> None:
        assert 0 <= first < last <= config.num_layers, (
            f"a stage holds at least one layer of the model: [{first}, {last}) of {config.num_layers}"
        )
        super().__init__()
        self.config, self.first, self.last = config, first, last
        names, trunk = config.names, nn.Module()
        if self.has_embeddings:
            trunk.add_module(names.embeddings, nn.Embedding(config.vocab_size, config.width))
        trunk.add_module(names.layers, nn.ModuleDict({str(i): config.block() for i in range(first, last)}))
        if self.has_head:
            trunk.add_module(names.final_norm, LayerNorm(config.width, eps=config.layer_norm_epsilon))
        self.add_module(names.trunk, trunk)
        if self.has_head:
            self.add_module(names.head, nn.Linear(config.width, config.vocab_size, bias=config.head_has_bias))
        self.embedding_dropout = SeededDropout(config.dropout)
        name_dropouts(self)
        self._rotary: Tensor | None = None
        self.compute_dtype = torch.float32  # of hidden states, inside and on the wire
        self.recomputes = False  # True: only the inputs of layers are kept for the backward, which computes each layer's forward again

    @property
    def has_embeddings(self) -> bool:
        return self.first == 0

    @property
    def has_head(self) -> bool:
        return self.last == self.config.num_layers

    @property
    def embeddings(self) -> nn.Embedding:
        """Where has_embeddings."""
        return self._part(f"{self.config.names.trunk}.{self.config.names.embeddings}", nn.Embedding)

    @property
    def blocks(self) -> nn.ModuleDict:
        """The layers, by global index as text."""
        return self._part(f"{self.config.names.trunk}.{self.config.names.layers}", nn.ModuleDict)

    @property
    def final_norm(self) -> nn.LayerNorm:
        """Where has_head."""
        return self._part(f"{self.config.names.trunk}.{self.config.names.final_norm}", nn.LayerNorm)

    @property
    def head(self) -> nn.Linear:
        """Where has_head."""
        return self._part(self.config.names.head, nn.Linear)

    def _part(self, name: str, kind: type[Part]) -> Part:
        part = self.get_submodule(name)
        assert isinstance(part, kind), f"{name} is a {type(part).__name__}"
        return part

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """Token ids (B, T) where the stage has the embeddings, else hidden states (B, T, C), to hidden states (B, T, C) before the final
        norm."""
        x = self._embedded(x, segments)  # (B, T, C)
        rotary = self._rotary_at(segments.positions.to(x.device))
        for block in self.blocks.children():
            if (
                self.recomputes and torch.is_grad_enabled()
            ):  # Chen et al. 2016, arXiv:1604.06174; no layer draws from a running stream, so there is no state to keep
                x = checkpoint(block, x, segments, rotary, use_reentrant=False, preserve_rng_state=False)  # (B, T, C)
            else:
                x = block(x, segments, rotary)  # (B, T, C)
        return x

    @torch.no_grad()
    def extend(self, x: Tensor, cache: KeyValueCache) -> Tensor:
        """The same of the next T columns of the sequences in ``cache``, which keeps what later columns will need of them."""
        segments_of_layers = cache.extend(x.shape[1])
        x = self._embedded(x, segments_of_layers[0])  # (B, T, C)
        rotary = self._rotary_at(segments_of_layers[0].positions)
        for block, segments in zip(self.blocks.children(), segments_of_layers, strict=True):
            x = block(x, segments, rotary)  # (B, T, C)
        return x

    def empty_cache(self, num_pads: Sequence[int], num_columns: int) -> KeyValueCache:
        """For extend(): of sequences with ``num_pads`` pads each to their left, ``num_columns`` with them, on the device of the stage."""
        return KeyValueCache(
            num_layers=self.last - self.first,
            num_heads=self.config.num_heads,
            head_width=self.config.head_width,
            num_columns=num_columns,
            num_pads=num_pads,
            dtype=self.compute_dtype,
            device=next(self.parameters()).device,
        )

    def _embedded(self, x: Tensor, segments: Segments) -> Tensor:
        if not self.has_embeddings:
            return x
        embedded: Tensor = self.embedding_dropout(self.embeddings(x).to(self.compute_dtype), segments.draw)  # (B, T, C)
        return embedded

    def loss_sum(self, hidden: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
        """scale * summed cross entropy of the last stage's hidden (B, T, C) against targets (B, T) int64; a float64 scalar."""
        normed = self.final_norm(hidden).flatten(0, 1)  # (B*T, C)
        weight, bias, quantized = self._head_parts()
        return chunked_cross_entropy(normed, weight, bias, targets.flatten(), scale, quantized_head=quantized)

    @torch.no_grad()
    def row_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Of every sequence of the last stage's hidden (B, T, C) the sum of -log p of its targets (B, T) int64: (B,) float64."""
        is_target = targets != IGNORED_TARGET  # (B, T)
        weight, bias, quantized = self._head_parts()
        losses = torch.zeros(targets.shape, dtype=torch.float64, device=hidden.device)
        # the head costs most, and of prompts with a label few positions have a target
        losses[is_target] = losses_of_tokens(
            self.final_norm(hidden[is_target]), weight, bias, targets[is_target], quantized_head=quantized
        ).double()
        return losses.sum(1)

    @torch.no_grad()
    def next_tokens(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable next ids (B,) int64 behind the last stage's hidden (B, C), the smallest of equally probable ones; and by how
        much the logit of each exceeds the second best, (B,) fp32: near 0 where another order of adding up would choose another id."""
        weight, bias, quantized = self._head_parts()
        return best_of_each_row(self.final_norm(hidden), weight, bias, quantized_head=quantized)

    def _head_parts(self) -> tuple[Tensor | None, Tensor | None, QuantizedLinear | None]:
        """Weight, bias and None; or None, None and a quantised head."""
        if isinstance(self.head, QuantizedLinear):
            return None, None, self.head
        return self.head.weight, self.head.bias, None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, T, C) of the last stage to logits (B, T, V)."""
        logits: Tensor = self.head(self.final_norm(hidden))
        return logits

    def parameters_by_layer(self) -> Iterator[tuple[str, list[tuple[str, nn.Parameter]]]]:
        """(layer key, [(name, parameter)...]) in model order: embeddings, layers, head."""
        grouped: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.named_parameters():
            grouped.setdefault(layer_key(name), []).append((name, parameter))
        for key in layer_keys(self.config.num_layers):
            if key in grouped:
                yield key, grouped[key]

    def trained_by_layer(self) -> Iterator[tuple[str, list[tuple[str, nn.Parameter]]]]:
        """The same of the parameters that are trained, under their stored names; layers that have none are left out."""
        for key, parameters in self.parameters_by_layer():
            trained = [(stored_name(name), parameter) for name, parameter in parameters if parameter.requires_grad]
            if trained:
                yield key, trained

    def _rotary_at(self, positions: Tensor) -> Tensor:
        """The rotation at ``positions`` (B, T): (B, T, 1, rotary_dim/2) complex64."""
        if self._rotary is None or self._rotary.device != positions.device:
            self._rotary = rotary_table(self.config.num_positions, self.config.rotary_dim, self.config.rotary_base, device=positions.device)
        return self._rotary[positions][:, :, None]


def empty_stage(
    config: ModelConfig, first: int, last: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Stage:
    """A stage with storage of its own and undefined values. torch's allocator aligns every tensor to 64 bytes, as bit-equality needs.

    dtype: of the parameters. Hidden states are computed in the same, but for fp16 on a CPU, whose units for it are 26 times slower than
    those for fp32: there it is only stored.
    """
    stage = meta_stage(config, first, last).to(dtype).to_empty(device=device)
    stage.compute_dtype = compute_dtype(dtype, torch.device(device))
    return stage


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which hidden states are computed where parameters are ``dtype``."""
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


def meta_stage(config: ModelConfig, first: int, last: int) -> Stage:
    """A stage without storage, for names and shapes."""
    with torch.device("meta"):
        return Stage(config, first, last)


def draw_parameter(parameter: Tensor, name: str, config: ModelConfig, seed: int) -> None:
    """Fill ``parameter`` in place with its initial value, as transformers' _init_weights does, from a generator seeded by (seed, name)
    alone: no cut and no order changes it."""
    if parameter.ndim == 1:  # of a LayerNorm, or a bias
        parameter.fill_(1.0 if name.endswith(".weight") else 0.0)
        return
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, config.initializer_range, generator=generator))
