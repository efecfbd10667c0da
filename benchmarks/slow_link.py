"""Share of the ideal step time that pipelines reach over a slow link, ours and torch's, with computation emulated by sleep.

    python benchmarks/slow_link.py > loopback.json
    sudo python benchmarks/slow_link.py --wan WAN.SH --links loopback 1gbit 100mbit > slow_link.json

WAN.SH makes network namespaces joined by a link of a given rate and round trip and runs a command in each (``WAN.SH -n NODES -r RATE -t
RTT_MS -- COMMAND``) with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME set. All is on one machine, so that one
clock serves all ranks. Links are 20 ms each way at 1 Gbit/s or 100 Mbit/s, and loopback.

Cases: ``small``, two stages, messages of 0.5 MB, 4, 8 and 16 micro-batches; ``large``, messages of 16.8 MB, 8 micro-batches;
``two-sites``, four stages, two at each end of the slow link, 0.5 MB, 8 micro-batches. Ideal: (micro-batches + stages - 1) x (forward +
backward), as if the link took no time; the simulated time knows the link as it was measured. Every variant of ours runs with the extra
warm-up forwards that the trainer would choose (auto) and with none (+0)."""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import Gate, fork_ranks, machine, run_rounds, spread

LINKS = ("loopback", "1gbit", "100mbit")
TIMEOUT = timedelta(minutes=5)
TORCH = ("torch-gpipe", "torch-1f1b")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of ranks and what they are measured with. third_s: of a micro-batch's computation; forward, the backward of the input and
    that of the weights take as long as each other. ours: mode and wire type, torch's schedules send what they computed."""

    stages: int  # the first half at one end of the link, the others at the other
    micro_batches: tuple[int, ...]
    shape: tuple[int, int, int]  # (B, T, C) fp32
    third_s: float
    ours: tuple[tuple[str, str], ...]


PLAIN = (("gpipe", "none"), ("1f1b", "none"), ("zb", "none"))
CASES = {
    "small": Case(stages=2, micro_batches=(4, 8, 16), shape=(1, 256, 512), third_s=0.04, ours=PLAIN),
    "large": Case(
        stages=2,
        micro_batches=(8,),
        shape=(1, 1024, 4096),
        third_s=0.085,
        ours=(*PLAIN[1:], ("1f1b", "int8"), ("zb", "int8")),
    ),
    "two-sites": Case(stages=4, micro_batches=(8,), shape=(1, 256, 512), third_s=0.04, ours=PLAIN),
}
ON_LINK = {"loopback": ("small", "two-sites"), "1gbit": tuple(CASES), "100mbit": ("small", "two-sites")}
MARKS = (  # link, case, micro-batches, variant, least ideal over measured
    ("loopback", "small", 8, "ours 1f1b none auto", 0.97),
    ("1gbit", "small", 4, "ours 1f1b none auto", 0.85),
    ("1gbit", "small", 8, "ours 1f1b none auto", 0.92),
    ("1gbit", "small", 16, "ours 1f1b none auto", 0.95),
    ("1gbit", "large", 8, "ours 1f1b int8 auto", 0.90),
    ("1gbit", "two-sites", 8, "ours zb none auto", 1.05),
)


def case_of(name: str, options: argparse.Namespace) -> Case:
    """With --third, where it is given."""
    return replace(CASES[name], third_s=options.third) if options.third else CASES[name]


