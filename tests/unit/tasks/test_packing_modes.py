"""Promises of the three ways of packing, by hand on letters and on MNLI with the published counts."""

import json
from typing import Any

import numpy as np
import pytest
from support.packing import EOS, ListedDocuments, answered, make_encoder, make_packer, pack, rows, text
from support.ranks import SHARED

from modules.lm_ops import IGNORED_TARGET
from tasks.encoding import Encoder
from tasks.packing import PackingRules, TaskPacker, num_targets, sequences_in_pass
from tasks.samples import as_text
from user_error import UserError

X = IGNORED_TARGET
MNLI = SHARED / "data/nli/mnli_validation_matched.jsonl"
GPT_J = SHARED / "data/tokenizers/gpt-j-6b/tokenizer.json"


def test_documents_with_loss_on_completion_masks_the_prompts_and_nothing_else() -> None:
    (sequence,) = pack(answered("ab", "c"), answered("d", "ef"), seq_length=9, num=1, loss_on="completion")
    assert rows([sequence]) == [[[1, 2, 3, EOS, 4, 5, 6, EOS, 1], [0, 1, 2, 3, 0, 1, 2, 3, 0], [X, 3, EOS, X, 5, 6, EOS, X, X]]]


def test_concat_cuts_a_group_into_blocks_that_lose_no_target_at_a_documents_start() -> None:
    """abc. de. fghi. in groups of 3: 11 ids, blocks of 4 + 1; the eleventh is dropped, then the next pass begins a group."""
    sequences = pack("abc", "de", "fghi", seq_length=4, num=3, mode="concat", group=3)
    assert rows(sequences[:2]) == [
        [[1, 2, 3, EOS], [0, 1, 2, 3], [2, 3, EOS, 4]],
        [[5, EOS, 6, 7], [0, 1, 2, 3], [EOS, 6, 7, 8]],
    ]
    assert rows(sequences[2:]) == rows(sequences[:1])


def test_concat_drops_the_rest_of_each_group() -> None:
    sequences = pack("abcdef", "g", "hijklm", "nop", seq_length=3, num=5, mode="concat", group=2)
    # abcdef.g. is 9 ids, two blocks of 4; hijklm.nop. is 11 ids, two blocks; and again
    assert [sequence.token_ids.tolist() for sequence in sequences] == [[1, 2, 3], [5, 6, EOS], [8, 9, 10], [12, 13, EOS], [1, 2, 3]]


def test_concat_masks_by_the_document_of_the_target() -> None:
    (sequence,) = pack(answered("ab", "c"), answered("d", "ef"), seq_length=7, num=1, mode="concat", group=2, loss_on="completion")
    assert sequence.token_ids.tolist() == [1, 2, 3, EOS, 4, 5, 6]
    assert sequence.targets.tolist() == [X, 3, EOS, X, 5, 6, EOS]


def test_concat_of_one_short_record_goes_on_across_passes() -> None:
    sequences = pack("ab", seq_length=7, num=4, mode="concat", group=1000)
    assert [sequence.token_ids.tolist() for sequence in sequences] == [[1, 2, EOS, 1, 2, EOS, 1]] * 4
    assert rows(sequences)[0][2] == [2, EOS, 1, 2, EOS, 1, 2]


def test_none_puts_one_document_into_a_sequence_and_pads_it() -> None:
    first, second, third = pack("abc", answered("d", "e"), "fghijk", seq_length=5, num=3, mode="none")
    assert rows([first, second]) == [
        [[1, 2, 3, EOS, EOS], [0, 1, 2, 3, 0], [2, 3, EOS, X, X]],
        [[4, 5, EOS, EOS, EOS], [0, 1, 2, 0, 1], [5, EOS, X, X, X]],
    ]
    assert (first.num_padding, second.num_padding, third.num_padding) == (1, 2, 0)
    assert rows([third]) == [[[6, 7, 8, 9, 10], [0, 1, 2, 3, 4], [7, 8, 9, 10, X]]]


