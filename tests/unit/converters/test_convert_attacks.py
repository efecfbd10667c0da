"""What a fresh mind broke in the converters and the checkpoint commands: each is refused in words now, or does not happen."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conversions import NUM_LAYERS, from_hf, make_hf, to_hf, write_stages
from support.ranks import REPOSITORY

import checkpoint.atomic_folder
import checkpoint.gather
import checkpoint.inspect
from checkpoint.atomic_folder import atomic_folder, readable_bytes, resumable_folder
from checkpoint.job_lock import JobLock
from checkpoint.legacy_folder import _write_part
from checkpoint.manifest import read_manifest
from checkpoint.model_folder import read_json_object
from checkpoint.tensor_file import TensorSource
from checkpoint.weight_file import open_weight_file
from converters.to_hf import check_stages, parse_size
from modules.families import read_model_config
from user_error import UserError

DEEP = '{"a":' + "[" * 200_000 + "]" * 200_000 + "}"
SURROGATE = "\ud800"


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setitem(NUM_LAYERS, "gptj", 2)
    make_hf("gptj", tmp_path / "model", dtype=torch.float32, num_layers=2)
    return tmp_path / "model"


def in_child(action):
    """Fork; returns the child's pid. Its exit status is what ``action`` returns, 77 after an exception."""
    child = os.fork()
    if child == 0:
        status = 77
        try:
            status = action()
        finally:
            os._exit(status)
    return child


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def spoil_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def header_of(file):
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_with_header(file, header, data):
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


# Two conversions, and folders of others


def test_a_second_conversion_that_begins_while_the_first_one_renames_does_not_empty_its_folder(model, tmp_path, monkeypatch):
    """The lock lay in the folder and was unlinked before the rename: the second process locked a new one and cleared the folder."""

    def publish_slowly(partial, target):
        (tmp_path / "renaming").touch()
        wait_for(tmp_path / "go on")
        publish(partial, target)

    publish = checkpoint.atomic_folder._publish
    monkeypatch.setattr(checkpoint.atomic_folder, "_publish", publish_slowly)
    first = in_child(lambda: to_hf("gptj", model, tmp_path / "out"))
    wait_for(tmp_path / "renaming")
    assert status_of(in_child(lambda: to_hf("gptj", model, tmp_path / "out"))) == 1
    (tmp_path / "go on").touch()
    assert status_of(first) == 0
    assert {"model.safetensors", "config.json"} <= set(os.listdir(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["go on", "model", "out", "renaming"]


def test_a_lock_whose_file_was_removed_while_it_was_being_opened_is_taken_anew(tmp_path, monkeypatch):
    path = tmp_path / ".x.lock"
    owner = JobLock(tmp_path, path=path).acquire()
    real, opened = os.open, []

    def open_then_lose(*args, **kwargs):
        opened.append(real(*args, **kwargs))
        if len(opened) == 1:
            owner.remove()
            owner.release()
        return opened[-1]

    monkeypatch.setattr(os, "open", open_then_lose)
    with JobLock(tmp_path, path=path):
        assert path.exists(), "the newcomer holds the file that the next one will see"
        assert len(opened) == 2
        with pytest.raises(UserError, match="one job at a time"):
            JobLock(tmp_path, path=path).acquire()


def test_a_target_that_somebody_wrote_before_the_lock_was_had_is_refused(tmp_path, monkeypatch):
    acquire = JobLock.acquire

    def write_and_acquire(self):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
        return acquire(self)

    monkeypatch.setattr(JobLock, "acquire", write_and_acquire)
    with pytest.raises(UserError, match="must be missing or empty"), atomic_folder(tmp_path / "out"):
        pytest.fail("it was not refused")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "link", "dangling link", "file"])
@pytest.mark.parametrize("opened", [atomic_folder, lambda target: resumable_folder(target, plan="p")], ids=["atomic", "resumable"])
def test_what_lies_under_the_partial_name_and_is_not_ours_is_not_touched(kind, opened, tmp_path):
    partial, theirs = tmp_path / ".out.partial", tmp_path / "theirs"
    folder = partial if kind == "folder" else theirs
    folder.mkdir()
    (folder / "thesis").write_text("ten years")
    if "link" in kind:
        partial.symlink_to(theirs if kind == "link" else tmp_path / "nowhere")
    if kind == "file":
        partial.write_text("a file")
    before = sorted(os.listdir(tmp_path))
    for _ in range(2):
        with pytest.raises(UserError, match="in the way and not ours"), opened(tmp_path / "out"):
            pytest.fail("it was not refused")
    assert (folder / "thesis").read_text() == "ten years"
    assert sorted(os.listdir(tmp_path)) == before