def be_node(case: Case, options: argparse.Namespace) -> None:
    """One end of the link, as WAN.SH starts it: the ranks that live here. Writes what they found to the folder."""
    import emulated  # noqa: F401
    import torch  # noqa: F401 - once, before the ranks are forked

    if options.tcp_window_mib and options.link != "loopback":  # the files of this network namespace; no other is changed
        for direction, initial in (("wmem", 65536), ("rmem", 131072)):
            Path(f"/proc/sys/net/ipv4/tcp_{direction}").write_text(f"4096 {initial} {options.tcp_window_mib * 2**20}")
    node, num_nodes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ranks = range(node * case.stages // num_nodes, (node + 1) * case.stages // num_nodes)
    found = fork_ranks(ranks, lambda rank: be_rank(rank, case, options))
    (options.folder / f"node{node}.json").write_text(json.dumps(found))


def be_rank(rank: int, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from emulated import Work

    from comms.groups import join_process_group, make_groups
    from comms.place import place_of
    from pipeline_parallel.simulator import Durations

    torch.set_num_threads(1)
    place = place_of(rank, dp_size=1, pp_size=case.stages)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=rank == 0, timeout=TIMEOUT)
    join_process_group(place, store, "gloo", TIMEOUT)
    groups = make_groups(place, "gloo", TIMEOUT)
    durations = Durations(forward=case.third_s, backward=case.third_s, weight_grad=case.third_s)
    runners, told = make_runners(case, Work(shape=case.shape, durations=durations), place, groups)
    gate = Gate(options.folder / "gate", rank, case.stages)

    def measure(name: str) -> list[float]:
        runners[name].run()  # wakes connections up that were idle while others ran
        seconds = []
        for _ in range(options.steps):
            start = gate.start_together()
            seconds.append(runners[name].run() - start)
        return seconds

    rounds = run_rounds(list(runners), measure, options.rounds)
    seconds = {name: [s for found in rounds for s in found[name]] for name in runners}
    return {"seconds": seconds, "told": told, "diagnosis": {name: runner.diagnosis() for name, runner in runners.items()}}


def make_runners(case: Case, work, place, groups):  # type: ignore[no-untyped-def]
    """By name ``micro-batches|variant``, the same on all ranks; and what is known of each before it runs."""
    import torch
    from emulated import OurEmulation, TorchEmulation, extra_warmup_of, measure_links

    from comms.codecs import make_codec
    from pipeline_parallel.schedule import order
    from pipeline_parallel.simulator import Wire, simulate
    from training.compute.gradient import Schedule

    runners: dict[str, Any] = {}
    told: dict[str, Any] = {}
    links = {
        wire: measure_links(place, groups, make_codec(wire, shape=case.shape, dtype=torch.float32).num_bytes)  # type: ignore[arg-type]
        for wire in sorted({wire for _, wire in case.ours})
    }
    for num in case.micro_batches:
        for mode, wire in case.ours:
            auto = extra_warmup_of(links[wire], work)
            choices = {" auto": auto} if not any(auto) else {" auto": auto, " +0": ()}
            for label, extra in {"": ()}.items() if mode == "gpipe" else choices.items():
                name = f"{num}|ours {mode} {wire}{label}"
                schedule = Schedule(mode=mode, extra_warmup=extra, wire_dtype=wire, wire_dtype_grad=wire)  # type: ignore[arg-type]
                runners[name] = OurEmulation(work, place, groups, schedule, num)
                orders = [
                    order(mode, stage=s, num_stages=case.stages, num_micro_batches=num, extra_warmup=extra)  # type: ignore[arg-type]
                    for s in range(case.stages)
                ]
                wires = [Wire(latency=link.latency_s, transfer=link.transfer_s / 2) for link in links[wire]]
                simulated = simulate(orders, [work.durations] * case.stages, wires)
                told[name] = {
                    "extra_warmup": extra,
                    "simulated_s": simulated.makespan,
                    "in_flight": simulated.peak_in_flight,
                    "links_ms": [[round(1e3 * t.latency_s, 2), round(1e3 * t.transfer_s / 2, 2)] for t in links[wire]],
                }
        for kind in TORCH:
            runners[f"{num}|{kind}"] = TorchEmulation(kind, work, place, num)
    return runners, told


def measure_case(link: str, case_name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks, on loopback or over WAN.SH; what is reported of each variant."""
    case = case_of(case_name, options)
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, __file__, "--node", case_name, "--folder", str(folder), "--link", link]
    command += [f"--third={case.third_s}", *([f"--tcp-window-mib={options.tcp_window_mib}"] if options.tcp_window_mib else [])]
    command += [f"--rounds={options.rounds}", f"--steps={options.steps}"]
    environment = dict(os.environ)
    if link == "loopback":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    else:
        command = [options.wan, "-n", "2", "-r", link, "-t", str(options.rtt_ms), *options.wan_options.split(), "--", *command]
    subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
    ranks = [rank for file in sorted(folder.glob("node*.json")) for rank in json.loads(file.read_text())]
    return {name: report_on(name, case, ranks) for name in ranks[0]["seconds"]}


def report_on(name: str, case: Case, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    num_micro_batches = int(name.split("|")[0])
    ideal = (num_micro_batches + case.stages - 1) * 3 * case.third_s
    measured = [max(seconds) for seconds in zip(*(rank["seconds"][name] for rank in ranks), strict=True)]
    report = {"ideal_over_measured": spread(ideal / s for s in measured), "ideal_s": ideal, "measured_s": statistics.median(measured)}
    if name in ranks[0]["told"]:
        told = ranks[0]["told"][name]
        report.update({"ideal_over_simulated": ideal / told["simulated_s"], **told})
    return {**report, "by_stage": [rank["diagnosis"][name] for rank in ranks]}


def judge(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each mark whose case was measured: wanted, reached, and the best peer."""
    verdicts = []
    for link, case, num, variant, wanted in MARKS:
        found = results.get(f"{link}, {case}")
        if found is None:
            continue
        reached = found[f"{num}|{variant}"]["ideal_over_measured"]
        peers = {kind: found[f"{num}|{kind}"]["ideal_over_measured"]["median"] for kind in TORCH}
        verdict = {
            "mark": f"{link}, {case}, {num} micro-batches, {variant}",
            "wanted": wanted,
            "reached": reached,
            "peers": peers,
            "is_reached": reached["median"] >= wanted and reached["median"] >= max(peers.values()),
        }
        if not verdict["is_reached"]:  # what the link and the schedule alone would take, and what every stage did meanwhile
            times = {key: found[f"{num}|{variant}"][key] for key in ("ideal_s", "simulated_s", "measured_s", "by_stage")}
            verdict["where_the_time_went"] = times
        verdicts.append(verdict)
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--wan", help="the program that emulates the link; left out: loopback only")
    parser.add_argument("--wan-options", default="", help="further options for it")
    parser.add_argument("--rtt-ms", type=float, default=40.0, help="round trip of the slow link")
    parser.add_argument("--tcp-window-mib", type=int, help="limit of a connection's buffers in the namespaces; left out: as found")
    parser.add_argument("--links", nargs="+", choices=LINKS, help="left out: loopback, and 1gbit with --wan")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="measured ones of every variant in a round")
    parser.add_argument("--third", type=float, help="seconds of a forward, in place of each case's own")
    parser.add_argument("--node", choices=CASES, help="for the benchmark's own processes, as --folder and --link")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--link")
    options = parser.parse_args()
    if options.node:
        be_node(case_of(options.node, options), options)
        return
    links = options.links or (["loopback", "1gbit"] if options.wan else ["loopback"])
    if links != ["loopback"] and options.wan is None:
        parser.error("links other than loopback need --wan PROGRAM")
    before = machine()
    results = {f"{link}, {case}": measure_case(link, case, options) for link in links for case in options.cases if case in ON_LINK[link]}
    cases = {name: asdict(case_of(name, options)) for name in options.cases}
    print(json.dumps({"benchmark": "slow_link", "machine": before, "cases": cases, "marks": judge(results), "results": results}, indent=1))


if __name__ == "__main__":
    main()
