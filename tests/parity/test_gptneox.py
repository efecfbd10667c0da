"""GPT-NeoX: computes what Hugging Face computes, reads every form of its files, refuses what it would compute otherwise, and trains."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import TEXTS, make_neox_model
from support.ranks import SHARED, equal_files, example_tokens, losses, train
from support.tiers import sample
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM
from transformers.activations import ACT2FN

from checkpoint.hf_folder import write_hf_folder
from checkpoint.layered_folder import write_model_folder
from checkpoint.model_folder import ModelFolder, check_model_folder, load_stage
from modules.families import is_legacy_buffer, read_model_config
from modules.gptneox import GPTNeoXConfig
from modules.lm_ops import Segments, next_token_targets
from modules.model_config import GELU_OF_ACTIVATION
from modules.stage import Stage, empty_stage, meta_stage
from training.checkpoints.saver import Saver
from user_error import UserError

NUM_LAYERS, SEQ_LENGTH = 4, 24
HEAD = "embed_out.weight"
OLD_FORM = {"rotary_pct": 0.5, "rotary_emb_base": 5000}  # of the rotary settings of the tiny model (conftest.py)
NEW_FORM = {"partial_rotary_factor": 0.5, "rope_theta": 5000}

# Written down from the models' own config.json files.
NEOX_20B = {
    "model_type": "gpt_neox", "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
    "intermediate_size": 24576, "hidden_act": "gelu_fast", "rotary_pct": 0.25, "rotary_emb_base": 10000, "layer_norm_eps": 1e-5,
    "initializer_range": 0.02, "max_position_embeddings": 2048, "tie_word_embeddings": False, "attention_probs_dropout_prob": 0,
    "hidden_dropout_prob": 0,
}  # fmt: skip
PYTHIA_70M = {
    **NEOX_20B, "vocab_size": 50304, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048,
    "hidden_act": "gelu", "use_parallel_residual": True,
}  # fmt: skip
REDPAJAMA_3B = {
    **NEOX_20B, "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240, "hidden_act": "gelu",
    "rotary_pct": 1.0, "use_parallel_residual": False,
}  # fmt: skip
GPTJ_6B = {
    "model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_inner": None, "n_positions": 2048,
    "rotary": True, "rotary_dim": 64, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def load(folder: Path) -> Stage:
    opened = ModelFolder.open(folder)
    config = read_model_config(opened.config)
    check_model_folder(opened, config)
    stage = empty_stage(config, 0, config.num_layers)
    load_stage(stage, opened)
    return stage


def copy_of(folder: Path, target: Path, change: Callable[[dict[str, Any]], object] = lambda config: None) -> Path:
    """A copy of ``folder`` whose config.json went through ``change``."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """(1, T, V) of a fixed sequence, ours or theirs."""
    ids = torch.arange(5, 5 + SEQ_LENGTH)[None]
    if isinstance(model, Stage):
        return model.logits(model(ids, Segments.from_positions(torch.arange(SEQ_LENGTH)[None])))
    return model(ids).logits  # type: ignore[no-any-return]


def distance(seen: Tensor, expected: Tensor) -> float:
    """Relative."""
    return ((seen - expected).norm() / expected.norm()).item()


def compare_with_hf(folder: Path, tokens: Tensor) -> None:
    """Logits, loss and the gradient of every parameter; Hugging Face runs each document of ``tokens`` (N, 2, T) on its own."""
    ours, theirs = load(folder), GPTNeoXForCausalLM.from_pretrained(folder)
    ids, positions = tokens[:, 0].long(), tokens[:, 1].long()
    segments, targets = Segments.from_positions(positions), next_token_targets(ids, positions)
    hidden = ours(ids, segments)
    loss = ours.loss_sum(hidden, targets)
    loss.backward()
    documents = [row[None, start:end] for row, bounds in zip(ids, segments.bounds, strict=True) for start, end in bounds]
    reference = torch.cat([theirs(document).logits for document in documents], dim=1).view(*ids.shape, -1)  # (N, T, V)
    reference_loss = torch.nn.functional.cross_entropy(reference.flatten(0, 1), targets.flatten(), reduction="sum")
    reference_loss.backward()
    assert distance(ours.logits(hidden), reference) <= 2e-6
    assert loss.item() == pytest.approx(reference_loss.item(), rel=1e-6)
    expected = {name.replace("lm_head", "embed_out"): parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(expected) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert distance(parameter.grad, expected[name]) <= 2e-6, name  # type: ignore[arg-type]


@sample(3)
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_fast"])
@pytest.mark.parametrize("rotary_pct", [0.25, 1.0])
@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_logits_and_every_gradient_are_hugging_faces_also_for_packed_documents(
    parallel: bool, rotary_pct: float, hidden_act: str, tmp_path: Path
) -> None:
    make_neox_model(tmp_path, use_parallel_residual=parallel, rotary_pct=rotary_pct, hidden_act=hidden_act)
    packed, _ = example_tokens(6, SEQ_LENGTH, 320)
    assert (packed[:, 1] == 0).sum() > 12, "documents must be packed in this test"
    whole = packed.clone()
    whole[:, 1] = torch.arange(SEQ_LENGTH)
    for tokens in (packed, whole):
        compare_with_hf(tmp_path, tokens)


def test_without_attention_bias_there_is_none(tmp_path: Path) -> None:
    make_neox_model(tmp_path, attention_bias=False)
    assert not [name for name, _ in load(tmp_path).named_parameters() if "attention." in name and name.endswith("bias")]
    compare_with_hf(tmp_path, example_tokens(2, SEQ_LENGTH, 320)[0])


def test_a_residual_of_which_the_configuration_says_nothing_is_parallel(neox_folder: Path, tmp_path: Path) -> None:
    """The 20B file has no such key."""
    silent = copy_of(neox_folder, tmp_path / "silent", lambda config: config.pop("use_parallel_residual"))
    parallel = copy_of(neox_folder, tmp_path / "parallel", lambda config: config.update(use_parallel_residual=True))
    sequential = copy_of(neox_folder, tmp_path / "sequential", lambda config: config.update(use_parallel_residual=False))
    assert torch.equal(logits_of(load(silent)), logits_of(load(parallel)))
    assert distance(logits_of(load(silent)), logits_of(GPTNeoXForCausalLM.from_pretrained(silent))) <= 2e-6
    assert distance(logits_of(load(sequential)), logits_of(load(parallel))) > 0.01


def test_query_key_value_lies_head_by_head(neox_folder: Path, tmp_path: Path) -> None:
    """All q, then all k, then all v, as GPT-J's three weights would be joined, has the same shape and is another model."""
    folder = copy_of(neox_folder, tmp_path / "joined")
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "query_key_value" in name]:
        heads = weights[name].view(4, 3, 8, -1)  # (H, q k v, D, C)
        weights[name] = heads.transpose(0, 1).reshape(weights[name].shape).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    expected = logits_of(GPTNeoXForCausalLM.from_pretrained(neox_folder))
    assert distance(logits_of(load(neox_folder)), expected) <= 2e-6
    assert distance(logits_of(load(folder)), expected) > 0.01


