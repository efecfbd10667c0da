"""The tasks that --task-name can call by name: how their records become prompts and answers, and how a generated answer is read.

A task is a small function from a record to a prompt and its completion. One of your own goes into a file for --task-module:

    from tasks.prompts import task

    @task("reviews", labels=("good", "bad"))
    def reviews(record):
        return f"Review: {record['body']}\\nVerdict:", record["stars"] > 3 and "good" or "bad"

and is then named like those here: --task-name reviews=/data/reviews.jsonl. Nothing is registered anywhere: what such a file holds is
collected when it is loaded, so that two runs in one program cannot disturb each other.
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from tasks import forms
from tasks.examples import BadRecordError, BoundTask, Example, Piece, Record, Task
from tasks.natural_instructions import InstructionTask
from user_error import UserError

Records = Callable[[], Iterator[Record]]

MNLI_LABELS = ("entailment", "neutral", "contradiction")
_PREMISE, _HYPOTHESIS = ("premise", "sentence1"), ("hypothesis", "sentence2")
_MNLI_LABEL = ("label", "gold_label")
_TEXT_COLUMNS, _LABEL_COLUMNS = ("text", "sentence", "message", "sms"), ("label", "category", "class", "intent")

_DEFAULT_PATHS = {
    "records": None,
    "mnli": None,
    "cot": "./data/mmlu-cot.json",
    "ni": "./natural-instructions/",
    "natural_instructions": "./natural-instructions/",
    "p3": None,
    "pile": None,
    "classification": None,
}


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The flags of the same names."""

    text_column: str | None = None
    label_column: str | None = None
    labels: str | None = None
    classification_prompt: Literal["instruction", "raw"] = "instruction"


@dataclass(frozen=True, kw_only=True)
class PlainTask:
    """A BoundTask made of functions. read: from generated text to an answer; left out: its first line for tasks with labels, else all of
    it, stripped."""

    make: Callable[[Record], Example]
    labels: tuple[str, ...] | None = None
    read: Callable[[str], str] | None = None
    draws: bool = False

    def example(self, record: Record, draw: Random | None) -> Example:
        """See BoundTask."""
        return self.make(record)

    def completion_of(self, label: str) -> str:
        """See BoundTask."""
        return f" {label}"

    def answer(self, generated: str) -> str:
        """See BoundTask."""
        if self.read is not None:
            return _answer_of_user(self.read, generated)
        text = generated.strip()
        return text.partition("\n")[0].strip() if self.labels is not None else text


def known_tasks() -> tuple[str, ...]:
    """The names of the tasks that are always there."""
    return tuple(_DEFAULT_PATHS)


def default_path(name: str) -> str | None:
    """Where the data of such a task lies if --task-name does not say."""
    return _DEFAULT_PATHS.get(name)


def tasks_by_name(options: TaskOptions, module: str | None = None) -> dict[str, Task]:
    """All tasks there are: the ones of this file, and those of ``module`` (--task-module). Raises UserError."""
    binders: dict[str, Callable[[Records], BoundTask]] = {
        "records": _bind_records,
        "mnli": lambda records: PlainTask(make=_mnli, labels=MNLI_LABELS),
        "cot": lambda records: PlainTask(make=_cot),
        "ni": InstructionTask,
        "natural_instructions": InstructionTask,
        "p3": lambda records: PlainTask(make=_p3),
        "pile": lambda records: PlainTask(make=lambda record: forms.example_of(record, "text")),
        "classification": lambda records: _bind_classification(records, options),
    }
    tasks = {name: Task(name=name, bind=bind, default_path=_DEFAULT_PATHS[name]) for name, bind in binders.items()}
    for own in load_task_module(module) if module is not None else ():
        if own.name in tasks:
            raise UserError(f"--task-module {module}: a task of the name {own.name!r} exists already. Give it another name")
        tasks[own.name] = own
    return tasks