def test_what_a_killed_run_left_before_its_journal_is_ours(tmp_path):
    def write_and_die():
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert status_of(in_child(write_and_die)) == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == [".out.partial", ".out.partial.lock"]
    with atomic_folder(tmp_path / "out") as folder:
        assert os.listdir(folder) == []
    assert os.listdir(tmp_path) == ["out"]


# What the system refuses


@pytest.mark.parametrize("more", [[], ["--legacy-layout"]])
def test_a_full_disk_is_explained_in_every_layout(more, model, tmp_path, capfd):
    def convert():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        return from_hf("gptj", model, tmp_path / "out", *more)

    assert status_of(in_child(convert)) == 1
    err = capfd.readouterr().err
    assert "cannot write" in err
    assert "File too large" in err
    assert "Traceback" not in err
    assert os.listdir(tmp_path / "out") == []


def test_a_full_disk_is_explained_where_torch_wraps_what_it_said(tmp_path):
    """Above the size of a file's buffer torch.save raises a RuntimeError of its zip writer around the OSError."""

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(UserError, match=r"cannot write .*out: File too large"), resumable_folder(tmp_path / "out", plan="p") as folder:
            _write_part(folder.path, "pytorch_0.pt", [("x", TensorSource.of("x", torch.zeros(100_000)))])
        return 0

    assert status_of(in_child(write)) == 0
    assert os.listdir(tmp_path) == []


COMMANDS = {
    "from_hf": lambda path, out: from_hf("gptj", path, out),
    "to_hf": lambda path, out: to_hf("gptj", path, out / "x"),
    "gather": lambda path, out: checkpoint.gather.main([str(path), "--out", str(out)]),
    "inspect": lambda path, out: checkpoint.inspect.main([str(path)]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("locked", ["source", "parent"])
@pytest.mark.skipif(os.geteuid() != 0, reason="needs a user to become nobody")
def test_a_folder_that_may_not_be_entered_is_named(command, locked, model, tmp_path, capfd):
    def as_nobody():
        os.setgroups([])
        os.setresuid(65534, 65534, 65534)
        return COMMANDS[command](tmp_path / "up" / "model", tmp_path / "open" / "out")

    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o755)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "up").mkdir()
    shutil.move(model, tmp_path / "up")
    (tmp_path / "up" / ("model" if locked == "source" else "")).chmod(0o700)
    assert status_of(in_child(as_nobody)) == 1
    err = capfd.readouterr().err
    assert "cannot be read or entered: Permission denied" in err
    assert str(tmp_path / "up") in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["a" * 300, "~nobody-of-this-name/x"])
def test_a_path_that_cannot_be_is_refused(command, name, tmp_path, capsys):
    assert COMMANDS[command](Path(name), tmp_path) == 1
    assert ("File name too long" if name[0] == "a" else "home folder") in capsys.readouterr().err


@pytest.mark.parametrize("script", ["convert_from_hf_gptj", "convert_from_hf_gptneox", "convert_to_hf_gptj", "convert_to_hf_gptneox"])
def test_ctrl_c_while_a_script_is_importing_says_stopped(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, str(REPOSITORY / f"{script}.py")], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (130, "stopped\n")


@pytest.mark.parametrize("module", [checkpoint.gather, checkpoint.inspect])
def test_ctrl_c_in_a_command_says_stopped(module, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, module.__name__.rpartition(".")[2], stop)
    more = ["--out", str(tmp_path)] if module is checkpoint.gather else []
    assert module.main([str(tmp_path), *more]) == 130
    assert capsys.readouterr().err == "stopped\n"


# Files of strangers


def overlap(header):
    names = [name for name in header if name != "__metadata__" and header[name]["shape"] == [16]]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]


