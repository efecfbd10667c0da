"""Seconds per optimizer step: ours against transformers' GPT-J in one process, on the same tokens, by alternating runs.

    python benchmarks/training_step.py --rounds 5 > training_step.json

Each round runs every variant once, in an order that turns, so that a noisy machine hits all of them; what is reported are ratios
within a round (median, minimum, maximum over the rounds). Variants: the HF class with plain autograd, clip_grad_norm_ and torch's
fused AdamW, with 1 and with 2 threads; ours as one stage with 1 and 2 threads; ours as two stages of 1 thread each on loopback, by GPipe
with an even cut. Forward, backward, norm, clipping and update are timed, data and loading are not."""

import argparse
import json
import os
import statistics
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import Sizes, add_size_options, answer_and_end, fork_ranks, machine, run_in_own_process, run_rounds, sizes_of, spread, time_steps

TIMEOUT = timedelta(minutes=5)
VARIANTS = {
    "hf_1_thread": {"kind": "hf", "stages": 1, "threads": 1},
    "ours_1_stage_1_thread": {"kind": "ours", "stages": 1, "threads": 1},
    "hf_2_threads": {"kind": "hf", "stages": 1, "threads": 2},
    "ours_1_stage_2_threads": {"kind": "ours", "stages": 1, "threads": 2},
    "ours_2_stages_1_thread": {"kind": "ours", "stages": 2, "threads": 1},
}
RATIOS = {  # name: (peer, ours); above 1: ours is faster
    "one thread, ours / hf": ("hf_1_thread", "ours_1_stage_1_thread"),
    "two threads, ours / hf": ("hf_2_threads", "ours_1_stage_2_threads"),
    "two stages of one thread / hf with two threads": ("hf_2_threads", "ours_2_stages_1_thread"),
}


def be_rank(rank: int, given: dict[str, Any], sizes: Sizes, folder: Path) -> float:
    """Seconds per step, the median; the last thing in a step is a reduction over all ranks."""
    import torch
    import torch.distributed as dist
    from contestants import OurPipeline, TransformersProcess, drawn_stage

    from comms.groups import join_process_group, make_groups
    from comms.place import place_of
    from pipeline_parallel.partition import even_cut
    from training.memory.allocator import keep_freed_memory

    torch.set_num_threads(given["threads"])
    if given["kind"] == "hf":
        step = TransformersProcess(sizes).step
    else:
        keep_freed_memory()
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        place = place_of(rank, dp_size=1, pp_size=given["stages"])
        join_process_group(place, dist.FileStore(str(folder / "store"), given["stages"]), "gloo", TIMEOUT)
        stage = drawn_stage(sizes, *even_cut(sizes.layers, given["stages"])[rank])
        step = OurPipeline(sizes, place, make_groups(place, "gloo", TIMEOUT), stage, "gpipe").step
    step()
    return statistics.median(time_steps(step, sizes.steps))


def run_variant(given: dict[str, Any], sizes: Sizes) -> float:
    """In this process and its ranks: rank 0's seconds per step."""
    import torch  # noqa: F401 - once, before the ranks are forked

    folder = Path(tempfile.mkdtemp())
    seconds = fork_ranks(range(given["stages"]), lambda rank: be_rank(rank, given, sizes, folder))
    return float(seconds[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variant", help="for the benchmark's own processes")
    add_size_options(parser)
    options = parser.parse_args()
    if options.variant:
        asked = json.loads(options.variant)
        answer_and_end(run_variant(asked["given"], Sizes(**asked["sizes"])))
    sizes, before = sizes_of(options), machine()
    rounds = run_rounds(list(VARIANTS), lambda name: run_in_own_process(__file__, "time", VARIANTS[name], sizes), options.rounds)
    report = {
        "benchmark": "training_step",
        "sizes": vars(sizes),
        "tokens_per_step": sizes.tokens_per_step,
        **before,
        "ratios": {name: spread(seconds[peer] / seconds[ours] for seconds in rounds) for name, (peer, ours) in RATIOS.items()},
        "seconds_per_step": rounds,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
