"""Promises of what the data flags do to a training: epochs, samples, resumes in every packing, rules among them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.packing import make_encoder, open_plainly
from support.ranks import log_rows, train
from support.tiers import sample

from tasks.mixture import draw_task
from tasks.packing import PackingRules
from tasks.task_list import parse_task_list
from training.config.data_flags import data_problems
from training.config.train import Config
from training.data.epochs import count_steps
from training.data.sources import OLDER_IDENTITY


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def count(task_list: str, num_epochs: float = 1.0, accumulation: int = 1, **rules: Any) -> int:
    encoder = make_encoder(lambda text: [1] * len(text))
    return count_steps(
        parse_task_list(task_list),
        open_plainly(0),
        encoder,
        PackingRules(**{"seq_length": 10, "mode": "none", **rules}),
        num_epochs=num_epochs,
        seed=0,
        sequences_per_step=4,
        accumulation=accumulation,
    )


def test_steps_are_passes_times_sequences_over_the_batch_rounded_up(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["abc"] * 10)
    assert [count(str(path), epochs) for epochs in (0.001, 0.4, 1, 2, 2.1)] == [1, 1, 3, 5, 6]
    assert count(str(path), 2, accumulation=3) == 15, "accumulation steps"
    assert count(str(path), 1, mode="documents") == 1, "40 ids are 4 sequences of 10"
    assert count(str(path), 3, mode="documents", seq_length=5) == 6


def test_the_task_that_lasts_longest_for_its_weight_decides(tmp_path: Path) -> None:
    short, long = write_jsonl(tmp_path / "s.jsonl", ["abc"] * 8), write_jsonl(tmp_path / "l.jsonl", ["abc"] * 40)
    for weights, needed in (((0.5, 0.5), (8, 40)), ((0.1, 0.9), (8, 40)), ((0.9, 0.1), (8, 40))):
        steps = count(f"{short}:{weights[0]},{long}:{weights[1]}")
        drawn = [draw_task(0, index, [weights[0], 1.0]) for index in range(4 * steps)]
        assert all(drawn.count(place) >= num for place, num in enumerate(needed)), "every task was passed"
        assert any(drawn[: 4 * (steps - 1)].count(place) < num for place, num in enumerate(needed)), "and no step is too many"
    assert count(f"{short}:0,{long}") == 10, "what is never drawn lasts no time"


def test_a_run_over_epochs_has_the_counted_steps_on_all_ranks_and_goes_on_as_far(model_folder: Path, tmp_path: Path) -> None:
    """Ranks other than 0 have no data, and end where it says."""
    path = write_jsonl(tmp_path / "a.jsonl", ["The quick brown fox jumps over the lazy dog."] * 6)
    flags: dict[str, Any] = {"model_name": model_folder, "task_name": path, "seq_length": 32, "batch_size": 2, "checkpoint_steps": 100}
    flags |= {"packing": "none", "long_documents": "truncate", "checkpoint_path": tmp_path / "run", "logging_steps": 1}
    processes = train(tmp_path / "ranks", stages=2, num_train_epochs=1.5, **flags)
    rows = log_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert re.search(r"one pass is 6\.0 sequences, counted in \d", processes[0].text)
    assert "--num-train-epochs 1.5 is --total-steps 5" in processes[0].text
    assert list(rows[-1]["tokens_per_task"]) == [str(path)]
    assert list(rows[-1]["passes_per_task"].values()) == [1]
    assert all(0 <= row["data_wait_share"] <= 1 for row in rows)
    train(tmp_path / "ranks", stages=2, num_train_epochs=2, **flags)
    assert [row["step"] for row in log_rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_more_warm_up_than_epochs_give_steps_is_an_error(model_folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["abc"] * 4)
    flags = {"model_name": model_folder, "task_name": path, "checkpoint_path": tmp_path / "run", "seq_length": 16, "packing": "none"}
    processes = train(tmp_path, expect=1, num_train_epochs=1, warmup_steps=50, **flags)
    assert re.search(r"50 is more than the \d+ of --num-train-epochs 1", processes[0].text)


@pytest.mark.parametrize("mode", ["documents", "concat", "none"])
def test_samples_are_shown_before_training_and_change_nothing(mode: str, model_folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [f"The {n} quick brown foxes." for n in range(30)])
    flags: dict[str, Any] = {"model_name": model_folder, "task_name": path, "seq_length": 32, "batch_size": 2, "total_steps": 2}
    flags |= {"packing": mode, "packing_group": 10 if mode == "concat" else None}
    shown = train(tmp_path / "ranks", show_samples=3, checkpoint_path=tmp_path / "shown", **flags)[0].text
    train(tmp_path / "ranks", checkpoint_path=tmp_path / "plain", **flags)
    assert "sequence 3 of 3, from " in shown
    assert shown.index("sequence 3 of 3") < shown.index("step 2/2")
    assert re.search(r"<<\w.*quick brown foxes", shown)
    assert ("tokens of padding" in shown) == (mode == "none")
    assert [row["loss"] for row in log_rows(tmp_path / "shown")] == [row["loss"] for row in log_rows(tmp_path / "plain")]


@sample(1)
@pytest.mark.parametrize(
    "rules",
    [{"packing": "concat", "packing_group": 7}, {"packing": "none"}, {"packing": "none", "long_documents": "truncate"}],
    ids=str,
)
def test_a_resume_is_bitwise_in_every_packing(rules: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [f"The {n} quick brown foxes jump" + " over" * (n % 9) for n in range(20)])
    flags: dict[str, Any] = {"model_name": model_folder, "task_name": f"{path},{path}:2", "seq_length": 16, "batch_size": 4, **rules}
    flags |= {"lr": 1e-3, "lr_schedule": "constant"}
    train(tmp_path / "ranks", total_steps=6, checkpoint_path=tmp_path / "whole", **flags)
    train(tmp_path / "ranks", total_steps=2, checkpoint_path=tmp_path / "halves", **flags)
    train(tmp_path / "ranks", total_steps=6, checkpoint_path=tmp_path / "halves", **flags)
    whole, halves = log_rows(tmp_path / "whole"), log_rows(tmp_path / "halves")
    for key in ("step", "loss", "target_tokens", "tokens_per_task", "passes_per_task"):
        assert [row[key] for row in whole] == [row[key] for row in halves], key
    assert len(whole) == 6
    assert sum(whole[-1]["tokens_per_task"].values()) <= sum(row["tokens"] for row in whole)
    assert (sum(whole[-1]["tokens_per_task"].values()) < sum(row["tokens"] for row in whole)) == (rules["packing"] == "none")


def test_a_resume_with_another_way_of_packing_is_refused_by_name(model_folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["The quick brown fox."] * 4)
    flags: dict[str, Any] = {"model_name": model_folder, "task_name": path, "seq_length": 16, "batch_size": 2}
    flags |= {"checkpoint_path": tmp_path / "run"}
    train(tmp_path / "ranks", total_steps=1, packing="concat", packing_group=2, **flags)
    refused = train(tmp_path / "ranks", total_steps=2, expect=1, packing="concat", packing_group=3, **flags)[0].text
    assert "--packing-group: then 2, now 3" in refused
    refused = train(tmp_path / "ranks", total_steps=2, expect=1, loss_on="completion", **flags)[0].text
    assert "--loss-on: then 'all', now 'completion'" in refused
    assert "--packing: then 'concat', now 'documents'" in refused
    train(tmp_path / "ranks", total_steps=2, allow_data_change="true", **flags)


def test_a_checkpoint_from_before_these_flags_was_trained_with_their_defaults() -> None:
    assert OLDER_IDENTITY["--packing"] == "documents"
    assert OLDER_IDENTITY["--loss-on"] == "all"
    assert OLDER_IDENTITY["--packing-group"] is None
    assert OLDER_IDENTITY["--max-train-samples"] is None


BASE = Config(task_name="a.jsonl", total_steps=1)


@pytest.mark.parametrize(
    ("flags", "seen"),
    [
        ({"num_train_epochs": 2.0}, "--total-steps and --num-train-epochs both say"),
        ({"num_train_epochs": 0.0, "total_steps": None}, "--num-train-epochs must be above 0; it is 0"),
        ({"num_train_epochs": float("nan"), "total_steps": None}, "must be above 0; it is nan"),
        ({"packing_group": 10}, "--packing-group is for --packing concat; --packing documents has no groups"),
        ({"label_column": "intent"}, "--label-column is for task classification"),
        ({"classification_prompt": "raw"}, "--classification-prompt is for task classification"),
    ],
)
def test_data_flags_that_do_not_fit_are_problems(flags: dict[str, Any], seen: str) -> None:
    (problem,) = data_problems(dataclasses.replace(BASE, **flags))
    assert seen in problem
    assert "." in problem or ";" in problem


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"packing": "concat", "packing_group": 10},
        {"task_name": "classification=a.csv", "label_column": "intent", "text_column": "2"},
        {"task_name": None, "label_column": "intent"},  # a rank that is given no data
        {"num_train_epochs": 0.5, "total_steps": None},
        {"packing": "none", "loss_on": "completion", "long_documents": "truncate", "balance_labels": True},
    ],
)
def test_data_flags_that_fit_are_none(flags: dict[str, Any]) -> None:
    assert data_problems(dataclasses.replace(BASE, **flags)) == []
