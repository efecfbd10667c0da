"""Tokens per second, share of the ideal and memory of pipelines with real computation on loopback, against peers that do the same work.

    python benchmarks/pipeline.py --rounds 5 --cut even measured > pipeline.json

Contestants: our pipeline in each mode; torch's ScheduleGPipe and Schedule1F1B and DeepSpeed's pipeline over the same stage modules; one
process with all cores, of transformers' GPTJForCausalLM (hf) and of ours (single). Every rank of a pipeline computes with one thread.
Each round runs every variant once, in an order that turns; ratios are taken within a round.

Tokens per second: whole optimizer steps, with norm, clipping and AdamW. Ideal over measured: forwards and backwards alone, against
(micro-batches + stages - 1) x the slowest stage's forward and backward, which is timed right before each step while all other stages
are as busy. More ranks than cores share the cores, and then the ideal is no bound. Memory: highest resident set of each rank, and
how many micro-batches' activations our stages held by the allocator's count, beside what the simulator says. The benchmark fails if a
variant's losses are not those of the others. --precision bf16 trains ours (with exact masters) in bf16, the peers stay in fp32."""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import (
    Gate,
    Sizes,
    add_size_options,
    answer_and_end,
    fork_ranks,
    machine,
    peak_rss_mib,
    run_in_own_process,
    run_rounds,
    sizes_of,
    spread,
    time_steps,
)

MODES = ("gpipe", "1f1b", "zb")
PEERS = ("torch-gpipe", "torch-1f1b", "deepspeed", "hf", "single")
ONE_PROCESS = ("hf", "single")
NUM_ALONE = 3  # micro-batches of which the median is a stage's time
TIMEOUT = timedelta(minutes=10)
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # relative; by --precision
NOT_INSTALLED = "not installed (pip install --no-deps deepspeed, and its other dependencies, beside this torch)"

Variant = dict[str, Any]  # kind: a mode of ours or a peer; stages; cut; precision


def all_variants(options: argparse.Namespace) -> dict[str, Variant]:
    """By name."""
    variants: dict[str, Variant] = {peer: {"kind": peer, "stages": 1, "cut": "even"} for peer in ONE_PROCESS if peer in options.peers}
    for stages in options.stages:
        for cut in options.cut:
            if cut[0].isdigit() and cut.count(",") != stages - 1:
                continue  # a cut by hand is for its own number of stages
            for kind in (*options.modes, *(peer for peer in options.peers if peer not in ONE_PROCESS)):
                name = f"{'ours ' if kind in MODES else ''}{kind}, {stages} stages, cut {cut}"
                variants[name] = {"kind": kind, "stages": stages, "cut": cut}
    for variant in variants.values():
        variant["precision"] = options.precision if variant["kind"] in (*MODES, "single") else "fp32"
    return variants


def stage_of(variant: Variant, sizes: Sizes, layers: tuple[int, int]):  # type: ignore[no-untyped-def]
    """[first, last) in the variant's precision, with values."""
    import torch
    from contestants import drawn_stage

    return drawn_stage(sizes, *layers, dtype=torch.bfloat16 if variant["precision"] == "bf16" else torch.float32)


def run_variant(variant: Variant, sizes: Sizes, measures: str) -> Any:
    """In this process and its ranks: a list of what each rank found."""
    folder = Path(tempfile.mkdtemp())
    import contestants  # noqa: F401
    import torch  # noqa: F401 - once, before the ranks are forked

    return fork_ranks(range(variant["stages"]), lambda rank: be_rank(rank, variant, sizes, measures, folder))


def be_rank(rank: int, variant: Variant, sizes: Sizes, measures: str, folder: Path) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from comms.groups import join_process_group
    from comms.place import place_of
    from training.memory.allocator import keep_freed_memory

    kind, num_stages = variant["kind"], variant["stages"]
    torch.set_num_threads(len(os.sched_getaffinity(0)) if kind in ONE_PROCESS else 1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_RANK=str(rank))
    place = place_of(rank, dp_size=1, pp_size=num_stages)
    store = dist.FileStore(str(folder / "store"), num_stages)
    join_process_group(place, dist.PrefixStore("groups", store), "gloo", TIMEOUT)
    rss_at_start = peak_rss_mib()
    gate = Gate(folder / "gate", rank, num_stages)
    if kind != "hf":
        keep_freed_memory()  # as the trainer does; so that the runtimes alone differ, for all pipelines
    if measures == "memory":
        return measure_memory(place, store, variant, sizes)
    found = measure_time(place, store, gate, variant, sizes)
    return {**found, "rss_at_start_mib": rss_at_start}


