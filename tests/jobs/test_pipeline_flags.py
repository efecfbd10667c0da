"""Every flag of the pipeline in whole runs of the trainer: what must not change a bit does not, and what must show in the log does."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.models import make_model, make_tokenizer
from support.ranks import equal_files, log_rows, losses, train
from support.tiers import sample

from comms.spans import CATEGORIES
from training.membership import meeting
from training.memory import allocator
from training.timeline import tracing

STEPS = 4


@pytest.fixture(scope="module")
def flags(model_folder: Path, tasks: list[Path]) -> dict[str, Any]:
    return {
        "model_name": model_folder,
        "task_name": tasks[0],
        "seq_length": 32,
        "batch_size": 4,
        "micro_batch_size": 1,
        "gradient_accumulate_step": 2,
        "total_steps": STEPS,
        "checkpoint_steps": 2,
        "lr": 1e-3,
    }


@pytest.fixture(scope="module")
def reference(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage, all forwards and then all backwards, nothing recomputed."""
    out = tmp_path_factory.mktemp("reference")
    train(out / "ranks", checkpoint_path=out / "run", pp_mode="gpipe", **flags)
    return out / "run"


@sample(2)
@pytest.mark.parametrize(
    ("stages", "how"),
    [
        (4, {"pp_mode": "gpipe", "recompute": "layer"}),
        (4, {"pp_mode": "1f1b"}),
        (2, {"pp_mode": "1f1b", "extra_warmup_forwards": 3, "stage_layers": "1,3"}),
        (3, {"pp_mode": "zb", "stage_layers": "1,2,1"}),
        (2, {"pp_mode": "zb", "extra_warmup_forwards": 1, "recompute": "layer", "num_layers": 3}),
        (2, {"pp_mode": "zb", "partition": "measured"}),
        (1, {"pp_mode": "zb", "recompute": "layer"}),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_no_schedule_no_cut_and_no_recomputation_changes_a_bit(
    stages: int, how: dict[str, Any], flags: dict[str, Any], reference: Path, tmp_path: Path
) -> None:
    train(tmp_path, stages=stages, checkpoint_path=tmp_path / "run", **flags, **how)
    assert losses(tmp_path / "run") == losses(reference)
    assert len(losses(reference)) == STEPS // flags["gradient_accumulate_step"]
    for step in (2, 4):
        assert equal_files(tmp_path / "run" / str(step), reference / str(step)) == []


def test_a_run_resumes_in_another_schedule_and_at_another_cut_bit_for_bit(flags: dict[str, Any], reference: Path, tmp_path: Path) -> None:
    half = {**flags, "total_steps": 2, "lr_schedule": "constant"}
    train(tmp_path, stages=2, checkpoint_path=tmp_path / "one", pp_mode="gpipe", **{**flags, "lr_schedule": "constant"})
    train(tmp_path, stages=4, checkpoint_path=tmp_path / "two", pp_mode="1f1b", **half)
    train(tmp_path, stages=2, checkpoint_path=tmp_path / "two", pp_mode="zb", stage_layers="3,1", **{**half, "total_steps": 4})
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    assert equal_files(tmp_path / "two" / "4", tmp_path / "one" / "4") == []


def test_the_start_shows_cut_plan_and_links_and_the_log_what_was_sent(flags: dict[str, Any], tmp_path: Path) -> None:
    first, *_ = train(
        tmp_path, stages=2, checkpoint_path=tmp_path / "run", wire_dtype="bf16", wire_dtype_grad="int8", partition="measured", **flags
    )
    assert re.search(r"link 0-1: [\d.]+ ms one way, .*: --extra-warmup-forwards [0-9]+ for the stages before it", first.text), first.text
    assert "share of slowest" in first.text and re.search(r"(even cut: slowest stage|the even cut is the best one)", first.text)
    assert re.search(r"wire, activations +bf16 .*\n.*wire, gradients +int8", first.text)
    assert "micro-batches in flight" in first.text
    values = 2 * 4 * 32 * 32  # accumulation steps x sequences x tokens x width
    for row in log_rows(tmp_path / "run"):
        assert row["wire_bytes"] == values * 2 + (values + 2 * 4 * 32 * 4)
        assert 1e-4 < row["wire_error"] < 4e-3 < row["wire_error_grad"] < 1e-2
    assert re.search(r"wire 0\.\d+ MB \(relative error: activations 0\.00\d+, gradients 0\.00\d+\)", first.text)


def test_every_rank_keeps_its_freed_memory(flags: dict[str, Any], tmp_path: Path) -> None:
    def before(rank: int) -> None:
        def told() -> None:
            (tmp_path / f"told{rank}").touch()
            allocator.keep_freed_memory()

        meeting.keep_freed_memory = told

    train(tmp_path, stages=2, before=before, checkpoint_path=tmp_path / "run", **flags)
    assert (tmp_path / "told0").exists() and (tmp_path / "told1").exists()


def test_without_links_or_rounding_the_log_says_so(flags: dict[str, Any], reference: Path) -> None:
    assert all(row["wire_bytes"] == 0 and row["wire_error"] is None for row in log_rows(reference))


def test_a_compressed_run_is_close_to_the_exact_one_and_not_equal_to_it(tasks: list[Path], flags: dict[str, Any], tmp_path: Path) -> None:
    make_model(tmp_path / "model", n_embd=64)
    make_tokenizer(tmp_path / "model")
    runs = {}
    for wire_dtype in ("none", "int8", "int4"):
        common = {**flags, "model_name": tmp_path / "model", "checkpoint_path": tmp_path / wire_dtype, "wire_dtype": wire_dtype}
        train(tmp_path / f"ranks_{wire_dtype}", stages=2, **common)
        runs[wire_dtype] = losses(tmp_path / wire_dtype)
    for wire_dtype, tolerance in (("int8", 2e-3), ("int4", 3e-2)):
        assert runs[wire_dtype] != runs["none"]
        assert runs[wire_dtype] == pytest.approx(runs["none"], rel=tolerance)


def test_profiling_writes_one_trace_of_all_ranks_and_changes_no_bit(flags: dict[str, Any], reference: Path, tmp_path: Path) -> None:
    trace_path = tmp_path / "deep" / "trace.json"
    processes = train(
        tmp_path,
        stages=2,
        replicas=2,
        checkpoint_path=tmp_path / "run",
        pp_mode="zb",
        profiling="tidy_profiling",
        trace_path=trace_path,
        **{**flags, "batch_size": 2},
    )
    assert "profiling cost" in processes[0].text
    events = [event for event in json.loads(trace_path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert {(event["pid"], event["tid"]) for event in events} == {(dp, pp) for dp in range(2) for pp in range(2)}
    wanted = {"recv", "forward", "backward", "weight-grad", "send", "allreduce", "optimizer", "data-wait"}
    assert wanted <= set(CATEGORIES.values())
    assert wanted <= {event["cat"] for event in events}
    train(tmp_path / "plain", stages=2, replicas=2, checkpoint_path=tmp_path / "plain_run", pp_mode="zb", **{**flags, "batch_size": 2})
    assert losses(tmp_path / "run") == losses(tmp_path / "plain_run")


def test_a_trace_that_cannot_be_written_in_the_end_costs_no_training(flags: dict[str, Any], tmp_path: Path) -> None:
    """The folder is there when the run starts, and gone when the trace is due."""

    def before(rank: int) -> None:
        write = tracing.write_trace
        if rank == 0:
            tracing.write_trace = lambda path, trace: (shutil.rmtree(path.parent), write(path, trace))[1]

    trace_path = tmp_path / "gone" / "trace.json"
    profiled = {"profiling": "tidy_profiling", "profiling_steps": 1, "trace_path": trace_path}
    first, *_ = train(tmp_path, stages=2, before=before, checkpoint_path=tmp_path / "run", **profiled, **flags)
    assert "there is no trace:" in first.text and "The training goes on" in first.text
    assert (tmp_path / "run" / str(STEPS) / "manifest.json").exists()


def test_the_trace_is_beside_the_checkpoints_where_no_path_is_given(flags: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path, checkpoint_path=tmp_path / "run", profiling="tidy_profiling", profiling_steps=1, **flags)
    assert (tmp_path / "run" / "trace.json").exists()