def test_none_pads_the_last_piece_of_a_long_document_and_counts_no_padding() -> None:
    packer = make_packer("abcdefg", seq_length=5, mode="none")
    assert rows([packer.next_sequence(), packer.next_sequence()])[1] == [[6, 7, EOS, EOS, EOS], [0, 1, 2, 0, 1], [7, EOS, X, X, X]]
    assert packer.num_tokens == 8


def test_a_document_that_fills_its_sequence_needs_no_padding() -> None:
    first, second = pack("abcd", "ef", seq_length=5, num=2, mode="none")
    assert (first.token_ids.tolist(), first.num_padding) == ([1, 2, 3, 4, EOS], 0)
    assert second.token_ids.tolist() == [5, 6, EOS, EOS, EOS]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("documents", [[1, 2, 3, 4], [8, 9, EOS, 1]]),
        ("none", [[1, 2, 3, 4], [8, 9, EOS, EOS]]),
        ("concat", [[1, 2, 3, 4], [9, EOS, 1, 2]]),
    ],
)
def test_truncated_documents_lose_their_end_and_its_token(mode: str, expected: list[list[int]]) -> None:
    sequences = pack("abcdefg", "hi", seq_length=4, num=2, mode=mode, group=10, long_documents="truncate")
    if mode == "concat":  # abcd hi. are 7 ids, one block of 5, and the rest of the pass is dropped
        expected = [[1, 2, 3, 4], [1, 2, 3, 4]]
    assert [sequence.token_ids.tolist() for sequence in sequences] == expected


MODES: list[dict[str, Any]] = [
    {"mode": "documents"},
    {"mode": "documents", "long_documents": "truncate"},
    {"mode": "concat", "group": 3},
    {"mode": "concat", "group": 1},
    {"mode": "concat", "group": 100},
    {"mode": "none"},
    {"mode": "none", "long_documents": "truncate"},
]


@pytest.mark.parametrize("rules", MODES, ids=str)
@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_a_packer_resumed_anywhere_goes_on_at_the_very_next_token(rules: dict[str, Any], loss_on: Any) -> None:
    examples = ["abcdefghijklmno", answered("ab", "c"), "", answered("pqrs", "tuvwxyz"), "k", answered("a", "bcd")]
    for seq_length in (2, 5, 13):
        whole = make_packer(*examples, seq_length=seq_length, loss_on=loss_on, **rules)
        states, sequences = [], []
        for _ in range(40):
            states.append(whole.state())
            sequences.append(whole.next_sequence())
        for stop in range(0, 40, 3):
            resumed = make_packer(*examples, seq_length=seq_length, loss_on=loss_on, state=states[stop], **rules)
            assert rows([resumed.next_sequence() for _ in range(40 - stop)]) == rows(sequences[stop:])
            assert resumed.state() == whole.state()
        assert len(json.dumps(whole.state())) < 300


def test_records_and_passes_are_counted_across_a_resume() -> None:
    packer = make_packer("ab", "cd", seq_length=2, mode="documents")
    for _ in range(5):  # ab .c d. ab .c
        packer.next_sequence()
    assert (packer.state()["pass"], packer.state()["records"], packer.num_tokens) == (1, 4, 10)
    resumed = make_packer("ab", "cd", seq_length=2, state=packer.state())
    resumed.next_sequence()
    assert (resumed.state()["records"], resumed.num_tokens) == (4, 12)


def test_a_state_of_a_version_that_counted_no_records_is_taken() -> None:
    packer = make_packer("abc", seq_length=3, state={"pass": 2, "position": 0, "token_offset": 2, "tokens": 9, "skipped_records": 1})
    assert packer.next_sequence().token_ids.tolist() == [3, EOS, 1]
    assert packer.state() == {"pass": 3, "position": 0, "token_offset": 1, "tokens": 12, "records": 1, "skipped_records": 1}


def test_a_position_behind_a_truncated_document_is_an_error() -> None:
    state = {"pass": 0, "position": 0, "token_offset": 6, "tokens": 6, "skipped_records": 0}
    with pytest.raises(UserError, match="no id 6 in document 0 of pass 0"):
        make_packer("abcdefgh", seq_length=4, long_documents="truncate", state=state).next_sequence()


