"""The safetensors writer against the safetensors package, and what its records promise."""

import hashlib
import json
import os
import weakref

import numpy as np
import pytest
import torch
from checkpoint_helpers import as_bytes, same_bytes
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint.tensor_file import TensorSource, explained_disk_errors, write_json_file, write_tensor_file
from checkpoint.weight_file import open_weight_file
from user_error import UserError

TENSORS = {
    "half": torch.randn(3, 5).half(),
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(7.25),
    "transposed": torch.randn(4, 6).t(),
    "brain": torch.randn(2, 2).bfloat16(),
    "nothing": torch.empty(0, 4),
    "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    "count": torch.arange(5),
}


def write(path, tensors=TENSORS):
    return write_tensor_file(path, [TensorSource.of(name, tensor) for name, tensor in tensors.items()], relative_to=path.parent)


def test_the_safetensors_package_reads_what_was_written_bit_for_bit(tmp_path):
    write(tmp_path / "a.safetensors")
    assert same_bytes(load_file(tmp_path / "a.safetensors"), TENSORS)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_safetensors_package_writes_is_read_bit_for_bit(tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "a.safetensors")
    file = open_weight_file(tmp_path / "a.safetensors")
    assert same_bytes({name: file.read(name) for name in file.specs}, TENSORS)


def test_data_starts_64_byte_aligned_and_every_tensor_at_its_dtype(tmp_path):
    write(tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 64 == 0
    header = json.loads(data[8 : 8 + length])
    assert all(entry["data_offsets"][0] % TENSORS[name].dtype.itemsize == 0 for name, entry in header.items() if name != "__metadata__")


def test_the_record_holds_name_size_and_sha256_of_the_file(tmp_path):
    (tmp_path / "train_state").mkdir()
    path = tmp_path / "train_state" / "a.safetensors"
    record = write_tensor_file(path, [TensorSource.of("x", torch.ones(3))], relative_to=tmp_path)
    assert record.name == "train_state/a.safetensors"
    assert (record.size, record.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_file_is_never_overwritten_in_place(tmp_path):
    write(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(FileExistsError):
        write(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    assert (tmp_path / "a.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["as it is", "converted"])
def test_tensors_are_asked_for_one_after_the_other(dtype, tmp_path):
    alive = []

    def read(value):
        assert not alive, "the tensor before is still in memory"
        memory = np.full(4, value, dtype=np.float32)
        alive.append(value)
        weakref.finalize(memory, alive.clear)
        return torch.from_numpy(memory)

    sources = [TensorSource(name=f"t{i}", dtype=dtype, shape=torch.Size([4]), read=lambda i=i: read(i / 3)) for i in range(3)]
    write_tensor_file(tmp_path / "a.safetensors", sources, relative_to=tmp_path)
    read_back = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(as_bytes(read_back[f"t{i}"]), as_bytes(torch.full((4,), i / 3).to(dtype))) for i in range(3))


def test_json_keeps_every_digit_of_a_float(tmp_path):
    numbers = [0.1 + 0.2, 1e-300, 3.0, 2**53 + 1]
    write_json_file(tmp_path / "a.json", numbers, relative_to=tmp_path)
    assert json.loads((tmp_path / "a.json").read_text()) == numbers


def test_a_full_disk_is_explained_to_the_user():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with (
        pytest.raises(UserError, match=r"cannot write /run/7: No space left on device.*Free some space"),
        explained_disk_errors("/run/7"),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")
