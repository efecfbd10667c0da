"""What an evaluation leaves: one JSON object per example, a summary for people and one for programs, a picture, and the comparison of two
models on the same examples."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.tensor_file import explained_disk_errors
from pipeline_parallel.decode import Generated
from tasks.encoding import Encoder
from tasks.evaluation_set import EvaluationExample, Prompt
from tasks.metrics import Confusion, Counts, McNemar, mcnemar
from training.job.report import table
from user_error import UserError

MAX_SHOWN_LABELS = 12  # beyond which a matrix is wider than a terminal
TIE = 1e-4  # a difference of logits that another machine or another batch may decide otherwise


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One way of answering: greedy generation, or the likeliest label. confusion: where all examples share their labels."""

    counts: Counts
    confusion: Confusion | None

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"accuracy": self.counts.accuracy, **asdict(self.counts), "total": self.counts.total}
        return found if self.confusion is None else {**found, "confusion": self.confusion.as_json()}


@dataclass(frozen=True, kw_only=True)
class EvaluationResults:
    """Of one model on one set of records; parts that were not asked for are None. loss: nats per target token. examples: one JSON object
    each, in the order of the data; empty on ranks other than 0."""

    model: str
    num_examples: int
    loss: float | None = None
    perplexity: float | None = None
    target_tokens: int | None = None
    accuracy: Answers | None = None
    labels: Answers | None = None
    examples: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For --json: everything but the examples."""
        plain = {"model": self.model, "num_examples": self.num_examples, "seconds": self.seconds}
        loss = (
            {}
            if self.loss is None
            else {"loss": finite(self.loss), "perplexity": finite(self.perplexity), "target_tokens": self.target_tokens}
        )
        ways = {"accuracy": self.accuracy, "labels": self.labels}
        return {**plain, **loss, **{name: answers.as_json() for name, answers in ways.items() if answers is not None}}

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.num_examples} examples"]
        if self.loss is not None:
            lines.append(f"perplexity {self.perplexity:.6g}  (loss {self.loss:.6f} nats over {self.target_tokens:,} target tokens)")
        for name, answers in (("generated answers", self.accuracy), ("likeliest labels", self.labels)):
            if answers is None:
                continue
            lines.append(f"{name}: {answers.counts}")
            if answers.confusion is not None:
                lines += [f"macro-F1 {answers.confusion.macro_f1:.4f}", *_shown(answers.confusion)]
        ties = sum(_margin(example) < TIE for example in self.examples)
        if ties:
            lines.append(f"{ties} answers hang on two logits less than {TIE:g} apart; other machines may answer those otherwise")
        return "\n".join(lines)


def _margin(example: dict[str, Any]) -> float:
    """Between the two best logits where they were nearest; of what nothing was generated for, none."""
    found = example.get("margin")
    return math.inf if found is None else float(found)


def _shown(confusion: Confusion) -> list[str]:
    if len(confusion.labels) > MAX_SHOWN_LABELS:
        return [f"(a confusion matrix of {len(confusion.labels)} columns is for --json or --confusion-png)"]
    rows = [("expected \\ answered", *confusion.labels)]
    rows += [(label, *map(str, row)) for label, row in zip(confusion.labels, confusion.matrix, strict=False)]
    return [table(rows)]


def about(example: EvaluationExample) -> dict[str, Any]:
    """The beginning of an example's JSON object: which one it is, and what was asked."""
    has_answer = any(piece.is_target for piece in example.example.pieces) and bool(example.example.prompt)
    asked = {"prompt": example.example.prompt, "expected": example.expected} if has_answer else {}
    return {"id": example.number, "record": example.fingerprint, "where": example.where, "source": example.source, **asked}


def judged_rows(prompts: Sequence[Prompt], generated: Sequence[Generated], encoder: Encoder) -> list[dict[str, Any]]:
    """The rest of it for generated answers, in the same order: what was generated, and what that is worth."""
    rows = []
    for prompt, one in zip(prompts, generated, strict=True):
        task, text = prompt.example.task, encoder.decode(one.ids)
        answer = task.answer(text)
        verdict = prompt.example.judge(answer, ended=one.ended)
        margin = one.margin if math.isfinite(one.margin) else None
        rows.append({"generated": text, "answer": answer, "verdict": verdict, "ended": one.ended, "margin": margin})
    return rows


