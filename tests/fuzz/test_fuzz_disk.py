"""Whatever a file holds that this trainer reads, it is read rightly or refused in words: no other exception, no crash, no code, no loop."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.checkpoints import adamw_state, loaded_stage, save_step
from support.damage import (
    damaged_bytes,
    damaged_json,
    fuzz,
    put,
    read_model,
    read_or_refuse,
    read_tensors,
)
from support.tiers import partly

from checkpoint.companions import read_companions
from checkpoint.job_lock import LOCK_NAME, JobLock, lock_holder, read_lock_token
from checkpoint.manifest import MANIFEST, TRAINER_FILE, find_newest_step, read_manifest, verify_step
from checkpoint.model_folder import ModelFolder, read_json_object
from modules.families import read_model_config
from training.checkpoints.discovery import check_same_model, find_resume_point
from user_error import UserError

pytestmark = partly

INDEX = "model.safetensors.index.json"
FLAGS = {
    "train": "all",
    "lora_target_modules": "all-linear",
    "optimizer": "adamw",
    "fp16": False,
    "dropout": 0.0,
    "base_quantization": "none",
}
DATA = {
    "next_sequence_index": 8,
    "seed": 1,
    "tasks": [
        {"path": "a.jsonl", "num_bytes": 100, "pass": 0, "position": 3, "token_offset": 2, "tokens": 9, "records": 4, "skipped_records": 0}
    ],
}
TRAINER = {
    "format": 2,
    "step": 1,
    "position": 8,
    "optimizer_step": 1,
    "num_skipped": 0,
    "num_threads": 1,
    "run_token": "a1",
    "base_model": None,
    "sequences_per_step": 8,
    "data_identity": {"--task-name": ["a"], "tokenizer": "ab"},
    "flags": FLAGS,
    "data": DATA,
    "loss_scale": {"value": 1.0, "good_steps": 0, "overflows_left": 0, "settings": None},
    "probe": {
        "loss": (1.5).hex(),
        "grad_norm": (0.5).hex(),
        "tokens_sha256": "00",
        "data_before": DATA,
        "bits_depend_on": {"device": "cpu"},
    },
    "best": {"step": 1, "metric": "loss", "value": 1.0, "loss": 1.0, "data": "00"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-J of one layer in one safetensors file."""
    from support.models import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("fuzzed") / "model"
    make_model(folder, n_layer=1, n_embd=16, n_head=2, vocab_size=320, n_positions=16)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --checkpoint-path with one step."""
    root = tmp_path_factory.mktemp("fuzzed") / "run"
    root.mkdir()
    stage = loaded_stage(model)
    step = save_step(root, 1, model, stage, adamw_state(stage, 1), position=8)
    put(step / TRAINER_FILE, json.dumps(TRAINER).encode())
    relist(step, TRAINER_FILE)
    return root


def relist(step: Path, name: str) -> None:
    """Let the manifest say the size that the file ``name`` has."""
    manifest = json.loads((step / MANIFEST).read_text())
    manifest["files"][name]["size"] = (step / name).stat().st_size
    put(step / MANIFEST, json.dumps(manifest).encode())


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def resume(root: Path) -> None:
    """What a job of one rank does with the checkpoints it finds, up to the tensors."""
    place = SimpleNamespace(rank=0, world_size=1)
    job: Any = SimpleNamespace(
        place=place, store=dist.HashStore(), roster=[{"host_id": "h", "host": "h"}], model_config=SimpleNamespace(hf_model_type="gptj")
    )
    point = find_resume_point(job, root, only=None, hashes=False)
    if point is None:
        return
    assert point.step >= 0 and point.position >= 0
    check_same_model(point, read_model_config(point.config))
    for key in ("embeddings", "layer_00", "lm_head"):
        for name in (f"{key}.safetensors", f"train_state/{key}.safetensors"):
            assert point.provider(name, 0) == 0


# What a run writes for itself


def test_any_manifest_is_read_or_refused(own_run: Path, tmp_path: Path) -> None:
    path = own_run / "1" / MANIFEST
    good = json.loads(path.read_text())

    def look(content: bytes) -> None:
        put(path, content)
        read_or_refuse(lambda: read_manifest(own_run / "1"), MANIFEST)
        verify_step(own_run / "1", hashes=True)
        find_newest_step(own_run)
        read_or_refuse(lambda: resume(own_run), ".json", "safetensors")  # the manifest, or a file that it is wrong about

    fuzz(tmp_path / "child", damaged_json(good), look)


def test_any_trainer_file_is_read_or_refused(own_run: Path, tmp_path: Path) -> None:
    step = own_run / "1"

    def look(content: bytes) -> None:
        put(step / TRAINER_FILE, content)
        relist(step, TRAINER_FILE)
        read_or_refuse(lambda: resume(own_run), TRAINER_FILE)

    resume(own_run)
    fuzz(tmp_path / "child", damaged_json(TRAINER), look, examples=250)


@pytest.mark.parametrize("name", [TRAINER_FILE, "config.json", "layer_00.safetensors", "train_state/lm_head.safetensors"])
def test_a_step_whose_manifest_forgot_a_file_is_refused_by_its_name(name: str, own_run: Path) -> None:
    """Nobody sees such a file, and the lowest rank of none was asked for."""
    manifest = json.loads((own_run / "1" / MANIFEST).read_text())
    del manifest["files"][name]
    put(own_run / "1" / MANIFEST, json.dumps(manifest).encode())
    with pytest.raises(UserError, match=f"manifest.*{name}"):
        resume(own_run)


DEFECTS: dict[str, Any] = {
    "step": None,
    "position": -1,
    "optimizer_step": "1",
    "num_skipped": True,
    "sequences_per_step": 1.5,
    "num_threads": 2**70,
    "data": [],
    "data_identity": None,
    "flags": {"lora_target_modules": 7},
    "probe": {"loss": "x"},
    "best": {"data": "0", "new": 1},
    "loss_scale": {"value": 1e999, "good_steps": 1, "overflows_left": 0, "settings": None},
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_trainer_file_without_what_a_resume_looks_at_is_refused_by_the_entrys_name(name: str, own_run: Path) -> None:
    """Each of these was a KeyError or TypeError somewhere behind the reading, on one rank, with the others waiting."""
    put(own_run / "1" / TRAINER_FILE, json.dumps({**TRAINER, name: DEFECTS[name]}).encode())
    relist(own_run / "1", TRAINER_FILE)
    with pytest.raises(UserError, match=rf"trainer\.json is damaged.*under {name}"):
        resume(own_run)


def test_what_older_versions_wrote_into_trainer_json_is_still_read(own_run: Path) -> None:
    older = {**TRAINER, "loss_scale": 1.0, "best": {"step": 1, "metric": "loss", "value": 1.0}, "probe": None}
    put(own_run / "1" / TRAINER_FILE, json.dumps(older).encode())
    relist(own_run / "1", TRAINER_FILE)
    resume(own_run)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"pid": "' + b"9" * 100_000 + b'"}', b"\xff", b""])
def test_a_lock_file_of_nonsense_is_a_lock_all_the_same(content: bytes, tmp_path: Path) -> None:
    """Its owner's name is only for the message, where brackets without end were a RecursionError."""
    with JobLock(tmp_path):
        (tmp_path / LOCK_NAME).write_bytes(content)
        assert read_lock_token(tmp_path) is None
        assert not read_or_refuse(JobLock(tmp_path).acquire, "has not yet written its name")


