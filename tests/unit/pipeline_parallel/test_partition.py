"""Cuts by hand, by cost and by measurement: exact where they are solved, one clear message where they cannot be."""

import dataclasses
import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks, train_argv

from comms.place import place_of
from comms.probe import LinkTimes
from comms.spans import Spans
from modules.gptj import GPTJBlock, GPTJConfig
from modules.stage import Stage
from pipeline_parallel.partition import (
    Cut,
    StageCost,
    best_cut,
    cut_by_stage_layers,
    even_cut,
    explain_cut,
    layers_that_fit,
    parse_stage_layers,
    stage_bytes,
    stage_seconds,
)
from training.config.cli import parse_config
from training.config.train import Config
from training.job import host_limits
from training.job.host_limits import default_memory_limit
from training.layout import measure
from training.layout.measure import MeasuredCosts, describe_cut, measure_costs, stage_costs
from training.layout.plan import Measurement, PipelinePlan, agree_on_plan, settle
from training.memory.held import count_parameters
from user_error import UserError

PLENTY = 10**15
CPU = torch.device("cpu")
HEAVY_HEAD = GPTJConfig(
    vocab_size=20_000,
    num_positions=32,
    width=32,
    num_layers=6,
    num_heads=4,
    inner_width=128,
    rotary_dim=4,
    rotary_base=10000.0,
    layer_norm_epsilon=1e-5,
    initializer_range=0.02,
)


def measured(config: GPTJConfig = HEAVY_HEAD, **kwargs: Any) -> MeasuredCosts:
    common = {"device": CPU, "micro_batch_size": 2, "seq_length": 32, "memory_limit_bytes": PLENTY, "budget_s": 0.1}
    return measure_costs(config, **{**common, **kwargs})


def sizes(cut: Cut) -> list[int]:
    return [last - first for first, last in cut]


def all_cuts(num_layers: int, num_stages: int) -> Iterator[Cut]:
    for inner in itertools.combinations(range(1, num_layers), num_stages - 1):
        yield tuple(itertools.pairwise((0, *inner, num_layers)))


def random_stages(rng: random.Random, num_stages: int) -> list[StageCost]:
    """Unlike devices; a third of them with memory for a few layers only."""
    alike = rng.random() < 0.5
    layer_s = rng.uniform(1, 2)
    return [
        StageCost(
            layer_s=layer_s if alike else rng.choice((rng.uniform(0.5, 3), 1.0)),
            embeddings_s=rng.choice((0.0, rng.uniform(0, 2))),
            head_s=rng.choice((0.0, rng.uniform(0, 8))),
            fixed_bytes=rng.choice((0, 3)),
            layer_bytes=rng.randint(5, 15),
            embeddings_bytes=rng.randint(0, 30),
            head_bytes=rng.randint(0, 40),
            layer_bytes_in_flight=rng.randint(0, 4),
            output_bytes_in_flight=rng.randint(0, 2),
            memory_limit_bytes=rng.choice((PLENTY, PLENTY, rng.randint(20, 160))),
        )
        for _ in range(num_stages)
    ]


def test_stage_layers_are_read_or_refused() -> None:
    assert parse_stage_layers("6,8,8,6") == (6, 8, 8, 6)
    assert parse_stage_layers(" 3, 1 ") == (3, 1)
    assert parse_stage_layers("28") == (28,)
    for bad in ("", "6,,8", "6;8", "6,8,", "six", "6.5,7", "6 8"):
        with pytest.raises(UserError, match=r"such as 6,8,8,6; it is '"):
            parse_stage_layers(bad)


def test_a_cut_by_hand_is_taken_as_given_or_refused_with_one_that_fits() -> None:
    assert cut_by_stage_layers(28, 4, (6, 8, 8, 6)) == ((0, 6), (6, 14), (14, 22), (22, 28))
    assert cut_by_stage_layers(3, 1, [3]) == ((0, 3),)
    with pytest.raises(UserError, match=r"6,8,8,5 sums to 27, the model has 28\. For instance: --stage-layers 7,7,7,7$"):
        cut_by_stage_layers(28, 4, (6, 8, 8, 5))
    with pytest.raises(UserError, match=r"6,8,8 has 3 and --pipeline-group-size is 4.*--stage-layers 7,7,7,7$"):
        cut_by_stage_layers(28, 4, (6, 8, 8))
    for wrong, stage in (((14, 0, 7, 7), "stage 1 0"), ((10, 10, 10, -2), "stage 3 -2")):
        with pytest.raises(UserError, match=f"every stage needs a layer.* gives {stage}"):
            cut_by_stage_layers(28, 4, wrong)
    with pytest.raises(UserError, match="--pipeline-group-size 2 or less"):
        cut_by_stage_layers(2, 3, (1, 1, 0))


