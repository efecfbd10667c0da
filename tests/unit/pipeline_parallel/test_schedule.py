"""Orders as data: complete, in micro-batch order, free of deadlock, and what they cost in time and memory."""

import itertools
import re
from collections.abc import Iterator
from typing import get_args

import pytest

from pipeline_parallel import schedule
from pipeline_parallel.schedule import Action, PipelineMode, extra_warmup_for, order, warmup_forwards
from pipeline_parallel.simulator import DeadlockError, Durations, Wire, peak_in_flight, simulate

MODES: tuple[PipelineMode, ...] = get_args(PipelineMode)


def orders(mode: PipelineMode, num_stages: int, num_micro_batches: int, k: int = 0, accumulation: int = 1) -> list[tuple[Action, ...]]:
    return [
        order(
            mode,
            stage=s,
            num_stages=num_stages,
            num_micro_batches=num_micro_batches,
            num_accumulation_steps=accumulation,
            extra_warmup=(k,) * (num_stages - 1),
        )
        for s in range(num_stages)
    ]


def every_case() -> Iterator[tuple[PipelineMode, int, int, int, int]]:
    return itertools.product(MODES, range(1, 9), (1, 2, 3, 4, 7, 16), (0, 1, 2, 5), (1, 3))


def test_every_order_runs_each_action_once_and_in_micro_batch_order() -> None:
    for mode, num_stages, num_micro_batches, k, accumulation in every_case():
        for actions in orders(mode, num_stages, num_micro_batches, k, accumulation):
            total = list(range(num_micro_batches * accumulation))
            for kind in "FB" if mode != "zb" else "FBW":
                assert [i for action, i in actions if action == kind] == total
            places = {action: place for place, action in enumerate(actions)}
            assert len(places) == len(actions)
            assert all(places[Action("F", i)] < places[Action("B", i)] for i in total)
            assert mode != "zb" or all(places[Action("B", i)] < places[Action("W", i)] for i in total)


def test_no_order_ever_waits_for_ever_and_each_holds_what_it_promises() -> None:
    for mode, num_stages, num_micro_batches, k, accumulation in every_case():
        total = num_micro_batches * accumulation
        simulated = simulate(orders(mode, num_stages, num_micro_batches, k, accumulation), wires=[Wire(latency=0.7)] * (num_stages - 1))
        for s, peak in enumerate(simulated.peak_in_flight):
            if mode == "gpipe":
                assert peak == num_micro_batches
            elif mode == "1f1b":
                assert peak == min(total, 1 + (num_stages - 1 - s) * (1 + k))
            else:
                assert peak <= min(total, 1 + (num_stages - 1) * (1 + k)), "no stage holds more than the first one does in 1f1b"


def test_the_simulator_finds_orders_that_wait_for_each_other() -> None:
    good = orders("1f1b", 2, 2)
    backwards_first = (Action("F", 0), Action("F", 1), Action("B", 1), Action("B", 0))
    too_late = (Action("F", 0), Action("B", 0), Action("F", 1), Action("B", 1))  # stage 1 of three needs two forwards ahead
    simulate([good[0], good[1]])
    with pytest.raises(DeadlockError, match="stage 0 cannot run B1"):
        simulate([(Action("F", 0), Action("B", 1), Action("B", 0), Action("F", 1)), good[1]])
    with pytest.raises(DeadlockError, match="stage 1 cannot run F1; stage 2 cannot run F1"):
        simulate([too_late, (Action("F", 0), Action("F", 1), Action("B", 0), Action("B", 1)), backwards_first])


