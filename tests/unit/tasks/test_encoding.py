"""Promises of the masks: exactly the completion's ids are targets, whatever the tokenizer does at the boundary."""

import json
import logging
from typing import Any

import pytest
from support.packing import EOS, ListedDocuments, answered, letters, make_encoder, make_packer, text
from support.ranks import SHARED

from tasks.encoded_documents import AHEAD_DOCUMENTS, EncodedDocuments
from tasks.encoding import Encoded, Encoder
from tasks.examples import BadRecordError, Example, Piece
from user_error import UserError

TOKENIZERS = SHARED / "data/tokenizers"
MNLI = SHARED / "data/nli/mnli_validation_matched.jsonl"


def merging(text: str) -> list[int]:
    """Letters, but "ab" is one id: across a boundary too."""
    return letters(text.replace("ab", "z"))


def encode(example: Example, tokenize: Any = letters, loss_on: Any = "completion") -> Encoded:
    (encoded,) = make_encoder(tokenize, loss_on=loss_on).encode([example])
    assert isinstance(encoded, Encoded), encoded
    return encoded


def learnt(encoded: Encoded) -> list[int]:
    return encoded.ids[encoded.is_target].tolist()


def test_loss_on_all_makes_every_id_and_the_end_a_target() -> None:
    encoded = encode(answered("abc", "de"), loss_on="all")
    assert encoded.ids.tolist() == [1, 2, 3, 4, 5, EOS]
    assert encoded.is_target.tolist() == [True] * 6


def test_loss_on_completion_makes_the_completion_and_the_end_targets() -> None:
    encoded = encode(answered("abc", "de"))
    assert encoded.ids.tolist() == [1, 2, 3, 4, 5, EOS]
    assert encoded.is_target.tolist() == [False, False, False, True, True, True]
    assert not encoded.is_apart


def test_every_answer_of_a_chat_is_a_target_and_a_question_at_its_end_is_not() -> None:
    chat = (Piece("ab", False), Piece("c", True), Piece("de", False), Piece("f", True))
    assert learnt(encode(Example(pieces=chat))) == [3, 6, EOS]
    assert learnt(encode(Example(pieces=(*chat, Piece("gh", False))))) == [3, 6]


def test_a_text_alone_is_learnt_as_a_whole_and_may_be_empty() -> None:
    assert learnt(encode(text("abc"))) == [1, 2, 3, EOS]
    assert learnt(encode(text(""))) == [EOS]


def test_pieces_of_one_kind_that_touch_are_one_text() -> None:
    """The tokenizer may merge within the prompt as it likes."""
    example = Example(pieces=(Piece("ca", False), Piece("bc", False), Piece("d", True)))
    encoded = encode(example, merging)
    assert (encoded.ids.tolist(), learnt(encoded), encoded.is_apart) == ([3, 26, 3, 4, EOS], [4, EOS], False)


def test_a_tokenizer_that_merges_across_the_boundary_is_given_the_pieces_apart() -> None:
    encoded = encode(answered("ca", "bd"), merging)
    assert encoded.ids.tolist() == [3, 1, 2, 4, EOS], "not 3, 26, 4"
    assert learnt(encoded) == [2, 4, EOS]
    assert encoded.is_apart
    assert encode(answered("ca", "bd"), merging, loss_on="all").ids.tolist() == [3, 26, 4, EOS], "nothing is masked, nothing to cut apart"


@pytest.mark.parametrize("tokenize", [lambda text: letters(text.rstrip("z")), lambda text: letters(text.replace("z", ""))])
def test_a_completion_that_comes_to_no_token_is_a_bad_record(tokenize: Any) -> None:
    (found,) = make_encoder(tokenize, loss_on="completion").encode([answered("abc", "zz")])
    assert isinstance(found, BadRecordError)
    assert str(found) == "the completion 'zz' comes to no token of this tokenizer"


def test_bad_records_of_the_tokenizer_are_errors_with_their_line_or_are_left_out_and_counted() -> None:
    examples = [answered("a", "b"), answered("a", "z"), answered("c", "d")]
    drop_z: Any = lambda text: letters(text.replace("z", ""))  # noqa: E731
    packer = make_packer(*examples, seq_length=3, loss_on="completion", tokenize=drop_z)
    packer.next_sequence()
    with pytest.raises(UserError, match=r"listed:2: the completion 'z' comes to no token"):
        packer.next_sequence()
    packer = make_packer(*examples, seq_length=3, loss_on="completion", tokenize=drop_z, skip=True)
    ids = [packer.next_sequence().token_ids.tolist() for _ in range(3)]
    assert ids == [[1, 2, EOS], [3, 4, EOS], [1, 2, EOS]]
    assert packer.state()["skipped_records"] == 1
    nothing = make_packer(answered("a", "z"), answered("b", "z"), seq_length=3, loss_on="completion", tokenize=drop_z, skip=True)
    with pytest.raises(UserError, match="at least one record that is good"):
        nothing.next_sequence()


def test_an_error_met_ahead_waits_until_its_document_is_due() -> None:
    packer = make_packer("ab", "cd", BadRecordError("no record"), "ef", seq_length=3)
    assert [packer.next_sequence().token_ids.tolist() for _ in range(2)] == [[1, 2, EOS], [3, 4, EOS]]
    for _ in range(2):
        with pytest.raises(UserError, match="listed:3: no record"):
            packer.next_sequence()


def test_documents_are_tokenised_many_at_a_time_and_each_once() -> None:
    calls: list[int] = []
    encoder = Encoder(
        token_ids=lambda texts: calls.append(len(texts)) or [letters(text) for text in texts],  # type: ignore[func-returns-value]
        decode=str,
        eos_token_id=EOS,
    )
    documents = EncodedDocuments(ListedDocuments(*(text("abc") for _ in range(200))), encoder)  # type: ignore[arg-type]
    for position in range(2 * AHEAD_DOCUMENTS):
        assert documents.next_good(0, position).position == position
    assert calls == [AHEAD_DOCUMENTS, AHEAD_DOCUMENTS]
    assert documents.next_good(0, 3).position == 3, "going back is allowed"


def test_documents_cut_apart_are_said_once_and_counted_by_the_pass(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tasks"):
        packer = make_packer(
            answered("ca", "bd"), answered("a", "c"), answered("a", "b"), seq_length=4, loss_on="completion", tokenize=merging
        )
        for _ in range(20):
            packer.next_sequence()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said
    assert "merges across the boundary" in said[0]
    assert "2 documents of pass 1 were tokenised piece by piece" in said[1]


@pytest.mark.skipif(not MNLI.is_file(), reason="the shared data is not here")
@pytest.mark.parametrize("name", ["gpt-j-6b", "gpt-neox-20b"])
def test_the_prefix_property_holds_for_every_mnli_row(name: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZERS / name / "tokenizer.json"))
    encoder = Encoder(
        token_ids=lambda texts: [e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)],
        decode=tokenizer.decode,
        eos_token_id=EOS,
        loss_on="completion",
    )
    records = [json.loads(line) for line in MNLI.read_text().splitlines()]
    examples = [
        answered(f"mnli hypothesis: {row['hypothesis']} premise: {row['premise']} target:", f" {row['label']}") for row in records[::7]
    ]
    label_ids = {label: tokenizer.encode(f" {label}", add_special_tokens=False).ids for label in ("entailment", "neutral", "contradiction")}
    for example, encoded in zip(examples, encoder.encode(examples), strict=True):
        assert isinstance(encoded, Encoded)
        assert not encoded.is_apart
        assert learnt(encoded) == [*label_ids[(example.label or "").strip()], EOS]
