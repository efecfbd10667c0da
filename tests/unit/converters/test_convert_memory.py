"""The memory of a conversion: at most twice its largest tensor, however the source lies on the disk.

Mapped pages count as memory here (VmHWM), though the system could take them back: a rented machine's memory limit counts them too.
"""

import logging
import os
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.checkpoints import hf_model, with_bin_files, write_json
from support.tiers import sample

from checkpoint.hf_folder import write_hf_folder
from checkpoint.layered_folder import write_model_folder
from checkpoint.model_folder import ModelFolder
from checkpoint.weight_file import open_weight_file
from modules.gptj import GPTJConfig
from modules.stage import meta_stage

WIDTH, VOCAB, NUM_LAYERS = 1024, 14_000, 4
LARGEST_BYTES = 4 * WIDTH * VOCAB  # 57 MB; the model has 316 MB
ALLOWANCE_BYTES = 12 << 20  # interpreter, headers, what malloc keeps
CONFIG = {
    **hf_model().config.to_dict(),
    "n_embd": WIDTH,
    "n_layer": NUM_LAYERS,
    "vocab_size": VOCAB,
    "n_head": 16,
    "rotary_dim": 8,
    "torch_dtype": "float32",
}

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")


def weights():
    """Every tensor begins with a number of its own, so that a mix-up shows."""
    shapes = {name: t.shape for name, t in meta_stage(GPTJConfig.from_hf(CONFIG), 0, NUM_LAYERS).state_dict().items()}
    made = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for number, tensor in enumerate(made.values()):
        tensor.view(-1)[:3] = number
        tensor.view(-1)[-1] = -number
    return made


def one_safetensors_file(folder, made):
    save_file(made, folder / "model.safetensors")


