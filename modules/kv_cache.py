"""The keys and values that a group of growing sequences has computed so far, so that each new token costs one column and not all of them.

Prompts of unequal length end at the same column: shorter ones have pads to the left, which nobody sees and whose place does not count, as
positions are counted from each prompt's first token. So all sequences grow in the same column, and the newest hidden states are always the
last ones. Storage is taken once, for all columns there will be. The training knows nothing of this file: Segments.past is None there.

Legend: B sequences of a group, T new columns, E columns up to and with the new ones, H heads, D head width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.lm_ops import Segments


class KeyValueCache:
    """Of one group of sequences and the layers of one stage."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        head_width: int,
        num_columns: int,
        num_pads: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """num_pads: of each of the B sequences, below num_columns. dtype: of the hidden states. A CPU, which forms attention in fp32,
        keeps keys and values in it: converting all of them for every new token would cost more than the attention."""
        stored = torch.float32 if device.type == "cpu" else dtype
        shape = (num_layers, 2, len(num_pads), num_heads, num_columns, head_width)
        self._stored = torch.empty(shape, dtype=stored, device=device)  # (L, 2, B, H, columns, D)
        self._pads = torch.tensor(num_pads, dtype=torch.int64, device=device)[:, None]  # (B, 1)
        self._columns = torch.arange(num_columns, device=device)  # (columns,)
        self._used = 0

    def extend(self, num_columns: int) -> list[Segments]:
        """Take the next ``num_columns`` columns into use, as many as there are ids: for each layer what its block is called with. The
        columns are full when all layers have been."""
        start, self._used = self._used, self._used + num_columns
        assert self._used <= len(self._columns), f"{self._used} columns of {len(self._columns)}: the cache was made for fewer tokens"
        asking, asked = self._columns[start : self._used], self._columns[: self._used]  # (T,), (E,)
        positions = (asking - self._pads).clamp(min=0)  # (B, T)
        is_token = asked >= self._pads  # (B, E)
        is_self = asking[:, None] == asked  # (T, E): a pad sees itself, or its softmax would have nothing to add up to 1
        visible = (asked <= asking[:, None]) & (is_token[:, None] | is_self)  # (B, T, E)
        return [Segments((), positions, past=_LayerPast(layer, start, visible[:, None])) for layer in self._stored]


class _LayerPast:
    """One layer's part of a cache, while the columns from ``start`` on are computed. visible (B, 1, T, E) bool: by whom what is seen."""

    def __init__(self, stored: Tensor, start: int, visible: Tensor) -> None:
        self._keys, self._values = stored  # (B, H, columns, D) each
        self._start, self._visible = start, visible

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k and v (B, H, T, D) of the new columns; what q (B, H, T, D) finds among all that is kept: (B, H, T, D)."""
        end = self._visible.shape[-1]
        self._keys[:, :, self._start : end] = k
        self._values[:, :, self._start : end] = v
        keys, values = self._keys[:, :, :end], self._values[:, :, :end]  # (B, H, E, D)
        return F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=self._visible).to(q.dtype)
