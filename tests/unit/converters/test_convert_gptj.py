"""The two converters as a user meets them: main() with flags, its output, its exit status and what lies on the disk afterwards."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import (
    TOKENIZER,
    TOKENS,
    hf_model,
    loaded_stage,
    same_bytes,
    save_hf,
    save_step,
    tensors_of,
    with_bin_files,
    write_json,
)
from support.ranks import REPOSITORY
from transformers import AutoModelForCausalLM

import converters.from_hf
import converters.to_hf
from checkpoint.job_lock import JobLock
from checkpoint.manifest import verify_step
from checkpoint.weight_file import SafetensorsFile
from modules.gptj import GPTJConfig
from modules.stage import meta_stage
from user_error import UserError

LAYER_FILES = ["embeddings.safetensors", "layer_00.safetensors", "layer_01.safetensors", "layer_02.safetensors", "lm_head.safetensors"]


def tree(folder):
    """Every file and folder below, with sizes: to see that nothing was written."""
    return {path: path.stat().st_size if path.is_file() else None for path in folder.rglob("*")}


def from_hf(model, save_dir):
    return converters.from_hf.main("gptj", ["--model-name", str(model), "--save-dir", str(save_dir)])


def to_hf(source, target, *more):
    return converters.to_hf.main("gptj", ["--ckpt-path", str(source), "--save-path", str(target), *more])


@pytest.fixture
def model(tmp_path):
    return save_hf(hf_model(), tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hf_to_ours_to_hf_keeps_every_byte_of_every_tensor_and_the_logits(dtype, tmp_path, capsys):
    original = hf_model(dtype=dtype)
    model = save_hf(original, tmp_path / "model")
    assert from_hf(model, tmp_path / "ours") == 0
    ours = tmp_path / "ours" / "model"
    assert sorted(path.name for path in ours.glob("*.safetensors")) == LAYER_FILES
    assert load_file(ours / "lm_head.safetensors").keys() == {
        "lm_head.weight",
        "lm_head.bias",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    }
    assert verify_step(ours, hashes=True) == []
    assert to_hf(ours, tmp_path / "back") == 0
    assert sorted(os.listdir(tmp_path / "back")) == sorted(["config.json", "generation_config.json", "model.safetensors", *TOKENIZER])
    for folder in (ours, tmp_path / "back"):
        assert same_bytes(tensors_of(folder), tensors_of(model))
        assert {name: (folder / name).read_text() for name in TOKENIZER} == TOKENIZER
        read = AutoModelForCausalLM.from_pretrained(folder)
        assert read.dtype == dtype
        with torch.no_grad():
            assert torch.equal(read(TOKENS).logits, original(TOKENS).logits)
    assert f"wrote {ours}: 3 layers" in capsys.readouterr().out


def test_a_layer_that_straddles_shards_is_put_together(tmp_path):
    original = hf_model()
    model = save_hf(original, tmp_path / "model", max_shard_size="40KB")
    files = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(len({file for name, file in files.items() if f".h.{i}." in name}) > 1 for i in range(3)), "no layer straddles two shards"
    assert from_hf(model, tmp_path) == 1, "the target would be the source"
    assert from_hf(model, tmp_path / "ours") == 0
    assert same_bytes(tensors_of(tmp_path / "ours" / "model"), dict(original.state_dict()))


@pytest.mark.parametrize("num_shards", [1, 2])
def test_bin_files_are_converted_and_their_legacy_buffers_dropped(num_shards, tmp_path):
    original = hf_model()
    weights = dict(original.state_dict())
    mask = torch.ones(1, 1, 32, 32, dtype=torch.uint8)  # one storage for all layers, as in the real file
    for i in range(3):
        weights |= {f"transformer.h.{i}.attn.bias": mask, f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e9)}
    names = sorted(weights)
    shards = [{name: weights[name] for name in names[i::num_shards]} for i in range(num_shards)]
    model = with_bin_files(save_hf(original, tmp_path / "model"), *shards)
    assert from_hf(model, tmp_path / "ours") == 0
    assert same_bytes(tensors_of(tmp_path / "ours" / "model"), dict(original.state_dict()))


def test_a_step_folder_is_a_source_and_its_training_state_stays_behind(model, tmp_path):
    step = save_step(tmp_path / "run", 7, model, loaded_stage(model))
    assert from_hf(step, tmp_path / "ours") == 0
    assert to_hf(step, tmp_path / "hf") == 0
    for folder in (tmp_path / "ours" / "7", tmp_path / "hf"):
        assert same_bytes(tensors_of(folder), tensors_of(step))
        assert not (folder / "train_state").exists()


def test_of_a_checkpoint_path_the_newest_complete_step_is_taken_and_named(model, tmp_path, capsys):
    stage = loaded_stage(model)
    for step in (1, 2, 3):
        with torch.no_grad():
            stage.lm_head.bias.fill_(step)
        save_step(tmp_path / "run", step, model, stage)
    os.truncate(tmp_path / "run" / "3" / "lm_head.safetensors", 10)
    assert to_hf(tmp_path / "run", tmp_path / "hf", "--n-stages", "2", "--n-layer-per-stage", "2") == 0
    assert tensors_of(tmp_path / "hf")["lm_head.bias"][0] == 2
    out, err = capsys.readouterr()
    assert f"taking the newest complete step: {tmp_path / 'run' / '2'}" in out
    assert f"passed over {tmp_path / 'run' / '3'}" in err
    assert "lm_head.safetensors has 10 bytes" in err


def test_large_models_are_cut_into_shards_no_larger_than_asked(model, tmp_path):
    assert to_hf(model, tmp_path / "hf", "--max-shard-size", "40KB") == 0
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 1
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert all(sum(t.nbytes for t in load_file(tmp_path / "hf" / file).values()) <= 40_000 for file in files)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(TOKENS).logits, hf_model()(TOKENS).logits)


def test_a_model_without_tokenizer_is_converted_with_a_note(model, tmp_path, capsys):
    for name in TOKENIZER:
        os.unlink(model / name)
    assert from_hf(model, tmp_path / "ours") == 0
    assert "holds no tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "expected"), [("EleutherAI/gpt-j-6B", "EleutherAI_gpt-j-6B"), ("gpt-j", "gpt-j"), ("a/..", None)])
def test_the_target_is_named_after_the_model(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert converters.from_hf.target_folder(name, Path("out")) == Path("out") / (expected or tmp_path.name)
    assert converters.from_hf.target_folder("a/b/", Path("out")) == Path("out/b")


def drop_a_tensor(model):
    tensors = load_file(model / "model.safetensors")
    del tensors["transformer.h.1.mlp.fc_in.bias"]
    save_file(tensors, model / "model.safetensors")


def add_a_tensor(model):
    save_file({**load_file(model / "model.safetensors"), "transformer.h.9.ln_1.bias": torch.ones(32)}, model / "model.safetensors")


def change_the_config(**changes):
    return lambda model: write_json(model / "config.json", {**json.loads((model / "config.json").read_text()), **changes})


def lose_a_shard(model):
    shutil.rmtree(model)
    save_hf(hf_model(), model, max_shard_size="40KB")
    next(model.glob("model-00002-of-*.safetensors")).unlink()


BAD_MODELS = {
    "missing tensor": (drop_a_tensor, r"missing \(1\): transformer.h.1.mlp.fc_in.bias"),
    "extra tensor": (add_a_tensor, r"extra \(1\): transformer.h.9.ln_1.bias"),
    "wrong shape": (change_the_config(n_embd=48), r"wrong shape \(34\): lm_head.weight is \[64, 32\], must be \[64, 48\]"),
    "truncated file": (
        lambda model: os.truncate(model / "model.safetensors", 5000),
        "model.safetensors is truncated: expected .* bytes, seen 5000",
    ),
    "missing shard": (lose_a_shard, "a file of weights is missing: .*model-00002-of-0000"),
    "other model type": (change_the_config(model_type="gpt_neox"), "model_type gptj; .* says 'gpt_neox'. Use convert_.*_hf_gptneox.py"),
    "no config": (lambda model: os.unlink(model / "config.json"), "has no config.json"),
    "no folder": (shutil.rmtree, "there is no model folder"),
    "no weights": (lambda model: os.unlink(model / "model.safetensors"), "holds no weights"),
}


@pytest.mark.parametrize("bad", BAD_MODELS)
@pytest.mark.parametrize("convert", [from_hf, to_hf])
def test_a_bad_model_is_one_message_and_nothing_is_written(bad, convert, model, tmp_path, capsys):
    spoil, message = BAD_MODELS[bad]
    spoil(model)
    before = tree(tmp_path)
    capsys.readouterr()
    assert convert(model, tmp_path / "target") == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    if convert is to_hf:  # which looks for a checkpoint first
        message = message.replace("no model folder", "no folder")
    assert re.search(message, err), err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("convert", [from_hf, to_hf])
def test_a_target_that_is_not_empty_is_refused_and_untouched_and_an_empty_one_is_used(convert, model, tmp_path, capsys):
    target = tmp_path / "out" / "model"
    target.mkdir(parents=True)
    argument = target.parent if convert is from_hf else target
    (target / "mine").write_text("precious")
    before = tree(tmp_path)
    assert convert(model, argument) == 1
    assert "must be missing or empty" in capsys.readouterr().err
    assert tree(tmp_path) == before
    os.unlink(target / "mine")
    assert convert(model, argument) == 0
    assert same_bytes(tensors_of(target), tensors_of(model))


def break_off_after(monkeypatch, num_reads, error):
    read, count = SafetensorsFile.read, iter(range(num_reads))

    def breaking_read(file, name):
        if next(count, None) is None:
            raise error
        return read(file, name)

    monkeypatch.setattr(SafetensorsFile, "read", breaking_read)


@pytest.mark.parametrize("convert", [from_hf, to_hf])
def test_a_conversion_that_fails_leaves_nothing_behind(convert, model, tmp_path, monkeypatch, capsys):
    break_off_after(monkeypatch, 10, UserError("the cable is out"))
    assert convert(model, tmp_path / "out") == 1
    assert "the cable is out" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != model] == []


@pytest.mark.parametrize("convert", [from_hf, to_hf])
def test_a_conversion_that_is_interrupted_ends_without_traceback_and_can_be_run_again(convert, model, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        break_off_after(patch, 10, KeyboardInterrupt)
        assert convert(model, tmp_path / "out") == 130
    assert capsys.readouterr().err.endswith("stopped\n")
    target = tmp_path / "out" / "model" if convert is from_hf else tmp_path / "out"
    assert not target.exists()
    assert convert(model, tmp_path / "out") == 0
    assert same_bytes(tensors_of(target), tensors_of(model))


def test_two_conversions_into_one_target_do_not_mix(model, tmp_path, capsys):
    with JobLock(tmp_path / ".hf.partial", path=tmp_path / ".hf.partial.lock"):
        assert to_hf(model, tmp_path / "hf") == 1
    assert f"held by process {os.getpid()}" in capsys.readouterr().err


def test_a_disk_without_room_is_refused_before_anything_is_written(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    assert to_hf(model, tmp_path / "hf") == 1
    assert "Free some space" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("num_stages", "layers_per_stage", "message"),
    [
        (1, 2, "must cover all 3 layers"),
        (3, 0, "must cover"),
        (-3, -1, "must cover"),
        (4, 1, "every stage must hold a layer"),
        (2, 3, "end early"),
    ],
)
def test_stage_numbers_that_do_not_cover_the_model_are_refused(num_stages, layers_per_stage, message, model, tmp_path, capsys):
    assert to_hf(model, tmp_path / "hf", "--n-stages", str(num_stages), "--n-layer-per-stage", str(layers_per_stage)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_one_stage_number_without_the_other_is_refused(model, tmp_path, capsys):
    assert to_hf(model, tmp_path / "hf", "--n-stages", "3") == 1
    assert "give both or neither" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mib", 3 * 2**19), ("700", 700), ("0", None), ("five", None), ("-1GB", None)]
)
def test_shard_sizes_are_read_with_their_unit(text, size):
    if size is None:
        with pytest.raises(UserError, match="--max-shard-size must be"):
            converters.to_hf.parse_size(text)
    else:
        assert converters.to_hf.parse_size(text) == size


@pytest.mark.parametrize("spoil", ["manifest gone", "file gone", "bit flipped", "partial"])
def test_an_incomplete_or_damaged_step_is_not_converted(spoil, model, tmp_path, capsys):
    step = save_step(tmp_path / "run", 1, model, loaded_stage(model))
    if spoil == "manifest gone":
        os.unlink(step / "manifest.json")
    if spoil == "file gone":
        os.unlink(step / "train_state" / "trainer.json")
    if spoil == "bit flipped":
        data = bytearray((step / "layer_01.safetensors").read_bytes())
        data[-7] ^= 16
        (step / "layer_01.safetensors").write_bytes(data)
    if spoil == "partial":
        os.unlink(step / "manifest.json")
        shutil.rmtree(step / "train_state")
        step = step.rename(tmp_path / "run" / ".1.partial")
    assert to_hf(step, tmp_path / "hf") == 1
    assert "is no complete checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_folder_that_holds_nothing_of_ours_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert to_hf(tmp_path / "empty", tmp_path / "hf") == 1
    assert "holds neither config.json nor step folders" in capsys.readouterr().err


def test_the_scripts_run_on_their_own_and_show_no_traceback(tmp_path):
    here = REPOSITORY
    run = subprocess.run(
        [sys.executable, here / "convert_to_hf_gptj.py", "--ckpt-path", tmp_path / "missing", "--save-path", tmp_path / "hf"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(f"there is no folder {tmp_path / 'missing'}. Give a step's folder")
    assert len(run.stderr.splitlines()) == 1
    with pytest.raises(SystemExit) as misuse:
        converters.from_hf.main("gptj", [])
    assert misuse.value.code == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_a_conversion_needs_the_memory_of_a_layer_and_not_of_the_model(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    config = {**hf_model().config.to_dict(), "n_embd": 512, "n_layer": 10, "rotary_dim": 8, "torch_dtype": "float32"}
    shapes = {name: t.shape for name, t in meta_stage(GPTJConfig.from_hf(config), 0, 10).state_dict().items()}
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "config.json", config)
    if layout == "bin":
        torch.save(weights, tmp_path / "model" / "pytorch_model.bin")
    else:
        save_file(weights, tmp_path / "model" / "model.safetensors")
    largest_layer = 4 * (12 * 512 * 512 + 20 * 512)
    assert sum(tensor.nbytes for tensor in weights.values()) > 9 * largest_layer
    del weights
    child = os.fork()
    if child == 0:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the past
        before = memory("VmRSS")
        status = from_hf(tmp_path / "model", tmp_path / "ours")
        growth = memory("VmHWM") - before
        (tmp_path / "growth").write_text(str(growth))
        os._exit(status if growth < 1.5 * largest_layer + 20e6 else 9)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"peak grew by {int((tmp_path / 'growth').read_text()) / 1e6:.0f} MB, a layer is {largest_layer / 1e6:.0f} MB"


def memory(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
