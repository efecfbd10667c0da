"""Faults while the ranks are meeting, meeting again, or have only just met; several at once; and in every mode of training."""

import dataclasses
import itertools
import os
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.faults import Fault, all_end, both, fire, keep_connections, plant, said, stop, wait_until
from support.grids import check_bits, num_rows, supervised, undisturbed
from support.ranks import Process, equal_files, launch, log_rows, losses, train_argv
from support.tiers import full, sample

from comms.connections import Connections
from comms.links import PeerLost
from training.checkpoints import manager
from training.checkpoints.manager import Keeping
from training.checkpoints.saver import Best
from training.evaluation.during_training import Evaluation
from training.loop import Trainer
from training.membership import meeting


def again(flags: dict[str, Any], tmp_path: Path, *victims: int, attempt: int = 1) -> list[Process]:
    """What their supervisors start."""
    return [launch(lambda _, v=v: train_argv(**flags, rank=v), 1, tmp_path / "ranks", supervised(attempt))[0] for v in victims]  # type: ignore[misc]


def in_call(owner: Any, name: str, call: int, victim: int, fault: Fault, stamp: Path) -> Callable[[int], None]:
    """The fault in the ``call``-th call of ``owner.name`` on ``victim``."""

    def before(rank: int) -> None:
        made: list[Connections] = []
        keep_connections(made)
        original, calls = getattr(owner, name), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if rank == victim and calls == call and not stamp.exists():
                fire(fault, stamp, made)
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    return before


@sample(1)
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_rank_that_dies_while_groups_are_made_is_waited_for(victim: int, flags: dict[str, Any], tmp_path: Path) -> None:
    """In gloo one rank of a pair waits to be called, and there is no connection yet that could be shut down under it."""
    flags |= {"total_steps": 6, "peer_timeout": 3}
    stamp = tmp_path / "fired"

    def short(rank: int) -> None:
        meeting.DEADLINES = dataclasses.replace(meeting.DEADLINES, connect_s=3.0)

    fault = in_call(meeting, "make_groups", 1, victim, Fault.KILL, stamp)
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", both(supervised(0), short, fault))
    wait_until(stamp.exists, 60, ranks)
    assert ranks[victim].wait(10) == -signal.SIGKILL
    others = [process for rank, process in enumerate(ranks) if rank != victim] + again(flags, tmp_path, victim)
    all_end(others, 60)
    assert [process.status for process in others] == [0] * 4, said(others)
    check_bits(flags, tmp_path)


@full
@pytest.mark.parametrize("victims", [(1, 2), (0, 3)])
def test_two_ranks_that_die_at_once_are_waited_for(victims: tuple[int, int], flags: dict[str, Any], tmp_path: Path) -> None:
    flags |= {"total_steps": 8}
    stamps = [tmp_path / f"fired{victim}" for victim in victims]
    faults = [plant(Fault.KILL, "backward", victim, stamp) for victim, stamp in zip(victims, stamps, strict=True)]
    before = both(supervised(0), *faults)
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", before)
    wait_until(lambda: all(stamp.exists() for stamp in stamps), 60, ranks)
    for victim in victims:
        ranks[victim].wait(10)
    others = [process for rank, process in enumerate(ranks) if rank not in victims] + again(flags, tmp_path, *victims)
    all_end(others, 60)
    assert [process.status for process in others] == [0] * 4, said(others)
    check_bits(flags, tmp_path)


@sample(1)
@pytest.mark.parametrize(("where", "victim"), [((meeting, "make_groups"), 2), ((Trainer, "_connect"), 1), ((Keeping, "make_up"), 0)])
def test_a_rank_that_dies_while_all_meet_again_is_waited_for(
    where: tuple[Any, str], victim: int, flags: dict[str, Any], tmp_path: Path
) -> None:
    """A link breaks, and in the meeting after that a rank dies."""
    flags |= {"total_steps": 8, "peer_timeout": 3}
    stamps = tmp_path / "broke", tmp_path / "fired"
    second = in_call(*where, 1 if where[1] == "make_up" else 2, victim, Fault.KILL, stamps[1])
    before = both(supervised(0), plant(Fault.LINK, "allreduce", 3, stamps[0]), second)
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", before)
    wait_until(stamps[1].exists, 60, ranks)
    ranks[victim].wait(10)
    others = [process for rank, process in enumerate(ranks) if rank != victim] + again(flags, tmp_path, victim)
    all_end(others, 60)
    assert stamps[0].exists() and [process.status for process in others] == [0] * 4, said(others)
    check_bits(flags, tmp_path)


