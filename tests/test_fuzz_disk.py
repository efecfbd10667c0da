"""Whatever a file holds that this trainer reads, it is read rightly or refused in words: no other exception, no crash, no code, no loop."""

import io
import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adapter_helpers import adapted, config_of, settings_for
from checkpoint_helpers import adamw_state, loaded_stage, save_step
from converter_helpers import write_stages
from fuzz_helpers import damaged_bytes, damaged_json, damaged_values, fuzz, in_little_room, put, read_or_refuse, text_of
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoint.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config, read_adapter, write_adapter
from checkpoint.atomic_folder import JOURNAL_NAME, ResumableFolder
from checkpoint.companions import read_companions
from checkpoint.job_lock import LOCK_NAME, JobLock, lock_holder, read_lock_token
from checkpoint.legacy_folder import write_legacy_folder
from checkpoint.manifest import MANIFEST, TRAINER_FILE, find_newest_step, read_manifest, verify_step
from checkpoint.model_folder import ModelFolder, check_model_folder, read_json_object
from checkpoint.stage_checkpoints import open_stage_checkpoint
from checkpoint.weight_file import open_weight_file
from modules.families import read_model_config
from modules.stage import stored_name
from training.resuming import check_same_model, find_resume_point
from user_error import UserError

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
    from conftest import make_model, make_tokenizer

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
    job: Any = SimpleNamespace(place=place, store=dist.HashStore(), roster=[{"host_id": "h", "host": "h"}])
    point = find_resume_point(job, root, only=None, hashes=False)
    if point is None:
        return
    assert point.step >= 0 and point.position >= 0
    check_same_model(point, read_model_config(point.config))
    for key in ("embeddings", "layer_00", "lm_head"):
        for name in (f"{key}.safetensors", f"train_state/{key}.safetensors"):
            assert point.provider(name, 0) == 0


def read_model(folder: Path, weights: str) -> None:
    """What every reader of a model does, down to the values."""
    found = ModelFolder.open(folder)
    check_model_folder(found, read_model_config(found.config))
    found.digest()
    found.fingerprint()


def refuse_all(path: Path) -> None:
    with pytest.raises(UserError, match=path.name):
        read_tensors(path)


def read_tensors(path: Path) -> None:
    """Every byte of every tensor."""
    file = open_weight_file(path)
    for name in file.specs:
        values = file.read(name)
        assert values.shape == file.specs[name].shape and values.dtype == file.specs[name].dtype
        values.reshape(-1).contiguous().view(torch.uint8).sum()


# What a run writes for itself


def test_any_manifest_is_read_or_refused(own_run: Path, tmp_path: Path) -> None:
    path = own_run / "1" / MANIFEST
    good = json.loads(path.read_text())

    def look(content: bytes) -> None:
        put(path, content)
        read_or_refuse(lambda: read_manifest(own_run / "1"), MANIFEST)
        verify_step(own_run / "1", hashes=True)
        find_newest_step(own_run)
        read_or_refuse(lambda: resume(own_run), MANIFEST, "safetensors", TRAINER_FILE)

    fuzz(tmp_path / "child", damaged_json(good), look)


def test_any_trainer_file_is_read_or_refused(own_run: Path, tmp_path: Path) -> None:
    step = own_run / "1"

    def look(content: bytes) -> None:
        put(step / TRAINER_FILE, content)
        relist(step, TRAINER_FILE)
        read_or_refuse(lambda: resume(own_run), TRAINER_FILE)

    resume(own_run)
    fuzz(tmp_path / "child", damaged_json(TRAINER), look, examples=250)


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
        with JobLock(root), pytest.raises(UserError, match="one job at a time"):
            path.write_bytes(content)
            assert lock_holder(root)
            JobLock(root).acquire()

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


