"""Whole runs of the trainer's own main() in forked ranks: same bits at any pipeline degree, after kill -9, after resume at another
degree.
"""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import make_model, make_tokenizer
from support.ranks import equal_files, free_port, launch, log_rows, losses, train, train_argv
from support.tiers import full, sample
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint.model_folder import ModelFolder, load_stage
from modules.gptj import GPTJConfig
from modules.lm_ops import Segments
from modules.stage import empty_stage, layer_key_of_index
from optim import build
from training.checkpoints import saver

STEPS = 6


@pytest.fixture(scope="module")
def flags(model_folder: Path, tasks: list[Path]) -> dict[str, Any]:
    return {
        "model_name": model_folder,
        "task_name": f"{tasks[0]}:0.7,{tasks[1]}:0.2,{tasks[2]}:0.1",
        "seq_length": 32,
        "batch_size": 4,
        "micro_batch_size": 2,
        "total_steps": STEPS,
        "checkpoint_steps": 2,
        "lr": 1e-3,
        "warmup_steps": 2,
    }


@pytest.fixture(scope="module")
def reference(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of one stage."""
    out = tmp_path_factory.mktemp("reference")
    train(out / "ranks", checkpoint_path=out / "run", **flags)
    return out / "run"


@pytest.mark.parametrize("stages", [2, 4])
def test_pipeline_degrees_give_the_same_losses_and_states_bit_for_bit(
    stages: int, flags: dict[str, Any], reference: Path, tmp_path: Path
) -> None:
    train(tmp_path, stages=stages, checkpoint_path=tmp_path / "run", **flags)
    assert losses(tmp_path / "run") == losses(reference)
    assert len(losses(reference)) == STEPS
    for step in (2, 4, 6):
        assert equal_files(tmp_path / "run" / str(step), reference / str(step)) == []


def test_the_loss_falls(reference: Path) -> None:
    assert losses(reference)[-1] < losses(reference)[0] - 0.1


def kill_in_step(step: int, victims: set[int]):  # type: ignore[no-untyped-def]
    """A fault for harness.train: the victims kill themselves (SIGKILL) in the middle of optimizer step ``step``, between backward
    and update.
    """

    def before(rank: int) -> None:
        update, done = build.AdamW.step, 0

        def step_or_die(self: build.AdamW, learning_rate: float) -> None:
            nonlocal done
            done += 1
            if rank in victims and done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            update(self, learning_rate)

        build.AdamW.step = step_or_die  # type: ignore[method-assign]

    return before


@sample(2)
@pytest.mark.parametrize(("stages", "then_stages"), [(1, 1), (2, 2), (2, 4), (4, 1), (1, 2)])
def test_kill_9_in_the_middle_of_a_step_plus_restart_gives_the_undisturbed_run(
    stages: int, then_stages: int, flags: dict[str, Any], reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    waiting = {**flags, "async_checkpoint": "false"}
    killed = train(tmp_path, stages=stages, expect=None, before=kill_in_step(4, {stages - 1}), checkpoint_path=run, **waiting)
    assert killed[-1].status == -signal.SIGKILL
    assert all(process.status != 0 for process in killed)
    assert sorted(p.name for p in run.iterdir() if p.name.isdigit()) == ["2"]
    train(tmp_path, stages=then_stages, checkpoint_path=run, **flags)
    rows = log_rows(run)
    assert [row["step"] for row in rows] in ([1, 2, 3, 3, 4, 5, 6], [1, 2, 3, 4, 3, 4, 5, 6]), "rows of redone steps are appended"
    by_step = {row["step"]: row["loss"] for row in rows}
    assert [by_step[step] for step in sorted(by_step)] == losses(reference)
    for step in (4, 6):
        assert equal_files(run / str(step), reference / str(step)) == []


def test_resume_at_the_end_of_a_run_with_more_steps_continues_it(flags: dict[str, Any], tmp_path: Path) -> None:
    whole = {**flags, "lr_schedule": "constant", "checkpoint_steps": 0}
    train(tmp_path, checkpoint_path=tmp_path / "whole", **whole)
    train(tmp_path, checkpoint_path=tmp_path / "parts", **{**whole, "total_steps": 4})
    train(tmp_path, stages=2, checkpoint_path=tmp_path / "parts", **whole)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert equal_files(tmp_path / "parts" / "6", tmp_path / "whole" / "6") == []
    assert sorted(p.name for p in (tmp_path / "whole").iterdir() if p.name.isdigit()) == ["6"], "0: only the final checkpoint"


def test_replicas_and_accumulation_resume_bit_for_bit_at_another_degree(flags: dict[str, Any], tmp_path: Path) -> None:
    grid = {**flags, "gradient_accumulate_step": 2, "total_steps": 8, "checkpoint_steps": 3, "replicas": 2}
    train(tmp_path, checkpoint_path=tmp_path / "one", **grid)
    train(tmp_path, stages=2, expect=None, before=kill_in_step(3, {1, 2}), checkpoint_path=tmp_path / "two", **grid)
    train(tmp_path, stages=2, checkpoint_path=tmp_path / "two", **grid)
    by_step = {row["step"]: row["loss"] for row in log_rows(tmp_path / "two")}
    assert [by_step[step] for step in sorted(by_step)] == losses(tmp_path / "one")
    steps = sorted(int(p.name) for p in (tmp_path / "one").iterdir() if p.name.isdigit())
    assert steps == [4, 6, 8], "saves fall on the optimizer step at or after the one asked for"
    assert [(row["step"], row["optimizer_step"]) for row in log_rows(tmp_path / "one")] == [(2, 1), (4, 2), (6, 3), (8, 4)]
    assert equal_files(tmp_path / "one" / "8", tmp_path / "two" / "8") == []


@sample(1)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_folder_keeps_its_dtype_and_resumes_from_fp32_masters(
    dtype: torch.dtype, flags: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    make_model(folder, dtype=dtype)
    make_tokenizer(folder)
    half = {**flags, "model_name": folder}
    train(tmp_path, checkpoint_path=tmp_path / "whole", **half)
    train(tmp_path, stages=2, expect=None, before=kill_in_step(4, {0}), checkpoint_path=tmp_path / "parts", **half)
    train(tmp_path, stages=2, checkpoint_path=tmp_path / "parts", **half)
    assert equal_files(tmp_path / "parts" / "6", tmp_path / "whole" / "6") == []
    weights = load_file(tmp_path / "whole" / "6" / "layer_01.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    state = load_file(tmp_path / "whole" / "6" / "train_state" / "layer_01.safetensors")
    name = "transformer.h.1.mlp.fc_in.weight"
    assert not torch.equal(state[f"master/{name}"], weights[name].float()), "the master must be finer than the file in this test"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "6", dtype="auto").dtype == dtype


@sample(1)
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_every_checkpoint_loads_with_from_pretrained_and_equals_the_trainers_own_logits(
    stages: int, flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage notes, at every save, the hidden states its live parameters give; the last stage's logits are compared with HF's."""
    original = saver.Saver.save
    ids = torch.arange(5, 29)[None]
    segments = Segments.from_positions(torch.arange(24)[None])

    def note_and_save(saver: Any, step: int, *arguments: Any, **flags: Any) -> float:
        stage = saver._stage
        with torch.no_grad():
            x = ids
            if stage.first > 0:
                previous = tmp_path / f"hidden_{step}_{stage.first}.pt"
                while not previous.exists():
                    time.sleep(0.01)
                x = torch.load(previous, weights_only=True)
            y = stage.logits(stage(x, segments)) if stage.has_head else stage(x, segments)
            partial = tmp_path / f"partial_{step}_{stage.last}.pt"
            torch.save(y, partial)
            partial.rename(tmp_path / f"hidden_{step}_{stage.last}.pt")
        return original(saver, step, *arguments, **flags)

    monkeypatch.setattr(saver.Saver, "save", note_and_save)
    train(tmp_path, stages=stages, checkpoint_path=tmp_path / "run", **flags)
    for step in (2, 4, 6):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / str(step))
        AutoTokenizer.from_pretrained(tmp_path / "run" / str(step))
        live = torch.load(tmp_path / f"hidden_{step}_4.pt", weights_only=True)
        with torch.no_grad():
            assert (model(ids).logits - live).abs().max() <= 1e-5
        folder = ModelFolder.open(tmp_path / "run" / str(step))
        whole = empty_stage(GPTJConfig.from_hf(folder.config), 0, 4)
        load_stage(whole, folder)
        with torch.no_grad():
            assert torch.equal(whole.logits(whole(ids, segments)), live), "what training reads is what is saved, bit for bit"


