"""Whatever a data file, a --config file or a saved data position holds, it is read rightly or refused in words."""

import gzip
import io
import json
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import strategies as st
from support.damage import damaged_bytes, damaged_json, damaged_values, fuzz, in_little_room, put, read_or_refuse, text_of
from support.packing import make_encoder, open_plainly
from support.tiers import partly

from modules.families import read_model_config
from tasks.examples import BadRecordError
from tasks.mixture import Mixture
from tasks.natural_instructions import InstructionTask
from tasks.packing import PackingRules
from tasks.prompts import TaskOptions, tasks_by_name
from tasks.readers import ReadingRules, open_documents
from tasks.records import record_of_line
from tasks.sources import open_source
from tasks.streams import blocks
from tasks.task_list import TaskSpec, parse_task_list
from training.config.flags import parse_flags
from training.config.train import Config
from user_error import UserError

pytestmark = partly

RECORDS: dict[str, list[dict[str, Any]]] = {
    "records": [{"text": "one two"}, {"text": "three"}, {"text": "é"}],
    "messages": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    "pairs": [{"prompt": "a b", "completion": "c"}, {"prompt": "d", "completion": "e"}],
    "mnli": [{"premise": "a", "hypothesis": "b", "label": 1}, {"sentence1": "a", "sentence2": "b", "gold_label": "neutral"}],
    "cot": [{"question": "a", "answer": "b"}],
    "p3": [{"inputs": "a", "targets": "b"}],
    "pile": [{"text": "a", "meta": {"set": "x"}}],
    "classification": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
    "ni": [{"Definition": ["a"], "input": "b", "output": ["c"]}, {"Definition": "a", "Instances": [{"input": "b", "output": "c"}]}],
}
NI_FILE = {"Definition": ["Say it."], "Instances": [{"id": "1", "input": "a", "output": ["b"]}, {"input": "c", "output": "d"}]}
TABLE = b'text,label\n"one, two",x\n"th""ree\nfour",y\nfive,x\n'
POSITION = {"next_sequence_index": 4, "seed": 3}


def task_of(kind: str) -> str:
    return kind if kind in tasks_by_name(TaskOptions()) else "records"


def read_all(path: Path, task: str, *, skip: bool = False) -> None:
    """Every document, as an evaluation and as a training reads it."""
    rules = ReadingRules(on_bad_record="skip" if skip else "error", shuffle_window=2)
    documents = open_documents(
        TaskSpec(source=str(path), weight=1.0, task=task), tasks_by_name(TaskOptions()), seed=1, place=0, rules=rules
    )
    try:
        encode = make_encoder(lambda text: list(text.encode()), eos=256).encode
        assert all(document.example.pieces for document in islice(documents.in_order(), 50))
        found = documents.next_good(0, 0)
        for _ in range(20):
            encode([found.example])
            found = documents.next_good(found.pass_index, found.position + 1)
    finally:
        documents.close()


@st.composite
def lines_of(draw: st.DrawFn, records: list[dict[str, Any]]) -> bytes:
    """A .jsonl of which some lines are damaged."""
    lines = [json.dumps(record).encode() for record in records]
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(lines) - 1))
        lines[place] = draw(damaged_json(records[place % len(records)]))
    return draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\r", b"\n\n"])).join(lines)


@pytest.mark.parametrize("kind", RECORDS)
def test_any_jsonl_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    path, task = tmp_path / "data.jsonl", task_of(kind)

    def look(example: tuple[bytes, bool]) -> None:
        put(path, example[0])
        read_or_refuse(lambda: read_all(path, task, skip=example[1]), str(path))

    read_all_good(path, kind)
    fuzz(tmp_path / "child", st.tuples(lines_of(RECORDS[kind]), st.booleans()), look, examples=60)


def read_all_good(path: Path, kind: str) -> None:
    """The file before anybody damaged it, lest all be refused for another reason."""
    good = [record for record in RECORDS[kind] if "Instances" not in record]
    path.write_bytes(b"\n".join(json.dumps(record).encode() for record in good))
    read_all(path, task_of(kind))


@pytest.mark.parametrize(
    ("name", "task"), [("data.json", "records"), ("data.json", "cot"), ("task.json", "ni"), ("data.json.gz", "records")]
)
def test_any_json_that_is_read_as_a_whole_is_read_or_refused(name: str, task: str, tmp_path: Path) -> None:
    path = tmp_path / name
    wholes: st.SearchStrategy[bytes] = damaged_json(NI_FILE)
    if task != "ni":
        arrays = damaged_values({"all": RECORDS["records"]}).map(lambda value: text_of(value.get("all")).encode())
        wholes = st.one_of(arrays, damaged_json({"a": "x", "b": "y"}), damaged_bytes(text_of(RECORDS["records"]).encode()))

    def look(content: bytes) -> None:
        put(path, gzip.compress(content, 1) if name.endswith(".gz") else content)
        read_or_refuse(lambda: read_all(path, task), str(path))

    fuzz(tmp_path / "child", wholes, look, examples=80)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".csv.gz"])
