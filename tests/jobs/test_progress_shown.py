"""What a user sees of work that takes long: rank 0's output names the rank that is furthest behind, and a quick run says nothing of it."""

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from support.ranks import evaluate, train
from support.tiers import full

import comms.progress
import tasks.order
import training.start.weights
from checkpoint.layer_store import StepWriter
from comms.spans import WAITING_FOR_DATA, Spans
from modules.stage import Stage
from tasks.prompts import TaskOptions, tasks_by_name
from tasks.readers import ReadingRules, open_documents
from tasks.task_list import parse_task_list
from training.membership import progress_display

PROGRESS = re.compile(r"ETA|so far|after the step began|waiting for \d")


@pytest.fixture(scope="module")
def flags(model_folder: Path, tasks: list[Path]) -> dict[str, Any]:
    common = {"seq_length": 32, "batch_size": 4, "micro_batch_size": 1, "total_steps": 1, "lr": 1e-3, "logging_steps": 1}
    return {"model_name": model_folder, "task_name": tasks[0], "logging_steps": 1, **common}


def show_soon() -> None:
    """Thresholds of a fraction of a second, called in every rank before it begins."""
    comms.progress.EVERY_S = 0.5
    progress_display.FIRST_S = progress_display.STEP_S = 0.6
    progress_display.LOOK_S = 0.1


def slower(work: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return work(*args, **kwargs)

    return slow


def shown(text: str, pattern: str) -> list[str]:
    return [line for line in text.splitlines() if re.search(pattern, line)]


def test_loading_and_a_slow_step_name_the_slower_rank_with_a_time_left(flags: dict[str, Any], tmp_path: Path) -> None:
    """Each weight of rank 1 takes 80 ms, and each of its micro-batches."""

    def before(rank: int) -> None:
        show_soon()
        if rank == 1:
            load = training.start.weights.load_weights

            def load_slowly(folder: Any, shapes: Any, take: Any, progress: Any) -> None:
                load(folder, shapes, slower(take, 0.08), progress)

            training.start.weights.load_weights = load_slowly
            Stage.loss_sum = slower(Stage.loss_sum, 0.5)  # type: ignore[method-assign]

    rank_0, rank_1 = train(tmp_path / "ranks", stages=2, before=before, checkpoint_path=tmp_path / "run", **{**flags, "batch_size": 8})
    loading = shown(rank_0.text, r"loading weights: rank 1 \(stage 1 of 2, replica 0 of 1\) \d+\.\d of \d+\.\d kB \(\d+ %\), ETA 0:0\d")
    assert loading, rank_0.text
    step = shown(
        rank_0.text, r"step 1: \d of 8 micro-batches \(\d+ %\) done, ETA 0:0\d \(rank 1 \(stage 1 of 2, replica 0 of 1\) is in loss of"
    )
    assert step, rank_0.text
    assert not shown(rank_1.text, "ETA|so far|after the step began"), "one rank speaks for all"


def test_a_quick_run_says_nothing_of_its_progress(flags: dict[str, Any], tmp_path: Path) -> None:
    for process in train(tmp_path / "ranks", stages=2, checkpoint_path=tmp_path / "run", **flags):
        lines = [line for line in shown(process.text, PROGRESS.pattern) if "loss" not in line]
        assert lines == [], process.text


def test_a_checkpoint_that_takes_long_is_shown_in_bytes_also_where_a_thread_writes_it(flags: dict[str, Any], tmp_path: Path) -> None:
    def before(rank: int) -> None:
        show_soon()
        StepWriter.write_layer = slower(StepWriter.write_layer, 0.5)  # type: ignore[method-assign]

    for is_async in ("true", "false"):
        folder = tmp_path / is_async
        every = {"checkpoint_path": folder / "run", "async_checkpoint": is_async, "checkpoint_steps": 1}
        (rank_0,) = train(folder / "ranks", before=before, **{**flags, **every})
        assert shown(rank_0.text, r"writing the checkpoint of step 1: \d+\.\d of \d+\.\d kB \(\d+ %\), ETA"), rank_0.text


@full
def test_a_long_evaluation_is_shown_in_records_and_tokens(flags: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"What is {n} and {n}?", "completion": f" {2 * n}"} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def before(rank: int) -> None:
        show_soon()
        Stage.row_losses = slower(Stage.row_losses, 0.4)  # type: ignore[method-assign]
        Stage.extend = slower(Stage.extend, 0.2)  # type: ignore[method-assign]

    both = {"evaluation_data": data, "evaluation_metric": "accuracy", "evaluation_max_new_tokens": 4}
    (rank_0,) = train(tmp_path / "ranks", before=before, checkpoint_path=tmp_path / "run", **{**flags, **both})
    assert shown(rank_0.text, r"evaluating: \d+ of 12 records"), rank_0.text
    assert shown(rank_0.text, r"generating answers: \d+ of 48 tokens \(\d+ %\), ETA"), rank_0.text


@full
def test_the_script_that_evaluates_shows_where_it_is(flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((comms.progress, "EVERY_S"), (progress_display, "FIRST_S"), (progress_display, "LOOK_S")):
        monkeypatch.setattr(module, name, 0.2)
    monkeypatch.setattr(Stage, "row_losses", slower(Stage.row_losses, 0.3))
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"The {n} quick brown foxes. " * 4}) + "\n" for n in range(16)))
    asked = {"model_name": flags["model_name"], "evaluation_data": data, "metric": "perplexity", "seq_length": 32, "batch_size": 2}
    rank_0, _ = evaluate(tmp_path / "ranks", stages=2, **asked)
    assert shown(rank_0.text, r"evaluating: rank 0 .* \d+ of 16 records .*ETA"), rank_0.text


