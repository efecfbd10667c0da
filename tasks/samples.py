"""A packed sequence as text for the eye, in which everything that packing did can be seen: --show-samples.

    | 17 tokens, 3 targets
    <<mnli hypothesis: .. premise: .. target:>> neutral<|endoftext|>
    | 1007 tokens of padding

One part per segment, which sees nothing of the others. What stands in << >> is read by the model and not learnt; the first token of a
segment is never learnt, having nothing before it. A character that is cut in two by the end of a sequence, or of a mask, shows as U+FFFD.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from modules.lm_ops import IGNORED_TARGET
from tasks.packing import PackedSequence, num_targets


def as_text(sequence: PackedSequence, decode: Callable[[Sequence[int]], str]) -> str:
    """Several lines. decode: text of ids, special ones shown."""
    num_real = len(sequence.token_ids) - sequence.num_padding
    starts = [int(start) for start in np.flatnonzero(sequence.positions[:num_real] == 0)]
    lines = []
    for start, end in zip(starts, [*starts[1:], num_real], strict=True):
        targets = sequence.targets[start:end]
        lines.append(f"| {end - start} tokens, {num_targets(targets)} targets")
        lines.append(_marked(sequence.token_ids[start:end], targets, decode))
    if sequence.num_padding:
        lines.append(f"| {sequence.num_padding} tokens of padding")
    return "\n".join(lines)


def _marked(ids: np.ndarray, targets: np.ndarray, decode: Callable[[Sequence[int]], str]) -> str:
    """Text of a segment. A target is the id that follows, so the last one may be an id that the sequence itself does not hold."""
    is_learnt = np.append(False, targets != IGNORED_TARGET)  # (t + 1,) of the ids and the one behind them
    shown = np.append(ids, targets[-1])
    if not is_learnt[-1]:
        is_learnt, shown = is_learnt[:-1], shown[:-1]
    borders = [0, *(np.flatnonzero(is_learnt[1:] != is_learnt[:-1]) + 1).tolist(), len(shown)]
    text = ""
    for start, end in pairwise(borders):
        run = decode(shown[start:end].tolist())
        text += run if is_learnt[start] else f"<<{run}>>"
    return text