@full
def test_links_that_break_in_a_row_behind_a_save_cost_no_bit(flags: dict[str, Any], tmp_path: Path) -> None:
    """While a checkpoint is written, and again while the ranks that met are making up for it."""
    flags |= {"total_steps": 8, "async_checkpoint": False}
    stamps = tmp_path / "broke", tmp_path / "broke again"
    before = both(plant(Fault.LINK, "saving", 1, stamps[0]), in_call(Trainer, "_connect", 2, 0, Fault.LINK, stamps[1]))
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", before)
    all_end(ranks, 60)
    assert all(stamp.exists() for stamp in stamps) and [process.status for process in ranks] == [0] * 4, said(ranks)
    check_bits(flags, tmp_path)


def one_per_replica(flags: dict[str, Any], replicas: int) -> dict[str, Any]:
    """Until somebody stops it."""
    grid = {"pipeline_group_size": 1, "data_group_size": replicas, "world_size": replicas}
    more = {"checkpoint_steps": 0, "total_steps": 10_000, "lr_schedule": "constant", "allow_replica_loss": True}
    return {**flags, **grid, **more, "batch_size": 2}


def go_on_and_stop(ranks: list[Process], run: Path) -> None:
    """Five steps more, with all of them."""
    here = num_rows(run)
    wait_until(lambda: num_rows(run) > here + 5, 60, ranks)
    stop(ranks)
    assert [process.status for process in ranks] == [0] * len(ranks), said(ranks)


def check_losses(flags: dict[str, Any], tmp_path: Path) -> None:
    ours = log_rows(tmp_path / "run")
    plain = {row["step"]: row["loss"] for row in log_rows(undisturbed({**flags, "total_steps": len(ours)}, tmp_path))}
    assert [row["step"] for row in ours] == sorted(plain), "no step is missing and none done twice"
    assert all(row["loss"] == pytest.approx(plain[row["step"]], rel=1e-5) for row in ours)


@full
def test_a_replica_that_wakes_one_step_later_has_no_half_of_that_step(flags: dict[str, Any], tmp_path: Path) -> None:
    """It froze in the middle of step 6, which the other one has played again alone; it is back before the next step."""
    flags = one_per_replica(flags, 2) | {"peer_timeout": 3, "total_steps": 40}
    stamp = tmp_path / "fired"

    def slow(rank: int) -> None:
        go_on = Trainer.go_on

        def waiting(self: Trainer, job: Any, *rest: Any) -> None:
            go_on(self, job, *rest)
            if job.place.world_size == 1:
                (tmp_path / "alone").touch()
                wait_until(lambda: "the job goes on without this replica" in frozen.read_text(), 30, [])

        Trainer.go_on = waiting  # type: ignore[method-assign]

    frozen = tmp_path / "ranks" / "000_rank1.txt"
    before = both(plant(Fault.FREEZE, "backward", 1, stamp), slow)
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 2, tmp_path / "ranks", before)
    try:
        wait_until((tmp_path / "alone").exists, 60, ranks)
        os.kill(ranks[1].pid, signal.SIGCONT)
        all_end(ranks, 60)
    finally:
        for process in ranks:
            process.kill()
    assert [process.status for process in ranks] == [0, 0], said(ranks)
    assert "taken in behind step 6" in ranks[0].text, said(ranks)
    check_losses(flags, tmp_path)


@full
def test_two_of_three_replicas_are_gone_without_and_come_back_one_by_one(flags: dict[str, Any], tmp_path: Path) -> None:
    flags = one_per_replica(flags, 3)
    stamps = [tmp_path / "fired1", tmp_path / "fired2"]
    before = both(plant(Fault.KILL, "backward", 1, stamps[0]), plant(Fault.KILL, "optimizer", 2, stamps[1]))
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 3, tmp_path / "ranks", before)
    wait_until(lambda: "with 1 of 3 replicas" in ranks[0].text, 60, ranks)
    wait_until(lambda: num_rows(tmp_path / "run") > 10, 30, ranks)
    back = launch(lambda _: train_argv(**flags, rank=2), 1, tmp_path / "ranks")
    wait_until(lambda: back[0].output.exists() and "the job goes on without" in back[0].text, 30, [*ranks, *back])
    back += launch(lambda _: train_argv(**flags, rank=1), 1, tmp_path / "ranks")
    wait_until(lambda: ranks[0].text.count("x 3 replica(s)") >= 2, 60, [ranks[0], *back])
    go_on_and_stop([ranks[0], *back], tmp_path / "run")
    assert all(stamp.exists() for stamp in stamps)
    assert ranks[0].text.count("is taken in behind step") >= 1
    check_losses(flags, tmp_path)


