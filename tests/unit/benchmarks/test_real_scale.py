"""The rehearsal of real size can be trusted: what it draws, compares, refuses and watches.

Its commands are those of users and are tested elsewhere. Here are its own parts, at toy size."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.ranks import REPOSITORY

from checkpoint.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from checkpoint.tensor_file import TensorSource, write_tensor_file
from user_error import UserError

EXPECTED = REPOSITORY.parent / "shared" / "data" / "expected"
SEED = 3


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import real_weights

    return real_weights


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import real_commands

    return real_commands


@pytest.fixture(params=["tiny-gptj", "tiny-neox"])
def made(real: ModuleType, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A model in several shards, and its config.json."""
    config = {**real.MODELS[request.param], "vocab_size": 300}
    real.make_model(tmp_path / "model", config, SEED, max_shard_bytes=100_000)
    return tmp_path / "model", config


def change(file: Path, offset_from_end: int, with_: Callable[[int], int]) -> None:
    content = bytearray(file.read_bytes())
    content[-offset_from_end] = with_(content[-offset_from_end])
    file.write_bytes(content)


def test_a_made_model_is_what_its_seed_says_and_transformers_loads_it(real: ModuleType, made: tuple[Path, dict[str, Any]]) -> None:
    import transformers

    folder, config = made
    assert len(list(folder.glob("*.safetensors"))) > 1
    found = real.compare(real.weights_of(config, SEED), real.weights_in(folder))
    assert not found.differing
    assert found.num_equal == len(real.weights_of(config, SEED))
    assert len(real.compare(real.weights_of(config, SEED + 1), real.weights_in(folder)).differing) == found.num_equal
    _, how = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not how["missing_keys"]
    assert not how["unexpected_keys"]


def test_one_changed_bit_is_found_and_its_tensor_named(real: ModuleType, made: tuple[Path, dict[str, Any]]) -> None:
    folder, config = made
    file = max(folder.glob("*.safetensors"))
    change(file, 7, lambda byte: byte ^ 1)
    (fault,) = real.compare(real.weights_of(config, SEED), real.weights_in(folder)).differing
    assert fault.endswith(": 1 values differ")
    assert fault.split(":")[0] in real.weights_of(config, SEED)


def test_zero_and_minus_zero_are_different_bits(real: ModuleType, tmp_path: Path) -> None:
    sides = [{"w": TensorSource.of("w", torch.tensor([zero], dtype=torch.float16))} for zero in (0.0, -0.0)]
    assert real.compare(*sides).differing == ["w: 1 values differ"]


def test_a_missing_and_an_additional_weight_are_found(real: ModuleType, made: tuple[Path, dict[str, Any]]) -> None:
    expected = real.weights_of(made[1], SEED)
    fewer = dict(list(expected.items())[1:])
    assert real.compare(expected, fewer).differing == real.compare(fewer, expected).differing
    assert real.compare(fewer, expected).differing == [f"{next(iter(expected))} is there once only"]


@pytest.mark.parametrize("wrong", [None, "of a merged weight", "of an untouched weight", "another scaling"])
def test_a_merged_adapter_is_held_against_its_definition(real: ModuleType, wrong: str | None, tmp_path: Path) -> None:
    config = {**real.MODELS["tiny-gptj"], "vocab_size": 300}
    base = real.weights_of(config, SEED)
    touched, untouched = "transformer.h.1.attn.q_proj.weight", "transformer.h.1.attn.k_proj.weight"
    a, b = torch.randn(2, 64) * 0.1, torch.randn(64, 2) * 0.1
    peft = f"base_model.model.{touched.removesuffix('.weight')}"
    sources = [TensorSource.of(f"{peft}.lora_{side}.weight", tensor) for side, tensor in (("A", a), ("B", b))]
    write_tensor_file(tmp_path / ADAPTER_WEIGHTS, sources, relative_to=tmp_path)
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({"lora_alpha": 3 if wrong == "another scaling" else 4, "r": 2}))
    merged = (base[touched].read().float() + 2 * (b @ a)).half()
    other = base[untouched].read()
    for tensor, its in ((merged, "of a merged weight"), (other, "of an untouched weight")):
        if its == wrong:
            tensor.view(torch.int16)[5, 5] += 2
    seen = {
        **base,
        touched: TensorSource.of(touched, merged),
        untouched: TensorSource.of(untouched, other),
    }
    found = real.compare(base, seen, adapter=tmp_path)
    assert found.num_merged == 1
    assert [fault.split(":")[0] for fault in found.differing] == {
        None: [],
        "of a merged weight": [touched],
        "of an untouched weight": [untouched],
        "another scaling": [touched],
    }[wrong]
    if wrong is None:
        assert found.num_equal == len(base) - 1
        assert found.changed > 0.9


