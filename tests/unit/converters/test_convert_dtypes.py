"""Conversions that change values on purpose, hivemind's 8-bit format and --dtype, and --verify, which is to notice one that did so by
accident."""

import json
import math
import os
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import TOKENIZER, same_bytes, tensors_of, with_bin_files
from support.conversions import FAMILIES, NUM_LAYERS, buffers, from_hf, logits, make_hf, to_hf, write_layer_shards
from support.tiers import sample

import checkpoint.conversion
import checkpoint.hivemind_int8
import checkpoint.legacy_folder
import converters.from_hf
import converters.to_hf
from checkpoint.hivemind_int8 import BLOCK_ELEMENTS, Int8File, dequantised
from checkpoint.model_folder import ModelFolder
from checkpoint.weight_file import StoredWeight, TensorSpec
from user_error import UserError

L = 3


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    for family in FAMILIES:
        monkeypatch.setitem(NUM_LAYERS, family, L)


class Held:
    """A WeightFile of tensors in memory."""

    def __init__(self, path, tensors):
        self.path, self._tensors = path, tensors
        self.specs = {name: TensorSpec(dtype=tensor.dtype, shape=tensor.shape) for name, tensor in tensors.items()}

    def read(self, name):
        return self._tensors[name]


def stored(tensors, path):
    file = Held(path, tensors)
    return {name: StoredWeight(file, name) for name in tensors}


def quantised(name, matrix, code):
    """As bitsandbytes' quantize_blockwise: per block of 4096 the largest magnitude, and of the rest the nearest of 256 numbers."""
    blocks = [matrix.reshape(-1)[i : i + 4096] for i in range(0, matrix.numel(), 4096)]
    absmax = torch.stack([block.abs().max() for block in blocks])
    indices = [((block / scale)[:, None] - code).abs().argmin(dim=1) for block, scale in zip(blocks, absmax, strict=True)]
    base = name.removesuffix(".weight")
    return {name: torch.cat(indices).to(torch.uint8).reshape(matrix.shape), f"{base}.absmax": absmax, f"{base}.code": code}


@pytest.fixture(scope="module")
def code():
    half = torch.linspace(0, 1, 129)[1:] ** 2
    return torch.cat([-half.flip(0), half]).float()