def test_the_exact_gelu_and_the_tanh_one_are_chosen_by_hidden_act(neox_folder: Path, tmp_path: Path) -> None:
    x = torch.linspace(-4, 4, 401)
    for name, approximate in GELU_OF_ACTIVATION.items():
        exact, tanh = ((torch.nn.functional.gelu(x, approximate=kind) - ACT2FN[name](x)).abs().max() for kind in ("none", "tanh"))
        assert (exact if approximate == "none" else tanh) < 1e-6 < 1e-4 < (tanh if approximate == "none" else exact), name
    logits = {}
    for name in ("gelu", "gelu_fast"):
        folder = copy_of(neox_folder, tmp_path / name, lambda config, name=name: config.update(hidden_act=name))  # type: ignore[misc]
        logits[name] = logits_of(load(folder))
        assert distance(logits[name], logits_of(GPTNeoXForCausalLM.from_pretrained(folder))) <= 2e-6
    assert distance(logits["gelu"], logits["gelu_fast"]) > 2e-5


@pytest.mark.parametrize(
    ("config", "num_parameters", "num_tensors", "rotary_dim"),
    [
        (NEOX_20B, 20_554_567_680, 532, 24),
        (PYTHIA_70M, 70_426_624, 76, 16),
        (REDPAJAMA_3B, 2_775_864_320, 388, 80),
        (GPTJ_6B, 6_050_882_784, 285, 64),
    ],
    ids=["20b", "pythia-70m", "redpajama-3b", "gptj-6b"],
)
def test_published_models_have_their_published_sizes(
    config: dict[str, Any], num_parameters: int, num_tensors: int, rotary_dim: int
) -> None:
    read = read_model_config(config)
    parameters = list(meta_stage(read, 0, read.num_layers).parameters())
    assert (sum(p.numel() for p in parameters), len(parameters), read.rotary_dim) == (num_parameters, num_tensors, rotary_dim)


