"""The safetensors writer against the safetensors package, and what its records promise."""

import dataclasses
import hashlib
import json
import os
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import as_bytes, same_bytes

from checkpoint.tensor_file import CHUNK_BYTES, TensorSource, explained_disk_errors, write_json_file, write_tensor_file
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


@pytest.mark.parametrize("count", [4, 1_000_000], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["as it is", "converted"])
def test_tensors_are_asked_for_one_after_the_other(dtype, count, tmp_path):
    alive = []

    def read(value):
        assert not alive, "the tensor before is still in memory"
        memory = np.full(count, value, dtype=np.float32)
        alive.append(value)
        weakref.finalize(memory, alive.clear)
        return torch.from_numpy(memory)

    sources = [TensorSource(name=f"t{i}", dtype=dtype, shape=torch.Size([count]), read=lambda i=i: read(i / 3)) for i in range(3)]
    write_tensor_file(tmp_path / "a.safetensors", sources, relative_to=tmp_path)
    read_back = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(as_bytes(read_back[f"t{i}"]), as_bytes(torch.full((count,), i / 3).to(dtype))) for i in range(3))


def large_tensors(seed):
    """More than four chunks, of sizes that fit none; one with gaps, one that will be converted."""
    generator = torch.Generator().manual_seed(seed)
    size = CHUNK_BYTES // 4
    return [
        TensorSource.of("large", torch.randn(2 * size + 12_345, generator=generator)),
        TensorSource.of("small", torch.randn(7, generator=generator)),
        TensorSource.of("gaps", torch.randn(size // 2 + 99, 3, generator=generator)[:, 1]),
        TensorSource.of("half", torch.randn(4 * size + 1, generator=generator), torch.float16),
    ]


class SlowSha256:
    """Always behind the writing."""

    def __init__(self):
        self.sha256 = hashlib.sha256()

    def update(self, data):
        time.sleep(0.05)
        self.sha256.update(data)

    def hexdigest(self):
        return self.sha256.hexdigest()


def check_large_file(path, record, sources):
    assert (record.size, record.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert same_bytes(load_file(path), {source.name: source.read().to(source.dtype) for source in sources})


def test_files_of_many_chunks_are_written_and_hashed_right_by_several_threads_at_once(tmp_path):
    num_threads, num_python_threads = torch.get_num_threads(), threading.active_count()
    sources = [large_tensors(seed) for seed in range(3)]
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        records = list(pool.map(lambda path, some: write_tensor_file(path, some, relative_to=tmp_path), paths, sources))
    for path, record, some in zip(paths, records, sources, strict=True):
        check_large_file(path, record, some)
    assert torch.get_num_threads() == num_threads
    assert threading.active_count() == num_python_threads


def test_progress_adds_up_to_the_bytes_written_and_released_parts_to_the_bytes_read(tmp_path):
    heard, released = [], []
    sources = [dataclasses.replace(source, release=lambda part: released.append(part.nbytes)) for source in large_tensors(0)]
    write_tensor_file(tmp_path / "a.safetensors", sources, relative_to=tmp_path, progress=heard.append)
    assert sum(heard) == sum(source.num_bytes for source in sources)
    assert sum(released) == sum(source.read().nbytes for source in sources if source.name != "gaps")


def test_no_memory_is_used_again_before_it_is_written_and_hashed(tmp_path, monkeypatch):
    """Released memory is overwritten here, as it may be by whoever gets it."""
    monkeypatch.setattr("checkpoint.tensor_file.hashlib", types.SimpleNamespace(sha256=SlowSha256))
    expected = large_tensors(0)
    sources = [dataclasses.replace(source, release=lambda part: part.fill_(5)) for source in large_tensors(0)]
    check_large_file(tmp_path / "a.safetensors", write_tensor_file(tmp_path / "a.safetensors", sources, relative_to=tmp_path), expected)


def test_a_write_that_fails_ends_its_thread_and_raises(tmp_path):
    def fail(num_bytes):
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        write_tensor_file(tmp_path / "a.safetensors", large_tensors(0), relative_to=tmp_path, progress=fail)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (torch.float16, 65_520.0, "w does not fit fp16: it holds 65520, and fp16 ends at 65504; use bf16"),
        (torch.float16, -1e9, "it holds -1e\\+09"),
        (torch.bfloat16, 3.4e38, "w does not fit bf16: it holds 3.4e\\+38, and bf16 ends at 3.38.*; keep its dtype"),
    ],
)
def test_a_finite_value_that_would_become_infinite_is_refused_by_name(dtype, value, message, tmp_path):
    tensor = torch.zeros(600_000)
    tensor[555_555] = value
    with pytest.raises(UserError, match=message):
        write_tensor_file(tmp_path / "a.safetensors", [TensorSource.of("w", tensor, dtype)], relative_to=tmp_path)


def test_what_fits_or_is_infinite_already_is_converted(tmp_path):
    tensor = torch.tensor([65_519.0, -65_504.0, float("inf"), -float("inf"), float("nan"), 1e-9])
    write_tensor_file(tmp_path / "a.safetensors", [TensorSource.of("w", tensor, torch.float16)], relative_to=tmp_path)
    assert same_bytes(load_file(tmp_path / "a.safetensors"), {"w": tensor.half()})


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
