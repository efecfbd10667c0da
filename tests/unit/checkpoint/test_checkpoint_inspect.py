"""What inspect says of whole folders, and that it says something, and the right thing, of every broken one."""

import json
import shutil

import pytest
import torch
from support.checkpoints import hf_model, save_hf, with_bin_files, write_json
from support.checkpoints_on_hosts import make_source, save_on_hosts

from checkpoint import inspect as inspect_module
from checkpoint.gather import main as gather
from checkpoint.inspect import main
from checkpoint.job_lock import JobLock
from checkpoint.manifest import verify_step


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """model (fp16), hostA, hostB (a step 100 of two hosts) and run/100 (the same, gathered); never changed."""
    base = tmp_path_factory.mktemp("saved")
    save_on_hosts(base, 100, make_source(base / "model", torch.float16), position=6400)
    assert gather([str(base / "hostA"), str(base / "hostB"), "--out", str(base / "run")]) == 0
    return base


@pytest.fixture
def step(saved, tmp_path):
    """A copy to damage."""
    shutil.copytree(saved / "run", tmp_path / "run")
    return tmp_path / "run" / "100"


def in_words(capsys, folder, *flags):
    status = main([str(folder), *flags])
    said = capsys.readouterr()
    assert said.err == "" or status == 1
    return status, said.out or said.err


def as_json(capsys, folder, *flags):
    status, text = in_words(capsys, folder, "--json", *flags)
    facts = json.loads(text)
    assert status == (0 if facts["is_complete"] else 1)
    return facts


def test_the_facts_of_a_step(saved, capsys):
    facts = as_json(capsys, saved / "run" / "100", "--verify")
    num_parameters = sum(parameter.numel() for parameter in hf_model(3).parameters())
    assert facts["kind"] == "step" and facts["is_complete"] and facts["verified"] and facts["problems"] == facts["notes"] == []
    assert facts["model"] == {"family": "gptj", "num_layers": 3, "width": 32, "vocab_size": 64, "num_parameters": num_parameters}
    training = facts["training"]
    assert [training[key] for key in ("step", "position", "optimizer_step", "cut")] == [100, 6400, 1, [[0, 2], [2, 3]]]
    assert training["grid"] == {"stages": 2, "replicas": 1}
    assert facts["weight_dtypes"] == {"float16": num_parameters} and facts["has_masters"] and facts["has_optimizer_states"]
    assert facts["num_files"] == {"weights": 5, "train_state": 6, "other": 7}
    files = [path for path in (saved / "run" / "100").rglob("*") if path.is_file()]
    assert sum(facts["bytes"].values()) == sum(path.stat().st_size for path in files)
    assert facts["bytes"]["weights"] == sum(path.stat().st_size for path in files if path.match("100/*.safetensors"))


def test_people_read_what_programs_read(saved, capsys):
    status, text = in_words(capsys, saved / "run" / "100", "--verify")
    assert status == 0
    assert "a training step, complete, every byte verified" in text
    assert "gptj, 3 layers of width 32, vocabulary 64" in text
    assert "step 100, 6400 sequences, 1 optimizer step," in text
    assert "2 stages x 1 replica, layers [0, 2) [2, 3), 1 thread per rank, python 3.11.7 torch 2.13.0" in text
    assert "float16" in text and "optimizer states, fp32 masters" in text


def test_one_host_of_two_is_a_whole_part_and_not_a_checkpoint(saved, capsys):
    facts = as_json(capsys, saved / "hostA" / "100")
    away = ["layer_02.safetensors", "lm_head.safetensors", "train_state/layer_02.safetensors", "train_state/lm_head.safetensors"]
    assert facts["on_other_hosts"]["files"] == away and not facts["is_complete"]
    assert facts["on_other_hosts"]["bytes"] == sum((saved / "hostB" / "100" / name).stat().st_size for name in away)
    assert facts["missing"] == facts["damaged"] == [] and len(facts["problems"]) == 1
    text = in_words(capsys, saved / "hostA" / "100")[1]
    assert "one host's part, whole in itself" in text and "checkpoint.gather" in text and all(name in text for name in away)
    assert "one host's part" in in_words(capsys, saved / "hostA")[1]


