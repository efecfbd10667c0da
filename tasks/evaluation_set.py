"""The records of an evaluation, in memory on rank 0, as what the stages are given: sequences for the loss, prompts, rows of labels.

One pass in the order of the files. Every target is counted once; a document longer than a sequence goes on in further ones (or loses its
end, by flag), whose first ids nothing predicts. Prompts that are too long lose their beginning, as the question stands at the end, and
that is counted. Nothing here runs a model.

Legend: T = ids in a sequence, n = ids of a prompt.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np

from modules.lm_ops import IGNORED_TARGET
from tasks.encoding import Encoded, Encoder
from tasks.examples import BadRecordError, BoundTask, Example, Piece
from tasks.metrics import Verdict, judge
from tasks.packing import NUM_PLANES, PackingRules
from tasks.readers import Documents
from user_error import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationExample:
    """One record. number: its place in the evaluation, from 0; where: file:line."""

    number: int
    where: str
    source: str
    example: Example
    task: BoundTask
    fingerprint: str  # of the record's own text, without what was put in front of it

    @property
    def expected(self) -> str:
        """What the answer is compared with, after the same post-processing as the answer."""
        label = self.example.label
        return self.task.answer(self.example.completion if label is None else label)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """All that an answer may be, after that post-processing."""
        return None if self.task.labels is None else tuple(dict.fromkeys(map(self.task.answer, self.task.labels)))

    def judge(self, answer: str, *, ended: bool = True) -> Verdict:
        """Of an answer after that post-processing."""
        is_as_good = answer in map(self.task.answer, self.example.as_good)
        return judge(answer, answer if is_as_good else self.expected, self.labels, ended=ended)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is generated from. ids: (n,) of the text before the answer."""

    example: EvaluationExample
    ids: list[int]


@dataclass(frozen=True, kw_only=True)
class LabelRow:
    """One label behind one example's prompt. encoded: (n,) ids, n <= T, no end-of-text id behind them. length: T."""

    example: EvaluationExample
    label: str
    encoded: Encoded
    length: int
    eos_token_id: int

    @property
    def planes(self) -> np.ndarray:
        """(NUM_PLANES, T) int32, the label's ids the only targets. Made when asked for: padded rows of all labels of all examples would
        be many times the text."""
        row = _Row(self.length, self.eos_token_id)
        row.take(self.encoded.ids, self.encoded.is_target)
        return row.finish()


