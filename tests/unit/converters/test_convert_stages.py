"""Relatives' checkpoints and layer shards that are not whole: each is one message that names the file, and nothing is written."""

import json
import os
import re
import shutil

import huggingface_hub
import pytest
import torch
from support.checkpoints import hf_model, loaded_stage, save_hf, save_step, tensors_of, write_json
from support.conversions import FAMILIES, NUM_LAYERS, from_hf, head_part, make_hf, to_hf, write_layer_shards, write_stages

from converters.to_hf import check_stages
from user_error import UserError

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
L = 4


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    for family in FAMILIES:
        monkeypatch.setitem(NUM_LAYERS, family, L)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family) / "model"
        made[family] = (folder, make_hf(family, folder, num_layers=L))
    return made


def tree(folder):
    return sorted(folder.rglob("*"))


def rewrite(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def refused(capsys, tmp_path, message, convert, *arguments):
    before = tree(tmp_path)
    capsys.readouterr()
    assert convert(*arguments) == 1
    err = capsys.readouterr().err
    assert re.search(message, err), err
    assert len(err.strip().splitlines()) == 1, err
    assert tree(tmp_path) == before


def drop_position(k):
    return lambda state: [state.pop(name) for name in list(state) if name.startswith(f"{k}.")]


def lose(stage):
    return lambda step: (step / f"prank_{stage}_checkpoint.pt").unlink()


def in_stage(stage, change):
    return lambda step: rewrite(step / f"prank_{stage}_checkpoint.pt", change)


def add_leftover(step):
    shutil.copy(step / "prank_2_checkpoint.pt", step / "prank_3_checkpoint.pt")


def swap_first_two(step):
    for old, new in ((0, "x"), (1, 0), ("x", 1)):
        os.rename(step / f"prank_{old}_checkpoint.pt", step / f"prank_{new}_checkpoint.pt")


def rename_a_key(state):
    name = next(name for name in state if name.endswith("weight"))
    state["nonsense"] = state.pop(name)


# Stages of 2, 1 and 1 layers: positions 0 embeddings, 1, 2 | 0 | 0, 1 head.
BROKEN_STEPS = {
    "a stage in the middle is missing": (
        lose(1),
        r"is incomplete: prank_1_checkpoint.pt missing, of a model in at least 3 stages. Each machine",
    ),
    "the first stage is missing": (lose(0), r"is incomplete: prank_0_checkpoint.pt missing"),
    "the last stage is missing": (
        lose(2),
        r"prank_1_checkpoint.pt is the last stage there is and does not end with the head: further stages",
    ),
    "a gap in a stage": (in_stage(0, drop_position(1)), r"prank_0_checkpoint.pt must hold its stage's parts 0 to 2; it lacks \[1\]"),
    "a layer too few": (in_stage(0, drop_position(2)), r"hold 1 \+ 1 \+ 1 = 3 layers, and the config.json of the model says 4"),
    "no embeddings": (in_stage(0, drop_position(0)), r"prank_0_checkpoint.pt must hold its stage's parts 0 to 2; it lacks \[0\]"),
    "the stages are mixed up": (swap_first_two, r"prank_0_checkpoint.pt must begin with the embeddings"),
    "a rest of a longer run": (add_leftover, r"prank_2_checkpoint.pt holds a head before the last stage: stages of two runs"),
    "a name without position": (in_stage(1, rename_a_key), r"prank_1_checkpoint.pt must hold names such as .* it holds nonsense"),
    "half a file": (lambda step: os.truncate(step / "prank_1_checkpoint.pt", 1000), r"prank_1_checkpoint.pt \(1000 bytes\) cannot be read"),
    "a stage that was no dict": (lambda step: torch.save([1], step / "prank_1_checkpoint.pt"), r"prank_1_checkpoint.pt must hold a dict"),
    "only optimizers": (
        lambda step: [path.unlink() for path in step.glob("*checkpoint.pt")],
        r"is incomplete: prank_0_checkpoint.pt missing",
    ),
}


@pytest.mark.parametrize("broken", BROKEN_STEPS)
@EVERY_FAMILY
def test_a_step_that_is_not_whole_is_refused_by_name(family, broken, models, tmp_path, capsys):
    spoil, message = BROKEN_STEPS[broken]
    folder, weights = models[family]
    step = write_stages(family, tmp_path / "100", weights, [2, 1, 1])
    spoil(step)
    refused(capsys, tmp_path, message, to_hf, family, step, tmp_path / "hf", "--config-name", str(folder))


@EVERY_FAMILY
def test_a_tensor_too_few_too_many_or_of_another_shape_is_listed_by_its_name_in_the_model(family, models, tmp_path, capsys):
    folder, weights = models[family]

    def spoil(state):
        name = next(name for name in state if name.startswith("0.") and name.endswith("bias") and "attn" not in name)
        state["0.more.weight"] = state.pop(name)
        last = next(name for name in reversed(state) if name.startswith("0.mlp"))
        state[last] = state[last][:1]

    step = write_stages(family, tmp_path / "100", weights, [2, 1, 1])
    in_stage(1, spoil)(step)
    message = rf"{step} must hold exactly the weights of its config.json .* missing \(1\): .*\.2\..*; extra \(1\): .*2.more.weight; wrong"
    refused(capsys, tmp_path, message, to_hf, family, step, tmp_path / "hf", "--config-name", str(folder))


@EVERY_FAMILY
def test_latest_that_names_an_incomplete_step_falls_back_in_words(family, models, tmp_path, capsys):
    folder, weights = models[family]
    for step in (1000, 2000, 3000):
        filled = {name: torch.full_like(tensor, step) for name, tensor in weights.items()}
        write_stages(family, tmp_path / "run" / f"checkpoint_{step}", filled, [2, 2])
    lose(1)(tmp_path / "run" / "checkpoint_2000")
    (tmp_path / "run" / "latest").write_text("2000\n")
    assert to_hf(family, tmp_path / "run", tmp_path / "hf", "--config-name", str(folder)) == 0
    out, err = capsys.readouterr()
    assert f"reading {tmp_path / 'run' / 'checkpoint_1000'}: 2 stage(s) of 2 + 2 layers" in out
    assert re.search(r"warning: passed over a step: .*checkpoint_3000: .*latest does not name it yet", err)
    assert re.search(
        r"warning: passed over a step: .*checkpoint_2000/prank_0_checkpoint.pt is the last stage there is and does not end", err
    )
    assert all((tensor == 1000).all() for tensor in tensors_of(tmp_path / "hf").values())


def test_without_latest_the_newest_complete_step_is_taken_and_with_none_complete_all_reasons_are_told(models, tmp_path, capsys):
    folder, weights = models["gptj"]
    for step in ("9", "10"):
        write_stages("gptj", tmp_path / "run" / step, weights, [4])
    assert to_hf("gptj", tmp_path / "run", tmp_path / "hf", "--config-name", str(folder)) == 0
    assert f"reading {tmp_path / 'run' / '10'}: 1 stage(s) of 4 layers" in capsys.readouterr().out
    for step in ("9", "10"):
        in_stage(0, drop_position(5))(tmp_path / "run" / step)
    (tmp_path / "run" / "latest").write_text("11")
    message = r"no step in .*run is complete: step 11: .*latest names it, but it is not there | .*10/prank_0.* | .*9/prank_0"
    refused(capsys, tmp_path, message, to_hf, "gptj", tmp_path / "run", tmp_path / "more", "--config-name", str(folder))


def test_a_checkpoint_without_configuration_asks_for_one_and_finds_one_that_was_put_beside_it(models, tmp_path, capsys):
    folder, weights = models["gptj"]
    step = write_stages("gptj", tmp_path / "run" / "5", weights, [2, 2])
    refused(capsys, tmp_path, "5 is a checkpoint without config.json and tokenizer. .*--config-name", to_hf, "gptj", step, tmp_path / "hf")
    shutil.copy(folder / "config.json", tmp_path / "run")
    assert to_hf("gptj", step, tmp_path / "hf") == 0
    assert "holds no tokenizer" in capsys.readouterr().out


def test_of_a_configuration_on_the_hub_no_weights_are_fetched(models, tmp_path, monkeypatch):
    folder, weights = models["gptj"]
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: (asked.append((name, how)), str(folder))[1])
    step = write_stages("gptj", tmp_path / "5", weights, [2, 2])
    assert to_hf("gptj", step, tmp_path / "hf", "--config-name", "EleutherAI/gpt-j-6B") == 0
    [(name, how)] = asked
    assert name == "EleutherAI/gpt-j-6B"
    assert not any(pattern.endswith((".bin", ".safetensors", ".pt")) or pattern == "*" for pattern in how["allow_patterns"])


