"""Reading model folders: every layout of Hugging Face, and every way in which a folder can be wrong."""

import json
import os
import pickle

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from support.checkpoints import TOKENS, hf_model, loaded_stage, same_bytes, save_hf, with_bin_files, write_json

from checkpoint.model_folder import ModelFolder, check_model_folder, load_stage, resolve_model_folder
from modules.gptj import GPTJConfig
from modules.lm_ops import Segments
from modules.stage import empty_stage
from user_error import UserError


@pytest.fixture(scope="module")
def model():
    return hf_model()


@pytest.fixture
def folder(model, tmp_path):
    return save_hf(model, tmp_path / "model")


def open_and_check(path):
    folder = ModelFolder.open(path)
    check_model_folder(folder, GPTJConfig.from_hf(folder.config))
    return folder


def rewrite(folder, change):
    """Change the tensors of a folder with one safetensors file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def legacy_buffers(num_layers):
    mask = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
    return {f"transformer.h.{i}.attn.bias": mask for i in range(num_layers)} | {
        f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e9) for i in range(num_layers)
    }


def halves(tensors):
    """Two shards that cut through a layer."""
    names = sorted(tensors)
    return [{name: tensors[name] for name in part} for part in (names[: len(names) // 2], names[len(names) // 2 :])]


LAYOUTS = {
    "one safetensors file": lambda model, folder: save_hf(model, folder),
    "safetensors shards": lambda model, folder: save_hf(model, folder, max_shard_size="30KB"),
    "one .bin": lambda model, folder: with_bin_files(save_hf(model, folder), dict(model.state_dict())),
    ".bin shards": lambda model, folder: with_bin_files(save_hf(model, folder), *halves(model.state_dict())),
    ".bin with legacy buffers": lambda model, folder: with_bin_files(save_hf(model, folder), {**legacy_buffers(3), **model.state_dict()}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(layout, model, tmp_path):
    folder = open_and_check(LAYOUTS[layout](model, tmp_path / "model"))
    assert same_bytes({name: folder.read(name) for name in folder.names()}, dict(model.state_dict()))


def test_torch_files_from_before_the_zip_format_are_read(model, folder):
    with_bin_files(folder, {})
    torch.save(dict(model.state_dict()), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    opened = open_and_check(folder)
    assert same_bytes({name: opened.read(name).clone() for name in opened.names()}, dict(model.state_dict()))


def test_a_torch_file_is_read_the_same_when_pages_have_been_given_back(model, folder):
    opened = open_and_check(with_bin_files(folder, dict(model.state_dict())))
    for _ in range(2):
        assert all(torch.equal(opened.read(name), tensor) for name, tensor in model.state_dict().items())


def test_legacy_buffers_in_safetensors_are_dropped_also_from_an_index_that_omits_them(model, folder):
    whole = load_file(folder / "model.safetensors")
    os.rename(folder / "model.safetensors", folder / "odd name.safetensors")
    save_file({**whole, **{n: t.clone() for n, t in legacy_buffers(3).items()}}, folder / "odd name.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": dict.fromkeys(whole, "odd name.safetensors")})
    assert open_and_check(folder).names() == sorted(whole)


def test_a_stage_computes_the_logits_of_the_model_it_was_loaded_from(model, folder):
    stage = loaded_stage(folder)
    segments = Segments.from_positions(torch.arange(TOKENS.shape[1]).expand(TOKENS.shape))
    with torch.no_grad():
        torch.testing.assert_close(stage.logits(stage(TOKENS, segments)), model(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_copied_into_the_stages_own_aligned_storage_and_dtype(dtype, tmp_path):
    """The bytes of HF's file lie 8-byte aligned; training on the mapping itself would compute other bits than on a copy."""
    folder = ModelFolder.open(save_hf(hf_model(dtype=dtype), tmp_path / "model"))
    expected = load_file(tmp_path / "model" / "model.safetensors")
    stage = empty_stage(GPTJConfig.from_hf(folder.config), 1, 3)
    addresses = {name: parameter.data_ptr() for name, parameter in stage.named_parameters()}
    load_stage(stage, folder)
    for name, parameter in stage.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.data_ptr() == addresses[name]
        assert parameter.data_ptr() % 64 == 0
        assert torch.equal(parameter, expected[name].float())


def test_a_stage_reads_only_its_own_weights(folder, monkeypatch):
    opened = ModelFolder.open(folder)
    read, names = opened.read, []
    monkeypatch.setattr(opened, "read", lambda name: (names.append(name), read(name))[1])
    stage = empty_stage(GPTJConfig.from_hf(opened.config), 1, 2)
    load_stage(stage, opened)
    assert sorted(names) == sorted(name for name, _ in stage.named_parameters())
    assert all(name.startswith("transformer.h.1.") for name in names)


def test_opening_reads_headers_only(folder, monkeypatch):
    monkeypatch.setattr("mmap.mmap", lambda *args, **kwargs: pytest.fail("weights were mapped"))
    open_and_check(folder)


def test_the_digest_tells_other_shapes_dtypes_and_configurations_apart(tmp_path):
    folders = [
        save_hf(hf_model(), tmp_path / "a"),
        save_hf(hf_model(2), tmp_path / "b"),
        save_hf(hf_model(dtype=torch.float16), tmp_path / "c"),
        save_hf(hf_model(), tmp_path / "sharded", max_shard_size="30KB"),
    ]
    digests = [ModelFolder.open(folder).digest() for folder in folders]
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


