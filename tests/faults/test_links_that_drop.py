"""A connection that breaks while all processes live costs the step that was being played, and nothing else: the ranks meet again in the
same processes, and losses and files are those of an undisturbed run, bit for bit."""

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from support.faults import Fault, all_end, keep_connections, plant, said
from support.ranks import equal_files, free_port, launch, log_rows, losses, run_ranks, train, train_argv
from support.tiers import full, sample

from comms import transport
from comms.connections import Connections
from comms.groups import join_process_group, make_groups
from comms.lifeline import Lifeline, Trouble
from comms.place import place_of
from comms.spans import Spans
from comms.transport import break_off_waits, make_transport, wait_for, wait_for_all
from pipeline_parallel.engine import PipelineEngine
from training import loop, runner
from training.job.job import COLLECTIVE_TIMEOUT
from training.job.local_facts import LocalFacts
from training.membership.exits import see_it_leave
from training.membership.recovery import Standing, common_ground

STEPS = 8


def flags_in(root: Path, model_folder: Path, tasks: list[Path]) -> dict[str, Any]:
    return {
        "model_name": model_folder,
        "task_name": tasks[0],
        "evaluation_data": tasks[0],
        "evaluation_steps": 4,
        "max_eval_samples": 4,
        "checkpoint_path": root / "run",
        "seq_length": 32,
        "batch_size": 4,
        "micro_batch_size": 2,
        "total_steps": STEPS,
        "checkpoint_steps": 3,
        "dropout": 0.1,
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, tasks: list[Path]) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    train(root / "ranks", stages=2, replicas=2, **flags_in(root, model_folder, tasks))
    return root / "run"


def grid(flags: dict[str, Any]) -> dict[str, Any]:
    common = {"pipeline_group_size": 2, "data_group_size": 2, "world_size": 4, "device": "cpu", "num_threads": 1, "rendezvous_timeout": 60}
    return {**common, "dist_url": f"tcp://127.0.0.1:{free_port()}", **flags}


def evaluations(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "evaluation_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def check(run: Path, undisturbed: Path) -> None:
    assert losses(run) == losses(undisturbed)
    assert [row["step"] for row in log_rows(run)] == list(range(1, STEPS + 1))
    assert evaluations(run) == evaluations(undisturbed)
    assert equal_files(run / str(STEPS), undisturbed / str(STEPS)) == []
    if (run / "6").is_dir():  # a save that was cut off is made up for behind the next step
        assert equal_files(run / "6", undisturbed / "6") == []


PHASES = ("forward", "backward", "allreduce", "agreeing", "decided", "evaluation", "saving")
BROKEN = [(phase, victim) for phase in PHASES for victim in range(4) if phase != "saving" or victim < 2]  # replica 0 alone saves


@sample(1, by="phase")
@pytest.mark.parametrize(("phase", "victim"), BROKEN)
def test_a_link_that_breaks_costs_no_bit(
    phase: str, victim: int, undisturbed: Path, model_folder: Path, tasks: list[Path], tmp_path: Path
) -> None:
    flags, stamp = grid(flags_in(tmp_path, model_folder, tasks)), tmp_path / "fired"
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", plant(Fault.LINK, phase, victim, stamp))
    all_end(ranks, 90)
    assert stamp.exists()
    assert [process.status for process in ranks] == [0] * 4, said(ranks)
    assert "All ranks meet again" in ranks[0].text, "nobody noticed"
    assert "s after the job was interrupted" in ranks[0].text
    check(tmp_path / "run", undisturbed)


def test_who_notices_a_break_waits_for_what_rank_0_makes_of_it_however_short_the_peer_timeout(
    undisturbed: Path, model_folder: Path, tasks: list[Path], tmp_path: Path
) -> None:
    flags, stamp = grid({**flags_in(tmp_path, model_folder, tasks), "peer_timeout": 1}), tmp_path / "fired"
    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", plant(Fault.LINK, "backward", 1, stamp))
    all_end(ranks, 90)
    assert stamp.exists()
    assert [process.status for process in ranks] == [0] * 4, said(ranks)
    check(tmp_path / "run", undisturbed)


def test_a_break_that_gloo_tells_nobody_of_is_noticed(undisturbed: Path, model_folder: Path, tasks: list[Path], tmp_path: Path) -> None:
    """As those in the middle of a message are not told: they wait on. (Who begins a message later is told, and may not tell here.)"""
    flags, stamp = grid(flags_in(tmp_path, model_folder, tasks)), tmp_path / "fired"
    breaks = plant(Fault.LINK, "backward", 1, stamp)

    def before(rank: int) -> None:
        breaks(rank)
        submit = transport._InOrder.submit

        def forgotten(self: Any, job: Callable[[], object]) -> Any:
            def never_failing() -> None:
                try:
                    job()
                except RuntimeError:
                    threading.Event().wait()

            return submit(self, never_failing)

        def told_by_heartbeat(self: Lifeline, text: str) -> None:
            if threading.current_thread().name == "heartbeat":
                report_broken(self, text)

        report_broken = Lifeline.report_broken
        transport._InOrder.submit, Lifeline.report_broken = forgotten, told_by_heartbeat  # type: ignore[method-assign]

    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", before)
    all_end(ranks, 90)
    assert stamp.exists()
    assert [process.status for process in ranks] == [0] * 4, said(ranks)
    assert "a connection of its own has ended, and nobody who waits for it was told. All ranks meet again" in ranks[0].text, said(ranks)
    check(tmp_path / "run", undisturbed)


@sample(1)
@pytest.mark.parametrize("victim", [0, 2])
def test_a_lifeline_that_is_cut_alone_costs_no_bit(
    victim: int, undisturbed: Path, model_folder: Path, tasks: list[Path], tmp_path: Path
) -> None:
    flags, stamp = grid(flags_in(tmp_path, model_folder, tasks)), tmp_path / "fired"

    def before(rank: int) -> None:
        lifelines: list[Lifeline] = []
        join, backward = Lifeline.join, PipelineEngine._backward

        def kept(self: Lifeline, *args: Any, **kwargs: Any) -> Any:
            lifelines.append(self)
            return join(self, *args, **kwargs)

        def cut(*args: Any, **kwargs: Any) -> Any:
            if rank == victim and len(lifelines) == 1 and not stamp.exists():
                stamp.touch()
                assert lifelines[0]._connection is not None
                lifelines[0]._connection.shutdown(socket.SHUT_RDWR)
            return backward(*args, **kwargs)

        Lifeline.join, PipelineEngine._backward = kept, cut  # type: ignore[method-assign]

    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 4, tmp_path / "ranks", before)
    all_end(ranks, 90)
    assert stamp.exists()
    assert [process.status for process in ranks] == [0] * 4, said(ranks)
    assert "All ranks meet again" in ranks[0].text
    check(tmp_path / "run", undisturbed)