def cut_of(place, store, groups, variant: Variant, sizes: Sizes):  # type: ignore[no-untyped-def]
    """The stages' layers, as the trainer would find them. Collective."""
    from pipeline_parallel.partition import cut_by_stage_layers, even_cut, parse_stage_layers

    if variant["cut"] == "even":
        return even_cut(sizes.layers, place.pp_size)
    if variant["cut"] == "measured":
        return measured_cut(place, store, groups, variant, sizes)
    return cut_by_stage_layers(sizes.layers, place.pp_size, parse_stage_layers(variant["cut"]))


def measured_cut(place, store, groups, variant: Variant, sizes: Sizes):  # type: ignore[no-untyped-def]
    """What the trainer's --partition measured comes to: it is asked, with as much of a job as it looks at."""
    import torch
    import torch.distributed as dist

    from modules.gptj import GPTJConfig
    from pipeline_parallel.partition import even_cut
    from training.config.train import Config
    from training.layout.plan import agree_on_plan

    job = SimpleNamespace(
        place=place,
        store=dist.PrefixStore("plan", store),
        groups=groups,
        roster=[{"host_id": "here"}] * place.pp_size,
        device=torch.device("cpu"),
        num_threads=1,
        model_config=GPTJConfig.from_hf(sizes.hf_config),
        cut=even_cut(sizes.layers, place.pp_size),
        wait_for_all=dist.barrier,
    )
    config = Config(
        partition="measured",
        bf16=variant["precision"] == "bf16",
        pp_mode=schedule_of(variant),
        extra_warmup_forwards="0",
        wire_dtype_grad="none",
        pipeline_group_size=place.pp_size,
        batch_size=sizes.num_sequences,
        micro_batch_size=sizes.micro_batch_size,
        seq_length=sizes.seq_length,
    )
    return agree_on_plan(job, config).cut


def schedule_of(variant: Variant):  # type: ignore[no-untyped-def]
    """In our words; DeepSpeed's schedule is 1F1B."""
    return {"deepspeed": "1f1b", "single": "1f1b", "hf": "1f1b"}.get(variant["kind"], variant["kind"].removeprefix("torch-"))


def orders_of(variant: Variant, num_micro_batches: int):  # type: ignore[no-untyped-def]
    """What each stage does."""
    from pipeline_parallel.schedule import order

    stages = range(variant["stages"])
    return [order(schedule_of(variant), stage=s, num_stages=len(stages), num_micro_batches=num_micro_batches) for s in stages]


def measure_time(place, store, gate: Gate, variant: Variant, sizes: Sizes) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    from contestants import DeepSpeedPipeline, OurPipeline, StageAlone, TorchPipeline, TransformersProcess

    from comms.groups import make_groups

    kind, groups = variant["kind"], make_groups(place, "gloo", TIMEOUT)
    cut = cut_of(place, store, groups, variant, sizes)
    stage = None if kind == "hf" else stage_of(variant, sizes, cut[place.pp])
    if kind == "hf":
        contestant = TransformersProcess(sizes)
    elif kind == "deepspeed":
        contestant = DeepSpeedPipeline(sizes, place, stage)
    elif kind.startswith("torch"):
        contestant = TorchPipeline(sizes, place, stage, kind)
    else:
        contestant = OurPipeline(sizes, place, groups, stage, kind if kind in MODES else "1f1b")
    losses = [contestant.step()]
    gate.start_together()
    cpu_before = time.process_time()
    seconds = time_steps(lambda: losses.append(contestant.step()), sizes.steps)
    found = {
        "losses": losses,
        "cpu_seconds_per_step": (time.process_time() - cpu_before) / sizes.steps,
        "seconds_per_step": statistics.median(seconds),
        "peak_rss_mib": peak_rss_mib(),
        "cut": cut,
        "pipeline": [],
    }
    if kind in ("hf", "deepspeed", "single"):
        return found
    alone = StageAlone(sizes, stage)
    for _ in range(sizes.steps):
        durations = time_alone(gate, alone)
        contestant.forget()
        start = gate.start_together()
        found["pipeline"].append({"alone": durations, "seconds": contestant.pipeline() - start})
        contestant.forget()
    return {**found, "seconds_by_span": getattr(contestant, "seconds_by_span", {})}


