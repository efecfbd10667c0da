"""Dropout's noise is a function of (seed, step, module, micro-batch): the same wherever and however often it is computed, and on average
none at all, as Hugging Face's."""

import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from support.ranks import fork
from support.tiers import sample
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from checkpoint.model_folder import ModelFolder, load_stage
from modules.dropout import AmbientDropout, CurrentDraw, Draw, SeededDropout, name_dropouts, seed_lora_dropout, torch_seeded
from modules.families import read_model_config
from modules.gptj import GPTJConfig
from modules.gptneox import GPTNeoXConfig
from modules.lm_ops import Segments, packed_causal_attention, rotary_table
from modules.model_config import ModelConfig
from modules.stage import Stage, empty_stage

HAS_CUDA = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU"))]
DRAW = Draw(seed=1, step=2, micro_batch=3)
OTHER_DRAWS = [dataclasses.replace(DRAW, **{field.name: 7}) for field in dataclasses.fields(Draw)]
GPTJ = {"model_type": "gptj", "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
NEOX = {"model_type": "gpt_neox", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NEOX |= {"intermediate_size": 96, "max_position_embeddings": 64, "rotary_pct": 0.5, "hidden_act": "gelu"}
CONFIGS: dict[str, ModelConfig] = {
    "gptj": GPTJConfig.from_hf(GPTJ),
    "gptneox": GPTNeoXConfig.from_hf(NEOX),
    "gptneox sequential": GPTNeoXConfig.from_hf({**NEOX, "use_parallel_residual": False}),
}
TOKENS = 24


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def positions(*starts: int) -> Tensor:
    """(2, TOKENS): two sequences of documents that begin at ``starts``."""
    row = torch.arange(TOKENS)
    for start in starts:
        row[start:] = torch.arange(TOKENS - start)
    return row.expand(2, TOKENS)


def stage_of(config: ModelConfig, p: float, *, first: int = 0, last: int | None = None, device: str = "cpu") -> Stage:
    """Random weights by name, dropout of ``p``."""
    stage = empty_stage(dataclasses.replace(config, dropout=p), first, config.num_layers if last is None else last)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            place = sum(name.encode())
            parameter.copy_(drawn(*parameter.shape, seed=place) * 0.2 + (parameter.ndim == 1 and name.endswith("weight")))
    name_dropouts(stage)
    return stage.to(device)


def run_block(block: nn.Module, config: ModelConfig, x: Tensor, segments: Segments, *, recompute: bool = False) -> Tensor:
    rotary = rotary_table(TOKENS, config.rotary_dim, device=x.device)[segments.positions.to(x.device)][:, :, None]
    if recompute:
        return checkpoint(block, x, segments, rotary, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
    y: Tensor = block(x, segments, rotary)
    return y


def gradients_of_block(block: nn.Module, config: ModelConfig, segments: Segments, *, recompute: bool) -> list[Tensor]:
    """The result, and the gradients of x and of every parameter that is trained."""
    device = next(block.parameters()).device
    x = drawn(2, TOKENS, config.width).to(device).requires_grad_()
    y = run_block(block, config, x, segments, recompute=recompute)
    torch.rand(3)  # what others draw in between
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], drawn(*y.shape, seed=5).to(device))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_share_of_p_is_dropped_and_the_rest_is_scaled_up(p: float, device: str) -> None:
    x = (torch.rand(400, 500) + 1).to(device).requires_grad_()
    y = SeededDropout(p, "here")(x, DRAW)
    kept = y != 0
    assert abs(kept.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(y, torch.where(kept, x / (1 - p), 0.0))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, kept / (1 - p))
    neighbours = (kept[:, 1:] == kept[:, :-1]).float().mean().item()
    assert abs(neighbours - (p**2 + (1 - p) ** 2)) < 0.01, "one falls as independently as the next"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_noise_does_not_depend_on_the_dtype(dtype: torch.dtype, device: str) -> None:
    dropout, x = SeededDropout(0.3, "here"), drawn(100, 30).to(device)
    seen = dropout(x.to(dtype), DRAW)
    assert seen.dtype == dtype
    assert torch.equal(seen == 0, dropout(x, DRAW) == 0)


def test_every_part_of_the_key_changes_the_noise_and_nothing_else_does() -> None:
    x = torch.ones(50, 40)

    def noise(name: str, draw: Draw) -> Tensor:
        torch.manual_seed(int(torch.randint(1000, ())))
        return SeededDropout(0.5, name)(x, draw)  # type: ignore[no-any-return]

    keys = [("a.b", DRAW), ("a.c", DRAW), *(("a.b", draw) for draw in OTHER_DRAWS)]
    first, again = ([noise(*key) for key in keys] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for one, other in itertools.combinations(first, 2):
        assert 0.4 < (one == other).float().mean() < 0.6, "independent, not shifted"
    swapped = [Draw(seed=1, step=23, micro_batch=4), Draw(seed=12, step=3, micro_batch=4), Draw(seed=1, step=2, micro_batch=34)]
    assert len({draw.seed_of("a") for draw in swapped}) == 3, "neighbouring numbers do not run into one another"


@pytest.mark.parametrize("module", [SeededDropout(0.0, "here"), SeededDropout(0.5, "here").eval(), SeededDropout(0.5, "here")])
def test_nothing_happens_without_a_probability_in_eval_mode_or_without_a_draw(module: SeededDropout) -> None:
    x = torch.ones(5)
    assert module(x, None if module.training and module.p else DRAW) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_a_probability_is_below_1(p: float) -> None:
    with pytest.raises(AssertionError, match="at least 0 and below 1"):
        SeededDropout(p)


def test_a_dropout_that_nobody_named_does_not_draw() -> None:
    block = dataclasses.replace(CONFIGS["gptj"], dropout=0.5).block()
    with pytest.raises(AssertionError, match="name_dropouts"):
        run_block(block, CONFIGS["gptj"], torch.ones(2, TOKENS, 32), Segments.from_positions(positions(), DRAW))


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_global_paths_and_no_parameter_is_called_otherwise(name: str) -> None:
    config = CONFIGS[name]
    with_noise, without = stage_of(config, 0.1, first=1), stage_of(config, 0.0, first=1)
    assert list(with_noise.state_dict()) == list(without.state_dict())
    names = {part.name for part in with_noise.modules() if isinstance(part, SeededDropout)}
    expected = {
        "gptj": {f"transformer.h.1.{part}" for part in ("attn.attn_dropout", "attn.resid_dropout", "mlp.dropout")},
        "gptneox": {f"gpt_neox.layers.1.{part}" for part in ("attention.attention_dropout", "post_attention_dropout", "post_mlp_dropout")},
    }
    assert expected[config.model_type] <= names


def test_the_noise_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    def work() -> int:
        seen: list[list[Tensor]] = []
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            x, q = torch.ones(300, 1000), drawn(1, 4, 200, 8)
            segments = Segments(((((0, 200)),),), torch.arange(200)[None], DRAW)
            attended = packed_causal_attention(torch.zeros_like(q), q, torch.ones_like(q), segments, SeededDropout(0.5, "there"))
            seen.append([SeededDropout(0.5, "here")(x, DRAW), (attended * 1e4).round()])  # sums of ones: how many are left in each row
        return 0 if all(torch.equal(one, other) for one, other in zip(*seen, strict=True)) else 1

    process = fork(work, tmp_path / "output")
    assert process.wait(60) == 0, process.text


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_generators_of_torch_go_on_where_they_were(recompute: bool, device: str) -> None:
    stage = stage_of(CONFIGS["gptj"], 0.3, device=device)
    stage.recomputes = recompute
    torch.manual_seed(11)
    before = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if HAS_CUDA else ())]
    ids = torch.arange(2 * TOKENS).view(2, TOKENS).to(device)
    stage(ids, Segments.from_positions(positions(5), DRAW)).sum().backward()
    after = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if HAS_CUDA else ())]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_what_fails_within_a_seeded_generator_leaves_it_as_it_was(device: str) -> None:
    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if HAS_CUDA else ())]

    def draw_and_fail() -> None:
        with torch_seeded(torch.ones(1, device=device).device, 5):
            torch.rand(3, device=device)
            raise RuntimeError("planted")

    before = states()
    with pytest.raises(RuntimeError, match="planted"):
        draw_and_fail()
    assert all(torch.equal(one, other) for one, other in zip(before, states(), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("starts", [(), (7, 19)], ids=["whole", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_same_to_the_bit_when_the_forward_is_computed_again(name: str, starts: tuple[int, ...], device: str) -> None:
    config = CONFIGS[name]
    (block,) = stage_of(config, 0.3, first=1, device=device).blocks.children()
    segments = Segments.from_positions(positions(*starts), DRAW)
    kept = gradients_of_block(block, config, segments, recompute=False)
    again = gradients_of_block(block, config, segments, recompute=True)
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    for draw in (None, *OTHER_DRAWS):
        other = gradients_of_block(block, config, segments._replace(draw=draw), recompute=False)
        assert not any(torch.allclose(x, y, rtol=1e-3) for x, y in zip(kept, other, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_dropout_of_a_block_takes_part_and_draws_noise_of_its_own(name: str) -> None:
    config, segments = CONFIGS[name], Segments.from_positions(positions(9), DRAW)
    (block,) = stage_of(config, 0.3, first=1).blocks.children()
    x, dropouts, seen = drawn(2, TOKENS, config.width), [part for part in block.modules() if isinstance(part, SeededDropout)], []
    for alone in (None, *dropouts):
        for part in dropouts:
            part.p = 0.3 if part is alone else 0.0
        seen.append(run_block(block, config, x, segments))
    assert len(seen) == 4, "attention probabilities, its branch, the MLP's branch"
    assert not any(torch.allclose(one, other) for one, other in itertools.combinations(seen, 2))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_cut_of_the_layers_drops_the_same(name: str) -> None:
    config, segments = CONFIGS[name], Segments.from_positions(positions(9), DRAW)
    ids = torch.arange(2 * TOKENS).view(2, TOKENS)
    whole = stage_of(config, 0.2)(ids, segments)
    x = stage_of(config, 0.2, last=1)(ids, segments)
    assert torch.equal(stage_of(config, 0.2, first=1)(x, segments), whole)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_probability_of_0_changes_no_bit(name: str) -> None:
    config = CONFIGS[name]
    (block,) = stage_of(config, 0.0, first=1).blocks.children()
    segments = Segments.from_positions(positions(9))
    without = gradients_of_block(block, config, segments, recompute=False)
    with_draw = gradients_of_block(block, config, segments._replace(draw=DRAW), recompute=False)
    assert all(torch.equal(one, other) for one, other in zip(without, with_draw, strict=True))


def test_documents_and_sequences_of_a_micro_batch_have_noise_of_their_own() -> None:
    q, k, v = (drawn(1, 2, 12, 8, seed=seed).repeat(2, 1, 2, 1) for seed in range(3))  # the same document four times
    segments = Segments.from_positions(positions(12), DRAW)
    dropout = SeededDropout(0.5, "here")
    y = packed_causal_attention(q, k, v, segments, dropout)
    documents = [y[b, :, s : s + 12] for b in range(2) for s in (0, 12)]
    for one, other in itertools.combinations(documents, 2):
        assert not torch.allclose(one, other)
    assert torch.equal(y, packed_causal_attention(q, k, v, segments, dropout))
    without = packed_causal_attention(q, k, v, segments)
    assert torch.equal(without[0, :, :12], without[1, :, 12:]), "without noise they are one"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("starts", [(), (7,)], ids=["whole", "packed"])
def test_attention_with_noise_is_on_average_attention_without(starts: tuple[int, ...], device: str) -> None:
    """It is linear in the probabilities, which are what is dropped: rows of one token are either nothing or twice themselves."""
    q, k, v = (drawn(2, 2, TOKENS, 8, seed=seed).to(device) for seed in range(3))
    dropout, num_draws = SeededDropout(0.5, "here"), 1500
    segments = Segments.from_positions(positions(*starts))
    draws = (segments._replace(draw=Draw(seed=0, step=0, micro_batch=i)) for i in range(num_draws))
    values = torch.stack([packed_causal_attention(q, k, v, one, dropout) for one in draws])
    first = values[:, :, :, 0] / v[:, :, 0]
    assert torch.all((first.abs() < 1e-6) | ((first - 2).abs() < 1e-5))
    off = (values.mean(0) - packed_causal_attention(q, k, v, segments)).abs()
    assert torch.all(off <= 5 * values.std(0) / num_draws**0.5)
    assert values.std(0).min() > 0


@sample(1)
@pytest.mark.parametrize("name", ["gptj", "gptneox"])
def test_a_block_with_noise_is_on_average_the_block_without(name: str) -> None:
    """Attention and MLP stand side by side, so nothing that is dropped goes through an activation."""
    config = CONFIGS[name]
    (block,) = stage_of(config, 0.3, first=1).blocks.children()
    x, segments, num_draws = drawn(2, TOKENS, config.width), Segments.from_positions(positions(7)), 1000
    with torch.no_grad():
        draws = (segments._replace(draw=Draw(seed=0, step=0, micro_batch=i)) for i in range(num_draws))
        values = torch.stack([run_block(block, config, x, one) for one in draws])
        expected = run_block(block, config, x, segments)
    assert torch.all((values.mean(0) - expected).abs() <= 6 * values.std(0) / num_draws**0.5)
    assert values.std(0).min() > 0


def hf_with_our_noise(folder: Path, p: float) -> tuple[nn.Module, set[str]]:
    """Hugging Face's model, and the names of the dropouts on its residual branches, which draw as ours do for DRAW."""
    theirs = AutoModelForCausalLM.from_pretrained(folder).train()
    current, names = CurrentDraw(), set()
    current.draw = DRAW
    for name, part in list(theirs.named_modules()):
        if isinstance(part, nn.Dropout) and name.endswith(("resid_dropout", "mlp.dropout", "post_attention_dropout", "post_mlp_dropout")):
            theirs.set_submodule(name, AmbientDropout(p, name, current))
            names.add(name)
        elif isinstance(part, nn.Dropout):
            part.p = 0.0
    return theirs, names


@pytest.mark.parametrize("family", ["gptj", "gptneox", "gptneox sequential"])
def test_noise_falls_where_hugging_faces_falls(
    family: str, model_folder: Path, neox_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from support.models import make_neox_model

    folder = model_folder if family == "gptj" else neox_folder
    if family == "gptneox sequential":
        folder = tmp_path
        make_neox_model(folder, use_parallel_residual=False)
    theirs, names = hf_with_our_noise(folder, 0.3)
    opened = ModelFolder.open(folder)
    config = dataclasses.replace(read_model_config(opened.config), dropout=0.3)
    ours = empty_stage(config, 0, config.num_layers)
    load_stage(ours, opened)
    name_dropouts(ours)
    of_residuals = {part.name: part for part in ours.modules() if isinstance(part, SeededDropout)}
    assert names <= set(of_residuals) and len(names) == 2 * config.num_layers
    for name in set(of_residuals) - names:
        of_residuals[name].p = 0.0  # of attention, whose kernels draw in other shapes, and of the embeddings
    ids = torch.arange(5, 5 + TOKENS)[None]
    segments = Segments.from_positions(torch.arange(TOKENS)[None])
    expected = theirs(ids).logits
    seen = ours.logits(ours(ids, segments._replace(draw=DRAW)))
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours.logits(ours(ids, segments)), expected, atol=0.1)


@pytest.fixture(params=["gptj", "gptneox"])
def lora_stage(request: pytest.FixtureRequest) -> Stage:
    """A whole model with adapters that matter, whose dropout is seeded."""
    pytest.importorskip("peft")
    from modules.adapters import LoraSettings, add_lora

    stage = stage_of(CONFIGS[request.param], 0.0)
    targets = {"gptj": ("q_proj", "fc_out"), "gptneox": ("query_key_value", "dense_4h_to_h")}[request.param]
    add_lora(stage, LoraSettings(rank=4, alpha=16.0, dropout=0.4, target_modules=targets))
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if "lora_" in name:
                parameter.copy_(drawn(*parameter.shape, seed=sum(name.encode())) * 0.3)
    seed_lora_dropout(stage)
    return stage


def test_lora_dropout_draws_by_name_and_again_when_a_checkpoint_computes_again(lora_stage: Stage) -> None:
    ids, segments = torch.arange(2 * TOKENS).view(2, TOKENS), Segments.from_positions(positions(5), DRAW)
    ambient = [part for part in lora_stage.modules() if isinstance(part, AmbientDropout)]
    assert len({part.name for part in ambient}) == len(ambient) == 2 * lora_stage.config.num_layers
    assert all(part.name.endswith(".lora_dropout.default") and part.p == 0.4 for part in ambient)
    adapters = [parameter for parameter in lora_stage.parameters() if parameter.requires_grad]
    results = {}
    for draw, recompute in itertools.product((DRAW, None, *OTHER_DRAWS), (False, True)):
        lora_stage.recomputes = recompute
        y = lora_stage(ids, segments._replace(draw=draw))
        lora_stage(ids, segments._replace(draw=Draw(seed=9, step=9, micro_batch=9)))  # a forward of another micro-batch before the backward
        torch.rand(3)
        results[draw, recompute] = [y.detach(), *torch.autograd.grad(y, adapters, drawn(*y.shape, seed=5))]
    for draw in (DRAW, None, *OTHER_DRAWS):
        assert all(torch.equal(one, other) for one, other in zip(results[draw, False], results[draw, True], strict=True))
        assert draw == DRAW or not torch.allclose(results[DRAW, False][0], results[draw, False][0])
    lora_stage.eval()
    assert torch.equal(lora_stage(ids, segments), results[None, False][0])


def test_seeding_lora_twice_or_naming_afterwards_changes_nothing_and_a_copy_draws_for_itself(lora_stage: Stage) -> None:
    ids, segments = torch.arange(2 * TOKENS).view(2, TOKENS), Segments.from_positions(positions(), DRAW)
    expected = lora_stage(ids, segments)
    seed_lora_dropout(lora_stage)
    name_dropouts(lora_stage)
    other = copy.deepcopy(lora_stage)
    other(ids, segments._replace(draw=OTHER_DRAWS[0]))
    assert torch.equal(lora_stage(ids, segments), expected)
    assert torch.equal(other(ids, segments), expected)


def test_lora_without_dropout_is_left_alone() -> None:
    pytest.importorskip("peft")
    from modules.adapters import LoraSettings, add_lora

    stage = stage_of(CONFIGS["gptj"], 0.0)
    add_lora(stage, LoraSettings(rank=4, alpha=16.0, dropout=0.0, target_modules=("q_proj",)))
    seed_lora_dropout(stage)
    assert not any(isinstance(part, AmbientDropout) for part in stage.modules())
    assert not any(block._forward_pre_hooks for block in stage.blocks.children())


def test_segments_keep_their_draw() -> None:
    segments = Segments.from_positions(positions(3), DRAW)
    assert segments.to(torch.device("meta")).draw == DRAW and segments.to(torch.device("meta")).positions.is_meta
    assert Segments.from_positions(positions(3)).draw is None
