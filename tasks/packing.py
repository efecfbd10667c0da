"""Documents of one task laid into sequences of equal length, in one of three ways.

documents: end to end, so that no position is spent on padding, and apart: a document never sees another. One that reaches the end of a
    sequence is cut there and goes on at the start of this task's next sequence. Positions count from 0 at every document start and at
    the start of every sequence, so `positions == 0` marks exactly the starts of segments, and attention never needs to look past one.
    The first id of a segment is never a target: nothing before it in its segment predicts it.
concat: the classic stream. The ids of a group of documents are cut into blocks of T + 1, whose first T are the sequence and whose last T
    are the targets; what of the group fills no block is dropped. Positions run through, documents see those before them, and no target
    is lost at a document's start. A group that fills no block takes in further documents instead, and at the end of a pass without a
    single block those of the next pass: so few and short documents make a stream too.
none: one document to a sequence, or one piece of it. The rest is padding: end-of-text ids in a segment of their own, none a target.

A document longer than T ids goes on in further sequences, or is cut to T ids, its end-of-text id with the rest.

The place in the stream is (pass, position of the document in that pass' order, ids already used of it), written always in the one
form in which the next id is named: a packer made from `state()` goes on at the very next id. Which task a sequence comes from is
tasks/mixture.py's; order and reading of the documents are tasks/readers.py's; which ids are targets is tasks/encoding.py's.

Legend: T = ids in a sequence.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from modules.lm_ops import IGNORED_TARGET
from tasks.encoded_documents import EncodedDocuments
from tasks.encoding import Encoded, Encoder
from tasks.readers import Documents
from user_error import UserError

NUM_PLANES = 3

PackingMode = Literal["documents", "concat", "none"]
LongDocuments = Literal["split", "truncate"]


@dataclass(frozen=True, kw_only=True)
class PackingRules:
    """How documents become sequences. group: documents that make one stream of mode concat."""

    seq_length: int
    mode: PackingMode = "documents"
    group: int = 1000
    long_documents: LongDocuments = "split"


@dataclass(frozen=True, kw_only=True)
class PackedSequence:
    """One sequence of one task."""

    token_ids: np.ndarray  # (T,) int32
    positions: np.ndarray  # (T,) int32, 0 at each segment start
    targets: np.ndarray  # (T,) int32: the id that each position is to predict, or IGNORED_TARGET
    task: int  # place of the task in the list
    num_padding: int = 0  # of the T ids, the last ones

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
    """The endless packed stream of one task."""

    def __init__(
        self, *, documents: Documents, encoder: Encoder, rules: PackingRules, task: int, state: dict[str, Any] | None = None
    ) -> None:
        """Starts at the first document, or where the packer that returned `state` stood."""
        assert rules.seq_length >= 1, f"a sequence must hold at least one id, not {rules.seq_length}"
        assert rules.group >= 1, f"a group must hold at least one document, not {rules.group}"
        self._documents = EncodedDocuments(documents, encoder)
        self._eos_token_id = encoder.eos_token_id
        self._rules = rules
        self._task = task
        self._count_up = np.arange(rules.seq_length, dtype=np.int32)
        self._pack = {"documents": self._several, "concat": self._block, "none": self._one}[rules.mode]
        self._document: Encoded | None = None  # at the cursor, once it was needed
        was: dict[str, Any] = state or {}
        self._pass = int(was.get("pass", 0))
        self._position = int(was.get("position", 0))
        self._token_offset = int(was.get("token_offset", 0))
        self._num_tokens = int(was.get("tokens", 0))
        self._num_records = int(was.get("records", 0))
        self._num_skipped = int(was.get("skipped_records", 0))
        self._group_documents = int(was.get("group_documents", 0))  # begun in this group
        self._group_has_block = bool(was.get("group_has_block", False))
        self._pass_has_block = bool(was.get("pass_has_block", False))

    @property
    def num_tokens(self) -> int:
        """Ids handed out since the first sequence ever, resumes included, padding not."""
        return self._num_tokens

    def state(self) -> dict[str, Any]:
        """JSON-serialisable; names the next id. `records` counts documents begun, `pass` the passes behind them, `skipped_records` a bad
        record again in each pass that meets it."""
        state = {
            "pass": self._pass,
            "position": self._position,
            "token_offset": self._token_offset,
            "tokens": self._num_tokens,
            "records": self._num_records,
            "skipped_records": self._num_skipped,
        }
        if self._rules.mode == "concat":
            state |= {"group_documents": self._group_documents, "group_has_block": self._group_has_block}
            state |= {"pass_has_block": self._pass_has_block}
        return state

    def next_sequence(self) -> PackedSequence:
        """The next sequence of the stream; UserError for a bad record, if such records are errors."""
        sequence = self._pack()
        self._num_tokens += len(sequence.token_ids) - sequence.num_padding
        return sequence

    def _several(self) -> PackedSequence:
        """--packing documents."""
        seq_length = self._rules.seq_length
        token_ids, positions, is_target = self._empty(seq_length)
        filled = 0
        while filled < seq_length:
            if self._document is None:
                self._load_document()
            took = self._take(token_ids, is_target, filled)
            positions[filled : filled + took] = self._count_up[:took]
            filled += took
        return self._sequence(token_ids, positions, _masked(targets_within_segments(token_ids, positions), is_target))

    def _block(self) -> PackedSequence:
        """--packing concat: the next seq_length + 1 ids of a group; with fewer left, of the next group."""
        token_ids, _, is_target = self._empty(self._rules.seq_length + 1)
        filled = 0
        while filled < len(token_ids):
            if self._document is None and self._load_document():
                filled = 0
            filled += self._take(token_ids, is_target, filled)
        self._group_has_block = self._pass_has_block = True
        targets = np.where(is_target[1:], token_ids[1:], IGNORED_TARGET).astype(np.int32, copy=False)
        return self._sequence(token_ids[:-1].copy(), self._count_up.copy(), targets)

    def _one(self) -> PackedSequence:
        """--packing none."""
        token_ids, positions, is_target = self._empty(self._rules.seq_length)
        if self._document is None:
            self._load_document()
        took = self._take(token_ids, is_target, 0)
        token_ids[took:], is_target[took:] = self._eos_token_id, False
        positions[:took], positions[took:] = self._count_up[:took], self._count_up[: len(token_ids) - took]
        targets = _masked(targets_within_segments(token_ids, positions), is_target)
        return self._sequence(token_ids, positions, targets, num_padding=len(token_ids) - took)

    def _sequence(self, token_ids: np.ndarray, positions: np.ndarray, targets: np.ndarray, num_padding: int = 0) -> PackedSequence:
        return PackedSequence(token_ids=token_ids, positions=positions, targets=targets, task=self._task, num_padding=num_padding)

    @staticmethod
    def _empty(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids (length,) int32, positions (length,) int32, is_target (length,) bool, to be filled."""
        return np.empty(length, dtype=np.int32), np.empty(length, dtype=np.int32), np.empty(length, dtype=np.bool_)

    def _take(self, token_ids: np.ndarray, is_target: np.ndarray, filled: int) -> int:
        """Write both, from ``filled`` on, from the document at the cursor, which moves on. Returns how many ids there were."""
        assert self._document is not None, "it was loaded"
        ids, start = self._document.ids, self._token_offset
        took = min(len(token_ids) - filled, len(ids) - start)
        end = start + took
        token_ids[filled : filled + took] = ids[start:end]
        is_target[filled : filled + took] = self._document.is_target[start:end]
        self._token_offset = end
        if end == len(ids):
            self._document = None
            self._position += 1
            self._token_offset = 0
        return took

    def _load_document(self) -> bool:
        """Tokenises the document at the cursor, which moves over bad records and pass ends to the first good one. Whether a group of
        --packing concat begins with it."""
        document = self._documents.next_good(self._pass, self._position)
        encoded = document.encoded
        if self._rules.long_documents == "truncate" and len(encoded.ids) > self._rules.seq_length:
            length = self._rules.seq_length
            encoded = Encoded(encoded.ids[:length], encoded.is_target[:length])
        same_document = (document.pass_index, document.position) == (self._pass, self._position)
        if self._token_offset and not (same_document and self._token_offset < len(encoded.ids)):
            raise UserError(
                f"The saved data position must fit the data and the tokenizer it was saved with; {self._documents.name} has no id "
                f"{self._token_offset} in document {self._position} of pass {self._pass}. Give the same file and tokenizer as in the "
                "run that saved it, or start without the saved position."
            )
        begins_group = False
        if self._token_offset == 0:
            begins_group = self._group_has_block and self._group_documents >= self._rules.group
            if document.pass_index != self._pass:
                begins_group, self._pass_has_block = self._pass_has_block, False
            if begins_group:
                self._group_documents, self._group_has_block = 0, False
            self._group_documents += 1
            self._num_records += 1
        self._pass, self._position = document.pass_index, document.position
        self._num_skipped += document.num_skipped
        self._document = encoded
        return begins_group


def _masked(targets: np.ndarray, is_target: np.ndarray) -> np.ndarray:
    """targets (T,) where the id that follows is one, by is_target (T,) of the ids themselves."""
    targets[:-1][~is_target[1:]] = IGNORED_TARGET
    return targets


def sequences_in_pass(lengths: Iterable[int], rules: PackingRules) -> float:
    """How many sequences one pass over documents of these lengths (ids, end included) gives: whole ones, but for a stream that goes on
    across passes, which has no end to round at."""
    seq_length = rules.seq_length
    if rules.long_documents == "truncate":
        lengths = (min(length, seq_length) for length in lengths)
    if rules.mode == "none":
        return float(sum(-(-length // seq_length) for length in lengths))
    if rules.mode == "documents":
        return sum(lengths) / seq_length
    blocks, in_group, documents, total = 0, 0, 0, 0
    for length in lengths:
        if documents >= rules.group and in_group > seq_length:
            blocks += in_group // (seq_length + 1)
            in_group, documents = 0, 0
        in_group, documents, total = in_group + length, documents + 1, total + length
    blocks += in_group // (seq_length + 1)
    return float(blocks) or total / (seq_length + 1)
