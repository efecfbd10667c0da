"""Promises of the reader that runs ahead: the consumed state, errors at the step where they belong, a close that never hangs."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.packing import make_encoder, open_plainly

import tasks.readers
from tasks.mixture import Mixture
from tasks.packing import PackingRules, num_targets
from tasks.prefetch import StepReader
from tasks.task_list import parse_task_list
from user_error import UserError


class Tokenizer:
    """Byte values, as slow as asked, counting its calls; fails on one text."""

    def __init__(self, *, delay_s: float = 0.0, fail_on: str | None = None) -> None:
        self.delay_s, self.fail_on, self.num_calls = delay_s, fail_on, 0

    def __call__(self, text: str) -> list[int]:
        self.num_calls += 1
        time.sleep(self.delay_s)
        if text == self.fail_on:
            raise OverflowError("the tokenizer's own mistake")
        return list(text.encode())


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


_made: list[Mixture] = []


@pytest.fixture(autouse=True)
def _close_what_a_test_made() -> Iterator[None]:
    yield
    while _made:
        _made.pop().close()


def make_mixture(path: Path, *, tokenize: Tokenizer | None = None, seq_length: int = 10, state: dict | None = None) -> Mixture:
    mixture = Mixture(
        tasks=parse_task_list(f"{path},{path}:2"),
        open_documents=open_plainly(2),
        encoder=make_encoder(tokenize or Tokenizer(), eos=256),
        rules=PackingRules(seq_length=seq_length),
        seed=2,
        state=state,
    )
    _made.append(mixture)
    return mixture


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def test_steps_hold_the_sequences_of_the_mixture_in_order(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "defghijklmnop", "q" * 40])
    plain = make_mixture(path)
    reader = StepReader(make_mixture(path), sequences_per_step=3)
    for _ in range(20):
        step = reader.next()
        assert (step.tokens.shape, step.tokens.dtype) == ((3, 3, 10), np.int32)
        for row in step.tokens:
            sequence = plain.next_sequence()
            assert np.array_equal(row[0], sequence.token_ids)
            assert np.array_equal(row[1], sequence.positions)
            assert np.array_equal(row[2], sequence.targets)
        assert step.num_targets == num_targets(step.tokens[:, 2])
        assert step.state == plain.state()
        assert step.data_wait_s >= 0
    reader.close()


def test_the_state_is_that_of_the_consumed_step_however_far_the_reader_ran_ahead(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "defghijklmnop", "q" * 40])
    mixture = make_mixture(path)
    reader = StepReader(mixture, sequences_per_step=4)
    reader.next()
    step = reader.next()
    wait_until(lambda: mixture.state()["next_sequence_index"] >= 16)  # two steps ahead of the two consumed
    assert step.state["next_sequence_index"] == 8
    resumed = StepReader(make_mixture(path, state=json.loads(json.dumps(step.state))), sequences_per_step=4)
    for _ in range(10):
        ours, theirs = reader.next(), resumed.next()
        assert np.array_equal(ours.tokens, theirs.tokens)
        assert ours.state == theirs.state
    reader.close()
    resumed.close()


def test_the_reader_works_while_the_consumer_does_but_only_so_far(tmp_path: Path) -> None:
    """Two steps wait, a third is at hand for when there is room: never more, or memory would grow with the lead."""
    mixture = make_mixture(write_jsonl(tmp_path / "a.jsonl", ["abc"]))
    reader = StepReader(mixture, sequences_per_step=2)
    wait_until(lambda: mixture.state()["next_sequence_index"] == 6)
    time.sleep(0.1)
    assert mixture.state()["next_sequence_index"] == 6
    assert reader.next().data_wait_s < 0.2
    reader.close()


def test_the_wait_for_data_is_measured(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 9])
    reader = StepReader(make_mixture(path, tokenize=Tokenizer(delay_s=0.05)), sequences_per_step=4)
    assert reader.next().data_wait_s > 0.15
    reader.close()


def test_a_bad_record_is_raised_at_the_step_where_it_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.readers, "CHECK_ALL_BYTES", 0)
    path = write_jsonl(tmp_path / "a.jsonl", [chr(97 + n % 26) * 20 for n in range(60)])
    with path.open("a") as file:
        file.write("oops\n")
    plain = make_mixture(path)
    num_good = 0
    with contextlib.suppress(UserError):
        while True:
            plain.next_sequence()
            num_good += 1
    assert num_good >= 8, "the case needs complete steps before the error"
    reader = StepReader(make_mixture(path), sequences_per_step=4)
    time.sleep(0.05)
    for number in range(num_good // 4):
        assert reader.next().state["next_sequence_index"] == 4 * (number + 1)
    for _ in range(2):  # and at every later call, so that nobody waits for ever
        with pytest.raises(UserError, match=r"a\.jsonl:61: .*--on-bad-record skip"):
            reader.next()
    reader.close()


def test_any_exception_of_the_worker_reaches_the_consumer(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "boom"])
    reader = StepReader(make_mixture(path, tokenize=Tokenizer(fail_on="boom")), sequences_per_step=4)
    with pytest.raises(OverflowError, match="the tokenizer's own mistake"):
        [reader.next() for _ in range(5)]
    reader.close()


@pytest.mark.parametrize("consumed", [0, 1, 3])
def test_close_returns_at_once_while_the_queue_is_full(tmp_path: Path, consumed: int) -> None:
    mixture = make_mixture(write_jsonl(tmp_path / "a.jsonl", ["abc"]))
    reader = StepReader(mixture, sequences_per_step=2)
    for _ in range(consumed):
        reader.next()
    wait_until(lambda: mixture.state()["next_sequence_index"] == 2 * consumed + 6)
    start = time.monotonic()
    reader.close()
    reader.close()
    assert time.monotonic() - start < 2
    assert not reader._thread.is_alive()
    with pytest.raises(RuntimeError, match="after close"):
        reader.next()


def test_close_does_not_wait_for_the_end_of_a_long_step(tmp_path: Path) -> None:
    tokenize = Tokenizer(delay_s=0.02)
    reader = StepReader(make_mixture(write_jsonl(tmp_path / "a.jsonl", ["x" * 9]), tokenize=tokenize), sequences_per_step=10_000)
    wait_until(lambda: tokenize.num_calls > 1)
    start = time.monotonic()
    reader.close()
    assert time.monotonic() - start < 2
    assert not reader._thread.is_alive()


def test_close_frees_a_consumer_that_waits(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 9])
    reader = StepReader(make_mixture(path, tokenize=Tokenizer(delay_s=0.02)), sequences_per_step=10_000)
    seen: list[BaseException] = []

    def consume() -> None:
        try:
            reader.next()
        except RuntimeError as error:
            seen.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    time.sleep(0.05)
    reader.close()
    consumer.join(2)
    assert not consumer.is_alive()
    assert len(seen) == 1