@st.composite
def safetensors_files(draw: st.DrawFn, original: bytes) -> bytes:
    """The file with a header that says something else, of a length that may be a lie, or with other bytes."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged_bytes(original))
    length = int.from_bytes(original[:8], "little")
    header = text_of(draw(damaged_values(json.loads(original[8 : 8 + length])))).encode()
    said = draw(st.sampled_from([len(header)] * 6 + [0, 1, len(header) - 1, len(header) + 1, 99_999_999, 2**32, 2**60, 2**63, 2**64 - 1]))
    return struct.pack("<Q", said) + header + original[8 + length :]


def test_any_safetensors_file_is_read_or_refused(tmp_path: Path) -> None:
    from safetensors.torch import save

    tensors = {
        "a": torch.ones(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "empty": torch.ones(0, 5),
        "c": torch.ones(2, dtype=torch.bool),
    }
    path = tmp_path / "x.safetensors"

    def look(content: bytes) -> None:
        put(path, content)
        read_or_refuse(lambda: read_tensors(path), path.name)

    fuzz(tmp_path / "child", safetensors_files(save(tensors)), look, examples=400)


@pytest.mark.parametrize("shape", [[0, 2**70], [2**40, 2**40, 0], [2**62, 0], [0, 2**63 - 1, 2]])
def test_an_empty_tensor_of_a_size_that_no_tensor_can_have_is_refused(shape: list[int], tmp_path: Path) -> None:
    """torch.empty overflowed on it, long after the header had been taken for good."""
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match=r"x\.safetensors is damaged.*tensor a"):
        open_weight_file(path)


# torch's files


class RunsCode:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def torch_bytes(content: Any, *, is_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


def rezipped(original: bytes, *, changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The zip with other content in the parts that ``changes`` names by their last part."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(original)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, changes.get(name.rpartition("/")[2], old.read(name)))
    return buffer.getvalue()


def part_of(original: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(original)) as archive:
        return next(archive.read(full) for full in archive.namelist() if full.rpartition("/")[2] == name)


TENSORS = {"a": torch.ones(2, 3), "b": torch.ones(4, 4)[:, 1:3], "c": torch.ones(0, 5)}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_any_torch_file_is_read_or_refused(is_zip: bool, tmp_path: Path) -> None:
    good = torch_bytes(TENSORS, is_zip=is_zip)
    path = tmp_path / "x.bin"
    files = damaged_bytes(good)
    if is_zip:
        pickled = damaged_bytes(part_of(good, "data.pkl")).map(lambda part: rezipped(good, changes={"data.pkl": part}))
        files = st.one_of(files, pickled, pickled)

    def look(content: bytes) -> None:
        put(path, content)
        read_or_refuse(lambda: read_tensors(path), path.name)

    fuzz(tmp_path / "child", files, look, examples=300)


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("elements", [2**20, 2**40, 2**62])
def test_a_torch_file_whose_pickle_claims_more_elements_than_there_are_is_refused(order: str, elements: int, tmp_path: Path) -> None:
    good = torch_bytes({"a": torch.ones(91)})
    changed = part_of(good, "data.pkl").replace(b"K[", b"\x8a\x08" + struct.pack("<q", elements))  # BININT1 91 -> LONG1
    assert changed != part_of(good, "data.pkl")
    changes = {"data.pkl": changed, "byteorder": order.encode()}
    path = tmp_path / "x.bin"
    path.write_bytes(rezipped(good, changes=changes))
    in_little_room(tmp_path / "child", lambda: refuse_all(path))


@pytest.mark.parametrize("name", ["data.pkl", "byteorder", "0"])
def test_a_torch_file_that_unpacks_to_much_more_than_it_is_is_refused_before_that(name: str, tmp_path: Path) -> None:
    """torch, and our look at the byte order, unpacked a part of 600 MB out of 600 KB."""
    path = tmp_path / "x.bin"
    path.write_bytes(rezipped(torch_bytes(TENSORS), changes={name: bytes(600 << 20)}, compression=zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 1 << 20

    def look() -> None:
        with pytest.raises(UserError, match="not as torch writes it"):
            open_weight_file(path)

    in_little_room(tmp_path / "child", look)


@pytest.mark.parametrize("kind", ["zip", "before torch 1.6", "bare pickle", "in a dict", "hidden in a good file"])
def test_no_file_of_weights_runs_code(kind: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "x.bin"
    evil = RunsCode(marker)
    content = {
        "zip": lambda: torch_bytes(evil),
        "before torch 1.6": lambda: torch_bytes(evil, is_zip=False),
        "bare pickle": lambda: pickle.dumps(evil),
        "in a dict": lambda: torch_bytes({**TENSORS, "x": evil}),
        "hidden in a good file": lambda: rezipped(torch_bytes(TENSORS), changes={"data.pkl": pickle.dumps(evil, protocol=2)}),
    }[kind]()
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.bin"):
        open_weight_file(path)
    for name in ("pytorch_embs.pt", "prank_0_checkpoint.pt", "adapter_model.bin", "model.safetensors"):
        put(tmp_path / name, content)
        with pytest.raises(UserError):
            open_weight_file(tmp_path / name)
    assert not marker.exists(), "code was run"


# Layouts of others, and adapters


@pytest.mark.parametrize("name", ["pytorch_0.pt", "pytorch_embs.pt"])
def test_any_layer_shard_is_read_or_refused(name: str, own_model: Path, tmp_path: Path) -> None:
    folder = write_legacy_folder(ModelFolder.open(own_model), tmp_path / "legacy", config_of(own_model))[0].parent
    good = (folder / name).read_bytes()
    entries = {key: value.clone() for key, value in torch.load(folder / name).items()}

    def renamed(names: list[str]) -> bytes:
        return torch_bytes({new: value for new, value in zip(names, entries.values(), strict=False)})

    names = st.lists(st.sampled_from(["", "x", "wte.weight", "h.0.ln_1.weight", "\0", "a" * 300, *entries]), max_size=len(entries))

    def look(content: bytes) -> None:
        put(folder / name, content)
        read_or_refuse(lambda: read_model(folder, name), name, str(folder))

    fuzz(tmp_path / "child", st.one_of(damaged_bytes(good), names.map(renamed)), look, examples=80)


def test_any_stage_of_a_relatives_training_is_read_or_refused(own_model: Path, tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in load_file(own_model / "model.safetensors").items()}
    folder = write_stages("gptj", tmp_path / "stages" / "checkpoint_1", weights, [1])
    path, config = folder / "prank_0_checkpoint.pt", config_of(own_model)
    entries = dict(torch.load(path))
    names = st.lists(st.sampled_from(["", "x", "0.x", "7.x", "99999999999.x", "0.", "00.wte.weight", "999999999.x", *entries]), unique=True)
    renamed = names.map(lambda new: torch_bytes(dict(zip(new, entries.values(), strict=False))))
    latest = st.sampled_from([b"1", b"2", b"", b"\xff", b"9" * 5000, b"-1", "²".encode()])

    def look(example: tuple[bytes, bytes]) -> None:
        put(path, example[0])
        (folder.parent / "latest").write_bytes(example[1])
        read_or_refuse(lambda: open_stage_checkpoint(folder.parent, config), str(folder.parent))

    fuzz(tmp_path / "child", st.tuples(st.one_of(damaged_bytes(path.read_bytes()), renamed), latest), look, examples=100)


def test_any_adapter_is_read_or_refused(own_model: Path, tmp_path: Path) -> None:
    folder, model = tmp_path / "adapter", config_of(own_model)
    folder.mkdir()
    stage = adapted(own_model, settings_for("gptj"))
    adapters = {stored_name(name): parameter.detach() for _, layer in stage.trained_by_layer() for name, parameter in layer}
    write_adapter(folder, adapters, adapter_config(model, settings_for("gptj"), base_model="some/model"))
    config, weights = json.loads((folder / ADAPTER_CONFIG).read_text()), (folder / ADAPTER_WEIGHTS).read_bytes()
    wholes = st.just((json.dumps(config).encode(), weights))
    assert read_adapter(folder, model).weights

    def look(example: tuple[bytes, bytes]) -> None:
        put(folder / ADAPTER_CONFIG, example[0])
        put(folder / ADAPTER_WEIGHTS, example[1])
        read_or_refuse(lambda: [adapter.read(n).sum() for adapter in [read_adapter(folder, model)] for n in adapter.weights], str(folder))

    either = st.one_of(
        st.tuples(damaged_json(config), st.just(weights)), st.tuples(wholes.map(lambda whole: whole[0]), safetensors_files(weights))
    )
    fuzz(tmp_path / "child", either, look, examples=200)


def test_any_journal_of_a_cut_off_conversion_is_continued_or_started_over(tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"abc")
    record = {"name": "a.safetensors", "size": 3, "sha256": "00"}
    header = json.dumps({"format": 1, "plan": "p"}).encode() + b"\n"

    def look(line: bytes) -> None:
        (folder / JOURNAL_NAME).write_bytes(header + line + b"\n")
        (folder / "a.safetensors").write_bytes(b"abc")
        assert ResumableFolder(folder, "p").num_kept in (0, 1)

    fuzz(tmp_path / "child", damaged_json(record), look, examples=150)
