"""training.run and training.evaluate, as a notebook calls them: in one process, one after the other."""

import json
from pathlib import Path

import pytest
from support.ranks import fork, losses, train

import training
from training.config.train import Config
from user_error import UserError


def test_a_program_trains_goes_on_and_evaluates(model_folder: Path, tasks: list[Path], tmp_path: Path) -> None:
    flags = {"model_name": model_folder, "task_name": tasks[0], "seq_length": 32, "batch_size": 2, "num_threads": 1, "device": "cpu"}
    flags["lr_schedule"] = "constant"  # or the rates would depend on the steps still to come

    def program() -> int:
        first = training.run(**flags, checkpoint_path=tmp_path / "run", total_steps=2)
        assert first.checkpoint == tmp_path / "run" / "2"
        again = training.run(**flags, checkpoint_path=tmp_path / "run", total_steps=4)
        assert again.checkpoint == tmp_path / "run" / "4"
        assert [json.loads(line)["step"] for line in again.train_log.read_text().splitlines()] == [1, 2, 3, 4]
        found = training.evaluate(again.checkpoint, tasks[1], max_eval_samples=10, seq_length=32, num_threads=1, device="cpu")
        assert found.loss is not None
        assert found.perplexity is not None
        assert len(found.examples) == found.num_examples == 10
        with pytest.raises(UserError, match=r"none\.jsonl"):
            training.evaluate(model_folder, tmp_path / "none.jsonl", num_threads=1, device="cpu")
        after = training.evaluate(again.checkpoint, tasks[1], max_eval_samples=10, seq_length=32, num_threads=1, device="cpu")
        assert after.loss == found.loss, "a mistake leaves nothing behind"
        return 0

    process = fork(program, tmp_path / "program.txt")
    assert process.wait(90) == 0, process.text
    train(tmp_path / "ranks", **{**flags, "checkpoint_path": tmp_path / "script", "total_steps": 4})
    assert losses(tmp_path / "script")[2:] == losses(tmp_path / "run")[2:], "the script's numbers"


def test_what_is_wrong_is_raised_in_the_words_of_the_command_line(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown: total_step; did you mean total_steps\?"):
        training.run(model_name=model_folder, total_step=2)
    with pytest.raises(UserError, match="--task-name is required"):
        training.run(model_name=model_folder, total_steps=2, checkpoint_path=tmp_path)
    with pytest.raises(UserError, match="total-steps"):
        training.run(model_name=model_folder, total_steps="two", checkpoint_path=tmp_path)
    with pytest.raises(UserError, match="a Config or flags"):
        training.run(Config(), total_steps=2)
    with pytest.raises(UserError, match="--metric must be one or more of"):
        training.evaluate(model_folder, "a.jsonl", metric="fame")
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        training.rum  # noqa: B018
