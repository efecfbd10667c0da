"""What the tests of tokenising and packing share: documents that stand in no file, and a tokenizer of letters."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.encoding import Encoder, LossOn
from tasks.examples import BadRecordError, Example, Piece
from tasks.mixture import OpenDocuments
from tasks.packing import PackedSequence, PackingRules, TaskPacker
from tasks.prompts import TaskOptions, tasks_by_name
from tasks.readers import ReadingRules, open_documents
from tasks.records import OnBadRecord
from user_error import UserError

EOS = 0


def letters(text: str) -> list[int]:
    """a = 1, b = 2, ..."""
    return [ord(letter) - ord("a") + 1 for letter in text]


def make_encoder(
    tokenize: Callable[[str], list[int]] = letters, *, eos: int = EOS, loss_on: LossOn = "all", decode: Callable[..., str] | None = None
) -> Encoder:
    return Encoder(
        token_ids=lambda texts: [tokenize(text) for text in texts],
        decode=decode or (lambda ids: "".join("." if i == eos else chr(ord("a") + i - 1) for i in ids)),
        eos_token_id=eos,
        loss_on=loss_on,
    )


def open_plainly(seed: int, on_bad_record: OnBadRecord = "error", shuffle_window: int = 10_000) -> OpenDocuments:
    """How a mixture opens its tasks, with nothing special about them."""
    rules = ReadingRules(on_bad_record=on_bad_record, shuffle_window=shuffle_window)
    return lambda spec, place: open_documents(spec, tasks_by_name(TaskOptions()), seed=seed, place=place, rules=rules)


def text(text: str) -> Example:
    return Example(pieces=(Piece(text, True),))


def answered(prompt: str, completion: str) -> Example:
    return Example(pieces=(Piece(prompt, False), Piece(completion, True)), label=completion)


@dataclass(frozen=True)
class ListedDocument:
    pass_index: int
    position: int
    where: str
    example: Example
    num_skipped: int


class ListedDocuments:
    """Documents in the order given, the same in every pass; a BadRecordError among them is a bad record."""

    name, num_bytes = "listed", 1

    def __init__(self, *examples: Example | BadRecordError, skip: bool = False) -> None:
        self.examples, self.skip = examples, skip
        self.asked: list[tuple[int, int]] = []
        self.left_out: list[str] = []

    def next_good(self, pass_index: int, position: int) -> ListedDocument:
        self.asked.append((pass_index, position))
        num_skipped = 0
        while True:
            if position >= len(self.examples):
                pass_index, position = pass_index + 1, 0
            example = self.examples[position]
            where = f"listed:{position + 1}"
            if isinstance(example, Example):
                return ListedDocument(pass_index, position, where, example, num_skipped)
            self.leave_out(where, example)
            num_skipped, position = num_skipped + 1, position + 1

    def leave_out(self, where: str, error: BadRecordError) -> None:
        if not self.skip:
            raise UserError(f"{where}: {error}")
        self.left_out.append(where)

    def close(self) -> None:
        pass


def make_packer(
    *examples: Example | BadRecordError | str,
    seq_length: int,
    loss_on: LossOn = "all",
    tokenize: Callable[[str], list[int]] = letters,
    skip: bool = False,
    state: dict[str, Any] | None = None,
    **rules: Any,
) -> TaskPacker:
    documents = ListedDocuments(*(text(example) if isinstance(example, str) else example for example in examples), skip=skip)
    return TaskPacker(
        documents=documents,  # type: ignore[arg-type]
        encoder=make_encoder(tokenize, loss_on=loss_on),
        rules=PackingRules(seq_length=seq_length, **rules),
        task=7,
        state=None if state is None else json.loads(json.dumps(state)),
    )


def pack(*examples: Example | BadRecordError | str, num: int, **given: Any) -> list[PackedSequence]:
    packer = make_packer(*examples, **given)
    return [packer.next_sequence() for _ in range(num)]


def rows(sequences: Sequence[PackedSequence]) -> list[list[list[int]]]:
    """Of each sequence ids, positions, targets."""
    return [sequence.planes.tolist() for sequence in sequences]
