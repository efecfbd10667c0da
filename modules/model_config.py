"""What every family of models says of itself: sizes, names of its parts, and how one of its layers is built.

A family (gptj.py, gptneox.py) is a frozen ModelConfig read strictly from a Hugging Face ``config.json`` and a block; the rest of the house
knows models through this interface alone. Which families there are: families.py.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from user_error import UserError

# transformers has several names for one function: the exact gelu, or its approximation by tanh.
GELU_OF_ACTIVATION: dict[str, Literal["none", "tanh"]] = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
    "gelu_accurate": "tanh",
}

# Of these a file claims more only by mistake. Two widths make a matrix, whose bytes must be countable in 64 bits.
_LARGEST = {"n_layer": 10_000, "num_hidden_layers": 10_000} | dict.fromkeys(
    ("vocab_size", "n_embd", "n_inner", "hidden_size", "intermediate_size"), 2**28
)


@dataclass(frozen=True, kw_only=True)
class ModelNames:
    """The Hugging Face names of a model's parts, as they stand in files: ``<trunk>.<embeddings>``, ``<trunk>.<layers>.17.`` and so on.

    buffers: ends of the names of tensors that old files hold and nobody reads (causal masks, rotary tables). other_heads: names under
    which other writers store ``<head>``.
    """

    trunk: str
    embeddings: str
    layers: str
    final_norm: str
    head: str
    buffers: tuple[str, ...]
    other_heads: tuple[str, ...] = ()

    def layer_index(self, name: str) -> int | None:
        """17 for ``<trunk>.<layers>.17.anything``; None for what belongs to no layer."""
        parts = name.split(".")
        is_layer = parts[:2] == [self.trunk, self.layers] and len(parts) > 3
        return int(parts[2]) if is_layer and re.fullmatch("[0-9]{1,9}", parts[2]) else None

    def is_buffer(self, name: str) -> bool:
        """True for the tensors of old files that are dropped on read and never written."""
        return self.layer_index(name) is not None and name.endswith(tuple(f".{end}" for end in self.buffers))

    def canonical(self, name: str) -> str:
        """``name`` as this house and Hugging Face's own files spell it."""
        part, _, rest = name.partition(".")
        return f"{self.head}.{rest}" if part in self.other_heads else name


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What of a Hugging Face ``config.json`` decides the shape and the arithmetic of a model. ``from_hf`` of a family makes one."""

    vocab_size: int
    num_positions: int
    width: int
    num_layers: int
    num_heads: int
    inner_width: int
    rotary_dim: int
    rotary_base: float
    layer_norm_epsilon: float
    initializer_range: float
    dropout: float = 0.0  # not read from config.json: training sets it

    model_type: ClassVar[str]  # of --model-type
    hf_model_type: ClassVar[str]  # of config.json
    names: ClassVar[ModelNames]
    head_has_bias: ClassVar[bool]

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    def block(self) -> nn.Module:
        """One layer: forward(x (B, T, C), segments, rotary (B, T, 1, rotary_dim/2) complex64) -> (B, T, C)."""
        raise NotImplementedError


def read_numbers(
    config: Mapping[str, Any], family: str, *, counts: Iterable[str], positives: Iterable[str], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of ``config`` by name, ``defaults`` where they are left out: ``counts`` whole, at least 1 and of a size that
    a model can have, ``positives`` above 0.

    Raises UserError with all that are not.
    """
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for key in counts:
        found[key] = value = config.get(key, defaults.get(key))
        largest = _LARGEST.get(key, 2**31 - 1)
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            wrong.append(f"{key} {value!r} (a whole number of at least 1)")
        elif value > largest:
            wrong.append(f"{key} {value} (a whole number of at most {largest})")
    for key in positives:
        found[key] = value = config.get(key, defaults.get(key))
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            wrong.append(f"{key} {value!r} (a number above 0)")
    if wrong:
        raise UserError(f"config.json of this {family} holds {'; '.join(wrong)}. Fetch the file again from its source")
    return found


def check_rules(rules: Sequence[tuple[bool, str]]) -> None:
    """``rules``: (holds, what config.json says instead). Raises one UserError with all that are broken."""
    broken = [text for holds, text in rules if not holds]
    if broken:
        raise UserError("config.json holds what this trainer does not compute: " + "; ".join(broken))
