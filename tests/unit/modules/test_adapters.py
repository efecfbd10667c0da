"""LoRA and trained LayerNorms: what is trained and what is not, the same first values at any cut, and the arithmetic of peft."""

import re
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from support.adapter_folders import (
    FAMILIES,
    IDS,
    LINEARS,
    NORMS,
    NUM_LAYERS,
    adapted,
    config_of,
    distance,
    load,
    logits,
    peft_model,
    segments,
    settings_for,
    write_folder,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from modules.adapters import (
    ALL_LINEAR,
    LoraSettings,
    adapter_parameters,
    add_lora,
    check_targets,
    draw_adapters,
    from_peft_name,
    peft_name,
    train_layernorms,
)
from modules.lm_ops import next_token_targets
from modules.model_config import ModelConfig
from modules.stage import Stage, empty_stage, layer_key, meta_stage, stored_name
from user_error import UserError

FIRST = {"gptj": "transformer.h.0.attn.q_proj", "gptneox": "gpt_neox.layers.0.attention.query_key_value"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(family: str, request: pytest.FixtureRequest) -> Path:
    """The tiny model of the family."""
    return Path(request.getfixturevalue("model_folder" if family == "gptj" else "neox_folder"))


def drawn(config: ModelConfig, settings: LoraSettings, first: int, last: int, seed: int = 0) -> dict[str, Tensor]:
    stage = empty_stage(config, first, last)
    add_lora(stage, settings)
    draw_adapters(stage, seed)
    return {name: parameter.detach() for name, parameter in adapter_parameters(stage).items()}


def backward(model: Stage | nn.Module) -> None:
    """Of the summed loss over IDS."""
    targets = next_token_targets(IDS, torch.arange(IDS.shape[1]).expand(IDS.shape))
    if isinstance(model, Stage):
        model.loss_sum(model(IDS, segments()), targets).backward()
    else:
        F.cross_entropy(logits(model).flatten(0, 1), targets.flatten(), reduction="sum").backward()


def gradients(model: Stage) -> dict[str, Tensor]:
    """Of one backward, by stored names."""
    backward(model)
    found = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


# What is trained


def test_beside_the_targets_there_are_fp32_adapters_and_all_else_is_frozen(family: str, base: Path) -> None:
    stage = load(base, torch.bfloat16)
    names_before = set(stage.state_dict())
    state = torch.get_rng_state()
    settings = settings_for(family, rank=3)
    add_lora(stage, settings)
    assert torch.equal(torch.get_rng_state(), state), "peft's own draws would depend on how many layers a stage has"
    trained = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trained} == set(settings.target_modules)
    assert len(trained) == NUM_LAYERS * 2 * 2
    for name, parameter in stage.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16), name
        assert parameter.device.type == "cpu"
        assert layer_key(name) == layer_key(stored_name(name))
    assert {stored_name(name) for name in stage.state_dict() if name not in trained} == names_before
    assert {layer_key(name) for name in adapter_parameters(stage)} == {f"layer_0{i}" for i in range(NUM_LAYERS)}


def test_all_linear_is_every_linear_of_the_blocks_and_neither_embeddings_nor_head(family: str, base: Path) -> None:
    stage = meta_stage(config_of(base), 0, NUM_LAYERS)
    add_lora(stage, settings_for(family, targets=(ALL_LINEAR,)))
    adapters = adapter_parameters(stage)
    assert len(adapters) == NUM_LAYERS * len(LINEARS[family]) * 2
    assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in adapters.values())
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapters} == set(LINEARS[family])


def test_only_the_layernorms_are_trained_in_fp32(family: str, base: Path) -> None:
    stage = load(base, torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in stage.named_parameters()}
    train_layernorms(stage)
    trained = adapter_parameters(stage)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in trained} == set(NORMS[family])
    assert len(trained) == 2 * (NUM_LAYERS * (len(NORMS[family]) - 1) + 1)
    for name, parameter in stage.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16)
        assert torch.equal(parameter, before[name]), "the values stay, in whatever dtype"


