"""Tokens per second of greedy generation: ours in pipelines of some stages, against transformers' generate in one process.

    python benchmarks/decode.py --rounds 3 --stages 1 2 > decode.json

All generate the same number of tokens for the same prompts of unequal length, with the same random weights in fp32, and never meet an end
token. "hf" pads to the left and runs batches of the same size, prompts sorted by length as ours are. Every process computes with --threads
threads. Each round runs every variant once, in a process of its own and in an order that turns; ratios are taken within a round.

"busy": share of the time between a stage's first and last message that it computed in (its forwards, and choosing tokens), by stage. With
S stages on fewer than S free cores it says little. The benchmark fails if the tokens are not the same wherever no decision was close."""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import Sizes, add_size_options, answer_and_end, fork_ranks, machine, run_in_own_process, run_rounds, sizes_of, spread

FULL = Sizes(width=768, layers=8, vocab=8192, seq_length=256)
QUICK = Sizes(width=256, layers=2, vocab=1024, seq_length=128)
COMPUTING = ("forward", "choosing tokens")
CLOSE = 1e-3  # decisions of a smaller margin may fall otherwise elsewhere
TIMEOUT = timedelta(minutes=10)

Found = dict[str, Any]  # seconds, ids and margins by prompt; of ours busy by stage


def prompts_of(given: dict[str, Any], sizes: Sizes) -> list[list[int]]:
    """Lengths from a quarter of what fits to all of it."""
    import torch

    generator = torch.Generator().manual_seed(0)
    longest = sizes.seq_length - given["new_tokens"]
    lengths = torch.randint(longest // 4, longest + 1, (given["prompts"],), generator=generator).tolist()
    return [torch.randint(0, sizes.vocab, (length,), generator=generator).tolist() for length in lengths]


def run_hf(given: dict[str, Any], sizes: Sizes) -> Found:
    """Batches of given["batch_size"], padded to the left."""
    import torch
    import transformers
    from contestants import draw

    from modules.gptj import GPTJConfig

    torch.set_num_threads(given["threads"])
    transformers.logging.set_verbosity_error()
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes.hf_config)).train(False)
    draw(model, GPTJConfig.from_hf(sizes.hf_config))
    prompts = prompts_of(given, sizes)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    ids: list[list[int]] = [[] for _ in prompts]

    def batch(numbers: list[int]) -> None:
        width = max(len(prompts[number]) for number in numbers)
        pads = [width - len(prompts[number]) for number in numbers]
        padded = torch.tensor([[0] * pad + prompts[number] for pad, number in zip(pads, numbers, strict=True)])
        mask = (torch.arange(width) >= torch.tensor(pads)[:, None]).long()
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": given["new_tokens"]}
        out = model.generate(padded, attention_mask=mask, **settings)
        for number, row in zip(numbers, out[:, width:].tolist(), strict=True):
            ids[number] = row

    batches = [order[start : start + given["batch_size"]] for start in range(0, len(order), given["batch_size"])]
    batch(batches[-1])  # what is made once
    started = time.perf_counter()
    for numbers in batches:
        batch(numbers)
    return {"seconds": time.perf_counter() - started, "ids": ids}


