"""A save of the real trainer that is cut off at every point where it changes the disk, or that the disk refuses."""

import builtins
import errno
import itertools
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.models import make_model, make_tokenizer
from support.ranks import Process, equal_files, free_port, launch, log_rows, train_argv
from support.tiers import drawn, partly, sample

from checkpoint.manifest import read_manifest, verify_step
from training.checkpoints import saver

STEPS, CUT_OFF = 3, 2  # saves after steps 1, 2, 3; the second is the one that meets a fault
AT_ONCE = 3


class DiskCalls:
    """Everything that changes the disk on the thread that saves step CUT_OFF, one line of ``trace`` each, and a fault at one of them.

    A point is counted by the call itself, so a file that a later version writes adds its own.
    """

    def __init__(self, trace: Path, meets: Callable[[int, str], bool], fault: Callable[[], object]) -> None:
        self._trace = os.open(trace, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self._meets, self._fault, self._count = meets, fault, itertools.count()
        self._thread: int | None = None

    def arm(self) -> None:
        """For ``before`` of a rank: called in the rank's own process."""
        real_run, real_open = saver._StepSave.run, builtins.open

        def run(work: Any) -> None:
            self._thread = threading.get_ident() if work.writer.step == CUT_OFF else None
            try:
                real_run(work)
            finally:
                self._thread = None

        saver._StepSave.run = run  # type: ignore[method-assign]
        for name in ("fsync", "rename", "replace", "link", "mkdir", "unlink", "rmdir", "ftruncate", "truncate", "pwrite"):
            setattr(os, name, self._watched(name, getattr(os, name)))

        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if self._thread != threading.get_ident() or set(mode).isdisjoint("wxa+"):
                return real_open(path, mode, *args, **kwargs)
            self.point(f"open {_short(path)}")
            return _WatchedFile(real_open(path, mode, *args, **kwargs), self, _short(path))

        builtins.open = opened  # type: ignore[assignment]

    def point(self, what: str, before_fault: Callable[[], object] = lambda: None) -> None:
        if self._thread != threading.get_ident():
            return
        os.write(self._trace, f"{what}\n".encode())
        if self._meets(next(self._count), what):
            before_fault()
            self._fault()

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            if self._thread == threading.get_ident():
                self.point(f"{name} {_short(os.readlink(f'/proc/self/fd/{target}') if isinstance(target, int) else target)}")
            return real(target, *args, **kwargs)

        return call


class _WatchedFile:
    """A file opened for writing; a fault in a write comes after half of it."""

    def __init__(self, file: Any, calls: DiskCalls, name: str) -> None:
        self._file, self._calls, self._name, self._num_writes = file, calls, name, 0

    def write(self, data: Any) -> int:
        self._num_writes += 1
        if self._num_writes <= 2:  # a header and a first tensor; later ones differ in nothing
            what = "header" if self._num_writes == 1 else "body"
            self._calls.point(f"write {what} {self._name}", lambda: (self._file.write(data[: len(data) // 2]), self._file.flush()))
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _short(path: Any) -> str:
    """train_state/layer_00.safetensors, .2.partial: what stands behind the step folder, or its own name."""
    parts = Path(os.fsdecode(path)).parts
    return "/".join(parts[-2:]) if len(parts) > 1 and parts[-2] == "train_state" else parts[-1]


@dataclass(frozen=True)
class Setting:
    """Where a run saves: a folder per rank, on the thread that trains or beside it."""

    roots: Sequence[Path]  # by rank
    is_async: bool
    flags: dict[str, Any]

    @property
    def folders(self) -> list[Path]:
        return sorted(set(self.roots))

    def start(self, ranks: Path, before: Callable[[int], None] | None = None) -> list[Process]:
        common = {"pipeline_group_size": len(self.roots), "world_size": len(self.roots), "dist_url": f"tcp://127.0.0.1:{free_port()}"}
        common |= {"num_threads": 1, "device": "cpu", "rendezvous_timeout": 30, "async_checkpoint": str(self.is_async).lower()}
        common |= self.flags
        return launch(lambda rank: train_argv(**common, rank=rank, checkpoint_path=self.roots[rank]), len(self.roots), ranks, before)


def finish(processes: Sequence[Process], expect: int | None = 0) -> None:
    try:
        for process in processes:
            assert process.wait(60) == expect or expect is None, "\n".join(p.text for p in processes)
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def flags_of(tasks: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """By number of stages, of one layer each."""
    models = tmp_path_factory.mktemp("models")

    def flags(stages: int) -> dict[str, Any]:
        model = models / str(stages)
        if not model.exists():
            make_model(model, n_layer=stages)
            make_tokenizer(model)
        sizes = {"seq_length": 32, "batch_size": 2, "micro_batch_size": 1, "lr": 1e-3}
        saves = {"total_steps": STEPS, "checkpoint_steps": 1, "keep_checkpoints": 1}
        return {"model_name": model, "task_name": tasks[0], **sizes, **saves}

    return flags


def setting(folder: Path, flags: dict[str, Any], *, stages: int, is_separate: bool, is_async: bool) -> Setting:
    return Setting([folder / (f"host{rank}" if is_separate else "run") for rank in range(stages)], is_async, flags)


def rows_by_step(root: Path) -> dict[int, float]:
    by_step: dict[int, float] = {}
    for row in log_rows(root):
        assert by_step.setdefault(row["step"], row["loss"]) == row["loss"], "a step that is done again gives the same loss"
    return by_step


def steps_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name[0].isdigit())


def complete_step(folders: Sequence[Path]) -> str:
    """The step that a restart must go on from; all its files have the right hash in one folder or another."""
    step = str(CUT_OFF) if any((folder / str(CUT_OFF)).is_dir() for folder in folders) else str(CUT_OFF - 1)
    whole: set[str] = set()
    for folder in folders:
        for older in steps_in(folder):
            right_files(folder / older)
        there = folder / step if (folder / step).is_dir() else folder / f".{step}.partial"  # ready: the rename alone is missing
        whole |= right_files(there)
        missing = set(read_manifest(there).everywhere) - whole
    assert missing == set()
    return step


def right_files(folder: Path) -> set[str]:
    """What the manifest of ``folder`` says is in it, and is, to the last bit."""
    here = set(read_manifest(folder).here)
    assert [p for p in verify_step(folder, hashes=True, only=here) if "of other hosts" not in p] == []
    return here


#                                            stages, separate, async, victim, every, at least
CUTS = {
    "one stage": (1, False, False, 0, 1, 60),
    "one stage, beside the training": (1, False, True, 0, 3, 20),
    "two stages, the keeper": (2, False, True, 0, 15, 10),
    "two stages, the other writer": (2, False, False, 1, 3, 5),
    "two folders, rank 0": (2, True, False, 0, 15, 10),
    "two folders, rank 1": (2, True, True, 1, 15, 10),
}


@sample(2)
@partly
@pytest.mark.parametrize("cut", CUTS)
def test_kill_9_at_every_point_of_a_save_resumes_from_a_complete_step_and_ends_in_the_same_bits(
    cut: str, flags_of: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    stages, is_separate, is_async, victim, every, at_least = CUTS[cut]

    def of(name: str) -> Setting:
        return setting(tmp_path / name, flags_of(stages), stages=stages, is_separate=is_separate, is_async=is_async)

    def start(name: str, fatal: int | None) -> list[Process]:
        def before(rank: int) -> None:
            if rank == victim:
                DiskCalls(tmp_path / f"{name}.trace", lambda k, _: k == fatal, lambda: os.kill(os.getpid(), signal.SIGKILL)).arm()

        return of(name).start(tmp_path / name / "ranks", before)

    finish(start("undisturbed", None))
    trace = (tmp_path / "undisturbed.trace").read_text().splitlines()
    points = [k for k, point in enumerate(trace) if k % every == 0 or "manifest" in point or point.startswith(("rename", "rmdir"))]
    assert len(points) >= at_least, trace
    points = drawn(points, AT_ONCE, key=cut)
    fired: set[str] = set()
    for some in (points[k : k + AT_ONCE] for k in range(0, len(points), AT_ONCE)):
        dying = {k: start(str(k), k) for k in some}
        for k, processes in dying.items():
            finish(processes, expect=None)
            assert processes[victim].status == -signal.SIGKILL, f"{trace[k]}: {processes[victim].text}"
            assert (tmp_path / f"{k}.trace").read_text().splitlines() == trace[: k + 1], "the same save has the same points"
            fired.add(f"{k} {trace[k]}")
        steps = {k: complete_step(of(str(k)).folders) for k in some}
        if stages == 1:
            assert steps == {k: "2" if f"rename .{CUT_OFF}.partial" in trace[:k] else "1" for k in some}
        again = {k: of(str(k)).start(tmp_path / str(k) / "ranks") for k in some}
        for k, processes in again.items():
            finish(processes)
            assert f"starting at step {steps[k]} of {STEPS}" in processes[0].text, f"killed before {trace[k]}: {processes[0].text}"
            check_end(of(str(k)), of("undisturbed"))
            shutil.rmtree(tmp_path / str(k))
    assert len(fired) == len(points)


def check_end(run: Setting, undisturbed: Setting) -> None:
    """Same losses and files, nothing else left."""
    assert rows_by_step(run.roots[0]) == rows_by_step(undisturbed.roots[0])
    for folder, expected in zip(run.folders, undisturbed.folders, strict=True):
        assert equal_files(folder / str(STEPS), expected / str(STEPS)) == []
        assert right_files(folder / str(STEPS))
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in expected.iterdir()), "no rest of the killed save"


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def note_given_up(listing: Path) -> None:
    """For ``before``: what the folder holds when a keeper has given the step up, one line each."""
    real_run = saver._StepSave.run

    def run(work: Any) -> None:
        try:
            real_run(work)
        except saver.StepNotSaved:
            names = ",".join(sorted(p.name for p in work.writer.root.iterdir() if p.is_dir()))
            with listing.open("a") as file:
                file.write(f"{work.writer.step}: {names}\n")
            raise

    saver._StepSave.run = run  # type: ignore[method-assign]


#           stages, separate, async, victim, point, what the error names
REFUSALS = {
    "a writer's tensor": (2, False, True, 1, "write body train_state/layer_01.safetensors", "layer_01.safetensors"),
    "a writer's header": (2, True, False, 1, "write header lm_head.safetensors", "lm_head.safetensors"),
    "the keeper's folder": (2, False, False, 0, "mkdir .2.partial", ".2.partial"),
    "the keeper's manifest": (2, True, True, 0, "write header manifest.json", ".2.partial"),
    "flushing": (1, False, True, 0, "fsync layer_00.safetensors", "layer_00.safetensors"),
    "the rename": (2, True, True, 1, "rename .2.partial", ".2.partial"),
}


@sample(2)
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_disk_that_is_full_costs_one_checkpoint_and_not_the_training(
    refusal: str, flags_of: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    stages, is_separate, is_async, victim, where, named = REFUSALS[refusal]
    undisturbed, run = (
        setting(tmp_path / name, flags_of(stages), stages=stages, is_separate=is_separate, is_async=is_async) for name in ("good", "run")
    )

    def before(rank: int) -> None:
        note_given_up(tmp_path / "given up")
        if rank == victim:
            DiskCalls(tmp_path / "trace", lambda _, point: point == where, no_space).arm()

    finish(undisturbed.start(tmp_path / "ranks"))
    processes = run.start(tmp_path / "ranks", before)
    finish(processes)
    assert where in (tmp_path / "trace").read_text().splitlines(), "the fault must have met the save"
    told = [line for line in processes[0].text.splitlines() if "was not written" in line]
    assert len(told) == 1, processes[0].text
    for part in (f"the checkpoint of step {CUT_OFF}", f"rank {victim} ", named, "No space left on device"):
        assert part in told[0]
    assert all("No space left" not in process.text for process in processes[1:])
    assert all("Traceback" not in process.text for process in processes)
    one_renamed = refusal == "the rename"
    for line in (tmp_path / "given up").read_text().splitlines():
        assert line == "2: 1" or (one_renamed and line == "2: 1,2"), "the old checkpoint stays, the partial is gone"
    assert len((tmp_path / "given up").read_text().splitlines()) == len(run.folders)
    check_end(run, undisturbed)


@sample(1)
@pytest.mark.parametrize("is_separate", [False, True])
@pytest.mark.parametrize("victim", [0, 1])
def test_when_the_last_save_fails_all_ranks_say_so_and_exit_1(
    victim: int, is_separate: bool, flags_of: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    flags = {**flags_of(2), "total_steps": CUT_OFF}
    run = setting(tmp_path / "run", flags, stages=2, is_separate=is_separate, is_async=bool(victim))

    def before(rank: int) -> None:
        if rank == victim:
            where = f"write header layer_0{victim}.safetensors"
            DiskCalls(tmp_path / "trace", lambda _, point: point == where, no_space).arm()

    processes = run.start(tmp_path / "ranks", before)
    finish(processes, expect=1)
    for process in processes:
        assert f"rank {victim} " in process.text and "No space left on device" in process.text, process.text
        assert "Traceback" not in process.text, process.text
    for folder in run.folders:
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["1"]
    again = run.start(tmp_path / "ranks")
    finish(again)
    assert f"starting at step 1 of {CUT_OFF}" in again[0].text


@pytest.mark.parametrize("is_async", [False, True])
def test_a_file_that_the_system_does_not_let_grow_is_told_and_the_next_save_works(
    is_async: bool, flags_of: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    """The kernel itself refuses: RLIMIT_FSIZE, while step CUT_OFF is saved."""
    run = setting(tmp_path / "run", flags_of(2), stages=2, is_separate=False, is_async=is_async)

    def before(rank: int) -> None:
        note_given_up(tmp_path / "given up")
        real_run, hard = saver._StepSave.run, resource.getrlimit(resource.RLIMIT_FSIZE)[1]

        def limited(work: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if rank == 1 and work.writer.step == CUT_OFF else hard, hard))
            try:
                real_run(work)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        saver._StepSave.run = limited  # type: ignore[method-assign]

    processes = run.start(tmp_path / "ranks", before)
    finish(processes)
    assert processes[0].text.count("was not written") == 1
    assert "rank 1 " in processes[0].text and "File too large" in processes[0].text and "layer_01.safetensors" in processes[0].text
    assert (tmp_path / "given up").read_text() == "2: 1\n"
    assert steps_in(tmp_path / "run" / "run") == [str(STEPS)]


@contextmanager
def tiny_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a disk to fill")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_disk_that_is_really_full_is_told_emptied_and_written_again(
    is_async: bool, flags_of: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    with tiny_disk(tmp_path / "disk", "4m") as disk:
        run = setting(disk, flags_of(1), stages=1, is_separate=False, is_async=is_async)

        def before(rank: int) -> None:
            note_given_up(tmp_path / "given up")
            real_run = saver._StepSave.run
            saver.ROOM_BYTES = -(2**40)  # there was room when it was looked for

            def on_a_full_disk(work: Any) -> None:
                if work.writer.step == CUT_OFF:
                    (disk / "others").write_bytes(bytes(shutil.disk_usage(disk).free - 200_000))
                try:
                    real_run(work)
                finally:
                    (disk / "others").unlink(missing_ok=True)

            saver._StepSave.run = on_a_full_disk  # type: ignore[method-assign]

        (process,) = run.start(tmp_path / "ranks", before)
        finish([process])
        assert process.text.count("was not written") == 1 and "No space left on device" in process.text
        assert (tmp_path / "given up").read_text() == "2: 1\n"
        assert steps_in(disk / "run") == [str(STEPS)]