@full
def test_kill_9_while_a_checkpoint_is_written_never_leaves_one_that_resume_takes(
    flags: dict[str, Any], reference: Path, tmp_path: Path
) -> None:
    """The stage that writes is killed at several moments of the save of step 4; each time step 2 is what the restart resumes from."""
    from checkpoint.layer_store import StepWriter

    for moment, victim in (("write_layer", 1), ("write_train_state", 0), ("commit", 0)):

        def before(rank: int, moment: str = moment, victim: int = victim) -> None:
            original = getattr(StepWriter, moment)

            def die(self: StepWriter, *args: Any, **kwargs: Any) -> Any:
                if rank == victim and self.step == 4:
                    if moment != "commit":
                        original(self, *args, **kwargs)
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(self, *args, **kwargs)

            setattr(StepWriter, moment, die)

        run = tmp_path / moment
        train(tmp_path, stages=2, expect=None, before=before, checkpoint_path=run, **flags)
        assert (run / ".4.partial").is_dir(), "the save must have been under way"
        assert not (run / "4").exists()
        (process, *_) = train(tmp_path, stages=2, checkpoint_path=run, **flags)
        assert "starting at step 2 of 6" in process.text
        assert equal_files(run / "6", reference / "6") == []
        assert not (run / ".4.partial").exists()