def task(
    name: str, *, labels: Sequence[str] | None = None, answer: Callable[[str], str] | None = None, default_path: str | None = None
) -> Callable[[Callable[[Record], Any]], Task]:
    """Make a task of a function from a record to (prompt, completion), to a text, or to an Example.

    labels: all that an answer may be; the completion without the white space around it is then the label, and must be one of them. answer:
    from generated text (without its end-of-text token) to what is compared with the label; left out: the first line for tasks with labels,
    else all of the text, stripped. default_path: where the data lies if --task-name names the task alone.
    """
    is_list = labels is None or (not isinstance(labels, str) and len(labels) > 0 and all(isinstance(label, str) for label in labels))
    if not is_list:
        raise UserError(f"the labels of a task are a list of strings, one at least; those of {name!r} are {labels!r}. Correct them")
    all_labels = None if labels is None else tuple(labels)

    def decorate(function: Callable[[Record], Any]) -> Task:
        def make(record: Record) -> Example:
            try:
                made = function(record)
            except BadRecordError:
                raise
            except (Exception, SystemExit) as error:  # whatever a user's function may do wrong
                frame = traceback.extract_tb(error.__traceback__)[-1]
                function_file = getattr(getattr(function, "__code__", None), "co_filename", frame.filename)
                file = Path(function_file)
                where, fields = f"{file.name}:{_line_in(file, error)}", forms.named_fields(record)
                raise BadRecordError(f"task {name} met {type(error).__name__}: {error}; its fields are {fields} ({where})") from error
            return _example_of_user(name, made, all_labels)

        return Task(name=name, bind=lambda records: PlainTask(make=make, labels=all_labels, read=answer), default_path=default_path)

    return decorate