def test_the_last_stage_that_relatives_call_pytorch_model_bin_is_not_taken_for_a_model(models, tmp_path, capsys):
    folder, weights = models["gptj"]
    run = tmp_path / "run"
    run.mkdir()
    torch.save({f"model.{k}.{name}": t for k in (0, 1) for name, t in head_part("gptj", weights).items()}, run / "pytorch_model.bin")
    shutil.copy(folder / "config.json", run)
    message = "pytorch_model.bin is no model but one stage of a training run of another trainer: it holds model.0."
    refused(capsys, tmp_path, message, to_hf, "gptj", run, tmp_path / "hf")
    refused(capsys, tmp_path, message, from_hf, "gptj", run, tmp_path / "ours")


def test_a_model_folder_with_checkpoints_in_it_is_a_model_and_two_kinds_of_checkpoints_are_not_guessed_between(models, tmp_path, capsys):
    folder, weights = models["gptj"]
    model = shutil.copytree(folder, tmp_path / "model")
    write_stages("gptj", model / "checkpoint_7", {name: tensor + 1 for name, tensor in weights.items()}, [2, 2])
    assert to_hf("gptj", model, tmp_path / "hf") == 0
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors_of(tmp_path / "hf").items())
    tiny = save_hf(hf_model(), tmp_path / "tiny")
    save_step(tmp_path / "run", 3, tiny, loaded_stage(tiny))
    write_stages("gptj", tmp_path / "run" / "4", weights, [2, 2])
    refused(capsys, tmp_path, "checkpoints of two trainers, 4 and 3", to_hf, "gptj", tmp_path / "run", tmp_path / "more")


