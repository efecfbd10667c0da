"""Plans at real size: all 285 names of GPT-J-6B and all 532 of GPT-NeoX-20B, from headers of files that hold no data (sparse files)."""

import contextlib
import io
import json
import math
import os
import re

import pytest
import torch
from support.conversions import BLOCK, EMBEDDINGS, FAMILIES, HEAD, LAYERS, NORM, NUM_LAYERS, TRUNK, from_hf, make_hf, to_hf, write_stages
from support.ranks import REPOSITORY

import converters.from_hf
import converters.to_hf
from checkpoint.conversion import plan_conversion
from checkpoint.model_folder import ModelFolder
from checkpoint.tensor_file import DTYPE_NAMES
from modules.families import read_model_config
from modules.stage import meta_stage

GPTJ_6B = {
    "model_type": "gptj",
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "n_inner": None,
    "n_positions": 2048,
    "rotary": True,
    "rotary_dim": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "vocab_size": 50400,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
NEOX_20B = {
    "model_type": "gpt_neox",
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu_fast",
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "max_position_embeddings": 2048,
    "vocab_size": 50432,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
REAL = {"gptj": (GPTJ_6B, 285, 6_050_882_784, torch.float32), "gptneox": (NEOX_20B, 532, 20_554_567_680, torch.float16)}
BUFFERS = {
    "gptj": {"attn.bias": ([1, 1, 2048, 2048], "U8"), "attn.masked_bias": ([], "F32")},
    "gptneox": {
        "attention.bias": ([1, 1, 2048, 2048], "BOOL"),
        "attention.masked_bias": ([], "F16"),
        "attention.rotary_emb.inv_freq": ([12], "F32"),
    },
}
WIDTHS = {torch.float32: 4, torch.float16: 2}
BYTES = {"U8": 1, "BOOL": 1, "F16": 2, "F32": 4}


def names_by_hand(family):
    """In the order of the model."""
    names = [f"{TRUNK[family]}.{name}" for name in EMBEDDINGS[family]]
    names += [f"{LAYERS[family]}.{i}.{name}" for i in range(NUM_LAYERS[family]) for name in BLOCK[family]]
    return names + [f"{TRUNK[family]}.{name}" for name in NORM[family]] + HEAD[family]


def real_folder(family, folder, num_shards):
    """The real shapes, with legacy buffers, in shards that cut through layers; the files are headers with holes behind them."""
    config, _, _, dtype = REAL[family]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = read_model_config(config)
    shapes = {name: list(tensor.shape) for name, tensor in meta_stage(model, 0, model.num_layers).state_dict().items()}
    table = {name: (shapes[name], DTYPE_NAMES[dtype]) for name in names_by_hand(family)}
    for i in range(model.num_layers):
        table |= {f"{LAYERS[family]}.{i}.{name}": entry for name, entry in BUFFERS[family].items()}
    names = sorted(table)
    files = [f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)]
    weight_map = {}
    for place, file in enumerate(files):
        header, end = {}, 0
        for name in names[place * len(names) // num_shards : (place + 1) * len(names) // num_shards]:
            shape, kind = table[name]
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + math.prod(shape) * BYTES[kind]]}
            end = header[name]["data_offsets"][1]
            weight_map[name] = file
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_real_name_and_shape_has_one_place_in_each_layout(family, tmp_path):
    config, num_tensors, num_parameters, dtype = REAL[family]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_model_config(config)
    source = ModelFolder.open_config(tmp_path)
    by_hand = names_by_hand(family)
    for layout in ("layers", "legacy layers", "hugging face"):
        plan = plan_conversion(source, model, layout, max_shard_bytes=10**10)
        assert len(plan.tensors) == num_tensors == len(by_hand)
        assert {tensor.name for tensor in plan.tensors} == set(by_hand)
        assert len({(tensor.file, tensor.name_in_file) for tensor in plan.tensors}) == num_tensors
        assert sum(tensor.shape.numel() for tensor in plan.tensors) == num_parameters
        assert plan.num_bytes == num_parameters * WIDTHS[dtype]
        assert plan.dropped == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_shards_of_the_real_models_are_those_of_the_relatives(family, tmp_path):
    config, _, _, _ = REAL[family]
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = plan_conversion(ModelFolder.open_config(tmp_path), read_model_config(config), "legacy layers")
    places = {(tensor.file, tensor.name_in_file): tensor.name for tensor in plan.tensors}
    expected = {("pytorch_embs.pt", name): f"{TRUNK[family]}.{name}" for name in EMBEDDINGS[family]}
    expected |= {(f"pytorch_{i}.pt", name): f"{LAYERS[family]}.{i}.{name}" for i in range(NUM_LAYERS[family]) for name in BLOCK[family]}
    expected |= {("pytorch_lm_head.pt", name): f"{TRUNK[family]}.{name}" for name in NORM[family]}
    expected |= {("pytorch_lm_head.pt", name): name for name in HEAD[family]}
    assert places == expected