def test_the_best_cut_is_the_best_of_all_cuts() -> None:
    rng = random.Random(0)
    num_refused = num_decided_by_memory = 0
    for _ in range(1500):
        num_stages = rng.randint(1, 5)
        num_layers = rng.randint(num_stages, 9)
        costs = random_stages(rng, num_stages)
        in_flight = [rng.randint(1, 4) for _ in range(num_stages)]
        limits = [cost.memory_limit_bytes for cost in costs]
        every = list(all_cuts(num_layers, num_stages))
        fitting = [cut for cut in every if all(a <= b for a, b in zip(stage_bytes(costs, cut, in_flight), limits, strict=True))]
        if not fitting:
            num_refused += 1
            with pytest.raises(UserError, match="must fit the memory"):
                best_cut(costs, num_layers, in_flight)
            continue
        cut = best_cut(costs, num_layers, in_flight)
        assert cut in fitting
        least = min(max(stage_seconds(costs, other)) for other in fitting)
        assert max(stage_seconds(costs, cut)) == least, "not approximately: exactly"
        num_decided_by_memory += least > min(max(stage_seconds(costs, other)) for other in every)
        assert explain_cut(costs, cut, in_flight).count("memory decided") == (least > min(max(stage_seconds(costs, o)) for o in every))
    assert num_refused > 50 and num_decided_by_memory > 50, "the cases must be of all kinds"


def test_where_the_slowest_stage_leaves_a_choice_the_others_are_level() -> None:
    rng = random.Random(1)
    for _ in range(300):
        num_stages = rng.randint(2, 5)
        costs = [replace(cost, memory_limit_bytes=PLENTY, layer_s=rng.uniform(0.5, 3)) for cost in random_stages(rng, num_stages)]
        cut = best_cut(costs, 9, [1] * num_stages)
        most_level = min(sorted(stage_seconds(costs, other), reverse=True) for other in all_cuts(9, num_stages))
        assert sorted(stage_seconds(costs, cut), reverse=True) == most_level
    heavy = [StageCost(layer_s=1.0, head_s=9.0, memory_limit_bytes=PLENTY)] * 4
    assert sizes(best_cut(heavy, 8, [1] * 4)) == [3, 2, 2, 1], "not 5, 1, 1, 1, whose slowest stage is as slow"


def test_without_a_reason_the_best_cut_is_the_even_one() -> None:
    for num_layers, num_stages in itertools.product(range(1, 30), range(1, 12)):
        costs = [StageCost(layer_s=0.1, memory_limit_bytes=PLENTY)] * num_stages
        if num_stages > num_layers:
            with pytest.raises(UserError, match=f"--pipeline-group-size {num_layers} or less"):
                best_cut(costs, num_layers, [1] * num_stages)
        else:
            assert best_cut(costs, num_layers, [1] * num_stages) == even_cut(num_layers, num_stages)


def test_cuts_of_made_up_models_are_those_found_by_hand() -> None:
    def stages(*layer_s: float, **kwargs: float) -> list[StageCost]:
        return [StageCost(layer_s=s, memory_limit_bytes=PLENTY, **kwargs) for s in layer_s]  # type: ignore[arg-type]

    assert sizes(best_cut(stages(1, 1, head_s=8), 8, [1, 1])) == [7, 1], "a head as heavy as all layers"
    assert sizes(best_cut(stages(1, 1, head_s=8, embeddings_s=4), 8, [1, 1])) == [6, 2], "9 and 10, against 11 and 9"
    assert sizes(best_cut(stages(1, 3), 8, [1, 1])) == [6, 2], "a device a third as fast"
    assert sizes(best_cut(stages(1, 1, 1, 1, head_s=2, embeddings_s=0.5), 28, [1] * 4)) == [7, 8, 8, 5]


