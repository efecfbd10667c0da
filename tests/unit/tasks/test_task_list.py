"""What --task-name and --evaluation-data say, on the command line and in YAML."""

import dataclasses
import math
from pathlib import Path

import pytest

from tasks.examples import Task
from tasks.prompts import known_tasks
from tasks.task_list import TaskSpec, join_items, parse_task_list
from training.config.flags import flag, parse_flags
from user_error import UserError


def only(text: str) -> tuple[str, str, str | None]:
    (spec,) = parse_task_list(text)
    return spec.task, spec.source, spec.split


@pytest.mark.parametrize(
    ("text", "task", "source", "split"),
    [
        ("a.jsonl", "records", "a.jsonl", None),
        (" a.jsonl : 0.3 ", "records", "a.jsonl", None),
        ("mnli=/data/mnli.jsonl", "mnli", "/data/mnli.jsonl", None),
        ("mnli = /data/mnli.jsonl:2", "mnli", "/data/mnli.jsonl", None),
        ("cot", "cot", "./data/mmlu-cot.json", None),
        ("cot:0.1", "cot", "./data/mmlu-cot.json", None),
        ("ni", "ni", "./natural-instructions/", None),
        ("natural_instructions:0.5", "natural_instructions", "./natural-instructions/", None),
        ("/data/folder@train:0.5", "records", "/data/folder", "train"),
        ("/data/me@home/a.jsonl", "records", "/data/me@home/a.jsonl", None),
        ("hf:glue/mnli@train", "records", "hf:glue/mnli", "train"),
        ("mnli=hf:nyu-mll/glue/mnli@validation_matched:3", "mnli", "hf:nyu-mll/glue/mnli", "validation_matched"),
        ("https://host/a.jsonl", "records", "https://host/a.jsonl", None),
        ("http://host:8000/a.jsonl", "records", "http://host:8000/a.jsonl", None),
        ("http://host:8000/a.jsonl:0.3", "records", "http://host:8000/a.jsonl", None),
        ("pile=http://me@host:8000/a.jsonl?key=v:0.3", "pile", "http://me@host:8000/a.jsonl?key=v", None),
        ('"odd, name: 2.jsonl"', "records", "odd, name: 2.jsonl", None),
        ("'odd@name:3'", "records", "odd@name:3", None),
        ("'odd.jsonl:x'", "records", "odd.jsonl:x", None),
        ("'a=b.jsonl'", "records", "a=b.jsonl", None),
        ("mnli=\"a,'b'.jsonl\"@train:0.2", "mnli", "a,'b'.jsonl", "train"),
        ("/data/it's.jsonl:2", "records", "/data/it's.jsonl", None),
        ("classification", "classification", "", None),
    ],
)
def test_an_item_is_taken_apart(text: str, task: str, source: str, split: str | None) -> None:
    if not source:
        with pytest.raises(UserError, match=r"has no default path for its data\. Name it, as in classification=/data"):
            parse_task_list(text)
    else:
        assert only(text) == (task, source, split)


def test_weights_become_shares_and_a_missing_one_counts_as_1() -> None:
    specs = parse_task_list("a.jsonl:0.5,'b,c.jsonl':0.5,http://h:80/d.jsonl,cot:0,/data/it's.jsonl:0.25,/data/it's.json:0.75")
    assert [spec.source for spec in specs] == [
        "a.jsonl",
        "b,c.jsonl",
        "http://h:80/d.jsonl",
        "./data/mmlu-cot.json",
        "/data/it's.jsonl",
        "/data/it's.json",
    ]
    assert [spec.weight * 3 for spec in specs] == pytest.approx([0.5, 0.5, 1, 0, 0.25, 0.75])
    assert math.fsum(spec.weight for spec in parse_task_list("a.json:1.7e308,b.json:1.7e308")) == 1


def test_a_spec_is_named_as_the_user_wrote_it() -> None:
    assert TaskSpec(source="a.jsonl", weight=1).name == "a.jsonl"
    assert TaskSpec(task="mnli", source="hf:glue/mnli", split="train", weight=1).name == "mnli=hf:glue/mnli@train"


