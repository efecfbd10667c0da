"""Whole runs in half precision, with adapters, quantised bases and 8-bit moments: the same losses at any cut and after any resume."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import eight_sequences, equal_files, log_rows, losses, train, train_on_hosts
from support.tiers import full, sample

from checkpoint import gather, inspect
from data_parallel.allreduce import GradientBuckets

LORA = {"train": "lora", "lora_rank": 4, "lora_alpha": 8, "lr": 1e-2}
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": "true"},
    "bf16, whole masters": {"bf16": "true", "master_weights": "fp32"},
    "fp16": {"fp16": "true"},
    "8-bit adam": {"optimizer": "8bit-adam"},
    "lora": LORA,
    "lora on some, bf16": {**LORA, "lora_target_modules": "q_proj,v_proj", "bf16": "true"},
    "lora over int8": {**LORA, "base_quantization": "int8", "quantize_ends": "true", "bf16": "true"},
    "lora over nf4": {**LORA, "base_quantization": "nf4"},
    "dropout": {"dropout": 0.2},
    "lora dropout, bf16": {**LORA, "lora_dropout": 0.2, "dropout": 0.1, "bf16": "true"},
    "layernorm": {"train": "layernorm", "lr": 1e-2},
    "layernorm over int8": {"train": "layernorm", "lr": 1e-2, "base_quantization": "int8", "fp16": "true"},
}
NEW_FLAGS = (
    *("fp16", "bf16", "master_weights", "loss_scale", "initial_loss_scale", "loss_scale_window", "min_loss_scale", "loss_scale_hysteresis"),
    *("train", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "dropout", "base_quantization", "quantize_ends"),
    *("optimizer_offload", "max_skipped_steps"),
)
NEEDS = {"lora": "peft", "layernorm": "peft", "8-bit adam": "bitsandbytes", "nf4": "bitsandbytes"}


@pytest.fixture(scope="module")
def flags(model_folder: Path, tasks: list[Path]) -> dict[str, Any]:
    return eight_sequences(model_folder, tasks)


def needs(kind: str) -> None:
    for part, package in NEEDS.items():
        if part in kind:
            pytest.importorskip(package)


@sample(3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_cut_in_two_resumes_at_another_degree_in_the_same_bits(kind: str, flags: dict[str, Any], tmp_path: Path) -> None:
    needs(kind)
    own = {**flags, **KINDS[kind], "verify_resume": "true"}
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "whole", **own)
    whole = losses(tmp_path / "whole")
    assert whole[-1] < whole[0]
    train(tmp_path / "ranks", stages=4, checkpoint_path=tmp_path / "parts", **{**own, "total_steps": 2})
    (rank, *_) = train(tmp_path / "ranks", stages=2, checkpoint_path=tmp_path / "parts", recompute="layer", pp_mode="zb", **own)
    assert "starting at step 2 of 4" in rank.text and "bit for bit" in rank.text
    assert losses(tmp_path / "parts") == whole
    assert equal_files(tmp_path / "whole" / "4", tmp_path / "parts" / "4") == []


@sample(1)
@pytest.mark.parametrize("kind", ["bf16", "lora over int8", "layernorm", "8-bit adam"])
def test_a_measured_cut_measures_what_is_trained_and_changes_no_bit(kind: str, flags: dict[str, Any], tmp_path: Path) -> None:
    needs(kind)
    own = {**flags, **KINDS[kind], "total_steps": 2}
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "even", **own)
    (rank, *_) = train(tmp_path / "ranks", stages=2, partition="measured", checkpoint_path=tmp_path / "measured", **own)
    assert "share of slowest" in rank.text
    assert losses(tmp_path / "measured") == losses(tmp_path / "even")
    needed = re.findall(r"% +([\d.]+) MiB +[\d.]+ GiB", rank.text)
    assert len(needed) == 2 and sum(map(float, needed)) < (2.5 if "bf16" in kind or kind == "8-bit adam" else 1.2), rank.text


def test_half_precision_is_close_to_fp32_and_not_the_same(flags: dict[str, Any], tmp_path: Path) -> None:
    found = {}
    for kind in ("fp32", "bf16", "bf16, whole masters", "fp16"):
        run = tmp_path / kind.replace(" ", "")
        train(tmp_path / "ranks", stages=2, checkpoint_path=run, **{**flags, **KINDS.get(kind, {})})
        found[kind] = losses(run)
    assert found["bf16"] == found["bf16, whole masters"]
    for kind in ("bf16", "fp16"):
        assert found[kind] != found["fp32"]
        assert found[kind] == pytest.approx(found["fp32"], rel=2e-2 if kind == "bf16" else 2e-3)


@full
def test_replicas_in_bf16_give_the_loss_of_one(flags: dict[str, Any], tmp_path: Path) -> None:
    own = {**flags, "bf16": "true"}
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "one", **own)
    train(tmp_path / "ranks", stages=2, replicas=2, checkpoint_path=tmp_path / "four", **{**own, "batch_size": 4})
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_dropout_draws_other_noise_for_every_micro_batch_whoever_computes_it(flags: dict[str, Any], tmp_path: Path) -> None:
    """Each replica draws for its own share of the global batch: four ranks compute what one does, and without noise something else."""
    own = {**flags, "dropout": 0.3, "total_steps": 2}
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "one", **own)
    train(tmp_path / "ranks", stages=2, replicas=2, checkpoint_path=tmp_path / "four", **{**own, "batch_size": 4})
    accumulated = {**own, "batch_size": 2, "gradient_accumulate_step": 4, "total_steps": 8, "checkpoint_steps": 0}
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "accumulated", **accumulated)
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "other", **{**own, "seed": 43, "allow_data_change": "true"})
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "none", **{**own, "dropout": 0})
    one = losses(tmp_path / "one")
    assert losses(tmp_path / "four") == pytest.approx(one, rel=2e-6)
    assert losses(tmp_path / "accumulated") == pytest.approx(one, rel=2e-6)
    assert abs(losses(tmp_path / "none")[0] - one[0]) > 1e-3


@full
def test_a_run_says_what_memory_it_was_to_take_and_took(flags: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    own = {**flags, **KINDS["lora over int8"], "total_steps": 11, "checkpoint_steps": 0}
    for process in train(tmp_path / "ranks", stages=2, checkpoint_path=tmp_path / "run", **own):
        assert re.search(r"memory of this stage: predicted [\d.]+ MiB, measured peak [\d.]+ MiB \(weights", process.text), process.text


def test_a_checkpoint_of_a_version_without_a_loss_scale_goes_on(flags: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "run", **{**flags, "total_steps": 2})
    trainer = tmp_path / "run" / "2" / "train_state" / "trainer.json"
    content = json.loads(trainer.read_text())
    old = {**content, "loss_scale": 1.0, "flags": {name: value for name, value in content["flags"].items() if name not in NEW_FLAGS}}
    del old["base_model"]
    trainer.write_text(json.dumps(old))
    manifest = json.loads((tmp_path / "run" / "2" / "manifest.json").read_text())
    manifest["files"]["train_state/trainer.json"]["size"] = trainer.stat().st_size
    (tmp_path / "run" / "2" / "manifest.json").write_text(json.dumps(manifest))
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "run", **flags)
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "whole", **flags)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@sample(1)
@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"bf16": "true"}, {}),
        ({"dropout": 0.1}, {}),
        ({**LORA, "lora_dropout": 0.2}, {**LORA, "lora_dropout": 0.5}),
        (LORA, {**LORA, "base_quantization": "int8"}),
        ({"dropout": 0.2}, {"dropout": 0.2, "micro_batch_size": 2}),
    ],
)
def test_a_resume_that_computes_something_else_is_not_verified_and_not_accused(
    then: dict[str, Any], now: dict[str, Any], flags: dict[str, Any], tmp_path: Path
) -> None:
    if "train" in then:
        pytest.importorskip("peft")
    own = {**flags, "verify_resume": "true"}
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "run", **{**own, **then, "total_steps": 1})
    (process,) = train(tmp_path / "ranks", checkpoint_path=tmp_path / "run", **{**own, **now, "total_steps": 2})
    text = " ".join(process.text.split())
    assert "this resume cannot be verified: what is computed has changed" in text and "starting at step 1 of 2" in text


def test_a_smaller_initial_loss_scale_counts_on_a_resume(flags: dict[str, Any], tmp_path: Path) -> None:
    own = {**flags, "fp16": "true"}
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "run", **{**own, "total_steps": 1})
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "run", **{**own, "total_steps": 2, "initial_loss_scale": 16})
    assert [row["loss_scale"] for row in log_rows(tmp_path / "run")] == [32768, 16]


@full
def test_a_run_may_go_on_in_another_precision_and_says_so(flags: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "run", **{**flags, "bf16": "true", "total_steps": 2})
    (process,) = train(tmp_path / "ranks", checkpoint_path=tmp_path / "run", **{**flags, "total_steps": 4})
    assert "was trained in bf16 and goes on in fp32" in " ".join(process.text.split())
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "fp32", **flags)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "fp32"), rel=1e-2)


def overflow_on(victim: int, at_step: int) -> Callable[[int], None]:
    """One gradient of one rank becomes infinite in one optimizer step."""

    def before(rank: int) -> None:
        real, count = GradientBuckets.arm, iter(range(1, 1000))

        def arm(buckets: GradientBuckets) -> None:
            real(buckets)
            if rank == victim and next(count) == at_step:
                next(iter(buckets.flat_gradients()))[1][0][0] = math.inf

        GradientBuckets.arm = arm  # type: ignore[method-assign]

    return before


@sample(1)
@pytest.mark.parametrize("victim", [0, 3])
def test_an_overflow_on_one_of_four_ranks_is_skipped_by_all_and_nobody_diverges(victim: int, flags: dict[str, Any], tmp_path: Path) -> None:
    own = {**flags, "fp16": "true", "loss_scale_hysteresis": 1, "batch_size": 4, "total_steps": 5}
    processes = train(
        tmp_path / "ranks", stages=2, replicas=2, checkpoint_path=tmp_path / "run", before=overflow_on(victim, at_step=2), **own
    )
    rows = log_rows(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [False, True, False, False, False]
    assert [row["loss_scale"] for row in rows] == [32768, 32768, 16384, 16384, 16384]
    assert rows[1]["grad_norm"] is None
    assert "step 2 is skipped on all ranks: the gradient is not finite; loss scale 32768 -> 16384" in " ".join(processes[0].text.split())
    state = load_file(tmp_path / "run" / "5" / "train_state" / "layer_00.safetensors")
    assert {float(tensor) for name, tensor in state.items() if name.startswith("step/")} == {4}, "the skipped step is no update"
    trainer = json.loads((tmp_path / "run" / "5" / "train_state" / "trainer.json").read_text())
    assert trainer["num_skipped"] == 1 and trainer["loss_scale"]["value"] == 16384 and trainer["position"] == 40
    # replicas that had diverged would be refused here
    train(tmp_path / "ranks", stages=2, replicas=2, checkpoint_path=tmp_path / "run", **{**own, "total_steps": 6})


def test_a_run_that_only_overflows_gives_up_and_says_what_to_do(flags: dict[str, Any], tmp_path: Path) -> None:
    def always(rank: int) -> None:
        real = GradientBuckets.arm

        def arm(buckets: GradientBuckets) -> None:
            real(buckets)
            next(iter(buckets.flat_gradients()))[1][0][0] = math.inf

        GradientBuckets.arm = arm  # type: ignore[method-assign]

    own = {**flags, "fp16": "true", "max_skipped_steps": 3, "loss_scale_hysteresis": 1, "initial_loss_scale": 4, "min_loss_scale": 2}
    processes = train(
        tmp_path / "ranks", stages=2, checkpoint_path=tmp_path / "run", expect=None, before=always, **{**own, "total_steps": 9}
    )
    for process in processes:
        text = " ".join(process.text.split())
        assert process.status not in (0, None) and "Traceback" not in text
        assert "not finite in 3 optimizer steps in a row" in text and "use --bf16" in text


def test_only_adapters_cross_replicas_and_are_kept(flags: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    small = {**flags, **LORA, "lora_target_modules": "q_proj", "total_steps": 1}

    def note(rank: int) -> None:
        real = GradientBuckets.__init__

        def init(buckets: GradientBuckets, *args: Any, **kwargs: Any) -> None:
            real(buckets, *args, **kwargs)
            sizes = [flat.nbytes for _, flats in buckets.flat_gradients() for flat in flats]
            (tmp_path / f"buckets{rank}").write_text(json.dumps(sizes))

        GradientBuckets.__init__ = init  # type: ignore[method-assign]

    train(tmp_path / "ranks", replicas=2, checkpoint_path=tmp_path / "run", before=note, **{**small, "batch_size": 4})
    assert json.loads((tmp_path / "buckets0").read_text()) == [2 * 4 * 32 * 4] * 4, "A and B, rank 4, width 32, of four layers"
    state = load_file(tmp_path / "run" / "1" / "train_state" / "layer_00.safetensors")
    assert sum(tensor.nbytes for name, tensor in state.items() if not name.startswith("step/")) == 2 * (2 * 4 * 32 * 4)
    assert not (tmp_path / "run" / "1" / "lm_head.safetensors").exists()


@full
@pytest.mark.parametrize("kind", ["lora over int8", "layernorm"])
def test_adapters_of_hosts_without_a_shared_disk_are_gathered_and_go_on(kind: str, flags: dict[str, Any], tmp_path: Path) -> None:
    needs(kind)
    own, roots = {**flags, **KINDS[kind]}, [tmp_path / "a", tmp_path / "b"]
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "whole", **own)
    train_on_hosts(tmp_path, roots, stages=2, **{**own, "total_steps": 2})
    assert not list(tmp_path.glob("[ab]/2/adapter_model.safetensors")), "neither host has all layers"
    assert gather.main([*map(str, roots), "--out", str(tmp_path / "together")]) == 0
    facts = inspect.inspect(tmp_path / "together" / "2", verify=True)
    assert facts["is_complete"] and facts["adapter"]["peft_type"] == ("LORA" if "lora" in kind else "LN_TUNING")
    assert equal_files(tmp_path / "together" / "2", tmp_path / "whole" / "2") == []
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "together", **own)
    assert equal_files(tmp_path / "together" / "4", tmp_path / "whole" / "4") == []
    train_on_hosts(tmp_path, roots[::-1], stages=2, **own)  # each host now trains the other's layers
    assert losses(tmp_path / "b")[-2:] == losses(tmp_path / "whole")[-2:], "rank 0 writes the log where it is"


@pytest.mark.parametrize("kind", ["lora", "layernorm"])
def test_a_checkpoint_of_adapters_is_a_peft_folder(kind: str, flags: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    own = {**flags, **KINDS[kind], "verify_resume": "true"}
    train(tmp_path / "ranks", stages=2, checkpoint_path=tmp_path / "run", **own)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "run" / "4").eval()
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids = torch.arange(30).view(1, 30)
    with torch.no_grad():
        assert (model(ids).logits - base(ids).logits).abs().max() > 1e-3, "it has learnt something"
    adapter = load_file(tmp_path / "run" / "4" / "adapter_model.safetensors")
    layers = load_file(tmp_path / "run" / "4" / "layer_00.safetensors")
    assert adapter and all(tensor.dtype == torch.float32 for tensor in layers.values())
