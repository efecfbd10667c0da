"""Promises of the tasks: from a record to its text, what of it is learnt, and how an answer is read."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.ranks import REPOSITORY, SHARED

from tasks.examples import BadRecordError, BoundTask, Example, Record
from tasks.natural_instructions import InstructionRecords, InstructionTask
from tasks.prompts import TaskOptions, known_tasks, load_task_module, tasks_by_name
from user_error import UserError


def bound(name: str, *records: Record, module: str | None = None, **options: Any) -> BoundTask:
    def run_through() -> Iterator[Record]:
        return iter(records)

    return tasks_by_name(TaskOptions(**options), module)[name].bind(run_through)


def shown(example: Example) -> str:
    """As docs/tasks.md shows it."""
    return "".join(f"«{piece.text}»" if piece.is_target else piece.text for piece in example.pieces).replace("\n", "⏎")


def made(name: str, record: Record, **options: Any) -> str:
    return shown(bound(name, record, **options).example(record, None))


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("task", "record", "text"),
    [
        ("records", {"text": "Once upon a time", "meta": 1}, "«Once upon a time»"),
        ("records", {"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 =« 4»"),
        ("records", {"prompt": "2 + 2 = ", "completion": "4"}, "2 + 2 =« 4»"),
        ("records", {"prompt": "2 + 2\n", "completion": "4"}, "2 + 2⏎«4»"),
        ("records", {"inputs": "2 + 2 =", "targets": "4"}, "2 + 2 =« 4»"),
        ("records", {"messages": CHAT}, "<human>: Hi⏎<bot>:« Hello»"),
        (
            "records",
            {"messages": [{"role": "system", "content": "Be kind"}, *CHAT, *CHAT]},
            "<system>: Be kind⏎<human>: Hi⏎<bot>:« Hello»⏎<human>: Hi⏎<bot>:« Hello»",
        ),
        ("mnli", {"premise": "P", "hypothesis": "H", "label": "neutral"}, "mnli hypothesis: H premise: P target:« neutral»"),
        ("mnli", {"sentence1": "P", "sentence2": "H", "gold_label": 2}, "mnli hypothesis: H premise: P target:« contradiction»"),
        ("p3", {"inputs": "What?", "targets": " that "}, "What?⏎Answer:« that»"),
        ("p3", {"inputs": "What:", "targets": "that"}, "What:« that»"),
        ("cot", {"question": "Why?", "answer": "So."}, "Q: Why?⏎A:« So.»"),
        ("cot", {"name": "algebra", "text": "Q: .."}, "«Q: ..»"),
        ("pile", {"text": "x", "meta": {}}, "«x»"),
        ("classification", {"text": "buy", "label": "spam"}, "Classify the text as one of: spam.⏎Text: buy⏎Label:« spam»"),
    ],
)
def test_a_record_becomes_the_text_of_the_documentation(task: str, record: Record, text: str) -> None:
    assert made(task, record) == text


def test_classification_takes_columns_by_name_by_number_and_by_flag() -> None:
    rows = [{"1": "ham", "2": "hello"}, {"1": "spam", "2": "buy"}, {"1": "", "2": "?"}]
    task = bound("classification", *rows, text_column="2", label_column="1", classification_prompt="raw")
    assert task.labels == ("ham", "spam")
    assert shown(task.example(rows[1], None)) == "buy⏎« spam»"
    assert task.example(rows[1], None).label == "spam"
    with pytest.raises(BadRecordError, match=r"label '' .* is not one of ham, spam"):
        task.example(rows[2], None)
    with pytest.raises(UserError, match=r"no 'body' among Message, Category.*Name another"):
        bound("classification", {"Message": "a", "Category": "b"}, text_column="body")
    with pytest.raises(UserError, match=r"column of labels named label, category.*has text, kind"):
        bound("classification", {"text": "a", "kind": "b"})
    assert made("classification", {"Sentence": "a", "Intent": "b"}, classification_prompt="raw") == "a⏎« b»"


@pytest.mark.parametrize(
    ("task", "record", "seen"),
    [
        ("records", {"prompt": "  ", "completion": "a"}, "the prompt is empty"),
        ("records", {"prompt": "a", "completion": " "}, "the completion is empty"),
        ("records", {"prompt": "a"}, "its fields are prompt"),
        ("records", {"prompt": 1, "completion": "a"}, '"prompt" is a number instead of a string'),
        ("records", {"messages": []}, "one at least"),
        ("records", {"messages": "Hi"}, "must be an array"),
        ("records", {"messages": [{"role": "user", "content": "Hi"}]}, "nothing to learn"),
        ("records", {"messages": [{"role": "robot", "content": "Hi"}]}, "role 'robot'"),
        ("records", {"messages": [{"role": "assistant", "content": " "}]}, "is empty"),
        ("mnli", {"premise": "P", "hypothesis": "H", "label": "-"}, "label '-' is not one of"),
        ("mnli", {"premise": "P", "label": "neutral"}, "no hypothesis or sentence2; its fields are premise, label"),
        ("p3", {"inputs": "", "targets": "a"}, "the prompt is empty"),
        ("pile", {"inputs": "a", "targets": "b"}, "first record of the source has text"),
    ],
)
def test_what_a_task_cannot_use_is_said(task: str, record: Record, seen: str) -> None:
    with pytest.raises(BadRecordError, match=seen.replace("(", r"\(")):
        made(task, record)


def test_a_source_holds_records_of_one_form() -> None:
    first, other = {"text": "a"}, {"prompt": "a", "completion": "b"}
    with pytest.raises(BadRecordError, match="it has prompt and completion, while the first record of the source has text"):
        bound("records", first, other).example(other, None)


@pytest.mark.parametrize(
    ("generated", "labelled", "free"),
    [(" spam", "spam", "spam"), (" spam\nText: more", "spam", "spam\nText: more"), ("", "", ""), ("\n ham ", "ham", "ham")],
)
def test_answers_are_stripped_and_labels_are_their_first_line(generated: str, labelled: str, free: str) -> None:
    assert bound("classification", {"text": "a", "label": "spam"}).answer(generated) == labelled
    assert bound("records", {"prompt": "a", "completion": "b"}).answer(generated) == free


MODULE = """
from tasks.prompts import task

