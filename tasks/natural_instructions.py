"""Natural Instructions (Mishra et al. 2022, arXiv:2104.08773; Wang et al. 2022, arXiv:2204.07705): definitions with many instances.

A folder holds tasks/*.json and splits/default/train_tasks.txt, which names those to train on; a folder of such JSON files, or one file,
does too. A record is an instance. A document of the training is a page: an instance and others of its task drawn beside it, behind the
task's definition (in two of three pages) and its possible labels (in half of those of tasks with few), in changing notation, so that a
model reads instructions as well as examples. In an evaluation it is the definition and the one instance. Every output is to be learnt.

Files are parsed when an instance of theirs is asked for, and the last ones kept.
"""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from tasks import forms
from tasks.examples import BadRecordError, Example, Piece, Record
from tasks.reading import Reading
from tasks.records import value_of_json
from user_error import UserError

TRAIN_TASKS = "splits/default/train_tasks.txt"
FEW_LABELS = 10
PAGE_CHARS = 4000  # about a thousand tokens
KEPT_FILES = 64
# (in front of the input, in front of the output)
NOTATIONS = (("Input: ", "\nOutput:"), ("Q: ", "\nA:"), ("", "\nAnswer:"), ("Question: ", "\nAnswer:"), ("", "\n->"))
SEPARATORS = ("\n\n", "\n", "\n\n\n")


class InstructionRecords(Sequence[tuple[str, Record]]):
    """(where, record) of every instance of a source, in the order of its files. fingerprinted: the files, for whoever compares them."""

    def __init__(self, path: Path, reading: Reading | None = None) -> None:
        """Raises UserError for a folder that holds no tasks, and for files that are none."""
        self.fingerprinted = _task_files(path)
        self._parse = lru_cache(maxsize=KEPT_FILES)(_parse_file)
        reading = reading or Reading(str(path))
        sizes = [file.stat().st_size for file in self.fingerprinted]
        reading.expect(sum(sizes))
        ends: list[int] = []
        for file, size in zip(self.fingerprinted, sizes, strict=True):
            ends.append(len(self._parse(file)["Instances"]))
            reading.read(size)
        self._ends = list(accumulate(ends))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect.bisect_right(self._ends, index)
        file = self.fingerprinted[place]
        number = index - (self._ends[place - 1] if place else 0)
        parsed = self._parse(file)
        return f"{file}: instance {number + 1}", {"task": file.stem, "number": number, **parsed}


class InstructionTask:
    """The BoundTask of such records, of a .jsonl with the same fields too (Definition, input, output)."""

    labels: tuple[str, ...] | None = None
    draws = True

    def __init__(self, records: Callable[[], Iterator[Record]]) -> None:
        """Nothing of the records need be known beforehand."""

    def example(self, record: Record, draw: Random | None) -> Example:
        """See BoundTask."""
        instances = record.get("Instances")
        if instances is None:  # a line of its own
            instances, number = [{"input": record.get("input"), "output": record.get("output")}], 0
        elif "number" not in record:  # InstructionRecords adds it
            raise BadRecordError("a whole task in one record; tasks with their instances are one .json file per task")
        else:
            number = record["number"]
            if not isinstance(instances, list) or type(number) is not int or not 0 <= number < len(instances):
                raise BadRecordError('"number" must be that of one of its "Instances"')
        definition = _definition(record)
        if draw is None:
            pieces = (Piece(f"{definition}\n\n", False), *_instance(instances[number], NOTATIONS[0], None))
            return Example(pieces=pieces, as_good=tuple(_outputs(instances[number])))
        return Example(pieces=tuple(_page(definition, instances, number, draw)))

    def completion_of(self, label: str) -> str:
        """See BoundTask."""
        return f" {label}"

    def answer(self, generated: str) -> str:
        """See BoundTask."""
        return generated.strip()


