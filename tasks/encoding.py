"""From documents to token ids, and which of them are targets.

A text is tokenised as it stands and whole, since that is how a model meets it; nothing is prepended, and every document ends with the
end-of-text id. Which ids are a completion's is then a question of where the text before it ends among the ids. That is not assumed but
looked up: the ids of the text up to each boundary must be the beginning of the ids of the whole. Where a tokenizer merges across a
boundary they are not; such a document is tokenised piece by piece instead, so that the mask is exact, and is counted.

What --loss-on completion makes targets: every id of the target pieces, and the end-of-text id if the last piece is one. A completion
behind a prompt that comes to no id at all teaches nothing: its record is bad. (--loss-on all, which masks nothing, tokenises each text
once and does not look for that.)

Legend: n = ids of a document, its end-of-text id included.
"""

from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

import numpy as np

from tasks.examples import BadRecordError, Example

LossOn = Literal["all", "completion"]

_EXCERPT_CHARS = 60


class Encoded(NamedTuple):
    """One document as ids. (A tuple, as there are millions.)"""

    ids: np.ndarray  # (n,) int32, the end-of-text id last
    is_target: np.ndarray  # (n,) bool
    is_apart: bool = False  # its pieces were tokenised one by one


class Encoder:
    """A tokenizer and what of a document is to be learnt. Knows no files; used by one thread at a time."""

    def __init__(
        self,
        *,
        token_ids: Callable[[Sequence[str]], list[list[int]]],
        decode: Callable[[Sequence[int]], str],
        eos_token_id: int,
        loss_on: LossOn = "all",
    ) -> None:
        """token_ids: of several texts, no special id added. decode: text of ids, special ones shown."""
        self.token_ids, self.decode, self.eos_token_id, self.loss_on = token_ids, decode, eos_token_id, loss_on

    def encode(self, examples: Sequence[Example]) -> list[Encoded | BadRecordError]:
        """For every document its ids, or what is wrong with it (returned, not raised: the others are none the worse)."""
        if self.loss_on == "all":
            return self._all(self.token_ids([example.text for example in examples]))
        return self._completions(examples)

    def _all(self, of_each: list[list[int]]) -> list[Encoded | BadRecordError]:
        """One array for all, of which each gets a part: a fifth of the time that small arrays take."""
        joined: list[int] = []
        ends = [0]
        for ids in of_each:
            joined += ids
            joined.append(self.eos_token_id)
            ends.append(len(joined))
        array, is_target = np.array(joined, dtype=np.int32), np.ones(len(joined), dtype=np.bool_)
        return [Encoded(array[start:end], is_target[start:end]) for start, end in pairwise(ends)]

    def _completions(self, examples: Sequence[Example]) -> list[Encoded | BadRecordError]:
        """Tokenises every document together with its beginnings up to each boundary, all in one call."""
        all_runs = [_runs(example) for example in examples]
        texts: list[str] = []
        for runs in all_runs:
            whole = ""
            for text, _ in runs:
                whole += text
                texts.append(whole)
            if not runs:
                texts.append("")
        tokenised = iter(self.token_ids(texts))
        return [self._masked(runs, [next(tokenised) for _ in range(max(1, len(runs)))]) for runs in all_runs]

    def _masked(self, runs: list[tuple[str, bool]], beginnings: list[list[int]]) -> Encoded | BadRecordError:
        """runs: texts that are targets and texts that are not, in turn; beginnings: the ids up to the end of each run."""
        ids = beginnings[-1]
        ends = [len(beginning) for beginning in beginnings]
        is_apart = ends != sorted(ends) or any(ids[:end] != beginning for end, beginning in zip(ends, beginnings, strict=True))
        if is_apart:
            pieces = self.token_ids([text for text, _ in runs])
            ids = [token for piece in pieces for token in piece]
            lengths = [len(piece) for piece in pieces]
        else:
            lengths = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        is_target = np.zeros(len(ids) + 1, dtype=np.bool_)
        at = 0
        for (text, is_completion), length in zip(runs, lengths, strict=False):
            if is_completion and length <= 0:
                return BadRecordError(f"the completion {_excerpt(text)} comes to no token of this tokenizer")
            is_target[at : at + length] = is_completion
            at += length
        is_target[-1] = not runs or runs[-1][1]
        return Encoded(ids=np.array([*ids, self.eos_token_id], dtype=np.int32), is_target=is_target, is_apart=is_apart)


def _runs(example: Example) -> list[tuple[str, bool]]:
    """The text of neighbouring pieces of one kind joined. Pieces without text are none, but for a completion behind a prompt."""
    runs: list[tuple[str, bool]] = []
    for is_target, pieces in groupby(example.pieces, key=lambda piece: piece.is_target):
        text = "".join(piece.text for piece in pieces)
        if text or (is_target and runs):
            runs.append((text, is_target))
    return runs


def _excerpt(text: str) -> str:
    """The beginning of a text, for messages."""
    return repr(text if len(text) <= _EXCERPT_CHARS else text[:_EXCERPT_CHARS] + "...")
