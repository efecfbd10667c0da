"""Promises of the draw and the mixture: shares of tokens, an order that nothing disturbs, resume at the very next token."""

import json
import math
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from support.packing import make_encoder, open_plainly
from support.ranks import SHARED

from tasks.mixture import Mixture, counted_by_task, draw_task
from tasks.packing import PackedSequence, PackingRules
from tasks.records import OnBadRecord
from tasks.task_list import parse_task_list
from user_error import UserError

EOS = 256
TOKENIZER_FOLDER = SHARED / "data" / "tokenizers" / "gpt-j-6b"


def byte_values(text: str) -> list[int]:
    return list(text.encode())


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_zst(path: Path, texts: list[str]) -> Path:
    path.write_bytes(zstandard.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    return path


_made: list[Mixture] = []


@pytest.fixture(autouse=True)
def _close_what_a_test_made() -> Iterator[None]:
    yield
    while _made:
        _made.pop().close()


def make_mixture(
    task_list: str,
    *,
    tokenize: Callable[[str], list[int]] = byte_values,
    eos: int = EOS,
    seq_length: int = 16,
    seed: int = 3,
    on_bad_record: OnBadRecord = "error",
    shuffle_window: int = 10_000,
    state: dict | None = None,
    **rules: Any,
) -> Mixture:
    _made.append(
        Mixture(
            tasks=parse_task_list(task_list),
            open_documents=open_plainly(seed, on_bad_record, shuffle_window),
            encoder=make_encoder(tokenize, eos=eos),
            rules=PackingRules(seq_length=seq_length, **rules),
            seed=seed,
            state=state,
        )
    )
    return _made[-1]


def take(mixture: Mixture, num: int) -> Iterator[PackedSequence]:
    return (mixture.next_sequence() for _ in range(num))


def same(a: PackedSequence, b: PackedSequence) -> bool:
    return a.task == b.task and np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.positions, b.positions)


def test_the_draw_is_the_same_for_ever() -> None:
    """Values written down when the rule was made: a run of today must resume under any later version."""
    cumulative = [0.7, 0.9, 1.0]
    assert [draw_task(0, i, cumulative) for i in range(16)] == [0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 2, 0]
    assert [draw_task(12345678901234567890, i, cumulative) for i in range(16)] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]


def test_a_task_of_weight_zero_is_never_drawn_wherever_it_stands_and_whatever_the_weights_add_up_to() -> None:
    for total in (0.4, 1 - 2**-53, 1.0, 1 + 2**-52, 7.0):
        weights = [share * total for share in (0.0, 0.1, 0.0, 0.0, 0.9, 0.0)]
        cumulative = list(accumulate(weights))
        assert {draw_task(5, i, cumulative) for i in range(200)} == {1, 4}
        largest_uniform = 1 - 2**-53
        assert largest_uniform * cumulative[-1] < cumulative[-1], "the reason why the last one is never passed"


def test_the_order_of_tasks_depends_on_seed_and_sequence_index_alone(tmp_path: Path) -> None:
    """Other data, other lengths, another entry point: the same draws. Another seed: others."""
    short = write_jsonl(tmp_path / "short.jsonl", ["a", "bc"])
    long = write_jsonl(tmp_path / "long.jsonl", ["x" * 500, "y" * 77])
    cumulative = [0.5, 1.0]
    expected = [draw_task(3, i, cumulative) for i in range(200)]
    for task_list, seq_length in ((f"{short},{long}", 8), (f"{long},{short}", 31)):
        assert [s.task for s in take(make_mixture(task_list, seq_length=seq_length), 200)] == expected
    assert [s.task for s in take(make_mixture(f"{short},{long}", seed=4), 200)] != expected


def test_weights_are_shares_of_tokens_whatever_the_documents_lengths(tmp_path: Path) -> None:
    """0.7 / 0.2 / 0.1 over 10,000 sequences, within three standard deviations; the lightest task has the longest documents."""
    files = [write_jsonl(tmp_path / f"{n}.jsonl", ["ab" * n, "c" * n, "d" * 3 * n]) for n in (2, 40, 700)]
    mixture = make_mixture(f"{files[0]}:0.7,{files[1]}:0.2,{files[2]}:0.1", seq_length=24)
    num = 10_000
    drawn = np.bincount([s.task for s in take(mixture, num)], minlength=3)
    for place, share in enumerate((0.7, 0.2, 0.1)):
        assert abs(drawn[place] - num * share) < 3 * math.sqrt(num * share * (1 - share))
    assert mixture.tokens_per_task == [int(n) * 24 for n in drawn]


