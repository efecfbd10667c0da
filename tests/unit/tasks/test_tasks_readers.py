"""Promises of the readers: every document once per pass, another order per pass, entry anywhere, and bad data named with file and line."""

import json
import logging
import random
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard
from support.packing import open_plainly

import tasks.lines
import tasks.order
import tasks.readers
import tasks.streams
from tasks.lines import IndexedLines
from tasks.order import Ordered, Shuffled, Windowed, shuffled
from tasks.prompts import TaskOptions, tasks_by_name
from tasks.readers import Documents, ReadingRules, open_documents
from tasks.records import OnBadRecord, record_of_line
from tasks.streams import forward_lines
from tasks.task_list import parse_task_list
from user_error import UserError

BAD_LINES = {
    "malformed": (b'{"text": "cut of', "not JSON"),
    "array": (b'["text"]', "an array instead of an object"),
    "number": (b"17", "a number instead of an object"),
    "no text": (b'{"inputs": "a"}', "its fields are inputs"),
    "null text": (b'{"text": null}', '"text" is null instead of a string'),
    "list text": (b'{"text": ["a"]}', '"text" is an array instead of a string'),
    "invalid UTF-8": (b'{"text": "\xff"}', "byte 0xff at column 11, which is not UTF-8"),
    "half a surrogate pair": (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16-le"), "a NUL byte at column 2"),
    "NUL": (b'{"text": "a\0b"}', "a NUL byte at column 12"),
    "doubled key": (b'{"text": "a", "text": "b"}', "the key 'text' stands in it twice"),
    "endless number": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    "endless nesting": (b"[" * 100_000, "not JSON that can be read"),
}


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode()


def write(path: Path, lines: list[bytes], *, end: bytes = b"\n") -> Path:
    """A plain or, by its name, a compressed file."""
    content = b"\n".join(lines) + end
    path.write_bytes(zstandard.compress(content) if path.suffix == ".zst" else content)
    return path


WINDOW = 16  # so short that a small file has several and a last one that is not full

_opened: list[Documents] = []


@pytest.fixture(autouse=True)
def _close_what_a_test_opened() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


def opened(path: Path | str, *, seed: int = 1, place: int = 0, on_bad_record: OnBadRecord = "error") -> Documents:
    (spec,) = parse_task_list(f'"{path}"')
    _opened.append(open_plainly(seed, on_bad_record, WINDOW)(spec, place))
    return _opened[-1]


def walk(documents: Documents, pass_index: int = 0, position: int = 0) -> Iterator[tuple[int, int, str]]:
    while True:
        document = documents.next_good(pass_index, position)
        yield document.pass_index, document.position, document.example.text
        pass_index, position = document.pass_index, document.position + 1


def passes(documents: Documents, num: int) -> list[list[str]]:
    texts: list[list[str]] = [[] for _ in range(num)]
    for pass_index, _, text in walk(documents):
        if pass_index == num:
            return texts
        texts[pass_index].append(text)
    raise AssertionError("walk() does not end")


@pytest.fixture(params=["a.jsonl", "a.json", "a.jsonl.zst"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of each format still to be written."""
    return tmp_path / request.param


def test_every_pass_covers_every_document_once_in_another_order(path: Path) -> None:
    texts = [f"document {n}" for n in range(50)]
    orders = passes(opened(write(path, [line(text) for text in texts])), 4)
    assert all(sorted(order) == sorted(texts) for order in orders)
    assert len({tuple(order) for order in [*orders, texts]}) == 5


def test_the_order_depends_on_seed_and_place(path: Path) -> None:
    write(path, [line(str(n)) for n in range(50)])
    orders = [passes(opened(path, seed=seed, place=place), 1)[0] for seed, place in ((1, 0), (1, 0), (2, 0), (1, 1))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


def test_documents_can_be_entered_at_any_place_of_any_pass(path: Path) -> None:
    write(path, [line(f"document {n}") for n in range(40)])
    walked = [item for item, _ in zip(walk(opened(path)), range(130), strict=False)]
    for start in (0, 1, 15, 16, 17, 39, 40, 41, 79, 80, 119):
        pass_index, position, _ = walked[start]
        entered = [item for item, _ in zip(walk(opened(path), pass_index, position), range(11), strict=False)]
        assert entered == walked[start : start + 11]
    behind_the_last = opened(path).next_good(0, 40)
    assert (behind_the_last.pass_index, behind_the_last.position, behind_the_last.example.text) == walked[40]


def test_documents_can_be_entered_backwards(path: Path) -> None:
    write(path, [line(f"document {n}") for n in range(40)])
    documents = opened(path)
    walked = [item for item, _ in zip(walk(documents), range(80), strict=False)]
    assert [documents.next_good(p, position).example.text for p, position, _ in reversed(walked)] == [text for *_, text in reversed(walked)]


def test_shuffles_are_the_same_for_ever() -> None:
    """Written down when the rule was made. If this fails under a new numpy, runs no longer resume where they stopped."""
    assert shuffled(12, 1, 2, 3).tolist() == [11, 0, 4, 8, 6, 10, 5, 1, 3, 9, 2, 7]


def test_the_order_of_a_file_is_that_of_the_first_version(tmp_path: Path) -> None:
    """Written down by the reader that knew .jsonl files alone (and windows of 8): its runs resume where they stopped."""
    lines = [line(str(n)) for n in range(20)]
    rules = ReadingRules(shuffle_window=8)
    for name, order in (
        ("a.jsonl", [12, 8, 4, 7, 6, 0, 9, 5, 17, 14, 1, 19, 15, 18, 3, 11, 16, 10, 2, 13]),
        ("a.jsonl.zst", [4, 1, 7, 3, 0, 6, 2, 5, 9, 10, 13, 15, 8, 14, 12, 11, 16, 17, 19, 18]),
    ):
        (spec,) = parse_task_list(str(write(tmp_path / name, lines)))
        _opened.append(open_documents(spec, tasks_by_name(TaskOptions()), seed=1, place=0, rules=rules))
        assert [int(_opened[-1].next_good(1, position).example.text) for position in range(20)] == order


def test_compressed_files_are_shuffled_within_windows(path: Path) -> None:
    (order,) = passes(opened(write(path, [line(str(n)) for n in range(50)])), 1)
    windows = [sorted(map(int, order[start : start + 16])) for start in (0, 16, 32, 48)]
    in_windows = windows == [list(range(start, min(start + 16, 50))) for start in (0, 16, 32, 48)]
    assert in_windows == (path.suffix == ".zst")


def test_a_window_of_long_documents_ends_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.order, "WINDOW_BYTES", 1000)
    documents = opened(write(tmp_path / "a.jsonl.zst", [line("x" * 300 + str(n)) for n in range(10)]))
    (order,) = passes(documents, 1)
    numbers = [int(text[300:]) for text in order]
    assert [sorted(numbers[start : start + 4]) for start in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_two_windows_are_never_in_memory_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.order, "WINDOW_BYTES", 2**22)
    write(tmp_path / "a.jsonl.zst", [line(random.Random(n).randbytes(5_000).hex()) for n in range(1000)])
    (spec,) = parse_task_list(str(tmp_path / "a.jsonl.zst"))
    documents = open_plainly(1)(spec, 0)
    _opened.append(documents)
    tracemalloc.start()
    for _ in zip(walk(documents), range(1000), strict=False):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2**22 < peak < 1.4 * 2**22


def test_frames_laid_end_to_end_are_one_file(tmp_path: Path) -> None:
    """Also with an empty frame, a skippable one and a line that runs over the seam."""
    skippable = struct.pack("<II", 0x184D2A50, 3) + b"any"
    content = line("one") + b"\n" + line("two") + b"\n" + line("three")
    frames = [zstandard.compress(content[:30]), skippable, zstandard.compress(b""), zstandard.compress(content[30:]), skippable]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(frames))
    assert sorted(passes(opened(path), 1)[0]) == ["one", "three", "two"]


@pytest.mark.parametrize("read_bytes", [1, 7])
def test_frames_and_lines_may_be_cut_anywhere_by_the_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int) -> None:
    monkeypatch.setattr(tasks.streams, "ZST_READ_BYTES", read_bytes)
    monkeypatch.setattr(tasks.lines, "SCAN_BYTES", read_bytes)
    lines = [line(f"é {n}") for n in range(20)]
    zst = write(tmp_path / "a.jsonl.zst", lines[:9])
    zst.write_bytes(zst.read_bytes() + zstandard.compress(b"\n".join(lines[9:])))
    plain = write(tmp_path / "a.jsonl", lines, end=b"")
    for path in (zst, plain):
        assert sorted(passes(opened(path), 1)[0]) == sorted(f"é {n}" for n in range(20))


@pytest.mark.parametrize("cut", [1, 20])
def test_a_compressed_file_that_was_cut_short_is_an_error(tmp_path: Path, cut: int) -> None:
    """zstandard's stream_reader ends quietly there: half of a broken download would have been trained on for ever."""
    path = write(tmp_path / "a.jsonl.zst", [line("x")] * 100)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst ends in the middle of a frame\. Copy or download it again"):
        passes(opened(path), 1)


def test_a_file_that_is_not_zstandard_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(line("plain after all"))
    with pytest.raises(UserError, match=r"must be whole zstandard data; .*a\.jsonl\.zst at about byte .*\. Copy or download it again"):
        opened(path)


def test_blank_lines_byte_order_mark_and_a_missing_last_newline_are_no_mistakes(path: Path) -> None:
    lines = [b"\xef\xbb\xbf" + line("one"), b"", b"  \t", line("two") + b"\r", b"\r", line("three")]
    assert [sorted(order) for order in passes(opened(write(path, lines, end=b"")), 2)] == [["one", "three", "two"]] * 2


def test_other_fields_are_ignored_and_the_text_stands_as_it_is(path: Path) -> None:
    write(path, ['{"meta": {"text": 1}, "text": "  \\n\\u00e9 \U0001f600 ", "n": NaN}'.encode()])
    assert opened(path).next_good(0, 0).example.text == "  \né \U0001f600 "


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_record_is_named_with_file_line_rule_sight_and_cure(path: Path, kind: str) -> None:
    bad, seen = BAD_LINES[kind]
    write(path, [line("good"), b"", bad, line("good too")])
    with pytest.raises(UserError) as caught:
        passes(opened(path), 1)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert "each record must be an object in UTF-8" in message
    assert seen in message
    assert "--on-bad-record skip" in message
    assert len(message) < len(str(path)) + 450, "the excerpt is to be short"


@pytest.mark.parametrize("number", [1, 30, 49])
def test_bad_records_of_plain_files_are_found_before_training(tmp_path: Path, number: int) -> None:
    lines = [line(str(n)) for n in range(50)]
    lines[number] = b"oops"
    with pytest.raises(UserError, match=rf"a\.jsonl:{number + 1}: "):
        opened(write(tmp_path / "a.jsonl", lines))


def test_larger_and_compressed_files_are_checked_at_their_first_record_and_then_as_they_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.readers, "CHECK_ALL_BYTES", 10)
    documents = opened(write(path, [line("a"), line("b"), b"oops"]))
    with pytest.raises(UserError, match=r":3: "):
        passes(documents, 1)
    with pytest.raises(UserError, match=r":1: "):
        opened(write(path, [b"oops", line("a")]))


def test_skipping_leaves_bad_records_out_and_counts_them(path: Path) -> None:
    lines = [line(str(n)) for n in range(30)]
    for number, (bad, _) in zip((0, 3, 4, 5, 11, 17, 18, 19, 27, 28, 29), BAD_LINES.values(), strict=False):
        lines[number] = bad
    good = sorted(json.loads(text)["text"] for text in lines if text.startswith(b'{"text": "') and text[10:11].isdigit())
    assert len(good) == 19
    documents = opened(write(path, lines), on_bad_record="skip")
    assert [sorted(order) for order in passes(documents, 3)] == [good] * 3
    num_skipped, pass_index, position = 0, 0, 0
    while pass_index < 2:
        document = documents.next_good(pass_index, position)
        num_skipped += document.num_skipped
        pass_index, position = document.pass_index, document.position + 1
    assert 22 <= num_skipped <= 32, "eleven in each of two passes, and those before the first good one of the third"


def test_skipping_keeps_entry_at_any_place(path: Path) -> None:
    write(path, [b"oops" if n % 3 else line(f"document {n}") for n in range(40)])
    walked = [item for item, _ in zip(walk(opened(path, on_bad_record="skip")), range(40), strict=False)]
    for start in range(30):
        entered = [item for item, _ in zip(walk(opened(path, on_bad_record="skip"), *walked[start][:2]), range(9), strict=False)]
        assert entered == walked[start : start + 9]


def test_skipped_records_are_logged_once_with_their_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [line("a"), b"oops", line("b"), b"oops again"]
    with caplog.at_level(logging.WARNING):
        passes(opened(write(tmp_path / "a.jsonl", lines), on_bad_record="skip"), 3)
    (message,) = caplog.messages
    assert "a.jsonl: 2 of 4 records are bad and are left out; first, " in message
    assert "a.jsonl:2: not JSON" in message
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # not known when the file is opened: the first is named, the count follows with the pass
        passes(opened(write(tmp_path / "a.jsonl.zst", lines), on_bad_record="skip"), 3)
    first, count = caplog.messages
    assert "a.jsonl.zst:" in first
    assert "bad record left out" in first
    assert "a.jsonl.zst: 2 bad records left out by the end of the pass" in count


@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_a_file_without_records_is_an_error(path: Path, content: bytes, on_bad_record: OnBadRecord) -> None:
    write(path, [], end=content)
    with pytest.raises(UserError, match=r"must hold at least one record.*a\.json.*it is empty or holds blank lines only\. Give a file"):
        opened(path, on_bad_record=on_bad_record)


def test_a_file_of_bad_records_alone_is_an_error_even_when_they_are_skipped(path: Path) -> None:
    write(path, [b"oops"] * 40)
    with pytest.raises(UserError, match=r"all of its 40 records are bad\. Give a file"):
        opened(path, on_bad_record="skip")


@pytest.mark.parametrize("position", [0, 3, 40])
def test_a_pass_that_turns_out_to_be_all_bad_is_an_error_and_no_endless_loop(path: Path, position: int) -> None:
    """As when another program overwrites the file after it was checked: here the check is left out."""
    write(path, [b"oops"] * 40)
    records: Ordered
    if path.suffix == ".zst":
        records = Windowed(forward_lines(path, "a", ".zst", record_of_line), name="a", key=(1, 0))
    else:
        records = Shuffled(IndexedLines(path, "a", record_of_line), key=(1, 0))
    rules = ReadingRules(on_bad_record="skip")
    documents = Documents(records, name="a", num_bytes=0, fingerprint="", seed=1, place=0, rules=rules)
    documents.bind(tasks_by_name(TaskOptions())["records"])
    _opened.append(documents)
    with pytest.raises(UserError, match=r"all of its 40 records are bad"):
        documents.next_good(1, position)


def test_a_missing_file_a_folder_and_an_unknown_ending_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must exist on the machine that reads the data; .*none\.jsonl is no such file .*Correct the path"):
        opened(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"must hold files of the kinds .*folder\.jsonl holds none\. Check the path"):
        opened(tmp_path / "folder.jsonl")
    for name in ("a.txt", "a.zst", "a.parquet.gz"):
        (tmp_path / name).write_bytes(line("x"))
        with pytest.raises(UserError, match=r"must be of one of the kinds \.jsonl, \.json, \.csv, .*Convert it"):
            opened(tmp_path / name)


def test_the_index_of_a_file_holds_eight_bytes_a_line(tmp_path: Path) -> None:
    starts, lines = tasks.lines._record_starts(write(tmp_path / "a.jsonl", [line("x")] * 100), quoted=False)
    assert lines is None
    assert (starts.dtype, starts.shape) == (np.int64, (101,))
