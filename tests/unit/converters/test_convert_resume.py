"""The same command after kill -9: it continues, says so, and what comes out is what an undisturbed run writes."""

import pytest
import torch
from support.checkpoints import killed_at, same_bytes
from support.conversions import NUM_LAYERS, from_hf, make_hf, to_hf, write_stages
from support.tiers import sample

from checkpoint.model_folder import ModelFolder

L = 6
CASES = {"layers": (from_hf, []), "layer shards": (from_hf, ["--legacy-layout"]), "hugging face": (to_hf, ["--max-shard-size", "12KB"])}


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setitem(NUM_LAYERS, "gptj", L)
    return tmp_path / "model", make_hf("gptj", tmp_path / "model", dtype=torch.float32, num_layers=L)


def contents(folder):
    opened = ModelFolder.open(folder)
    return {name: opened.read(name).clone() for name in opened.names()}


@sample(1)
@pytest.mark.parametrize("case", CASES)
def test_a_killed_conversion_continues_where_it_was_and_says_so(case, model, tmp_path, capsys):
    convert, more = CASES[case]
    source, weights = model
    num_continued = []
    for k in (3, 12, 20, 28, 36):
        out = tmp_path / str(k)
        target = out / "model" if convert is from_hf else out
        command = ("gptj", source, out, *more)
        assert killed_at(k, lambda command=command: convert(*command)), "it ended before it was killed"
        assert not target.exists()
        capsys.readouterr()
        assert convert(*command, "--verify") == 0
        err = capsys.readouterr().err
        num_continued.append(int(err.partition(" files (")[0].rpartition(" ")[2]) if "continuing in" in err else 0)
        assert same_bytes(contents(target), weights)
        assert not [path.name for path in target.iterdir() if path.name.startswith(".")]
        assert not [path for path in target.parent.iterdir() if path.name.endswith(".partial")]
    assert num_continued[0] == 0
    assert num_continued == sorted(num_continued)
    assert num_continued[-1] > 1


@pytest.mark.parametrize("case", CASES)
def test_another_command_starts_over_and_does_not_mix(case, model, tmp_path, capsys):
    convert, more = CASES[case]
    source, weights = model
    assert killed_at(36, lambda: convert("gptj", source, tmp_path / "out", *more))
    capsys.readouterr()
    assert convert("gptj", source, tmp_path / "out", "--dtype", "bf16", "--verify", *more) == 0
    assert "continuing" not in capsys.readouterr().err
    target = tmp_path / "out" / "model" if convert is from_hf else tmp_path / "out"
    assert same_bytes(contents(target), {name: tensor.bfloat16() for name, tensor in weights.items()})


def test_a_relatives_checkpoint_that_changed_meanwhile_is_converted_anew(model, tmp_path, capsys):
    source, weights = model
    more = ("--config-name", str(source), "--max-shard-size", "12KB")
    write_stages("gptj", tmp_path / "5", weights, [3, 3])
    assert killed_at(36, lambda: to_hf("gptj", tmp_path / "5", tmp_path / "out", *more))
    later = {name: tensor + 1 for name, tensor in weights.items()}
    for file in (tmp_path / "5").iterdir():
        file.unlink()
    (tmp_path / "5").rmdir()
    write_stages("gptj", tmp_path / "5", later, [3, 3])
    capsys.readouterr()
    assert to_hf("gptj", tmp_path / "5", tmp_path / "out", *more) == 0
    assert "continuing" not in capsys.readouterr().err
    assert same_bytes(contents(tmp_path / "out"), later)