def _page(definition: str, instances: Sequence[Mapping[str, Any]], number: int, draw: Random) -> Iterator[Piece]:
    notation, separator = draw.choice(NOTATIONS), draw.choice(SEPARATORS)
    head = [definition] if draw.random() < 2 / 3 else []
    usable = [place for place, instance in enumerate(instances) if place == number or _is_usable(instance)]
    outputs = sorted({output for place in usable for output in _outputs(instances[place])})
    if len(outputs) <= FEW_LABELS and draw.random() < 1 / 2:
        head.append("\n".join(["Possible labels:", *(f"{place}. {output}" for place, output in enumerate(outputs, start=1))]))
    if head:
        yield Piece("\n\n".join(head) + separator, False)
    others = [place for place in usable if place != number]
    draw.shuffle(others)
    at = draw.randrange(len(others) + 1) if len(others) < 8 else draw.randrange(8)  # the record itself stands somewhere among the first
    num_chars = 0
    for count, place in enumerate([*others[:at], number, *others[at:]]):
        if count > at and num_chars > PAGE_CHARS:
            return
        pieces = _instance(instances[place], notation, draw)
        if count:
            yield Piece(separator, False)
        yield from pieces
        num_chars += sum(len(piece.text) for piece in pieces)


def _instance(instance: Mapping[str, Any], notation: tuple[str, str], draw: Random | None) -> tuple[Piece, Piece]:
    if not isinstance(instance, Mapping):
        raise BadRecordError('each of "Instances" must be an object')
    given, outputs = instance.get("input"), _outputs(instance)
    if not isinstance(given, str):
        raise BadRecordError('an instance must have a string under "input"')
    output = outputs[0] if draw is None else draw.choice(outputs)
    made = forms.prompted(f"{notation[0]}{given.strip()}{notation[1]}", f" {output.strip()}")
    return made.pieces[0], made.pieces[1]


def _is_usable(instance: Mapping[str, Any]) -> bool:
    """Whether another one's page may show it: a bad instance is told in its own turn, and spoils no page but its own."""
    try:
        has_input = isinstance(instance, Mapping) and isinstance(instance.get("input"), str)
        return has_input and all(output.strip() for output in _outputs(instance))
    except BadRecordError:
        return False


def _outputs(instance: Mapping[str, Any]) -> list[str]:
    """One output or several that are as good."""
    found = instance.get("output")
    outputs = [found] if isinstance(found, str) else found
    if not isinstance(outputs, list) or not outputs or not all(isinstance(output, str) for output in outputs):
        raise BadRecordError('an instance must have a string, or an array of strings, under "output"')
    return outputs


def _definition(record: Record) -> str:
    """A string, as older files have it, or a list of strings."""
    found = record.get("Definition")
    parts = [found] if isinstance(found, str) else found
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
        raise BadRecordError('a task must have a string, or an array of strings, under "Definition"')
    return "\n".join(part.strip() for part in parts)


def _task_files(path: Path) -> tuple[Path, ...]:
    rule = f"Natural Instructions are a folder with tasks/*.json and {TRAIN_TASKS}, a folder of task files, or one such file"
    if path.is_file():
        return (path,)
    listing = path / TRAIN_TASKS
    if listing.is_file():
        try:
            names = listing.read_text(encoding="utf-8-sig").split()
        except UnicodeDecodeError as error:
            raise UserError(f"{rule}; {listing}, which names its tasks, is not UTF-8: {error}. Write it anew.") from error
        files = tuple(path / "tasks" / f"{name}.json" for name in names)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{rule}; {listing} names {', '.join(missing[:5])}, not in {path / 'tasks'}. Fetch them, or shorten the list.")
    else:
        files = tuple(sorted(path.glob("tasks/*.json")) or sorted(path.glob("*.json")))
    if not files:
        raise UserError(f"{rule}; {path} holds no task. Check the path.")
    return files


def _parse_file(file: Path) -> dict[str, Any]:
    """Definition and instances of a task file."""
    try:
        task = value_of_json(file.read_bytes())
        if isinstance(task, BadRecordError):
            raise ValueError(str(task))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"A task file of Natural Instructions must be one JSON object in UTF-8; {file}: {error}. Fetch it again."
        ) from error
    instances = task.get("Instances") if isinstance(task, dict) else None
    if not isinstance(instances, list) or not instances or not all(isinstance(instance, dict) for instance in instances):
        raise UserError(
            f'A task file of Natural Instructions must have an array of objects under "Instances"; {file} has none. Fetch it again.'
        )
    return {"Definition": task.get("Definition"), "Instances": instances}