@pytest.mark.parametrize(("family", "num_shards"), [("gptj", 1), ("gptj", 3), ("gptneox", 46)])
def test_plan_of_the_real_files_drops_the_buffers_and_writes_nothing(family, num_shards, tmp_path, capsys):
    _, num_tensors, num_parameters, _ = REAL[family]
    folder = real_folder(family, tmp_path / "real", num_shards)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    if num_shards > 1:
        files_of = [{file for name, file in weight_map.items() if f"{LAYERS[family]}.{i}." in name} for i in range(NUM_LAYERS[family])]
        assert any(len(files) > 1 for files in files_of), "no layer straddles two shards"
    for convert, more in ((from_hf, []), (from_hf, ["--legacy-layout"]), (to_hf, ["--max-shard-size", "10GB", "--dtype", "fp16"])):
        assert convert(family, folder, tmp_path / "out", "--plan", *more) == 0
        lines = capsys.readouterr().out.splitlines()
        num_dropped = NUM_LAYERS[family] * len(BUFFERS[family])
        assert sum(line.startswith("dropped: ") for line in lines) == num_dropped
        assert lines[-1].startswith(f"{num_tensors} tensors in ")
        assert lines[-1].endswith(f"{num_dropped} dropped; nothing was written")
        assert len(lines) == num_tensors + num_dropped + 1
    assert f"{num_parameters * 2 / 1e9:.3f} GB" in lines[-1]
    assert all(" float16 " in line for line in lines[:num_tensors])
    assert os.listdir(tmp_path) == ["real"]


@pytest.mark.parametrize("layout", ["layers", "legacy layers", "hugging face"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_says_what_will_be_written(family, layout, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(NUM_LAYERS, family, 3)
    make_hf(family, tmp_path / "model", num_layers=3)
    convert, more = (to_hf, ["--max-shard-size", "5KB"]) if layout == "hugging face" else (from_hf, [])
    more = [*more, *(["--legacy-layout"] if layout == "legacy layers" else [])]
    assert convert(family, tmp_path / "model", tmp_path / "out", "--plan", *more) == 0
    planned = {}
    for line in capsys.readouterr().out.splitlines()[:-1]:
        match = re.fullmatch(r"(\S+) -> (\S+): (\S+) (\[.*\]) (\w+)   \(from model.safetensors: (\S+)\)", line)
        assert match is not None, line
        planned[match[1]] = (match[2], match[3], json.loads(match[4]), match[5])
    assert convert(family, tmp_path / "model", tmp_path / "out", *more) == 0
    written = ModelFolder.open(tmp_path / "out" if convert is to_hf else tmp_path / "out" / "model")
    assert planned == {
        name: (
            written.weights[name].file.path.name,
            written.weights[name].name,
            list(written.shape(name)),
            str(written.dtype(name)).removeprefix("torch."),
        )
        for name in written.names()
    }


def test_the_plan_of_a_relatives_checkpoint_names_stage_and_position(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(NUM_LAYERS, "gptj", 4)
    weights = make_hf("gptj", tmp_path / "model", num_layers=4)
    step = write_stages("gptj", tmp_path / "5", weights, [2, 2])
    assert to_hf("gptj", step, tmp_path / "hf", "--config-name", str(tmp_path / "model"), "--plan") == 0
    out = capsys.readouterr().out
    assert "transformer.h.2.ln_1.bias -> model.safetensors: transformer.h.2.ln_1.bias [16] float16" in out
    assert "(from prank_1_checkpoint.pt: 0.ln_1.bias)" in out
    assert "dropped: transformer.h.3.attn.masked_bias   (in prank_1_checkpoint.pt" in out
    assert not (tmp_path / "hf").exists()


def test_every_flag_is_in_the_documentation_and_no_other(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # argparse breaks lines at hyphens
    documented = set(re.findall(r"--[a-z][a-z-]+", (REPOSITORY / "docs" / "converters.md").read_text()))
    known = {"--checkpoint-path"}  # the trainer's
    for module in (converters.from_hf, converters.to_hf):
        for family in FAMILIES:
            with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(io.StringIO()) as out:
                module.main(family, ["--help"])
            assert ended.value.code == 0
            known |= set(re.findall(r"(?<![A-Za-z-])--[a-z][a-z-]+", out.getvalue())) - {"--help"}
    assert documented == known
