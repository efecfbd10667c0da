"""convert_to_hf_*.py --merge-adapter: the model that comes out computes what peft's own merge does, and is converted like any other."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapter_folders import FAMILIES, adapted, config_of, distance, logits, make_adapter, peft_model, settings_for, write_folder
from support.checkpoints import killed_at, same_bytes, tensors_of
from support.conversions import from_hf, to_hf
from support.models import make_model, make_neox_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import checkpoint.adapter_merge
from checkpoint.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config, read_adapter, write_adapter
from checkpoint.adapter_merge import MergedModel
from checkpoint.manifest import TRAINER_FILE, write_manifest
from checkpoint.model_folder import ModelFolder
from checkpoint.tensor_file import write_json_file
from modules.adapters import ALL_LINEAR, LoraSettings, adapter_names, adapter_parameters
from modules.stage import stored_name

KINDS = ("some", "all", "layernorm")


def settings_of(kind: str, family: str) -> LoraSettings | None:
    if kind == "layernorm":
        return None
    return settings_for(family, rank=3, alpha=5.0, targets=(ALL_LINEAR,) if kind == "all" else None)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(family: str, request: pytest.FixtureRequest) -> Path:
    """The tiny model of the family, with a tokenizer."""
    return Path(request.getfixturevalue("model_folder" if family == "gptj" else "neox_folder"))


def changed_names(base: Path, adapter: Path) -> set[str]:
    """What merging should change, told from peft's file."""
    names = [name.removeprefix("base_model.model.") for name in load_file(adapter / ADAPTER_WEIGHTS)]
    return {name.replace(".lora_A.", ".").replace(".lora_B.", ".").replace(".ln_tuning_layers.", ".") for name in names}


def by_hand(base: Path, adapter: Path, scaling: float) -> dict[str, Tensor]:
    """The merged weights in float32, from the two files alone."""
    weights = {name: tensor.float() for name, tensor in tensors_of(base).items()}
    of_adapter = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(adapter / ADAPTER_WEIGHTS).items()}
    for name, tensor in of_adapter.items():
        if ".lora_A." in name:
            weights[name.replace(".lora_A.", ".")] += scaling * of_adapter[name.replace(".lora_A.", ".lora_B.")] @ tensor
        elif ".lora_B." not in name:
            weights[name.replace(".ln_tuning_layers.", ".")] = tensor
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_what_peft_merges_and_the_rest_keeps_its_bytes(
    kind: str, family: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, settings_of(kind, family))
    assert to_hf(family, base, tmp_path / "hf", "--merge-adapter", str(adapter), "--verify") == 0
    out = capsys.readouterr().out
    assert f"merging {adapter}: {'trained LayerNorms' if kind == 'layernorm' else 'LoRA of rank 3, scaling 1.66667'}" in out
    assert f"the adapter was trained on {base}" in out
    assert f"verified {len(tensors_of(base))} tensors" in out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    theirs = peft_model(base, adapter).merge_and_unload()
    with torch.no_grad():
        assert distance(logits(merged), logits(theirs)) <= 1e-5
        assert distance(logits(merged), logits(AutoModelForCausalLM.from_pretrained(base))) > 1e-2
    before, after = tensors_of(base), tensors_of(tmp_path / "hf")
    changed = changed_names(base, adapter)
    assert {name for name in before if not torch.equal(before[name], after[name])} == changed
    assert same_bytes({n: t for n, t in before.items() if n not in changed}, {n: t for n, t in after.items() if n not in changed})
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (tmp_path / "hf" / ADAPTER_CONFIG).exists()


