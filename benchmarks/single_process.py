"""Seconds per step of bf16 LoRA on a CPU in one process: ours against Hugging Face's Trainer with peft, and against a plain loop of both.

    python benchmarks/single_process.py --rounds 3 > single_process.json

All train the same GPT-J (the same random weights in bf16, the same fp32 adapters) on the same ids, in the same micro-batches, with
AdamW and clipping at 1; nobody drops anything, logs or saves. "ours" is what one rank of dist_clm_train.py runs: the stage and optimizer
of training/compute/build.py and gradient.py. "trainer" is transformers.Trainer with bf16 and use_cpu, timed by a callback from the
beginning to the end of each step, its reading of data left out as ours is. "loop" is model(...).loss.backward(), clip_grad_norm_ and
torch's fused AdamW. Each round runs every variant once, in a process of its own and in an order that turns; ratios are taken within a
round. Forward, backward, norm, clipping and update are timed, by the clock and by CPU time. The benchmark fails if the losses of the
first step differ by more than LOSS_TOLERANCE."""

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

from bench import Sizes, add_size_options, answer_and_end, machine, peak_rss_mib, run_in_own_process, run_rounds, sizes_of, spread

KINDS = ("ours", "trainer", "loop")
TIMES = ("seconds", "cpu_seconds")  # the latter hardly change with what else a machine is doing
FULL = Sizes(width=1024, layers=8, vocab=8192, seq_length=512, micro_batches=2, micro_batch_size=2, steps=3)
QUICK = Sizes(width=256, layers=2, vocab=1024, seq_length=128, micro_batches=2, micro_batch_size=2, steps=3)
LOSS_TOLERANCE = 2e-2  # in bf16 each rounds at other places
ADAPTER_SEED = 1
ALPHA_PER_RANK = 2
ADAM_EPS, WEIGHT_DECAY = 1e-8, 0.01
TIMEOUT = timedelta(minutes=5)

Found = dict[str, Any]  # losses, seconds and cpu_seconds by step, the first included


def run_ours(given: dict[str, Any], sizes: Sizes) -> Found:
    """One stage that is the whole model, in a group of one rank."""
    import torch
    import torch.distributed as dist
    from contestants import CLIP_GRAD_NORM, LEARNING_RATE, token_ids

    from comms.groups import join_process_group, make_groups
    from comms.place import place_of
    from comms.spans import Spans
    from modules.gptj import GPTJConfig
    from modules.lm_ops import next_token_targets
    from modules.stage import draw_parameter
    from training.compute.build import WeightTaker, assemble_stage, make_optimizer
    from training.compute.gradient import GlobalGradient, Schedule
    from training.config.precision import precision_of
    from training.config.train import Config
    from training.memory.allocator import keep_freed_memory

    keep_freed_memory()
    config = Config(
        bf16=True,
        train="lora",
        lora_rank=given["rank"],
        lora_alpha=ALPHA_PER_RANK * given["rank"],
        lora_target_modules=given["targets"],
        adam_eps=ADAM_EPS,
        weight_decay=WEIGHT_DECAY,
        seed=ADAPTER_SEED,
    )
    model_config, device = GPTJConfig.from_hf(sizes.hf_config), torch.device("cpu")
    precision = precision_of(config, device)
    stage = assemble_stage(config, model_config, (0, sizes.layers), device, precision)
    optimizer = make_optimizer(config, stage, precision)
    taker = WeightTaker(stage, optimizer)
    for name, shape in taker.shapes.items():
        values = torch.empty(shape)
        draw_parameter(values, name, model_config, seed=0)
        taker.take(name, values)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    place = place_of(0, dp_size=1, pp_size=1)
    join_process_group(place, dist.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1), "gloo", TIMEOUT)
    gradient = GlobalGradient(
        place=place,
        groups=make_groups(place, "gloo", TIMEOUT),
        stage=stage,
        spans=Spans(),
        peer_names=[place.in_words],
        schedule=Schedule(),
        batch_size=sizes.num_sequences,
        micro_batch_size=sizes.micro_batch_size,
        seq_length=sizes.seq_length,
        clip_grad_norm=CLIP_GRAD_NORM,
    )
    ids = token_ids(sizes)
    positions = torch.arange(sizes.seq_length).expand_as(ids)
    tokens = torch.stack((ids, positions, next_token_targets(ids, positions)), dim=1)[None].int()  # (1, N, 3, T)

    def step() -> float:
        decision = gradient.compute(tokens, sizes.num_targets)
        optimizer.step(LEARNING_RATE)
        gradient.forget()
        return decision.loss

    return _timed(step, sizes)


def _timed(step: Any, sizes: Sizes) -> Found:
    """``step`` returns the mean loss before its update."""
    found: Found = {"losses": [], "seconds": [], "cpu_seconds": []}
    for _ in range(1 + sizes.steps):
        started = _now()
        found["losses"].append(step())
        _add_times(found, started)
    return found


def _now() -> tuple[float, float]:
    """(wall clock, CPU time of all threads of this process), s."""
    return time.perf_counter(), time.process_time()


def _add_times(found: Found, started: tuple[float, float]) -> None:
    for name, now, before in zip(TIMES, _now(), started, strict=True):
        found[name].append(now - before)


