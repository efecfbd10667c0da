"""Records of an evaluation as sequences, prompts and rows of labels: every target once, whatever shares its sequence."""

import json
import logging
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from support.packing import EOS, ListedDocument, answered, letters, make_encoder, text
from support.ranks import SHARED
from support.tiers import full
from tokenizers import Tokenizer

from modules.lm_ops import IGNORED_TARGET
from tasks.encoding import Encoder
from tasks.evaluation_set import EvaluationSet
from tasks.examples import Example, Piece
from tasks.packing import PackingRules, num_targets
from tasks.prompts import PlainTask, TaskOptions, tasks_by_name
from user_error import UserError

X = IGNORED_TARGET
MNLI = SHARED / "data/nli/mnli_validation_matched.jsonl"
GPT_J = SHARED / "data/tokenizers/gpt-j-6b/tokenizer.json"


class Listed:
    """Documents in the order given, as Documents.in_order gives them."""

    def __init__(self, *examples: Example, labels: tuple[str, ...] | None = None, name: str = "listed") -> None:
        self._examples, self.name = examples, name
        self.task = PlainTask(make=lambda record: text(str(record)), labels=labels)

    def in_order(self) -> Iterator[ListedDocument]:
        for position, example in enumerate(self._examples):
            yield ListedDocument(0, position, f"{self.name}:{position + 1}", example, 0)


def evaluation(*examples: Example, labels: tuple[str, ...] | None = None) -> EvaluationSet:
    return EvaluationSet([Listed(*examples, labels=labels)])  # type: ignore[list-item]


def planes(records: EvaluationSet, length: int, loss_on: Any = "all", **rules: Any) -> list[list[list[int]]]:
    return [row.tolist() for row in records.sequences(make_encoder(loss_on=loss_on), PackingRules(seq_length=length, **rules))]


def test_examples_are_numbered_over_all_sources_and_know_where_they_stood() -> None:
    records = EvaluationSet([Listed(text("ab"), text("c"), name="one"), Listed(text("d"), name="two")])  # type: ignore[list-item]
    assert [(e.number, e.source, e.where) for e in records.examples] == [(0, "one", "one:1"), (1, "one", "one:2"), (2, "two", "two:1")]


def test_what_stands_in_front_changes_the_prompt_but_not_the_fingerprint() -> None:
    def prepare(example: Example, number: int) -> Example:
        return Example(pieces=(Piece("z" * (number + 1), False), *example.pieces), label=example.label)

    plain = evaluation(answered("ab", "c"), answered("de", "f"))
    prepared = plain.prepared(prepare)
    assert [e.example.prompt for e in prepared.examples] == ["zab", "zzde"]
    assert [e.fingerprint for e in prepared.examples] == [e.fingerprint for e in plain.examples]
    assert plain.examples[0].fingerprint != plain.examples[1].fingerprint


def test_what_is_expected_is_read_like_an_answer() -> None:
    completion, labelled = (Example(pieces=(Piece("a", False), Piece(" b\n", True)), label=label) for label in (None, " c "))
    assert [e.expected for e in evaluation(completion, labelled).examples] == ["b", "c"]