def write_examples(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object per line. Raises UserError where that cannot be written."""
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_results(results: EvaluationResults, *, summary: str | None, examples: str | None, picture: str | None) -> None:
    """--json (``-`` is left to the caller), --output and --confusion-png. Raises UserError where a file cannot be written."""
    if examples is not None:
        write_examples(Path(examples), results.examples)
    if summary is not None and summary != "-":
        _write(Path(summary), json.dumps(results.as_json(), indent=2, ensure_ascii=False) + "\n")
    answers = results.accuracy or results.labels
    if picture is not None and answers is not None and answers.confusion is not None:
        draw_confusion(answers.confusion, Path(picture), title=f"{results.model}: {answers.counts.accuracy:.2%}")


def _write(path: Path, text: str) -> None:
    with explained_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def finite(value: float | None) -> float | None:
    """``value``, or None (JSON's null) where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


def check_writable(*paths: str | None) -> None:
    """Raise UserError, before anything is evaluated, for files of results that could not be written."""
    for path in (Path(name) for name in paths if name not in (None, "-")):
        with explained_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            was_there = path.exists()
            path.open("a").close()
            if not was_there:
                path.unlink()


def check_drawable() -> None:
    """Raise UserError without matplotlib."""
    try:
        import matplotlib  # noqa: F401 - whether it is there
    except ImportError as error:
        raise UserError("--confusion-png needs the package matplotlib. Install it with: pip install matplotlib") from error


def draw_confusion(confusion: Confusion, path: Path, *, title: str) -> None:
    """A PNG: rows are what was expected, columns what was answered, colours shares of a row. Raises UserError as check_drawable."""
    check_drawable()
    from matplotlib.figure import Figure

    num = len(confusion.labels)
    size = max(4.0, min(30.0, 0.45 * num + 2.5))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot()
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion.matrix]
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    for r, row in enumerate(confusion.matrix):
        for c, count in enumerate(row):
            if count or num <= MAX_SHOWN_LABELS:
                axes.text(c, r, str(count), ha="center", va="center", fontsize=8, color="white" if shares[r][c] > 0.5 else "black")
    axes.set_xticks(range(num), confusion.labels, rotation=90)
    axes.set_yticks(range(len(confusion.matrix)), confusion.labels[: len(confusion.matrix)])
    axes.set_xlabel("answered")
    axes.set_ylabel("expected")
    axes.set_title(f"{title}, macro-F1 {confusion.macro_f1:.3f}", fontsize=10)
    figure.colorbar(image, label="share of the row")
    with explained_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=120)


def compare(files: str) -> McNemar:
    """--compare A,B: two files of --output over the same records. Raises UserError for files that are not, and without scipy."""
    names = [name.strip() for name in files.split(",")]
    if len(names) != 2 or not all(names):
        raise UserError(f"--compare takes two files of --output with a comma, as A.jsonl,B.jsonl; it is {files!r}")
    first, second = (_read_examples(Path(name)) for name in names)
    key = next((key for key in ("verdict", "label_verdict") if all(key in row for row in (*first, *second))), None)
    if key is None:
        raise UserError(
            f"--compare needs answers of the same kind in both files; {names[0]} and {names[1]} share none. Evaluate both alike"
        )
    records = [[(row["id"], row["record"]) for row in rows] for rows in (first, second)]
    if records[0] != records[1]:
        place = next((i for i, pair in enumerate(zip(*records, strict=False)) if pair[0] != pair[1]), min(map(len, records)))
        raise UserError(
            f"--compare needs the same records in the same order; {names[0]} has {len(first)} and {names[1]} {len(second)}, and "
            "they differ from "
            f"line {place + 1} on. Evaluate both models on the same data with the same --max-eval-samples and --seed"
        )
    return mcnemar([row[key] == "right" for row in first], [row[key] == "right" for row in second])


def _read_examples(path: Path) -> list[dict[str, Any]]:
    rows = list(_examples(path))
    if not rows:
        raise UserError(f"{path} must hold one JSON object per example, as --output writes them; it is empty")
    return rows


def _examples(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]  # not at U+2028, which stands in texts
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--compare must name two readable files of --output; {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: each line must be a JSON object, as --output writes them; {error}") from error
        if not isinstance(row, dict) or not {"id", "record"} <= set(row):
            raise UserError(f"{path}:{number}: each line must be an object with id and record, as --output writes them")
        yield row