def test_any_table_is_read_or_refused(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{ending}"
    good = TABLE.replace(b",", b"\t").replace(b"\nfour", b"") if ending == ".tsv" else TABLE

    def look(example: tuple[bytes, bool, str]) -> None:
        put(path, gzip.compress(example[0], 1) if ending.endswith(".gz") else example[0])
        read_or_refuse(lambda: read_all(path, example[2], skip=example[1]), str(path))

    tasks = st.sampled_from(["records", "classification"])
    fuzz(tmp_path / "child", st.tuples(damaged_bytes(good), st.booleans(), tasks), look, examples=100)


@pytest.mark.parametrize("ending", [".jsonl.zst", ".jsonl.gz", ".parquet"])
def test_any_packed_file_is_read_or_refused(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{ending}"
    text = "".join(json.dumps({"text": f"{i} green bottles"}) + "\n" for i in range(40)).encode()
    packers: dict[str, Callable[[bytes], bytes]] = {".jsonl.zst": zstandard.compress, ".jsonl.gz": gzip.compress, ".parquet": parquet_of}
    good = packers[ending](text)

    def look(content: bytes) -> None:
        put(path, content)
        read_or_refuse(lambda: read_all(path, "records"), str(path))

    fuzz(tmp_path / "child", damaged_bytes(good), look, examples=200)


def parquet_of(text: bytes) -> bytes:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in text.splitlines()]), buffer)
    return buffer.getvalue()


def test_any_other_ending_is_refused_by_its_name(tmp_path: Path) -> None:
    def look(content: bytes) -> None:
        put(tmp_path / "data.txt", content)
        assert not read_or_refuse(lambda: read_all(tmp_path / "data.txt", "records"), "data.txt")

    fuzz(tmp_path / "child", damaged_bytes(b"some text\n"), look, examples=5)


def zst_of_equal_blocks(num_blocks: int) -> bytes:
    """A frame of blocks of 4 bytes that each stand for 128 KiB of spaces (RFC 8878, 3.1.1.2.2)."""
    ends = [int(number == num_blocks - 1) for number in range(num_blocks)]
    return b"\x28\xb5\x2f\xfd\x00\x50" + b"".join((end | 1 << 1 | 2**17 << 3).to_bytes(3, "little") + b" " for end in ends)


def test_a_small_zst_that_unpacks_to_half_a_gigabyte_is_read_in_little_memory(tmp_path: Path) -> None:
    """16 KB of it were unpacked at once, to 500 MiB."""
    path = tmp_path / "data.jsonl.zst"
    path.write_bytes(zst_of_equal_blocks(4000))

    def look() -> None:
        assert max(map(len, blocks(path, "data", ".zst"))) <= 16 << 20
        assert not read_or_refuse(lambda: read_all(path, "records"), str(path))

    in_little_room(tmp_path / "child", look)


@pytest.mark.parametrize(
    "header", [b"\xe0" + (100 * 10**9).to_bytes(8, "little"), b"\x00\xa8", b"\x00\xff"], ids=["100 GB", "2 GB", "huge"]
)
def test_a_zst_that_claims_gigabytes_is_refused_before_they_are_taken(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + header + b"\x01\x00\x00")
    in_little_room(tmp_path / "child", lambda: read_or_refuse(lambda: read_all(path, "records"), str(path)))


def test_a_table_of_a_million_columns_without_names_is_refused_at_once(tmp_path: Path) -> None:
    """Each column was counted among all."""
    path = tmp_path / "data.csv"
    path.write_bytes(b"," * 10**6 + b"\n")
    started = time.perf_counter()
    with pytest.raises(UserError, match="must have different names"):
        open_source(TaskSpec(source=str(path), weight=1.0))
    assert time.perf_counter() - started < 5


def test_a_record_of_a_hundred_thousand_keys_with_one_twice_is_refused_at_once() -> None:
    """Each key was counted among all."""
    line = ("{" + ", ".join(f'"{i}": 0' for i in [*range(100_000), 99_999]) + "}").encode()
    started = time.perf_counter()
    with pytest.raises(BadRecordError, match=r"99999.*stands in it twice"):
        record_of_line(line)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("number", [None, "x", -1, 1, 10**400, [0]])
def test_a_line_that_claims_to_be_an_instance_which_is_not_there_is_a_bad_record(number: Any) -> None:
    """Only readers of whole task files add the number; what a line said of it was believed."""
    record = {"Definition": "a", "Instances": [{"input": "b", "output": "c"}], "number": number}
    with pytest.raises(BadRecordError, match="number"):
        InstructionTask(lambda: iter(())).example(record, None)


# Where in the data a run stood