@pytest.mark.parametrize("dtype", ["keep", "fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_formed_in_fp32_and_rounded_once(kind: str, dtype: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_model(base, dtype=torch.float16)
    adapter = make_adapter(tmp_path / "adapter", base, settings_of(kind, "gptj"))
    assert to_hf("gptj", base, tmp_path / "hf", "--merge-adapter", str(adapter), "--dtype", dtype, "--verify") == 0
    written = {"keep": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    exact, after = by_hand(base, adapter, 5 / 3), tensors_of(tmp_path / "hf")
    assert exact.keys() == after.keys()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(written).removeprefix("torch.")
    for name, tensor in after.items():
        assert tensor.dtype == written
        torch.testing.assert_close(tensor, exact[name].to(written), rtol=torch.finfo(written).eps, atol=1e-6)
        if dtype != "fp32":  # there the order of a sum shows in the last bit
            assert (tensor == exact[name].to(written)).float().mean() > 0.99, "a second rounding would show"


def test_blocks_of_rows_change_nothing_but_memory(family: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, settings_of("all", family))
    model = ModelFolder.open(base)
    whole = MergedModel(model, read_adapter(adapter, config_of(base)))
    expected = {name: whole.read(name).clone() for name in whole.names()}
    monkeypatch.setattr(checkpoint.adapter_merge, "CHUNK_BYTES", 5 * 32 * 4)  # five rows of a matrix of width 32
    for name, tensor in expected.items():
        torch.testing.assert_close(whole.read(name), tensor, rtol=1e-6, atol=1e-6)
    assert all(whole.dtype(name) == model.dtype(name) and whole.shape(name) == model.shape(name) for name in model.names())


def test_a_layered_folder_shards_and_a_plan_work_as_without_an_adapter(
    family: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, settings_of("some", family))
    assert from_hf(family, base, tmp_path / "ours") == 0
    layered = tmp_path / "ours" / base.name
    merge = ("--merge-adapter", str(adapter))
    capsys.readouterr()
    assert to_hf(family, layered, tmp_path / "hf", *merge, "--plan") == 0
    plan = [line for line in capsys.readouterr().out.splitlines() if " -> " in line]
    assert {line.partition(" -> ")[0] for line in plan if "+ 1.66667 * lora_B @ lora_A)" in line} == changed_names(base, adapter)
    assert not (tmp_path / "hf").exists()
    assert to_hf(family, layered, tmp_path / "hf", *merge, "--max-shard-size", "30KB", "--verify") == 0
    assert to_hf(family, base, tmp_path / "direct", *merge) == 0
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    assert same_bytes(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "direct"))


def test_a_killed_merge_continues_and_another_adapter_starts_over(
    family: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, settings_of("all", family))
    command = (family, base, tmp_path / "hf", "--max-shard-size", "30KB", "--merge-adapter", str(adapter))
    assert to_hf(family, base, tmp_path / "expected", *command[3:]) == 0
    assert killed_at(36, lambda: to_hf(*command))
    assert not (tmp_path / "hf").exists()
    capsys.readouterr()
    assert to_hf(*command, "--verify") == 0
    assert "continuing in" in capsys.readouterr().err
    assert same_bytes(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "expected"))
    shutil.rmtree(tmp_path / "hf")

    assert killed_at(36, lambda: to_hf(*command))
    times = (adapter / ADAPTER_WEIGHTS).stat()
    tensors = {name: tensor * 2 for name, tensor in load_file(adapter / ADAPTER_WEIGHTS).items()}
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    os.utime(adapter / ADAPTER_WEIGHTS, ns=(times.st_atime_ns, times.st_mtime_ns))
    capsys.readouterr()
    assert to_hf(*command, "--verify") == 0
    assert "continuing in" not in capsys.readouterr().err
    exact = by_hand(base, adapter, 5 / 3)
    for name, tensor in tensors_of(tmp_path / "hf").items():
        torch.testing.assert_close(tensor, exact[name], rtol=1e-5, atol=1e-6)


def save_adapter_step(root: Path, step: int, base: Path, family: str, seed_of_values: float) -> Path:
    """What a training of adapters leaves in its --checkpoint-path: a peft folder with a manifest and some training state."""
    settings = settings_for(family)
    stage = adapted(base, settings)
    folder = root / str(step)
    (folder / TRAINER_FILE).parent.mkdir(parents=True)
    tensors = {stored_name(name): parameter.detach() * seed_of_values for name, parameter in adapter_parameters(stage).items()}
    records = write_adapter(folder, tensors, adapter_config(stage.config, settings, base_model=str(base)))
    records.append(write_json_file(folder / TRAINER_FILE, {"step": step}, relative_to=folder))
    write_manifest(folder, records, step, position=step)
    return folder


def test_of_a_training_of_adapters_the_newest_complete_step_is_merged(
    family: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    steps = [save_adapter_step(root, step, base, family, step) for step in (1, 2, 3)]
    os.truncate(steps[2] / ADAPTER_WEIGHTS, 100)
    assert to_hf(family, base, tmp_path / "hf", "--merge-adapter", str(root)) == 0
    out, err = capsys.readouterr()
    assert f"taking the newest complete step: {steps[1]}" in out
    assert f"passed over {steps[2]}" in err
    exact = by_hand(base, steps[1], 2.0)
    for name, tensor in tensors_of(tmp_path / "hf").items():
        torch.testing.assert_close(tensor, exact[name], rtol=1e-5, atol=1e-6)
    assert to_hf(family, base, tmp_path / "damaged", "--merge-adapter", str(steps[2])) == 1
    assert "is no complete checkpoint" in capsys.readouterr().err
    for source in (root, steps[1]):  # the adapter where the model belongs
        assert to_hf(family, source, tmp_path / "wrong") == 1
        err = capsys.readouterr().err
        assert f"{steps[1]} is an adapter, and not a model" in err
        assert f"({base}, it says). Give convert_to_hf_{family}.py that model as --ckpt-path, and this as --merge-adapter" in err


def test_an_adapter_of_another_size_or_of_no_numbers_is_refused_before_anything_is_written(
    family: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(adapter: Path, model: Path = base) -> str:
        assert to_hf(family, model, tmp_path / "hf", "--merge-adapter", str(adapter)) == 1
        assert not [path for path in tmp_path.iterdir() if "hf" in path.name]
        return capsys.readouterr().err

    adapter = make_adapter(tmp_path / "adapter", base, settings_of("some", family))
    make: Any = make_model if family == "gptj" else make_neox_model
    width, depth = ("n_embd", "n_layer") if family == "gptj" else ("hidden_size", "num_hidden_layers")
    make(tmp_path / "wider", **{width: 64})
    assert "must be [3, 64]" in refused(adapter, tmp_path / "wider")
    make(tmp_path / "deeper", **{depth: 5})
    assert "missing (4)" in refused(adapter, tmp_path / "deeper")
    assert "is no adapter folder" in refused(base)
    assert "there is no folder" in refused(tmp_path / "nothing")
    assert to_hf(family, adapter, tmp_path / "hf") == 1
    assert f"{adapter} is an adapter, and not a model" in capsys.readouterr().err
    stage = adapted(base, settings_of("some", family))
    sides = adapter_names(next(iter(adapter_parameters(stage))).rpartition(".lora_")[0])
    with torch.no_grad():
        adapter_parameters(stage)[sides[1]][0, 0] = float("nan")
    broken = write_folder(tmp_path / "broken", stage, settings_of("some", family), base)
    assert f"1 tensors such as {sides[1]}" in refused(broken)


def test_the_model_of_an_adapter_may_be_named_as_on_the_hub(
    family: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, settings_of("some", family))
    assert to_hf(family, Path("nobody/no-model"), tmp_path / "hf", "--merge-adapter", str(adapter)) == 1
    assert "nobody/no-model" in capsys.readouterr().err
    monkeypatch.setattr("converters.to_hf.resolve_model_folder", lambda name: {"somebody/a-model": base}[name])
    assert to_hf(family, Path("somebody/a-model"), tmp_path / "hf", "--merge-adapter", str(adapter)) == 0
    assert (tmp_path / "hf" / "model.safetensors").exists()