def safetensors_shards(folder, made):
    files = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(made)}
    for file in set(files.values()):
        save_file({name: made[name] for name in made if files[name] == file}, folder / file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": files})


def one_bin_file(folder, made):
    with_bin_files(folder, made)


def bin_shards(folder, made):
    names = list(made)
    with_bin_files(folder, *({name: made[name] for name in names[i::3]} for i in range(3)))


def views_into_one_storage(folder, made):
    storage = torch.cat([tensor.reshape(-1) for tensor in made.values()])
    views, start = {}, 0
    for name, tensor in made.items():
        views[name] = storage[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    with_bin_files(folder, views)


def transposed(folder, made):
    with_bin_files(folder, {name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in made.items()})


def every_third_row_and_every_third_column(folder, made):
    """Of the two largest tensors; the storage under them is three times as large."""
    rows, columns = torch.zeros(VOCAB, 3, WIDTH), torch.zeros(VOCAB, WIDTH, 3)
    rows[:, 1], columns[:, :, 2] = made["transformer.wte.weight"], made["lm_head.weight"]
    with_bin_files(folder, {**made, "transformer.wte.weight": rows[:, 1], "lm_head.weight": columns[:, :, 2]})


SOURCES = [
    one_safetensors_file,
    safetensors_shards,
    one_bin_file,
    bin_shards,
    views_into_one_storage,
    transposed,
    every_third_row_and_every_third_column,
]


def to_layers(source, target, dtype):
    write_model_folder(source, target, GPTJConfig.from_hf(source.config), dtype=dtype)


def to_hf(source, target, dtype):
    write_hf_folder(source, target, GPTJConfig.from_hf(source.config), max_shard_bytes=100_000_000, dtype=dtype)


def peak_growth(action) -> int:
    """Bytes that ``action`` adds, at its worst, to the memory of a process that did nothing else."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the past
            before = memory("VmRSS")
            action()
            os.write(write_end, str(memory("VmHWM") - before).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with open(read_end) as pipe:
        return int(pipe.read())


def memory(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def check_numbers(folder, expected, dtype):
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                tensor, number = opened.get_tensor(name), expected[name]
                assert tensor.dtype == dtype
                flat = tensor.reshape(-1)
                assert flat[:3].tolist() == [number] * 3, name
                assert flat[-1] == -number
                assert int(flat.count_nonzero()) == (4 if number else 0), name


# Each source goes two ways out of four, one of them all four.
WAYS = [(source, way, dtype) for source in SOURCES for way, dtype in ((to_layers, torch.float32), (to_hf, torch.float16))]
WAYS += [(bin_shards, to_layers, torch.float16), (bin_shards, to_hf, torch.float32)]


@sample(2)
@pytest.mark.parametrize(("write_source", "convert", "dtype"), WAYS)
def test_a_conversion_takes_at_most_twice_its_largest_tensor(write_source, convert, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    source = tmp_path / "source"
    source.mkdir()
    write_json(source / "config.json", CONFIG)
    made = weights()
    numbers = {name: number for number, name in enumerate(made)}
    assert sum(tensor.nbytes for tensor in made.values()) > 5 * LARGEST_BYTES
    write_source(source, made)
    del made
    growth = peak_growth(lambda: convert(ModelFolder.open(source), tmp_path / "target", dtype))
    assert growth < 2 * LARGEST_BYTES + ALLOWANCE_BYTES, f"{growth / 1e6:.0f} MB; the largest tensor is {LARGEST_BYTES / 1e6:.0f} MB"
    check_numbers(tmp_path / "target", numbers, dtype)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_who_releases_what_he_has_read_needs_no_more_than_his_step(name, tmp_path):
    tensor = torch.arange(20_000_000, dtype=torch.float32)
    if name.endswith(".bin"):
        torch.save({"x": tensor}, tmp_path / name)
    else:
        save_file({"x": tensor}, tmp_path / name)
    expected, step = zlib.crc32(tensor.numpy().data), 1_000_000
    del tensor

    def walk():
        file = open_weight_file(tmp_path / name)
        for _ in range(2):  # released pages come back as they were
            seen = 0
            for part in file.read("x").split(step):
                seen = zlib.crc32(part.numpy().data, seen)
                file.release(part)
            assert seen == expected

    assert peak_growth(walk) < 4 * step + 2 * ALLOWANCE_BYTES  # of 80 MB; twice, because torch.load touches much of its own code


def test_memory_that_is_no_files_is_never_given_back(tmp_path):
    """A tensor with gaps is read into memory of its own, and files that cannot be mapped are in memory as a whole."""
    made = {"a": torch.randn(2000, 3000), "b": torch.randn(3000, 2000).t(), "c": torch.randn(1500, 4)[:, 1]}
    torch.save(made, tmp_path / "new.bin")
    torch.save(made, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("new.bin", "old.bin"):
        file = open_weight_file(tmp_path / name)
        for _ in range(2):
            for key, tensor in made.items():
                read = file.read(key)
                assert read.is_contiguous()
                for _ in range(2):
                    assert torch.equal(read, tensor)
                    file.release(read)


def test_a_file_that_cannot_be_mapped_is_named_with_the_memory_that_it_takes(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "checkpoint")
    torch.save({"a": torch.zeros(30_000_000)}, tmp_path / "new.bin")
    open_weight_file(tmp_path / "new.bin")
    assert caplog.text == ""
    torch.save({"a": torch.zeros(30_000_000)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    open_weight_file(tmp_path / "old.bin")
    assert f"{tmp_path / 'old.bin'} is in the format of torch before 1.6 and cannot be mapped: it takes 0.1 GB of memory" in caplog.text


def test_the_bytes_of_a_big_endian_machine_are_turned_around_and_not_lost(tmp_path):
    """torch turns them in the pages of the mapping, if there is one: given back, they would come back as they were in the file."""
    tensor = torch.randn(300, 400)
    torch.save({"a": torch.from_numpy(tensor.numpy().byteswap())}, tmp_path / "little.bin")
    with zipfile.ZipFile(tmp_path / "little.bin") as little, zipfile.ZipFile(tmp_path / "big.bin", "w") as big:
        for name in little.namelist():
            big.writestr(name, b"big" if name.endswith("/byteorder") else little.read(name))
    file = open_weight_file(tmp_path / "big.bin")
    for _ in range(2):
        read = file.read("a")
        assert torch.equal(read, tensor)
        file.release(read)