@task("reviews", labels=("good", "bad"), answer=lambda text: text.strip().lower(), default_path="./reviews.jsonl")
def reviews(record):
    return f"Review: {record['body']}\\\\nVerdict:", "good" if record["stars"] > 3 else record.get("word", "bad")

@task("lines")
def lines(record):
    return record["line"]
"""


def test_a_module_of_the_users_adds_tasks(tmp_path: Path) -> None:
    path = tmp_path / "my_tasks.py"
    path.write_text(MODULE.replace("\\\\n", "\\n"))
    tasks = tasks_by_name(TaskOptions(), str(path))
    assert set(tasks) == {*known_tasks(), "reviews", "lines"}
    assert tasks["reviews"].default_path == "./reviews.jsonl"
    task = bound("reviews", module=str(path))
    assert shown(task.example({"body": "fine", "stars": 5}, None)) == "Review: fine⏎Verdict:« good»"
    assert task.answer(" GOOD ") == "good"
    assert task.labels == ("good", "bad")
    with pytest.raises(BadRecordError, match="task reviews met KeyError: 'stars'; its fields are body"):
        task.example({"body": "fine"}, None)
    with pytest.raises(BadRecordError, match="label 'meh' is not one of good, bad"):
        task.example({"body": "fine", "stars": 1, "word": "meh"}, None)
    assert shown(bound("lines", module=str(path)).example({"line": "x"}, None)) == "«x»"


@pytest.mark.parametrize(
    ("made", "seen"),
    [
        ("Example(pieces=(Piece('a', False),))", "has none that is a target"),
        ("Example(pieces=('a', 'b'))", "not of Pieces"),
        ("Example(pieces=(Piece('a', False), Piece(' b', True)), label='c')", "label 'c' is not one of b"),
        ("17", "made int of it"),
        ("1 / 0", r"met ZeroDivisionError.*my_tasks\.py:4"),
    ],
)
def test_what_a_users_task_makes_is_looked_at(made: str, seen: str, tmp_path: Path) -> None:
    path = tmp_path / "my_tasks.py"
    path.write_text(
        "import functools\nfrom tasks.prompts import task\nfrom tasks.examples import Example, Piece\n"
        f"f = task('a', labels=('b',))(functools.partial(lambda record: {made}))\n"
    )
    with pytest.raises(BadRecordError, match=seen):
        bound("a", module=str(path)).example({"x": 1}, None)


@pytest.mark.parametrize(("answer", "seen"), [("text[0]", "it met IndexError"), ("len(text)", "it returned int")])
def test_an_answer_function_that_fails_is_said(answer: str, seen: str, tmp_path: Path) -> None:
    path = tmp_path / "my_tasks.py"
    path.write_text(f"from tasks.prompts import task\n@task('a', answer=lambda text: {answer})\ndef f(record):\n    return 'a', 'b'\n")
    with pytest.raises(UserError, match=f"takes generated text.*{seen}"):
        bound("a", module=str(path)).answer("")


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("x = 1\n", "has none. Mark one"),
        ("def f(:\n", r"my_tasks\.py:1: SyntaxError"),
        ("from tasks.prompts import task\ntask('a', labels='ab')\n", "the labels of a task are a list of strings"),
        ("from tasks.prompts import task\ntask('a', labels=())\n", "one at least"),
        ("import sys\nsys.exit(3)\n", r"my_tasks\.py:2: SystemExit"),
        ("\n\nprint(undefined)\n", r"my_tasks\.py:3: NameError"),
        ("from tasks.prompts import task\n@task('mnli')\ndef f(record):\n    return ''\n", "name 'mnli' exists already"),
        (
            "from tasks.prompts import task\n@task('a')\ndef f(record):\n    return ''\n@task('a')\ndef g(record):\n    return ''\n",
            "Rename",
        ),
    ],
)
def test_a_module_that_is_none_is_refused(source: str, seen: str, tmp_path: Path) -> None:
    path = tmp_path / "my_tasks.py"
    path.write_text(source)
    with pytest.raises(UserError, match=seen):
        tasks_by_name(TaskOptions(), str(path))
    with pytest.raises(UserError, match=r"is no file\. Check the path"):
        load_task_module(str(tmp_path / "none.py"))


def instructions(folder: Path, definition: Any, outputs: list[list[str]]) -> Path:
    (folder / "tasks").mkdir(parents=True)
    instances = [{"id": str(n), "input": f"question {n}", "output": output} for n, output in enumerate(outputs)]
    (folder / "tasks" / "task1.json").write_text(json.dumps({"Definition": definition, "Instances": instances}))
    (folder / "splits" / "default").mkdir(parents=True)
    (folder / "splits" / "default" / "train_tasks.txt").write_text("task1\n")
    return folder


@pytest.mark.parametrize("definition", ["Answer the question.", ["Answer the question."]])
def test_a_definition_is_a_string_or_a_list(definition: Any, tmp_path: Path) -> None:
    records = InstructionRecords(instructions(tmp_path, definition, [["a"], ["b", "c"]]))
    assert len(records) == 2
    where, record = records[1]
    assert where.endswith("task1.json: instance 2")
    asked = InstructionTask(lambda: iter(())).example(record, None)
    assert shown(asked) == "Answer the question.⏎⏎Input: question 1⏎Output:« b»"
    assert asked.as_good == ("b", "c"), "either is right"


def test_a_page_holds_its_own_instance_and_others_and_is_drawn_by_its_place_alone(tmp_path: Path) -> None:
    records = InstructionRecords(instructions(tmp_path, "Answer.", [[f"answer {n % 3}"] for n in range(200)]))
    task = InstructionTask(lambda: iter(()))
    pages = [task.example(records[17][1], Random(seed)) for seed in range(60)]
    assert shown(pages[3]) == shown(task.example(records[17][1], Random(3)))
    for page in pages:
        assert "question 17" in page.text
        assert page.pieces[-1].is_target
        assert sum(piece.is_target for piece in page.pieces) > 5
        assert len(page.text) < 8000
    assert len({page.text for page in pages}) == 60
    defined, listed = (sum(word in page.text for page in pages) for word in ("Answer.", "Possible labels:"))
    assert 25 < defined < 55, "two of three"
    assert 15 < listed < 45, "half of those of tasks with few labels"


def test_instructions_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no task"):
        InstructionRecords(tmp_path)
    folder = instructions(tmp_path / "a", "x", [["y"]])
    (folder / "splits" / "default" / "train_tasks.txt").write_text("task1\ntask2\n")
    with pytest.raises(UserError, match=r"names task2\.json"):
        InstructionRecords(folder)
    (tmp_path / "b.json").write_text('{"Instances": []}')
    with pytest.raises(UserError, match=r'under "Instances"'):
        InstructionRecords(tmp_path / "b.json")


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data")
def test_real_instructions_are_read() -> None:
    records = InstructionRecords(SHARED / "data" / "ni")
    assert len(records) == 231 + 142 + 94 + 992
    task = InstructionTask(lambda: iter(()))
    for index in range(0, len(records), 97):
        assert task.example(records[index][1], Random(index)).pieces[-1].is_target


def test_the_documentation_shows_what_is_made() -> None:
    page = (REPOSITORY / "docs" / "tasks.md").read_text()
    rows = [row.split("|") for row in page.splitlines() if row.startswith("| `{")]
    assert len(rows) == 4
    for _, record, text, _ in rows:
        assert made("records", json.loads(record.strip().strip("`"))) == text.strip().strip("`")
    own = page.split("```python\n")[1].split("```")[0]
    assert "@task(" in own
    for name in known_tasks():
        assert f"`{name}`" in page or name == "records"