def test_the_bubble_is_what_the_papers_say() -> None:
    """(S - 1) / (M + S - 1) for GPipe and 1F1B (arXiv:2104.04473, section 2.2); (S - 1)(F + B - W) idle per stage for ZB-H1
    (arXiv:2401.10241, table 2)."""
    for num_stages, num_micro_batches in itertools.product((1, 2, 4, 8), (8, 16)):
        expected = (num_stages - 1) / (num_micro_batches + num_stages - 1)
        for mode in ("gpipe", "1f1b"):
            simulated = simulate(orders(mode, num_stages, num_micro_batches))
            assert simulated.bubble == pytest.approx(expected)
            assert simulated.makespan == pytest.approx(3 * (num_micro_batches + num_stages - 1))
        idle = simulate(orders("zb", num_stages, num_micro_batches)).makespan - 3 * num_micro_batches
        assert idle == pytest.approx(num_stages - 1)  # F = B = W = 1


def test_accumulation_steps_go_through_without_emptying_the_pipeline_except_in_gpipe() -> None:
    flushed, streamed = (simulate(orders(mode, 4, 4, accumulation=4)) for mode in ("gpipe", "1f1b"))
    assert flushed.bubble == pytest.approx(3 / 7)
    assert streamed.bubble == pytest.approx(3 / 19)
    assert max(flushed.peak_in_flight) == max(streamed.peak_in_flight) == 4


def test_enough_extra_forwards_hide_a_long_link() -> None:
    wire, compute = Wire(latency=2.0, transfer=0.5), Durations(forward=1, backward=1, weight_grad=1)
    k = extra_warmup_for(latency_s=wire.latency, transfer_s=2 * wire.transfer, compute_s=3.0)
    assert k == 2
    unavoidable = 3 * 17 + 2 * (wire.latency + wire.transfer)  # ideal of 16 micro-batches, the way there once and back once
    for extra, hidden in ((0, False), (1, False), (k, True), (k + 1, True)):
        makespan = simulate(orders("1f1b", 2, 16, extra), [compute] * 2, [wire]).makespan
        assert (makespan <= unavoidable + 1e-9) == hidden, extra
    assert simulate(orders("zb", 2, 16, k), [compute] * 2, [wire]).makespan < unavoidable - 1


def test_transfers_of_one_direction_follow_each_other() -> None:
    simulated = simulate(orders("gpipe", 2, 4), [Durations(forward=0.1, backward=0.1, weight_grad=0)] * 2, [Wire(transfer=1.0)])
    assert simulated.makespan == pytest.approx(0.1 + 4 * 1.0 + 0.1 + 0.1 + 4 * 1.0 + 0.1)


def test_extra_warmup_counts_per_link_behind_a_stage_and_ignores_what_is_negligible() -> None:
    assert [warmup_forwards(s, 4, (0, 2, 1)) for s in range(4)] == [6, 5, 2, 0]
    assert extra_warmup_for(latency_s=1e-5, transfer_s=1e-4, compute_s=0.05) == 0
    assert extra_warmup_for(latency_s=0.02, transfer_s=0.008, compute_s=0.06) == 1
    assert extra_warmup_for(latency_s=0.02, transfer_s=0.27, compute_s=0.06) == 6


def test_peak_in_flight_counts_until_the_last_use() -> None:
    assert peak_in_flight([Action("F", 0), Action("B", 0), Action("F", 1), Action("B", 1)]) == 1
    assert peak_in_flight([Action("F", 0), Action("B", 0), Action("F", 1), Action("B", 1), Action("W", 0), Action("W", 1)]) == 2


def test_the_diagram_in_the_docstring_is_what_the_simulator_plays() -> None:
    text = schedule.__doc__ or ""
    for mode in MODES:
        rows = re.search(rf"^    {mode} +stage 0 +(.*?)\n +stage 1 +(.*)$", text, re.MULTILINE)
        assert rows, mode
        for drawn, played in zip(rows.groups(), simulate(orders(mode, 2, 4)).played, strict=True):
            slots = ["."] * int(played[-1].end)
            for action, start, end in played:
                slots[int(start) : int(end)] = [f"{action.kind}{action.i}"] * int(end - start)
            assert drawn.split() == slots, mode
