"""Every kind of source: which records it gives, in which order, and what is said of one that is broken."""

import csv
import gzip
import io
import json
import logging
import random
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard
from support.ranks import SHARED
from support.tiers import sample

import tasks.lines
import tasks.order
import tasks.readers
import tasks.sources
from tasks.examples import Task
from tasks.lines import IndexedSequence
from tasks.order import Shuffled
from tasks.prompts import TaskOptions, tasks_by_name
from tasks.readers import Documents, ReadingRules, open_documents
from tasks.streams import forward_lines
from tasks.task_list import parse_task_list
from user_error import UserError

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no shared data here")

PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}

_opened: list[Documents] = []


@pytest.fixture(autouse=True)
def _close_what_a_test_opened() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


def opened(
    item: str, *, seed: int = 1, tasks: Mapping[str, Task] | None = None, options: TaskOptions | None = None, **rules: Any
) -> Documents:
    tasks = tasks or tasks_by_name(options or TaskOptions())
    (spec,) = parse_task_list(item, tasks)
    _opened.append(open_documents(spec, tasks, seed=seed, place=0, rules=ReadingRules(**rules)))
    return _opened[-1]


def a_pass(documents: Documents, pass_index: int = 0) -> list[str]:
    texts: list[str] = []
    place = (pass_index, 0)
    while True:
        document = documents.next_good(*place)
        if document.pass_index != pass_index:
            return texts
        texts.append(document.example.text)
        place = (document.pass_index, document.position + 1)


def in_order(documents: Documents) -> list[str]:
    return [document.example.text for document in documents.in_order()]


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def put_parquet(path: Path, columns: dict[str, list[Any]], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


TEXTS = ["one", 'two, "quoted"', "three\nlines\n", "  four ", "fünf", "six\ttabs"]


def as_csv(texts: list[str]) -> str:
    content = io.StringIO()
    writer = csv.writer(content)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(texts))
    return content.getvalue()


FORMATS: dict[str, Callable[[list[str]], str]] = {
    ".jsonl": lambda texts: lines_of(texts).decode(),
    ".json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1),
    ".csv": as_csv,
    ".tsv": lambda texts: "text\tid\n" + "".join(f"{text}\t{number}\n" for number, text in enumerate(texts)),
}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("ending", FORMATS)
def test_every_text_format_gives_its_records_plain_and_compressed(tmp_path: Path, ending: str, packing: str) -> None:
    texts = [text for text in TEXTS if ending != ".tsv" or not set(text) & set("\t\n")]
    path = put(tmp_path / f"a{ending}{packing}", PACKERS[packing](FORMATS[ending](texts).encode()))
    documents = opened(str(path))
    assert in_order(documents) == texts
    assert sorted(a_pass(documents)) == sorted(a_pass(documents, 1)) == sorted(texts)
    assert documents.num_bytes == path.stat().st_size


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("ending", FORMATS)
def test_byte_order_marks_and_carriage_returns_are_no_mistakes(tmp_path: Path, ending: str, packing: str) -> None:
    content = b"\xef\xbb\xbf" + FORMATS[ending](["one", "two"]).replace("\r\n", "\n").replace("\n", "\r\n").encode()
    assert in_order(opened(str(put(tmp_path / f"a{ending}{packing}", PACKERS[packing](content))))) == ["one", "two"]


def test_a_json_may_be_lines_an_array_one_object_or_texts_by_name(tmp_path: Path) -> None:
    pair = {"prompt": "p", "completion": " c"}
    for content in (
        json.dumps(pair),
        json.dumps(pair, indent=2),
        json.dumps([pair]),
        f"[\n{json.dumps(pair)}\n]\n",
        f"\n{json.dumps(pair)}\n\n",
    ):
        assert in_order(opened(str(put(tmp_path / "a.json", content)))) == ["p c"], content
    assert in_order(opened(str(put(tmp_path / "a.json", f"{json.dumps(pair)}\n{json.dumps(pair)}\n")))) == ["p c", "p c"]
    by_name = put(tmp_path / "cot.json", json.dumps({"algebra": "Q: 1", "logic": "Q: 2"}))
    assert in_order(opened(f"cot={by_name}")) == ["Q: 1", "Q: 2"]
    assert in_order(opened(f"cot={put(tmp_path / 'cot.json', json.dumps({'algebra': 'Q: 1'}, indent=1))}")) == ["Q: 1"]
    with pytest.raises(UserError, match="its fields are algebra, logic"):
        opened(str(put(by_name, json.dumps({"algebra": "Q: 1", "logic": "Q: 2"}))))


