"""Hosts without a shared disk: their folders become one step again, or one sentence says why not and nothing is written."""

import json
import shutil

import pytest
import torch
from support.checkpoints import TOKENS, hf_model, same_bytes, tensors_of
from support.checkpoints_on_hosts import make_source, save_on_hosts
from transformers import AutoModelForCausalLM

from checkpoint import gather as gather_module
from checkpoint.gather import main
from checkpoint.job_lock import JobLock
from checkpoint.manifest import find_newest_step, read_manifest, verify_step
from checkpoint.tensor_file import copy_file


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two hosts' roots with the steps 100 and 200, never changed."""
    base = tmp_path_factory.mktemp("saved")
    source = make_source(base / "model")
    for step in (100, 200):
        save_on_hosts(base, step, source, position=64 * step, num_updates=step // 100)
    return base


@pytest.fixture
def hosts(saved, tmp_path):
    """A copy to damage: (root of host A, root of host B)."""
    for name in ("hostA", "hostB"):
        shutil.copytree(saved / name, tmp_path / name)
    return tmp_path / "hostA", tmp_path / "hostB"


def run(capsys, *arguments):
    """(exit status, stdout, stderr)"""
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def refused(capsys, out, *arguments):
    """The one line of an error that has left nothing behind."""
    before = sorted(out.parent.rglob("*"))
    status, _, err = run(capsys, *arguments, "--out", out)
    assert status == 1
    assert sorted(out.parent.rglob("*")) == before
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and err.splitlines()[-1] == errors[0]
    return errors[0]


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def merged_tensors(hosts, step):
    return tensors_of(hosts[0] / str(step)) | tensors_of(hosts[1] / str(step))


def test_from_pretrained_reads_the_gathered_step_and_computes_what_was_saved(hosts, tmp_path, capsys):
    status, out, err = run(capsys, *hosts, "--out", tmp_path / "all", "--step", "100")
    assert (status, err) == (0, "")
    step = tmp_path / "all" / "100"
    assert f"wrote {step}" in out and "named by its step" in out and f"--checkpoint-path {tmp_path / 'all'}" in out
    model = hf_model(3)
    model.load_state_dict(merged_tensors(hosts, 100))
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(step)(TOKENS).logits, model(TOKENS).logits)
    assert same_bytes(tensors_of(step / "train_state"), merged_tensors((hosts[0] / "100", hosts[1] / "100"), "train_state"))
    assert (step / "tokenizer.json").exists() and not (step / ".lock").exists()


def test_the_gathered_manifest_is_that_of_a_run_with_one_disk(hosts, tmp_path, capsys):
    run(capsys, *hosts, "--out", tmp_path / "all")
    manifest = read_manifest(tmp_path / "all" / "200")
    assert (manifest.step, manifest.position, dict(manifest.elsewhere)) == (200, 12800, {})
    assert set(manifest.here) == set(read_manifest(hosts[0] / "200").everywhere)
    assert verify_step(tmp_path / "all" / "200", hashes=True) == []
    assert find_newest_step(tmp_path / "all") == (tmp_path / "all" / "200", [])


def test_step_folders_and_a_target_named_by_the_step_are_taken_as_they_are(hosts, tmp_path, capsys):
    status, out, _ = run(capsys, hosts[0] / "100", hosts[1], "--out", tmp_path / "all" / "100")
    assert status == 0 and "gathering step 100" in out and "named by its step" not in out
    assert verify_step(tmp_path / "all" / "100", hashes=True) == []


def test_without_step_the_newest_whole_one_is_taken_and_the_newer_one_is_explained(hosts, tmp_path, capsys):
    (hosts[1] / "200" / "layer_02.safetensors").unlink()
    status, out, err = run(capsys, *hosts, "--out", tmp_path / "all")
    assert status == 0 and "gathering step 100 (the newest whole one)" in out
    assert err.startswith("warning: passed over step 200: missing (1): layer_02.safetensors") and str(hosts[1] / "200") in err
    assert find_newest_step(tmp_path / "all")[0] == tmp_path / "all" / "100"