def test_any_file_of_training_state_is_read_or_refused(own_run: Path, tmp_path: Path) -> None:
    path = own_run / "1" / "train_state" / "lm_head.safetensors"

    def look(content: bytes) -> None:
        put(path, content)
        read_or_refuse(lambda: read_tensors(path), path.name)

    fuzz(tmp_path / "child", damaged_bytes(path.read_bytes()), look)


def test_any_lock_file_is_read_as_somebodys_or_nobodys(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    owner = {"host": "h", "pid": 1, "user": "u", "started_at": "2026-01-01T00:00:00+00:00", "token": "ab"}

    def look(content: bytes) -> None:
        path = root / LOCK_NAME
        path.write_bytes(content)
        assert read_lock_token(root) is None or isinstance(read_lock_token(root), str)
        assert lock_holder(root) is None
        with JobLock(root):
            path.write_bytes(content)
            assert lock_holder(root)
            assert not read_or_refuse(JobLock(root).acquire, "one job at a time")

    fuzz(tmp_path / "child", damaged_json(owner), look)
    for nothing in (root / LOCK_NAME).unlink, (root / LOCK_NAME).mkdir:
        nothing()
        assert read_lock_token(root) is None


def test_any_small_json_file_is_an_object_or_refused(tmp_path: Path) -> None:
    """.run.json, generation_config.json and whatever else is read as such."""
    path = tmp_path / ".run.json"

    def look(content: bytes) -> None:
        put(path, content)
        read_or_refuse(lambda: json.dumps(read_json_object(path)), path.name)

    fuzz(tmp_path / "child", damaged_json({"token": "ab", "run_id": "x", "agent": 1, "supervisor": None}), look)


# Models


def test_any_configuration_of_a_model_is_read_or_refused(own_model: Path, tmp_path: Path) -> None:
    path = own_model / "config.json"
    good = json.loads(path.read_text())

    def look(content: bytes) -> None:
        put(path, content)
        read_or_refuse(lambda: read_model(own_model, path.name), path.name)
        read_or_refuse(lambda: ModelFolder.open_config(own_model), path.name)

    fuzz(tmp_path / "child", damaged_json(good), look, examples=200)


def test_any_configuration_of_a_gptneox_is_read_or_refused(neox_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    good = json.loads((neox_folder / "config.json").read_text())

    def look(content: bytes) -> None:
        put(path, content)
        read_or_refuse(lambda: read_companions([tmp_path], dtypes=[torch.float32]), path.name)
        read_or_refuse(lambda: read_model_config(read_json_object(path)), path.name)

    fuzz(tmp_path / "child", damaged_json(good), look, examples=200)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_any_file_of_a_tokenizer_is_copied_or_refused_by_the_converters(name: str, own_model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eos_token": {"content": "<|endoftext|>"}, "pad_token": None}
    tokenizer = {"model": {"vocab": {"<|padding|>": 5, "<|endoftext|>": 1}}, "added_tokens": [{"id": 0, "content": "<|endoftext|>"}]}
    put(own_model / "tokenizer_config.json", json.dumps(settings).encode())
    put(own_model / "tokenizer.json", json.dumps(tokenizer).encode())

    def look(content: bytes) -> None:
        put(own_model / name, content)
        read_or_refuse(lambda: read_companions([own_model], dtypes=[torch.float32], with_padding=True), name)

    fuzz(tmp_path / "child", damaged_json(tokenizer if name == "tokenizer.json" else settings), look)


def test_any_index_is_read_or_refused(own_run: Path, tmp_path: Path) -> None:
    step = own_run / "1"
    good = json.loads((step / INDEX).read_text())

    def look(content: bytes) -> None:
        put(step / INDEX, content)
        read_or_refuse(lambda: read_model(step, INDEX), INDEX, "step's", "safetensors", str(step))

    fuzz(tmp_path / "child", damaged_json(good), look, examples=120)