def test_models_of_every_layout_are_read(saved, tmp_path, capsys):
    layouts = {
        "single": save_hf(hf_model(1), tmp_path / "single"),
        "shards": save_hf(hf_model(1), tmp_path / "shards", max_shard_size="30KB"),
        "bin": with_bin_files(save_hf(hf_model(1), tmp_path / "bin"), dict(hf_model(1).state_dict())),
    }
    layouts["layer shards"] = as_layer_shards(save_hf(hf_model(1), tmp_path / "layer shards"))
    for folder in layouts.values():
        facts = as_json(capsys, folder)
        assert facts["kind"] == "model" and facts["is_complete"] and facts["training"] is None and facts["has_masters"] is None
        assert facts["weight_dtypes"] == {"float32": facts["model"]["num_parameters"]}
    assert "cannot be verified without a manifest.json" in in_words(capsys, layouts["single"], "--verify")[1]
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    assert "a file of weights is missing" in in_words(capsys, layouts["shards"])[1]


def as_layer_shards(folder):
    """The layout of this trainer's relatives: one torch file per layer, names without the model's prefix."""
    (folder / "model.safetensors").unlink()
    parts = {"embs": "transformer.wte", "0": "transformer.h.0", "lm_head": ""}
    weights = dict(hf_model(1).state_dict())
    for part, prefix in parts.items():
        names = [name for name in weights if name.startswith(prefix)]
        short = {name.removeprefix("transformer.").removeprefix("h.0."): weights.pop(name) for name in names}
        torch.save(short, folder / f"pytorch_{part}.pt")
    return folder


def test_the_model_of_a_step_alone_is_a_model_folder(step, capsys):
    shutil.rmtree(step / "train_state")
    (step / "manifest.json").unlink()
    model = step.rename(step.parent / "gift")
    facts = as_json(capsys, model)
    assert facts["kind"] == "model" and facts["is_complete"]


@pytest.mark.parametrize("case", ["step", "part", "model", "root"])
def test_every_key_of_the_json_is_documented_and_always_there(case, saved, capsys):
    paths = {"step": "run/100", "part": "hostA/100", "model": "model", "root": "run"}
    facts = as_json(capsys, saved / paths[case])
    undocumented = [key for key in keys_of(facts) if key not in inspect_module.__doc__]
    assert not undocumented
    if case != "root":
        assert list(facts) == list(as_json(capsys, saved / "run" / "100"))


def keys_of(facts):
    nested = [value for name, value in facts.items() if isinstance(value, dict) and name not in ("versions", "weight_dtypes")]
    return [*facts, *(key for value in nested for key in keys_of(value))]


def damage_of(name):
    """What can happen to one file."""
    half = {"half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])}
    empty = {"empty": lambda path: path.write_bytes(b"")}
    gone = {"gone": lambda path: path.unlink()}
    folder = {"folder": lambda path: (path.unlink(), path.mkdir())}
    noise = {"noise": lambda path: path.write_bytes(b"\xff\x00" * 50)}
    wrong = {"list": lambda path: path.write_text("[]"), "null": lambda path: path.write_text('{"format": 2, "files": null, "step": 1}')}
    return half | empty | gone | folder | noise | (wrong if name.endswith(".json") else {})


FILES = (
    "config.json",
    "manifest.json",
    "model.safetensors.index.json",
    "layer_01.safetensors",
    "train_state/trainer.json",
    "train_state/layer_01.safetensors",
)


@pytest.mark.parametrize(("name", "how"), [(name, how) for name in FILES for how in damage_of(name)])
def test_every_damage_is_named_and_none_is_a_crash(name, how, step, capsys):
    damage_of(name)[how](step / name)
    facts = as_json(capsys, step)
    assert not facts["is_complete"] and any(name.rpartition("/")[2] in problem for problem in facts["problems"])
    assert bool(verify_step(step)), "the trainer and inspect agree on what is complete"
    if name != "manifest.json":
        assert facts["missing" if how == "gone" else "damaged"] == [name]
    status, text = in_words(capsys, step, "--verify")
    assert status == 1 and "NOT complete (1 problem, listed below)" in text and f"problem: {facts['problems'][0]}" in text
    assert "100" in in_words(capsys, step.parent)[1]


@pytest.mark.parametrize("name", ["layer_01.safetensors", "train_state/lm_head.safetensors", "tokenizer.json"])
def test_only_verify_sees_a_flipped_byte(name, step, capsys):
    data = bytearray((step / name).read_bytes())
    data[-2] ^= 1
    (step / name).write_bytes(data)
    assert as_json(capsys, step)["is_complete"]
    facts = as_json(capsys, step, "--verify")
    assert facts["damaged"] == [name] and facts["problems"] == [f"{name} has changed: its sha256 is not the one in manifest.json"]
    assert not as_json(capsys, step.parent, "--verify")["is_complete"]


TRAINERS = [{}, {"cut": 5, "grid": "no", "versions": [1]}, {"cut": [[0], None], "grid": {}, "num_threads": "x", "loss_scale": {}}]


@pytest.mark.parametrize("trainer", TRAINERS, ids=["empty", "other types", "other shapes"])
def test_a_trainer_file_may_say_anything(trainer, step, capsys):
    write_json(step / "train_state" / "trainer.json", {"format": 2, **trainer})
    facts = as_json(capsys, step)
    assert facts["training"]["step"] == 100 and facts["damaged"] == ["train_state/trainer.json"]
    assert "step 100" in in_words(capsys, step)[1]


def test_a_model_that_contradicts_its_configuration_is_no_complete_one(tmp_path, capsys):
    folder = save_hf(hf_model(2), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "n_layer": 3})
    assert "missing (" in as_json(capsys, folder)["problems"][0]
    write_json(folder / "config.json", {**config, "model_type": "other"})
    facts = as_json(capsys, folder)
    assert facts["model"] is None and "'other'" in facts["problems"][0] and facts["weight_dtypes"]
    assert "unknown" in in_words(capsys, folder)[1]


