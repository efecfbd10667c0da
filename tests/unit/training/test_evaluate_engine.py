"""Losses of whole sequences out of the running stages: Hugging Face's numbers, the same bits at every cut, no trace in the training."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.decoding import NO_END, decoder_of, prompts_of, without_margins
from support.ranks import example_tokens, run_ranks
from support.stages import load
from transformers import AutoModelForCausalLM

from checkpoint.model_folder import ModelFolder, load_stage
from comms.connections import Connections
from comms.groups import join_process_group, make_groups
from comms.links import PeerLost
from comms.place import place_of
from comms.spans import Spans
from modules.adapters import adapter_parameters
from modules.families import read_model_config
from modules.lm_ops import IGNORED_TARGET, best_of_each_row, losses_of_tokens
from modules.stage import Stage, draw_parameter
from pipeline_parallel.partition import even_cut
from training.compute.build import WeightTaker, assemble_stage, make_optimizer
from training.compute.forward_only import ForwardOnly
from training.compute.gradient import GlobalGradient, Schedule, wire_report
from training.config.precision import precision_of
from training.config.train import Config
from training.job.job import COLLECTIVE_TIMEOUT, Job

SEQ_LENGTH, NUM_SEQUENCES = 24, 8


def gradient_of(stage: Stage, rank: int, store: dist.Store, num_stages: int, schedule: Schedule, **more: Any) -> GlobalGradient:
    place = place_of(rank, dp_size=1, pp_size=num_stages)
    join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
    return GlobalGradient(
        place=place,
        groups=make_groups(place, "gloo", COLLECTIVE_TIMEOUT),
        stage=stage,
        spans=Spans(),
        peer_names=[f"rank {r}" for r in range(num_stages)],
        schedule=schedule,
        batch_size=NUM_SEQUENCES,
        seq_length=SEQ_LENGTH,
        clip_grad_norm=0,
        **{"micro_batch_size": 1, **more},
    )


def losses_of_pipeline(
    tmp_path: Path, stage_of: Any, num_stages: int, tokens: torch.Tensor, micro_batch_size: int = 2, schedule: Schedule | None = None
) -> torch.Tensor:
    """(n,) by a GlobalGradient over stages made by stage_of(first, last)."""
    tmp_path.mkdir()

    def rank_main(rank: int, store: dist.Store) -> None:
        stage = stage_of(*even_cut(4, num_stages)[rank])
        gradient = gradient_of(stage, rank, store, num_stages, schedule or Schedule(), micro_batch_size=micro_batch_size)
        losses = gradient.evaluate(tokens)
        assert losses.shape == (len(tokens),) and losses.dtype == torch.float64 and not losses.requires_grad
        if rank == num_stages - 1:
            save_file({"losses": losses}, tmp_path / "losses.safetensors")
        else:
            assert not losses.any()

    run_ranks(rank_main, num_stages, tmp_path)
    return load_file(tmp_path / "losses.safetensors")["losses"]


@torch.no_grad()
def hf_losses(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Of every sequence, each of its documents run on its own, over the targets that are not ignored."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = []
    for ids, positions, targets in tokens.long():
        starts = (positions == 0).nonzero().flatten().tolist()
        spans = list(zip(starts, [*starts[1:], len(ids)], strict=True))
        logits = torch.cat([model(ids[None, start:end]).logits[0] for start, end in spans])
        losses.append(torch.nn.functional.cross_entropy(logits.double(), targets, ignore_index=IGNORED_TARGET, reduction="sum"))
    return torch.stack(losses)


@pytest.mark.parametrize("family", ["gptj", "gptneox"])
def test_losses_are_hugging_faces_and_the_same_bits_at_every_cut(
    family: str, model_folder: Path, neox_folder: Path, tmp_path: Path
) -> None:
    """More micro-batches than receives are posted ahead; some positions that are no targets, and a sequence without any."""
    folder = {"gptj": model_folder, "gptneox": neox_folder}[family]
    tokens, _ = example_tokens(22, SEQ_LENGTH, 320)
    tokens[3, 2, :10] = IGNORED_TARGET
    tokens[5, 2] = IGNORED_TARGET
    reference = losses_of_pipeline(tmp_path / "1", lambda *layers: load(folder, *layers), 1, tokens)
    expected = hf_losses(folder, tokens)
    torch.testing.assert_close(reference, expected, rtol=1e-5, atol=0)
    assert reference[5] == 0 and (reference[[*range(5), *range(6, 22)]] > 1).all()
    for num_stages in (2, 4):
        found = losses_of_pipeline(tmp_path / str(num_stages), lambda *layers: load(folder, *layers), num_stages, tokens)
        assert torch.equal(found, reference)


@pytest.mark.parametrize(("mode", "dropout"), [("1f1b", 0.0), ("gpipe", 0.3), ("zb", 0.3)])
def test_a_step_after_an_evaluation_has_the_bits_and_the_report_of_one_without(
    mode: Any, dropout: float, model_folder: Path, tmp_path: Path
) -> None:
    """Also with recomputation, wires that round, and dropout, which an evaluation has none of and whose noise it does not move on."""
    tokens, num_targets = example_tokens(NUM_SEQUENCES, SEQ_LENGTH, 320)
    others, _ = example_tokens(12, SEQ_LENGTH, 320, seed=5)

    def stage_of(first: int, last: int) -> Stage:
        opened = ModelFolder.open(model_folder)
        stage = Stage(replace(read_model_config(opened.config), dropout=dropout), first, last)
        load_stage(stage, opened)
        stage.recomputes = mode == "gpipe"
        return stage

    def rank_main(rank: int, store: dist.Store) -> None:
        stage = stage_of(*even_cut(4, 2)[rank])
        gradient = gradient_of(stage, rank, store, 2, Schedule(mode=mode, wire_dtype="int8", wire_dtype_grad="bf16"), dropout_seed=1)
        found = []
        for evaluations in (0, 1, 3):
            before = torch.random.get_rng_state()
            losses = [gradient.evaluate(others) for _ in range(evaluations)]
            assert torch.equal(before, torch.random.get_rng_state())
            assert all(torch.equal(one, losses[0]) for one in losses)
            assert all(parameter.grad is None or not parameter.grad.any() for parameter in stage.parameters())
            decision = gradient.compute(tokens[None], num_targets, step=3)
            found.append(([p.grad.clone() for p in stage.parameters() if p.grad is not None], decision.loss, wire_report(decision)))
            gradient.forget()
        for gradients, loss, report in found[1:]:
            assert (loss, report) == found[0][1:]
            assert gradients and all(torch.equal(one, other) for one, other in zip(gradients, found[0][0], strict=True))

    run_ranks(rank_main, 2, tmp_path)


def test_evaluation_sends_in_the_codec_of_the_training(model_folder: Path, tmp_path: Path) -> None:
    tokens, _ = example_tokens(4, SEQ_LENGTH, 320)
    exact = losses_of_pipeline(tmp_path / "1", lambda *layers: load(model_folder, *layers), 2, tokens)
    rounded = losses_of_pipeline(
        tmp_path / "2", lambda *layers: load(model_folder, *layers), 2, tokens, schedule=Schedule(wire_dtype="int8")
    )
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.02, atol=0)


def adapted(folder: Path, first: int, last: int) -> Stage:
    """Int8 with quantised ends, and LoRA beside it that changes something."""
    config = Config(train="lora", lora_rank=2, lora_alpha=64, lora_dropout=0.5, base_quantization="int8", quantize_ends=True)
    opened, device = ModelFolder.open(folder), torch.device("cpu")
    stage = assemble_stage(config, read_model_config(opened.config), (first, last), device, precision_of(config, device))
    taker = WeightTaker(stage, make_optimizer(config, stage, precision_of(config, device)))
    weights = load_file(folder / "model.safetensors")
    for name in taker.shapes:
        if name in weights:
            taker.take(name, weights[name])
    for name, parameter in adapter_parameters(stage).items():
        if "lora_B" in name:
            draw_parameter(parameter.data, name, stage.config, seed=1)
    return stage


def test_an_8_bit_model_with_adapters_evaluates_and_generates_the_same_at_every_cut(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tokens, _ = example_tokens(8, SEQ_LENGTH, 320)
    plain = losses_of_pipeline(tmp_path / "plain", lambda *layers: load(model_folder, *layers), 1, tokens)
    reference = losses_of_pipeline(tmp_path / "1", lambda *layers: adapted(model_folder, *layers), 1, tokens)
    assert 0.001 < ((reference - plain) / plain).abs().max() < 0.2
    for num_stages in (2, 4):
        found = losses_of_pipeline(tmp_path / str(num_stages), lambda *layers: adapted(model_folder, *layers), num_stages, tokens)
        assert torch.equal(found, reference)
    prompts, answers = prompts_of([5, 12, 3]), []
    for num_stages in (1, 2):
        (tmp_path / f"decode {num_stages}").mkdir()

        def rank_main(rank: int, store: dist.Store, num_stages: int = num_stages) -> None:
            decoder = decoder_of(adapted(model_folder, *even_cut(4, num_stages)[rank]), rank, store, num_stages, 3)
            found = decoder.generate(prompts if rank == 0 else None, max_new_tokens=8, eos_token_id=NO_END)
            if found is not None:
                (tmp_path / f"answers {num_stages}").write_text(str(without_margins(found)))

        run_ranks(rank_main, num_stages, tmp_path / f"decode {num_stages}")
        answers.append((tmp_path / f"answers {num_stages}").read_text())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stages_evaluate_the_same_bits_at_every_cut(dtype: torch.dtype, model_folder: Path, tmp_path: Path) -> None:
    tokens, _ = example_tokens(4, SEQ_LENGTH, 320)
    exact = losses_of_pipeline(tmp_path / "exact", lambda *layers: load(model_folder, *layers), 1, tokens)
    one, two = (losses_of_pipeline(tmp_path / str(n), partial(load, model_folder, dtype=dtype), n, tokens) for n in (1, 2))
    assert torch.equal(one, two) and not torch.equal(one, exact)
    torch.testing.assert_close(one, exact, rtol=0.02, atol=0)


def test_losses_by_token_are_those_of_plain_cross_entropy_for_any_number_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(50, 8, generator=generator, requires_grad=True), torch.randn(50, generator=generator)
    for rows in (0, 1, 256, 700):
        hidden = torch.randn(rows, 8, generator=generator, requires_grad=True)
        targets = torch.randint(0, 50, (rows,), generator=generator)
        targets[: rows // 3] = IGNORED_TARGET
        losses = losses_of_tokens(hidden, weight, bias, targets)
        naive = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="none", ignore_index=IGNORED_TARGET)
        torch.testing.assert_close(losses.float(), naive, rtol=1e-5, atol=1e-6)
        assert not losses.requires_grad
    best, margins = best_of_each_row(hidden, weight, bias)
    largest = (hidden @ weight.T + bias).topk(2)
    assert torch.equal(best, largest.indices[:, 0])
    torch.testing.assert_close(margins, (largest.values[:, 0] - largest.values[:, 1]).detach(), rtol=1e-4, atol=1e-5)


def test_forward_only_evaluates_and_generates_without_a_gradient(model_folder: Path, tmp_path: Path) -> None:
    """Batches of other sizes than the one before, more micro-batches than receives ahead, and no parameter that wants a gradient."""
    tokens, _ = example_tokens(12, SEQ_LENGTH, 320)
    expected = hf_losses(model_folder, tokens)
    prompts = [[1, 2, 3], [4], [5, 6]]

    def rank_main(rank: int, store: dist.Store) -> None:
        place = place_of(rank, dp_size=1, pp_size=3)
        join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
        job = SimpleNamespace(
            place=place,
            groups=make_groups(place, "gloo", COLLECTIVE_TIMEOUT),
            spans=Spans(),
            backend="gloo",
            peer_names=[f"rank {r}" for r in range(3)],
            connections=Connections(),
            connect_timeout=None,
            watch_connections=lambda: None,
        )
        stage = load(model_folder, *even_cut(4, 3)[rank]).requires_grad_(False)
        stages = ForwardOnly(cast(Job, job), stage, batch_size=12, micro_batch_size=2, seq_length=SEQ_LENGTH)
        decoder = stages.decoder(2)
        for num in (12, 2, 0, 6):
            losses = stages.evaluate(tokens[:num])
            assert losses.shape == (num,)
            if rank == 2:
                torch.testing.assert_close(losses, expected[:num], rtol=1e-5, atol=0)
            found = decoder.generate(prompts if rank == 0 else None, max_new_tokens=3, eos_token_id=0)
            assert rank > 0 or (found is not None and len(found) == 3)
        with pytest.raises(AssertionError, match="whole number of micro-batches"):
            stages.evaluate(tokens[:3])
        stages.close()

    run_ranks(rank_main, 3, tmp_path)


def test_a_lost_neighbour_is_named(model_folder: Path, tmp_path: Path) -> None:
    tokens, _ = example_tokens(4, SEQ_LENGTH, 320)

    def rank_main(rank: int, store: dist.Store) -> None:
        gradient = gradient_of(load(model_folder, *even_cut(4, 2)[rank]), rank, store, 2, Schedule())
        if rank == 0:
            dist.destroy_process_group()
            return
        with pytest.raises(PeerLost, match="micro-batch 0 from rank 0"):
            gradient.evaluate(tokens)

    run_ranks(rank_main, 2, tmp_path)