def test_a_finished_run_says_so_and_exits_0(flags: dict[str, Any], reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "run")
    before = sorted((tmp_path / "run").rglob("*"))
    processes = train(tmp_path, stages=2, checkpoint_path=tmp_path / "run", **flags)
    assert "nothing to do" in processes[0].text
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(flags: dict[str, Any], reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    damaged = run / "6" / "layer_02.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    (process,) = train(tmp_path, checkpoint_path=run, **flags)
    assert "passed over" in process.text and "layer_02.safetensors" in process.text
    assert "starting at step 4 of 6" in process.text
    assert equal_files(run / "6", reference / "6") == []


def test_fresh_weights_depend_on_seed_and_name_alone(flags: dict[str, Any], tmp_path: Path) -> None:
    fresh = {**flags, "load_pretrained_model": "false", "total_steps": 1, "warmup_steps": 0, "checkpoint_steps": 0}
    for stages in (1, 2, 4):
        train(tmp_path, stages=stages, checkpoint_path=tmp_path / f"s{stages}", **fresh)
        assert equal_files(tmp_path / f"s{stages}" / "1", tmp_path / "s1" / "1") == []
    train(tmp_path, checkpoint_path=tmp_path / "other", **{**fresh, "seed": 7})
    assert len(equal_files(tmp_path / "other" / "1", tmp_path / "s1" / "1")) == 12
    drawn = load_file(tmp_path / "s1" / "1" / "layer_00.safetensors")["transformer.h.0.mlp.fc_in.weight"]
    assert 0.015 < drawn.std() < 0.025
    bare = tmp_path / "bare"
    shutil.copytree(fresh["model_name"], bare, ignore=shutil.ignore_patterns("*.safetensors"))
    train(tmp_path, stages=2, checkpoint_path=tmp_path / "from_bare", **{**fresh, "model_name": bare})
    assert equal_files(tmp_path / "from_bare" / "1", tmp_path / "s1" / "1") == [], "configuration and tokenizer are enough"


def test_the_log_has_one_row_per_optimizer_step_with_all_digits(reference: Path) -> None:
    rows = log_rows(reference)
    wanted = {"step", "optimizer_step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "loss_scale", "skipped"}
    assert all(wanted <= set(row) for row in rows)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {row["tokens"] for row in rows} == {4 * 32}
    assert all(len(repr(row["loss"])) > 12 for row in rows)
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 2e-3 / 3, 1e-3 / 3, 0.0])


def test_a_step_that_is_not_finite_changes_nothing_and_stops_after_ten(flags: dict[str, Any], tmp_path: Path) -> None:
    """The poison sits on ONE stage of ONE replica; all ranks must skip alike."""
    from data_parallel.allreduce import GradientBuckets

    def before(rank: int) -> None:
        original = GradientBuckets.finish

        def poisoned(self: GradientBuckets) -> None:
            original(self)
            if rank == 0:
                next(iter(self.flat_gradients()))[1][0][0] = float("nan")

        GradientBuckets.finish = poisoned  # type: ignore[method-assign]

    run = tmp_path / "run"
    processes = train(
        tmp_path, stages=2, expect=1, before=before, checkpoint_path=run, **{**flags, "total_steps": 20, "checkpoint_steps": 5}
    )
    assert "not finite in 10 optimizer steps in a row" in processes[0].text
    assert all(row["skipped"] and row["grad_norm"] is None for row in log_rows(run))
    assert len(log_rows(run)) == 10
    source = ModelFolder.open(flags["model_name"])
    saved = ModelFolder.open(run / "10")
    assert all(torch.equal(source.read(name), saved.read(name)) for name in source.names())
    assert json.loads((run / "10" / "train_state" / "trainer.json").read_text())["num_skipped"] == 10


