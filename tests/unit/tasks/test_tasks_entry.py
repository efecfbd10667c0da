"""A resumed run enters a source at any place of any pass and reads on as if it had walked there: for every kind of source."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tasks.prompts import TaskOptions, tasks_by_name
from tasks.readers import Documents, ReadingRules, open_documents
from tasks.task_list import parse_task_list

NUM = 37
WINDOW = 8
LABELS = ("a", "b", "c")
ROWS = [{"text": f"text {n}\nits second line", "label": LABELS[0 if n % 2 else n % 3]} for n in range(NUM)]


def as_lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, str]]) -> bytes:
    content = io.StringIO()
    writer = csv.DictWriter(content, ["text", "label"])
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue().encode()


def put_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=5)


def put_folder(path: Path) -> None:
    path.mkdir()
    (path / "1.jsonl").write_bytes(as_lines(ROWS[:20]))
    (path / "2.csv").write_bytes(as_csv(ROWS[20:]))


def put_mixed_folder(path: Path) -> None:
    path.mkdir()
    (path / "1.jsonl").write_bytes(as_lines(ROWS[:20]))
    (path / "2.csv.zst").write_bytes(zstandard.compress(as_csv(ROWS[20:])))


def put_instructions(path: Path) -> None:
    path.mkdir()
    for name, rows in (("task1", ROWS[:20]), ("task2", ROWS[20:])):
        instances = [{"input": row["text"], "output": [row["label"]]} for row in rows]
        (path / f"{name}.json").write_text(json.dumps({"Definition": ["Do."], "Instances": instances}))


def plain(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


KINDS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": plain(as_lines(ROWS)),
    "blank.jsonl": plain(as_lines(ROWS).replace(b"\n", b"\n\n")),
    "a.jsonl.zst": plain(zstandard.compress(as_lines(ROWS))),
    "a.jsonl.gz": plain(gzip.compress(as_lines(ROWS))),
    "array.json": plain(json.dumps(ROWS).encode()),
    "a.csv": plain(as_csv(ROWS)),
    "a.csv.zst": plain(zstandard.compress(as_csv(ROWS))),
    "a.tsv": plain(b"text\tlabel\n" + b"".join(b"text %d\t%s\n" % (n, row["label"].encode()) for n, row in enumerate(ROWS))),
    "a.parquet": put_parquet,
    "folder": put_folder,
    "mixed": put_mixed_folder,
    "ni": put_instructions,
    "hf": put_folder,
}


def opened(kind: str, folder: Path, **rules: Any) -> Documents:
    path = folder / kind
    if not path.exists():
        KINDS[kind](path)
    if kind == "hf":
        pytest.importorskip("datasets")
        (path / "2.csv").unlink(missing_ok=True)
    source = {"ni": f"ni={path}", "hf": f"hf:{path}"}.get(kind, f"{rules.pop('task', 'records')}={path}")
    (spec,) = parse_task_list(source)
    return open_documents(spec, tasks_by_name(TaskOptions()), seed=5, place=2, rules=ReadingRules(shuffle_window=WINDOW, **rules))


Found = tuple[tuple[int, int], str, str]


def walk(documents: Documents, start: tuple[int, int], num: int) -> list[Found]:
    found: list[Found] = []
    place = start
    for _ in range(num):
        document = documents.next_good(*place)
        at = (document.pass_index, document.position)
        found.append((at, document.where, document.example.text))
        place = (at[0], at[1] + 1)
    documents.close()
    return found


def check_entries(kind: str, folder: Path, **rules: Any) -> list[Found]:
    num = sum(1 for _ in opened(kind, folder, **dict(rules, balance_labels=False)).in_order())
    walked = walk(opened(kind, folder, **rules), (0, 0), 2 * num + 3)
    for start in (0, 1, WINDOW, num - 1, num, num + 5, 2 * num - 1):
        assert walk(opened(kind, folder, **rules), walked[start][0], 4) == walked[start : start + 4]
    return walked


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_entered_anywhere_reads_on_as_if_walked(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    walked = check_entries(kind, tmp_path)
    passes = [[where for (at, _), where, _ in walked if at == pass_index] for pass_index in (0, 1)]
    assert sorted(passes[0]) == sorted(passes[1])
    assert len(set(passes[0])) == len(passes[0])
    assert passes[0] != passes[1]


@pytest.mark.parametrize("kind", ["a.jsonl", "a.jsonl.zst", "mixed", "ni"])
def test_so_does_one_of_few_samples(kind: str, tmp_path: Path) -> None:
    check_entries(kind, tmp_path, max_samples=13)


@pytest.mark.parametrize("max_samples", [None, 13])
def test_so_does_a_balanced_one(max_samples: int | None, tmp_path: Path) -> None:
    check_entries("a.csv", tmp_path, task="classification", balance_labels=True, max_samples=max_samples)