def test_a_step_in_a_folder_of_another_name(step, capsys):
    renamed = step.rename(step.parent / "from-host-a")
    facts = as_json(capsys, renamed)
    assert facts["is_complete"] and "would have to be called 100" in facts["notes"][0]
    misnamed = renamed.rename(step.parent / "101")
    assert as_json(capsys, misnamed)["problems"] == ["its manifest.json calls it step 100"]


def test_a_checkpoint_path_is_listed_newest_first_with_all_that_lies_beside(saved, tmp_path, capsys):
    root = tmp_path / "run"
    for number, position in ((20, 50), (3, 900)):
        save_on_hosts(tmp_path, number, saved / "model", position=position)
    assert gather([str(tmp_path / "hostA"), str(tmp_path / "hostB"), "--out", str(root), "--step", "20"]) == 0
    assert gather([str(tmp_path / "hostA"), str(tmp_path / "hostB"), "--out", str(root), "--step", "3"]) == 0
    shutil.copytree(root / "3", root / ".40.partial")
    shutil.copytree(root / "3", root / "7.damaged")
    shutil.copytree(root / "3", root / "7.set-aside.1")
    capsys.readouterr()
    facts = as_json(capsys, root)
    assert [step["path"] for step in facts["steps"]] == [str(root / "3"), str(root / "20")]
    assert facts["is_complete"] and facts["newest_complete"] == "3" and facts["lock_held_by"] is None
    assert [rest["name"] for rest in facts["partials"]] == [".40.partial"]
    assert [rest["name"] for rest in facts["set_aside"]] == ["7.damaged", "7.set-aside.1"]
    assert facts["partials"][0]["bytes"] == sum(facts["steps"][0]["bytes"].values())
    (root / "3" / "lm_head.safetensors").unlink()
    status, text = in_words(capsys, root)
    assert status == 1 and "2 steps, the newest complete one is 20" in text
    assert text.index("\n  3 ") < text.index("\n  20 ") and "NOT complete: lm_head.safetensors is missing" in text
    assert "cut off; the next run" in text and "lock: free" in text


def test_the_owner_of_a_held_lock_is_named_and_keeps_it(step, capsys):
    with JobLock(step.parent):
        assert "process " in as_json(capsys, step.parent)["lock_held_by"]
        assert "lock: held by process" in in_words(capsys, step.parent)[1]
    assert as_json(capsys, step.parent)["lock_held_by"] is None
    with JobLock(step.parent):
        pass  # looking has left nothing behind that keeps a job out


def test_what_is_none_of_these_is_one_line_on_stderr(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    for folder, said in (
        (tmp_path, "holds neither a model"),
        (tmp_path / "no", "there is no folder"),
        (tmp_path / "notes.txt", "no folder"),
    ):
        assert main([str(folder)]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and said in captured.err and captured.err.count("\n") == 1


def test_a_run_that_has_saved_nothing_yet_has_nothing_to_resume(tmp_path, capsys):
    with JobLock(tmp_path / "run"):
        pass
    status, text = in_words(capsys, tmp_path / "run")
    assert status == 1 and "0 steps, nothing to resume" in text