def test_newest_means_by_sequences_and_not_by_number(saved, hosts, tmp_path, capsys):
    """A run resumed with other accumulation counts its steps in other units."""
    save_on_hosts(tmp_path, 50, saved / "model", position=100_000, num_updates=3)
    _, out, err = run(capsys, *hosts, "--out", tmp_path / "all")
    assert "gathering step 50 " in out and err == ""


def test_a_host_that_died_before_its_last_rename_has_saved_all_the_same(saved, tmp_path, capsys):
    save_on_hosts(tmp_path, 300, saved / "model", position=9, commits=1)
    status, out, _ = run(capsys, tmp_path / "hostA", tmp_path / "hostB", "--out", tmp_path / "all")
    assert status == 0 and ".300.partial" in out
    assert verify_step(tmp_path / "all" / "300", hashes=True) == []


def test_a_plain_copy_of_all_hosts_into_one_folder_is_gathered_too(hosts, tmp_path, capsys):
    merged = tmp_path / "merged" / "100"
    for host in hosts:
        shutil.copytree(host / "100", merged, dirs_exist_ok=True)
    assert run(capsys, merged, "--out", tmp_path / "all")[0] == 0
    assert dict(read_manifest(tmp_path / "all" / "100").elsewhere) == {}


@pytest.mark.parametrize("damage", [flip_a_byte, lambda path: path.write_bytes(path.read_bytes()[:100])], ids=["flipped", "truncated"])
def test_a_damaged_copy_is_replaced_by_a_good_one_with_a_warning(damage, hosts, tmp_path, capsys):
    shutil.copytree(hosts[0] / "100", tmp_path / "again")
    damage(hosts[0] / "100" / "layer_01.safetensors")
    status, _, err = run(capsys, hosts[0] / "100", hosts[1], tmp_path / "again", "--out", tmp_path / "all")
    assert status == 0
    assert err.startswith("warning: layer_01.safetensors ") and str(hosts[0] / "100") in err and len(err.splitlines()) == 1
    assert verify_step(tmp_path / "all" / "100", hashes=True) == []


def test_an_unreadable_manifest_costs_a_warning_where_another_host_vouches_for_the_files(hosts, tmp_path, capsys):
    (hosts[1] / "100" / "manifest.json").write_text("{")
    status, _, err = run(capsys, hosts[0] / "100", hosts[1] / "100", "--out", tmp_path / "all")
    assert status == 0 and "manifest.json is not valid JSON" in err and err.startswith("warning: ")
    assert verify_step(tmp_path / "all" / "100", hashes=True) == []


def test_a_flipped_byte_without_another_copy_is_refused(hosts, tmp_path, capsys):
    flip_a_byte(hosts[1] / "200" / "train_state" / "lm_head.safetensors")
    error = refused(capsys, tmp_path / "all", *hosts)
    assert "train_state/lm_head.safetensors is damaged" in error and str(hosts[1] / "200") in error and "--step" in error


def test_a_truncated_file_without_another_copy_is_refused(hosts, tmp_path, capsys):
    (hosts[0] / "100" / "layer_00.safetensors").write_bytes(b"short")
    error = refused(capsys, tmp_path / "all", *hosts, "--step", "100")
    assert "damaged (1): layer_00.safetensors has 5 bytes" in error and str(hosts[0] / "100") in error


def test_a_host_that_was_not_given_is_named_by_its_stage_and_files(hosts, tmp_path, capsys):
    error = refused(capsys, tmp_path / "all", hosts[0] / "100")
    assert "missing from every given folder (4): layer_02.safetensors, lm_head.safetensors, train_state/" in error
    assert "the host that ran stage 1 (of 0 to 1)" in error


def change_sha(content):
    content["files"]["layer_00.safetensors"]["sha256"] = "0" * 64


