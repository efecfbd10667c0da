"""Run-away protection: time, memory, disk, and losses that are no numbers; each ends or spares a run in words, with everything kept."""

import json
import logging
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import load_file
from support.ranks import log_rows, losses, steps_in, train

from checkpoint.manifest import step_positions
from comms.place import place_of
from training.checkpoints import saver
from training.compute.bad_batch import save_bad_batch
from training.config.cli import parse_config
from training.job import host_limits
from training.job.host_limits import GIB, Limits, explain_out_of_memory, free_memory
from training.job.report import LOOK_BACK_BYTES, Report
from user_error import UserError


@pytest.fixture
def flags(model_folder: Path, tasks: list[Path], tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name": model_folder,
        "task_name": tasks[0],
        "checkpoint_path": tmp_path / "run",
        "seq_length": 32,
        "batch_size": 2,
        "micro_batch_size": 1,
        "total_steps": 4,
        "logging_steps": 1,
    }


def test_max_seconds_ends_a_run_saved_and_the_same_command_goes_on(flags: dict[str, Any], tmp_path: Path) -> None:
    endless = {**flags, "total_steps": 100_000, "max_seconds": 1.5, "lr_schedule": "constant"}
    ranks = train(tmp_path / "ranks", stages=2, **endless)
    (step,) = map(int, steps_in(tmp_path / "run"))
    assert f"stopped by --max-seconds 1.5 at step {step}, which is saved" in ranks[0].text
    again = train(tmp_path / "ranks", stages=2, **endless)
    assert "resuming from" in again[0].text
    assert len(log_rows(tmp_path / "run")) > step


def test_max_seconds_counts_from_the_start_of_the_supervisor() -> None:
    """However often it has started the worker again."""
    assert Limits(max_seconds=3600, min_free_memory=0, began_at=time.time() - 3500).reason() is None
    assert Limits(max_seconds=3600, min_free_memory=0, began_at=time.time() - 3601).reason() == "--max-seconds 3600"
    assert Limits(max_seconds=3600, min_free_memory=0).reason() is None


def test_a_host_that_runs_out_of_memory_stops_all_ranks_behind_the_step(flags: dict[str, Any], tmp_path: Path) -> None:
    def before(rank: int) -> None:
        host_limits.POLL_S = 0.0
        if rank == 1:
            host_limits.free_memory = lambda: GIB // 10  # type: ignore[assignment]

    ranks = train(tmp_path / "ranks", stages=2, before=before, **{**flags, "total_steps": 100_000})
    assert steps_in(tmp_path / "run") == ["1"]
    assert "0.10 GiB of this host's are free (--min-free-memory 0.25)" in ranks[1].text
    assert "stopped by" in ranks[0].text


