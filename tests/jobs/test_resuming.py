"""Where a run goes on: any grid, any host, any step that was asked for; and what is said of steps that cannot be resumed."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_tokenizer
from support.ranks import eight_sequences, equal_files, log_rows, losses, steps_in, train, train_on_hosts
from support.tiers import sample
from transformers import AutoModelForCausalLM

STEPS = 8


@pytest.fixture(scope="module")
def flags(model_folder: Path, tasks: list[Path]) -> dict[str, Any]:
    return eight_sequences(model_folder, tasks)


@pytest.fixture(scope="module")
def whole_run(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four optimizer steps, undisturbed, in one process."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, checkpoint_path=folder / "run", **flags)
    return folder / "run"


def copy_until(run: Path, step: int, target: Path) -> Path:
    """A run that got as far as ``step``."""
    target.mkdir(parents=True)
    for folder in run.iterdir():
        if folder.name.isdigit() and int(folder.name) <= step:
            shutil.copytree(folder, target / folder.name)
    return target


GRIDS = {
    "two replicas": {"replicas": 2, "batch_size": 4},
    "two stages, four accumulation steps": {"stages": 2, "batch_size": 2, "gradient_accumulate_step": 4},
    "two stages, two replicas, two accumulation steps": {"stages": 2, "replicas": 2, "batch_size": 2, "gradient_accumulate_step": 2},
    "four micro-batches at once": {"stages": 4, "micro_batch_size": 2},
}


@sample(2)
@pytest.mark.parametrize("grid", GRIDS)
def test_any_grid_resumes_any_other_at_the_same_sequence_and_gives_the_same_losses(
    grid: str, flags: dict[str, Any], whole_run: Path, tmp_path: Path
) -> None:
    run, own = copy_until(whole_run, 2, tmp_path / "run"), {**flags, **GRIDS[grid]}
    accumulation = own.get("gradient_accumulate_step", 1)
    there = train(tmp_path, checkpoint_path=run, **{**own, "total_steps": 4 * accumulation})
    assert f"starting at step {2 * accumulation} of {4 * accumulation}" in there[0].text
    assert losses(run) == pytest.approx(losses(whole_run)[2:], rel=2e-6)
    trainer = json.loads((run / str(4 * accumulation) / "train_state" / "trainer.json").read_text())
    assert (trainer["position"], trainer["data"]["next_sequence_index"]) == (32, 32)
    if accumulation > 1:
        assert f"step 2 of the checkpoint is step {2 * accumulation} of this run" in there[0].text
        back = train(tmp_path, checkpoint_path=run, **{**flags, "total_steps": 5})
        assert "starting at step 4 of 5" in back[0].text, "the newest step is the one of most sequences, whatever its number"


def test_steps_that_count_in_other_units_are_never_mistaken_for_each_other(flags: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    quarters = {**flags, "batch_size": 2, "gradient_accumulate_step": 4, "checkpoint_steps": 4}
    train(tmp_path, checkpoint_path=run, **{**quarters, "total_steps": 8})
    assert steps_in(run) == ["4", "8"]
    processes = train(tmp_path, checkpoint_path=run, **{**flags, "total_steps": 4})
    assert "starting at step 2 of 4" in processes[0].text
    assert steps_in(run) == ["3", "4", "4.set-aside", "8"], "the step 4 that was there counted quarters"
    processes = train(tmp_path, checkpoint_path=run, **{**flags, "total_steps": 5})
    assert "starting at step 4 of 5" in processes[0].text


SPLITS = {"stage by stage": ["a", "b", "a", "b"], "replica by replica": ["a", "a", "b", "b"], "a host each": ["a", "b", "c", "d"]}


@sample(1)
@pytest.mark.parametrize("split", SPLITS)
def test_hosts_without_a_shared_disk_keep_their_layers_and_resume_bit_for_bit(split: str, flags: dict[str, Any], tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")  # another than the model's, on rank 0 alone
    own = {**flags, "batch_size": 4, "data_group_size": 2, "tokenizer_name": tmp_path / "tokenizer"}
    train(tmp_path, stages=2, replicas=2, checkpoint_path=tmp_path / "shared", **{k: v for k, v in own.items() if k != "data_group_size"})
    roots = [tmp_path / "hosts" / name for name in SPLITS[split]]
    train_on_hosts(tmp_path, roots, stages=2, **{**own, "total_steps": 2})
    weights = {root.name: sorted(path.name for path in (root / "2").glob("*.safetensors")) for root in roots}
    first, last = ["embeddings", "layer_00", "layer_01"], ["layer_02", "layer_03", "lm_head"]
    for place, root in enumerate(roots):
        held = first + last if split == "replica by replica" else (first, last)[place % 2]
        assert weights[root.name] == [f"{key}.safetensors" for key in held]
    train_on_hosts(tmp_path, roots, stages=2, **own)
    for root in roots:
        for file in sorted((root / "4").rglob("*.safetensors")):
            assert file.read_bytes() == (tmp_path / "shared" / "4" / file.relative_to(root / "4")).read_bytes()
    assert losses(roots[0]) == losses(tmp_path / "shared")


def test_layers_travel_to_the_ranks_that_need_them_when_cut_and_hosts_change(
    flags: dict[str, Any], whole_run: Path, tmp_path: Path
) -> None:
    """Stages 0 1 2 3 on hosts a b a b, then stages 0 1 on b c, of which c is new: every layer has another place."""
    a, b, c = (tmp_path / name for name in "abc")
    train_on_hosts(tmp_path, [a, b, a, b], stages=4, **{**flags, "total_steps": 2})
    assert not (b / "2" / "layer_00.safetensors").exists()
    train_on_hosts(tmp_path, [a, b], stages=2, **{**flags, "total_steps": 3})
    processes = train_on_hosts(tmp_path, [b, a, c, a], stages=4, **flags)
    assert "is 3 folders: of rank 0 on" in processes[0].text
    assert "starting at step 3 of 4" in processes[0].text
    assert losses(a) + losses(b) == losses(whole_run)
    assert not list(c.glob(".collected*")), "what was collected is gone"
    for root in (a, b, c):
        for file in sorted((root / "4").rglob("*.safetensors")):
            assert file.read_bytes() == (whole_run / "4" / file.relative_to(root / "4")).read_bytes()


def test_a_step_that_lacks_a_host_is_passed_over_for_one_that_is_whole(flags: dict[str, Any], whole_run: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    train_on_hosts(tmp_path, [a, b], stages=2, **{**flags, "total_steps": 3})
    shutil.rmtree(b / "3")
    processes = train_on_hosts(tmp_path, [a, b], stages=2, **flags)
    assert "passed over" in processes[0].text and "layer_02.safetensors" in processes[0].text
    assert "starting at step 2 of 4" in processes[0].text
    assert (a / "3.set-aside").is_dir() or (a / "3.damaged").is_dir(), "nothing is ever lost"
    assert losses(a)[3:] == losses(whole_run)[2:]


def test_a_commit_that_one_host_missed_is_completed(flags: dict[str, Any], whole_run: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    train_on_hosts(tmp_path, [a, b], stages=2, **{**flags, "total_steps": 3})
    (b / "3").rename(b / ".3.partial")  # killed before the rename, after a's
    processes = train_on_hosts(tmp_path, [a, b], stages=2, **flags)
    assert "completing" in processes[1].text
    assert "starting at step 3 of 4" in processes[0].text
    (b / "4").rename(b / ".4.partial")
    (a / "4").rename(a / ".4.partial")  # killed before anybody's rename
    processes = train_on_hosts(tmp_path, [a, b], stages=2, **flags)
    assert "starting at step 3 of 4" in processes[0].text
    assert losses(a)[-1] == losses(whole_run)[-1]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def other_dtype(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


DAMAGES: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "truncated": (truncate, "layer_01.safetensors has", False),
    "missing": (os.unlink, "layer_01.safetensors is missing", False),
    "another dtype": (other_dtype, "layer_01.safetensors has", False),
    "a flipped byte": (flip_a_byte, "layer_01.safetensors has changed", True),
    "a flipped byte in the moments": (lambda path: flip_a_byte(path.parent / "train_state" / path.name), "has changed", True),
    "a damaged manifest": (lambda path: truncate(path.parent / "manifest.json"), "manifest.json is not valid JSON", False),
    "a damaged trainer.json": (lambda path: truncate(path.parent / "train_state" / "trainer.json"), "trainer.json has", False),
}


@sample(3)
@pytest.mark.parametrize(("damage", "stages"), itertools.product(DAMAGES, [1, 2]))
def test_a_damaged_newest_step_falls_back_to_the_older_one_with_file_and_reason(
    damage: str, stages: int, flags: dict[str, Any], whole_run: Path, tmp_path: Path
) -> None:
    run = copy_until(whole_run, 3, tmp_path / "run")
    spoil, reason, needs_hashes = DAMAGES[damage]
    spoil(run / "3" / "layer_01.safetensors")
    (process, *_) = train(tmp_path, stages=stages, checkpoint_path=run, verify_checkpoint=str(needs_hashes).lower(), **flags)
    assert "passed over" in process.text and reason in process.text
    assert "starting at step 2 of 4" in process.text
    assert losses(run) == losses(whole_run)[2:]
    assert equal_files(run / "4", whole_run / "4") == []
    assert [name for name in steps_in(run) if name.startswith("3")] in (["3", "3.damaged"], ["3", "3.set-aside"])


def test_an_extra_file_in_a_step_is_harmless(flags: dict[str, Any], whole_run: Path, tmp_path: Path) -> None:
    run = copy_until(whole_run, 3, tmp_path / "run")
    (run / "3" / "notes.txt").write_text("mine")
    (process,) = train(tmp_path, checkpoint_path=run, verify_checkpoint="true", **flags)
    assert "starting at step 3 of 4" in process.text


def test_when_nothing_can_be_resumed_the_run_does_not_start_over_by_itself(flags: dict[str, Any], whole_run: Path, tmp_path: Path) -> None:
    run = copy_until(whole_run, 1, tmp_path / "run")
    truncate(run / "1" / "lm_head.safetensors")
    for process in train(tmp_path, stages=2, expect=1, checkpoint_path=run, **flags):
        assert "none can be resumed" in process.text and "lm_head.safetensors has" in process.text and "--resume none" in process.text
    train(tmp_path, stages=2, checkpoint_path=run, resume="none", **flags)
    assert losses(run) == losses(whole_run)
    assert "1.damaged" in steps_in(run)


def test_resume_none_a_step_or_a_path(flags: dict[str, Any], whole_run: Path, tmp_path: Path) -> None:
    run = copy_until(whole_run, 4, tmp_path / "run")
    for _ in range(2):
        (process,) = train(tmp_path, checkpoint_path=run, resume="2", **flags)
        assert "starting at step 2 of 4" in process.text and "is newer than the start of this run and is kept as" in process.text
    assert steps_in(run) == ["1", "2", "3", "3.set-aside", "3.set-aside.1", "4", "4.set-aside", "4.set-aside.1"]
    (process,) = train(tmp_path, checkpoint_path=run, resume="none", **flags)
    assert "starting at step 0 of 4" in process.text
    assert log_rows(run)[-4:][0]["loss"] == losses(whole_run)[0]
    for path in (whole_run / "3", whole_run):
        elsewhere = tmp_path / f"from {path.name}"
        (process, _) = train(tmp_path, stages=2, checkpoint_path=elsewhere, resume=path, **{**flags, "total_steps": 5})
        assert f"starting at step {3 if path.name == '3' else 4} of 5" in process.text
    assert losses(tmp_path / "from 3")[0] == losses(whole_run)[3]
    for wrong, reason in (("17", "there is no folder"), (str(tmp_path / "nowhere"), "holds no checkpoint")):
        for process in train(tmp_path, stages=2, expect=1, checkpoint_path=run, resume=wrong, **flags):
            assert reason in process.text and "Traceback" not in process.text


def test_without_optimizer_states_a_resume_warns_and_starts_fresh_moments(flags: dict[str, Any], whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tmp_path, checkpoint_path=run, checkpoint_optimizer="false", **{**flags, "total_steps": 2})
    assert sorted(path.name for path in (run / "2" / "train_state").iterdir()) == ["trainer.json"]
    AutoModelForCausalLM.from_pretrained(run / "2")
    (process, *_) = train(tmp_path, stages=2, checkpoint_path=run, **flags)
    assert "no optimizer states" in process.text and "starting at step 2 of 4" in process.text
    assert losses(run)[2] == losses(whole_run)[2], "the weights are the same"
    assert losses(run)[3] != losses(whole_run)[3], "the moments are not"


def test_verify_resume_finds_the_stored_loss_again_and_notices_other_weights(flags: dict[str, Any], tmp_path: Path) -> None:
    run, own = tmp_path / "run", {**flags, "verify_resume": "true", "batch_size": 4, "gradient_accumulate_step": 2, "checkpoint_steps": 2}
    train(tmp_path, stages=2, checkpoint_path=run, **{**own, "total_steps": 4})
    plain = tmp_path / "plain"
    train(tmp_path, checkpoint_path=plain, **{**own, "verify_resume": "false", "total_steps": 6})
    shutil.copytree(run, tmp_path / "spoilt")
    (process, *_) = train(tmp_path, stages=4, checkpoint_path=run, **{**own, "total_steps": 6})
    assert "verified" in process.text and "bit for bit" in process.text
    assert losses(run) == losses(plain), "verifying changes nothing"
    (process, *_) = train(tmp_path, stages=2, checkpoint_path=run, **{**own, "micro_batch_size": 2, "total_steps": 8})
    assert "verified" in process.text and "--micro-batch-size (1 then, 2 now) changed" in process.text
    from safetensors.torch import load_file, save_file

    file = tmp_path / "spoilt" / "4" / "layer_01.safetensors"
    weights = load_file(file)
    weights["transformer.h.1.mlp.fc_in.weight"] += 1e-3 * torch.randn(128, 32, generator=torch.Generator().manual_seed(0))
    save_file(weights, file)
    size = json.loads((file.parent / "manifest.json").read_text())
    size["files"][file.name]["size"] = file.stat().st_size
    (file.parent / "manifest.json").write_text(json.dumps(size))
    for process in train(tmp_path, stages=2, expect=1, checkpoint_path=tmp_path / "spoilt", **{**own, "total_steps": 6}):
        assert "do not compute what was stored with them" in process.text and "Traceback" not in process.text