def test_labels_are_those_that_all_sources_share() -> None:
    def of(*labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return EvaluationSet([Listed(answered("q", "a"), labels=each) for each in labels]).labels  # type: ignore[misc]

    assert of(("a", "b"), ("a", "b")) == ("a", "b")
    assert of(("a", "b"), ("a", "c")) is None
    assert of(("a", "b"), None) is None
    assert of(None) is None


def test_documents_share_a_sequence_and_never_see_each_other() -> None:
    assert planes(evaluation(text("ab"), text("cd"), text("efg")), 8) == [
        [[1, 2, EOS, 3, 4, EOS, EOS, EOS], [0, 1, 2, 0, 1, 2, 0, 1], [2, EOS, X, 4, EOS, X, X, X]],
        [[5, 6, 7, EOS, EOS, EOS, EOS, EOS], [0, 1, 2, 3, 0, 1, 2, 3], [6, 7, EOS, X, X, X, X, X]],
    ]


def test_completions_alone_are_targets_when_asked() -> None:
    assert planes(evaluation(answered("ab", "c")), 5, "completion") == [[[1, 2, 3, EOS, EOS], [0, 1, 2, 3, 0], [X, 3, EOS, X, X]]]


def test_concat_drops_nothing_and_pads_the_last_block() -> None:
    assert planes(evaluation(text("abc"), text("de"), text("f")), 4, mode="concat") == [
        [[1, 2, 3, EOS], [0, 1, 2, 3], [2, 3, EOS, 4]],
        [[5, EOS, 6, EOS], [0, 1, 2, 0], [EOS, 6, EOS, X]],
    ]


def test_a_long_document_goes_on_or_loses_its_end() -> None:
    records = evaluation(text("abcdef"))
    split = [[[1, 2, 3, 4], [0, 1, 2, 3], [2, 3, 4, X]], [[5, 6, EOS, EOS], [0, 1, 2, 0], [6, EOS, X, X]]]
    assert planes(records, 4) == split
    assert planes(records, 4, long_documents="truncate") == split[:1]


@pytest.mark.parametrize("loss_on", ["all", "completion"])
@pytest.mark.parametrize("long_documents", ["split", "truncate"])
def test_one_document_to_a_sequence_and_several_have_the_same_targets(loss_on: str, long_documents: str) -> None:
    """A long document that began in what was left of a sequence was cut elsewhere than alone, and lost other targets by it."""
    drawn = np.random.default_rng(0).integers(1, 30, size=(60, 2))
    records = evaluation(*(answered("p" * int(prompt), "c" * int(completion)) for prompt, completion in drawn))

    def segments(mode: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Ids and targets of every segment that has any target, in order."""
        found = []
        for ids, positions, targets in planes(records, 16, loss_on, mode=mode, long_documents=long_documents):
            starts = [place for place, position in enumerate(positions) if position == 0] + [16]
            for start, end in pairwise(starts):
                if set(targets[start:end]) != {X}:
                    found.append((tuple(ids[start:end]), tuple(targets[start:end])))
        return found

    assert len(segments("none")) > 20, "or there is nothing to compare"
    assert segments("documents") == segments("none")


@pytest.mark.parametrize("mode", ["documents", "none", "concat"])
def test_every_target_is_counted_once(mode: str) -> None:
    words = ["abcdefghijklmnopqrstuvwxyz"[start:end] for start in range(5) for end in range(start + 1, 8)]
    found = planes(evaluation(*map(text, words)), 9, mode=mode)
    counted = sum(target != X for row in found for target in row[2])
    ids = sum(len(word) + 1 for word in words)
    assert counted == ids - (-(-ids // 10) if mode == "concat" else len(words)), "all but the first of a block or a document"


def test_prompts_lose_their_beginning_where_they_are_too_long(caplog: pytest.LogCaptureFixture) -> None:
    records = evaluation(answered("abcdef", "g"), answered("hi", "j"))
    with caplog.at_level(logging.WARNING):
        prompts = records.prompts(make_encoder(), max_length=4)
    assert [prompt.ids for prompt in prompts] == [letters("cdef"), letters("hi")]
    assert [prompt.example.number for prompt in prompts] == [0, 1]
    assert "1 of 2 prompts lost their beginning, as 4 tokens are what fits" in caplog.text


@pytest.mark.parametrize("room", [0, -1, -6])
def test_no_room_for_a_prompt_is_refused(room: int) -> None:
    """A length of 0 kept the whole prompt, and one below 0 cut off its beginning instead of its end."""
    with pytest.raises(UserError, match=rf"at least one token of a prompt.*; {room} are left.*--max-new-tokens"):
        evaluation(answered("abcdef", "g")).prompts(make_encoder(), max_length=room)


def test_a_prompt_without_a_token_is_named() -> None:
    with pytest.raises(UserError, match=r"listed:2: a prompt must come to at least one token; 'zz' comes to none"):
        evaluation(answered("a", "b"), answered("zz", "c")).prompts(make_encoder(lambda t: letters(t.replace("z", ""))), max_length=9)


def test_text_alone_has_nothing_to_answer() -> None:
    for ask in (EvaluationSet.prompts, EvaluationSet.label_rows):
        with pytest.raises(UserError, match=r"listed:2 is text alone"):
            ask(evaluation(answered("a", "b"), text("cd"), labels=("b",)), make_encoder(), max_length=9)


def rows_of(*examples: Example, labels: tuple[str, ...], max_length: int) -> list[tuple[int, str, list[list[int]]]]:
    found = evaluation(*examples, labels=labels).label_rows(make_encoder(lambda t: letters(t.replace(" ", ""))), max_length=max_length)
    return [(row.example.number, row.label, row.planes.tolist()) for row in found]


def test_every_label_gets_a_row_whose_only_targets_are_its_own() -> None:
    assert rows_of(answered("abc", "x"), answered("d", "yz"), labels=("x", "yz"), max_length=9) == [
        (0, "x", [[1, 2, 3, 24, EOS], [0, 1, 2, 3, 0], [X, X, 24, X, X]]),
        (0, "yz", [[1, 2, 3, 25, 26], [0, 1, 2, 3, 4], [X, X, 25, 26, X]]),
        (1, "x", [[4, 24, EOS, EOS, EOS], [0, 1, 0, 1, 2], [24, X, X, X, X]]),
        (1, "yz", [[4, 25, 26, EOS, EOS], [0, 1, 2, 0, 1], [25, 26, X, X, X]]),
    ]


def test_a_long_prompt_loses_its_beginning_and_never_a_labels_token(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rows = rows_of(answered("abc", "x"), labels=("x", "yz"), max_length=3)
    assert rows == [(0, "x", [[2, 3, 24], [0, 1, 2], [X, 24, X]]), (0, "yz", [[3, 25, 26], [0, 1, 2], [25, 26, X]])]
    assert "2 of 2 prompts lost their beginning" in caplog.text


def test_labels_that_do_not_fit_or_are_none_are_refused() -> None:
    with pytest.raises(UserError, match=r"listed:1: a label and a token before it must fit.*'yz' has 2 tokens, and 2 fit"):
        rows_of(answered("abc", "x"), labels=("x", "yz"), max_length=2)
    with pytest.raises(UserError, match="listed has none"):
        evaluation(answered("a", "b")).label_rows(make_encoder(), max_length=9)
    with pytest.raises(UserError, match=r"listed:1: label ' ': the completion '  ' comes to no token"):
        rows_of(answered("abc", "x"), labels=("x", " "), max_length=9)


def test_rows_of_labels_are_no_longer_than_their_text_until_they_are_asked_for() -> None:
    """77 labels of 3,080 examples, each padded to 2,048 ids, would be 5.8 GB."""
    rows = evaluation(answered("a" * 50, "x"), answered("b", "x"), labels=("x", "yz")).label_rows(
        make_encoder(lambda t: letters(t.replace(" ", ""))), max_length=2048
    )
    assert [len(row.encoded.ids) for row in rows] == [51, 52, 2, 3]
    assert {row.planes.shape for row in rows} == {(3, 52)}


@full
@pytest.mark.skipif(not MNLI.exists(), reason="needs the shared data")
def test_the_tokens_of_mnli_are_all_there() -> None:
    """9,815 rows of 453,044 ids, of which each row's first is no target; ' entailment' is two tokens, the others one."""
    tokenizer = Tokenizer.from_file(str(GPT_J))
    task = tasks_by_name(TaskOptions())["mnli"].bind(lambda: iter(()))
    listed = Listed(*(task.example(json.loads(line), None) for line in MNLI.read_text().splitlines()))
    listed.task = task  # type: ignore[assignment]
    records = EvaluationSet([listed])  # type: ignore[list-item]
    encoder = Encoder(
        token_ids=lambda texts: [found.ids for found in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)],
        decode=tokenizer.decode,
        eos_token_id=50256,
    )
    assert sum(num_targets(row[2]) for row in records.sequences(encoder, PackingRules(seq_length=256))) == 453_044 - 9_815
    assert max(len(prompt.ids) for prompt in records.prompts(encoder, max_length=2048)) == 232
    first = Listed(records.examples[0].example)
    first.task = task  # type: ignore[assignment]
    rows = EvaluationSet([first]).label_rows(encoder, max_length=2048)  # type: ignore[list-item]
    assert [(row.label, num_targets(row.planes[2])) for row in rows] == [("entailment", 2), ("neutral", 1), ("contradiction", 1)]