DISAGREEMENTS = {
    "contents": (change_sha, "layer_00.safetensors"),
    "size": (lambda content: content["files"]["layer_01.safetensors"].update(size=5), "layer_01.safetensors"),
    "step": (lambda content: content.update(step=7), "is step 7"),
    "position": (lambda content: content.update(position=1), "after 1 sequences"),
    "configuration": (lambda content: content["files"]["config.json"].update(size=5), "cp -r"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_folders_of_two_runs_are_told_apart(case, hosts, tmp_path, capsys):
    change, named = DISAGREEMENTS[case]
    edit(hosts[0] / "100" / "manifest.json", change)
    error = refused(capsys, tmp_path / "all", hosts[0] / "100", hosts[1] / "100")
    assert "not of the same run" in error and named in error
    assert str(hosts[0] / "100") in error and str(hosts[1] / "100") in error


def test_every_wrong_argument_has_its_own_message_and_changes_nothing(saved, hosts, tmp_path, capsys):
    a, b = hosts
    (empty := tmp_path / "empty").mkdir()
    (full := tmp_path / "full" / "100").mkdir(parents=True)
    (full / "mine.txt").write_text("mine")
    out = tmp_path / "all"
    assert "there is no folder" in refused(capsys, out, a, tmp_path / "nowhere")
    assert f"{empty} holds neither a step" in refused(capsys, out, a, empty)
    assert "holds step 300; they hold 100, 200" in refused(capsys, out, a, b, "--step", "300")
    assert "is a model folder" in refused(capsys, out, a, as_model(tmp_path / "model", saved))
    assert "--step is 200 and" in refused(capsys, out, a / "100", b, "--step", "200")
    assert "named by another step" in refused(capsys, tmp_path / "7", a, b)
    assert "must be missing or empty" in refused(capsys, tmp_path / "full", a, b, "--step", "100")
    assert "holds a model (config.json)" in refused(capsys, tmp_path / "model", a, b)
    (a / "100" / "manifest.json").unlink()
    assert "no given folder has a manifest.json" in refused(capsys, out, a / "100")


@pytest.mark.parametrize("entry", [{"step": -1}, {"step": "../100"}, {"step": 1.5}, {"position": "x"}], ids=str)
def test_a_manifest_with_a_nonsensical_step_never_decides_where_to_write(entry, hosts, tmp_path, capsys):
    for host in hosts:
        edit(host / "100" / "manifest.json", lambda content: content.update(entry))
    assert "manifest.json is damaged: it does not say step" in refused(capsys, tmp_path / "all", hosts[0] / "100", hosts[1] / "100")


def as_model(folder, saved):
    shutil.copytree(saved / "model", folder)
    (folder / "manifest.json").write_text('{"format": 2, "step": null, "position": null, "files": {}, "elsewhere": {}}')
    return folder


def test_a_root_that_a_job_is_writing_into_is_left_alone(hosts, tmp_path, capsys):
    (tmp_path / "all").mkdir()
    with JobLock(tmp_path / "all"):
        assert "is held by process" in refused(capsys, tmp_path / "all", *hosts)
    assert run(capsys, *hosts, "--out", tmp_path / "all")[0] == 0


def test_a_newer_step_beside_the_gathered_one_is_pointed_out(hosts, tmp_path, capsys):
    assert run(capsys, *hosts, "--out", tmp_path / "all")[2] == ""
    assert "also holds 200, which is newer" in run(capsys, *hosts, "--out", tmp_path / "all", "--step", "100")[2]


def test_a_full_disk_is_no_damaged_copy(hosts, tmp_path, capsys, monkeypatch):
    def full(source, path, *, relative_to):
        if source.name == "layer_02.safetensors":
            raise OSError(28, "No space left on device")
        return copy_file(source, path, relative_to=relative_to)

    monkeypatch.setattr(gather_module, "copy_file", full)
    (tmp_path / "deep").mkdir()
    error = refused(capsys, tmp_path / "deep" / "all" / "100", *hosts, "--step", "100")
    assert "No space left on device" in error and "good copy" not in error


def test_a_file_that_vanishes_while_it_is_copied_is_a_missing_copy(hosts, tmp_path, capsys, monkeypatch):
    def vanishing(source, path, *, relative_to):
        if source.name == "layer_02.safetensors":
            source.unlink(missing_ok=True)
        return copy_file(source, path, relative_to=relative_to)

    monkeypatch.setattr(gather_module, "copy_file", vanishing)
    status, _, err = run(capsys, *hosts, "--out", tmp_path / "all")
    assert status == 1 and "layer_02.safetensors" in err and not (tmp_path / "all").exists()
