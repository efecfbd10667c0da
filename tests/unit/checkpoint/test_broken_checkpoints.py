"""What somebody with a fresh mind broke: each of these once lost a checkpoint, a training or the truth."""

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ranks import eight_sequences, free_port, launch, log_rows, losses, steps_in, train, train_argv, train_on_hosts
from support.tiers import full, sample

from checkpoint.layer_store import StepWriter
from training.checkpoints import saver

QUARTERS = {"batch_size": 2, "gradient_accumulate_step": 4, "checkpoint_steps": 4}


@pytest.fixture(scope="module")
def flags(model_folder: Path, tasks: list[Path]) -> dict[str, Any]:
    return eight_sequences(model_folder, tasks)


def raising(error: BaseException, method: str, victim: int, steps: tuple[int, ...] = (2,)) -> Callable[[int], None]:
    def before(rank: int) -> None:
        real = getattr(StepWriter, method)

        def call(self: StepWriter, *args: Any, **kwargs: Any) -> Any:
            if self.step in steps:
                raise error
            return real(self, *args, **kwargs)

        if rank == victim:
            setattr(StepWriter, method, call)

    return before


def test_1_the_host_of_rank_0_is_lost_and_the_other_replica_goes_on(flags: dict[str, Any], tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    train_on_hosts(tmp_path, [a, b], stages=1, **{**flags, "batch_size": 4, "data_group_size": 2, "total_steps": 2})
    shutil.rmtree(a)
    (process,) = train_on_hosts(tmp_path, [b], stages=1, **flags)
    assert "starting at step 2 of 4" in process.text


@full
def test_2_a_full_disk_does_not_end_the_training_through_its_log(flags: dict[str, Any], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root may mount")
    try:

        def before(rank: int) -> None:
            real = saver._StepSave.run

            def run(work: Any) -> None:
                if work.writer.step == 2:
                    descriptor = os.open(disk / "others", os.O_CREAT | os.O_WRONLY)
                    for size in (65536, 4096, 1):
                        try:
                            while True:
                                os.write(descriptor, bytes(size))
                        except OSError:
                            pass
                    os.close(descriptor)
                if work.writer.step == 28:
                    (disk / "others").unlink()
                real(work)

            saver._StepSave.run = run  # type: ignore[method-assign]

        train(tmp_path, checkpoint_path=disk / "run", before=before, **{**flags, "total_steps": 30, "checkpoint_steps": 2})
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@sample(1)
@pytest.mark.parametrize(("method", "victim"), [("begin", 0), ("begin", 1), ("write_companions", 0), ("write_companions", 1)])
def test_3_an_unforeseen_error_in_a_synchronous_save_leaves_nobody_waiting(
    method: str,
    victim: int,
    flags: dict[str, Any],
    tmp_path: Path,
) -> None:
    common = {"pipeline_group_size": 2, "world_size": 2, "dist_url": f"tcp://127.0.0.1:{free_port()}", "num_threads": 1, **flags}
    common |= {"device": "cpu", "async_checkpoint": "false"}
    before = raising(OSError(errno.ESTALE, "Stale file handle"), method, victim)
    processes = launch(lambda r: train_argv(**common, rank=r, checkpoint_path=tmp_path / f"host{r}"), 2, tmp_path / "ranks", before)
    try:
        for process in processes:
            process.wait(25)
    finally:
        for process in processes:
            process.kill()


@sample(1)
@pytest.mark.parametrize("method", ["begin", "write_layer", "prepare", "commit"])
def test_4_any_error_of_the_filesystem_costs_one_checkpoint_only(method: str, flags: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path, checkpoint_path=tmp_path / "run", before=raising(OSError(errno.ESTALE, "Stale file handle"), method, 0), **flags)
    assert steps_in(tmp_path / "run") == ["1", "3", "4"]


def restarted(rank: int) -> None:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"


def test_5a_torchruns_restart_before_the_first_save_does_not_start_over(flags: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path, checkpoint_path=tmp_path / "source", **{**flags, "total_steps": 2})
    resume = tmp_path / "source" / "2"
    (process,) = train(tmp_path, checkpoint_path=tmp_path / "own", resume=resume, before=restarted, **flags)
    assert "starting at step 2 of 4" in process.text


@sample(1)
@pytest.mark.parametrize(("resume", "start"), [("none", 0), ("1", 1)])
def test_5b_torchruns_restart_before_anything_was_renamed_still_obeys(
    resume: str,
    start: int,
    flags: dict[str, Any],
    tmp_path: Path,
) -> None:
    train(tmp_path, checkpoint_path=tmp_path / "run", **{**flags, "total_steps": 3})

    def of_another_launcher(rank: int) -> None:
        restarted(rank)
        os.getppid = lambda: 1  # type: ignore[assignment]

    (process,) = train(tmp_path, checkpoint_path=tmp_path / "run", resume=resume, before=of_another_launcher, **flags)
    assert f"starting at step {start} of 4" in process.text


def test_6_an_old_step_that_is_a_link_ends_neither_the_training_nor_every_later_start(flags: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tmp_path, checkpoint_path=run, **{**flags, "total_steps": 2})
    (run / "1").rename(tmp_path / "archive")
    (run / "1").symlink_to(tmp_path / "archive")
    train(tmp_path, checkpoint_path=run, keep_checkpoints=1, **flags)


def test_7_keep_checkpoints_never_deletes_what_was_just_saved(flags: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tmp_path, checkpoint_path=run, **{**flags, **QUARTERS, "total_steps": 8})
    (run / "4" / "manifest.json").unlink()
    train(tmp_path, checkpoint_path=run, keep_checkpoints=1, **{**flags, "total_steps": 3})
    assert "3" in steps_in(run)


def test_8_a_step_that_was_being_deleted_does_not_come_back_in_halves(flags: dict[str, Any], tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    train_on_hosts(tmp_path, [a, b], stages=2, **{**flags, "total_steps": 2})
    (a / "1").rename(a / ".1.partial")  # as remove_old_steps does; then killed in its rmtree
    (a / ".1.partial" / "layer_00.safetensors").unlink()
    train_on_hosts(tmp_path, [a, b], stages=2, **{**flags, "total_steps": 3})
    assert not (a / "1").exists()


def test_9_a_cut_off_commit_is_completed_where_an_older_step_has_its_name(flags: dict[str, Any], tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    train_on_hosts(tmp_path, [a, b], stages=2, **{**flags, **QUARTERS, "total_steps": 8})  # 4 and 8, in quarters

    def before(rank: int) -> None:
        real = StepWriter.commit

        def commit(self: StepWriter) -> Path:
            if self.step == 4:
                while not (a / ".4.partial").exists() and not (a / "4.damaged").exists() and not (a / "4.set-aside").exists():
                    time.sleep(0.01)
                time.sleep(0.5)
                os.kill(os.getpid(), 9)
            return real(self)

        if rank == 1:
            StepWriter.commit = commit  # type: ignore[method-assign]

    train_on_hosts(tmp_path, [a, b], stages=2, expect=None, before=before, **flags)  # type: ignore[arg-type]
    processes = train_on_hosts(tmp_path, [a, b], stages=2, **{**flags, "total_steps": 5})
    assert "starting at step 4 of 5" in processes[0].text


@sample(1)
@pytest.mark.parametrize(("stages", "wire"), [(4, "int8"), (1, "int8"), (2, "none")])
def test_10_verify_resume_with_a_compressed_wire(stages: int, wire: str, flags: dict[str, Any], tmp_path: Path) -> None:
    own = {**flags, "verify_resume": "true"}
    train(tmp_path, stages=2, checkpoint_path=tmp_path / "run", **{**own, "wire_dtype": "int8", "total_steps": 2})
    train(tmp_path, stages=stages, checkpoint_path=tmp_path / "run", wire_dtype=wire, **own)


def test_11_half_a_step_does_not_count_among_those_that_are_kept(flags: dict[str, Any], tmp_path: Path) -> None:
    from user_error import UserError

    a, b = tmp_path / "a", tmp_path / "b"
    before = raising(UserError("no"), "commit", 1, (3, 4))
    train_on_hosts(tmp_path, [a, b], stages=2, before=before, **{**flags, "total_steps": 5, "keep_checkpoints": 2})
    assert len(set(steps_in(a)) & set(steps_in(b))) == 2, (steps_in(a), steps_in(b))


def test_12_another_run_is_not_taken_for_the_one_that_was_resumed_from_elsewhere(flags: dict[str, Any], tmp_path: Path) -> None:
    own, source = tmp_path / "own", tmp_path / "source"
    train(tmp_path, checkpoint_path=own, **{**flags, "total_steps": 2, "lr": 5e-3})
    train(tmp_path, checkpoint_path=source, **flags)
    expected = losses(source)[2]
    shutil.rmtree(source / "4")
    shutil.rmtree(source / "3")

    def die(rank: int) -> None:
        from training.loop import Trainer

        Trainer._one_step = lambda *_: os._exit(9)  # type: ignore[method-assign]

    train(tmp_path, checkpoint_path=own, resume=source / "2", before=die, expect=9, **flags)
    train(tmp_path, checkpoint_path=own, resume=source / "2", before=restarted, **flags)  # torchrun's restart
    assert log_rows(own)[2]["loss"] == expected