def test_memory_is_warned_of_once_before_it_ends_a_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    free = iter([4 * GIB, GIB * 3 // 2, GIB * 3 // 2, GIB // 2, 4 * GIB])
    monkeypatch.setattr(host_limits, "free_memory", lambda: next(free))
    monkeypatch.setattr(host_limits, "POLL_S", 0.0)
    watch = Limits(max_seconds=None, min_free_memory=1.0)
    with caplog.at_level(logging.WARNING, logger="trainer"):
        said = [watch.reason() for _ in range(5)]
    assert said[:3] == [None, None, None]
    assert said[3] is not None and "0.50 GiB" in said[3] and said[4] == said[3], "once asked for, it stays"
    assert sum("below 1.00 all ranks will stop" in record.message for record in caplog.records) == 1


def test_no_limit_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_limits, "free_memory", lambda: 0)
    monkeypatch.setattr(host_limits, "POLL_S", 0.0)
    assert Limits(max_seconds=None, min_free_memory=0.0).reason() is None


def test_the_limit_of_any_cgroup_around_the_process_counts(tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, most, used, cache in ((inner, "max", 10, 0), (tmp_path / "outer", str(1000), 700, 100)):
        (folder / "memory.max").write_text(most + "\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    assert free_memory(tmp_path, membership) == 1000 - 700 + 100
    first_version = tmp_path / "memory"
    first_version.mkdir()
    for name, content in (("limit_in_bytes", "2000"), ("usage_in_bytes", "500"), ("stat", "total_inactive_file 20")):
        (first_version / f"memory.{name}").write_text(content + "\n")
    membership.write_text("9:name=systemd:/\n4:memory:/docker/seen-from-outside\n2:cpu,cpuacct:/\n0::/\n")
    assert free_memory(tmp_path, membership) == 2000 - 500 + 20
    membership.write_text("0::/\n")
    assert free_memory(tmp_path, membership) == pytest.approx(psutil.virtual_memory().available, rel=0.5)
    assert free_memory(tmp_path, tmp_path / "nothing") > 1000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small filesystem needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_checkpoint_that_does_not_fit_is_not_begun_and_those_before_it_stay(
    flags: dict[str, Any], tmp_path: Path, small_disk: Path
) -> None:
    (small_disk / "ballast").write_bytes(bytes(400_000))
    many = {**flags, "checkpoint_path": small_disk / "run", "checkpoint_steps": 1, "total_steps": 3, "async_checkpoint": "false"}
    ranks = train(tmp_path / "ranks", stages=2, expect=1, **many)
    assert "a checkpoint needs" in ranks[0].text and "--keep-checkpoints" in ranks[0].text
    assert len(log_rows(small_disk / "run")) == 3, "the training went on"
    assert list(step_positions(small_disk / "run")) == ["1"]
    assert not list((small_disk / "run").glob(".*partial"))


def test_too_little_room_is_found_before_anything_is_written(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(_: int) -> None:
        usage = shutil.disk_usage("/")
        saver.shutil.disk_usage = lambda path: usage._replace(free=1000)  # type: ignore[attr-defined]
        saver.StepWriter.begin = lambda self: 1 / 0  # type: ignore[assignment,method-assign,return-value]

    ranks = train(tmp_path / "ranks", expect=1, before=before, **flags)
    assert "where 1.00kB are free" in ranks[0].text and "ZeroDivision" not in ranks[0].text


def test_a_run_whose_loss_is_no_number_keeps_the_batch_that_ended_it(flags: dict[str, Any], tmp_path: Path) -> None:
    def before(_: int) -> None:
        from modules.stage import Stage

        loss_sum = Stage.loss_sum
        Stage.loss_sum = lambda self, *a, **k: loss_sum(self, *a, **k) * float("nan")  # type: ignore[method-assign]

    run = tmp_path / "run"
    ranks = train(tmp_path / "ranks", stages=2, replicas=2, expect=None, before=before, **{**flags, "max_skipped_steps": 2})
    assert ranks[0].status == 1
    kept = run / "bad_batch_step_2"
    assert f"The last batch is kept in {kept}" in ranks[0].text
    planes = load_file(kept / "batch.safetensors")
    assert {name: array.shape for name, array in planes.items()} == dict.fromkeys(("token_ids", "positions", "targets"), (4, 32))
    rows = [json.loads(line) for line in (kept / "batch.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(row["text"] and row["targets"] > 0 for row in rows)
    assert list(step_positions(run)) == [], "it is not taken for a checkpoint"
    train(tmp_path / "ranks", stages=2, replicas=2, **flags)
    assert len(losses(run)) == 2 + 4


def test_a_batch_is_replaced_and_a_full_disk_is_said(tmp_path: Path) -> None:
    tokens = np.zeros((2, 3, 4), dtype=np.int32)
    first = save_bad_batch(tmp_path, 7, tokens, lambda ids: "a")
    second = save_bad_batch(tmp_path, 7, tokens, lambda ids: "b")
    assert first == second and '"b"' in (second / "batch.jsonl").read_text()
    with pytest.raises(UserError, match="missing"):
        save_bad_batch(tmp_path / "missing", 7, tokens, lambda ids: "a")


def test_what_ran_out_of_memory_is_explained() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60, dtype=torch.uint8)
    said = explain_out_of_memory(found.value)
    assert said is not None and "1152921504606846976 bytes" in said and "--micro-batch-size" in said
    gpu = explain_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ..."))
    assert gpu is not None and "2.00 GiB" in gpu and "GPU" in gpu
    assert explain_out_of_memory(MemoryError()) is not None
    assert explain_out_of_memory(RuntimeError("shapes do not fit")) is None


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--peer-timeout", "soon", "auto or a number of seconds"),
        ("--peer-timeout", "0.5", "auto or a number of seconds"),
        ("--max-seconds", "0", "above 0"),
        ("--max-seconds", "nan", "above 0"),
        ("--max-restarts", "-1", "0 or more"),
        ("--rescue-interval", "inf", "0 or more"),
        ("--min-free-memory", "-1", "0 or more"),
        ("--allow-replica-loss", "true", "needs replicas"),
    ],
)
def test_limits_that_mean_nothing_are_refused(flag: str, value: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_config(["--model-name", "m", "--task-name", "t", "--checkpoint-path", "c", "--total-steps", "1", f"{flag}={value}"])


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 3, "lo', b"x" * (LOOK_BACK_BYTES + 1), b"x" * (2 * LOOK_BACK_BYTES - 1)], ids=["-", "short", "long", "longer"]
)
@pytest.mark.parametrize("whole", [b"", b'{"step": 1}\n{"step": 2}\n'], ids=["nothing", "two rows"])
def test_a_row_that_was_left_unfinished_is_cut_off_so_that_every_line_can_be_read(whole: bytes, torn: bytes, tmp_path: Path) -> None:
    log = tmp_path / "train_log.jsonl"
    log.write_bytes(whole + torn)
    place = place_of(0, dp_size=1, pp_size=1)
    report = Report(place=place, folder=tmp_path, first_step=2, total_steps=5, logging_steps=1)
    assert log.read_bytes() == whole, "no byte is written, so a full disk is no matter"
    row = {"step": 3, "optimizer_step": 3, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens_per_s": 1.0, "skipped": False, "wire_bytes": 0}
    report.row(row)
    report.close()
    assert log.read_bytes().startswith(whole) and log_rows(tmp_path)[-1]["step"] == 3