def test_what_published_configurations_say_is_what_is_computed() -> None:
    seen = [GPTNeoXConfig.from_hf(config) for config in (NEOX_20B, PYTHIA_70M, REDPAJAMA_3B)]
    assert [(config.parallel_residual, config.gelu) for config in seen] == [(True, "tanh"), (True, "none"), (False, "none")]
    dropouts = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
    assert GPTNeoXConfig.from_hf({**NEOX_20B, **dropouts}) == seen[0], "stray keys, which transformers ignores, too"


def test_the_20b_checkpoint_holds_just_our_names_and_shapes_and_legacy_buffers() -> None:
    table = SHARED / "data" / "expected" / "gpt-neox-20b.hub_state_dict_names.tsv"
    if not table.is_file():
        pytest.skip(f"{table} is not here")
    rows = [line.split("\t") for line in table.read_text().splitlines()[1:]]
    ours = meta_stage(GPTNeoXConfig.from_hf(NEOX_20B), 0, 44).state_dict()
    assert {name: "x".join(map(str, tensor.shape)) for name, tensor in ours.items()} == {
        name: shape for name, shape, kind in rows if kind == "param"
    }
    assert [name for name, _, kind in rows if is_legacy_buffer(name) != (kind == "legacy-buffer")] == []


def rotary_of(**keys: Any) -> tuple[int, float]:
    bare = {key: value for key, value in PYTHIA_70M.items() if not key.startswith("rotary")}
    return (config := GPTNeoXConfig.from_hf({**bare, **keys})).rotary_dim, config.rotary_base


def test_rotary_settings_are_read_in_the_old_form_and_in_the_new() -> None:
    assert rotary_of(**OLD_FORM) == (32, 5000)
    assert rotary_of(rope_parameters={"rope_type": "default", **NEW_FORM}) == (32, 5000)
    assert rotary_of(rope_parameters=NEW_FORM, **OLD_FORM, rope_scaling=None) == (32, 5000)
    assert rotary_of(rope_scaling=NEW_FORM) == (32, 5000), "as transformers 5 reads it"
    assert rotary_of(**NEW_FORM) == (32, 5000)
    assert rotary_of() == (16, 10000), "the defaults of transformers"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"rope_parameters": {"partial_rotary_factor": 1.0}}, "rotary_pct 0.25 and rope_parameters.partial_rotary_factor 1.0"),
        ({"rope_parameters": {"rope_theta": 5000}}, "rotary_emb_base 10000 and rope_parameters.rope_theta 5000"),
        ({"rope_scaling": {"type": "default", "rope_theta": 1e6}}, "rotary_emb_base 10000 and rope_scaling.rope_theta 1000000.0"),
        ({"rotary_emb_base": None, "rope_theta": 5, "rope_parameters": {"rope_theta": 9}}, "rope_theta 5 and rope_parameters.rope_theta 9"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling {'type': 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling {'type': 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn"}, "rope_scaling": {"type": "default"}}, "rope_parameters {'rope_type': 'yarn'"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": "0.25"}}, "rope_parameters.partial_rotary_factor '0.25'"),
        ({"rotary_pct": [0.25]}, "rotary_pct [0.25]"),
        ({"rotary_pct": 0}, "rotary_pct 0 "),
        ({"rotary_pct": 1.5}, "rotary_pct 1.5"),
        ({"rotary_pct": 1e308}, "rotary_pct 1e+308"),
        ({"rotary_pct": 0.01}, "rotary_pct 0.01 of head width 64"),
        ({"rotary_pct": 0.05}, "rotary_pct 0.05 of head width 64"),
        ({"rotary_emb_base": True}, "rotary_emb_base True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings true"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"hidden_act": ["gelu"]}, "hidden_act ['gelu']"),
        ({"use_parallel_residual": "false"}, "use_parallel_residual 'false'"),
        ({"attention_bias": 0}, "attention_bias 0"),
        ({"num_attention_heads": 7}, "hidden_size 512 that num_attention_heads 7"),
        ({"num_hidden_layers": 0, "vocab_size": "50k"}, "vocab_size '50k' (a whole number of at least 1); num_hidden_layers 0"),
        ({"intermediate_size": None}, "intermediate_size None"),
        ({"layer_norm_eps": 0}, "layer_norm_eps 0"),
        ({"model_type": "gpt_neo"}, "'gpt_neo'"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_key_and_value(change: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=re.escape(wanted)):
        read_model_config({**PYTHIA_70M, **change})


def legacy_buffers(kind: torch.dtype) -> dict[str, Tensor]:
    """What old writers stored beside the weights; the table is nonsense, so that a reader of it computes nonsense."""
    buffers: dict[str, Tensor] = {}
    for i in range(NUM_LAYERS):
        attention = f"gpt_neox.layers.{i}.attention"
        buffers[f"{attention}.bias"] = torch.ones(1, 1, 64, 64).tril().to(kind)
        buffers[f"{attention}.masked_bias"] = torch.tensor(-1e9).to(torch.float16 if kind == torch.float16 else torch.float32)
        buffers[f"{attention}.rotary_emb.inv_freq"] = torch.full((2,), 7.0, dtype=torch.float32 if kind == torch.uint8 else torch.float16)
    return buffers


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float16], ids=str)
@pytest.mark.parametrize("head", [HEAD, "lm_head.weight"])
def test_old_buffers_are_dropped_and_either_name_of_the_head_is_read_and_the_right_one_written(
    head: str, kind: torch.dtype, file: str, neox_folder: Path, tmp_path: Path
) -> None:
    folder = copy_of(neox_folder, tmp_path / "old")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert HEAD in weights, "what transformers writes"
    old = {head if name == HEAD else name: tensor for name, tensor in weights.items()} | legacy_buffers(kind)
    torch.save(old, folder / file) if file.endswith(".bin") else save_file(old, folder / file)
    source = ModelFolder.open(folder)
    assert source.names() == sorted(weights)
    assert torch.equal(logits_of(load(folder)), logits_of(load(neox_folder)))
    config = read_model_config(source.config)
    written = (write_model_folder(source, tmp_path / "layered", config), tmp_path / "hf")
    write_hf_folder(source, written[1], config, max_shard_bytes=30_000)
    for target in written:
        tensors: dict[str, Tensor] = {}
        for part in target.glob("*.safetensors"):
            tensors |= load_file(part)
        assert tensors.keys() == weights.keys()
        assert all(torch.equal(tensors[name], weights[name]) for name in weights)
        assert json.loads((target / "model.safetensors.index.json").read_text())["weight_map"].keys() == weights.keys()


