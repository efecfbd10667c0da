"""Training state: bit for bit what was saved, at any cut, and strict."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import adamw_state, as_bytes, hf_model, loaded_stage, save_hf, save_step, write_json

from checkpoint.train_state import pack_train_state, read_layer_state, read_trainer_state
from checkpoint.weight_file import TensorSpec, open_weight_file
from optim.build import AdamSettings, AdamW
from user_error import UserError


def load_train_state(step, stage):
    """Of all layers of ``stage``, by name."""
    states = {}
    for key, parameters in stage.parameters_by_layer():
        dtypes = {name: spec.dtype for name, spec in open_weight_file(step / f"{key}.safetensors").specs.items()}
        file = open_weight_file(step / "train_state" / f"{key}.safetensors")
        specs = {}
        for name, parameter in parameters:
            kinds = ["exp_avg", "exp_avg_sq", *(["master"] if dtypes[name] != torch.float32 else [])]
            specs[name] = {kind: TensorSpec(dtype=torch.float32, shape=parameter.shape) for kind in kinds}
            specs[name]["step"] = TensorSpec(dtype=torch.float32, shape=torch.Size())
        states |= read_layer_state(file, specs)
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_moments_steps_and_masters_come_back_bit_for_bit_at_any_cut(dtype, tmp_path):
    model = save_hf(hf_model(3, dtype), tmp_path / "model")
    stage = loaded_stage(model)
    state = adamw_state(stage, num_steps=3)
    masters = {name: parameter.detach() for name, parameter in stage.named_parameters()}
    step = save_step(tmp_path / "run", 3, model, stage, state)
    loaded = {}
    for first, last in ((0, 2), (2, 3)):
        part = load_train_state(step, loaded_stage(step, first, last))
        assert part.keys().isdisjoint(loaded)
        loaded |= part
    assert loaded.keys() == masters.keys()
    for name, tensors in loaded.items():
        expected = {**state[name], **({"master": masters[name]} if dtype != torch.float32 else {})}
        assert tensors.keys() == expected.keys()
        for kind, tensor in tensors.items():
            assert tensor.dtype == torch.float32
            assert tensor.shape == expected[kind].shape
            assert torch.equal(as_bytes(tensor), as_bytes(expected[kind])), f"{kind} of {name}"
            assert tensor.data_ptr() % 64 == 0


def test_masters_hold_what_the_weight_file_rounds_away(tmp_path):
    model = save_hf(hf_model(1, torch.float16), tmp_path / "model")
    stage = loaded_stage(model)
    adamw_state(stage, num_steps=1)
    step = save_step(tmp_path / "run", 1, model, stage)
    weight = dict(stage.named_parameters())["lm_head.weight"].detach()
    stored = load_file(step / "lm_head.safetensors")["lm_head.weight"]
    assert stored.dtype == torch.float16
    assert torch.equal(stored, weight.half())
    assert not torch.equal(stored.float(), weight)
    assert torch.equal(load_train_state(step, stage)["lm_head.weight"]["master"], weight)


def test_a_parameter_without_an_update_yet_is_stored_as_adamw_starts():
    optimizer = AdamW({"w": torch.nn.Parameter(torch.ones(3))}, AdamSettings(beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0))
    packed = pack_train_state({"w": torch.ones(3)}, optimizer.state(), {"w": torch.float32})
    assert packed.keys() == {"exp_avg/w", "exp_avg_sq/w", "step/w"}
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in packed.values())


def test_missing_extra_and_misshapen_state_is_listed_in_one_message(tmp_path):
    model = save_hf(hf_model(1), tmp_path / "model")
    stage = loaded_stage(model)
    step = save_step(tmp_path / "run", 1, model, stage)
    file = step / "train_state" / "lm_head.safetensors"
    tensors = load_file(file)
    del tensors["exp_avg/lm_head.bias"]
    tensors |= {"exp_avg/other": torch.ones(1), "step/lm_head.bias": torch.ones(2), "exp_avg_sq/lm_head.bias": torch.ones(64).half()}
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"lm_head.safetensors does not fit this model: missing \(1\): exp_avg/lm_head.bias; ") as caught:
        load_train_state(step, stage)
    assert "extra (1): exp_avg/other; " in str(caught.value)
    assert "wrong shape or dtype (2): exp_avg_sq/lm_head.bias, step/lm_head.bias" in str(caught.value)
    file.unlink()
    with pytest.raises(UserError, match=r"missing: .*train_state/lm_head.safetensors"):
        load_train_state(step, stage)


def test_the_trainer_state_keeps_every_digit_and_its_format_is_checked(tmp_path):
    (tmp_path / "train_state").mkdir()
    path = tmp_path / "train_state" / "trainer.json"
    write_json(path, {"format": 2, "loss": math.pi})
    assert read_trainer_state(tmp_path) == {"loss": math.pi}
    write_json(path, {"format": 3})
    with pytest.raises(UserError, match="written by another version"):
        read_trainer_state(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"has no trainer\.json"):
        read_trainer_state(tmp_path)