def test_many_files_are_one_source_shuffled_as_a_whole(tmp_path: Path) -> None:
    texts = [f"document {number:02d}" for number in range(40)]
    for name, part in (("b/2.jsonl", texts[25:]), ("a/1.csv", texts[:10]), ("b/1.jsonl", texts[10:25])):
        put(tmp_path / "data" / name, FORMATS[Path(name).suffix](part))
    put(tmp_path / "data" / "README.md", "no data")
    put(tmp_path / "data" / ".cache" / "x.jsonl", lines_of(["hidden"]))
    put(tmp_path / "data" / "empty.jsonl", b"")
    whole = put(tmp_path / "whole.jsonl", lines_of(texts))
    for source in (tmp_path / "data", f"{tmp_path}/data/**/*[12].*"):
        documents = opened(str(source))
        assert in_order(documents) == texts
        assert a_pass(documents) == a_pass(opened(str(whole))), "the order is that of one file with the same records"


def test_a_split_is_a_subfolder_or_a_file_of_its_name(tmp_path: Path) -> None:
    names = ("train.jsonl", "test.jsonl.zst", "dev/a.jsonl", "dev/b.jsonl", "valid-00000-of-00002.jsonl", "valid-00001-of-00002.jsonl")
    for name in names:
        content = lines_of([name])
        put(tmp_path / name, zstandard.compress(content) if name.endswith(".zst") else content)
    assert in_order(opened(f"{tmp_path}@train")) == ["train.jsonl"]
    assert in_order(opened(f"{tmp_path}@test")) == ["test.jsonl.zst"]
    assert in_order(opened(f"{tmp_path}@dev")) == ["dev/a.jsonl", "dev/b.jsonl"]
    assert in_order(opened(f"{tmp_path}@valid")) == list(names[4:])
    assert in_order(opened(f"'{tmp_path}'@a")) == ["dev/a.jsonl"]
    with pytest.raises(UserError, match=r"has no part 'validation'; its parts are: a, b, dev, test, train, valid\."):
        opened(f"{tmp_path}@validation")
    for source in (f"{tmp_path}/train.jsonl@train", f"{tmp_path}/*.jsonl@train", "'http://host/a.jsonl'@train"):
        with pytest.raises(UserError, match=r"@train chooses a part of a folder.*quotes"):
            opened(source)
    with pytest.raises(UserError, match="an @ in it needs quotes"):
        opened(f"{tmp_path}/me@home.jsonl")


def test_a_folder_with_a_compressed_file_is_read_forwards_as_a_whole(tmp_path: Path) -> None:
    texts = [f"document {number:02d}" for number in range(40)]
    put(tmp_path / "1.jsonl", lines_of(texts[:10]))
    put(tmp_path / "2.jsonl.zst", zstandard.compress(lines_of(texts[10:20])))
    put(tmp_path / "3.json", json.dumps([{"text": text} for text in texts[20:30]]))
    put(tmp_path / "4.csv", as_csv(texts[30:]))
    documents = opened(str(tmp_path), shuffle_window=15)
    assert in_order(documents) == texts
    order = a_pass(documents)
    assert [sorted(order[start : start + 15]) for start in (0, 15, 30)] == [texts[:15], texts[15:30], texts[30:]]