def hole(header):
    for name in header:
        if name != "__metadata__":
            header[name]["data_offsets"] = [offset + 4 for offset in header[name]["data_offsets"]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (overlap, "must lie one after the other"),
        (hole, "must lie one after the other"),
        (lambda header: header["transformer.ln_f.weight"].update(dtype=["F32"]), "does not describe the tensor"),
        (lambda header: header.update({SURROGATE: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), r"the tensor \\ud800 "),
        (lambda header: json.dumps(header)[:-1] + ',"transformer.ln_f.weight":{}}', "names 'transformer.ln_f.weight' twice"),
        (lambda header: DEEP, "header cannot be read"),
    ],
)
def test_a_safetensors_header_that_is_not_one_is_refused(spoil, message, model):
    header, data = header_of(model / "model.safetensors")
    write_with_header(model / "model.safetensors", spoil(header) or header, data + b"0000" * (spoil is hole))
    with pytest.raises(UserError, match=message):
        open_weight_file(model / "model.safetensors")


def test_json_that_is_nested_deeply_or_a_pipe_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text(DEEP)
    with pytest.raises(UserError, match="nested too deeply"):
        read_json_object(tmp_path / "deep.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="is a pipe or a device"):
        read_json_object(tmp_path / "pipe.json")


@pytest.mark.parametrize("name", ["a\0b", SURROGATE, "", ".", "a" * 300, "x/" + "é" * 200])
def test_names_that_are_none_are_refused_in_manifest_and_index(name, model, capsys):
    files = {"files": {name: {"size": 1, "sha256": "x"}}}
    (model / "manifest.json").write_text(json.dumps({"format": 2, "step": None, "position": None, **files}))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        read_manifest(model)
    (model / "manifest.json").unlink()
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert checkpoint.inspect.main([str(model)]) == 1
    assert "must hold a weight_map" in capsys.readouterr().out


def test_a_layer_number_of_thousands_of_digits_is_an_unknown_tensor(model, tmp_path, capsys):
    weights = load_file(model / "model.safetensors")
    save_file(weights | {f"transformer.h.{'1' * 5000}.attn.bias": torch.zeros(1)}, model / "model.safetensors")
    assert from_hf("gptj", model, tmp_path / "out") == 1
    assert "extra (1)" in capsys.readouterr().err


@pytest.mark.parametrize("key", [f"{'1' * 5000}.ln_1.weight", "999999999.ln_1.weight"])
def test_a_huge_position_in_a_stage_is_refused_at_once(key, model, tmp_path, capsys):
    step = write_stages("gptj", tmp_path / "5", load_file(model / "model.safetensors"), [1, 1])
    torch.save(torch.load(step / "prank_0_checkpoint.pt") | {key: torch.zeros(1)}, step / "prank_0_checkpoint.pt")
    started = time.monotonic()
    assert to_hf("gptj", step, tmp_path / "out", "--config-name", str(model)) == 1
    assert time.monotonic() - started < 20
    err = capsys.readouterr().err
    assert "prank_0_checkpoint.pt must hold" in err
    assert len(err) < 10_000


def test_a_huge_stage_number_is_refused_at_once(model, tmp_path, capsys):
    step = write_stages("gptj", tmp_path / "5", load_file(model / "model.safetensors"), [1, 1])
    (step / "prank_1_checkpoint.pt").rename(step / "prank_999999999_checkpoint.pt")
    assert to_hf("gptj", step, tmp_path / "out", "--config-name", str(model)) == 1
    assert len(capsys.readouterr().err) < 1000


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", 2**62), ("vocab_size", 2**64), ("n_embd", 10**12), ("n_layer", 10**7), ("n_positions", 2**31)]
)
def test_sizes_that_no_model_has_are_refused(key, value, model):
    spoil_config(model, **{key: value})
    with pytest.raises(UserError, match=f"{key} {value} .a whole number of at most"):
        read_model_config(read_json_object(model / "config.json"))


def test_the_largest_sizes_that_are_let_through_make_a_model_that_can_be_compared(model, capsys):
    spoil_config(model, vocab_size=2**28, n_embd=2**28)
    assert checkpoint.inspect.main([str(model)]) == 1
    assert "wrong shape" in capsys.readouterr().out


def test_numbers_of_hundreds_of_digits_on_the_command_line_are_refused():
    with pytest.raises(UserError, match="positive number of bytes"):
        parse_size("9" * 400)
    with pytest.raises(UserError, match="at most 30 stages"):
        check_stages(28, (14, 14), 10**12, 1)


