"""Whatever a file of weights holds, tensors are read rightly or refused in words: also by a file that was made to do harm."""

import io
import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.adapter_folders import adapted, config_of, settings_for
from support.conversions import write_stages
from support.damage import (
    damaged_bytes,
    damaged_json,
    damaged_values,
    fuzz,
    in_little_room,
    put,
    read_model,
    read_or_refuse,
    read_tensors,
    text_of,
)
from support.tiers import partly

from checkpoint.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config, read_adapter, write_adapter
from checkpoint.atomic_folder import JOURNAL_NAME, ResumableFolder
from checkpoint.legacy_folder import write_legacy_folder
from checkpoint.model_folder import ModelFolder
from checkpoint.stage_checkpoints import open_stage_checkpoint
from checkpoint.weight_file import open_weight_file
from modules.stage import stored_name
from user_error import UserError

pytestmark = partly


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-J of one layer in one safetensors file."""
    from support.models import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("fuzzed") / "model"
    make_model(folder, n_layer=1, n_embd=16, n_head=2, vocab_size=320, n_positions=16)
    make_tokenizer(folder)
    return folder


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def refuse_all(path: Path) -> None:
    with pytest.raises(UserError, match=path.name):
        read_tensors(path)


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
    """torch, and our look at the byte order, unpacked parts of any size out of a thousandth of it."""
    path = tmp_path / "x.bin"
    path.write_bytes(rezipped(torch_bytes(TENSORS), changes={name: bytes(100 << 20)}, compression=zipfile.ZIP_DEFLATED))
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
        return torch_bytes(dict(zip(names, entries.values(), strict=False)))

    names = st.lists(st.sampled_from(["", "x", "wte.weight", "h.0.ln_1.weight", "\0", "a" * 300, *entries]), max_size=len(entries))

    def look(content: bytes) -> None:
        put(folder / name, content)
        read_or_refuse(lambda: read_model(folder, name), name, str(folder))

    fuzz(tmp_path / "child", st.one_of(damaged_bytes(good), names.map(renamed)), look, examples=80)


def test_any_stage_of_a_relatives_training_is_read_or_refused(own_model: Path, tmp_path: Path) -> None:
    weights = load_file(own_model / "model.safetensors")
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