@full
def test_a_link_that_breaks_while_a_replica_is_taken_in_loses_no_step(flags: dict[str, Any], tmp_path: Path) -> None:
    """The others hold the newest state: they go on with it, and take the replica in behind the next step."""
    flags = one_per_replica(flags, 3)
    stamps = tmp_path / "fired", tmp_path / "broke"

    def broken(rank: int) -> None:
        part = Trainer._part_for_a_replica

        def parting(self: Trainer) -> None:
            if rank == 1 and not stamps[1].exists():
                stamps[1].touch()
                raise PeerLost("a connection that a test has broken")
            part(self)

        Trainer._part_for_a_replica = parting  # type: ignore[method-assign]

    before = both(plant(Fault.KILL, "backward", 2, stamps[0]), broken)
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 3, tmp_path / "ranks", before)
    wait_until(lambda: "with 2 of 3 replicas" in ranks[0].text, 60, ranks)
    back = launch(lambda _: train_argv(**flags, rank=2), 1, tmp_path / "ranks")[0]
    wait_until(lambda: "is taken in behind step" in ranks[0].text, 60, [*ranks[:2], back])
    go_on_and_stop([*ranks[:2], back], tmp_path / "run")
    assert stamps[1].exists()
    assert ranks[0].text.count("with 2 of 3 replicas") >= 2, ranks[0].text
    check_losses(flags, tmp_path)


@full
def test_a_replica_waits_where_there_is_no_room_for_the_checkpoint_it_would_begin_with(flags: dict[str, Any], tmp_path: Path) -> None:
    flags = one_per_replica(flags, 2)
    stamp = tmp_path / "fired"

    def full(rank: int) -> None:
        from training.checkpoints import saver

        manager.RETRY_S = 0.5
        usage, began = saver.shutil.disk_usage, tmp_path / "full"

        def no_room(path: Any) -> Any:
            found = usage(path)
            if not began.exists():
                began.touch()
                return found._replace(free=10)
            return found

        saver.shutil = SimpleNamespace(**{**vars(saver.shutil), "disk_usage": no_room})  # type: ignore[assignment] # others ask, too

    before = both(full, plant(Fault.KILL, "backward", 1, stamp))
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 2, tmp_path / "ranks", before)
    wait_until(lambda: "with 1 of 2 replicas" in ranks[0].text, 60, ranks)
    back = launch(lambda _: train_argv(**flags, rank=1), 1, tmp_path / "ranks")[0]
    wait_until(lambda: "is taken in behind step" in ranks[0].text, 60, [ranks[0], back])
    go_on_and_stop([ranks[0], back], tmp_path / "run")
    text = ranks[0].text
    assert 0 < text.index("the replica that is back has to wait") < text.index("is taken in behind step"), text
    check_losses(flags, tmp_path)


@pytest.mark.parametrize("link_breaks", [False, True])
def test_a_request_to_stop_that_comes_with_a_meeting_is_heard_and_saved(link_breaks: bool, flags: dict[str, Any], tmp_path: Path) -> None:
    flags |= {"data_group_size": 1, "world_size": 2, "checkpoint_steps": 0, "total_steps": 400}
    asked = tmp_path / "asked"

    def before(rank: int) -> None:
        made: list[Connections] = []
        keep_connections(made)
        own = Trainer._one_step

        def asked_in(self: Trainer, *args: Any) -> Any:
            if self._optimizer_step == 5 and rank == 1 and not asked.exists():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
                asked.touch()
                if link_breaks:
                    made[-1].break_all()
            return own(self, *args)

        Trainer._one_step = asked_in  # type: ignore[method-assign]
        if not link_breaks:
            back = property(lambda self: lambda: self._job.place.rank == 0 and self._optimizer_step == 5, lambda self, value: None)
            Trainer.replica_is_back = back  # type: ignore[assignment]

    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 2, tmp_path / "ranks", before)
    all_end(ranks, 60)
    assert asked.exists() and [process.status for process in ranks] == [0, 0], said(ranks)
    steps = [int(path.name) for path in (tmp_path / "run").iterdir() if path.name.isdigit()]
    assert steps == [6], "the step that was asked in is finished and saved"


def test_whoever_goes_back_to_a_checkpoint_has_let_go_of_the_old_weights_first(flags: dict[str, Any], tmp_path: Path) -> None:
    """A host that has room for one trainer would else lose the ranks that had survived."""
    flags |= {"data_group_size": 1, "world_size": 2, "total_steps": 8}
    stamp = tmp_path / "fired"

    def watched(rank: int) -> None:
        make, before = Trainer.__init__, []

        def made(self: Trainer, *args: Any) -> None:
            alive = [reference for reference in before if reference() is not None]
            print(f"made when {len(alive)} of {len(before)} are alive", flush=True)
            make(self, *args)
            before.extend(weakref.ref(part) for part in (self, self._stage, self._optimizer, self._gradient))

        Trainer.__init__ = made  # type: ignore[method-assign]

    before = both(supervised(0), watched, plant(Fault.KILL, "backward", 1, stamp))
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 2, tmp_path / "ranks", before)
    wait_until(stamp.exists, 60, ranks)
    ranks[1].wait(10)
    others = [ranks[0], *again(flags, tmp_path, 1)]
    all_end(others, 60)
    assert [process.status for process in others] == [0, 0], said(others)
    assert "made when 0 of 0 are alive" in ranks[0].text and "made when 0 of 4 are alive" in ranks[0].text, ranks[0].text