def load_task_module(path: str) -> list[Task]:
    """The tasks in a Python file of the user's, which is run. Raises UserError: no such file, an error in it, no task in it."""
    file = Path(path).expanduser().absolute()
    rule = "--task-module must be a Python file with functions marked @task (docs/tasks.md)"
    if file.suffix != ".py" or not file.is_file():
        raise UserError(f"{rule}; {path} is {'no file' if not file.is_file() else 'not named .py'}. Check the path")
    spec = importlib.util.spec_from_file_location(f"user_tasks_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and the like look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file may do wrong
        raise UserError(f"{rule}; {file}:{_line_in(file, error)}: {type(error).__name__}: {error}. Correct it") from error
    found = [value for value in vars(module).values() if isinstance(value, Task)]
    if not found:
        raise UserError(f"{rule}; {file} has none. Mark one, as in: @task('reviews')")
    names = [own.name for own in found]
    if len(set(names)) < len(names):
        raise UserError(f"{rule}, each of another name; {file} has {', '.join(names)}. Rename one")
    return found


def _line_in(file: Path, error: BaseException) -> int:
    """The line of ``file`` in which ``error`` arose, the deepest if it went through several."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno or 1
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return (lines[-1] if lines else None) or 1


def _example_of_user(name: str, made: Any, labels: tuple[str, ...] | None) -> Example:
    if isinstance(made, Example):
        if not all(isinstance(piece, Piece) for piece in made.pieces) or not any(piece.is_target for piece in made.pieces):
            raise BadRecordError(f"task {name} made an Example that is not of Pieces, or has none that is a target")
        if labels is not None and made.label not in labels:
            raise BadRecordError(f"label {made.label!r} is not one of {', '.join(labels)}")
        return made
    if isinstance(made, str):
        return forms.example_of({"text": made}, "text")
    is_pair = isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, str) for part in made)
    if not is_pair:
        raise BadRecordError(f"task {name} made {type(made).__name__} of it instead of (prompt, completion), a text or an Example")
    prompt, completion = made
    label = completion.strip() if labels is not None else None
    if labels is not None and label not in labels:
        raise BadRecordError(f"label {label!r} is not one of {', '.join(labels)}")
    return forms.prompted(prompt, forms.answer_behind(prompt, completion), label=label)


def _answer_of_user(read: Callable[[str], str], generated: str) -> str:
    rule = "the answer function of a task takes generated text, whatever it is, and returns a string"
    try:
        answer = read(generated)
    except Exception as error:  # whatever a user's function may do wrong
        raise UserError(f"{rule}; given {generated[:60]!r} it met {type(error).__name__}: {error}. Correct it") from error
    if not isinstance(answer, str):
        raise UserError(f"{rule}; given {generated[:60]!r} it returned {type(answer).__name__}. Correct it")
    return answer


def _bind_records(records: Records) -> BoundTask:
    form = next((form for record in records() if (form := forms.form_of(record)) is not None), "text")
    return PlainTask(make=lambda record: forms.example_of(record, form))


def _mnli(record: Record) -> Example:
    premise, hypothesis = (forms.text_field(record, _field(record, names)) for names in (_PREMISE, _HYPOTHESIS))
    label = record[_field(record, _MNLI_LABEL)]
    if not isinstance(label, bool) and str(label) in ("0", "1", "2"):
        label = MNLI_LABELS[int(label)]
    if label not in MNLI_LABELS:
        raise BadRecordError(f"label {label!r} is not one of {', '.join(MNLI_LABELS)} (or 0, 1, 2 for them)")
    return forms.prompted(f"mnli hypothesis: {hypothesis} premise: {premise} target:", f" {label}", label=str(label))


def _field(record: Record, names: Sequence[str]) -> str:
    found = next((name for name in names if name in record), None)
    if found is None:
        raise BadRecordError(f"there is no {' or '.join(names)}; its fields are {forms.named_fields(record)}")
    return found


def _cot(record: Record) -> Example:
    """A worked-out text, or a question and an answer that is worked out."""
    if "question" in record and "answer" in record:
        return forms.prompted(f"Q: {forms.text_field(record, 'question')}\nA:", f" {forms.text_field(record, 'answer')}")
    return forms.example_of(record, "text")


def _p3(record: Record) -> Example:
    """Inputs that end in a colon ask already; the others are asked for an answer."""
    inputs, targets = forms.text_field(record, "inputs"), forms.text_field(record, "targets")
    if not inputs.strip():
        raise BadRecordError("the prompt is empty")
    asked = inputs if inputs.rstrip().endswith(":") else f"{inputs.rstrip()}\nAnswer:"
    return forms.prompted(asked, forms.answer_behind(asked, targets.strip()))


def _bind_classification(records: Records, options: TaskOptions) -> BoundTask:
    """The labels are those that the source has, in the order of the alphabet."""
    columns: tuple[str, str] | None = None
    labels: set[str] = set()
    for record in records():
        if columns is None:
            columns = (
                _column(record, options.text_column, _TEXT_COLUMNS, "text"),
                _column(record, options.label_column, _LABEL_COLUMNS, "label"),
            )
        value = record.get(columns[1])
        if value is not None and str(value).strip():
            labels.add(str(value).strip())
    text, label = columns or ("text", "label")
    if options.labels is not None:
        labels = {name.strip() for name in options.labels.split(",") if name.strip()}
    return PlainTask(make=_Classification(text, label, tuple(sorted(labels)), options.classification_prompt), labels=tuple(sorted(labels)))


def _column(record: Record, asked: str | None, names: Sequence[str], what: str) -> str:
    if asked is not None:
        if asked in record:
            return asked
        raise UserError(
            f"--{what}-column must be a column of the file; there is no {asked!r} among {forms.named_fields(record)}. Name another"
        )
    found = next((column for name in names for column in record if str(column).strip().lower() == name), None)
    if found is None:
        raise UserError(
            f"task classification needs a column of {what}s named {', '.join(names)}; the file has {forms.named_fields(record)}. "
            "Name it with "
            f"--{what}-column (by number, from 1, if the file has no header)"
        )
    return found


@dataclass(frozen=True)
class _Classification:
    """From a row to an example."""

    text: str
    label: str
    labels: tuple[str, ...]
    prompt: Literal["instruction", "raw"]

    def __call__(self, record: Mapping[str, Any]) -> Example:
        text, label = (str(record.get(column) if record.get(column) is not None else "").strip() for column in (self.text, self.label))
        if not text:
            raise BadRecordError(f"the prompt is empty (column {self.text})")
        if label not in self.labels:
            raise BadRecordError(f"label {label!r} (column {self.label}) is not one of {', '.join(self.labels[:20])}")
        if self.prompt == "raw":
            return forms.prompted(f"{text}\n", f" {label}", label=label)
        asked = f"Classify the text as one of: {', '.join(self.labels)}.\nText: {text}\nLabel:"
        return forms.prompted(asked, f" {label}", label=label)