def run_rank(given: dict[str, Any], sizes: Sizes, rank: int, folder: Path) -> Found:
    """One stage of ours."""
    import torch
    import torch.distributed as dist

    from comms.groups import join_process_group, make_closing_group, make_groups
    from comms.place import place_of
    from comms.spans import Spans
    from modules.gptj import GPTJConfig
    from modules.stage import draw_parameter, empty_stage
    from pipeline_parallel.decode import Decoder
    from pipeline_parallel.partition import even_cut

    torch.set_num_threads(given["threads"])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    place, config = place_of(rank, dp_size=1, pp_size=given["stages"]), GPTJConfig.from_hf(sizes.hf_config)
    join_process_group(place, dist.FileStore(str(folder / "store"), given["stages"]), "gloo", TIMEOUT)
    groups, spans = make_groups(place, "gloo", TIMEOUT), Spans()
    stage = empty_stage(config, *even_cut(sizes.layers, given["stages"])[rank])
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            draw_parameter(parameter, name, config, seed=0)
    decoder = Decoder(
        place=place,
        groups=groups,
        closing_group=make_closing_group(place, groups, "gloo", TIMEOUT),
        stage=stage,
        spans=spans,
        peer_names=[f"stage {s}" for s in range(given["stages"])],
        batch_size=given["batch_size"],
    )
    prompts = prompts_of(given, sizes)
    no_end = {"max_new_tokens": given["new_tokens"], "eos_token_id": sizes.vocab}
    decoder.generate(prompts[: given["batch_size"]] if rank == 0 else None, **no_end)  # what is made once
    spans.start_recording()
    started = time.perf_counter()
    found = decoder.generate(prompts if rank == 0 else None, **no_end)
    seconds = time.perf_counter() - started
    computed = [span for span in spans.stop_recording() if span.name in COMPUTING]
    busy = sum(span.end - span.start for span in computed) / (computed[-1].end - computed[0].start)
    return {"seconds": seconds, "busy": busy, "ids": [one.ids for one in found or ()], "margins": [one.margin for one in found or ()]}


def run_variant(given: dict[str, Any], sizes: Sizes) -> Found:
    """In this process, or in one forked from it for each stage."""
    import torch

    if given["kind"] == "hf":
        found = run_hf(given, sizes)
    else:
        torch.set_num_threads(1)  # a pool of threads would not survive the fork
        with tempfile.TemporaryDirectory() as folder:
            ranks = fork_ranks(range(given["stages"]), lambda rank: run_rank(given, sizes, rank, Path(folder)))
        found = {**ranks[0], "busy": [rank["busy"] for rank in ranks]}
    return {**found, "tokens_per_s": given["prompts"] * given["new_tokens"] / found["seconds"]}


def check_tokens(round_of_all: dict[str, Found]) -> dict[str, int]:
    """Exit unless all variants agree on every prompt without a close decision; how many those are."""
    margins = next(found["margins"] for found in round_of_all.values() if "margins" in found)
    clear = [number for number, margin in enumerate(margins) if margin > CLOSE]
    answers = [[found["ids"][number] for number in clear] for found in round_of_all.values()]
    if any(answer != answers[0] for answer in answers):
        sys.exit("all variants must generate the same tokens where no decision is close, and they do not")
    return {"prompts": len(margins), "without_a_close_decision": len(clear)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="sizes that take seconds, instead of those given")
    parser.add_argument("--variant", help="for the benchmark's own processes")
    add_size_options(parser)
    parser.set_defaults(**vars(FULL))
    options = parser.parse_args()
    if options.variant:
        asked = json.loads(options.variant)
        answer_and_end(run_variant(asked["given"], Sizes(**asked["sizes"])))
    sizes, before = QUICK if options.quick else sizes_of(options), machine()
    common = {name: getattr(options, name) for name in ("threads", "prompts", "new_tokens", "batch_size")}
    variants: dict[str, dict[str, Any]] = {"hf": {"kind": "hf", **common}}
    variants |= {f"ours, {n} stages": {"kind": "ours", "stages": n, **common} for n in options.stages}
    rounds = run_rounds(list(variants), lambda name: run_in_own_process(__file__, "time", variants[name], sizes), options.rounds)
    report = {
        "benchmark": "decode",
        "sizes": vars(sizes),
        **common,
        **before,
        "agreement": [check_tokens(found) for found in rounds],
        "tokens_per_s": {name: spread(found[name]["tokens_per_s"] for found in rounds) for name in variants},
        "over_hf": {n: spread(f[n]["tokens_per_s"] / f["hf"]["tokens_per_s"] for f in rounds) for n in variants if n != "hf"},
        "busy_by_stage": {
            n: [statistics.median(stage) for stage in zip(*(f[n]["busy"] for f in rounds), strict=True)] for n in variants if n != "hf"
        },
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