@pytest.mark.parametrize("rules", MODES, ids=str)
@pytest.mark.parametrize("seq_length", [2, 5, 13])
def test_sequences_of_a_pass_are_as_many_as_were_counted(rules: dict[str, Any], seq_length: int) -> None:
    texts = ["abcdefghijklmno", "bcd", "cdefghi", "d", "efgh"]
    counted = sequences_in_pass([len(text) + 1 for text in texts], PackingRules(seq_length=seq_length, **rules))
    if rules["mode"] == "documents":
        counted *= seq_length  # passes follow each other within a sequence; after so many passes they do not
    sequences = pack(*texts, seq_length=seq_length, num=int(counted) + 1, **rules)
    assert counted.is_integer()
    assert rows(sequences)[-1] == rows(sequences)[0], "the next pass begins there"
    assert rows(sequences)[-2] != rows(sequences)[0]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"mode": "none"}, 4.0),
        ({"mode": "documents"}, 3.0),
        ({"mode": "concat"}, 2.0),
        ({"mode": "none", "long_documents": "truncate"}, 3.0),
    ],
)
def test_a_pass_is_counted_by_hand(rules: dict[str, Any], expected: float) -> None:
    assert sequences_in_pass([7, 3, 5], PackingRules(seq_length=5, **rules)) == expected


@pytest.mark.skipif(not (MNLI.is_file() and GPT_J.is_file()), reason="the shared data is not here")
def test_mnli_gives_the_published_counts() -> None:
    """9815 rows are 453,044 tokens; 435, 877 and 3508 sequences of 1024, 512 and 128; 441 at 1024 without groups."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(GPT_J))
    records = [json.loads(line) for line in MNLI.read_text().splitlines()]
    examples = [text(f"mnli hypothesis: {row['hypothesis']} premise: {row['premise']} target: {row['label']}") for row in records]
    encoder = Encoder(
        token_ids=lambda texts: [e.ids for e in tokenizer.encode_batch_fast(list(texts))], decode=tokenizer.decode, eos_token_id=50256
    )
    encoded = encoder.encode(examples)
    lengths = [len(document.ids) for document in encoded]  # type: ignore[union-attr]
    assert sum(lengths) == 453_044
    ready = make_encoder(eos=50256)
    by_text = {example.text: document for example, document in zip(examples, encoded, strict=True)}
    ready.encode = lambda examples: [by_text[example.text] for example in examples]  # type: ignore[method-assign]
    for seq_length, expected in ((1024, 435), (512, 877), (128, 3508)):
        rules = PackingRules(seq_length=seq_length, mode="concat", group=1000)
        assert sequences_in_pass(lengths, rules) == expected
        packer = TaskPacker(documents=ListedDocuments(*examples), encoder=ready, rules=rules, task=0)  # type: ignore[arg-type]
        num = 0
        while True:
            sequence = packer.next_sequence()
            if packer.state()["pass"] == 1:
                break
            num += 1
            assert num_targets(sequence.targets) == seq_length
        assert num == expected
    assert sequences_in_pass(lengths, PackingRules(seq_length=1024, mode="concat", group=10**6)) == 441


def test_a_sample_shows_masks_borders_and_padding() -> None:
    decode = make_encoder().decode
    (packed,) = pack(answered("ab", "cd"), "ef", seq_length=8, num=1, loss_on="completion")
    assert as_text(packed, decode) == "| 5 tokens, 3 targets\n<<ab>>cd.\n| 3 tokens, 2 targets\n<<e>>f."
    (alone,) = pack(answered("ab", "c"), seq_length=7, num=1, mode="none")
    assert as_text(alone, decode) == "| 4 tokens, 3 targets\n<<a>>bc.\n| 3 tokens of padding"
    (block,) = pack(answered("ab", "c"), answered("d", "e"), seq_length=5, num=1, mode="concat", loss_on="completion")
    assert as_text(block, decode) == "| 5 tokens, 3 targets\n<<ab>>c.<<d>>e", "the last target is the id behind the block"
    assert np.array_equal(block.targets, [X, 3, EOS, X, 5])