@pytest.mark.parametrize("form", [OLD_FORM, {"rope_parameters": NEW_FORM}], ids=["from the old form", "from the new form"])
def test_a_written_configuration_says_the_same_to_transformers_4_and_5(form: dict[str, Any], neox_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(neox_folder, tmp_path / "source", lambda config: (config.pop("rope_parameters"), config.update(form)))
    source = ModelFolder.open(folder)
    config = read_model_config(source.config)
    write_hf_folder(source, tmp_path / "hf", config, max_shard_bytes=10**9)
    for folder in (write_model_folder(source, tmp_path / "layered", config), tmp_path / "hf"):
        assert_both_forms(folder)
        assert read_model_config(ModelFolder.open(folder).config) == config


def assert_both_forms(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())
    assert written.items() >= OLD_FORM.items(), "what 4.x reads"
    assert written["rope_parameters"] == {"rope_type": "default", **NEW_FORM}, "what 5.x reads"
    assert AutoConfig.from_pretrained(folder).rope_parameters == written["rope_parameters"]


@pytest.fixture(scope="module")
def flags(neox_folder: Path, tasks: list[Path]) -> dict[str, Any]:
    sizes = {"seq_length": 32, "batch_size": 4, "micro_batch_size": 2, "total_steps": 4, "checkpoint_steps": 2, "lr": 1e-3}
    return {"model_name": neox_folder, "model_type": "gptneox", "task_name": f"{tasks[0]}:0.7,{tasks[1]}:0.3", **sizes}


@pytest.fixture(scope="module")
def runs(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run per number of stages, in <stages>/; beside it, <stages>-<step>-4.pt: the live parameters' logits at every save."""
    root = tmp_path_factory.mktemp("neox-runs")
    ids, segments = torch.arange(5, 5 + SEQ_LENGTH)[None], Segments.from_positions(torch.arange(SEQ_LENGTH)[None])
    original = Saver.save

    @torch.no_grad()
    def note_and_save(self: Saver, step: int, *arguments: Any, **flags: Any) -> float:
        stage, prefix = self._stage, f"{self._job.place.pp_size}-{step}"
        before, after = root / f"{prefix}-{stage.first}.pt", root / f"{prefix}-{stage.last}.pt"
        while stage.first > 0 and not before.exists():
            time.sleep(0.01)
        x = stage(ids if stage.first == 0 else torch.load(before), segments)
        torch.save(stage.logits(x) if stage.has_head else x, after.with_suffix(".partial"))
        after.with_suffix(".partial").rename(after)
        return original(self, step, *arguments, **flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", note_and_save)
        for stages in (1, 2, 4):
            train(root / "ranks", stages=stages, checkpoint_path=root / str(stages), **flags)
    return root


@pytest.mark.parametrize("stages", [2, 4])
def test_pipeline_degrees_give_the_same_losses_and_files_bit_for_bit(stages: int, runs: Path) -> None:
    assert losses(runs / str(stages)) == losses(runs / "1")
    assert losses(runs / "1")[-1] < losses(runs / "1")[0]
    for step in ("2", "4"):
        assert equal_files(runs / str(stages) / step, runs / "1" / step) == []


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_every_checkpoint_loads_with_from_pretrained_and_gives_the_trainers_own_logits(stages: int, runs: Path) -> None:
    for step in (2, 4):
        folder = runs / str(stages) / str(step)
        assert_both_forms(folder)
        live = torch.load(runs / f"{stages}-{step}-{NUM_LAYERS}.pt")
        assert distance(logits_of(AutoModelForCausalLM.from_pretrained(folder)), live) <= 2e-6
        assert torch.equal(logits_of(load(folder)), live), "what training reads is what is saved, bit for bit"


@pytest.mark.parametrize(("first", "then"), [(1, 4), (4, 2)])
def test_resume_at_another_degree_is_bitwise(first: int, then: int, runs: Path, flags: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / str(first), run)
    shutil.rmtree(run / "4")
    (process, *_) = train(tmp_path / "ranks", stages=then, checkpoint_path=run, **flags)
    assert "starting at step 2 of 4" in process.text
    assert equal_files(run / "4", runs / "1" / "4") == []


def test_fresh_weights_need_a_configuration_and_a_tokenizer_only(flags: dict[str, Any], tmp_path: Path) -> None:
    bare = copy_of(flags["model_name"], tmp_path / "bare", lambda config: config.update(initializer_range=0.05))
    (bare / "model.safetensors").unlink()
    fresh = {**flags, "model_name": bare, "load_pretrained_model": "false", "total_steps": 1, "lr": 1e-9}
    for stages in (1, 2):
        train(tmp_path / "ranks", stages=stages, checkpoint_path=tmp_path / str(stages), **fresh)
    assert equal_files(tmp_path / "1" / "1", tmp_path / "2" / "1") == []
    for name, tensor in load_file(tmp_path / "1" / "1" / "layer_00.safetensors").items():
        if tensor.ndim == 2:
            assert 0.045 < tensor.std() < 0.055, name
        else:
            torch.testing.assert_close(tensor, torch.full_like(tensor, float("norm.weight" in name)), rtol=0, atol=1e-6)


def test_the_model_type_is_checked_against_the_configuration(flags: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    for folder, model_type, seen in ((flags["model_name"], "gptj", "'gpt_neox'"), (model_folder, "gptneox", "'gptj'")):
        wrong = {**flags, "model_name": folder, "model_type": model_type}
        (process,) = train(tmp_path / "ranks", expect=1, checkpoint_path=tmp_path / "run", **wrong)
        assert f"it is {model_type}, {folder / 'config.json'} says {seen}" in process.text
        assert "Traceback" not in process.text


def test_a_model_of_50432_rows_trains_with_the_real_tokenizer(flags: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = SHARED / "data" / "tokenizers" / "gpt-neox-20b"
    if not tokenizer.is_dir():
        pytest.skip(f"{tokenizer} is not here")
    make_neox_model(tmp_path / "model", vocab_size=50432, num_hidden_layers=2)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:20]))
    real = {**flags, "model_name": tmp_path / "model", "tokenizer_name": tokenizer, "task_name": tmp_path / "lines.jsonl"}
    train(tmp_path / "ranks", stages=2, checkpoint_path=tmp_path / "run", **{**real, "total_steps": 2})
    assert len(losses(tmp_path / "run")) == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "2")("    x\n\nHello world")["input_ids"][0] == 50274
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "2").config.vocab_size == 50432
