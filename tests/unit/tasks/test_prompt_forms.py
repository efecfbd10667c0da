"""From a record to a prompt and what is learnt behind it: the forms of plain records, the named tasks, and those of a user's own file."""

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tasks.examples import BadRecordError, BoundTask, Example, Record
from tasks.prompts import TaskOptions, default_path, known_tasks, load_task_module, task, tasks_by_name
from tasks.readers import ReadingRules, open_documents
from tasks.task_list import parse_task_list
from user_error import UserError


def bound(name: str, *records: Record, options: TaskOptions | None = None) -> BoundTask:
    return tasks_by_name(options or TaskOptions())[name].bind(lambda: iter(records))


def made(name: str, record: Record, **options: Any) -> Example:
    return bound(name, record, options=TaskOptions(**options)).example(record, None)


def marked(example: Example) -> str:
    """What is to be learnt in [brackets]."""
    return "".join(f"[{piece.text}]" if piece.is_target else piece.text for piece in example.pieces)


SAID = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Ho."}]


@pytest.mark.parametrize(
    ("name", "record", "wanted"),
    [
        ("records", {"text": " a\n", "meta": {}}, "[ a\n]"),
        ("records", {"prompt": "Is it?", "completion": " yes"}, "Is it?[ yes]"),
        ("records", {"prompt": "Is it? ", "completion": "yes"}, "Is it?[ yes]"),
        ("records", {"prompt": "Is it?\n", "completion": "yes"}, "Is it?\n[yes]"),
        ("records", {"prompt": "2+2=", "completion": "4"}, "2+2=[4]"),
        ("records", {"inputs": "Is it?", "targets": "yes"}, "Is it?[ yes]"),
        ("records", {"inputs": "Is it? ", "targets": "yes"}, "Is it?[ yes]"),
        ("records", {"inputs": "Is it?\n", "targets": "yes"}, "Is it?\n[yes]"),
        ("records", {"messages": SAID}, "<system>: Be short.\n<human>: Hi!\n<bot>:[ Ho.]"),
        ("records", {"messages": [*SAID[1:], *SAID[1:]]}, "<human>: Hi!\n<bot>:[ Ho.]\n<human>: Hi!\n<bot>:[ Ho.]"),
        ("mnli", {"premise": "p", "hypothesis": "h", "label": 1}, "mnli hypothesis: h premise: p target:[ neutral]"),
        ("mnli", {"premise": "p", "hypothesis": "h", "label": "2"}, "mnli hypothesis: h premise: p target:[ contradiction]"),
        (
            "mnli",
            {"sentence1": "p", "sentence2": "h", "gold_label": "entailment"},
            "mnli hypothesis: h premise: p target:[ entailment]",
        ),
        ("cot", {"text": "Q: 1\nA: 2"}, "[Q: 1\nA: 2]"),
        ("cot", {"question": "1+1?", "answer": "So 2.\n#### 2"}, "Q: 1+1?\nA:[ So 2.\n#### 2]"),
        ("p3", {"inputs": "Is it?", "targets": " yes\n"}, "Is it?\nAnswer:[ yes]"),
        ("p3", {"inputs": "Is it? Answer:", "targets": "yes"}, "Is it? Answer:[ yes]"),
        ("p3", {"inputs": "Is it? Answer: ", "targets": "yes"}, "Is it? Answer:[ yes]"),
        ("pile", {"text": "a", "meta": {"pile_set_name": "b"}}, "[a]"),
        ("natural_instructions", {"Definition": "Do.", "input": "a", "output": "b"}, "Do.\n\nInput: a\nOutput:[ b]"),
    ],
)
def test_a_record_becomes_text_and_what_is_learnt_of_it(name: str, record: Record, wanted: str) -> None:
    assert marked(made(name, record)) == wanted