def time_alone(gate: Gate, alone) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Medians over NUM_ALONE micro-batches; goes on computing until every rank has as many."""
    gate.start_together()
    taken = [alone.time_once() for _ in range(NUM_ALONE)]
    gate.arrive()
    while not gate.all_are_here():
        alone.time_once()
    return {name: statistics.median(getattr(d, name) for d in taken) for name in ("forward", "backward", "weight_grad")}


def measure_memory(place, store, variant: Variant, sizes: Sizes) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    """How many micro-batches' activations a stage of ours held at its peak: what a step's peak has over that of a step of one micro-batch,
    divided by what a micro-batch keeps. All by the allocator's count of what this thread allocates and frees: a message that the sending
    thread lets go of counts on, so that the figure may be too high by message / kept for every micro-batch but one."""
    from contestants import OurPipeline, StageAlone

    from comms.groups import make_groups

    groups = make_groups(place, "gloo", TIMEOUT)
    stage = stage_of(variant, sizes, cut_of(place, store, groups, variant, sizes)[place.pp])
    held: list[Any] = []
    alone = StageAlone(sizes, stage)
    alone.time_once()
    kept, _ = allocated_by(lambda: held.append(alone.forward()))
    held.clear()
    stage.zero_grad()  # made by autograd in the parameters' dtype, where ours are fp32
    peaks = []
    for num_micro_batches in (1, sizes.micro_batches):
        contestant = OurPipeline(replace(sizes, micro_batches=num_micro_batches), place, groups, stage, variant["kind"])
        contestant.step()
        peaks.append(allocated_by(contestant.pipeline)[1])
    message = sizes.tokens_per_micro_batch * sizes.width * stage.compute_dtype.itemsize
    too_high = 0.0 if place.is_first_stage else (sizes.micro_batches - 1) * message / kept
    return {"kept_per_micro_batch_mib": kept / 2**20, "in_flight": 1 + (peaks[1] - peaks[0]) / kept, "too_high_by_at_most": too_high}


def allocated_by(run: Callable[[], float | None]) -> tuple[int, int]:
    """Bytes of torch's CPU allocator that ``run`` left allocated, and the most it held on the way; until the time that it returned
    (time.perf_counter), if it returned one."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        end = run()
    end_ns = time.time_ns() if end is None else time.time_ns() - int((time.perf_counter() - end) * 1e9)
    events = profiled.profiler.kineto_results.events()  # the public list of events has no order in time
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]" and e.start_ns() < end_ns), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return now, peak


def check_losses(rounds: list[dict[str, Any]], tolerance: float) -> list[float]:
    """Exit unless every variant reported the same losses, to the relative ``tolerance``; returns them."""
    by_name = {name: max(ranks, key=lambda rank: rank["losses"][0])["losses"] for name, ranks in rounds[0].items()}
    expected = next(iter(by_name.values()))
    for name, losses in by_name.items():
        if any(abs(loss - wanted) > tolerance * wanted for loss, wanted in zip(losses, expected, strict=True)):
            sys.exit(f"all variants must do the same work, so their losses must agree; they are {by_name}, see {name!r}")
    return expected


def shares_of_ideal(ranks: list[dict[str, Any]], variant: Variant, sizes: Sizes) -> list[dict[str, float]]:
    """One entry per step: ideal and simulated time over the measured one, and each in seconds."""
    from pipeline_parallel.simulator import Durations, simulate

    shares = []
    for step in zip(*(rank["pipeline"] for rank in ranks), strict=True):
        durations = [Durations(**rank["alone"]) for rank in step]
        slowest = max(d.forward + d.backward + d.weight_grad for d in durations)
        ideal = (sizes.micro_batches + variant["stages"] - 1) * slowest
        simulated = simulate(orders_of(variant, sizes.micro_batches), durations).makespan
        measured = max(rank["seconds"] for rank in step)
        shares.append({"ideal_over_measured": ideal / measured, "simulated_over_measured": simulated / measured, "measured_s": measured})
    return shares