MODES: dict[str, dict[str, Any]] = {
    "lora": {"train": "lora", "lora_dropout": 0.1, "dropout": 0.1},
    "loss scale": {"fp16": True, "initial_loss_scale": 2.0**24},
    "zero bubble": {"pp_mode": "zb"},
    "8-bit moments": {"optimizer": "8bit-adam"},
    "clipped, accumulated": {"clip_grad_norm": 0.1, "gradient_accumulate_step": 2, "total_steps": 16, "checkpoint_steps": 6},
}


@sample(1)
@pytest.mark.parametrize(("mode", "phase"), itertools.product(MODES, ["agreeing", "decided"]))
def test_a_link_that_breaks_costs_no_bit_in_any_mode(mode: str, phase: str, flags: dict[str, Any], tmp_path: Path) -> None:
    flags |= {"total_steps": 8, **MODES[mode]}
    stamp = tmp_path / "fired"
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", plant(Fault.LINK, phase, 2, stamp))
    all_end(ranks, 90)
    assert stamp.exists() and [process.status for process in ranks] == [0] * 4, said(ranks)
    assert "All ranks meet again" in ranks[0].text
    plain, run, last = undisturbed(flags, tmp_path), tmp_path / "run", str(flags["total_steps"])
    assert losses(run) == losses(plain)
    assert [row.get("loss_scale") for row in log_rows(run)] == [row.get("loss_scale") for row in log_rows(plain)]
    assert equal_files(run / last, plain / last) == []


@full
def test_the_best_step_is_found_by_all_ranks_where_the_evaluation_is_done_again(
    flags: dict[str, Any], tasks: list[Path], tmp_path: Path
) -> None:
    """One rank has ended it, and counted it as the best, when the connections of another break."""
    flags |= {"total_steps": 8, "checkpoint_steps": 0, "evaluation_data": tasks[0], "evaluation_steps": 2, "max_eval_samples": 4}
    flags |= {"keep_best": True, "keep_checkpoints": 2}
    stamp = tmp_path / "fired"

    def before(rank: int) -> None:
        made: list[Connections] = []
        keep_connections(made)
        evaluate = Trainer._evaluate

        def broken(self: Trainer) -> bool:
            is_best = evaluate(self)
            if rank == 1 and not stamp.exists():
                fire(Fault.LINK, stamp, made)
                self._best = None  # as of a rank that had not ended it
                self._job.wait_for_all()
            return is_best

        Trainer._evaluate = broken  # type: ignore[method-assign]

    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", before)
    all_end(ranks, 90)
    assert stamp.exists() and [process.status for process in ranks] == [0] * 4, said(ranks)
    plain = undisturbed(flags, tmp_path)
    assert losses(tmp_path / "run") == losses(plain)
    assert (tmp_path / "run" / "best.json").read_text() == (plain / "best.json").read_text()


def test_what_a_rank_owes_is_owed_by_all_after_any_number_of_meetings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save was cut off on one rank, which alone heard what all said of it; then the ranks had to meet once more."""

    class Cut:
        def __init__(self, was_cut_off: bool) -> None:
            self.give_up = lambda: was_cut_off

    def rank(was_cut_off: bool, owes_save: bool) -> Keeping:
        one = object.__new__(Keeping)
        one._owes_save, one.saved_step, one._rescue = owes_save, 50, None
        one._checkpoints, one._config = Cut(was_cut_off), type("_", (), {"checkpoint_steps": 100})()  # type: ignore[assignment]
        return one

    heard, deaf = rank(False, owes_save=True), rank(False, owes_save=False)
    said: list[Any] = []
    monkeypatch.setattr(manager, "all_say", lambda job, store, what, mine: said.append(mine) or said)
    job: Any = type("_", (), {"store": None})()
    heard.make_up(job)
    deaf.make_up(job)
    assert heard.is_due(50, 51) and deaf.is_due(50, 51) and heard.saved_step is deaf.saved_step is None


def test_an_evaluation_is_not_better_than_itself() -> None:
    found = Evaluation(loss=1.0, num_targets=5, seconds=0.0, data="d")
    assert not found.is_better_than(found.as_best(5)) and found.is_better_than(Best(step=1, metric="loss", value=2.0, loss=2.0, data="d"))