class NotingSpans(Spans):
    """Keeps what was counted, at every move."""

    def __init__(self) -> None:
        self.noted: dict[str, tuple[int, int, str]] = {}
        super().__init__()

    def _moved(self) -> None:
        super()._moved()
        beat = self.beat if hasattr(self, "_beside") else None
        if beat is not None and beat.total:
            self.noted[beat.part] = (beat.done, beat.total, beat.unit)


def write_records(path: Path, num: int) -> Path:
    content = "".join(json.dumps({"text": f"record {n}"}) + "\n" for n in range(num)).encode()
    path.write_bytes(zstandard.compress(content) if path.suffix == ".zst" else content)
    return path


def test_opening_a_source_counts_its_bytes_and_its_records(tmp_path: Path) -> None:
    path, spans = write_records(tmp_path / "a.jsonl", 40), NotingSpans()
    (spec,) = parse_task_list(str(path))
    documents = open_documents(spec, tasks_by_name(TaskOptions()), seed=0, place=0, spans=spans)
    size = path.stat().st_size
    assert spans.noted[f"indexing {path}"] == (size, size, "bytes")
    assert spans.noted[f"hashing {path}"] == (size, size, "bytes")
    assert spans.noted[f"checking {path}"] == (40, 40, "records")
    assert len(list(documents.in_order())) == 40
    assert spans.noted[f"reading {path}"] == (40, 40, "records")
    documents.close()


def test_a_reader_that_looks_for_its_place_is_shown_and_counts_as_getting_on(tmp_path: Path) -> None:
    """The thread of a resumed run that reads a packed file up to where it was, while the main thread waits for its first batch."""
    path, spans = write_records(tmp_path / "a.jsonl.zst", 1000), NotingSpans()
    (spec,) = parse_task_list(str(path))
    rules = ReadingRules(shuffle_window=50)
    documents = open_documents(spec, tasks_by_name(TaskOptions()), seed=0, place=0, rules=rules, spans=spans)

    def read_on(position: int) -> int:
        moves = spans.beat.moves
        reader = threading.Thread(target=documents.next_good, args=(0, position))
        reader.start()
        reader.join()
        return spans.beat.moves - moves

    spans.enter_step(1)
    assert read_on(100) == 0, "nobody waits for it"
    with spans.span(WAITING_FOR_DATA):
        assert read_on(900) > 0
        assert read_on(700) >= 14, "one for every window"
        assert spans.noted[f"reading {path} forwards to record 701"] == (750, 700, "records")
        assert read_on(701) > 0
        assert spans.beat.part == "step 1"
    documents.close()


def test_the_windows_that_are_read_over_are_those_of_a_pass_read_from_its_beginning(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl.zst", 200)
    (spec,) = parse_task_list(str(path))

    def texts(first: int) -> list[str]:
        documents = open_documents(spec, tasks_by_name(TaskOptions()), seed=3, place=0, rules=ReadingRules(shuffle_window=30))
        found = [documents.next_good(0, position).example.text for position in range(first, 200)]
        documents.close()
        return found

    assert tasks.order.WINDOW_RECORDS > 200
    assert [texts(first) for first in (30, 95, 199)] == [texts(0)[first:] for first in (30, 95, 199)]
