"""The task list: what --task-name and --evaluation-data say, taken apart.

    [TASK=]SOURCE[@SPLIT][:WEIGHT],...      mnli=/data/mnli.jsonl:0.3,"odd,name.jsonl":0.2,hf:glue/mnli@train,cot:0.1

An item may be a TASK alone: its data then lies at the task's default path. A source in quotes (" or ') keeps its commas, colons, = and @;
@SPLIT and :WEIGHT may follow the closing one. Quotes inside a source are ordinary characters. The weight is what stands behind the last
colon, if that is a number, so that addresses with ports need no quotes. Nothing is opened here.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tasks.download import is_url
from tasks.examples import Task
from tasks.prompts import default_path, known_tasks
from user_error import UserError

RULE = (
    "The task list must read [TASK=]SOURCE[@SPLIT][:WEIGHT],[TASK=]SOURCE[@SPLIT][:WEIGHT],..., with weights >= 0 of which one at least is "
    "above 0"
)
PLAIN_TASK = "records"  # of sources that name none
HF = "hf:"

_NAME = r"[A-Za-z_][\w-]*"
_ITEM = re.compile(rf"""\s*(?:{_NAME}\s*=\s*)?(?:"[^"]*"[^,]*|'[^']*'[^,]*|[^,]*)""")
_TASK = re.compile(rf"({_NAME})\s*=(.*)", re.DOTALL)
_SPLIT = re.compile(r"(.+)@([\w.-]+)")
_QUOTED = re.compile(rf"""(?:{_NAME}\s*=\s*)?(?:"[^"]*"|'[^']*')(?:@[\w.-]+)?(?::[^:"']*)?""")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One item of the list. weight: its share of the sequences (all shares add up to 1; 0 means never drawn)."""

    source: str
    weight: float
    task: str = PLAIN_TASK
    split: str | None = None

    @property
    def name(self) -> str:
        """As a user would write it, less the weight."""
        prefix = "" if self.task == PLAIN_TASK else f"{self.task}="
        return f"{prefix}{self.source}{'' if self.split is None else f'@{self.split}'}"


def parse_task_list(text: str, more_tasks: Mapping[str, Task] | None = None) -> tuple[TaskSpec, ...]:
    """The items, weights normalised to shares; a missing weight is 1. more_tasks: those of a --task-module. A weight of 0 keeps an item in
    the list, where it is opened and checked but never drawn. A source may stand in the list several times; each place reads it in an order
    of its own. Raises UserError."""
    known = {**{name: default_path(name) for name in known_tasks()}, **{name: own.default_path for name, own in (more_tasks or {}).items()}}
    items = [_parse(item.strip(), text, known) for item in _items(text)]
    largest = max(item.weight for item in items)
    if largest == 0:
        raise UserError(f"{RULE}; all weights of {text!r} are 0. Give one task at least a weight above 0.")
    scaled = [item.weight / largest for item in items]  # so that not even weights near the largest float add up to infinity
    total = math.fsum(scaled)
    return tuple(
        TaskSpec(source=item.source, weight=weight / total, task=item.task, split=item.split)
        for item, weight in zip(items, scaled, strict=True)
    )


def join_items(items: Iterable[object]) -> str:
    """A list of items (from YAML) as one text, which parse_task_list takes apart into just these. Sources that need quotes get them; items
    that have quotes already stay as they are. Raises UserError for a source that holds both kinds of quotes and a comma."""
    return ",".join(_quoted(str(item).strip()) for item in items)


def _quoted(item: str) -> str:
    if _QUOTED.fullmatch(item) or not ("," in item or item[:1] in ("'", '"')):
        return item
    rest, weight = item, ""
    head, colon, tail = item.rpartition(":")
    if colon and _number(tail) is not None:
        rest, weight = head, colon + tail
    named = None if is_url(rest) else _TASK.fullmatch(rest)
    task, source = (f"{named[1]}=", named[2]) if named else ("", rest)
    found = None if is_url(source) else _SPLIT.fullmatch(source)
    source, split = (found[1], f"@{found[2]}") if found else (source, "")
    quote = next((quote for quote in ('"', "'") if quote not in source), None)
    if quote is None:
        raise UserError(f"{RULE}; the source {source!r} holds a comma and both kinds of quotes, which cannot be written. Rename it.")
    return f"{task}{quote}{source}{quote}{split}{weight}"


def _items(text: str) -> list[str]:
    """Split at the commas outside of quoted sources."""
    items, at = [], 0
    while True:
        found = _ITEM.match(text, at)
        assert found is not None, "the pattern matches nothing at all as well, and stops at commas only"
        items.append(found.group())
        if found.end() == len(text):
            return items
        at = found.end() + 1


def _parse(item: str, text: str, known: Mapping[str, str | None]) -> TaskSpec:
    if not item:
        raise UserError(f"{RULE}; an item of {text!r} has no source. Remove the stray comma, or name a file there.")
    item, weight = _without_weight(item)
    task, source = PLAIN_TASK, item
    named = _TASK.fullmatch(item)
    if named and not is_url(item):
        if named[1] in known:
            task, source = named[1], named[2].strip()
        else:
            raise UserError(
                f"There is no task {named[1]!r} (in {item!r}). Tasks are: {', '.join(known)}; a path with = in it needs quotes."
            )
    elif item in known:
        path = known[item]
        if path is None:
            raise UserError(f"Task {item!r} has no default path for its data. Name it, as in {item}=/data/{item}.jsonl.")
        task, source = item, path
    source, split = _without_split(source)
    if not source:
        raise UserError(f"{RULE}; {item!r} in {text!r} has no source. Name a file there.")
    if not (math.isfinite(weight) and weight >= 0):
        raise UserError(f"{RULE}; the weight in {item!r} is {weight:g}. Give a finite number that is not negative.")
    return TaskSpec(source=source, weight=weight, task=task, split=split)


def _without_weight(item: str) -> tuple[str, float]:
    head, colon, tail = item.rpartition(":")
    if not colon or not head.strip() or item[-1] in "\"'":  # a colon in quotes is the source's
        return item, 1.0
    weight = _number(tail)
    if weight is not None:
        return head.strip(), weight
    looks_complete = re.search(r"""\.(jsonl|json|csv|tsv|parquet|zst|gz)$|["']$""", head.lower())
    if looks_complete and not re.search(r"[/\\.]", tail) and not is_url(item.partition("=")[2] or item):
        raise UserError(f"{RULE}; {tail!r} in {item!r} is not a number. Write a weight such as {head}:0.3")
    return item, 1.0


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _without_split(source: str) -> tuple[str, str | None]:
    """SOURCE and SPLIT; quotes are taken off. An @ in an address belongs to the address unless that is quoted."""
    if source[:1] in ('"', "'"):
        inner, closing, rest = source[1:].partition(source[0])
        if not closing:
            raise UserError(f"{RULE}; a quote opens in {source!r} and is not closed. Close it, or put the other kind around the source.")
        if rest and not re.fullmatch(r"@[\w.-]+", rest):
            raise UserError(f"{RULE}; behind the closing quote of {source!r} stands {rest!r}. Write @SPLIT or :WEIGHT there, or nothing.")
        return inner, rest[1:] or None
    found = None if is_url(source) else _SPLIT.fullmatch(source)
    return (found[1], found[2]) if found else (source, None)
