"""Saving steps: what is committed, what is passed over, and what is left after kill -9 at every point of a save."""

import json
import os
import shutil

import pytest
import torch
from support.checkpoints import (
    TOKENIZER,
    TOKENS,
    finish_step,
    hf_model,
    killed_at,
    loaded_stage,
    same_bytes,
    save_hf,
    save_step,
    tensors_of,
    write_json,
    write_parts,
)
from support.tiers import full
from transformers import AutoModelForCausalLM

from checkpoint.layer_store import StepWriter, remove_old_steps, remove_partials
from checkpoint.layered_folder import write_model_folder
from checkpoint.manifest import find_newest_step, step_folders, verify_step
from checkpoint.model_folder import ModelFolder
from modules.gptj import GPTJConfig
from user_error import UserError


@pytest.fixture
def model(tmp_path):
    return save_hf(hf_model(1), tmp_path / "model")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def no_fsync(monkeypatch):
    """kill -9 does not empty the page cache: for tests of order, fsync only costs time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_from_pretrained_reads_a_step_and_gives_the_logits_of_the_weights_that_were_saved(dtype, tmp_path, root):
    original = hf_model(3, dtype)
    step = save_step(root, 10, folder := save_hf(original, tmp_path / "model"), loaded_stage(folder))
    read = AutoModelForCausalLM.from_pretrained(step)
    assert read.dtype == dtype
    with torch.no_grad():
        assert torch.equal(read(TOKENS).logits, original(TOKENS).logits)
    config = json.loads((step / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_stages_write_the_same_folder_as_one_process_at_any_cut(tmp_path, root):
    folder = save_hf(hf_model(3), tmp_path / "model")
    whole = save_step(root, 1, folder, loaded_stage(folder))
    writer = StepWriter(root, 2)
    writer.begin()
    parts = [write_parts(StepWriter(root, 2), folder, loaded_stage(folder, first, last), {}) for first, last in ((2, 3), (0, 1), (1, 2))]
    cut = finish_step(writer, [record for part in parts for record in part], [folder], step=1)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.name != "manifest.json")
    assert [str(file) for file in files if file.parent.name == "train_state"] == [
        "train_state/embeddings.safetensors",
        "train_state/layer_00.safetensors",
        "train_state/layer_01.safetensors",
        "train_state/layer_02.safetensors",
        "train_state/lm_head.safetensors",
        "train_state/trainer.json",
    ]
    assert all((whole / file).read_bytes() == (cut / file).read_bytes() for file in files)
    assert sorted(path.relative_to(cut) for path in cut.rglob("*") if path.is_file() and path.name != "manifest.json") == files


def test_the_tokenizer_comes_from_its_own_folder_and_is_never_mixed_from_two(tmp_path, model, root):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text("{}")
    (tokenizer / "config.json").write_text("{}")
    writer = StepWriter(root, 1)
    writer.begin()
    step = finish_step(writer, write_parts(writer, model, loaded_stage(model), {}), [model, tokenizer])
    assert (step / "vocab.json").read_text() == "{}"
    assert not any((step / name).exists() for name in TOKENIZER)
    assert json.loads((step / "config.json").read_text())["n_layer"] == 1
    assert (step / "generation_config.json").read_bytes() == (model / "generation_config.json").read_bytes()


@full
@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("damaged_before", [False, True], ids=["new step", "over a damaged one"])
def test_kill_9_at_every_point_of_a_save_leaves_the_older_step_or_the_whole_new_one(damaged_before, model, root):
    stage = loaded_stage(model)
    save_step(root, 5, model, stage)
    old = {path: path.read_bytes() for path in (root / "5").rglob("*") if path.is_file()}
    seen = set()
    for k in range(1000):
        if damaged_before:
            shutil.copytree(root / "5", root / "6")
            os.truncate(root / "6" / "lm_head.safetensors", 100)
        died = killed_at(k, lambda: save_step(root, 6, model, stage))
        newest, _ = find_newest_step(root)
        assert newest in (root / "5", root / "6"), f"after death at point {k}"
        assert verify_step(newest, hashes=True) == []
        seen.add(newest.name)
        assert {path: path.read_bytes() for path in (root / "5").rglob("*") if path.is_file()} == old
        assert save_step(root, 6, model, stage) == root / "6" == find_newest_step(root)[0]
        assert verify_step(root / "6", hashes=True) == []
        assert remove_partials(root) == []
        for folder in root.glob("6*"):
            shutil.rmtree(folder)
        if not died:
            break
    assert not died
    assert k > 50, "a save has more points than this: are they still seen?"
    assert seen == {"5", "6"}


@full
@pytest.mark.usefixtures("no_fsync")
def test_kill_9_at_every_point_of_a_conversion_leaves_nothing_or_the_whole_folder(model, tmp_path):
    def convert():
        folder = ModelFolder.open(model)
        write_model_folder(folder, tmp_path / "out" / "model", GPTJConfig.from_hf(folder.config))

    for k in range(1000):
        died = killed_at(k, convert)
        if (tmp_path / "out" / "model").exists():
            assert verify_step(tmp_path / "out" / "model", hashes=True) == []
        else:
            convert()
        assert {*os.listdir(tmp_path / "out")} - {".model.partial.lock"} == {"model"}  # the lock stays after a death after the rename
        assert same_bytes(tensors_of(tmp_path / "out" / "model"), tensors_of(model))
        shutil.rmtree(tmp_path / "out")
        if not died:
            break
    assert not died
    assert k > 25, "a conversion has more points than this: are they still seen?"


NEGATIVE_SIZE = {"format": 2, "step": 20, "position": 8, "files": {"a": {"size": -1, "sha256": "0"}}, "elsewhere": {}}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda step: os.truncate(step / "layer_00.safetensors", 64), r"layer_00.safetensors has 64 bytes, must have \d+"),
        (lambda step: os.unlink(step / "train_state" / "lm_head.safetensors"), "train_state/lm_head.safetensors is missing"),
        (lambda step: os.unlink(step / "manifest.json"), "has no manifest.json"),
        (lambda step: os.truncate(step / "manifest.json", 50), "manifest.json is not valid JSON"),
        (lambda step: write_json(step / "manifest.json", {"format": 1, "step": 20, "files": {"a": {}}}), "manifest.json is damaged"),
        (lambda step: write_json(step / "manifest.json", NEGATIVE_SIZE), "manifest.json is damaged"),
        (lambda step: write_json(step / "manifest.json", {"format": 3}), "has the format 3; this version reads format 2"),
        (lambda step: write_json(step / "manifest.json", {"format": 1, "step": 20, "files": {}}), "does not list train_state/trainer.json"),
        (lambda step: write_json(step / "manifest.json", {"format": 1, "step": None, "files": {}}), "calls it a model folder"),
    ],
)
def test_a_damaged_newest_step_is_passed_over_with_a_warning_naming_file_and_reason(damage, reason, model, root):
    stage = loaded_stage(model)
    save_step(root, 9, model, stage)
    damage(save_step(root, 20, model, stage))
    newest, warnings = find_newest_step(root)
    assert newest == root / "9"
    assert len(warnings) == 1
    assert str(root / "20") in warnings[0]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(warnings[0])


def test_steps_are_compared_as_numbers_and_other_names_are_ignored(model, root):
    stage = loaded_stage(model)
    assert find_newest_step(root) == (None, [])
    for step in (9, 10):
        save_step(root, step, model, stage)
    shutil.copytree(root / "10", root / ".11.partial")
    shutil.copytree(root / "10", root / "best")
    assert find_newest_step(root) == (root / "10", [])
    os.rename(root / "10", root / "30")
    newest, warnings = find_newest_step(root)
    assert newest == root / "9"
    assert "calls it step 10" in warnings[0]


def test_hashes_find_a_flipped_bit_that_sizes_do_not(model, root):
    step = save_step(root, 1, model, loaded_stage(model))
    data = bytearray((step / "layer_00.safetensors").read_bytes())
    data[-1] ^= 1
    (step / "layer_00.safetensors").write_bytes(data)
    assert verify_step(step) == []
    assert verify_step(step, hashes=True) == ["layer_00.safetensors has changed: its sha256 is not the one in manifest.json"]
    assert verify_step(step, hashes=True, only=["lm_head.safetensors"]) == []


def test_what_has_the_name_of_a_new_step_is_moved_aside_and_never_destroyed(model, root):
    stage = loaded_stage(model)
    first = save_step(root, 1, model, stage)
    before = {path.name: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    with torch.no_grad():
        stage.head.bias.add_(1)
    assert save_step(root, 1, model, stage) == find_newest_step(root)[0]
    assert {path.name: path.read_bytes() for path in (root / "1.set-aside").rglob("*") if path.is_file()} == before
    for name in ("1.damaged", "1.damaged.1"):
        os.truncate(root / "1" / "config.json", 3)
        assert save_step(root, 1, model, stage) == find_newest_step(root)[0]
        assert (root / name / "config.json").stat().st_size == 3


def test_files_of_another_folder_are_found_out_before_the_step_exists(model, root, tmp_path):
    writer, elsewhere = StepWriter(root, 1), StepWriter(tmp_path / "other host", 1)
    writer.begin()
    elsewhere.begin()
    with pytest.raises(UserError, match=r"embeddings.safetensors, .* cannot be seen by the host that completes the step"):
        finish_step(writer, write_parts(elsewhere, model, loaded_stage(model), {}), [model])
    assert find_newest_step(root) == (None, [])


def test_a_rank_that_does_not_see_the_partial_folder_says_so(model, root, monkeypatch):
    monkeypatch.setattr("checkpoint.layer_store.VISIBLE_WITHIN_S", 0.2)
    with pytest.raises(UserError, match=r"this host no longer sees .*\.1\.partial"):
        write_parts(StepWriter(root, 1), model, loaded_stage(model), {})


def test_a_save_that_lacks_a_layer_never_becomes_a_step(tmp_path, root):
    folder = save_hf(hf_model(2), tmp_path / "model")
    writer = StepWriter(root, 1)
    writer.begin()
    with pytest.raises(AssertionError, match=r"nobody has written .*layer_01.safetensors.*lm_head.safetensors"):
        finish_step(writer, write_parts(writer, folder, loaded_stage(folder, 0, 1), {}), [folder])
    assert find_newest_step(root) == (None, [])


def test_hosts_without_a_shared_disk_hold_parts_that_a_plain_copy_makes_whole(tmp_path):
    folder = save_hf(hf_model(2), tmp_path / "model")
    roots = [tmp_path / "a", tmp_path / "b"]
    writers = [StepWriter(root, 7) for root in roots]
    parts = []
    for writer, (first, last) in zip(writers, ((0, 1), (1, 2)), strict=True):
        writer.begin()
        parts.append(write_parts(writer, folder, loaded_stage(folder, first, last), {}))
    for writer, here, there in zip(writers, parts, reversed(parts), strict=True):
        finish_step(writer, here, [folder], elsewhere=there)
    for root in roots:
        newest, warnings = find_newest_step(root)
        assert newest is None
        assert "is missing" in warnings[0]
        assert any("checkpoint.gather" in problem for problem in verify_step(root / "7"))
    shutil.copytree(roots[1] / "7", roots[0] / "7", dirs_exist_ok=True)
    assert find_newest_step(roots[0]) == (roots[0] / "7", [])
    assert verify_step(roots[0] / "7", hashes=True) == []
    assert same_bytes(tensors_of(roots[0] / "7"), tensors_of(folder))


def test_the_newest_step_is_the_one_trained_on_most_sequences(model, root):
    stage = loaded_stage(model)
    for step, position in ((40, 400), (22, 440), (50, 300)):
        save_step(root, step, model, stage, position=position)
    assert [folder.name for folder in step_folders(root)] == ["22", "40", "50"]
    assert find_newest_step(root) == (root / "22", [])
    os.unlink(root / "40" / "manifest.json")
    assert [folder.name for folder in step_folders(root)] == ["40", "22", "50"]
    assert remove_old_steps(root, root / "22", keep=1) == ["50"], "what does not say its position is left alone"
    assert sorted(os.listdir(root)) == ["22", "40"]


def test_partials_of_killed_saves_are_removed_and_nothing_else(model, root):
    save_step(root, 1, model, loaded_stage(model))
    StepWriter(root, 2).begin()
    for name in (".lock.partial", "notes", ".3.partial.txt"):
        (root / name).mkdir()
    assert remove_partials(root) == [".2.partial"]
    assert sorted(os.listdir(root)) == [".3.partial.txt", ".lock.partial", "1", "notes"]


def test_a_checkpoint_path_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file.*Not a directory"):
        StepWriter(tmp_path / "file", 1).begin()
