"""Documents of one task laid end to end into sequences of equal length, so that no position is spent on padding.

Promises: a text is tokenised as it stands, nothing is prepended, and every document ends with the end-of-text id. A document that
reaches the end of a sequence is cut there and goes on at the start of this task's next sequence. Positions count from 0 at every
document start and at the start of every sequence, so `positions == 0` marks exactly the starts of segments, and attention never needs
to look past one. The first id of a segment is never a target: nothing before it in its segment predicts it.

The place in the stream is (pass, position of the document in that pass' order, ids already used of it), written always in the one
form in which the next id is named: a packer made from `state()` goes on at the very next id. Which task a sequence comes from is
tasks/mixture.py's; order and reading of the documents are tasks/readers.py's.

Legend: T = ids in a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from modules.lm_ops import IGNORED_TARGET
from tasks.readers import Documents
from user_error import UserError

NUM_PLANES = 3


@dataclass(frozen=True, kw_only=True)
class PackedSequence:
    """One sequence of one task."""

    token_ids: np.ndarray  # (T,) int32
    positions: np.ndarray  # (T,) int32, 0 at each segment start
    targets: np.ndarray  # (T,) int32: the id that each position is to predict, or IGNORED_TARGET
    task: int  # place of the task in the list

    @property
    def planes(self) -> np.ndarray:
        """(NUM_PLANES, T) int32, as they travel: ids, positions, targets."""
        return np.stack((self.token_ids, self.positions, self.targets))


def num_targets(targets: np.ndarray) -> int:
    """How many of targets (..., T) are there."""
    return int(np.count_nonzero(targets != IGNORED_TARGET))


def targets_within_segments(token_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Of ids and positions (..., T) the targets (..., T) int32 of every id that follows another one of its segment."""
    targets = np.full(token_ids.shape, IGNORED_TARGET, dtype=np.int32)
    targets[..., :-1] = np.where(positions[..., 1:] == 0, IGNORED_TARGET, token_ids[..., 1:])
    return targets


class TaskPacker:
    """The endless packed stream of one task. Holds one tokenised document at a time."""

    def __init__(
        self,
        *,
        documents: Documents,
        tokenize: Callable[[str], list[int]],
        eos_token_id: int,
        seq_length: int,
        task: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Starts at the first document, or where the packer that returned `state` stood."""
        assert seq_length >= 1, f"a sequence must hold at least one id, not {seq_length}"
        self._documents = documents
        self._tokenize = tokenize
        self._eos_token_id = eos_token_id
        self._task = task
        self._count_up = np.arange(seq_length, dtype=np.int32)
        self._ids: np.ndarray | None = None  # the document at the cursor, once it was needed
        self._pass = 0 if state is None else int(state["pass"])
        self._position = 0 if state is None else int(state["position"])
        self._token_offset = 0 if state is None else int(state["token_offset"])
        self._num_tokens = 0 if state is None else int(state["tokens"])
        self._num_skipped = 0 if state is None else int(state["skipped_records"])

    @property
    def num_tokens(self) -> int:
        """Ids handed out since the first sequence ever, resumes included."""
        return self._num_tokens

    def state(self) -> dict[str, Any]:
        """JSON-serialisable; names the next id. `skipped_records` counts a bad record again in each pass that meets it."""
        return {
            "pass": self._pass,
            "position": self._position,
            "token_offset": self._token_offset,
            "tokens": self._num_tokens,
            "skipped_records": self._num_skipped,
        }

    def next_sequence(self) -> PackedSequence:
        """The next T ids of the stream; UserError for a bad record, if such records are errors."""
        seq_length = len(self._count_up)
        token_ids = np.empty(seq_length, dtype=np.int32)
        positions = np.empty(seq_length, dtype=np.int32)
        filled = 0
        while filled < seq_length:
            ids = self._ids if self._ids is not None else self._load_document()
            take = min(seq_length - filled, len(ids) - self._token_offset)
            token_ids[filled : filled + take] = ids[self._token_offset : self._token_offset + take]
            positions[filled : filled + take] = self._count_up[:take]
            filled += take
            self._token_offset += take
            if self._token_offset == len(ids):
                self._ids = None
                self._position += 1
                self._token_offset = 0
        self._num_tokens += seq_length
        targets = targets_within_segments(token_ids, positions)
        return PackedSequence(token_ids=token_ids, positions=positions, targets=targets, task=self._task)

    def _load_document(self) -> np.ndarray:
        """Tokenises the document at the cursor, which moves over bad records and pass ends to the first good one."""
        document = self._documents.next_good(self._pass, self._position)
        ids = np.array([*self._tokenize(document.text), self._eos_token_id], dtype=np.int32)
        same_document = (document.pass_index, document.position) == (self._pass, self._position)
        if self._token_offset and not (same_document and self._token_offset < len(ids)):
            raise UserError(
                f"The saved data position must fit the data and the tokenizer it was saved with; {self._documents.name} has no id "
                f"{self._token_offset} in document {self._position} of pass {self._pass}. Give the same file and tokenizer as in the "
                "run that saved it, or start without the saved position."
            )
        self._pass, self._position = document.pass_index, document.position
        self._num_skipped += document.num_skipped
        self._ids = ids
        return ids