def report_on(name: str, variant: Variant, rounds: list[dict[str, Any]], sizes: Sizes) -> dict[str, Any]:
    runs = [found[name] for found in rounds]
    seconds = [max(rank["seconds_per_step"] for rank in ranks) for ranks in runs]
    report: dict[str, Any] = {
        "tokens_per_s": spread(sizes.tokens_per_step / s for s in seconds),
        "cpu_seconds_per_step_by_rank": [
            statistics.median(ranks[r]["cpu_seconds_per_step"] for ranks in runs) for r in range(variant["stages"])
        ],
        "peak_rss_mib_by_rank": [statistics.median(ranks[r]["peak_rss_mib"] for ranks in runs) for r in range(variant["stages"])],
        "of_it_before_anything": runs[0][0]["rss_at_start_mib"],
    }
    if runs[0][0]["pipeline"]:
        shares = [share for ranks in runs for share in shares_of_ideal(ranks, variant, sizes)]
        report.update({key: spread(share[key] for share in shares) for key in shares[0]})
        report["cuts"] = sorted({",".join(str(last - first) for first, last in ranks[0]["cut"]) for ranks in runs})
        report["more_ranks_than_cores"] = variant["stages"] > len(os.sched_getaffinity(0))
        report["seconds_by_span"] = [{k: round(v, 4) for k, v in rank["seconds_by_span"].items()} for rank in runs[-1]]
    return report


def ratios_of(variants: dict[str, Variant], rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Tokens per second of each of ours to each peer's of the same stages and cut, to one process, and to our own even cut."""
    ratios = {}
    for ours, variant in variants.items():
        for peer, other in variants.items():
            is_peer = other["kind"] in ONE_PROCESS or (other["kind"] in PEERS and other["cut"] == variant["cut"])
            is_even_self = other["kind"] == variant["kind"] and other["cut"] == "even" != variant["cut"]
            alike = other["kind"] in ONE_PROCESS or other["stages"] == variant["stages"]
            if variant["kind"] in MODES and alike and (is_peer or is_even_self):
                seconds = [[max(rank["seconds_per_step"] for rank in found[name]) for name in (peer, ours)] for found in rounds]
                ratios[f"{ours} / {peer}"] = spread(theirs / own for theirs, own in seconds)
    return ratios


def memory_report(variants: dict[str, Variant], sizes: Sizes) -> dict[str, Any]:
    """Measured once: it does not vary."""
    from pipeline_parallel.simulator import peak_in_flight

    report = {}
    for name, variant in variants.items():
        if variant["kind"] in MODES and variant["cut"] != "measured":
            found = run_in_own_process(__file__, "memory", variant, sizes)
            report[name] = {
                "in_flight_simulated": [peak_in_flight(actions) for actions in orders_of(variant, sizes.micro_batches)],
                "in_flight_measured": [round(rank["in_flight"], 2) for rank in found],
                "too_high_by_at_most": [round(rank["too_high_by_at_most"], 2) for rank in found],
                "kept_per_micro_batch_mib": [round(rank["kept_per_micro_batch_mib"], 1) for rank in found],
            }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--cut", nargs="+", default=["even"], help="even, measured, or layers by hand such as 5,3; several are compared")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--precision", choices=list(LOSS_TOLERANCE), default="fp32", help="of ours; peers compute in fp32")
    parser.add_argument("--variant", help="for the benchmark's own processes")
    add_size_options(parser)
    options = parser.parse_args()
    if options.variant:
        asked = json.loads(options.variant)
        answer_and_end(run_variant(asked["given"], Sizes(**asked["sizes"]), asked["kind"]))
    sizes, left_out = sizes_of(options), {}
    if "deepspeed" in options.peers and importlib.util.find_spec("deepspeed") is None:
        left_out["deepspeed"] = NOT_INSTALLED
        options.peers.remove("deepspeed")
    variants, before = all_variants(options), machine()
    rounds = run_rounds(list(variants), lambda name: run_in_own_process(__file__, "time", variants[name], sizes), options.rounds)
    report = {
        "benchmark": "pipeline",
        "sizes": vars(sizes),
        "machine": before,
        "left_out": left_out,
        "precision": options.precision,
        "losses": check_losses(rounds, LOSS_TOLERANCE[options.precision]),
        "ratios": ratios_of(variants, rounds),
        "variants": {name: report_on(name, variant, rounds, sizes) for name, variant in variants.items()},
        "memory": memory_report(variants, sizes),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