def break_and_expect(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        open_and_check(folder)
    assert str(folder) in str(caught.value)


def test_missing_extra_and_misshapen_weights_are_listed_by_name_in_one_message(folder):
    def change(tensors):
        del tensors["transformer.ln_f.bias"]
        tensors["transformer.h.3.ln_1.weight"] = torch.ones(32)
        tensors["lm_head.bias"] = torch.ones(65)

    rewrite(folder, change)
    break_and_expect(
        folder, r"missing \(1\): transformer.ln_f.bias; extra \(1\): transformer.h.3.ln_1.weight; .*lm_head.bias is \[65\], must be \[64\]"
    )


def test_at_most_ten_names_are_listed(folder):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in sorted(tensors)[:13]])
    break_and_expect(folder, r"missing \(13\): lm_head.bias, .* and 3 more")


def test_whole_number_weights_are_refused(folder):
    rewrite(folder, lambda tensors: tensors.update({"lm_head.bias": torch.ones(64, dtype=torch.int8)}))
    break_and_expect(folder, r"not a floating-point weight \(1\): lm_head.bias is torch.int8")


@pytest.mark.parametrize("keep", [4, 300, -1])
def test_a_truncated_safetensors_file_is_named_with_expected_and_seen_bytes(folder, keep):
    whole = (folder / "model.safetensors").read_bytes()
    part = whole[:keep]
    (folder / "model.safetensors").write_bytes(part)
    break_and_expect(folder, rf"model.safetensors is truncated: expected .*\d+ bytes, seen {len(part)}")


def test_bytes_after_the_data_and_a_broken_header_are_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole + b"x")
    break_and_expect(folder, rf"model.safetensors is damaged: expected {len(whole)} bytes, seen {len(whole) + 1}")
    (folder / "model.safetensors").write_bytes(whole[:8] + b"!" + whole[9:])
    break_and_expect(folder, "model.safetensors .* is not a safetensors file")
    (folder / "model.safetensors").write_bytes(whole.replace(b'"shape":[64]', b'"shape":[63]'))
    break_and_expect(folder, "model.safetensors is damaged: its header does not describe the tensor lm_head.bias")


def test_a_truncated_torch_file_is_named(model, folder):
    with_bin_files(folder, dict(model.state_dict()))
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    break_and_expect(folder, rf"pytorch_model.bin \({len(whole) // 2} bytes\) cannot be read")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's own, about the bare pickle that it then refuses
@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))], ids=["zip", "bare pickle"])
def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(model, folder, tmp_path, write):
    with_bin_files(folder, {})
    write({**model.state_dict(), "evil": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    break_and_expect(folder, r"pytorch_model.bin .* cannot be read as a file of tensors")
    assert not (tmp_path / "ran").exists()


def test_a_git_lfs_pointer_is_recognised(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    break_and_expect(folder, "git-lfs pointer.*git lfs pull")


def test_folders_without_config_or_weights_and_broken_json_are_named(folder, tmp_path):
    break_and_expect(tmp_path / "nowhere", "there is no model folder")
    os.rename(folder / "model.safetensors", tmp_path / "moved")
    break_and_expect(folder, "holds no weights: none of model.safetensors")
    (folder / "config.json").write_text('{"n_layer": 3')
    break_and_expect(folder, "config.json is not valid JSON")
    (folder / "config.json").write_text("[]")
    break_and_expect(folder, "config.json must hold a JSON object")
    os.unlink(folder / "config.json")
    break_and_expect(folder, "has no config.json")


def test_an_index_that_disagrees_with_its_files_is_refused(model, tmp_path):
    folder = save_hf(model, tmp_path / "model", max_shard_size="30KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(name for name, file in index["weight_map"].items() if file == first)

    write_json(path, {"weight_map": {**index["weight_map"], name: second}})
    break_and_expect(
        folder, rf"the index names what the file lacks \(1\): {name} in {second}; extra, not in the index \(1\): {name} in {first}"
    )
    write_json(path, {"weight_map": {n: f for n, f in index["weight_map"].items() if n != name}})
    break_and_expect(folder, rf"extra, not in the index \(1\): {name} in {first}")
    write_json(path, {"weight_map": {**index["weight_map"], name: "../elsewhere.safetensors"}})
    break_and_expect(folder, "must hold a weight_map from tensor names to files beside it")
    write_json(path, index)
    os.unlink(folder / second)
    break_and_expect(folder, rf"a file of weights is missing: .*{second}")


def test_a_local_folder_is_found_and_a_missing_path_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("went to the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model_folder("org/name").samefile(tmp_path / "org" / "name")
    for name in ("./missing", "../missing", "/missing/model", "a/b/c", "missing/", "~/missing"):
        with pytest.raises(UserError, match="there is no model folder"):
            resolve_model_folder(name)
    with pytest.raises(UserError, match="is empty"):
        resolve_model_folder("")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file"):
        resolve_model_folder("file")


def test_the_hub_is_asked_for_safetensors_first_and_for_bin_only_without_them(tmp_path, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns, ignore_patterns):
        asked.append(allow_patterns[-1])
        assert ignore_patterns == ["*/*"]
        if name == "org/safe":
            (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model_folder("org/old") == tmp_path
    assert asked == ["*.safetensors", "*.bin"]
    asked.clear()
    assert resolve_model_folder("org/safe") == tmp_path
    assert asked == ["*.safetensors"]


def test_an_unknown_or_unreachable_hub_name_is_one_message_that_says_what_was_tried(monkeypatch):
    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot find the snapshot in the cache\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        UserError,
        match=r"no model org/name: .*org/name is no folder, and the hub's 'org/name' .* \(cannot find the snapshot in the cache\)",
    ):
        resolve_model_folder("org/name")