def peft_model(given: dict[str, Any], sizes: Sizes) -> Any:
    """transformers' GPT-J in bf16 with peft's adapters, which peft keeps in fp32; all values are those of ours."""
    import peft
    import torch
    import transformers
    from contestants import draw

    from modules.adapters import draw_adapters
    from modules.gptj import GPTJConfig

    transformers.logging.set_verbosity_error()
    config = transformers.GPTJConfig(**sizes.hf_config, use_cache=False)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    draw(model, GPTJConfig.from_hf(sizes.hf_config))
    targets = given["targets"] if given["targets"] == "all-linear" else given["targets"].split(",")
    settings = peft.LoraConfig(r=given["rank"], lora_alpha=ALPHA_PER_RANK * given["rank"], target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    draw_adapters(model, ADAPTER_SEED)  # by name, and the names are the same
    return adapted.train()


def run_trainer(given: dict[str, Any], sizes: Sizes) -> Found:
    """transformers.Trainer. Its losses are those that it returns from its own compute_loss, which it adds up over micro-batches."""
    import torch
    import transformers
    from contestants import CLIP_GRAD_NORM, LEARNING_RATE, token_ids

    found: Found = {"seconds": [], "cpu_seconds": []}
    parts: list[torch.Tensor] = []  # one per micro-batch

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = _now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _add_times(found, self.started)

    class Trainer(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **more: Any) -> Any:
            loss = super().compute_loss(*args, **more)
            parts.append(loss.detach())
            return loss

    settings = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=sizes.micro_batch_size,
        gradient_accumulation_steps=sizes.micro_batches,
        max_steps=1 + sizes.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_epsilon=ADAM_EPS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP_GRAD_NORM,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"input_ids": ids, "labels": ids} for _ in range(1 + sizes.steps) for ids in token_ids(sizes)]
    trainer = Trainer(model=peft_model(given, sizes), args=settings, train_dataset=rows, callbacks=[Clock()])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return {**found, "losses": torch.stack(parts).float().view(-1, sizes.micro_batches).sum(1).tolist()}


def run_loop(given: dict[str, Any], sizes: Sizes) -> Found:
    """What a user writes who wants no framework."""
    import torch
    from contestants import CLIP_GRAD_NORM, LEARNING_RATE, token_ids

    model = peft_model(given, sizes)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, eps=ADAM_EPS, weight_decay=WEIGHT_DECAY, fused=True)
    ids = token_ids(sizes)

    def step() -> float:
        total = 0.0
        for piece in ids.split(sizes.micro_batch_size):
            loss = model(piece, labels=piece).loss / sizes.micro_batches
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, CLIP_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return _timed(step, sizes)


def run_variant(given: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """In this process."""
    import peft  # noqa: F401 - what everybody imports is no difference between them
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(given["threads"])
    rss_at_start = peak_rss_mib()
    found = {"ours": run_ours, "trainer": run_trainer, "loop": run_loop}[given["kind"]](given, sizes)
    report = {f"{name}_per_step": statistics.median(found[name][1:]) for name in TIMES}  # the first step makes what is made once
    return {**report, "losses": found["losses"], "peak_rss_mib": peak_rss_mib(), "rss_at_start_mib": rss_at_start}


def check_losses(rounds: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Exit unless all variants began with the same loss; returns everybody's losses."""
    losses = {name: found["losses"] for name, found in rounds[0].items()}
    first = [of_variant[0] for of_variant in losses.values()]
    if not max(first) - min(first) <= LOSS_TOLERANCE:  # also true for nan
        sys.exit(f"all variants must begin with the same model on the same ids, so their first losses must agree; they are {losses}")
    return losses


def report_on(names: dict[str, dict[str, Any]], rounds: list[dict[str, Any]], sizes: Sizes) -> dict[str, Any]:
    """Ratios within a round, above 1 where ours is faster; and the figures of every variant."""
    ratios = {
        f"{name} / {other['kind']}, {times}": spread(
            found[peer][f"{times}_per_step"] / found[name][f"{times}_per_step"] for found in rounds
        )
        for times in TIMES
        for name, given in names.items()
        if given["kind"] == "ours"
        for peer, other in names.items()
        if other["kind"] != "ours" and other["threads"] == given["threads"]
    }
    variants = {
        name: {
            "tokens_per_s": spread(sizes.tokens_per_step / found[name]["seconds_per_step"] for found in rounds),
            **{f"{times}_per_step": [found[name][f"{times}_per_step"] for found in rounds] for times in TIMES},
            "peak_rss_mib": spread(found[name]["peak_rss_mib"] for found in rounds),
            "of_it_before_the_model_mib": rounds[0][name]["rss_at_start_mib"],
        }
        for name in names
    }
    return {"ratios": ratios, "losses": check_losses(rounds), "variants": variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="all-linear", help="as --lora-target-modules")
    parser.add_argument("--quick", action="store_true", help="sizes that take seconds, instead of those given")
    parser.add_argument("--variant", help="for the benchmark's own processes")
    add_size_options(parser)
    parser.set_defaults(**vars(FULL))
    options = parser.parse_args()
    if options.variant:
        asked = json.loads(options.variant)
        answer_and_end(run_variant(asked["given"], Sizes(**asked["sizes"])))
    sizes, before = QUICK if options.quick else sizes_of(options), machine()
    lora = {"rank": options.rank, "targets": options.targets}
    variants = {f"{kind}, {n} threads": {"kind": kind, "threads": n, **lora} for n in options.threads for kind in KINDS}
    rounds = run_rounds(list(variants), lambda name: run_in_own_process(__file__, "time", variants[name], sizes), options.rounds)
    about = {"benchmark": "single_process", "sizes": vars(sizes), "lora": lora, "tokens_per_step": sizes.tokens_per_step, **before}
    print(json.dumps({**about, **report_on(variants, rounds, sizes)}, indent=1))


if __name__ == "__main__":
    main()