def test_memory_includes_what_is_in_flight_and_the_message_says_what_was_missing() -> None:
    plain = StageCost(
        layer_s=0.01,
        head_s=0.04,
        layer_bytes=3 * 10**9,
        embeddings_bytes=10**9,
        head_bytes=10**9,
        layer_bytes_in_flight=10**8,
        output_bytes_in_flight=10**7,
        memory_limit_bytes=16 * 10**9,
    )
    costs = [plain, plain]
    assert layers_that_fit(costs, 8, [1, 1]) == [4, 4] and layers_that_fit(costs, 8, [10, 1]) == [3, 4]
    assert stage_bytes(costs, ((0, 4), (4, 8)), [10, 1]) == [10**9 + 10**8 + 4 * 4 * 10**9, 10**9 + 10**7 + 4 * 31 * 10**8]
    assert sizes(best_cut(costs, 8, [1, 1])) == [4, 4], "the head would have them 6 and 2"
    assert "; memory decided: without the limit of stage 0 it would be 60.0 ms" in explain_cut(costs, ((0, 4), (4, 8)), [1, 1])
    with pytest.raises(UserError) as caught:
        best_cut(costs, 8, [10, 1])
    assert str(caught.value).startswith(
        "the model's 8 layers must fit the memory of the stages; together the stages have room for 7. With an even cut stage 0 needs "
        "15.93 GiB for 4 layer(s) and 10 micro-batch(es) in flight, it has 14.90 GiB, room for 3; stage 1 needs 12.49 GiB for 4 "
        "layer(s) and 1 micro-batch(es) in flight, it has 14.90 GiB, room for 4. Use more stages (--pipeline-group-size)"
    )
    with pytest.raises(UserError, match="stage 1 has no room for a single one"):
        best_cut([plain, replace(plain, memory_limit_bytes=10**9)], 4, [1, 1])


def test_the_table_gives_the_stages_and_the_sentence_the_reason() -> None:
    costs = [StageCost(layer_s=0.01, embeddings_s=0.001, head_s=0.039, layer_bytes=10**6, memory_limit_bytes=10**9)] * 2
    text = describe_cut(costs, best_cut(costs, 8, [1, 1]), [1, 1])
    assert text.splitlines() == [
        "  stage  layers              ms per micro-batch  share of slowest  memory needed  memory available",
        "  0      embeddings, 0 .. 5  61.0                100%              5.72 MiB       953.67 MiB",
        "  1      6 .. 7, head        59.0                97%               1.91 MiB       953.67 MiB",
        "  even cut: slowest stage 79.0 ms; measured cut: 61.0 ms, 1.30 times faster; the head costs as much as 3.9 layers",
    ]
    unlike = [StageCost(layer_s=0.01, memory_limit_bytes=PLENTY), StageCost(layer_s=0.03, memory_limit_bytes=PLENTY)]
    assert "a layer takes 3.0 times as long on stage 1 as on stage 0" in explain_cut(unlike, best_cut(unlike, 8, [1, 1]), [1, 1])
    alike = [StageCost(layer_s=0.01, memory_limit_bytes=PLENTY)] * 2
    assert explain_cut(alike, even_cut(8, 2), [1, 1]).startswith("the even cut is the best one: slowest stage 40.0 ms")
    tight = [StageCost(layer_s=0.01, layer_bytes=10, memory_limit_bytes=limit) for limit in (30, 100)]
    assert explain_cut(tight, ((0, 3), (3, 8)), [1, 1]).startswith("even cut: slowest stage 40.0 ms; measured cut: 50.0 ms; ")


def test_measuring_leaves_no_trace_and_counts_what_a_layer_keeps() -> None:
    state, num_threads, grad_enabled = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
    costs = measured()
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == num_threads and torch.is_grad_enabled() == grad_enabled
    assert min(costs.layer_forward_s, costs.layer_backward_s, costs.embeddings_s) > 0 and costs.num_rounds >= 3
    assert costs.head_s > 2 * costs.layer_s, "20,000 rows of 32 are ten times a layer's weights"
    hidden = 2 * 32 * 32 * 4
    assert 10 * hidden < costs.layer_activation_bytes < 30 * hidden
    more = measured(micro_batch_size=4, with_embeddings=False, with_head=False)
    assert more.layer_activation_bytes == pytest.approx(2 * costs.layer_activation_bytes, rel=0.02)
    assert (more.embeddings_s, more.head_s) == (0, 0)


def test_what_a_layer_keeps_is_what_a_forward_allocates() -> None:
    """Against the allocator's own count: what is left allocated when a forward has ended."""
    config = replace(HEAVY_HEAD, vocab_size=16, width=64, inner_width=256, num_positions=64)
    costs = measured(config, seq_length=64, budget_s=0)
    one, five = (allocated_by_forward(config, num_layers=n) for n in (1, 5))
    assert costs.layer_activation_bytes == pytest.approx((five - one) / 4, rel=0.05)