def test_stages_of_two_runs_with_two_dtypes_are_refused(model, tmp_path, capsys):
    weights = load_file(model / "model.safetensors")
    step = write_stages("gptj", tmp_path / "5", weights, [1, 1])
    write_stages("gptj", tmp_path / "half", {name: tensor.half() for name, tensor in weights.items()}, [1, 1])
    shutil.copy(tmp_path / "half" / "prank_1_checkpoint.pt", step)
    assert to_hf("gptj", step, tmp_path / "out", "--config-name", str(model)) == 1
    err = capsys.readouterr().err
    assert "stages of two runs lie in one folder" in err
    for text in (f"torch.float32 in {step / 'prank_0_checkpoint.pt'}", f"torch.float16 in {step / 'prank_1_checkpoint.pt'}"):
        assert text in err


def test_a_stage_file_with_another_spelling_of_its_number_is_not_taken(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    step = write_stages("gptj", tmp_path / "5", weights, [1, 1])
    write_stages("gptj", tmp_path / "later", {name: tensor + 1 for name, tensor in weights.items()}, [1, 1])
    for spelling in ("01", "\u0661"):
        shutil.copy(tmp_path / "later" / "prank_1_checkpoint.pt", step / f"prank_{spelling}_checkpoint.pt")
    assert to_hf("gptj", step, tmp_path / "out", "--config-name", str(model)) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())


class Malice:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_with_code_is_not_run_and_nobody_is_advised_to(is_zip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Malice()}, "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match="it contains something other than tensors; its code was not run") as caught:
        open_weight_file(Path("pytorch_model.bin"))
    assert "weights_only" not in str(caught.value)
    assert os.listdir() == ["pytorch_model.bin"]


# What is said


@pytest.mark.parametrize("convert", [from_hf, to_hf])
def test_the_next_command_can_be_pasted_whatever_the_folder_is_called(convert, model, tmp_path, capsys):
    odd = tmp_path / 'it\'s "mine" & $HOME'
    source = shutil.copytree(model, tmp_path / "in" / odd.name)
    assert convert("gptj", source, odd) == 0
    command = capsys.readouterr().out.rstrip().rpartition("\n  ")[2]
    shown = subprocess.run(["bash", "-c", f"python() {{ printf '%s\\n' \"$@\"; }}; {command}"], capture_output=True, text=True)
    if convert is from_hf:
        assert f"--model-name\n{odd / odd.name}\n" in shown.stdout
        assert f"--checkpoint-path\nmodel_checkpoints/{odd.name}\n" in shown.stdout
    else:
        code = shown.stdout.partition("\n")[2]
        called = []
        exec(code.partition("; ")[2], {"pipeline": lambda task, path: called.append(path) or (lambda text: text)})
        assert called == [str(odd)]


def test_sizes_are_said_in_units_that_fit(tmp_path, monkeypatch):
    assert [readable_bytes(n) for n in (0, 812, 812_000, 12_300_000, 5 * 10**9)] == ["0 B", "812 B", "812 kB", "12.3 MB", "5 GB"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 400_000))
    with pytest.raises(UserError, match="needs 812 kB and its disk has 400 kB free"), atomic_folder(tmp_path / "out", num_bytes=812_000):
        pytest.fail("it was not refused")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_8_bit_weights_that_are_not_finite_are_named(number, model, tmp_path, capsys):
    weights = load_file(model / "model.safetensors")
    name = "transformer.h.1.mlp.fc_in"
    absmax = torch.full((-(-weights[f"{name}.weight"].numel() // 4096),), number)
    indices = torch.zeros(weights[f"{name}.weight"].shape, dtype=torch.uint8)
    triple = {f"{name}.weight": indices, f"{name}.absmax": absmax, f"{name}.code": torch.linspace(-1, 1, 256)}
    (model / "model.safetensors").unlink()
    torch.save(weights | triple, model / "pytorch_model.bin")
    assert from_hf("gptj", model, tmp_path / "out", "--dtype", "fp32") == 1
    assert f"{name}.absmax in {model / 'pytorch_model.bin'} holds numbers that are not finite" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == []


def test_a_step_whose_manifest_calls_it_a_model_is_not_complete(model, tmp_path, capsys):
    assert from_hf("gptj", model, tmp_path / "out") == 0
    folder = tmp_path / "out" / "model"
    assert checkpoint.inspect.main([str(folder)]) == 0
    (folder / "train_state").mkdir()
    capsys.readouterr()
    assert checkpoint.inspect.main([str(folder)]) == 1
    assert "calls it a model folder, without training state" in capsys.readouterr().out