@pytest.mark.parametrize("chunk_blocks", [1, 2, 1000])
def test_an_8_bit_matrix_is_code_times_absmax_of_its_block_with_a_short_last_block(chunk_blocks, code, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.hivemind_int8, "CHUNK_ELEMENTS", chunk_blocks * BLOCK_ELEMENTS)
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(0, 256, (101, 97), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(3, generator=generator) + 0.5
    weights = dequantised(stored({"a.weight": indices, "a.absmax": absmax, "a.code": code, "a.bias": torch.ones(3)}, tmp_path), tmp_path)
    assert sorted(weights) == ["a.bias", "a.weight"]
    weight = weights["a.weight"]
    assert weight.spec == TensorSpec(dtype=torch.float32, shape=torch.Size([101, 97]))
    flat = [code[index].item() * absmax[i // 4096].item() for i, index in enumerate(indices.reshape(-1).tolist())]
    torch.testing.assert_close(weight.file.read(weight.name), torch.tensor(flat).reshape(101, 97), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a.absmax", torch.ones(2), r"one absmax for every 4096 elements, here \[3\].*a.absmax torch.float32 \[2\]"),
        ("a.code", torch.ones(255), r"a code of \[256\].*a.code torch.float32 \[255\]"),
        ("a.weight", torch.ones(101, 97), r"an 8-bit weight is uint8.*a.weight torch.float32"),
        ("a.absmax", torch.ones(3, dtype=torch.int8), "a.absmax torch.int8"),
    ],
)
def test_an_8_bit_matrix_whose_parts_do_not_fit_is_refused(name, tensor, message, code, tmp_path):
    parts = {"a.weight": torch.zeros(101, 97, dtype=torch.uint8), "a.absmax": torch.ones(3), "a.code": code, name: tensor}
    with pytest.raises(UserError, match=message):
        dequantised(stored(parts, tmp_path), tmp_path)


@pytest.fixture
def int8_folder(tmp_path, code):
    """A GPT-J as hivemind stored it (every matrix in 8 bits, biases and norms plain, buffers of the time), and its float32 tensors."""
    folder = tmp_path / "gpt-j-8bit"
    weights = make_hf("gptj", folder, dtype=torch.float32)
    content = {}
    for name, tensor in weights.items():
        content |= quantised(name, tensor, code) if tensor.ndim == 2 else {name: tensor}
    for i in range(L):
        content |= {f"transformer.h.{i}.{name}": tensor for name, tensor in buffers("gptj", torch.float32).items()}
    return folder, weights, content


@pytest.mark.parametrize("num_shards", [1, 2])
def test_the_8_bit_format_becomes_fp16_close_to_the_original_and_not_the_same(num_shards, int8_folder, tmp_path):
    folder, weights, content = int8_folder
    names = list(content)
    with_bin_files(folder, *({name: content[name] for name in names[i::num_shards]} for i in range(num_shards)))
    assert from_hf("gptj", folder, tmp_path / "ours", "--verify") == 0
    assert to_hf("gptj", folder, tmp_path / "hf", "--verify", "--dtype", "fp32") == 0
    rounded, exact = tensors_of(tmp_path / "ours" / folder.name), tensors_of(tmp_path / "hf")
    assert rounded.keys() == exact.keys() == weights.keys()
    for name, original in weights.items():
        assert exact[name].dtype == torch.float32
        assert torch.equal(rounded[name], exact[name].half()), name
        error = (exact[name] - original).abs().max() / original.abs().max()
        assert (0 < error < 0.01) if original.ndim == 2 else error == 0, f"{name}: {error}"
    assert json.loads((tmp_path / "ours" / folder.name / "config.json").read_text())["torch_dtype"] == "float16"
    assert not torch.equal(logits(tmp_path / "hf"), logits(tmp_path / "ours" / folder.name).float())


def test_an_8_bit_matrix_without_its_scales_is_refused(int8_folder, tmp_path, capsys):
    folder, _, content = int8_folder
    del content["lm_head.absmax"]
    with_bin_files(folder, content)
    assert from_hf("gptj", folder, tmp_path / "ours") == 1
    err = capsys.readouterr().err
    assert "extra (1): lm_head.code" in err
    assert "lm_head.weight is torch.uint8" in err


def test_8_bit_weights_are_dequantised_one_at_a_time_when_they_are_written(int8_folder, tmp_path, monkeypatch):
    folder, _, content = int8_folder
    with_bin_files(folder, content)
    seen, alive = [], weakref.WeakSet()
    read = Int8File.read

    def watched(self, name):
        assert not alive, f"{name} is dequantised while another one is still held"
        weight = read(self, name)
        seen.append(name)
        alive.add(weight)
        return weight

    monkeypatch.setattr(Int8File, "read", watched)
    opened = ModelFolder.open(folder)
    assert opened.is_int8
    assert not seen
    assert from_hf("gptj", folder, tmp_path / "ours") == 0
    assert sorted(seen) == sorted(name for name in opened.names() if opened.weights[name].file.__class__ is Int8File)


@sample(3)
@pytest.mark.parametrize("flag", ["keep", "fp16", "bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dtype_rounds_every_weight_as_torch_does(family, flag, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.legacy_folder, "CONVERTED_AT_ONCE", 7)
    monkeypatch.setattr(checkpoint.conversion, "COMPARED_AT_ONCE", 5)
    weights = make_hf(family, tmp_path / "model", dtype=torch.float32)
    dtype = {"keep": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[flag]
    expected = {name: tensor.to(dtype) for name, tensor in weights.items()}
    for convert, target, more in (
        (from_hf, tmp_path / "ours" / "model", []),
        (from_hf, tmp_path / "legacy" / "model", ["--legacy-layout"]),
        (to_hf, tmp_path / "hf", []),
    ):
        where = target if convert is to_hf else target.parent
        assert convert(family, tmp_path / "model", where, "--dtype", flag, "--verify", *more) == 0
        written = ModelFolder.open(target)
        assert same_bytes({name: written.read(name).clone() for name in written.names()}, expected)
        config = json.loads((target / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(("convert", "more"), [(from_hf, []), (from_hf, ["--legacy-layout"]), (to_hf, [])])
def test_a_weight_too_large_for_fp16_is_refused_by_name_and_nothing_is_left(convert, more, tmp_path, capsys):
    weights = make_hf("gptj", tmp_path / "model", dtype=torch.float32)
    weights["transformer.h.1.mlp.fc_in.weight"][5, 3] = -70000.0
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert convert("gptj", tmp_path / "model", tmp_path / "out", "--dtype", "fp16", *more) == 1
    err = capsys.readouterr().err
    assert "transformer.h.1.mlp.fc_in.weight does not fit fp16: it holds -70000, and fp16 ends at 65504; use" in err
    assert "bf16" in err
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != tmp_path / "model"] == []
    assert convert("gptj", tmp_path / "model", tmp_path / "out", "--dtype", "bf16") == 0


def test_infinities_and_nans_that_were_there_before_pass_unchanged(tmp_path):
    weights = make_hf("gptj", tmp_path / "model", dtype=torch.float32)
    weights["lm_head.bias"][:3] = torch.tensor([math.inf, -math.inf, math.nan])
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert to_hf("gptj", tmp_path / "model", tmp_path / "hf", "--dtype", "fp16", "--verify") == 0
    assert tensors_of(tmp_path / "hf")["lm_head.bias"][:3].tolist()[:2] == [math.inf, -math.inf]


def flip_a_bit(target):
    file = sorted(target.glob("*.safetensors") or target.glob("*.pt"))[-1]
    data = bytearray(file.read_bytes())
    data[-3] ^= 8
    file.write_bytes(data)


def zero_a_layer(target):
    state = torch.load(target / "pytorch_1.pt", weights_only=True)
    state["ln_1.bias"].zero_()
    torch.save(state, target / "pytorch_1.pt")


@pytest.mark.parametrize(
    ("module", "writer", "more", "spoil"),
    [
        (converters.from_hf, "write_model_folder", [], flip_a_bit),
        (converters.from_hf, "write_legacy_folder", ["--legacy-layout"], zero_a_layer),
        (converters.to_hf, "write_hf_folder", [], flip_a_bit),
    ],
)
def test_verify_notices_what_changed_after_it_was_written(module, writer, more, spoil, tmp_path, monkeypatch, capsys):
    make_hf("gptj", tmp_path / "model")
    real = getattr(module, writer)

    def write_and_spoil(source, target, *arguments, **named):
        result = real(source, target, *arguments, **named)
        spoil(target)
        return result

    monkeypatch.setattr(module, writer, write_and_spoil)
    convert = from_hf if module is converters.from_hf else to_hf
    assert convert("gptj", tmp_path / "model", tmp_path / "unseen", *more) == 0
    assert convert("gptj", tmp_path / "model", tmp_path / "out", "--verify", *more) == 1
    err = capsys.readouterr().err
    assert "was written and reads back differently: not as in the source (1): " in err
    assert "verified" not in err


def test_layer_shards_of_views_are_stored_alone(tmp_path):
    """torch.save keeps the whole storage of a view, which in a mapped file is the file; a writer that forgets it writes gigabytes."""
    weights = make_hf("gptj", tmp_path / "model")
    shards = write_layer_shards("gptj", tmp_path / "model", tmp_path / "shards", weights)
    assert from_hf("gptj", shards, tmp_path / "again", "--legacy-layout") == 0
    file = tmp_path / "again" / "shards" / "pytorch_1.pt"
    tensors = torch.load(file, weights_only=True)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values())
    assert not os.path.exists(tmp_path / "again" / ".shards.partial")


def test_the_tokenizer_of_a_source_travels_with_every_dtype(tmp_path):
    make_hf("gptneox", tmp_path / "model")
    assert from_hf("gptneox", tmp_path / "model", tmp_path / "ours", "--dtype", "bf16", "--legacy-layout") == 0
    assert {name: (tmp_path / "ours" / "model" / name).read_text() for name in TOKENIZER} == TOKENIZER
    shutil.rmtree(tmp_path / "ours")
    assert from_hf("gptneox", tmp_path / "model", tmp_path / "ours") == 0
    assert load_file(tmp_path / "ours" / "model" / "lm_head.safetensors").keys() >= {"embed_out.weight"}