@pytest.mark.parametrize(
    ("name", "record", "seen"),
    [
        ("records", {"body": "a", "id": 1}, r'"text".*"messages"; its fields are body, id'),
        ("records", {}, "its fields are none"),
        ("records", {"prompt": "", "completion": "a"}, "the prompt is empty"),
        ("records", {"prompt": " \n", "completion": "a"}, "the prompt is empty"),
        ("records", {"prompt": "a", "completion": " "}, "the completion is empty"),
        ("records", {"inputs": "a", "targets": 3}, '"targets" is a number instead of a string'),
        ("records", {"messages": []}, "one at least"),
        ("records", {"messages": "Hi!"}, "must be an array of objects"),
        ("records", {"messages": ["Hi!"]}, "message 1 is a string instead of an object"),
        ("records", {"messages": [{"role": "user"}]}, 'there is no "content"; its fields are role'),
        ("records", {"messages": [SAID[1], {"role": "robot", "content": "Ho."}]}, "message 2 has role 'robot'; roles are user, human"),
        ("records", {"messages": [SAID[1], {"role": "bot", "content": " "}]}, "message 2, of role bot, is empty"),
        ("records", {"messages": SAID[:2]}, "no message is the assistant's"),
        ("mnli", {"premise": "p", "hypothesis": "h", "label": -1}, r"label -1 is not one of entailment, .* 0, 1, 2"),
        ("mnli", {"premise": "p", "hypothesis": "h", "label": True}, "label True is not one of"),
        ("mnli", {"premise": "p", "hypothesis": "h", "label": None}, "label None is not one of"),
        ("mnli", {"premise": "p", "hypothesis": "h", "label": ["neutral"]}, "is not one of entailment"),
        ("mnli", {"premise": "p", "label": 0}, "there is no hypothesis or sentence2; its fields are premise, label"),
        ("mnli", {"premise": "p", "hypothesis": "h"}, "there is no label or gold_label"),
        ("cot", {"question": " ", "answer": None}, '"answer" is null'),
        ("p3", {"inputs": " ", "targets": "a"}, "the prompt is empty"),
        ("p3", {"inputs": "a", "targets": " "}, "the completion is empty"),
        ("pile", {"prompt": "a", "completion": "b"}, "it has prompt and completion"),
    ],
)
def test_a_record_that_does_not_do_says_what_was_seen(name: str, record: Record, seen: str) -> None:
    with pytest.raises(BadRecordError, match=seen):
        made(name, record)


def test_a_source_holds_records_of_the_form_that_its_first_one_has() -> None:
    pair, text = {"prompt": "a", "completion": "b"}, {"text": "a"}
    mixed = bound("records", pair, text)
    assert marked(mixed.example(pair, None)) == "a[b]"
    with pytest.raises(BadRecordError, match="it has text, while the first record of the source has prompt and completion"):
        mixed.example(text, None)


def test_mixed_forms_are_told_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"inputs": "b", "targets": "c"}\n')
    (spec,) = parse_task_list(str(path))
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*it has inputs and targets, while .* has text.*--on-bad-record skip"):
        open_documents(spec, tasks_by_name(TaskOptions()), seed=0, place=0)


ROWS: tuple[Mapping[str, Any], ...] = (
    {"id": 1, "Text": " Go on ", "Category": "ham"},
    {"id": 2, "Text": "Win now", "Category": " spam "},
    {"id": 3, "Text": "Hi", "Category": "ham"},
)


def test_classification_asks_for_one_of_the_labels_it_found() -> None:
    found = bound("classification", *ROWS)
    assert found.labels == ("ham", "spam")
    assert marked(found.example(ROWS[1], None)) == "Classify the text as one of: ham, spam.\nText: Win now\nLabel:[ spam]"
    assert [found.example(row, None).label for row in ROWS] == ["ham", "spam", "ham"]
    assert found.completion_of("ham") == " ham"
    raw = bound("classification", *ROWS, options=TaskOptions(classification_prompt="raw"))
    assert marked(raw.example(ROWS[0], None)) == "Go on\n[ ham]"


def test_columns_of_a_classification_can_be_named() -> None:
    asked = TaskOptions(text_column="Category", label_column="id", classification_prompt="raw")
    found = bound("classification", *ROWS, options=asked)
    assert found.labels == ("1", "2", "3")
    assert marked(found.example(ROWS[0], None)) == "ham\n[ 1]"