@full
def test_links_that_break_again_and_again_end_the_job_in_words(model_folder: Path, tasks: list[Path], tmp_path: Path) -> None:
    flags = grid({**flags_in(tmp_path, model_folder, tasks), "pipeline_group_size": 2, "data_group_size": 1, "world_size": 2})

    def before(rank: int) -> None:
        from support.faults import keep_connections

        made: list[Any] = []
        keep_connections(made)
        runner.MOST_REPLAYS, runner.LONGEST_PAUSE_S = 4, 0.5
        backward = PipelineEngine._backward

        def broken(*args: Any, **kwargs: Any) -> Any:
            if rank == 1:
                made[-1].break_all()
            return backward(*args, **kwargs)

        PipelineEngine._backward = broken  # type: ignore[method-assign]

    ranks = launch(lambda rank: train_argv(**flags, rank=rank), 2, tmp_path / "ranks", before)
    all_end(ranks, 90)
    assert all(process.status not in (0, None) for process in ranks), said(ranks)
    assert any("did not get through a single optimizer step" in process.text for process in ranks), said(ranks)


def standing(step: int, settled: int | None = None, decision: Any = "decided", decided_in: str = "now", meeting: str = "now") -> Standing:
    settled = step if settled is None else settled
    return Standing(optimizer_step=step, decision=decision, settled=settled, decided_in=decided_in, meeting=meeting)


def test_where_ranks_go_on_from() -> None:
    assert common_ground([standing(5), None]) is None, "somebody holds nothing"
    assert common_ground([standing(5), standing(3)]) is None, "nobody can make up for two steps"
    assert common_ground([standing(1), standing(0, decision=None)]) is not None
    assert common_ground([standing(1, decision=None), standing(0, decision=None)]) is None
    same = common_ground([standing(5), standing(5, settled=4)])
    assert same is not None and (same.optimizer_step, same.settled) == (5, 4)
    behind = common_ground([standing(5), standing(4)])
    assert behind is not None and (behind.optimizer_step, behind.settled, behind.decision) == (5, -1, "decided")


def test_a_rank_that_was_gone_without_has_no_part_in_what_was_decided_meanwhile() -> None:
    left_behind = standing(4, decided_in="before", meeting="before")
    assert common_ground([standing(5), left_behind]) is None, "its half of step 5 is not in that decision, nor all of step 5 in its half"
    assert common_ground([standing(5), standing(5, decided_in="before", meeting="before")]) is None, "the same step, in other sums"
    together = common_ground([standing(5), standing(4, decided_in="before")])
    assert together is not None and together.decided_in == "now", "it was there and missed the decision alone"
    assert common_ground([standing(5, decided_in="before"), standing(5, decided_in="before", meeting="before")]) is not None