class EvaluationSet:
    """All records of the sources of --evaluation-data."""

    def __init__(self, sources: Sequence[Documents]) -> None:
        """Reads them all. Raises UserError for a bad record, if those are errors, and for sources without a single one."""
        self.examples: list[EvaluationExample] = []
        for documents in sources:
            for document in documents.in_order():
                number = len(self.examples)
                found = EvaluationExample(
                    number=number,
                    where=document.where,
                    source=documents.name,
                    example=document.example,
                    task=documents.task,
                    fingerprint=hashlib.sha256(document.example.text.encode()).hexdigest()[:16],
                )
                self.examples.append(found)
        assert self.examples, "a source holds at least one record, or opening it was refused"

    def prepared(self, prepare: Callable[[Example, int], Example]) -> "EvaluationSet":
        """The same records with something in front of each: what ``prepare`` makes of an example and its number (tasks/shots.py)."""
        changed = copy(self)
        changed.examples = [dataclasses.replace(e, example=prepare(e.example, e.number)) for e in self.examples]
        return changed

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels that all sources share; None if any has others, or none."""
        found = {labels for task in {id(e.task): e for e in self.examples}.values() for labels in [task.labels]}
        return found.pop() if len(found) == 1 else None

    def fingerprint(self) -> str:
        """Hex digits of all records."""
        return hashlib.sha256("".join(example.fingerprint for example in self.examples).encode()).hexdigest()[:16]

    def check_answerable(self) -> None:
        """Raise UserError unless every record has something that an answer can be compared with."""
        for example in self.examples:
            if not any(piece.is_target for piece in example.example.pieces) or not example.example.prompt:
                raise UserError(
                    f"an accuracy needs records with a prompt and an answer (prompt/completion, messages, or a task with labels); "
                    f"{example.where} is text alone. Use --evaluation-metric loss (dist_clm_eval.py: --metric perplexity), or other data"
                )

    def sequences(
        self, encoder: Encoder, rules: PackingRules, progress: Callable[[int], object] = lambda num_records: None
    ) -> Iterator[np.ndarray]:
        """(NUM_PLANES, T) int32 each: all documents packed in the way of ``rules``, the last sequence padded. ``progress`` hears of the
        records that were taken."""
        documents = self._encoded(encoder, progress)
        if rules.long_documents == "truncate":
            documents = (Encoded(ids=d.ids[: rules.seq_length], is_target=d.is_target[: rules.seq_length]) for d in documents)
        if rules.mode == "concat":
            yield from _blocks(documents, rules.seq_length, encoder.eos_token_id)
            return
        row = _Row(rules.seq_length, encoder.eos_token_id)
        for document in documents:
            at = 0
            if row.room < len(document.ids) and not row.is_empty:
                yield row.finish()  # so a document is cut, if at all, as it is alone: what precedes it changes no target
            while at < len(document.ids):
                at += row.take(document.ids[at:], document.is_target[at:])
                if row.is_full or (rules.mode == "none"):
                    yield row.finish()
        if not row.is_empty:
            yield row.finish()

    def prompts(self, encoder: Encoder, *, max_length: int) -> list[Prompt]:
        """One per record. Prompts of more than ``max_length`` ids lose their beginning; how many did is logged. Raises UserError where
        that leaves none, and for a prompt that comes to no id."""
        if max_length < 1:
            raise UserError(
                f"a sequence must hold at least one token of a prompt besides those generated; {max_length} are left for it. Ask for "
                "fewer with --max-new-tokens (in a training --evaluation-max-new-tokens), or leave --seq-length out"
            )
        self.check_answerable()
        found, num_cut = [], 0
        texts = [example.example.prompt for example in self.examples]
        for example, ids in zip(self.examples, encoder.token_ids(texts), strict=True):
            if not ids:
                raise UserError(
                    f"{example.where}: a prompt must come to at least one token; {example.example.prompt!r} comes to none. "
                    "Correct the record"
                )
            num_cut += len(ids) > max_length
            found.append(Prompt(example=example, ids=ids[-max_length:]))
        _say_cut(num_cut, len(found), max_length)
        return found

    def label_rows(self, encoder: Encoder, *, max_length: int) -> list[LabelRow]:
        """For every record one row for each of its task's labels, all of one length T: that of the longest, ``max_length`` at most. Raises
        UserError for tasks that have no labels, and for labels that do not fit."""
        self.check_answerable()
        encoder = Encoder(token_ids=encoder.token_ids, decode=encoder.decode, eos_token_id=encoder.eos_token_id, loss_on="completion")
        rows: list[tuple[EvaluationExample, str, Encoded]] = []
        for example in self.examples:
            if example.task.labels is None:
                raise UserError(
                    f"--metric labels compares the labels of a task, and {example.source} has none. Use a task with labels (mnli, "
                    "classification, one of yours), or --metric accuracy"
                )
            completions = [example.task.completion_of(label) for label in example.task.labels]
            asked = [Example(pieces=(Piece(example.example.prompt, False), Piece(text, True))) for text in completions]
            for label, encoded in zip(example.task.labels, encoder.encode(asked), strict=True):
                if isinstance(encoded, BadRecordError):
                    raise UserError(f"{example.where}: label {label!r}: {encoded}. Give the label another name")
                rows.append((example, label, encoded))
        length = min(max_length, max(len(encoded.ids) - 1 for _, _, encoded in rows))
        for example, label, encoded in rows:
            if int(encoded.is_target[:-1].sum()) >= length:
                raise UserError(
                    f"{example.where}: a label and a token before it must fit into --seq-length; {label!r} has "
                    f"{encoded.is_target[:-1].sum()} tokens, and {length} fit. Use longer sequences, or shorter labels"
                )
        num_cut = sum(len(encoded.ids) - 1 > length for _, _, encoded in rows)
        _say_cut(num_cut, len(rows), length)
        return [
            LabelRow(example=example, label=label, encoded=_cut(encoded, length), length=length, eos_token_id=encoder.eos_token_id)
            for example, label, encoded in rows
        ]

    def _encoded(self, encoder: Encoder, progress: Callable[[int], object]) -> Iterator[Encoded]:
        step = 64
        for start in range(0, len(self.examples), step):
            examples = self.examples[start : start + step]
            for example, encoded in zip(examples, encoder.encode([each.example for each in examples]), strict=True):
                if isinstance(encoded, BadRecordError):
                    raise UserError(f"{example.where}: {encoded}. Correct the record")
                yield encoded
                progress(1)


class _Row:
    """A sequence being filled, each document a segment of its own."""

    def __init__(self, length: int, eos_token_id: int) -> None:
        self._length, self._eos_token_id = length, eos_token_id
        self._begin()

    def _begin(self) -> None:
        self._planes = np.empty((NUM_PLANES, self._length), dtype=np.int32)
        self._planes[0], self._planes[2] = self._eos_token_id, IGNORED_TARGET
        self._filled = 0

    @property
    def room(self) -> int:
        return self._length - self._filled

    @property
    def is_full(self) -> bool:
        return self._filled == self._length

    @property
    def is_empty(self) -> bool:
        return self._filled == 0

    def take(self, ids: np.ndarray, is_target: np.ndarray) -> int:
        """As many ids as there is room for; how many."""
        start = self._filled
        took = min(len(ids), self._length - start)
        self._planes[0, start : start + took] = ids[:took]
        self._planes[1, start : start + took] = np.arange(took)
        self._planes[2, start : start + took - 1] = np.where(is_target[1:took], ids[1:took], IGNORED_TARGET)
        self._filled += took
        return took

    def finish(self) -> np.ndarray:
        """The row, its rest a segment of padding."""
        planes, filled = self._planes, self._filled
        planes[1, filled:] = np.arange(self._length - filled)
        self._begin()
        return planes


def _blocks(documents: Iterator[Encoded], length: int, eos_token_id: int) -> Iterator[np.ndarray]:
    """--packing concat: one stream in blocks of T + 1, the last one padded, so that nothing is dropped."""
    ids, is_target = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.bool_)
    for document in documents:
        ids, is_target = np.append(ids, document.ids), np.append(is_target, document.is_target)
        while len(ids) > length:
            yield _block(ids[: length + 1], is_target[: length + 1], length, eos_token_id)
            ids, is_target = ids[length + 1 :], is_target[length + 1 :]
    if len(ids) > 1:
        yield _block(ids, is_target, length, eos_token_id)


def _block(ids: np.ndarray, is_target: np.ndarray, length: int, eos_token_id: int) -> np.ndarray:
    planes = np.empty((NUM_PLANES, length), dtype=np.int32)
    planes[0], planes[2] = eos_token_id, IGNORED_TARGET
    filled = len(ids) - 1
    planes[0, :filled] = ids[:-1]
    planes[1, :filled], planes[1, filled:] = np.arange(filled), np.arange(length - filled)
    planes[2, :filled] = np.where(is_target[1:], ids[1:], IGNORED_TARGET)
    return planes


def _cut(encoded: Encoded, length: int) -> Encoded:
    """A prompt and its label, less the end-of-text id, and less the prompt's beginning where it is too long."""
    return Encoded(ids=encoded.ids[:-1][-length:], is_target=encoded.is_target[:-1][-length:])


def _say_cut(num_cut: int, num: int, length: int) -> None:
    if num_cut:
        logger.warning("%d of %d prompts lost their beginning, as %d tokens are what fits", num_cut, num, length)
