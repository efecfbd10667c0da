"""The model and its gradient are what Hugging Face computes."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from safetensors.torch import load_file, save_file
from support.ranks import example_tokens, run_ranks
from support.stages import load
from support.tiers import drawn, full, partly, sample
from transformers import GPTJForCausalLM, GPTNeoXForCausalLM, PreTrainedModel

import converters.from_hf
import converters.to_hf
from comms.groups import join_process_group, make_groups
from comms.place import place_of
from comms.spans import Spans
from modules.families import read_model_config
from modules.lm_ops import IGNORED_TARGET, Segments, chunked_cross_entropy, next_token_targets
from optim.build import AdamSettings, AdamW
from pipeline_parallel.partition import even_cut
from pipeline_parallel.schedule import PipelineMode
from training.compute.gradient import GlobalGradient, Schedule
from training.job.job import COLLECTIVE_TIMEOUT
from user_error import UserError

SEQ_LENGTH, NUM_SEQUENCES, CLIP = 24, 16, 0.05


def hf_loss_sum(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Summed loss with every document run through the model on its own."""
    total = torch.zeros(())
    for ids, positions, _ in tokens.long():
        starts = (positions == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if end - start > 1:
                document = ids[None, start:end]
                total = total + model(document, labels=document).loss * (end - start - 1)
    return total


def test_own_gptj_equals_hf_in_logits_and_every_gradient(model_folder: Path) -> None:
    ours, theirs = load(model_folder), GPTJForCausalLM.from_pretrained(model_folder)
    ids = torch.randint(0, 320, (3, 64), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(64).expand(3, 64)
    hidden = ours(ids, Segments.from_positions(positions))
    reference = theirs(ids, labels=ids)
    assert (ours.logits(hidden) - reference.logits).abs().max() <= 1e-5
    targets = next_token_targets(ids, positions)
    loss = ours.loss_sum(hidden, targets, 1 / (3 * 63))
    torch.testing.assert_close(loss.item(), reference.loss.item(), rtol=1e-6, atol=0)
    loss.backward()
    reference.loss.backward()
    expected = dict(theirs.named_parameters())
    assert set(expected) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert difference <= 1e-5, f"{name}: {difference}"


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"])
def test_a_gptj_may_call_its_gelu_by_any_of_its_names_and_keeps_the_one_it_has(name: str, model_folder: Path, tmp_path: Path) -> None:
    """Files of fine-tuned relatives say gelu_fast or gelu_pytorch_tanh; the exact gelu stays refused."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "activation_function": name}))
    ids = torch.arange(64)[None]  # (1, T)
    stage = load(folder)
    with torch.no_grad():
        ours = stage.logits(stage(ids, Segments.from_positions(torch.arange(64)[None])))  # (1, T, V)
        theirs = GPTJForCausalLM.from_pretrained(folder)(ids).logits  # (1, T, V)
    assert (ours - theirs).abs().max() <= 1e-5
    assert converters.from_hf.main("gptj", ["--model-name", str(folder), "--save-dir", str(tmp_path / "cut")]) == 0
    cut, back = tmp_path / "cut" / "model", tmp_path / "back"
    assert converters.to_hf.main("gptj", ["--ckpt-path", str(cut), "--save-path", str(back)]) == 0
    assert json.loads((back / "config.json").read_text())["activation_function"] == name
    with pytest.raises(UserError, match=r"'gelu' \(only gelu_new, gelu_fast"):
        read_model_config({**config, "activation_function": "gelu"})


def test_loaded_weights_lie_in_their_own_aligned_storage(model_folder: Path, tmp_path: Path) -> None:
    """A mapped file gives its tensors whatever address; kernels then take other vector paths and round differently."""
    stage = load(model_folder)
    before = {name: parameter.detach().clone() for name, parameter in stage.named_parameters()}
    assert all(parameter.data_ptr() % 64 == 0 for parameter in stage.parameters())
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    stage = load(copy)
    (copy / "model.safetensors").write_bytes(b"\0" * (copy / "model.safetensors").stat().st_size)
    assert all(torch.equal(before[name], parameter) for name, parameter in stage.named_parameters())


def test_weight_decay_spares_layer_norms_and_biases(model_folder: Path) -> None:
    stage = load(model_folder)
    before = {name: parameter.detach().clone() for name, parameter in stage.named_parameters()}
    optimizer = AdamW(dict(stage.named_parameters()), AdamSettings(beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.5))
    for parameter in stage.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    for name, parameter in stage.named_parameters():
        decayed = (
            name.endswith("_proj.weight")
            or name in ("transformer.wte.weight", "lm_head.weight")
            or (".mlp.fc_" in name and name.endswith("weight"))
        )
        torch.testing.assert_close(parameter, before[name] * (0.95 if decayed else 1.0), rtol=1e-6, atol=0)


def test_a_document_of_a_packed_sequence_never_sees_another(model_folder: Path) -> None:
    ours, theirs = load(model_folder), GPTJForCausalLM.from_pretrained(model_folder)
    tokens, num_targets = example_tokens(6, SEQ_LENGTH, 320)
    ids, positions = tokens[:, 0].long(), tokens[:, 1].long()
    loss = ours.loss_sum(ours(ids, Segments.from_positions(positions)), next_token_targets(ids, positions))
    assert (next_token_targets(ids, positions) != IGNORED_TARGET).sum() == num_targets
    torch.testing.assert_close(loss.item(), hf_loss_sum(theirs, tokens).item(), rtol=1e-6, atol=0)


def test_chunked_loss_equals_the_naive_one_for_any_number_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, ignored in ((1, 0), (255, 3), (256, 0), (700, 200), (5, 5)):
        hidden = torch.randn(rows, 8, generator=generator, requires_grad=True)
        weight = torch.randn(50, 8, generator=generator, requires_grad=True)
        bias = torch.randn(50, generator=generator, requires_grad=True)
        targets = torch.randint(0, 50, (rows,), generator=generator)
        targets[:ignored] = IGNORED_TARGET
        naive = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="sum", ignore_index=IGNORED_TARGET)
        expected = torch.autograd.grad(2.5 * naive, (hidden, weight, bias))
        loss = chunked_cross_entropy(hidden, weight, bias, targets, scale=0.5)
        seen = torch.autograd.grad(5.0 * loss, (hidden, weight, bias))
        torch.testing.assert_close(loss.float(), 0.5 * naive, rtol=1e-5, atol=1e-6)
        for one, other in zip(seen, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8)
    loss = chunked_cross_entropy(hidden, weight, None, torch.tensor([1, 2, IGNORED_TARGET, 3]))
    loss.backward()
    assert weight.grad is None
    assert hidden.grad is not None and hidden.grad[2].abs().sum() == 0 and hidden.grad[3].abs().sum() > 0


def single_process_gradient(folder: Path, tokens: torch.Tensor, num_targets: int) -> tuple[dict[str, torch.Tensor], float]:
    """Clipped gradient and norm of the mean loss over all targets, by plain autograd on the whole model."""
    stage = load(folder)
    ids, positions = tokens[:, 0].long(), tokens[:, 1].long()
    stage.loss_sum(stage(ids, Segments.from_positions(positions)), next_token_targets(ids, positions), 1 / num_targets).backward()
    norm = torch.nn.utils.clip_grad_norm_(stage.parameters(), CLIP)
    return {name: parameter.grad for name, parameter in stage.named_parameters()}, float(norm)  # type: ignore[misc]


# name -> mode, extra warm-up forwards per link, whether layers are recomputed
VARIANTS: dict[str, tuple[PipelineMode, int, bool]] = {
    "gpipe": ("gpipe", 0, False),
    "1f1b": ("1f1b", 0, False),
    "1f1b_ahead": ("1f1b", 2, False),
    "1f1b_recompute": ("1f1b", 0, True),
    "zb": ("zb", 0, False),
    "zb_ahead_recompute": ("zb", 1, True),
}


SPLITS = drawn(itertools.product((1, 2, 4), (1, 2)), 2)  # (micro-batches, accumulation steps)
ALL_SETTINGS = [(*split, variant) for split in SPLITS for variant in VARIANTS]


def write_grid_gradients(
    folder: Path,
    out: Path,
    stages: int,
    replicas: int,
    tokens: torch.Tensor,
    num_targets: int,
    settings: Sequence[tuple[int, int, str]] = ALL_SETTINGS,
    dtype: torch.dtype = torch.float32,
    loss_scale: float = 1.0,
) -> None:
    """In stages x replicas ranks: the gradient with each of ``settings``."""

    def rank_main(rank: int, store: dist.Store) -> None:
        place = place_of(rank, dp_size=replicas, pp_size=stages)
        join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
        groups = make_groups(place, "gloo", COLLECTIVE_TIMEOUT)
        for micro_batches, accumulation, variant in settings:
            mode, extra_warmup, recomputes = VARIANTS[variant]
            stage = load(folder, *even_cut(4, stages)[place.pp], dtype=dtype)
            stage.recomputes = recomputes
            batch_size = NUM_SEQUENCES // (replicas * accumulation)
            gradient = GlobalGradient(
                place=place,
                groups=groups,
                stage=stage,
                spans=Spans(),
                peer_names=[f"rank {r}" for r in range(stages * replicas)],
                schedule=Schedule(mode=mode, extra_warmup=(extra_warmup,) * (stages - 1)),
                batch_size=batch_size,
                micro_batch_size=batch_size // micro_batches,
                seq_length=SEQ_LENGTH,
                clip_grad_norm=CLIP,
            )
            share = tokens.view(accumulation, replicas, batch_size, 3, SEQ_LENGTH)[:, place.dp]
            decision = gradient.compute(share, num_targets, loss_scale=loss_scale)
            found = {name: parameter.grad.clone() for name, parameter in stage.named_parameters()}  # type: ignore[union-attr]
            found["decision"] = torch.tensor([decision.loss, decision.grad_norm, decision.clip_factor], dtype=torch.float64)
            save_file(found, out / f"{variant}_s{stages}_r{replicas}_m{micro_batches}_a{accumulation}_rank{rank}.safetensors")
            gradient.forget()
            assert all(not parameter.grad.any() for parameter in stage.parameters())  # type: ignore[union-attr]
            gradient.close()

    run_ranks(rank_main, stages * replicas, out)


@pytest.fixture(scope="module")
def grids(model_folder: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> tuple[Path, torch.Tensor, int]:
    """Made once for all workers of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    out = (own if worker_id == "master" else own.parent) / "grids"
    tokens, num_targets = example_tokens(NUM_SEQUENCES, SEQ_LENGTH, 320)
    with FileLock(f"{out}.lock"):
        if not (out / "whole").exists():
            out.mkdir()
            for stages, replicas in itertools.product((1, 2, 4), (1, 2)):
                write_grid_gradients(model_folder, out, stages, replicas, tokens, num_targets)
            (out / "whole").touch()
    return out, tokens, num_targets


def gradients_of(
    out: Path, stages: int, replicas: int, micro_batches: int, accumulation: int, variant: str = "gpipe"
) -> list[dict[str, torch.Tensor]]:
    """For each replica: the gradients of all its stages."""
    by_replica: list[dict[str, torch.Tensor]] = []
    for dp in range(replicas):
        merged: dict[str, torch.Tensor] = {}
        for pp in range(stages):
            name = f"{variant}_s{stages}_r{replicas}_m{micro_batches}_a{accumulation}_rank{dp * stages + pp}"
            merged |= load_file(out / f"{name}.safetensors")
        by_replica.append(merged)
    return by_replica


ALL_GRIDS = [(stages, replicas, *split) for stages in (1, 2, 4) for replicas in (1, 2) for split in SPLITS]


@partly
def test_every_grid_gives_the_single_process_gradient(grids: tuple[Path, torch.Tensor, int], model_folder: Path) -> None:
    out, tokens, num_targets = grids
    expected, norm = single_process_gradient(model_folder, tokens, num_targets)
    hf_loss = hf_loss_sum(GPTJForCausalLM.from_pretrained(model_folder), tokens).item() / num_targets
    assert norm > CLIP, "clipping must be active in this test"
    counts = (tokens[:, 1, 1:] != 0).sum(1)
    assert counts.unique().numel() > 4, "target counts must be unequal in this test"
    assert len(ALL_GRIDS) == 6 * len(SPLITS) >= 12
    for grid, variant in itertools.product(ALL_GRIDS, VARIANTS):
        for merged in gradients_of(out, *grid, variant):
            compare_with_single_process(merged, expected, norm, hf_loss, what=f"grid {grid}, {variant}")


def compare_with_single_process(
    merged: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], norm: float, hf_loss: float, *, what: str
) -> None:
    """merged: the clipped gradient of a grid and its decision. what: the grid (stages, replicas, micro-batches, accumulation steps)."""
    loss, grad_norm, clip_factor = merged.pop("decision").tolist()
    assert loss == pytest.approx(hf_loss, rel=1e-6), what
    assert grad_norm == pytest.approx(norm, rel=1e-5), what
    assert clip_factor == pytest.approx(CLIP / norm, rel=1e-5), what
    assert set(merged) == set(expected), what
    for name, gradient in merged.items():
        difference = (gradient - expected[name]).norm() / expected[name].norm()
        assert difference <= 1e-6, f"{what}, {name}: {difference}"


@full
def test_a_handful_of_grids_gives_gptneoxs_single_process_gradient_in_the_same_bits(neox_folder: Path, tmp_path: Path) -> None:
    """The engine knows nothing of families; what could still be GPT-J's are names, shapes and the blocks under recomputation."""
    tokens, num_targets = example_tokens(NUM_SEQUENCES, SEQ_LENGTH, 320)
    expected, norm = single_process_gradient(neox_folder, tokens, num_targets)
    hf_loss = hf_loss_sum(GPTNeoXForCausalLM.from_pretrained(neox_folder), tokens).item() / num_targets
    assert norm > CLIP, "clipping must be active in this test"
    settings = [(2, 1, "1f1b"), (4, 2, "zb_ahead_recompute")]
    for replicas, stages in itertools.product((1, 2), (1, 2, 4)):
        write_grid_gradients(neox_folder, tmp_path, stages, replicas, tokens, num_targets, settings)
        for micro_batches, accumulation, variant in settings:
            setting = (replicas, micro_batches, accumulation, variant)
            references = gradients_of(tmp_path, 1, *setting)
            for merged, reference in zip(gradients_of(tmp_path, stages, *setting), references, strict=True):
                assert [name for name in merged if not torch.equal(merged[name], reference[name])] == [], (stages, *setting)
                compare_with_single_process(merged, expected, norm, hf_loss, what=f"{stages} stages, {setting}")


def micro_batch_gradient(
    folder: Path, tokens: torch.Tensor, num_targets: int, dtype: torch.dtype, loss_scale: float, micro_batch_size: int
) -> tuple[dict[str, torch.Tensor], float]:
    """single_process_gradient by the rules of half precision: a micro-batch's gradient is rounded once, and added up in fp32."""
    stage, norm_square = load(folder, dtype=dtype), 0.0
    total = {name: torch.zeros(parameter.shape) for name, parameter in stage.named_parameters()}
    for piece in tokens.split(micro_batch_size):
        ids, positions = piece[:, 0].long(), piece[:, 1].long()
        for parameter in stage.parameters():
            parameter.grad, parameter.grad_dtype = None, torch.float32  # type: ignore[attr-defined]
        hidden = stage(ids, Segments.from_positions(positions))
        stage.loss_sum(hidden, next_token_targets(ids, positions), loss_scale / num_targets).backward()
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32
            total[name] += parameter.grad
    for gradient in total.values():
        gradient /= loss_scale
        norm_square += float(gradient.double().square().sum())
    factor = min(1.0, CLIP / (norm_square**0.5 + 1e-6))
    return {name: gradient * factor for name, gradient in total.items()}, norm_square**0.5


@sample(1)
@pytest.mark.parametrize(("dtype", "loss_scale"), [(torch.bfloat16, 1.0), (torch.float16, 4096.0)])
@pytest.mark.parametrize("family", ["gptj", "gptneox"])
def test_a_handful_of_grids_gives_the_single_process_gradient_in_half_precision(
    family: str, dtype: torch.dtype, loss_scale: float, model_folder: Path, neox_folder: Path, tmp_path: Path
) -> None:
    folder = model_folder if family == "gptj" else neox_folder
    tokens, num_targets = example_tokens(NUM_SEQUENCES, SEQ_LENGTH, 320)
    fp32, _ = single_process_gradient(folder, tokens, num_targets)
    settings = [(2, 1, "1f1b"), (4, 2, "zb_ahead_recompute")]
    for replicas, stages in itertools.product((1, 2), (1, 2, 4)):
        write_grid_gradients(folder, tmp_path, stages, replicas, tokens, num_targets, settings, dtype, loss_scale)
        for micro_batches, accumulation, variant in settings:
            micro_batch_size = NUM_SEQUENCES // (replicas * accumulation * micro_batches)
            expected, norm = micro_batch_gradient(folder, tokens, num_targets, dtype, loss_scale, micro_batch_size)
            setting = (replicas, micro_batches, accumulation, variant)
            reference = gradients_of(tmp_path, 1, *setting)[0]
            for merged in gradients_of(tmp_path, stages, *setting):
                assert [name for name in merged if not torch.equal(merged[name], reference[name])] == [], (stages, *setting)
                assert merged.pop("decision")[1].item() == pytest.approx(norm, rel=1e-6)
                for name, gradient in merged.items():
                    assert gradient.dtype == torch.float32
                    difference = (gradient - expected[name]).norm() / expected[name].norm()
                    assert difference <= 1e-6, (name, stages, *setting)
                    from_fp32 = (gradient - fp32[name]).norm() / fp32[name].norm()
                    assert 1e-6 < from_fp32 < (3e-2 if dtype == torch.bfloat16 else 3e-3), f"{name}: {from_fp32}"


@partly
def test_the_gradient_has_the_same_bits_at_every_number_of_stages_and_in_every_schedule(grids: tuple[Path, torch.Tensor, int]) -> None:
    out, _, _ = grids
    for _, replicas, micro_batches, accumulation in ALL_GRIDS[: len(ALL_GRIDS) // 3]:
        references = gradients_of(out, 1, replicas, micro_batches, accumulation)
        for stages, variant in itertools.product((1, 2, 4), VARIANTS):
            others = gradients_of(out, stages, replicas, micro_batches, accumulation, variant)
            for other, reference in zip(others, references, strict=True):
                differing = [name for name in reference | other if not torch.equal(other[name], reference[name])]
                assert not differing, (stages, replicas, micro_batches, accumulation, variant, differing)


@partly
def test_replicas_hold_the_same_bits_after_the_sum(grids: tuple[Path, torch.Tensor, int]) -> None:
    out, _, _ = grids
    for stages, (micro_batches, accumulation), variant in itertools.product((1, 2, 4), SPLITS, VARIANTS):
        first, second = gradients_of(out, stages, 2, micro_batches, accumulation, variant)
        assert all(torch.equal(first[name], second[name]) for name in first)
