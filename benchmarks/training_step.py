"""Seconds per optimizer step: ours against transformers' GPT-J in one process, on the same tokens, by alternating runs.

    python benchmarks/training_step.py --rounds 5 > training_step.json

Each round runs every variant once, in an order that turns, so that a noisy machine hits all of them; what is reported are ratios
within a round (median, minimum, maximum over the rounds). Variants: the HF class with plain autograd, clip_grad_norm_ and torch's
fused AdamW, with 1 and with 2 threads; ours as one stage with 1 and 2 threads; ours as two stages of 1 thread each on loopback.
Forward, backward, norm, clipping and update are timed, data and loading are not."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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


def hf_config(options: argparse.Namespace):  # type: ignore[no-untyped-def]
    from transformers import GPTJConfig

    return GPTJConfig(
        n_embd=options.width,
        n_layer=options.layers,
        n_head=8,
        rotary_dim=min(64, options.width // 8),
        n_positions=options.seq_length,
        vocab_size=options.vocab,
        bos_token_id=0,
        eos_token_id=0,
    )


def time_hf(options: argparse.Namespace) -> float:
    import torch
    from transformers import GPTJForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = GPTJForCausalLM(hf_config(options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, options.vocab, (options.micro_batches * options.micro_batch_size, options.seq_length))

    def step() -> None:
        for piece in ids.split(options.micro_batch_size):
            (model(piece, labels=piece).loss / options.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return time_steps(step, options.steps)


def time_steps(step, num_steps: int) -> float:  # type: ignore[no-untyped-def]
    step()
    durations = []
    for _ in range(num_steps):
        started = time.perf_counter()
        step()
        durations.append(time.perf_counter() - started)
    return statistics.median(durations)


def time_ours(options: argparse.Namespace) -> float:
    """Fork one rank per stage; rank 0's seconds per step (the last thing in a step is a reduction over all ranks)."""
    import torch
    import torch.distributed as dist

    from comms.groups import join_process_group, make_groups
    from comms.place import place_of
    from comms.spans import Spans
    from modules.gptj import GPTJConfig
    from modules.stage import draw_parameter, empty_stage
    from optim.build import AdamSettings, AdamW
    from pipeline_parallel.partition import even_cut
    from training.gradient import GlobalGradient

    torch.set_num_threads(1)
    config = GPTJConfig.from_hf(hf_config(options).to_dict())
    port_file = Path(tempfile.mkdtemp()) / "store"

    def rank_main(rank: int) -> float:
        torch.set_num_threads(options.threads)
        place = place_of(rank, dp_size=1, pp_size=options.stages)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        join_process_group(place, dist.FileStore(str(port_file), options.stages), "gloo", timedelta(minutes=5))
        stage = empty_stage(config, *even_cut(options.layers, options.stages)[rank])
        with torch.no_grad():
            for name, parameter in stage.named_parameters():
                draw_parameter(parameter, name, config, seed=0)
        optimizer = AdamW(dict(stage.named_parameters()), AdamSettings(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01))
        num_sequences = options.micro_batches * options.micro_batch_size
        gradient = GlobalGradient(
            place=place,
            groups=make_groups(place, "gloo", timedelta(minutes=5)),
            stage=stage,
            spans=Spans(),
            peer_names=["", ""],
            pp_mode="gpipe",
            batch_size=num_sequences,
            micro_batch_size=options.micro_batch_size,
            seq_length=options.seq_length,
            clip_grad_norm=1.0,
        )
        ids = torch.randint(0, options.vocab, (num_sequences, options.seq_length), generator=torch.Generator().manual_seed(0))
        tokens = torch.stack((ids, torch.arange(options.seq_length).expand_as(ids)), dim=1)[None].int()  # (1, N, 2, T)

        def step() -> None:
            gradient.compute(tokens, num_sequences * (options.seq_length - 1))
            optimizer.step(1e-4)
            gradient.forget()

        return time_steps(step, options.steps)

    children = []
    for rank in range(1, options.stages):
        pid = os.fork()
        if pid == 0:
            rank_main(rank)
            os._exit(0)
        children.append(pid)
    seconds = rank_main(0)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    return seconds


def run_variant(name: str, options: argparse.Namespace) -> float:
    sizes = [f"--{key}={getattr(options, key.replace('-', '_'))}" for key in SIZES]
    command = [sys.executable, __file__, "--variant", name, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


SIZES = {"width": 512, "layers": 8, "vocab": 8192, "seq-length": 256, "micro-batches": 8, "micro-batch-size": 2, "steps": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variant", choices=VARIANTS, help="run one variant and print its seconds per step")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.variant:
        for key, value in VARIANTS[options.variant].items():
            setattr(options, key, value)
        print(time_hf(options) if options.kind == "hf" else time_ours(options))
        os._exit(0 if sys.stdout.flush() is None else 1)
    rounds: list[dict[str, float]] = []
    names = list(VARIANTS)
    for n in range(options.rounds):
        order = names[n % len(names) :] + names[: n % len(names)]
        rounds.append({name: run_variant(name, options) for name in order})
        print(f"round {n + 1}: {rounds[-1]}", file=sys.stderr)
    ratios = {}
    for name, (peer, ours) in RATIOS.items():
        values = [seconds[peer] / seconds[ours] for seconds in rounds]
        ratios[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    tokens = options.micro_batches * options.micro_batch_size * options.seq_length
    report = {
        "benchmark": "training_step",
        "sizes": {key: getattr(options, key.replace("-", "_")) for key in SIZES},
        "tokens_per_step": tokens,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "ratios": ratios,
        "seconds_per_step": rounds,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