def allocated_by_forward(config: GPTJConfig, num_layers: int) -> int:
    from modules.lm_ops import Segments

    stage = Stage(replace(config, num_layers=num_layers + 2), 1, 1 + num_layers)
    segments = Segments.from_positions(torch.arange(64).expand(2, 64))
    x = torch.randn(2, 64, config.width, requires_grad=True)
    stage(x, segments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = stage(x, segments)
    assert y is not None, "kept until here"
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


def test_recomputing_is_measured_as_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = GPTJBlock.forward, []
    monkeypatch.setattr(GPTJBlock, "forward", lambda *args: (calls.append(1), forward(*args))[1])
    kept = {}
    for recomputes, forwards_per_round in ((False, 1), (True, 2)):
        calls.clear()
        costs = measured(recomputes=recomputes, with_head=False, budget_s=0)
        assert len(calls) == 2 * (2 + forwards_per_round * (1 + costs.num_rounds)), "two layers: count bytes twice, warm up, time"
        kept[recomputes] = costs.layer_activation_bytes
    assert kept[True] == kept[False], "of the one layer whose backward runs, or of all of them"


def job_of(rank: int, store: dist.Store | None, *, pp_size: int, dp_size: int = 1) -> Any:
    """What of a Job the plan needs, on one host."""
    world_size = pp_size * dp_size

    def wait_for_all() -> None:
        assert store is not None
        store.set(f"here/{rank}", "1")
        store.wait([f"here/{other}" for other in range(world_size)])

    return SimpleNamespace(
        place=place_of(rank, dp_size=dp_size, pp_size=pp_size),
        store=store,
        wait_for_all=wait_for_all,
        roster=[{"host_id": "here"}] * world_size,
        device=CPU,
        num_threads=1,
        spans=Spans(),
        model_config=HEAVY_HEAD,
        cut=even_cut(HEAVY_HEAD.num_layers, pp_size),
    )


def config_of(*, stages: int, **flags: Any) -> Config:
    common = {
        "batch_size": 4,
        "micro_batch_size": 2,
        "seq_length": 32,
        "total_steps": 2,
        "extra_warmup_forwards": 0,
        "partition": "measured",
    }
    needed = {"model_name": "m", "task_name": "t.jsonl", "checkpoint_path": "c"}
    return parse_config(train_argv(**needed, **{**common, "pipeline_group_size": stages, **flags}), {})


def test_ranks_measure_and_agree_and_a_heavy_head_gets_fewer_layers(tmp_path: Path) -> None:
    def rank_main(rank: int, store: dist.Store) -> None:
        torch.manual_seed(rank)
        state, num_threads = torch.get_rng_state(), torch.get_num_threads()
        plan = agree_on_plan(job_of(rank, store, pp_size=2), config_of(stages=2))
        assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == num_threads
        assert plan.cut[0][0] == 0 and plan.cut[0][1] == plan.cut[1][0] and plan.cut[1][1] == 6
        (tmp_path / f"{rank}.json").write_text(json.dumps([plan.cut, plan.reasons]))

    run_ranks(rank_main, 2, tmp_path)
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert answers[0] == answers[1]
    cut, (reason,) = answers[0]
    assert sizes(cut)[1] < sizes(cut)[0], reason
    assert "times faster; the head costs as much as" in reason


def test_a_rank_that_is_done_keeps_its_host_busy_until_all_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the slower ranks time a quieter host than they will train on, and get too many layers."""

    def rank_main(rank: int, store: dist.Store) -> None:
        num_rounds = []

        def measure(config: GPTJConfig, **kwargs: Any) -> MeasuredCosts:
            if rank == 1:
                time.sleep(1.0)
            costs = measure_costs(config, **{**kwargs, "budget_s": 0.0, "with_head": False})
            num_rounds.append(costs.num_rounds)
            return costs

        monkeypatch.setattr("training.layout.plan.measure_costs", measure)
        agree_on_plan(job_of(rank, store, pp_size=2), config_of(stages=2))
        assert num_rounds[0] > 3 if rank == 0 else num_rounds[0] >= 3, num_rounds

    run_ranks(rank_main, 2, tmp_path)


def test_a_stage_is_as_slow_as_its_slowest_replica_and_has_the_memory_of_its_smallest() -> None:
    job, config = job_of(0, None, pp_size=2, dp_size=2), config_of(stages=2, world_size=4, rank=0)

    def measurement(*, slow: float = 1.0, limit: int = PLENTY) -> Measurement:
        costs = MeasuredCosts(layer_forward_s=0.001 * slow, layer_backward_s=0.002 * slow, layer_activation_bytes=1000)
        return Measurement.from_fields(
            json.loads(json.dumps(dataclasses.asdict(Measurement(costs=costs, memory_limit_bytes=limit, link=None))))
        )

    alike = [measurement() for _ in range(4)]
    assert sizes(settle(job, config, alike).cut) == [3, 3]
    plan = settle(job, config, [*alike[:3], measurement(slow=3.0)])
    assert sizes(plan.cut) == [5, 1], "15 ms and 9 ms, for 4 and 2 layers it would be 12 and 18"
    assert "a layer takes 3.0 times as long on stage 1 as on stage 0" in plan.reasons[0]

    layer, embeddings, _ = count_parameters(HEAVY_HEAD)
    hidden = 2 * 32 * 32 * 4
    needed = 2 * (16 * layer + 2 * 1000) + 20 * embeddings + 2 * hidden  # of stage 0 with two layers and two micro-batches in flight
    for limit, expected in ((needed, [2, 4]), (needed - 1, [1, 5])):
        small = measurement(limit=limit)
        assert sizes(settle(job, config, [alike[0], alike[1], small, alike[3]]).cut) == expected
    with pytest.raises(UserError, match=r"stage 0 has no room for a single one.*it has 0\.95 MiB, room for 0"):
        settle(job, config, [alike[0], alike[1], measurement(limit=10**6), alike[3]])


def test_recomputed_layers_take_less_memory_per_micro_batch_in_flight() -> None:
    costs = [
        [MeasuredCosts(layer_forward_s=0.001, layer_backward_s=0.002, layer_activation_bytes=10**6, layer_left_over_bytes=8 * 10**5)]
    ] * 2
    hidden = 2 * 32 * 32 * 4
    plain, recomputed, left_over = (
        stage_costs(costs, [PLENTY] * 2, HEAVY_HEAD, num_tokens=2 * 32, recomputes=recomputes, leaves_weight_gradients=leaves)[0]
        for recomputes, leaves in ((False, False), (True, False), (True, True))
    )
    assert (plain.fixed_bytes, plain.layer_bytes_in_flight) == (0, 10**6)
    assert (recomputed.fixed_bytes, recomputed.layer_bytes_in_flight) == (10**6, hidden), "all of one layer, the inputs of the others"
    assert left_over.layer_bytes_in_flight == 8 * 10**5, "in zb a micro-batch may wait for its weight gradients, recomputed or not"
    assert plain.output_bytes_in_flight == recomputed.output_bytes_in_flight == hidden


def test_memory_limits_how_far_ahead_auto_goes_and_the_reason_says_so() -> None:
    job, config = job_of(0, None, pp_size=2), config_of(stages=2, extra_warmup_forwards="auto", batch_size=32, micro_batch_size=1)
    layer, embeddings, _ = count_parameters(HEAVY_HEAD)
    costs = MeasuredCosts(layer_forward_s=0.001, layer_backward_s=0.002, layer_activation_bytes=layer)
    far = LinkTimes(latency_s=0.5, transfer_s=0.0)  # asks for all 32 micro-batches
    needs_two_ahead = 16 * layer + 20 * embeddings + 4 * (layer + 32 * 32 * 4)  # of one layer
    enough = 10**9

    def plan(limit: int) -> PipelinePlan:
        return settle(job, config, [Measurement(costs=costs, memory_limit_bytes=m, link=far) for m in (limit, enough)])

    assert plan(enough).schedule.extra_warmup == (32,)
    assert plan(needs_two_ahead).schedule.extra_warmup == (2,)
    assert "memory allows 2 ahead (by link)" in plan(needs_two_ahead).reasons
    assert plan(needs_two_ahead - 1).schedule.extra_warmup == (1,)


def test_a_rank_without_room_for_one_layer_does_not_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "empty_stage", lambda *args, **kwargs: pytest.fail("measuring would take what is not there"))
    layer, embeddings, head = count_parameters(HEAVY_HEAD)
    costs = measured(memory_limit_bytes=16 * (layer + embeddings + head) - 1)
    assert costs == MeasuredCosts(layer_forward_s=0.0, layer_backward_s=0.0)


def test_the_free_memory_of_a_host_is_shared_by_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_limits, "free_memory", lambda: 1000)
    assert (default_memory_limit(CPU, 1), default_memory_limit(CPU, 3)) == (900, 300)
    monkeypatch.undo()
    assert 0 < default_memory_limit(CPU, 1) <= psutil.virtual_memory().total
