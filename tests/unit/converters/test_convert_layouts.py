"""Every layout both ways, for both families, with the real number of layers and a small width: no tensor changes a byte on the way."""

import functools
import json
import shutil

import pytest
import torch
from support.checkpoints import TOKENIZER, same_bytes, tensors_of, with_bin_files
from support.conversions import (
    BLOCK,
    EMBEDDINGS,
    FAMILIES,
    HEAD,
    LAYERS,
    NORM,
    NUM_LAYERS,
    buffers,
    from_hf,
    logits,
    make_hf,
    to_hf,
    write_layer_shards,
    write_stages,
)
from support.tiers import sample

from checkpoint.model_folder import ModelFolder, check_model_folder, load_stage
from modules.families import read_model_config
from modules.stage import empty_stage

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


DTYPES = {"gptj": torch.float16, "gptneox": torch.float32}  # where a test has no dtypes of its own


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(family, dtype) -> (folder as save_pretrained writes it, its tensors, its logits)."""

    @functools.cache
    def make(family, dtype):
        folder = tmp_path_factory.mktemp(family) / "model"
        weights = make_hf(family, folder, dtype=dtype)
        return folder, weights, logits(folder)

    return make


@pytest.fixture
def models(made):
    return {family: made(family, DTYPES[family]) for family in FAMILIES}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def assert_is_the_model(folder, weights, expected_logits):
    assert same_bytes(tensors_of(folder), weights)
    assert torch.equal(logits(folder), expected_logits)
    assert {name: (folder / name).read_text() for name in TOKENIZER} == TOKENIZER


@sample(1)
@EVERY_FAMILY
def test_hf_to_ours_to_hf(family, models, tmp_path):
    folder, weights, expected = models[family]
    assert from_hf(family, folder, tmp_path, "--verify") == 0
    assert_is_the_model(tmp_path / "model", weights, expected)
    assert to_hf(family, tmp_path / "model", tmp_path / "back", "--verify", "--max-shard-size", "30KB") == 0
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 5
    assert_is_the_model(tmp_path / "back", weights, expected)


@sample(1)
@EVERY_FAMILY
def test_hf_to_layer_shards_to_ours_to_hf(family, models, tmp_path, capsys):
    folder, weights, expected = models[family]
    assert from_hf(family, folder, tmp_path / "shards", "--legacy-layout", "--verify") == 0
    assert f"verified {len(weights)} tensors" in capsys.readouterr().out
    assert from_hf(family, tmp_path / "shards" / "model", tmp_path / "ours") == 0
    assert to_hf(family, tmp_path / "ours" / "model", tmp_path / "back") == 0
    assert_is_the_model(tmp_path / "back", weights, expected)
    assert to_hf(family, tmp_path / "shards" / "model", tmp_path / "directly") == 0
    assert_is_the_model(tmp_path / "directly", weights, expected)


@EVERY_FAMILY
def test_written_layer_shards_hold_what_a_relatives_strict_loader_wants_and_no_more(family, models, tmp_path):
    folder, weights, _ = models[family]
    assert from_hf(family, folder, tmp_path, "--legacy-layout") == 0
    written, last = tmp_path / "model", NUM_LAYERS[family] - 1
    files = ["pytorch_embs.pt", *(f"pytorch_{i}.pt" for i in range(last + 1)), "pytorch_lm_head.pt"]
    assert {path.name for path in written.iterdir()} == {*files, "config.json", "generation_config.json", *TOKENIZER}
    contents = {name: torch.load(written / name, weights_only=True) for name in files}
    assert contents["pytorch_embs.pt"].keys() == set(EMBEDDINGS[family])
    assert contents["pytorch_lm_head.pt"].keys() == set(NORM[family] + HEAD[family])
    for i in range(last + 1):
        part = contents[f"pytorch_{i}.pt"]
        assert type(part) is dict
        assert part.keys() == set(BLOCK[family])
        assert same_bytes(part, {name: weights[f"{LAYERS[family]}.{i}.{name}"] for name in BLOCK[family]})
        num_bytes = sum(tensor.nbytes for tensor in part.values())
        assert (written / f"pytorch_{i}.pt").stat().st_size < num_bytes + 1000 * len(part), "more than the tensors was stored"


@EVERY_FAMILY
def test_a_relatives_layer_shards_with_buffers_and_parameters_are_read(family, models, tmp_path):
    folder, weights, expected = models[family]
    shards = write_layer_shards(family, folder, tmp_path / "shards", weights)
    assert from_hf(family, shards, tmp_path / "ours", "--verify") == 0
    assert_is_the_model(tmp_path / "ours" / "shards", weights, expected)


@EVERY_FAMILY
def test_the_trainer_loads_layer_shards_as_they_lie(family, models, tmp_path):
    folder, weights, _ = models[family]
    model = ModelFolder.open(write_layer_shards(family, folder, tmp_path / "shards", weights))
    config = read_model_config(model.config)
    check_model_folder(model, config)
    stage = empty_stage(config, 2, NUM_LAYERS[family])
    load_stage(stage, model)
    assert all(torch.equal(parameter, weights[name].float()) for name, parameter in stage.named_parameters())
    assert len(model.dropped) == NUM_LAYERS[family] * len(buffers(family, torch.float32))


CUTS = {
    "gptj": [[28], [14, 14], [10, 10, 8], [7, 7, 7, 7], [14, 14, 0]],
    "gptneox": [[44], [22, 22], [20, 20, 4], [6, 6, 6, 6, 6, 6, 6, 2], [22, 22, 0]],
}


@sample(3)
@pytest.mark.parametrize(("family", "place"), [(family, place) for family in FAMILIES for place in range(len(CUTS[family]))])
def test_a_relatives_training_checkpoint_of_any_cut_becomes_the_model(family, place, made, tmp_path, capsys):
    cut, dtype = CUTS[family][place], [torch.float16, torch.float32][place % 2]
    folder, weights, expected = made(family, dtype)
    step = write_stages(family, tmp_path / "run" / "checkpoint_100", weights, cut)
    assert to_hf(family, step, tmp_path / "hf", "--config-name", str(folder), "--verify") == 0
    assert_is_the_model(tmp_path / "hf", weights, expected)
    assert f"{len(cut)} stage(s) of {' + '.join(map(str, cut))} layers" in capsys.readouterr().out


@EVERY_FAMILY
def test_a_relatives_checkpoint_path_is_read_by_its_latest_file_in_both_directions(family, models, tmp_path):
    name = {"gptj": "2000", "gptneox": "checkpoint_2000"}[family]
    folder, weights, expected = models[family]
    write_stages(family, tmp_path / "run" / name, weights, CUTS[family][1])
    (tmp_path / "run" / "latest").write_text("2000")
    torch.save({"model.0.ln_1.weight": torch.ones(3)}, tmp_path / "run" / "pytorch_model.bin")  # its last stage, not a model
    assert to_hf(family, tmp_path / "run", tmp_path / "hf", "--model-name", str(folder)) == 0
    assert_is_the_model(tmp_path / "hf", weights, expected)
    assert from_hf(family, tmp_path / "run", tmp_path / "ours", "--config-name", str(folder)) == 0
    assert_is_the_model(tmp_path / "ours" / "run", weights, expected)


@EVERY_FAMILY
@pytest.mark.parametrize("num_shards", [1, 3])
def test_old_bin_files_with_buffers_of_any_dtype_and_straddling_layers_are_read(family, num_shards, models, tmp_path):
    folder, weights, expected = models[family]
    everything = dict(weights)
    for i in range(NUM_LAYERS[family]):
        everything |= {
            f"{LAYERS[family]}.{i}.{name}": tensor
            for name, tensor in buffers(family, [torch.float16, torch.bfloat16, torch.float32][i % 3]).items()
        }
    names = sorted(everything)
    shards = [{name: everything[name] for name in names[i::num_shards]} for i in range(num_shards)]
    old = shutil.copytree(folder, tmp_path / "old")
    assert from_hf(family, with_bin_files(old, *shards), tmp_path / "ours", "--verify") == 0
    assert_is_the_model(tmp_path / "ours" / "old", weights, expected)


def test_a_neox_head_under_its_name_in_memory_becomes_the_one_on_disk(models, tmp_path):
    folder, weights, expected = models["gptneox"]
    renamed = {name.replace("embed_out.", "lm_head."): tensor for name, tensor in weights.items()}
    old = tmp_path / "old"
    old.mkdir()
    for name in ("config.json", *TOKENIZER):
        (old / name).write_text((folder / name).read_text())
    torch.save(renamed, old / "pytorch_model.bin")
    assert from_hf("gptneox", old, tmp_path / "ours") == 0
    assert_is_the_model(tmp_path / "ours" / "old", weights, expected)
    assert json.loads((tmp_path / "ours" / "old" / "config.json").read_text())["rotary_pct"] == 0.5
