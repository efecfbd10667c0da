"""Natural Instructions: which files are read, what an evaluation asks, and the pages that a training draws."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.ranks import SHARED

from tasks.examples import BadRecordError, Example
from tasks.natural_instructions import FEW_LABELS, NOTATIONS, PAGE_CHARS, InstructionRecords, InstructionTask
from tasks.prompts import TaskOptions, tasks_by_name
from tasks.readers import Documents, ReadingRules, open_documents
from tasks.task_list import parse_task_list
from user_error import UserError

REAL = SHARED / "data" / "ni" / "tasks"
DRAWS = 300

TASK: dict[str, Any] = {
    "Definition": ["Say whether ", "it is so.\n"],
    "Instances": [{"input": f"Is {number} odd?", "output": ["yes" if number % 2 else "no"]} for number in range(20)],
}


def put(path: Path, content: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content or TASK))
    return path


def pages(content: dict[str, Any], folder: Path, *, number: int = 3, draws: int = DRAWS) -> list[Example]:
    _, record = InstructionRecords(put(folder / "task1.json", content))[number]
    task = InstructionTask(lambda: iter(()))
    return [task.example(record, Random(seed)) for seed in range(draws)]


def opened(item: str, **rules: Any) -> Documents:
    (spec,) = parse_task_list(item)
    return open_documents(spec, tasks_by_name(TaskOptions()), seed=1, place=0, rules=ReadingRules(**rules))


@pytest.mark.parametrize("definition", ["Do it.", ["Do it."], [" Do it.\n"]])
def test_a_definition_is_a_string_or_a_list_of_them(tmp_path: Path, definition: Any) -> None:
    _, record = InstructionRecords(put(tmp_path / "a.json", {**TASK, "Definition": definition}))[1]
    asked = InstructionTask(lambda: iter(())).example(record, None)
    assert (asked.prompt, asked.completion) == ("Do it.\n\nInput: Is 1 odd?\nOutput:", " yes")


def test_an_evaluation_asks_for_the_first_output_of_the_one_instance() -> None:
    asked = InstructionTask(lambda: iter(())).example({"Definition": "Do.", "input": " a\n", "output": ["b", "c"]}, None)
    assert [(piece.text, piece.is_target) for piece in asked.pieces] == [("Do.\n\n", False), ("Input: a\nOutput:", False), (" b", True)]


def test_a_page_is_drawn_around_its_record_and_the_same_draw_gives_the_same_page(tmp_path: Path) -> None:
    found = pages(TASK, tmp_path)
    assert found == pages(TASK, tmp_path)
    for page in found:
        assert page.text.count("Is 3 odd?") == 1, "the record the page is for stands in it, once"
        shown = [piece.text for piece in page.pieces if piece.is_target]
        assert set(shown) == {" yes", " no"}
        assert all(
            before.text.endswith((":", "->")) for before, piece in zip(page.pieces, page.pieces[1:], strict=False) if piece.is_target
        )
    places = {[piece.text.find("Is 3 odd?") >= 0 for piece in page.pieces if "odd?" in piece.text].index(True) for page in found}
    assert places == set(range(8)), "it stands first, last, and anywhere among the first"


def share(found: list[Example], text: str) -> float:
    return sum(page.text.startswith(text) or f"\n{text}" in page.text for page in found) / len(found)


def test_definition_labels_and_notation_come_as_often_as_promised(tmp_path: Path) -> None:
    found = pages(TASK, tmp_path)
    deviation = 4 * (0.25 / DRAWS) ** 0.5  # four standard deviations at most
    assert share(found, "Say whether\nit is so.") == pytest.approx(2 / 3, abs=deviation)
    assert share(found, "Possible labels:\n1. no\n2. yes") == pytest.approx(1 / 2, abs=deviation)
    for _, asking in NOTATIONS:
        assert any(f"{asking} yes" in page.text for page in found)


def test_labels_are_listed_for_tasks_with_few_alone(tmp_path: Path) -> None:
    for num, is_listed in ((FEW_LABELS, True), (FEW_LABELS + 1, False)):
        instances = [{"input": f"i{n}", "output": [f"o{n % num}"]} for n in range(24)]
        found = pages({**TASK, "Instances": instances}, tmp_path, draws=40)
        assert any("Possible labels" in page.text for page in found) == is_listed


def test_a_page_ends_after_about_a_thousand_tokens(tmp_path: Path) -> None:
    instances = [{"input": "x" * 300, "output": ["y"]} for _ in range(100)]
    for page in pages({**TASK, "Instances": instances}, tmp_path, draws=30):
        assert PAGE_CHARS < len(page.text) < PAGE_CHARS + 1000
    (page,) = pages({**TASK, "Instances": instances[:1]}, tmp_path, number=0, draws=1)
    assert page.text.count("x" * 300) == 1


def test_instances_are_records_in_the_order_of_their_files(tmp_path: Path) -> None:
    put(tmp_path / "tasks" / "task2.json")
    put(tmp_path / "tasks" / "task1.json", {**TASK, "Instances": TASK["Instances"][:2]})
    put(tmp_path / "tasks" / "task3.json")
    records = InstructionRecords(tmp_path)
    assert len(records) == 42
    assert [records[index][0].rpartition("/")[2] for index in (0, 1, 2, 41)] == [
        "task1.json: instance 1",
        "task1.json: instance 2",
        "task2.json: instance 1",
        "task3.json: instance 20",
    ]
    for index in (-1, 42):
        with pytest.raises(IndexError):
            records[index]
    put(tmp_path / "splits" / "default" / "train_tasks.txt", "task3\ntask1\n")
    records = InstructionRecords(tmp_path)
    assert [len(records), records[0][1]["task"], records[20][1]["task"]] == [22, "task3", "task1"]
    assert [file.name for file in records.fingerprinted] == ["task3.json", "task1.json"]


def test_a_listed_task_that_is_missing_is_named(tmp_path: Path) -> None:
    put(tmp_path / "tasks" / "task1.json")
    put(tmp_path / "splits" / "default" / "train_tasks.txt", "task1\ntask2\n")
    with pytest.raises(UserError, match=r"train_tasks\.txt names task2\.json, not in .*Fetch them, or shorten the list"):
        InstructionRecords(tmp_path)
    (tmp_path / "splits" / "default" / "train_tasks.txt").write_text("")
    with pytest.raises(UserError, match="holds no task"):
        InstructionRecords(tmp_path)
    (tmp_path / "splits" / "default" / "train_tasks.txt").write_bytes(b"task1\xff\n")
    with pytest.raises(UserError, match=r"train_tasks\.txt.*utf-8"):
        InstructionRecords(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no task\. Check the path"):
        InstructionRecords(tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        ("{", "must be one JSON object in UTF-8; .*Fetch it again"),
        ("[" * 100_000, "must be one JSON object in UTF-8"),
        ('{"Definition": "a", "Definition": "b", "Instances": [{}]}', "the key 'Definition' stands in it twice"),
        ('{"Definition": "a", "Instances": [{"input": "a", "input": "b"}]}', "the key 'input' stands in it twice"),
        ("[]", 'an array of objects under "Instances"; .* has none'),
        ('{"Definition": "a"}', 'an array of objects under "Instances"'),
        ('{"Definition": "a", "Instances": []}', 'an array of objects under "Instances"'),
        ('{"Definition": "a", "Instances": ["b"]}', 'an array of objects under "Instances"'),
    ],
)
def test_a_file_that_is_no_task_is_named(tmp_path: Path, content: str, seen: str) -> None:
    with pytest.raises(UserError, match=rf"a\.json.*{seen}|{seen}"):
        InstructionRecords(put(tmp_path / "a.json", content))


@pytest.mark.parametrize(
    ("record", "seen"),
    [
        ({"input": "a", "output": "b"}, 'under "Definition"'),
        ({"Definition": [], "input": "a", "output": "b"}, 'under "Definition"'),
        ({"Definition": [1], "input": "a", "output": "b"}, 'under "Definition"'),
        ({"Definition": "Do.", "output": "b"}, 'a string under "input"'),
        ({"Definition": "Do.", "input": "a"}, 'under "output"'),
        ({"Definition": "Do.", "input": "a", "output": []}, 'under "output"'),
        ({"Definition": "Do.", "input": "a", "output": [1]}, 'under "output"'),
        ({"Definition": "Do.", "input": "a", "output": " "}, "the completion is empty"),
        ({"Definition": "Do.", "Instances": [{"input": "a", "output": "b"}]}, r"a whole task in one record.*one \.json file per task"),
    ],
)
@pytest.mark.parametrize("draw", [None, Random(0)], ids=["evaluation", "training"])
def test_a_line_that_is_no_instance_is_a_bad_record(record: dict[str, Any], seen: str, draw: Random | None) -> None:
    with pytest.raises(BadRecordError, match=seen):
        InstructionTask(lambda: iter(())).example(record, draw)


@pytest.mark.parametrize("bad", [{"input": "a"}, {"input": 1, "output": ["b"]}, {"input": "a", "output": [" "]}])
def test_a_bad_instance_is_left_out_and_spoils_no_other_ones_page(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = put(tmp_path / "a.json", {**TASK, "Instances": [*TASK["Instances"][:5], bad, *TASK["Instances"][5:]]})
    with pytest.raises(UserError, match=r"a\.json: instance 6: .*--on-bad-record skip"):
        opened(f"ni={path}")
    documents = opened(f"ni={path}", on_bad_record="skip")
    assert len(list(documents.in_order())) == 20
    places, num_skipped, at = 0, 0, 0
    while (document := documents.next_good(0, at)).pass_index == 0:
        places, num_skipped, at = places + 1, num_skipped + document.num_skipped, document.position + 1
        assert document.where != f"{path}: instance 6"
    assert (places, num_skipped + document.num_skipped) == (20, 1)


@pytest.mark.skipif(not REAL.is_dir(), reason="no shared data here")
def test_the_real_tasks_are_read_instance_by_instance() -> None:
    nums = {file.name: len(json.loads(file.read_text())["Instances"]) for file in sorted(REAL.glob("*.json"))}
    documents = opened(f"ni={REAL}")
    assert sum(1 for _ in documents.in_order()) == sum(nums.values())
    country = REAL / "task1146_country_capital.json"
    instances = json.loads(country.read_text())["Instances"]
    first, *_ = opened(f"ni={country}").in_order()
    assert first.example.completion == f" {instances[0]['output'][0]}"
    assert first.example.prompt.endswith(f"Input: {instances[0]['input']}\nOutput:")