@full
def test_a_link_that_breaks_while_a_resume_is_verified_costs_no_bit(model_folder: Path, tasks: list[Path], tmp_path: Path) -> None:
    """The batch of the proof is not trained on, however often it is read."""
    flags = {**flags_in(tmp_path, model_folder, tasks), "verify_resume": True, "evaluation_data": None, "evaluation_steps": 0}
    flags = {name: value for name, value in flags.items() if name != "max_eval_samples"}
    common = {"pipeline_group_size": 2, "data_group_size": 1, "world_size": 2}
    plain = tmp_path / "plain"
    train(tmp_path / "ranks", stages=2, **{**flags, "checkpoint_path": plain, "lr_schedule": "constant"})
    train(tmp_path / "ranks", stages=2, **{**flags, "total_steps": 3, "lr_schedule": "constant"})
    again, stamp = {**grid({**flags, **common}), "lr_schedule": "constant"}, tmp_path / "fired"

    def before(rank: int) -> None:
        made: list[Any] = []
        keep_connections(made)
        check = loop.check_probe

        def broken(*args: Any) -> None:
            check(*args)
            if not stamp.exists():
                stamp.touch()
                made[-1].break_all()

        loop.check_probe = broken  # type: ignore[assignment]

    ranks = launch(lambda rank: train_argv(**again, rank=rank), 2, tmp_path / "ranks", before)
    all_end(ranks, 90)
    assert stamp.exists() and [process.status for process in ranks] == [0, 0], said(ranks)
    assert "All ranks meet again" in ranks[0].text
    assert losses(tmp_path / "run") == losses(plain)
    assert equal_files(tmp_path / "run" / str(STEPS), plain / str(STEPS)) == []


def test_a_message_that_is_cut_off_in_the_middle_keeps_nobody_waiting(tmp_path: Path) -> None:
    """gloo forgets those who are in the middle of one; and the same processes make groups and send again."""

    def rank_main(rank: int, store: dist.Store) -> None:
        place, message = place_of(rank, dp_size=1, pp_size=2), torch.zeros(800_000_000, dtype=torch.uint8)
        for meeting in range(3):
            connections = Connections()
            with connections.recorded():
                join_process_group(place, dist.PrefixStore(f"{meeting}", store), "gloo", COLLECTIVE_TIMEOUT)
                groups = make_groups(place, "gloo", COLLECTIVE_TIMEOUT)
            pair = groups.to_next or groups.to_previous
            assert pair is not None
            ours, theirs = (pair.activations, pair.gradients) if rank == 0 else (pair.gradients, pair.activations)
            between = make_transport(send_group=ours, recv_group=theirs, peer=1 - rank, device=torch.device("cpu"))
            part = message if meeting < 2 else message[:1000]
            under_way = between.send(part, 0) if rank == 0 else between.receive(part, 0)
            if meeting < 2:
                time.sleep(0.03)
                if rank == meeting:  # the other one hears of it through the hub, a moment later
                    connections.break_all()
                else:
                    time.sleep(0.3)
                    connections.break_all()
                break_off_waits()
                with pytest.raises(RuntimeError):
                    under_way.result()
            else:
                under_way.result()
            between.close()
            dist.destroy_process_group()

    run_ranks(rank_main, 2, tmp_path, timeout_s=30)


def test_a_wait_that_begins_after_the_trouble_is_ended_too(tmp_path: Path) -> None:
    """The message was cut off before anybody waited for it."""

    def rank_main(rank: int, store: dist.Store) -> None:
        place, has_left, spans = place_of(rank, dp_size=1, pp_size=2), threading.Event(), Spans()
        join_process_group(place, dist.PrefixStore("a", store), "gloo", COLLECTIVE_TIMEOUT)
        if rank == 0:
            work = dist.irecv(torch.zeros(10), src=1)
            facts, trouble = cast(LocalFacts, None), Trouble(text="a link broke", meets_again=True)
            break_off_waits()
            watcher = threading.Thread(target=see_it_leave, args=(facts, spans, trouble, has_left, 20.0))
            watcher.start()
            with pytest.raises(RuntimeError, match="broken off"):
                wait_for(work)
            has_left.set()
            watcher.join(5)
            assert not watcher.is_alive()
            store.set("left", "1")
        store.get("left")
        dist.destroy_process_group()

    run_ranks(rank_main, 2, tmp_path, timeout_s=30)


def test_a_collective_operation_that_never_ends_keeps_nobody_and_no_process(tmp_path: Path) -> None:
    """The other rank does not come to it; both leave, make groups again, add up, and end."""

    def rank_main(rank: int, store: dist.Store) -> None:
        place = place_of(rank, dp_size=2, pp_size=1)
        for meeting in range(3):
            join_process_group(place, dist.PrefixStore(f"{meeting}", store), "gloo", COLLECTIVE_TIMEOUT)
            group, ones = make_groups(place, "gloo", COLLECTIVE_TIMEOUT).replicas[0], torch.ones(1000)
            if meeting == 2:
                work = dist.all_reduce(ones, group=group, async_op=True)
                assert work is not None
                wait_for(work, group)
                assert ones.tolist() == [2.0] * 1000
            elif rank == meeting:
                works = [dist.all_reduce(ones.clone(), group=group, async_op=True) for _ in range(4)]
                threading.Timer(0.2, break_off_waits).start()
                with pytest.raises(RuntimeError, match="broken off"):
                    wait_for_all({work: group for work in works if work is not None})
                del works
            else:
                time.sleep(0.5)
            dist.destroy_process_group()

    run_ranks(rank_main, 2, tmp_path, timeout_s=30)