@pytest.mark.parametrize(
    ("options", "row", "seen"),
    [
        ({"text_column": "body"}, ROWS[0], r"--text-column must be a column of the file; there is no 'body' among id, Text, Category"),
        ({"label_column": "y"}, ROWS[0], r"--label-column must be a column of the file; there is no 'y' among id, Text, Category"),
        ({}, {"a": "b", "label": "c"}, r"needs a column of texts named text, sentence, .*; the file has a, label.*--text-column"),
        ({}, {"text": "b", "c": "d"}, r"needs a column of labels named label, category, .*; the file has text, c.*--label-column"),
    ],
)
def test_an_unknown_column_lists_those_there_are(options: dict[str, str], row: Record, seen: str) -> None:
    with pytest.raises(UserError, match=seen):
        bound("classification", row, options=TaskOptions(**options))  # type: ignore[arg-type]


def test_rows_without_text_or_label_are_bad_records() -> None:
    found = bound("classification", *ROWS)
    for row, seen in (
        ({"id": 4, "Text": " ", "Category": "ham"}, r"the prompt is empty \(column Text\)"),
        ({"id": 4, "Text": None, "Category": "ham"}, r"the prompt is empty \(column Text\)"),
        ({"id": 4, "Text": "a", "Category": ""}, r"label '' \(column Category\) is not one of ham, spam"),
        ({"id": 4, "Text": "a", "Category": "eggs"}, r"label 'eggs' \(column Category\) is not one of ham, spam"),
    ):
        with pytest.raises(BadRecordError, match=seen):
            found.example(row, None)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_fewer_samples_change_no_prompt(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    rows = [{"text": f"t{number}", "label": f"l{number}"} for number in range(9)]
    path.write_text(
        "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)
        if ending == "csv"
        else "".join(json.dumps(row) + "\n" for row in rows)
    )
    (spec,) = parse_task_list(f"classification={path}")
    documents = open_documents(spec, tasks_by_name(TaskOptions()), seed=0, place=0, rules=ReadingRules(max_samples=2))
    assert documents.task.labels == tuple(f"l{number}" for number in range(9))
    assert len(list(documents.in_order())) == 2
    documents.close()


@pytest.mark.parametrize(
    ("name", "generated", "answer"),
    [
        ("mnli", " neutral", "neutral"),
        ("mnli", "\n neutral \nand so on", "neutral"),
        ("mnli", "", ""),
        ("records", " a\nb \n", "a\nb"),
        ("p3", " a\nb \n", "a\nb"),
        ("natural_instructions", " a\nb \n", "a\nb"),
    ],
)
def test_an_answer_is_the_first_line_where_there_are_labels_else_all_of_it(name: str, generated: str, answer: str) -> None:
    assert bound(name, {"text": "a"}).answer(generated) == answer


def test_every_known_task_has_its_default_path_and_draws_nothing_but_instructions() -> None:
    assert {name for name in known_tasks() if default_path(name)} == {"cot", "ni", "natural_instructions"}
    drawing = {name for name in known_tasks() if bound(name, {"text": "a", "label": "b"}).draws}
    assert drawing == {"ni", "natural_instructions"}
    assert [name for name, each in tasks_by_name(TaskOptions()).items() if each.name != name] == []


MODULE = """
from tasks.examples import Example, Piece
from tasks.prompts import task

@task("reviews", labels=("good", "bad"), default_path="/data/reviews.jsonl")
def reviews(record):
    return f"Review: {record['body']}\\nVerdict:", "good" if record["stars"] > 3 else record.get("verdict", "bad")

@task("sums", answer=lambda generated: generated.rpartition("####")[2].strip())
def sums(record):
    return record["question"] + "\\n", record["answer"]

@task("texts")
def texts(record):
    return record["body"]

@task("turns")
def turns(record):
    return Example(pieces=(Piece("a", False), Piece("b", True), Piece("c", False)))

@task("wrong")
def wrong(record):
    return undefined + record["body"]
"""


@pytest.fixture(name="module")
def a_module(tmp_path: Path) -> Path:
    path = tmp_path / "my_tasks.py"
    path.write_text(MODULE)
    return path


def test_tasks_of_ones_own_make_pairs_texts_or_examples(module: Path) -> None:
    own = tasks_by_name(TaskOptions(), str(module))
    assert list(own)[-5:] == ["reviews", "sums", "texts", "turns", "wrong"]
    record = {"body": "Fine.", "stars": 5, "question": "1+1?", "answer": "So\n#### 2"}
    bind = {name: own[name].bind(lambda: iter([record])) for name in list(own)[-5:]}
    reviewed = bind["reviews"].example(record, Random(0))
    assert (marked(reviewed), reviewed.label) == ("Review: Fine.\nVerdict:[ good]", "good")
    assert marked(bind["sums"].example(record, None)) == "1+1?\n[So\n#### 2]"
    assert marked(bind["texts"].example(record, None)) == "[Fine.]"
    assert marked(bind["turns"].example(record, None)) == "a[b]c"
    assert bind["reviews"].labels == ("good", "bad")
    assert bind["reviews"].answer(" good\nIt is.") == "good"
    assert bind["sums"].answer(" 1+1 = 2\n#### 2 ") == "2"
    assert bind["texts"].labels is None
    (spec,) = parse_task_list("reviews", own)
    assert spec.source == "/data/reviews.jsonl"


@pytest.mark.parametrize(
    ("name", "record", "seen"),
    [
        ("reviews", {"stars": 1}, r"task reviews met KeyError: 'body'; its fields are stars \(my_tasks\.py:7\)"),
        ("reviews", {"body": "a", "stars": "5"}, r"task reviews met TypeError: .*; its fields are body, stars"),
        ("reviews", {"body": "a", "stars": 1, "verdict": "so so"}, "label 'so so' is not one of good, bad"),
        ("sums", {"question": "", "answer": "a"}, "the prompt is empty"),
        ("sums", {"question": "a", "answer": ""}, "the completion is empty"),
        ("texts", {"body": 3}, r"task texts made int of it instead of \(prompt, completion\), a text or an Example"),
        ("wrong", {"body": "a"}, r"task wrong met NameError: name 'undefined' is not defined; its fields are body \(my_tasks\.py:23\)"),
    ],
)
def test_what_ones_own_task_cannot_use_is_a_bad_record(module: Path, name: str, record: Record, seen: str) -> None:
    own = tasks_by_name(TaskOptions(), str(module))[name].bind(lambda: iter([record]))
    with pytest.raises(BadRecordError, match=seen):
        own.example(record, None)


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        ("x = 1\n", r"my_tasks\.py has none\. Mark one"),
        ("x = 1\ny = x +\n", r"my_tasks\.py:2: SyntaxError"),
        ("def f():\n    return 1 / 0\n\n\nf()\n", r"my_tasks\.py:2: ZeroDivisionError"),
        ("import json\njson.loads('{')\n", r"my_tasks\.py:2: JSONDecodeError"),
        ("from tasks.prompts import nothing\n", r"my_tasks\.py:1: ImportError"),
        (
            "from tasks.prompts import task\n\n@task('a')\ndef f(r): ...\n\n@task('a')\ndef g(r): ...\n",
            r"each of another name; .*my_tasks\.py has a, a\. Rename one",
        ),
    ],
)
@pytest.mark.parametrize("is_relative", [False, True])
def test_a_module_that_cannot_be_used_is_told_by_file_and_line(
    module: Path, monkeypatch: pytest.MonkeyPatch, content: str, seen: str, is_relative: bool
) -> None:
    module.write_text(content)
    monkeypatch.chdir(module.parent)
    with pytest.raises(UserError, match=r"--task-module must be a Python file with functions marked @task .*" + seen):
        load_task_module(module.name if is_relative else str(module))


def test_a_module_must_be_there_be_python_and_bring_new_names(tmp_path: Path, module: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.py is no file\. Check the path"):
        load_task_module(str(tmp_path / "nowhere.py"))
    text = tmp_path / "tasks.txt"
    text.write_text("")
    with pytest.raises(UserError, match=r"tasks\.txt is not named \.py"):
        load_task_module(str(text))
    module.write_text(MODULE.replace('"sums"', '"mnli"'))
    with pytest.raises(UserError, match=r"a task of the name 'mnli' exists already"):
        tasks_by_name(TaskOptions(), str(module))


def test_nothing_is_registered_beyond_the_module_that_was_loaded(module: Path) -> None:
    tasks_by_name(TaskOptions(), str(module))
    assert tuple(tasks_by_name(TaskOptions())) == known_tasks()
    assert task("plain")(lambda record: "a").name == "plain"
