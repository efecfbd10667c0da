"""docs/tasks.md: what its tables say of records is what the tasks make of them, and its Python runs as it stands there, at toy size."""

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.models import make_model, make_tokenizer
from support.ranks import REPOSITORY, fork, free_port

from tasks.examples import Example
from tasks.prompts import TaskOptions, tasks_by_name
from tasks.task_list import parse_task_list

TEXT = (REPOSITORY / "docs" / "tasks.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
WORKED = re.findall(r"^\| `(\{.*\})` \| `(.*)` \|$", TEXT, re.MULTILINE)
NAMED: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "mnli": ([{"premise": "P", "hypothesis": "H", "label": 1}], {}),
    "classification": ([{"text": "T", "label": "ham"}, {"text": "U", "label": "spam"}], {}),
    "classification, raw": ([{"text": "T", "label": "ham"}, {"text": "U", "label": "spam"}], {"classification_prompt": "raw"}),
    "cot": ([{"question": "..", "answer": ".."}], {}),
}


def shown(example: Example) -> str:
    """As the page writes it."""
    return "".join(f"«{piece.text}»" if piece.is_target else piece.text for piece in example.pieces).replace("\n", "⏎")


def test_every_form_of_a_record_is_worked_out_as_the_page_says() -> None:
    assert len(WORKED) == 4
    for source, text in WORKED:
        record = json.loads(source)
        bound = tasks_by_name(TaskOptions())["records"].bind(lambda record=record: iter([record]))  # type: ignore[misc]
        assert shown(bound.example(record, None)) == text


@pytest.mark.parametrize("name", NAMED)
def test_named_tasks_make_the_texts_that_the_page_shows(name: str) -> None:
    records, options = NAMED[name]
    task = name.partition(",")[0]
    bound = tasks_by_name(TaskOptions(**options))[task].bind(lambda: iter(records))
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{task}`"))
    assert f"`{shown(bound.example(records[0], None))}`" in row


def test_the_page_has_a_row_for_every_named_task() -> None:
    rows = "".join(re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE))
    assert not [name for name in tasks_by_name(TaskOptions()) if name != "records" and f"`{name}`" not in rows]


def test_the_grammar_and_the_quoted_item_parse() -> None:
    grammar = re.search(r"\[:WEIGHT\],\.\.\. +(\S+)", TEXT)
    quoted = re.search(r"`(classification=\".*?)`", TEXT)
    assert grammar and quoted
    specs = parse_task_list(grammar[1])
    assert [(spec.name, spec.weight) for spec in specs] == [
        ("mnli=mnli.jsonl", 0.5),
        ("my_chats.jsonl", pytest.approx(0.3)),
        ("hf:owner/name@train", pytest.approx(0.2)),
    ]
    (spec,) = parse_task_list(quoted[1])
    assert (spec.task, spec.source) == ("classification", "odd, name.csv")


def test_the_task_of_ones_own_loads_and_asks(tmp_path: Path) -> None:
    module = tmp_path / "my_tasks.py"
    module.write_text(CODE[0])
    record = {"body": "Fine.", "stars": 5}
    bound = tasks_by_name(TaskOptions(), str(module))["reviews"].bind(lambda: iter([record]))
    example = bound.example(record, None)
    assert (shown(example), example.label) == ("Review: Fine.⏎Verdict:« good»", "good")
    assert bound.labels == ("good", "bad")


def test_the_python_example_trains_and_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "hub", n_positions=128)
    make_tokenizer(tmp_path / "hub")
    shutil.copytree(tmp_path / "hub", tmp_path / "pretrained_models" / "tiny")
    for name, start in (("train.csv", 0), ("held_out.csv", 40)):
        rows = [f"dog {n},{'good' if n % 2 else 'bad'}" for n in range(start, start + 12)]
        (tmp_path / name).write_text("\n".join(["text,label", *rows, ""]))
    code = CODE[1].replace("total_steps=200,", f'total_steps=2, device="cpu", num_threads=1, dist_url="tcp://127.0.0.1:{free_port()}",')
    code = code.replace("num_shots=2)", f'num_shots=2, device="cpu", num_threads=1, dist_url="tcp://127.0.0.1:{free_port()}")')
    assert "total_steps=2," in code and code.count("tcp://") == 2
    (tmp_path / "example.py").write_text(code)
    monkeypatch.chdir(tmp_path)

    def work() -> int:
        runpy.run_path(str(tmp_path / "example.py"))
        return 0

    process = fork(work, tmp_path / "said.txt")
    try:
        assert process.wait(90) == 0, process.text
    finally:
        process.kill()
    assert (tmp_path / "runs" / "labels" / "2" / "manifest.json").exists()
    assert "12 examples" in process.text and "generated answers" in process.text and "likeliest labels" in process.text