def test_tasks_of_a_module_are_known_too() -> None:
    own = Task(name="reviews", bind=lambda records: pytest.fail("nothing is opened"), default_path="/data/reviews.jsonl")
    first, second = parse_task_list("reviews,reviews=/other.jsonl", {"reviews": own})
    assert (first.task, first.source) == ("reviews", "/data/reviews.jsonl")
    assert (second.task, second.source) == ("reviews", "/other.jsonl")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("", "has no source"),
        ("a.jsonl,,b.jsonl", "has no source"),
        ("a.jsonl,", "has no source"),
        ("mnli=", "has no source"),
        ("a.jsonl:-1", "-1"),
        ("a.jsonl:nan", "nan"),
        ("a.jsonl:inf", "inf"),
        ("a.jsonl:0,b.jsonl:0", "all weights"),
        ("a.jsonl:lots", "'lots' in 'a.jsonl:lots' is not a number"),
        ("'a.jsonl':lots", "is not a number"),
        ('"a.jsonl', "is not closed"),
        ("mnli='a.jsonl,b.jsonl", "is not closed"),
        ("'a'.jsonl", "behind the closing quote"),
        ("'a.jsonl'@", "behind the closing quote"),
        ("mnlu=a.jsonl", "There is no task 'mnlu'"),
    ],
)
def test_a_bad_list_is_told_with_what_was_seen(text: str, seen: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_task_list(text)
    assert seen in str(caught.value)


def test_an_unknown_task_lists_those_known() -> None:
    with pytest.raises(UserError, match=r"Tasks are: records, mnli, .*; a path with = in it needs quotes") as caught:
        parse_task_list("a=b.jsonl")
    assert all(name in str(caught.value) for name in known_tasks())


@pytest.mark.parametrize(
    "items",
    [
        ["a.jsonl", "mnli=b.jsonl:0.3", "hf:glue/mnli@train:2"],
        ["mnli=/data/x, y.jsonl:0.3"],
        ["/data/x, y@train:2", "cot:0.1"],
        ["'x, y':2", "p3=\"x, 'y'\"@train"],
        ["/data/it's, odd.jsonl", "/data/it's.jsonl"],
        ["http://host:80/a,b.jsonl?u=me@home"],
    ],
)
def test_a_list_of_items_says_the_same_as_its_items_alone(items: list[str]) -> None:
    found = parse_task_list(join_items(items))
    assert len(found) == len(items)
    plain = [item.replace("/data/it's, odd.jsonl", '"/data/it\'s, odd.jsonl"') for item in items]
    for spec, item in zip(found, plain, strict=True):
        if '"' in item or "'" in item or "," not in item:
            (alone,) = parse_task_list(item)
            assert (spec.task, spec.source, spec.split) == (alone.task, alone.source, alone.split)


def test_a_list_quotes_the_source_alone() -> None:
    (first, second, third) = parse_task_list(join_items(["mnli=/data/x, y.jsonl:3", "/data/x, y@train", "http://h/a,b@c"]))
    assert (first.task, first.source, first.split) == ("mnli", "/data/x, y.jsonl", None)
    assert (second.task, second.source, second.split) == ("records", "/data/x, y", "train")
    assert (third.source, third.split) == ("http://h/a,b@c", None)
    assert first.weight == 3 * second.weight
    with pytest.raises(UserError, match="both kinds of quotes"):
        join_items(["""a'b"c,d.jsonl"""])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    task_name: str | None = flag(None, "what to train on", group="data")
    stage_layers: str | None = flag(None, "layers", group="grid")
    steps: int = flag(1, "how many", group="grid")


def parsed(folder: Path, content: str) -> Flags:
    (folder / "c.yaml").write_text(content)
    return parse_flags(Flags, ["--config", str(folder / "c.yaml")], "")


def test_yaml_may_list_what_the_command_line_joins_by_commas(tmp_path: Path) -> None:
    flags = parsed(tmp_path, "task-name:\n  - mnli=/data/x, y.jsonl:0.3\n  - cot\nstage-layers: [6, 8, 8, 6]\n")
    assert flags.task_name == 'mnli="/data/x, y.jsonl":0.3,cot'
    assert flags.stage_layers == "6,8,8,6"
    assert parsed(tmp_path, "task-name: [a.jsonl]").task_name == "a.jsonl"


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        ("steps: [1, 2]", "must be one value"),
        ("task-name: {a.jsonl: 0.3}", "must be one value"),
        ("task-name: []", "it is empty"),
        ("task-name: [a.jsonl, {b.jsonl: 0.3}]", "one of them is {'b.jsonl': 0.3} (quote what"),
        ("task-name: [a.jsonl, true]", "one of them is True"),
        ("task-name: [a.jsonl, null, b.jsonl]", "one of them is None"),
        ("""task-name: ["a'b\\"c,d"]""", "both kinds of quotes"),
    ],
)
def test_yaml_that_is_no_list_of_values_is_an_error_with_file_and_key(tmp_path: Path, content: str, seen: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(tmp_path, content)
    assert seen in str(caught.value)
    assert str(tmp_path / "c.yaml") in str(caught.value)