@pytest.mark.parametrize("stop", [0, 1, 7, 50, 123])
@pytest.mark.parametrize("rules", [{}, {"mode": "concat", "group": 5}, {"mode": "none"}], ids=str)
def test_a_resumed_mixture_goes_on_at_the_very_next_token(tmp_path: Path, rules: dict[str, Any], stop: int) -> None:
    """A plain file three times in the list and a compressed one of several windows; documents from one id to several sequences."""
    texts = [chr(97 + n) * (n * n) for n in range(11)]
    plain, packed = write_jsonl(tmp_path / "a.jsonl", texts), write_zst(tmp_path / "b.jsonl.zst", texts)
    task_list = f"{plain},{packed}:2,{plain},{plain}"
    whole = make_mixture(task_list, seq_length=13, shuffle_window=4, **rules)
    for _ in take(whole, stop):
        pass
    saved = json.loads(json.dumps(whole.state()))
    resumed = make_mixture(task_list, seq_length=13, shuffle_window=4, state=saved, **rules)
    assert resumed.state() == saved
    for _ in range(400):
        assert same(whole.next_sequence(), resumed.next_sequence())
    assert resumed.state() == whole.state()
    assert resumed.tokens_per_task == whole.tokens_per_task
    assert min(place["pass"] for place in whole.state()["tasks"]) >= 1, "the case is to run across passes"


def test_stops_in_the_middle_of_a_document_and_at_its_end_both_resume_exactly(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 25])  # 26 ids with its end
    whole = make_mixture(str(path), seq_length=13)
    whole.next_sequence()
    assert whole.state()["tasks"][0] | {"path": "", "num_bytes": 0} == {
        "path": "",
        "num_bytes": 0,
        "pass": 0,
        "position": 0,
        "token_offset": 13,
        "tokens": 13,
        "records": 1,
        "skipped_records": 0,
    }
    middle = make_mixture(str(path), seq_length=13, state=whole.state()).next_sequence()
    assert middle.token_ids.tolist() == [ord("x")] * 12 + [EOS]
    assert same(whole.next_sequence(), middle)
    assert (whole.state()["tasks"][0]["position"], whole.state()["tasks"][0]["token_offset"]) == (1, 0)
    at_end = make_mixture(str(path), seq_length=13, state=whole.state()).next_sequence()
    assert at_end.token_ids.tolist() == [ord("x")] * 13


def test_the_same_file_in_two_places_is_read_in_two_orders(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chr(65 + n) for n in range(26)])
    mixture = make_mixture(f"{path},{path}", seq_length=52)
    first: dict[int, list[int]] = {}
    while len(first) < 2:
        sequence = mixture.next_sequence()
        first.setdefault(sequence.task, sequence.token_ids.tolist())
    assert sorted(first[0]) == sorted(first[1])
    assert first[0] != first[1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_skipped_records_are_counted_in_the_state_and_across_a_resume(tmp_path: Path, name: str) -> None:
    """Two bad ones among four: after two whole passes four were left out, whether or not the run was interrupted."""
    content = b'oops\n{"text": "abc"}\n{"text": 7}\n{"text": "def"}\n'
    (tmp_path / name).write_bytes(zstandard.compress(content) if name.endswith("zst") else content)
    for stop in range(6):  # a sequence is half a document with its end
        mixture = make_mixture(str(tmp_path / name), seq_length=2, on_bad_record="skip")
        for _ in take(mixture, stop):
            pass
        mixture = make_mixture(str(tmp_path / name), seq_length=2, on_bad_record="skip", state=mixture.state())
        while mixture.state()["tasks"][0]["pass"] < 2:
            skipped_before_third_pass = mixture.state()["tasks"][0]["skipped_records"]
            mixture.next_sequence()
        skipped = mixture.state()["tasks"][0]["skipped_records"]
        assert skipped_before_third_pass <= 4 <= skipped <= 6
        assert mixture.tokens_per_task == [18]


def test_what_is_peeked_at_comes_all_the_same_and_is_in_no_state(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "defgh", "i" * 40])
    plain, peeked = make_mixture(f"{path},{path}"), make_mixture(f"{path},{path}")
    before = peeked.state()
    shown = peeked.peek(3)
    assert len(shown) == 3
    assert peeked.state() == before == plain.state()
    assert same(shown[0], peeked.peek(1)[0])
    for number in range(8):
        sequence = plain.next_sequence()
        assert same(sequence, peeked.next_sequence())
        assert number >= 3 or same(sequence, shown[number])
        assert peeked.state() == plain.state()


