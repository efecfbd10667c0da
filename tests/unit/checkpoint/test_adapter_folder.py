"""Adapter folders in peft's form: what we write peft reads, what peft saves we read, and whatever else is refused by its name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapter_folders import FAMILIES, LINEARS, NORMS, NUM_LAYERS, adapted, config_of, make_adapter, settings_for
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoint.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config, merge_layer_files, read_adapter, write_adapter
from checkpoint.tensor_file import TensorSource, write_tensor_file
from modules.adapters import ALL_LINEAR, LoraSettings, adapter_parameters
from modules.stage import stored_name
from user_error import UserError


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(family: str, request: pytest.FixtureRequest) -> Path:
    """The tiny model of the family."""
    return Path(request.getfixturevalue("model_folder" if family == "gptj" else "neox_folder"))


def test_the_configuration_is_plain_json_and_what_peft_reads_of_it_is_what_was_set(family: str, base: Path, tmp_path: Path) -> None:
    settings = LoraSettings(rank=4, alpha=6.5, dropout=0.25, target_modules=(ALL_LINEAR,))
    config = adapter_config(config_of(base), settings, base_model="some/model")
    assert json.loads(json.dumps(config)) == config
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
    read = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert (read.r, read.lora_alpha, read.lora_dropout, read.target_modules) == (4, 6.5, 0.25, set(LINEARS[family]))
    assert (read.task_type, read.base_model_name_or_path, read.inference_mode) == ("CAUSAL_LM", "some/model", True)
    norms = adapter_config(config_of(base), None, base_model="some/model")
    assert (norms["peft_type"], norms["target_modules"]) == ("LN_TUNING", NORMS[family])


@pytest.mark.parametrize("kind", ["lora", "layernorm"])
def test_files_of_layers_become_a_folder_that_reads_back_to_the_bit(kind: str, family: str, base: Path, tmp_path: Path) -> None:
    settings = settings_for(family) if kind == "lora" else None
    stage = adapted(base, settings)
    paths = []
    for key, parameters in stage.trained_by_layer():
        paths.append(tmp_path / f"{key}.safetensors")
        sources = [TensorSource.of(stored_name(name), parameter.detach()) for name, parameter in parameters]
        write_tensor_file(paths[-1], sources, relative_to=tmp_path)
    assert len(paths) == NUM_LAYERS + (kind == "layernorm")
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = adapter_config(stage.config, settings, base_model=str(base))
    records = write_adapter(folder, merge_layer_files(paths), config)
    assert {record.name: record.size for record in records} == {path.name: path.stat().st_size for path in folder.iterdir()}
    read = read_adapter(folder, stage.config)
    assert read.lora == (
        None if settings is None else LoraSettings(**{**vars(settings), "target_modules": tuple(sorted(settings.target_modules))})
    )
    assert (read.scaling, read.base_model) == (1.0 if settings is None else 2.0, str(base))
    assert read.weights.keys() == adapter_parameters(stage).keys()
    for name, parameter in adapter_parameters(stage).items():
        assert torch.equal(read.read(name), parameter)
    with pytest.raises(UserError, match="in two"):
        merge_layer_files([paths[0], paths[0]])


@pytest.mark.parametrize("targets", [["q_proj", "fc_in"], "all-linear"])
def test_a_folder_that_peft_saved_is_read(targets: Any, model_folder: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=targets, use_rslora=True, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    model.save_pretrained(str(tmp_path))
    read = read_adapter(tmp_path, config_of(model_folder))
    assert read.scaling == pytest.approx(4 / 3**0.5)
    assert len(read.weights) == NUM_LAYERS * 2 * (2 if isinstance(targets, list) else 6)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(read.read(stored_name(name).removeprefix("base_model.model.")), parameter)


# What is refused


def with_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / ADAPTER_CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def with_tensors(do: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        do(tensors)
        (folder / ADAPTER_WEIGHTS).unlink()
        save_file(tensors, folder / ADAPTER_WEIGHTS)

    return change


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / ADAPTER_WEIGHTS), folder / "adapter_model.bin")
    (folder / ADAPTER_WEIGHTS).unlink()


A = "base_model.model.transformer.h.2.attn.q_proj.lora_A.weight"
DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda folder: (folder / ADAPTER_CONFIG).unlink(), "is no adapter folder"),
    "no tensors": (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), "is missing"),
    "a pickle": (pickled, "adapter_model.bin is a pickle.*save_pretrained"),
    "a tensor is missing": (with_tensors(lambda t: t.pop(A)), r"missing \(1\): transformer\.h\.2\.attn\.q_proj\.lora_A\.weight"),
    "a tensor too many": (with_tensors(lambda t: t.update({A.replace("h.2", "h.4"): t[A].clone()})), r"extra \(1\).*h\.4"),
    "a name without prefix": (with_tensors(lambda t: t.update({A[17:]: t.pop(A)})), r"extra \(1\): transformer.*not named as peft does"),
    "a shape": (with_tensors(lambda t: t.update({A: t[A][:2].clone()})), r"is \[2, 32\], must be \[4, 32\]"),
    "a dtype": (with_tensors(lambda t: t.update({A: t[A].to(torch.int32)})), "not floating-point.*int32"),
    "another rank": (with_config(r=8), r"wrong shape \(16\)"),
    "fewer targets": (with_config(target_modules=["q_proj"]), r"extra \(8\).*v_proj"),
    "more targets": (with_config(target_modules=["q_proj", "v_proj", "fc_in"]), r"missing \(8\).*fc_in"),
    "the embeddings": (with_config(target_modules=["q_proj", "wte"]), r"wte \(a Embedding\)"),
    "targets of another family": (with_config(target_modules=["query_key_value"]), "names query_key_value, and none of them is there"),
    "a pattern": (with_config(target_modules=".*q_proj"), "must be a list of names"),
    "no target": (with_config(target_modules=[]), "must be a list of names"),
    "DoRA": (with_config(use_dora=True), "not implemented here: use_dora true"),
    "biases": (with_config(bias="lora_only"), 'not implemented here: bias "lora_only"'),
    "a bias of B": (with_config(lora_bias=True), "lora_bias"),
    "whole modules": (with_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "ranks by layer": (with_config(rank_pattern={"q_proj": 2}), "rank_pattern"),
    "alphas by layer": (with_config(alpha_pattern={"q_proj": 2}), "alpha_pattern"),
    "some layers": (with_config(layers_to_transform=[1]), "layers_to_transform"),
    "a base that was changed": (with_config(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    "what is to come": (with_config(use_something_new=1), "use_something_new 1"),
    "another method": (with_config(peft_type="IA3"), "says 'IA3'"),
    "norms of linears": (with_config(peft_type="LN_TUNING"), "must be among the LayerNorms of this gptj, ln_1, ln_f; it adapts also"),
    "no rank": (with_config(r=None), r"they are \[null, 8, 0.0\]"),
    "a rank of zero": (with_config(r=0), "rank of LoRA must be at least 1"),
    "a rank that is true": (with_config(r=True), "they are"),
    "an alpha beyond numbers": (with_config(lora_alpha=10**400), "they are"),
    "an alpha that is none": (with_config(lora_alpha=float("nan")), "they are"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_folder_that_does_not_fit_is_refused_by_name(defect: str, model_folder: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", model_folder, settings_for("gptj"))
    read_adapter(folder, config_of(model_folder))
    change, message = DEFECTS[defect]
    change(folder)
    with pytest.raises(UserError, match=message) as raised:
        read_adapter(folder, config_of(model_folder))
    assert str(folder) in str(raised.value)


def test_an_adapter_of_the_other_family_is_refused(model_folder: Path, neox_folder: Path, tmp_path: Path) -> None:
    for settings in (settings_for("gptj"), None):
        folder = make_adapter(tmp_path / str(settings is None), model_folder, settings)
        with pytest.raises(UserError, match=r"of this gptneox, .*Give an adapter of this model"):
            read_adapter(folder, config_of(neox_folder))