def test_targets_are_checked_on_one_layer_without_weights_and_the_message_lists_what_exists(family: str, base: Path) -> None:
    stage = meta_stage(config_of(base), 1, 2)
    assert check_targets(stage, settings_for(family, targets=(ALL_LINEAR,))) == tuple(LINEARS[family])
    assert check_targets(stage, settings_for(family)) == tuple(sorted(settings_for(family).target_modules))
    for targets in (("q_prj",), (*settings_for(family).target_modules, "wte"), ("lm_head",), ("attn",), ("proj",), (ALL_LINEAR, "q"), ()):
        with pytest.raises(UserError, match="--lora-target-modules") as raised:
            add_lora(stage, settings_for(family, targets=targets))
        assert all(name in str(raised.value) for name in LINEARS[family])
        for target in targets:
            assert (repr(target) in str(raised.value)) == (target not in settings_for(family).target_modules)
    assert not any("lora" in name for name, _ in stage.named_parameters()), "a refusal leaves the stage as it was"


@pytest.mark.parametrize(
    "change", [{"rank": 0}, {"rank": -4}, {"alpha": 0.0}, {"alpha": float("nan")}, {"dropout": 1.0}, {"dropout": -0.1}]
)
def test_settings_that_no_adapter_can_have_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=re.escape(f"it is {next(iter(change.values()))}")):
        LoraSettings(**{"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ("q_proj",), **change})


def test_without_peft_the_message_says_what_to_install(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="pip install peft"):
        add_lora(meta_stage(config_of(model_folder), 0, 1), settings_for("gptj"))


# The first values


def test_no_cut_changes_the_first_values_and_every_adapter_and_seed_has_its_own(family: str, base: Path) -> None:
    config, settings = config_of(base), settings_for(family, targets=(ALL_LINEAR,))
    whole = drawn(config, settings, 0, NUM_LAYERS)
    parts = drawn(config, settings, 0, 1) | drawn(config, settings, 1, 3) | drawn(config, settings, 3, NUM_LAYERS)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    other_seed = drawn(config, settings, 0, NUM_LAYERS, seed=1)
    low = [name for name in whole if ".lora_A." in name]
    assert not any(torch.equal(whole[name], other_seed[name]) for name in low)
    assert len({tuple(whole[name].flatten()[:8].tolist()) for name in low}) == len(low)


def test_the_first_values_are_distributed_as_pefts(model_folder: Path) -> None:
    settings = settings_for("gptj", rank=64, targets=("fc_out", "q_proj"))
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        peft.LoraConfig(r=64, target_modules=["fc_out", "q_proj"], task_type="CAUSAL_LM"),
    )
    theirs = {stored_name(name).removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    ours = drawn(config_of(model_folder), settings, 0, NUM_LAYERS)
    assert ours.keys() == theirs.keys()
    for name, mine in ours.items():
        if ".lora_B." in name:
            assert not mine.any()
            assert not theirs[name].any()
        else:
            bound = mine.shape[1] ** -0.5
            assert 0.98 * bound < mine.abs().max() <= bound
            assert mine.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1)


def test_a_fresh_adapter_changes_nothing(family: str, base: Path) -> None:
    stage = load(base)
    expected = logits(stage)
    add_lora(stage, settings_for(family, targets=(ALL_LINEAR,)))
    draw_adapters(stage, seed=0)
    assert torch.equal(logits(stage), expected)


# The arithmetic


@pytest.mark.parametrize("targets", [None, (ALL_LINEAR,)], ids=["some", "all"])
def test_lora_computes_what_peft_computes_of_our_folder(family: str, base: Path, targets: tuple[str, ...] | None, tmp_path: Path) -> None:
    settings = settings_for(family, targets=targets)
    ours = adapted(base, settings)
    theirs = peft_model(base, write_folder(tmp_path / "adapter", ours, settings, base), is_trainable=True)
    assert distance(logits(ours), logits(theirs)) <= 1e-5
    assert distance(logits(ours), logits(load(base))) > 1e-2, "the adapter must show"
    backward(theirs)
    expected = {stored_name(name).removeprefix("base_model.model."): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    seen = gradients(ours)
    assert seen.keys() == expected.keys()
    for name, gradient in seen.items():
        assert distance(gradient, expected[name]) <= 1e-5, name
    assert all(parameter.grad is None for parameter in ours.parameters() if not parameter.requires_grad)


def test_trained_layernorms_compute_what_peft_computes_of_our_folder(family: str, base: Path, tmp_path: Path) -> None:
    ours = adapted(base, None)
    folder = write_folder(tmp_path / "adapter", ours, None, base)
    theirs = peft_model(base, folder, is_trainable=True)
    assert distance(logits(ours), logits(theirs)) <= 1e-5
    assert distance(logits(ours), logits(load(base))) > 1e-2
    backward(theirs)
    expected = {
        name.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    seen = gradients(ours)
    assert seen.keys() == expected.keys()
    assert any(".ln_f." in name or ".final_layer_norm." in name for name in seen)
    for name, gradient in seen.items():
        assert distance(gradient, expected[name]) <= 1e-5, name


def test_recomputation_gives_the_same_gradients_to_the_bit(family: str, base: Path) -> None:
    kept, recomputed = (adapted(base, settings_for(family, targets=(ALL_LINEAR,))) for _ in range(2))
    recomputed.recomputes = True
    expected, seen = gradients(kept), gradients(recomputed)
    assert len(expected) == NUM_LAYERS * len(LINEARS[family]) * 2
    assert all(torch.equal(seen[name], expected[name]) for name in expected)


def test_adapters_are_fp32_and_compute_in_the_dtype_of_the_hidden_states(base: Path, family: str) -> None:
    settings = settings_for(family)
    exact, rounded = adapted(base, settings), adapted(base, settings, torch.bfloat16)
    module = rounded.get_submodule(FIRST[family])
    torch.manual_seed(0)
    x = torch.randn(2, 3, rounded.config.width).to(torch.bfloat16).requires_grad_()
    y = module(x)
    a, b = (module.get_parameter(f"lora_{side}.default.weight") for side in "AB")
    assert a.dtype == b.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    for parameter in (a, b):
        parameter.grad_dtype = torch.float32
    y.float().square().sum().backward()
    reference = exact.get_submodule(FIRST[family])
    x_exact = x.detach().float().requires_grad_()
    y_exact = reference(x_exact)
    y_exact.square().sum().backward()
    assert 1e-5 < distance(y, y_exact) < 2e-2
    for parameter, side in ((a, "A"), (b, "B")):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert 1e-5 < distance(parameter.grad, reference.get_parameter(f"lora_{side}.default.weight").grad) < 2e-2
    assert x.grad is not None and distance(x.grad, x_exact.grad) < 2e-2


class EightBit(nn.Linear):
    """A frozen linear whose values are whole numbers times a scale, as those of --base-quantization int8."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.scale = float(linear.weight.detach().abs().max() / 127)
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_an_8_bit_base_takes_adapters_and_passes_gradients_on(family: str, base: Path) -> None:
    settings = settings_for(family)
    plain, quantised = load(base), load(base)
    for stage, keeps_8_bits in ((plain, False), (quantised, True)):
        for block in stage.blocks.children():
            for name, linear in [(name, part) for name, part in block.named_modules() if isinstance(part, nn.Linear)]:
                eight_bit = EightBit(linear)
                if keeps_8_bits:
                    block.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], eight_bit)
                else:
                    linear.weight.data = eight_bit.weight * eight_bit.scale
        add_lora(stage, settings)
        draw_adapters(stage, seed=0)
    assert any(parameter.dtype == torch.int8 for parameter in quantised.parameters())
    expected, seen = gradients(plain), gradients(quantised)
    assert seen.keys() == expected.keys() != set()
    assert all(seen[name].dtype == torch.float32 for name in seen)
    for name in (name for name in seen if ".lora_B." in name):  # those of A are zero as long as B is
        assert distance(seen[name], expected[name]) <= 1e-5, name


# Names


def test_names_go_to_pefts_and_back(family: str, base: Path) -> None:
    for stage in (adapted(base, settings_for(family, targets=(ALL_LINEAR,))), adapted(base, None)):
        names = list(adapter_parameters(stage))
        assert [from_peft_name(peft_name(name)) for name in names] == names
        assert set(names).isdisjoint(map(from_peft_name, names)), "a stored name is none of peft's"
    assert peft_name(f"{FIRST[family]}.lora_A.weight") == f"base_model.model.{FIRST[family]}.lora_A.weight"
    assert stored_name(f"{FIRST[family]}.base_layer.weight") == f"{FIRST[family]}.weight"