def test_going_to_a_state_is_starting_from_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "defgh", "i" * 40])
    mixture = make_mixture(str(path))
    state, expected = mixture.state(), mixture.peek(4)[0]
    mixture.next_sequence()
    mixture.go_to(state)
    assert same(mixture.next_sequence(), expected)


def test_what_was_drawn_is_counted_by_task_and_by_place_where_a_name_repeats(tmp_path: Path) -> None:
    a, b = write_jsonl(tmp_path / "a.jsonl", ["abc"]), write_jsonl(tmp_path / "b.jsonl", ["d" * 9])
    mixture = make_mixture(f"{a},{b},{a}", seq_length=16, mode="none")
    drawn = [sequence.task for sequence in take(mixture, 50)]
    tokens = counted_by_task(mixture.state(), "tokens")
    assert tokens == {str(a): 4 * drawn.count(0), str(b): 10 * drawn.count(1), f"{a} (2)": 4 * drawn.count(2)}
    assert counted_by_task(mixture.state(), "records") == {str(a): drawn.count(0), str(b): drawn.count(1), f"{a} (2)": drawn.count(2)}


def test_an_earlier_state_does_not_change_when_the_mixture_goes_on(tmp_path: Path) -> None:
    mixture = make_mixture(str(write_jsonl(tmp_path / "a.jsonl", ["abc", "defgh"])))
    state = mixture.state()
    before = json.dumps(state)
    mixture.next_sequence()
    assert json.dumps(state) == before


def test_a_state_of_other_places_is_an_error(tmp_path: Path) -> None:
    a, b = write_jsonl(tmp_path / "a.jsonl", ["abc"]), write_jsonl(tmp_path / "b.jsonl", ["abcdef"])
    state = make_mixture(f"{a},{b}").state()
    with pytest.raises(UserError, match=r"2 places \(.*a\.jsonl, .*b\.jsonl\), this one 1 \(.*a\.jsonl\)\. Give the same"):
        make_mixture(str(a), state=state)
    with pytest.raises(UserError, match=r"place 1 of the list was .*a\.jsonl with \d+ bytes, now it is .*b\.jsonl .*Give the same"):
        make_mixture(f"{b},{a}", state=state)
    with pytest.raises(UserError, match=r"seed 3, this run has 4\. Give the same"):
        make_mixture(f"{a},{b}", seed=4, state=state)


def test_a_state_survives_a_move_of_the_files_and_other_weights(tmp_path: Path) -> None:
    old = write_jsonl(tmp_path / "old.jsonl", ["abc", "defghi"])
    mixture = make_mixture(str(old), seq_length=5)
    mixture.next_sequence()
    state = mixture.state()
    moved = make_mixture(f"{old.rename(tmp_path / 'new.jsonl')}:0.3", seq_length=5, state=state)
    assert same(mixture.next_sequence(), moved.next_sequence())


def test_a_state_whose_offset_lies_behind_its_document_is_an_error(tmp_path: Path) -> None:
    """Another tokenizer makes fewer ids of the same file."""
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 20])
    mixture = make_mixture(str(path), seq_length=15)
    mixture.next_sequence()
    other = make_mixture(str(path), tokenize=lambda text: [1], seq_length=15, state=mixture.state())
    with pytest.raises(UserError, match=r"no id 15 in document 0 of pass 0\. Give the same file and tokenizer"):
        other.next_sequence()


def test_a_negative_seed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="non-negative integer, not -1"):
        make_mixture(str(write_jsonl(tmp_path / "a.jsonl", ["a"])), seed=-1)


@pytest.mark.skipif(not TOKENIZER_FOLDER.is_dir(), reason=f"the GPT-J tokenizer is not in {TOKENIZER_FOLDER}")
def test_the_gptj_tokenizer_gives_the_text_as_it_stands_and_one_eos_per_document(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_FOLDER, local_files_only=True)
    path = write_jsonl(tmp_path / "a.jsonl", ["Hello world"])
    mixture = make_mixture(str(path), tokenize=lambda text: tokenizer(text)["input_ids"], eos=tokenizer.eos_token_id, seq_length=7)
    sequence = mixture.next_sequence()
    assert sequence.token_ids.tolist() == [15496, 995, 50256, 15496, 995, 50256, 15496]
    assert sequence.positions.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert mixture.next_sequence().positions.tolist() == [0, 1, 0, 1, 2, 0, 1]