def test_a_bad_record_in_the_middle_of_training_saves_what_was_learnt_and_names_the_line(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.readers.CHECK_ALL_BYTES", 0)  # as if the file were too large to be checked at the start
    lines = [json.dumps({"text": f"document {n} " * 20}) for n in range(40)]
    lines[25] = '{"text": 5}'
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    run = tmp_path / "run"
    bad = {**flags, "task_name": tmp_path / "bad.jsonl", "checkpoint_steps": 0, "total_steps": 200}
    processes = train(tmp_path, stages=2, replicas=2, expect=1, checkpoint_path=run, **bad)
    for process in processes:
        assert "bad.jsonl:26" in process.text
        assert "Traceback" not in process.text
    (saved,) = [p for p in run.iterdir() if p.name.isdigit()]
    assert int(saved.name) == log_rows(run)[-1]["step"] > 0
    train(tmp_path, stages=2, replicas=2, checkpoint_path=tmp_path / "skip", **{**bad, "total_steps": 30, "on_bad_record": "skip"})


def test_a_resume_with_another_number_of_threads_warns_that_bits_may_change(flags: dict[str, Any], tmp_path: Path) -> None:
    few = {**flags, "checkpoint_path": tmp_path / "run", "warmup_steps": 0}
    train(tmp_path, **{**few, "total_steps": 1})
    (process,) = train(tmp_path, **{**few, "total_steps": 1, "num_threads": 2})
    assert "nothing to do" in process.text
    (process,) = train(tmp_path, **{**few, "total_steps": 2, "num_threads": 2})
    assert "was computed with 1 threads per rank, this run has 2: the last bits of the losses may change" in process.text


def test_data_and_tokenizer_are_read_by_rank_0_alone(
    flags: dict[str, Any], reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank is given no task and a model folder without a tokenizer."""
    bare = tmp_path / "bare"
    shutil.copytree(flags["model_name"], bare, ignore=shutil.ignore_patterns("tokenizer*"))
    common = {
        **flags,
        "pipeline_group_size": 2,
        "world_size": 2,
        "dist_url": f"tcp://127.0.0.1:{free_port()}",
        "num_threads": 1,
        "device": "cpu",
    }
    common |= {"checkpoint_path": tmp_path / "run"}
    processes = launch(
        lambda rank: train_argv(**{**common, "rank": rank, **({} if rank == 0 else {"task_name": None, "model_name": bare})}), 2, tmp_path
    )
    for process in processes:
        assert process.wait(60) == 0, process.text
    assert losses(tmp_path / "run") == losses(reference)


def test_wandb_logs_from_rank_0_alone_in_offline_mode(flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_NAME", "a-name-of-mine")
    run = tmp_path / "run"
    train(tmp_path, stages=2, checkpoint_path=run, train_log_backend="wandb", **{**flags, "total_steps": 2})
    (offline,) = (run / "wandb").glob("offline-run-*")
    recorded = next(offline.glob("*.wandb")).read_bytes()
    assert b"a-name-of-mine" in recorded and b"grad_norm" in recorded


def test_every_shape_of_gptj_config_is_read_or_refused(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    shape = GPTJConfig.from_hf(config)
    assert (shape.width, shape.num_layers, shape.inner_width, shape.rotary_dim) == (32, 4, 128, 4)
    assert layer_key_of_index(3) == "layer_03" and layer_key_of_index(123) == "layer_123"
    from user_error import UserError

    for name, value in (
        ("model_type", "gpt_neox"),
        ("n_layer", 0),
        ("rotary_dim", None),
        ("rotary_dim", 3),
        ("rotary_dim", 64),
        ("n_head", 5),
        ("tie_word_embeddings", True),
        ("activation_function", "relu"),
        ("n_embd", "wide"),
    ):
        with pytest.raises(UserError):
            GPTJConfig.from_hf({**config, name: value})
    assert dataclasses.replace(shape, inner_width=64).inner_width == 64