def test_the_script_of_the_other_family_is_named(models, tmp_path, capsys):
    for family, other in (("gptj", "gptneox"), ("gptneox", "gptj")):
        folder, weights = models[other]
        says = rf"convert_(from|to)_hf_{family}.py needs .* Use convert_\1_hf_{other}.py."
        refused(capsys, tmp_path, says, from_hf, family, folder, tmp_path / "ours")
        refused(capsys, tmp_path, says, to_hf, family, folder, tmp_path / "hf")
        step = write_stages(other, tmp_path / family / "100", weights, [2, 2])
        refused(capsys, tmp_path, says, to_hf, family, step, tmp_path / "hf", "--config-name", str(folder))
        says = f"prank_0_checkpoint.pt holds (wte|embed_in), which is a part of a .* convert_.._{other}.py"
        refused(capsys, tmp_path, says, to_hf, family, step, tmp_path / "hf", "--config-name", str(models[family][0]))
        shards = write_layer_shards(other, folder, tmp_path / f"shards of {other}", weights)
        refused(capsys, tmp_path, f"Use convert_from_hf_{other}.py.", from_hf, family, shards, tmp_path / "ours")


BROKEN_SHARDS = {
    "no embeddings": (lambda folder: (folder / "pytorch_embs.pt").unlink(), "missing: pytorch_embs.pt"),
    "no layer 2": (lambda folder: (folder / "pytorch_2.pt").unlink(), "one file for each of the 4 layers .* missing: pytorch_2.pt"),
    "no head": (lambda folder: (folder / "pytorch_lm_head.pt").unlink(), "missing: pytorch_lm_head.pt"),
    "a fifth layer": (lambda folder: shutil.copy(folder / "pytorch_0.pt", folder / "pytorch_4.pt"), "too many: pytorch_4.pt"),
    "a prefix": (
        lambda folder: rewrite(folder / "pytorch_1.pt", lambda s: s.update({"h.1.x": torch.ones(1)})),
        r"extra \(1\): .*\.1\.h\.1\.x",
    ),
    "half a file": (lambda folder: os.truncate(folder / "pytorch_1.pt", 500), r"pytorch_1.pt \(500 bytes\) cannot be read"),
}