def test_the_shapes_are_the_published_ones(real: ModuleType) -> None:
    billions = {
        "gpt-j-6b": 6_050_882_784,
        "gpt-neox-20b": 20_554_567_680,
        "pythia-410m": 405_334_016,
        "pythia-1b": 1_011_781_632,
    }
    for name, count in {**billions, "pythia-1.4b": 1_414_647_808}.items():
        assert real.bytes_of(real.MODELS[name]) == 2 * count, name


@pytest.mark.skipif(not EXPECTED.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize("name", ["gpt-j-6b", "gpt-neox-20b"])
def test_names_and_shapes_are_those_on_the_hub(real: ModuleType, name: str) -> None:
    lines = (EXPECTED / f"{name}.hub_state_dict_names.tsv").read_text().splitlines()[1:]
    listed = {line.split("\t")[0]: line.split("\t")[1] for line in lines if line.split("\t")[2] == "param"}
    ours = {n: "x".join(map(str, source.shape)) for n, source in real.weights_of(real.MODELS[name], 0).items()}
    assert ours == {n.replace("lm_head.weight", "embed_out.weight") if name != "gpt-j-6b" else n: shape for n, shape in listed.items()}


def test_too_little_disk_or_memory_is_refused_with_both_numbers(real: ModuleType, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    real.check_disk(tmp_path, free // 2, "half of it")
    with pytest.raises(
        UserError,
        match=rf"a model takes {2 * free / 1e9:.1f} GB of disk at most, and .* has [\d.]+ GB",
    ):
        real.check_disk(tmp_path, 2 * free, "a model")
    real.check_memory(10**9, "a stage", available=10**9)
    with pytest.raises(UserError, match=r"a stage takes about 24\.0 GB of memory, and 8\.0 GB are available"):
        real.check_memory(24 * 10**9, "a stage", available=8 * 10**9)


def test_a_command_is_watched_and_its_failure_shown(commands: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(commands, "REPOSITORY", tmp_path)
    monkeypatch.setattr(commands, "SILENCE_S", 0.4)
    memory = "x = bytearray(120_000_000)"
    (tmp_path / "good.py").write_text(f"import time\n{memory}\nprint('first')\ntime.sleep(.8)\nprint('second')\n")
    ran = commands.run_ranks("good.py", {}, tmp_path, "good", num_ranks=2)
    assert ran.statuses == [0, 0]
    assert min(ran.peaks) > 120_000_000
    assert [silence["after"] for silence in ran.silences if silence["after"] != "(the start)"] == ["first"]
    (tmp_path / "bad.py").write_text("import sys\nprint('why', sys.argv[1])\nsys.exit(3)\n")
    with pytest.raises(commands.Broken, match=r"ended with \[3\](.|\n)*why --lr=1"):
        commands.run_ranks("bad.py", {"lr": 1}, tmp_path, "bad")


def test_gaps_between_beats_are_kept_with_what_was_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    import beat_gaps

    now = [100.0]
    monkeypatch.setattr(beat_gaps.time, "monotonic", lambda: now[0])
    gaps = beat_gaps.Gaps(tmp_path / "gaps.json")
    for at, doing in (
        (100.0, "loading"),
        (100.5, "loading"),
        (103.5, "step 1"),
        (104.0, "step 2"),
        (105.0, "step 3"),
    ):
        now[0] = at
        gaps.beat("sent", doing)
    found = json.loads((tmp_path / "gaps.json").read_text())["sent"]
    assert (found["s"], found["before"], found["after"]) == (3.0, "loading", "step 1")
    assert gaps.longest["sent"]["by_kind"] == {"loading": 0.5, "step N": 3.0}
