"""Saving while training goes on: what is written is the step's own, who waits for whom, which steps stay, and how a signal ends a run."""

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_model, make_tokenizer
from support.ranks import Process, equal_files, free_port, launch, log_rows, losses, train, train_argv
from support.tiers import sample

from checkpoint.layer_store import StepWriter
from checkpoint.manifest import read_manifest
from checkpoint.train_state import read_trainer_state
from optim.build import AdamW
from training.checkpoints import saver
from training.checkpoints.host_copy import HostCopy, LayerState, num_bytes
from training.job.stopping import ONE_REQUEST_S

STEPS = 6
SLOW_S = 0.4


@pytest.fixture(scope="module")
def flags(tasks: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models") / "two-layers"
    make_model(folder, n_layer=2)
    make_tokenizer(folder)
    sizes = {"seq_length": 32, "batch_size": 2, "micro_batch_size": 1, "lr": 1e-3, "total_steps": STEPS, "checkpoint_steps": 2}
    return {"model_name": folder, "task_name": tasks[0], **sizes}


@pytest.fixture(scope="module")
def waiting_run(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run that stands still while it saves."""
    folder = tmp_path_factory.mktemp("waiting")
    train(folder, checkpoint_path=folder / "run", async_checkpoint="false", **flags)
    return folder / "run"


def steps_in(root: Path) -> list[str]:
    return sorted((path.name for path in root.iterdir() if path.name[0].isdigit()), key=int)


def last_row(root: Path) -> int:
    rows = log_rows(root)
    return int(rows[-1]["step"]) if rows else 0


def wait_until(what: Callable[[], bool], timeout_s: float = 20) -> None:
    give_up = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.005)


def note(file: Path, *words: object) -> None:
    with file.open("a") as opened:
        opened.write(" ".join(map(str, words)) + "\n")


def write_slowly(events: Path, root: Path, until_row: int | None) -> Callable[[int], None]:
    """A fault for harness.train: every rank writes its first layer of step 2 when the row of ``until_row`` is there (None: after
    SLOW_S); what happens to which step, and which row was the last then, is noted in ``events``."""

    def before(rank: int) -> None:
        begin, write_layer, commit = StepWriter.begin, StepWriter.write_layer, StepWriter.commit

        def noted_begin(self: StepWriter) -> None:
            note(events, "begin", self.step, last_row(root))
            begin(self)

        def slow_write(self: StepWriter, *args: Any) -> Any:
            if self.step == 2 and until_row is not None:
                wait_until(lambda: last_row(root) >= until_row)
            if self.step == 2:
                time.sleep(SLOW_S)
            return write_layer(self, *args)

        def noted_commit(self: StepWriter) -> Path:
            note(events, "commit", self.step, last_row(root))
            return commit(self)

        StepWriter.begin, StepWriter.write_layer, StepWriter.commit = noted_begin, slow_write, noted_commit  # type: ignore[method-assign]

    return before


def stalls(root: Path) -> dict[int, float]:
    return {row["step"]: row["save_stall_s"] for row in log_rows(root)}


@pytest.mark.parametrize("stages", [1, 2])
def test_training_goes_on_while_a_step_is_written_and_the_files_are_those_of_the_step(
    stages: int, flags: dict[str, Any], waiting_run: Path, tmp_path: Path
) -> None:
    """Two updates and their rows come before the first byte of step 2 is written; the save of step 4 waits for it."""
    run, events = tmp_path / "run", tmp_path / "events"
    train(tmp_path, stages=stages, before=write_slowly(events, run, until_row=4), checkpoint_path=run, **flags)
    happened = [line.split() for line in events.read_text().splitlines()]
    assert [(what, step) for what, step, _ in happened] == [(w, str(s)) for s in (2, 4, 6) for w in ("begin", "commit")]
    assert happened[1] == ["commit", "2", "4"], "the rows of steps 3 and 4 are older than the checkpoint of step 2, that of step 5 is not"
    assert len(equal_files(run / "2", run / "4")) == 2 * 4, "updates have changed every layer meanwhile"
    for step in ("2", "4", "6"):
        assert equal_files(run / step, waiting_run / step) == []
        ours, theirs = (read_trainer_state(folder / step) for folder in (run, waiting_run))
        assert ours["data"]["next_sequence_index"] == ours["position"] == 2 * int(step), "the reader is ahead of it"
        assert read_manifest(run / step).position == 2 * int(step)
        own = ("flags", "cut", "grid", "run_token")
        assert {k: v for k, v in ours.items() if k not in own} == {k: v for k, v in theirs.items() if k not in own}
    assert losses(run) == losses(waiting_run)
    waited = stalls(run)
    assert waited[5] > SLOW_S, "the save of step 4 waited for that of step 2"
    assert waited[3] < SLOW_S
    assert [waited[step] for step in (1, 2, 4, 6)] == [0.0] * 4


def test_with_async_checkpoint_false_training_stands_still_and_the_log_says_how_long(flags: dict[str, Any], tmp_path: Path) -> None:
    run, events = tmp_path / "run", tmp_path / "events"
    train(tmp_path, before=write_slowly(events, run, None), checkpoint_path=run, async_checkpoint="false", **flags)
    assert [line for line in events.read_text().splitlines() if line.startswith("commit")] == ["commit 2 2", "commit 4 4", "commit 6 6"]
    assert stalls(run)[3] > SLOW_S
    assert stalls(run)[4] == 0.0


def test_without_room_for_a_copy_training_waits_and_says_why(
    flags: dict[str, Any], waiting_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "default_memory_limit", lambda device, ranks_here: 1000)
    run, events = tmp_path / "run", tmp_path / "events"
    (process, other) = train(tmp_path, stages=2, before=write_slowly(events, run, None), checkpoint_path=run, **flags)
    for text in (process.text, other.text):
        assert text.count("no room for a copy of this rank's state") == 1, text
    assert "commit 2 2" in events.read_text().splitlines(), "no step was done meanwhile"
    assert equal_files(run / "2", waiting_run / "2") == []


@pytest.mark.parametrize("every", [0, 2, 9])
def test_a_final_checkpoint_is_always_written(every: int, flags: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tmp_path, stages=2, checkpoint_path=run, **{**flags, "total_steps": 5, "checkpoint_steps": every})
    assert steps_in(run) == {0: ["5"], 2: ["2", "4", "5"], 9: ["5"]}[every]


@sample(2)
@pytest.mark.parametrize(("is_separate", "keep"), itertools.product([False, True], [1, 2]))
def test_an_old_step_is_removed_only_when_the_newer_one_is_committed_in_every_folder(
    keep: int, is_separate: bool, flags: dict[str, Any], tmp_path: Path
) -> None:
    events = tmp_path / "events"
    roots = [tmp_path / (f"host{rank}" if is_separate else "shared") for rank in range(2)]

    def before(rank: int) -> None:
        rename = os.rename

        def noted(source: Any, target: Any) -> None:
            if rank == 1:
                time.sleep(0.1)  # so that a rank 0 that does not wait is seen
            rename(source, target)
            note(events, time.monotonic_ns(), Path(source).parent.name, Path(source).name, Path(target).name)

        os.rename = noted  # type: ignore[assignment]

    common = {**flags, "pipeline_group_size": 2, "world_size": 2, "dist_url": f"tcp://127.0.0.1:{free_port()}", "num_threads": 1}
    common |= {"device": "cpu", "checkpoint_steps": 1, "total_steps": 4, "keep_checkpoints": keep}
    processes = launch(lambda rank: train_argv(**common, rank=rank, checkpoint_path=roots[rank]), 2, tmp_path / "ranks", before)
    end_with(processes, 0)
    committed: dict[str, set[str]] = {}
    removed = []
    for _, root, source, target in sorted(line.split() for line in events.read_text().splitlines()):
        if target.isdigit():
            committed.setdefault(target, set()).add(root)
        else:
            newer = str(int(source) + keep)
            assert committed[newer] == {path.name for path in roots}, f"step {source} left {root} before {newer} was everywhere"
            removed.append((root, source))
    names = [str(step) for step in range(1, 5)]
    assert sorted(removed) == sorted((path.name, name) for path in set(roots) for name in names[:-keep])
    assert all(steps_in(root) == names[-keep:] for root in roots)


def end_with(processes: list[Process], status: int, timeout_s: float = 60) -> None:
    try:
        for process in processes:
            assert process.wait(timeout_s) == status, "\n".join(p.text for p in processes)
    finally:
        for process in processes:
            process.kill()


def signal_in_update(victim: int, number: int, update: int) -> Callable[[int], None]:
    """A fault for harness.train: ``victim`` gets a signal in the middle of an optimizer step."""

    def before(rank: int) -> None:
        step, done = AdamW.step, 0

        def with_signal(self: AdamW, learning_rate: float) -> None:
            nonlocal done
            done += 1
            if rank == victim and done == update:
                os.kill(os.getpid(), number)
            step(self, learning_rate)

        AdamW.step = with_signal  # type: ignore[method-assign]

    return before


@sample(1)
@pytest.mark.parametrize(("number", "victim"), itertools.product([signal.SIGTERM, signal.SIGINT], [0, 3]))
def test_a_signal_to_any_rank_saves_the_same_step_on_all_and_the_same_command_goes_on(
    number: signal.Signals, victim: int, flags: dict[str, Any], tmp_path: Path
) -> None:
    run, grid = tmp_path / "run", {"stages": 2, "replicas": 2, **flags, "checkpoint_steps": 0}
    processes = train(tmp_path, before=signal_in_update(victim, number, 3), checkpoint_path=run, **grid)
    (saved,) = steps_in(run)
    assert saved in ("3", "4") and last_row(run) == int(saved) < STEPS
    asked = number.name if victim == 0 else "a signal or a limit on another rank"
    assert f"stopped by {asked} at step {saved}, which is saved; the same command goes on from there" in processes[0].text
    assert all("Traceback" not in process.text for process in processes)
    train(tmp_path, checkpoint_path=run, **grid)
    train(tmp_path, checkpoint_path=tmp_path / "undisturbed", **grid)
    assert losses(run) == losses(tmp_path / "undisturbed")
    assert equal_files(run / str(STEPS), tmp_path / "undisturbed" / str(STEPS)) == []


def test_a_signal_while_a_step_is_written_waits_for_it_and_saves_the_last_one(flags: dict[str, Any], tmp_path: Path) -> None:
    run, slow = tmp_path / "run", write_slowly(tmp_path / "events", tmp_path / "run", until_row=3)

    def before(rank: int) -> None:
        slow(rank)
        signal_in_update(0, signal.SIGTERM, 3)(rank)

    train(tmp_path, stages=2, before=before, checkpoint_path=run, **{**flags, "total_steps": 40})
    first, last = steps_in(run)
    assert first == "2" and int(last) in (3, 4)


@sample(1)
@pytest.mark.parametrize(("number", "frozen"), itertools.product([signal.SIGTERM, signal.SIGINT], [0, 1]))
def test_a_second_signal_ends_a_rank_at_once_also_in_a_wait_for_a_frozen_peer(
    number: signal.Signals, frozen: int, flags: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    common = {**flags, "pipeline_group_size": 2, "world_size": 2, "dist_url": f"tcp://127.0.0.1:{free_port()}", "num_threads": 1}
    common |= {"device": "cpu", "checkpoint_path": run, "total_steps": 100_000, "checkpoint_steps": 0}
    processes = launch(lambda rank: train_argv(**common, rank=rank), 2, tmp_path / "ranks")
    waiting = processes[1 - frozen]
    try:
        wait_until(lambda: (run / "train_log.jsonl").exists() and last_row(run) >= 2)
        os.kill(processes[frozen].pid, signal.SIGSTOP)
        time.sleep(0.3)  # the other one has reached its wait
        os.kill(waiting.pid, number)
        os.kill(waiting.pid, number)  # a launcher passes on what the terminal has sent already
        time.sleep(ONE_REQUEST_S + 0.2)
        assert waiting.poll() is None, "the first one is a request"
        os.kill(waiting.pid, number)
        assert waiting.wait(2) == 130
    finally:
        for process in processes:
            process.kill()


def layer_states(seed: int) -> dict[str, LayerState]:
    """Two layers whose master is the weight itself, as a rank hands them to HostCopy."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for key in ("layer_00", "layer_01"):
        weight = torch.randn(16, 4, generator=generator)
        state = {"exp_avg/w": torch.randn(16, 4, generator=generator), "step/w": torch.tensor(float(seed)), "master/w": weight}
        layers[key] = LayerState(weights={f"{key}.w": weight}, train_state={f"{name}.{key}": t for name, t in state.items()})
    return layers


def tensors_of(layers: dict[str, LayerState]) -> dict[str, torch.Tensor]:
    return {name: tensor for layer in layers.values() for name, tensor in (*layer.weights.items(), *layer.train_state.items())}


def test_a_host_copy_holds_each_tensor_once_keeps_its_values_and_uses_its_room_again() -> None:
    room, first, second = HostCopy(), layer_states(1), layer_states(2)
    assert not room.has_room
    taken = tensors_of(room.take(first))
    assert room.has_room
    originals = {name: tensor.clone() for name, tensor in tensors_of(first).items()}
    for tensor in tensors_of(first).values():
        tensor.add_(1)
    assert taken.keys() == originals.keys()
    assert all(torch.equal(taken[name], originals[name]) for name in originals), "later updates do not reach the copy"
    assert taken["master/w.layer_00"].data_ptr() == taken["layer_00.w"].data_ptr(), "a master that is the weight is copied once"
    assert sum({t.data_ptr(): t.nbytes for t in taken.values()}.values()) == num_bytes(first) == 2 * (2 * 16 * 4 * 4 + 4)
    again = tensors_of(room.take(second))
    assert {name: t.data_ptr() for name, t in again.items()} == {name: t.data_ptr() for name, t in taken.items()}
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors_of(second).items())