@pytest.mark.parametrize("broken", BROKEN_SHARDS)
@EVERY_FAMILY
def test_layer_shards_that_are_not_whole_are_refused_by_name(family, broken, models, tmp_path, capsys):
    spoil, message = BROKEN_SHARDS[broken]
    folder, weights = models[family]
    shards = write_layer_shards(family, folder, tmp_path / "shards", weights)
    spoil(shards)
    refused(capsys, tmp_path, message, from_hf, family, shards, tmp_path / "ours")


def test_layer_shards_without_configuration_are_read_with_one_from_elsewhere(models, tmp_path, capsys):
    folder, weights = models["gptj"]
    shards = write_layer_shards("gptj", folder, tmp_path / "shards", weights)
    (shards / "config.json").unlink()
    refused(capsys, tmp_path, "shards has no config.json", from_hf, "gptj", shards, tmp_path / "ours")
    assert from_hf("gptj", shards, tmp_path / "ours", "--config-name", str(folder)) == 0
    capsys.readouterr()
    assert to_hf("gptj", tmp_path / "ours" / "shards", tmp_path / "hf", "--config-name", str(tmp_path / "nowhere")) == 0
    assert "--config-name is not read" in capsys.readouterr().out


def test_a_weight_that_is_there_under_two_names_is_refused(models, tmp_path, capsys):
    folder, weights = models["gptneox"]
    shards = write_layer_shards("gptneox", folder, tmp_path / "shards", weights)
    rewrite(shards / "pytorch_lm_head.pt", lambda state: state.update({"lm_head.weight": state["embed_out.weight"].clone()}))
    refused(
        capsys,
        tmp_path,
        "embed_out.weight is there twice: embed_out.weight in .* and lm_head.weight in",
        from_hf,
        "gptneox",
        shards,
        tmp_path / "o",
    )


@pytest.mark.parametrize(
    ("found", "flags", "message"),
    [
        ((2, 2), (2, 2), None),
        ((2, 2, 0), (3, 2), None),
        ((2, 2), (4, 1), r"holds 2 stage\(s\) of 2 \+ 2 layers, and .* say 1 \+ 1 \+ 1 \+ 1"),
        ((3, 1), (2, 2), r"say 2 \+ 2"),
        (None, (2, 2), None),
        (None, (3, 2), "end early"),
        ((2, 2), (1, 3), "must cover all 4 layers"),
    ],
)
def test_stage_numbers_are_compared_with_the_stages_in_the_files(found, flags, message):
    if message is None:
        check_stages(4, found, *flags)
    else:
        with pytest.raises(UserError, match=message):
            check_stages(4, found, *flags)


def test_a_wrong_configuration_of_the_same_depth_is_refused_by_shapes(models, tmp_path, capsys):
    folder, weights = models["gptj"]
    step = write_stages("gptj", tmp_path / "100", weights, [2, 2])
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    write_json(other / "config.json", {**config, "n_embd": 32})
    refused(capsys, tmp_path, "wrong shape", to_hf, "gptj", step, tmp_path / "hf", "--config-name", str(other))
