"""Folders that appear as a whole, and what of a killed conversion the next one keeps: after kill -9 anywhere the bytes are the same."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import hf_model, killed_at, save_hf
from support.tiers import full, sample

import checkpoint.hf_folder
import checkpoint.layered_folder
from checkpoint.atomic_folder import JOURNAL_NAME, atomic_folder, plan_digest, resumable_folder
from checkpoint.hf_folder import write_hf_folder
from checkpoint.layered_folder import write_model_folder
from checkpoint.model_folder import ModelFolder
from checkpoint.tensor_file import FileRecord, TensorSource, write_json_file, write_tensor_file
from modules.gptj import GPTJConfig
from user_error import UserError

NAMES = ["a.json", "b.json", "c.json"]


@pytest.fixture
def no_fsync(monkeypatch):
    """kill -9 does not empty the page cache: for tests of order, fsync only costs time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def model(tmp_path):
    return save_hf(hf_model(2), tmp_path / "model")


@pytest.fixture
def small_model(tmp_path):
    return save_hf(hf_model(1), tmp_path / "small")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out" / "folder"


def partial_of(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def write_all(target, *, plan="p", stop_before=None, error=KeyboardInterrupt, names=NAMES, content="x"):
    """Write ``names``; returns those that were really written, or (with stop_before) breaks off with ``error``."""
    written = []
    with resumable_folder(target, plan=plan) as folder:
        for name in names:
            if name == stop_before:
                raise error("stop")
            folder.once(name, lambda name=name: (written.append(name), write_json(folder.path / name, name + content, folder.path))[1])
        (folder.path / "unlisted").write_text("made anew every time")
    return written


def write_json(path, content, relative_to):
    return write_json_file(path, content, relative_to=relative_to)


def interrupted(target, **how):
    with pytest.raises(how.get("error", KeyboardInterrupt)):
        write_all(target, **{"stop_before": "c.json", **how})


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files_but_the_lock(parent):
    """A death after the rename leaves the lock's file, which locks nobody out."""
    return {name: data for name, data in files(parent).items() if not name.endswith(".partial.lock")}


def convert_to_layers(model, target, **how):
    folder = ModelFolder.open(model)
    write_model_folder(folder, target, GPTJConfig.from_hf(folder.config), **how)


def convert_to_hf(model, target, **how):
    folder = ModelFolder.open(model)
    write_hf_folder(folder, target, GPTJConfig.from_hf(folder.config), max_shard_bytes=15_000, **how)


def test_after_ctrl_c_the_same_plan_continues_and_says_so(target, caplog):
    interrupted(target)
    assert not target.exists()
    assert "the same command continues there" in caplog.text
    caplog.clear()
    before = (partial_of(target) / "a.json").stat()
    assert write_all(target) == ["c.json"]
    assert "2 files (0.000 GB) were already written" in caplog.text
    assert sorted(os.listdir(target)) == [*NAMES, "unlisted"]
    assert ((target / "a.json").stat().st_ino, (target / "a.json").stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert os.listdir(target.parent) == ["folder"]


def test_the_record_of_a_kept_file_is_that_of_its_writing(target):
    interrupted(target)
    with resumable_folder(target, plan="p") as folder:
        record = folder.once("a.json", lambda: pytest.fail("it is there"))
        assert (folder.num_kept, folder.bytes_kept) == (2, 2 * record.size)
        assert (folder.keeps("b.json"), folder.keeps("c.json")) == (True, False)
        data = (folder.path / "a.json").read_bytes()
        assert record == FileRecord(name="a.json", size=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert json.loads((target / "a.json").read_text()) == "a.jsonx"


def test_another_plan_starts_over(target):
    interrupted(target)
    assert write_all(target, plan="q", content="y") == NAMES
    assert json.loads((target / "a.json").read_text()) == "a.jsony"


def test_an_error_of_our_own_removes_everything(target):
    interrupted(target)
    interrupted(target, error=UserError)
    assert os.listdir(target.parent) == []
    assert write_all(target) == NAMES


@pytest.mark.parametrize("spoil", ["short", "long", "gone", "a folder", "line torn", "header torn", "not listed", "stranger"])
def test_only_what_the_journal_lists_in_full_size_is_kept(spoil, target):
    interrupted(target)
    partial = partial_of(target)
    journal = partial / JOURNAL_NAME
    expected = ["b.json", "c.json"]
    if spoil == "short":
        os.truncate(partial / "b.json", 3)
    if spoil == "long":
        (partial / "b.json").write_bytes((partial / "b.json").read_bytes() + b" ")
    if spoil in ("gone", "a folder"):
        (partial / "b.json").unlink()
    if spoil == "a folder":
        (partial / "b.json").mkdir()
        (partial / "b.json" / "inside").write_text("")
    if spoil == "line torn":
        os.truncate(journal, journal.stat().st_size - 9)
    if spoil == "header torn":
        os.truncate(journal, 9)
        expected = NAMES
    if spoil == "not listed":
        journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    if spoil == "stranger":
        (partial / "sub" / "sub").mkdir(parents=True)
        (partial / "sub" / "sub" / "file").write_text("")
        expected = ["c.json"]
    assert write_all(target) == expected
    assert sorted(os.listdir(target)) == [*NAMES, "unlisted"]
    assert json.loads((target / "b.json").read_text()) == "b.jsonx"


def test_a_file_that_was_lost_and_is_written_again_is_not_trusted_by_the_line_of_its_first_writing(target):
    interrupted(target)
    (partial_of(target) / "a.json").unlink()

    def die_in_full_size(folder):
        (folder.path / "a.json").write_bytes(b"0" * len('"a.jsonx"\n'))
        raise KeyboardInterrupt

    def run():
        with resumable_folder(target, plan="p") as folder:
            folder.once("a.json", lambda: die_in_full_size(folder))

    with pytest.raises(KeyboardInterrupt):
        run()
    assert write_all(target) == ["a.json", "c.json"]
    assert json.loads((target / "a.json").read_text()) == "a.jsonx"


def test_a_folder_without_a_plan_leaves_nothing_and_keeps_nothing(target):
    def run():
        with atomic_folder(target) as folder:
            (folder / "a.json").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert os.listdir(target.parent) == []
    interrupted(target)
    with atomic_folder(target) as folder:
        assert os.listdir(folder) == []
        (folder / "b").write_text("")
    assert os.listdir(target) == ["b"]


def test_what_is_kept_need_not_fit_on_the_disk_a_second_time(target, monkeypatch):
    interrupted(target)
    kept = sum((partial_of(target) / name).stat().st_size for name in NAMES[:2])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with resumable_folder(target, plan="p", num_bytes=100 + kept) as folder:
        assert folder.num_kept == 2
    shutil.rmtree(target)
    with pytest.raises(UserError, match="Free some space"), resumable_folder(target, plan="p", num_bytes=101):
        pass


def test_the_plan_changes_with_everything_that_the_bytes_depend_on(model, tmp_path):
    def digest(*options):
        return plan_digest(ModelFolder.open(model), *options)

    digests = [digest("layers", None), digest("layers", torch.float16), digest("hugging face", None)]
    assert digest("layers", None) == digests[0]
    state = (model / "model.safetensors").stat()
    os.utime(model / "model.safetensors", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    digests.append(digest("layers", None))
    os.rename(model / "model.safetensors", model / "odd.safetensors")
    index = {"weight_map": dict.fromkeys(ModelFolder.open_config(model).names(), "odd.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    digests.append(digest("layers", None))
    (model / "config.json").write_text((model / "config.json").read_text().replace('"n_positions": 32', '"n_positions": 16'))
    digests.append(digest("layers", None))
    assert len(set(digests)) == 6


@sample(1)
@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize(
    ("convert", "dtype"),
    [(convert_to_layers, None), (convert_to_layers, torch.float16), (convert_to_hf, None)],
    ids=["layers", "layers in fp16", "hf"],
)
def test_kill_9_at_every_point_and_the_same_command_again_give_the_bytes_of_an_undisturbed_conversion(
    convert, dtype, small_model, tmp_path, target, monkeypatch
):
    convert(small_model, tmp_path / "undisturbed" / "folder", dtype=dtype)
    expected = files(tmp_path / "undisturbed")
    num_written, resumed = [], 0
    for module in (checkpoint.layered_folder, checkpoint.hf_folder):
        monkeypatch.setattr(module, "write_tensor_file", lambda *a, **k: (num_written.append(1), write_tensor_file(*a, **k))[1])
    num_files = 0
    for k in range(1000):
        died = killed_at(k, lambda: convert(small_model, target, dtype=dtype))
        num_written.clear()
        if not target.exists():
            convert(small_model, target, dtype=dtype)
        num_files = max(num_files, len(num_written))
        resumed += 0 < len(num_written) < num_files
        assert files_but_the_lock(target.parent) == expected, f"after death at point {k}"
        shutil.rmtree(target.parent)
        if not died:
            break
    assert not died
    assert k > 40, "a conversion has more points than this: are they still seen?"
    assert resumed > 8, "hardly any run continued what the one before had written"


@full
@pytest.mark.usefixtures("no_fsync")
def test_kill_9_twice_still_gives_the_same_bytes(small_model, tmp_path, target):
    convert_to_layers(small_model, tmp_path / "undisturbed" / "folder")
    expected = files(tmp_path / "undisturbed")
    for first in range(12, 50, 12):
        for second in range(0, 40, 6):
            killed_at(first, lambda: convert_to_layers(small_model, target))
            if not target.exists():
                killed_at(second, lambda: convert_to_layers(small_model, target))
            if not target.exists():
                convert_to_layers(small_model, target)
            assert files_but_the_lock(target.parent) == expected, f"after deaths at {first} and {second}"
            shutil.rmtree(target.parent)


@pytest.mark.parametrize("convert", [convert_to_layers, convert_to_hf])
def test_progress_counts_what_was_kept_too(convert, model, target, monkeypatch):
    heard = []

    def listen(*what):
        heard.append(what[-1])
        if len(heard) == 20 and stopping:
            raise KeyboardInterrupt

    stopping = True
    with pytest.raises(KeyboardInterrupt):
        convert(model, target, progress=listen)
    stopping = False
    heard.clear()
    convert(model, target, progress=listen)
    assert sum(heard) == ModelFolder.open(model).num_bytes()


def test_a_disk_that_fills_up_leaves_nothing(model, target, monkeypatch):
    def full(path, sources, **how):
        if path.name.startswith("layer_01"):
            raise OSError(28, "No space left on device", str(path))
        return write_tensor_file(path, sources, **how)

    monkeypatch.setattr(checkpoint.layered_folder, "write_tensor_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        convert_to_layers(model, target)
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize("convert", [convert_to_layers, convert_to_hf])
def test_a_value_too_large_for_fp16_is_named_and_nothing_stays(convert, model, target, tmp_path):
    spoilt = ModelFolder.open(model)
    config = GPTJConfig.from_hf(spoilt.config)
    sources = [TensorSource.of(name, spoilt.read(name).clone()) for name in spoilt.names()]
    next(source for source in sources if "1.mlp.fc_in.bias" in source.name).read()[3] = 70_000
    (tmp_path / "spoilt").mkdir()
    write_tensor_file(tmp_path / "spoilt" / "model.safetensors", sources, relative_to=tmp_path)
    shutil.copy(model / "config.json", tmp_path / "spoilt")
    assert config.num_layers == 2
    with pytest.raises(UserError, match=r"transformer.h.1.mlp.fc_in.bias does not fit fp16: it holds 70000, .* 65504; use bf16"):
        convert(tmp_path / "spoilt", target, dtype=torch.float16)
    assert os.listdir(target.parent) == []
    convert(tmp_path / "spoilt", target, dtype=torch.bfloat16)
    assert all(ModelFolder.open(target).dtype(name) == torch.bfloat16 for name in spoilt.names())