def test_windows_of_items_that_are_in_memory_are_bounded_in_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.order, "WINDOW_BYTES", 1000)
    put(tmp_path / "1.json", json.dumps([{"text": "x" * 300 + str(number)} for number in range(8)]))
    put(tmp_path / "2.jsonl.zst", zstandard.compress(lines_of(["y"])))
    order = a_pass(opened(str(tmp_path)))
    assert sorted(text[300:] for text in order[:4]) == ["0", "1", "2", "3"]


def test_more_files_than_a_process_may_open_are_no_trouble(tmp_path: Path) -> None:
    for number in range(300):
        put(tmp_path / f"{number:03d}.jsonl", lines_of([str(number)]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        documents = opened(str(tmp_path))
        assert sorted(map(int, a_pass(documents))) == list(range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_max_samples_is_a_drawn_subset_or_the_first_of_a_stream(tmp_path: Path, name: str) -> None:
    texts = [str(number) for number in range(50)]
    content = lines_of(texts[:25]) + b"\n\n" + lines_of(texts[25:])
    path = put(tmp_path / name, PACKERS[Path(name).suffix if name.endswith("gz") else ""](content))
    subsets = [in_order(opened(str(path), seed=seed, max_samples=12)) for seed in (1, 1, 2)]
    assert subsets[0] == subsets[1] == sorted(subsets[0], key=int)
    assert sorted(a_pass(opened(str(path), max_samples=12))) == sorted(subsets[0])
    assert [len(subset) for subset in subsets] == [12] * 3
    assert (subsets[0] == texts[:12]) == name.endswith("gz")
    assert (subsets[0] == subsets[2]) == name.endswith("gz")
    assert in_order(opened(str(path), max_samples=1000)) == texts


def labelled(path: Path, counts: dict[str, int]) -> Path:
    rows = [f"{label} {number},{label}" for label, count in counts.items() for number in range(count)]
    return put(path, "text,label\n" + "\n".join(rows) + "\n")


def test_balanced_passes_hold_as_many_of_every_label_and_others_each_time(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.csv", {"a": 30, "b": 4, "c": 9})
    documents = opened(f"classification={path}", balance_labels=True, options=TaskOptions(classification_prompt="raw"))
    passes = [a_pass(documents, number) for number in range(80)]
    for texts in passes:
        assert len(set(texts)) == len(texts) == 12
        assert [sum(text.endswith(f" {label}") for text in texts) for label in "abc"] == [4, 4, 4]
    assert len({tuple(texts) for texts in passes}) == 80
    assert len({text for texts in passes for text in texts}) == 43, "in time every record is drawn"
    assert a_pass(documents, 3) == passes[3]
    assert len(in_order(documents)) == 43, "an evaluation sees all"


def test_what_cannot_be_balanced_is_an_error(tmp_path: Path) -> None:
    plain = labelled(tmp_path / "a.csv", {"a": 2, "b": 2})
    packed = put(tmp_path / "a.csv.zst", zstandard.compress(plain.read_bytes()))
    with pytest.raises(UserError, match=r"a\.csv\.zst: it can only be read forwards"):
        opened(f"classification={packed}", balance_labels=True)
    with pytest.raises(UserError, match=r"a\.jsonl: its task has no labels"):
        opened(str(put(tmp_path / "a.jsonl", lines_of(["x"]))), balance_labels=True)


def test_a_table_without_a_header_has_numbers_for_columns(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tsv", 'ham\tGo "on\nspam\tFree\n')
    options = TaskOptions(text_column="2", label_column="1", classification_prompt="raw")
    assert in_order(opened(f"classification={path}", options=options, has_header=False)) == ['Go "on\n ham', "Free\n spam"]


@pytest.mark.parametrize("packing", PACKERS)
def test_a_row_with_line_ends_in_quotes_is_told_by_its_first_line(tmp_path: Path, packing: str) -> None:
    path = put(tmp_path / f"a.csv{packing}", PACKERS[packing](b'id,text\n1,"a\nb\n\nc"\n2,"d"\n3,e,f\n4\n'))
    documents = opened(str(path), on_bad_record="skip")
    assert [(document.where, document.example.text) for document in documents.in_order()] == [
        (f"{path}:2", "a\nb\n\nc"),
        (f"{path}:6", "d"),
    ]
    with pytest.raises(UserError, match=r"a\.csv.*:7: .*3 cells where there are 2 columns \(id, text\)"):
        in_order(opened(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "seen"),
    [
        ("a.csv", b"", r"a\.csv:1: the first row of a table must name its columns; it is empty"),
        ("a.tsv", b"\n\n", r"a\.tsv:1: .*it is empty"),
        ("a.csv", b"id,text\n", r"must hold at least one record.*a\.csv"),
        ("a.csv", b"id,text,text\n1,2,3\n", r"a\.csv:1: .*must have different names.*'text'"),
        ("a.csv", b'id,te"xt\n1,a\n', r"a\.csv:1: .*a quote in a cell"),
        ("a.csv", b"id,text\n1,a\n2\n", r"a\.csv:3: .*1 cells where there are 2 columns \(id, text\)"),
        ("a.csv", b'id,text\n1,a\n2,5" wide\n3,c\n', r"a\.csv:3: .*a quote in a cell that does not begin with one"),
        ("a.csv", b'id,text\n1,a\n2,"b\n3,c\n', r"a\.csv:3: .*(quote|end of data)"),
        ("a.csv", b"id,text\n1,\xff\n", r"a\.csv:2: .*byte 0xff at column 3, which is not UTF-8"),
        ("a.tsv", b"id\ttext\n1\ta\0\n", r"a\.tsv:2: .*a NUL byte at column 4"),
        ("a.tsv", b"id\ttext\n1\ta\tb\n", r"a\.tsv:2: .*3 cells where there are 2 columns"),
        ("a.csv", b"id,body\n1,a\n", r"a\.csv:2: .*its fields are id, body"),
        ("a.json", b"[]", r"must hold at least one record.*a\.json"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"}', r"a\.json:2: .*Correct the file"),
        ("a.json", b'["a", {"text": "b"}]', r"a\.json: item 1: .*a string instead of an object"),
        ("a.json", b'[{"text": "a"}, {"text": "b", "text": "c"}]', r"a\.json: item 2: .*the key 'text' stands in it twice"),
        ("a.json", b'[{"messages": [{"role": "user", "role": "bot"}]}]', r"a\.json: item 1: .*the key 'role' stands in it twice"),
        ("a.json", b'{"text": "a", "text": "b"}', r"a\.json: .*the key 'text' stands in it twice"),
        ("a.json", b'[{"text": "\xff"}]', r"a\.json: .*utf-8.*Correct the file"),
        ("a.jsonl.gz", b"plain", r"must be whole gzip data; .*a\.jsonl\.gz"),
        ("a.jsonl.gz", gzip.compress(lines_of(["x"] * 100), mtime=0)[:-9], r"must be whole gzip data; .*a\.jsonl\.gz"),
        ("a.parquet", b"PAR1 is not enough", r"\.parquet file must be whole; .*a\.parquet"),
    ],
)
def test_a_broken_file_is_told_with_where_what_and_cure(tmp_path: Path, name: str, content: bytes, seen: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = put(tmp_path / name, content)
    with pytest.raises(UserError, match=seen) as caught:
        in_order(opened(str(path)))
    assert len(str(caught.value)) < len(str(path)) * 2 + 500


def test_a_gz_with_a_flipped_bit_is_an_error(tmp_path: Path) -> None:
    """zlib's own error is neither an OSError nor gzip's."""
    content = bytearray(gzip.compress(lines_of([random.Random(n).randbytes(50).hex() for n in range(1000)])))
    for place in range(200, 260):
        content[place] ^= 0xFF
    with pytest.raises(UserError, match=r"must be whole gzip data; .*a\.jsonl\.gz.*Copy or download it again"):
        in_order(opened(str(put(tmp_path / "a.jsonl.gz", bytes(content)))))


@sample(1)
@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_a_record_of_50_mb_is_bad_and_can_be_skipped(tmp_path: Path, ending: str, packing: str) -> None:
    long = b'{"text": "' + b"x" * 50_000_000 + b'"}\n' if ending == ".jsonl" else b'2,"' + (b"x" * 999 + b"\n") * 50_000 + b'"\n'
    small = FORMATS[ending](["before"]).encode()
    after = b'{"text": "after"}\n' if ending == ".jsonl" else b"3,after\n"
    path = put(tmp_path / f"a{ending}{packing}", PACKERS[packing](small + long + after))
    assert in_order(opened(str(path), on_bad_record="skip")) == ["before", "after"]
    with pytest.raises(UserError, match=rf":{small.count(10) + 1}: .*a record of more than 16 MiB.*--on-bad-record skip"):
        in_order(opened(str(path)))


def test_an_item_of_an_array_may_not_be_longer_than_a_line_either(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", json.dumps([{"text": "a"}, {"text": "x" * 17 * 2**20}]))
    with pytest.raises(UserError, match=r"item 2: .*a record of more than 16 MiB"):
        opened(str(path))


def test_a_json_array_that_is_too_large_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.lines, "MAX_WHOLE_BYTES", 100)
    with pytest.raises(UserError, match=r"up to .* GiB; .*a\.json is larger\. Write it as \.jsonl"):
        opened(str(put(tmp_path / "a.json", json.dumps([{"text": "x" * 20}] * 10, indent=1))))
    assert in_order(opened(str(put(tmp_path / "a.json", lines_of(["x" * 50] * 10))))) == ["x" * 50] * 10


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(2500)]
    path = put_parquet(tmp_path / "a.parquet", {"text": texts, "n": list(range(2500))}, row_group_size=700)
    documents = opened(str(path), shuffle_window=1000)
    assert in_order(documents) == texts
    assert sorted(a_pass(documents)) == sorted(texts)
    assert [document.where for document, _ in zip(documents.in_order(), range(2), strict=False)] == [f"{path}: row 1", f"{path}: row 2"]
    chats = {"messages": [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]}
    assert in_order(opened(str(put_parquet(tmp_path / "b.parquet", chats)))) == ["<human>: hi\n<bot>: ho"]


def test_a_parquet_without_rows_and_one_with_bytes_for_text_are_told(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=r"must hold at least one record.*a\.parquet"):
        opened(str(put_parquet(tmp_path / "a.parquet", {"text": []})))
    raw = pyarrow.array([b"good", b"\xff\xfe"], type=pyarrow.binary()).view(pyarrow.string())
    path = put_parquet(tmp_path / "b.parquet", {"text": raw})
    assert in_order(opened(str(path), on_bad_record="skip")) == ["good"]
    with pytest.raises(UserError, match=r"b\.parquet: row 2: .*byte 0xff in a string, which is not UTF-8"):
        in_order(opened(str(path)))


@pytest.mark.parametrize(("source", "package"), [("{tmp}/a.parquet", "pyarrow"), ("hf:owner/name", "datasets")])
def test_a_missing_package_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, package: str) -> None:
    put(tmp_path / "a.parquet", b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"need the package {package}\. Install it with: pip install {package}"):
        opened(source.format(tmp=tmp_path))


def test_a_local_dataset_is_streamed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    texts = [f"document {number}" for number in range(30)]
    put(tmp_path / "set" / "train.jsonl", lines_of(texts[:20]))
    put(tmp_path / "set" / "test.jsonl", lines_of(texts[20:]))
    assert in_order(opened(f"hf:{tmp_path}/set")) == texts[:20]
    documents = opened(f"hf:{tmp_path}/set@test", shuffle_window=4)
    assert in_order(documents) == texts[20:]
    assert sorted(a_pass(documents)) == texts[20:]
    assert documents.fingerprint() != opened(f"hf:{tmp_path}/set").fingerprint()
    with pytest.raises(UserError, match=r"set@nope: ValueError: .*Check name, split and network"):
        opened(f"hf:{tmp_path}/set@nope")


def test_owner_and_name_of_a_dataset_are_tried_before_name_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(path: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        assert streaming
        asked.append((path, config, split))
        if path in ("glue/mnli", "none"):
            raise FileNotFoundError(f"no dataset {path}")
        if split == "nope":
            raise ValueError(f"{path} has no split nope\nbut others")
        return [{"text": "one"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert in_order(opened("hf:glue/mnli@validation")) == ["one"]
    assert asked[:2] == [("glue/mnli", None, "validation"), ("glue", "mnli", "validation")]
    asked.clear()
    assert in_order(opened("hf:nyu-mll/glue/mnli")) == ["one"]
    assert set(asked) == {("nyu-mll/glue", "mnli", "train")}
    with pytest.raises(UserError, match=r"hf:owner/name@nope: ValueError: owner/name has no split nope\. Check name"):
        opened("hf:owner/name@nope")
    with pytest.raises(UserError, match=r"hf:none@train: FileNotFoundError: no dataset none"):
        opened("hf:none")


def test_a_resume_of_a_stream_says_how_long_it_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [str(number) for number in range(50)]
    path = put(tmp_path / "a.jsonl.zst", zstandard.compress(lines_of(texts)))
    walked = a_pass(opened(str(path), shuffle_window=8))
    with caplog.at_level(logging.INFO):
        a_pass(opened(str(path), shuffle_window=8))
        assert not caplog.messages, "reading on is no resume"
        assert opened(str(path), shuffle_window=8).next_good(0, 30).example.text == walked[30]
    (message,) = caplog.messages
    assert "a.jsonl.zst: read forwards to record 31 of pass 1 in " in message


def test_reading_over_records_looks_into_none_of_them(tmp_path: Path) -> None:
    parsed: list[bytes] = []

    def parse(line: bytes) -> dict[str, Any]:
        parsed.append(line)
        return {"text": line.decode()}

    path = put(tmp_path / "a.jsonl.zst", zstandard.compress(b"".join(b"%d\n" % number for number in range(1000))))
    records = tasks.order.Windowed(forward_lines(path, "a", ".zst", parse), name="a", key=(1, 0), window_records=100)
    assert records.at(0, 730) is not None
    assert len(parsed) == 1


def test_a_changed_file_has_another_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (256 * 2**20, 10):  # files are sampled above; such small ones are read whole even then
        monkeypatch.setattr(tasks.sources, "FINGERPRINT_WHOLE_BYTES", limit)
        put(tmp_path / "1.jsonl", lines_of(["one"]))
        put(tmp_path / "2.jsonl", lines_of(["two"]))
        before = opened(str(tmp_path)).fingerprint()
        assert opened(str(tmp_path)).fingerprint() == before
        put(tmp_path / "2.jsonl", lines_of(["owt"]))
        assert opened(str(tmp_path)).fingerprint() != before


def test_what_a_task_finds_wrong_with_a_file_names_the_file(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.csv", {"a": 2})
    with pytest.raises(UserError, match=r"a\.csv: --text-column must be a column of the file; there is no 'body' among text, label"):
        opened(f"classification={path}", options=TaskOptions(text_column="body"))


def test_a_missing_path_of_a_task_says_where_that_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"mmlu-cot\.json is no such file .*That is where task cot looks.*cot=PATH"):
        opened("cot")
    with pytest.raises(UserError, match=r"natural-instructions/ is no such file .*ni=PATH"):
        opened("ni")
    with pytest.raises(UserError, match=r"other\.json is no such file") as caught:
        opened("cot=other.json")
    assert "looks" not in str(caught.value)


def test_natural_instructions_are_folders_files_and_globs(tmp_path: Path) -> None:
    for number in (1, 2):
        instances = [{"input": f"in {number}.{n}", "output": [f"out {n}"]} for n in range(3)]
        put(tmp_path / "tasks" / f"task{number}.json", json.dumps({"Definition": ["Do."], "Instances": instances}))
    put(tmp_path / "a.jsonl", json.dumps({"Definition": "Do.", "input": "in", "output": "out"}))
    assert len(in_order(opened(f"ni={tmp_path}"))) == 6
    assert len(in_order(opened(f"ni={tmp_path}/tasks/task2.json"))) == 3
    assert len(in_order(opened(f"ni={tmp_path}/tasks/*.json"))) == 6
    assert len(in_order(opened(f"natural_instructions={tmp_path}/a.jsonl"))) == 1
    with pytest.raises(UserError, match="@train chooses a part"):
        opened(f"ni={tmp_path}@train")


def test_a_sequence_of_records_is_shuffled_like_a_file(tmp_path: Path) -> None:
    items = [("x", {"text": str(number)}) for number in range(20)]
    path = put(tmp_path / "a.jsonl", lines_of([record["text"] for _, record in items]))
    sequence = Shuffled(IndexedSequence(items), key=(1, 0))
    found = [sequence.at(0, position) for position in range(20)]
    assert [numbered.record["text"] for numbered in found if numbered and not isinstance(numbered.record, Exception)] == a_pass(
        opened(str(path))
    )


@needs_data
@pytest.mark.parametrize(
    ("item", "num"),
    [
        ("{data}/nli/mnli_validation_matched.jsonl", None),
        ("mnli={data}/nli/mnli_validation_matched.jsonl", 9815),
        ("mnli={data}/nli/cad_nli_all_combined_dev.tsv", 1000),
        ("mnli={data}/nli/cad_nli_all_combined_train.tsv", 8330),
        ("classification={data}/classification/banking77_train.csv", 10003),
        ("classification={data}/classification/banking77_test.csv", 3080),
        ("pile={data}/pile/pile_style_sample.jsonl.zst", 400),
        ("p3={data}/p3/p3_sample.jsonl", 1000),
        ("cot={data}/cot/mmlu-cot.json", 57),
        ("cot={data}/cot/gsm8k_test.jsonl", 1319),
        ("{data}/instruct", 575),
    ],
)
def test_real_files_hold_as_many_records_as_listed(item: str, num: int | None) -> None:
    if num is None:
        with pytest.raises(UserError, match=r"mnli_validation_matched\.jsonl:1: .*its fields are"):
            opened(item.format(data=DATA))
    else:
        assert sum(1 for _ in opened(item.format(data=DATA)).in_order()) == num


@needs_data
def test_real_tables_without_a_header_and_natural_instructions_are_read() -> None:
    options = TaskOptions(text_column="2", label_column="1")
    spam = opened(f"classification={DATA}/classification/sms_spam.tsv", options=options, has_header=False)
    assert spam.task.labels == ("ham", "spam")
    assert sum(1 for _ in spam.in_order()) == 5574
    with (DATA / "classification" / "banking77_train.csv").open(encoding="utf-8", newline="") as file:
        rows = [row[0].strip() for row in csv.reader(file)][1:]
    raw = TaskOptions(classification_prompt="raw")
    found = [
        document.example.prompt.strip()
        for document in opened(f"classification={DATA}/classification/banking77_train.csv", options=raw).in_order()
    ]
    assert found == rows, "quotes and line ends as the csv module reads them"
    names = (DATA / "ni" / "splits" / "default" / "train_tasks.txt").read_text().split()
    files = [DATA / "ni" / "tasks" / f"{name}.json" for name in names]
    present = [file for file in files if file.is_file()]
    num = sum(len(json.loads(file.read_text())["Instances"]) for file in present)
    if present == files:
        assert sum(1 for _ in opened(f"ni={DATA}/ni").in_order()) == num
    else:
        with pytest.raises(UserError, match="Fetch them, or shorten the list"):
            opened(f"ni={DATA}/ni")
        assert sum(1 for _ in opened(f"ni={DATA}/ni/tasks").in_order()) == num