def test_any_saved_data_position_is_gone_to_or_refused(tmp_path: Path) -> None:
    names = ("data.jsonl", "data.jsonl.zst")
    text = "".join(json.dumps({"text": f"{i} green bottles"}) + "\n" for i in range(12)).encode()
    (tmp_path / names[0]).write_bytes(text)
    (tmp_path / names[1]).write_bytes(zstandard.compress(text))
    mixture = Mixture(
        tasks=parse_task_list(",".join(str(tmp_path / name) for name in names)),
        open_documents=open_plainly(3, "error", 5),
        encoder=make_encoder(lambda text: list(text.encode()), eos=256),
        rules=PackingRules(seq_length=16, mode="concat", group=2),
        seed=3,
    )
    for _ in range(9):
        mixture.next_sequence()
    good = json.loads(json.dumps(mixture.state()))

    def look(state: dict[str, Any]) -> None:
        def go() -> None:
            mixture.go_to(state)
            for _ in range(4):
                assert mixture.next_sequence().token_ids.shape == (16,)
            json.dumps(mixture.state())

        read_or_refuse(go, "saved")

    mixture.go_to(good)
    fuzz(tmp_path / "child", damaged_values(good), look, examples=300)
    mixture.close()


# --config


YAML = b"""# a run
model-name: /models/gptj
task_name: [a.jsonl, "b, c.jsonl:0.5"]
total-steps: 100
lr: 1e-4
bf16: true
checkpoint-path: &here /runs/1
dropout: 0.1
"""
YAML_PIECES = [
    *(b"2001-99-99", b"!!int x", b"!!float x", b"!!bool x", b"!!timestamp x", b"!!binary \xc3\xa9", b"!!set {a, b}", b"*here", b"*nowhere"),
    *(b"!!python/object/apply:os.system ['touch marker']", b"!!python/name:os.system", b"2001-01-01 00:00:00 +99:99", b"7" * 5000, b"1:99"),
    *(
        b"[" * 1500,
        b"{a: " * 1000,
        b"- " * 1000,
        b'"\\ud800"',
        b'"\\0"',
        b"&a [*a]",
        b"{<<: 1}",
        b"? [a]",
        b"~",
        b".nan",
        b"-.inf",
        b"!!omap [1]",
    ),
    *(b"[a, [b]]", b"[{a: b}]", b"[]", b"{}", b"|\n  x\n  y", b"--- 1", b"%YAML 9.9\n---", b"-.inf", b"!!omap [1]", b"\x85", b"\xff"),
]


@st.composite
def yaml_files(draw: st.DrawFn) -> bytes:
    """Other values behind the keys, other lines, or other bytes."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged_bytes(YAML))
    lines = YAML.splitlines()
    for _ in range(draw(st.integers(1, 2))):
        place, piece = draw(st.integers(0, len(lines) - 1)), draw(st.sampled_from(YAML_PIECES))
        key = lines[place].partition(b":")[0]
        lines[place] = draw(st.sampled_from([key + b": " + piece, piece, piece + b": 1", lines[place] + b"\n" + key + b": 2"]))
    return b"\n".join(lines)


def test_any_config_file_is_understood_or_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.yaml"
    monkeypatch.chdir(tmp_path)
    put(path, YAML)
    assert parse_flags(Config, ["--config", str(path)], "").task_name == 'a.jsonl,"b, c.jsonl":0.5'

    def look(content: bytes) -> None:
        put(path, content)
        read_or_refuse(lambda: parse_flags(Config, ["--config", str(path)], ""), str(path), "argument --", "unknown flags")

    fuzz(tmp_path / "child", yaml_files(), look, examples=150)
    assert not (tmp_path / "marker").exists(), "code was run"


@pytest.mark.parametrize("piece", YAML_PIECES)
def test_each_odd_piece_of_yaml_is_understood_or_refused(piece: bytes, tmp_path: Path) -> None:
    """Dates of no calendar, numbers that are none, brackets without end: yaml lets six kinds of Python's own errors through."""
    for name, place in enumerate((b"task-name: %s\n", b"%s\n", b"%s: 1\n", b"task-name: [a, %s]\n")):
        path = tmp_path / f"{name}.yaml"
        path.write_bytes(place.replace(b"%s", piece))
        read_or_refuse(lambda path=path: parse_flags(Config, ["--config", str(path)], ""), str(path), "argument --")  # type: ignore[misc]


def test_a_yaml_file_that_grows_when_it_is_shown_is_refused_without_showing_it(tmp_path: Path) -> None:
    """Ten aliases of ten each, nine times: a few hundred bytes whose repr is gigabytes."""
    path = tmp_path / "run.yaml"
    lists = ["&a0 [x]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))]
    path.write_text(f"task-name: [[{', '.join(lists)}]]")
    in_little_room(tmp_path / "child", lambda: read_or_refuse(lambda: parse_flags(Config, ["--config", str(path)], ""), str(path)))


def test_a_key_that_stands_twice_in_a_config_file_is_refused(tmp_path: Path) -> None:
    """The first of the two was forgotten without a word."""
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-4\ntotal-steps: 5\nlr: 1e-3\n")
    with pytest.raises(UserError, match=r"run\.yaml is not: 'lr' stands there twice"):
        parse_flags(Config, ["--config", str(path)], "")


def test_a_configuration_with_a_number_above_all_floats_is_refused() -> None:
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    with pytest.raises(UserError, match="layer_norm_epsilon"):
        read_model_config({"model_type": "gptj", **sizes, "layer_norm_epsilon": 10**400})
