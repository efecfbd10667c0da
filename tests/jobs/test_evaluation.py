"""Promises of evaluations: the numbers of transformers, the same at every cut, in the training and by itself; and no trace of them in the
training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import equal_files, evaluate, losses, steps_in, train
from support.tiers import full, sample
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.evaluation.results import compare
from user_error import UserError

LABELS = ("yes", "no", "perhaps")
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with a label column, of prompts of unequal length."""
    path = tmp_path_factory.mktemp("questions") / "questions.csv"
    rows = [f"does dog {n} bark {'very ' * (n % 4)}loudly,{LABELS[n % 3]}" for n in range(20)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def flags(model_folder: Path, questions: Path) -> dict[str, Any]:
    return {
        "model_name": model_folder,
        "evaluation_data": f"classification={questions}",
        "classification_prompt": "raw",
        "metric": "perplexity,accuracy,labels",
        "max_new_tokens": NEW_TOKENS,
        "batch_size": 4,
        "micro_batch_size": 2,
        "seq_length": 40,
    }


def found_by(folder: Path, flags: dict[str, Any], **more: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    evaluate(folder / "ranks", **{**flags, "json": folder / "found.json", "output": folder / "examples.jsonl", **more})
    return json.loads((folder / "found.json").read_text()), rows_of(folder / "examples.jsonl")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process finds."""
    return found_by(tmp_path_factory.mktemp("alone"), flags)


def test_the_numbers_are_those_of_transformers(model_folder: Path, alone: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    summary, examples = alone
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    total = num_targets = 0.0
    for example in examples:
        whole = f"{example['prompt']} {example['expected']}"
        ids = torch.tensor([[*tokenizer(whole)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        num_targets += ids.shape[1] - 1
        for label in LABELS:
            prompt = tokenizer(example["prompt"])["input_ids"]
            ids = torch.tensor([tokenizer(f"{example['prompt']} {label}")["input_ids"]])
            with torch.no_grad():
                scores = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
            wanted = sum(scores[place - 1, ids[0, place]].item() for place in range(len(prompt), ids.shape[1]))
            assert example["label_log_likelihoods"][label] == pytest.approx(wanted, abs=1e-4)
    assert summary["target_tokens"] == num_targets
    assert summary["loss"] == pytest.approx(total / num_targets, rel=1e-5)


def test_every_answer_is_that_of_generate(model_folder: Path, alone: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    _, examples = alone
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    asked = tokenizer([example["prompt"] for example in examples], return_tensors="pt", padding=True)
    made = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    for example, ids in zip(examples, made[:, asked["input_ids"].shape[1] :], strict=True):
        ended = (ids == tokenizer.eos_token_id).nonzero().flatten().tolist()
        assert example["generated"] == tokenizer.decode(ids[: ended[0]] if ended else ids), f"margin {example['margin']}"


@sample(1)
@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (4, 1), (2, 2)])
def test_every_grid_finds_the_same(
    stages: int, replicas: int, flags: dict[str, Any], alone: tuple[dict[str, Any], list[dict[str, Any]]], tmp_path: Path
) -> None:
    summary, examples = found_by(tmp_path, flags, stages=stages, replicas=replicas)
    assert summary["loss"] == alone[0]["loss"], "to the bit"
    assert [row["label_log_likelihoods"] for row in examples] == [row["label_log_likelihoods"] for row in alone[1]]
    assert [row["generated"] for row in examples] == [row["generated"] for row in alone[1]]


def test_a_summary_counts_what_the_examples_say(alone: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    summary, examples = alone
    assert summary["num_examples"] == len(examples) == 20
    for way, key in (("accuracy", "verdict"), ("labels", "label_verdict")):
        verdicts = [row[key] for row in examples]
        counts = summary[way]
        assert [counts[name] for name in ("right", "wrong", "badly_formed")] == [
            verdicts.count(name) for name in ("right", "wrong", "badly formed")
        ]
        assert sum(map(sum, counts["confusion"]["matrix"])) == 20
    for row in examples:
        best = max(row["label_log_likelihoods"], key=row["label_log_likelihoods"].__getitem__)
        assert row["likeliest"] == best
        assert (row["label_verdict"] == "right") == (best == row["expected"])


def test_shots_stand_in_front_and_come_from_elsewhere(flags: dict[str, Any], questions: Path, tmp_path: Path) -> None:
    _, examples = found_by(tmp_path, {**flags, "seq_length": 64}, metric="labels", num_shots=3, balance_shots=True)
    own = [line.rpartition(",")[0] for line in questions.read_text().splitlines()[1:]]
    for row, text in zip(examples, own, strict=True):
        *shots, asked = row["prompt"].split("\n\n")
        assert asked == f"{text}\n"
        assert len(shots) == 3
        assert sorted(shot.rpartition(" ")[2] for shot in shots) == sorted(LABELS), "one of each label"
        assert all(not shot.startswith(f"{text}\n") for shot in shots), "never itself"
    again, _ = tmp_path / "again", None
    assert [row["prompt"] for row in found_by(again, {**flags, "seq_length": 64}, metric="labels", num_shots=3, balance_shots=True)[1]] == [
        row["prompt"] for row in examples
    ]


@pytest.fixture(scope="module")
def training_flags(flags: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_name": flags["model_name"],
        "task_name": flags["evaluation_data"],
        "classification_prompt": "raw",
        "loss_on": "completion",
        "packing": "none",
        "seq_length": 40,
        "batch_size": 4,
        "micro_batch_size": 2,
        "total_steps": 6,
        "lr": 3e-3,
        "checkpoint_steps": 2,
    }


def evaluated(flags: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "evaluation_data": flags["task_name"],
        "evaluation_steps": 2,
        "evaluation_metric": "accuracy",
        "evaluation_max_new_tokens": NEW_TOKENS,
        "evaluation_batch_size": 6,
        "keep_best": True,
        **more,
    }


def test_training_after_an_evaluation_has_the_same_bits(training_flags: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "plain", stages=2, checkpoint_path=tmp_path / "without", **training_flags)
    train(tmp_path / "ranks", stages=2, checkpoint_path=tmp_path / "with", **training_flags, **evaluated(training_flags))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert not equal_files(tmp_path / "without" / "6", tmp_path / "with" / "6")
    assert [row["step"] for row in rows_of(tmp_path / "with" / "evaluation_log.jsonl")] == [2, 4, 6]


def test_training_and_script_find_the_same(training_flags: dict[str, Any], flags: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tmp_path / "ranks", stages=2, replicas=2, checkpoint_path=run, **{**training_flags, "batch_size": 2}, **evaluated(training_flags))
    for row in rows_of(run / "evaluation_log.jsonl"):
        found, examples = found_by(
            tmp_path / str(row["step"]),
            {**flags, "model_name": run / str(row["step"]), "loss_on": "completion"},
            metric="perplexity,accuracy",
        )
        assert found["loss"] == pytest.approx(row["loss"], rel=1e-6)
        assert found["target_tokens"] == row["target_tokens"]
        assert found["accuracy"]["right"] == row["right"]
        inside = rows_of(run / "evaluations" / f"{row['step']}.jsonl")
        assert [one["generated"] for one in inside] == [one["generated"] for one in examples]
        assert [one["record"] for one in inside] == [one["record"] for one in examples]


def test_the_best_step_is_kept_and_named_and_known_to_a_resume(training_flags: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = {"keep_checkpoints": 1, "checkpoint_path": run, "evaluation_metric": "loss"}
    flags = {**training_flags, **evaluated(training_flags, **more), "lr": 0.3, "lr_schedule": "constant", "warmup_steps": 4}
    train(tmp_path / "ranks", **{**flags, "total_steps": 8})
    found = {row["step"]: row["loss"] for row in rows_of(run / "evaluation_log.jsonl")}
    best = json.loads((run / "best.json").read_text())
    assert best["metric"] == "loss"
    assert (best["step"], best["value"]) == (min(found, key=found.__getitem__), min(found.values()))
    assert set(steps_in(run)) == {str(best["step"]), "8"}
    train(tmp_path / "ranks", **{**flags, "total_steps": 12})
    found = {row["step"]: row["loss"] for row in rows_of(run / "evaluation_log.jsonl")}
    best = json.loads((run / "best.json").read_text())
    assert (best["step"], best["value"]) == (min(found, key=found.__getitem__), min(found.values()))
    assert set(steps_in(run)) == {str(best["step"]), "12"}


def test_another_evaluation_set_begins_anew_and_a_run_without_a_best_forgets_it(
    training_flags: dict[str, Any], tasks: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = {"keep_checkpoints": 1, "checkpoint_path": run, "evaluation_metric": "loss", "checkpoint_steps": 2}
    flags = {**training_flags, **evaluated(training_flags, **more)}
    train(tmp_path / "ranks", **{**flags, "total_steps": 4})
    before = json.loads((run / "best.json").read_text())
    train(tmp_path / "ranks", **{**flags, "total_steps": 6, "evaluation_data": tasks[0]})
    now = json.loads((run / "best.json").read_text())
    assert now["step"] == 6
    assert now["data"] != before["data"]
    train(tmp_path / "ranks", **{**flags, "total_steps": 8, "keep_best": False})
    assert steps_in(run) == ["8"]
    assert not (run / "best.json").exists()


def test_labels_are_compared_as_answers_are(flags: dict[str, Any], questions: Path, tmp_path: Path) -> None:
    """A task whose answers are put into small letters has labels in capitals."""
    module = tmp_path / "my_tasks.py"
    module.write_text(
        "from tasks.prompts import task\n@task('loud', labels=('YES', 'NO', 'PERHAPS'), answer=lambda text: text.strip().lower())\n"
        "def loud(record):\n    return record['text'], record['label'].upper()\n"
    )
    given = {**flags, "evaluation_data": f"loud={questions}", "task_module": module, "classification_prompt": None}
    summary, examples = found_by(tmp_path, given, metric="labels,accuracy")
    assert {row["expected"] for row in examples} == set(LABELS)
    assert summary["labels"]["confusion"]["labels"] == ["yes", "no", "perhaps"]
    assert sum(map(sum, summary["labels"]["confusion"]["matrix"])) == 20
    for row in examples:
        assert (row["label_verdict"] == "right") == (row["likeliest"].lower() == row["expected"])


def test_named_labels_are_those_of_training_and_evaluation(flags: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("text,label\na dog,yes\nanother,no\n")
    given = {**flags, "evaluation_data": f"classification={tmp_path / 'few.csv'}", "classification_prompt": "instruction", "seq_length": 64}
    _, examples = found_by(tmp_path, given, metric="labels", labels="yes,no,perhaps")
    assert set(examples[0]["label_log_likelihoods"]) == {"yes", "no", "perhaps"}
    assert "no, perhaps, yes" in examples[0]["prompt"]


@full
def test_adapters_are_evaluated_beside_their_base(training_flags: dict[str, Any], flags: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    lora = {"train": "lora", "lora_rank": 2, "checkpoint_steps": 0, "lr": 0.05}
    train(tmp_path / "ranks", stages=2, checkpoint_path=run, **{**training_flags, **lora}, **evaluated(training_flags, keep_best=False))
    last = rows_of(run / "evaluation_log.jsonl")[-1]
    found, examples = found_by(tmp_path / "by itself", {**flags, "model_name": run, "loss_on": "completion"}, metric="perplexity,accuracy")
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert [row["generated"] for row in rows_of(run / "evaluations" / "6.jsonl")] == [row["generated"] for row in examples]
    base, _ = found_by(tmp_path / "base", {**flags, "loss_on": "completion"}, metric="perplexity")
    assert base["loss"] != pytest.approx(found["loss"], rel=1e-3)


def test_a_picture_is_drawn(flags: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found_by(tmp_path, flags, metric="labels", confusion_png=tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")


def test_comparing_needs_the_same_records(alone: tuple[dict[str, Any], list[dict[str, Any]]], tmp_path: Path) -> None:
    _, examples = alone
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"

    def write(path: Path, rows: list[dict[str, Any]]) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(first, [{**row, "verdict": "right" if row["id"] < 15 else "wrong"} for row in examples])
    write(second, [{**row, "verdict": "right" if row["id"] >= 12 else "wrong"} for row in examples])
    found = compare(f"{first},{second}")
    assert (found.both_right, found.only_first, found.only_second, found.neither) == (3, 12, 5, 0)
    assert found.p_value == pytest.approx(0.1434631347656250)  # 2 * P(X >= 12), X of 17 fair coins
    write(second, [*examples[:-1], {**examples[-1], "record": "another"}])
    with pytest.raises(UserError, match=r"the same records in the same order.*differ from line 20 on"):
        compare(f"{first},{second}")
    second.write_text("oops\n")
    with pytest.raises(UserError, match=r"b\.jsonl:1: each line must be a JSON object"):
        compare(f"{first},{second}")
    with pytest.raises(UserError, match="takes two files"):
        compare(str(first))


@pytest.mark.parametrize(
    ("wrong", "wanted"),
    [
        ({"metric": "fame"}, "perplexity, accuracy, labels"),
        ({"evaluation_data": None}, "--evaluation-data is required"),
        ({"seq_length": 65}, "the model's positions"),
        ({"num_shots": 20}, "--num-shots must be below"),
        ({"shots_from": "x.csv"}, "--num-shots is 0"),
        ({"text_column": "body"}, "'body'"),
        ({"micro_batch_size": 3}, "does not divide"),
        ({"model_name": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"compare": "a.jsonl"}, "takes two files"),
        ({"confusion_png": "x.png", "metric": "perplexity"}, "--confusion-png"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(wrong: dict[str, Any], wanted: str, flags: dict[str, Any], tmp_path: Path) -> None:
    (process,) = evaluate(tmp_path / "ranks", expect=None, timeout_s=30, **{**flags, **wrong})
    assert process.status in (1, 2)
    assert wanted in " ".join(process.text.split())
    assert "Traceback" not in process.text


def test_text_alone_has_no_accuracy(flags: dict[str, Any], tasks: list[Path], tmp_path: Path) -> None:
    for metric, wanted in (("accuracy", "text alone"), ("labels", "text alone")):
        given = {**flags, "evaluation_data": tasks[0], "metric": metric, "classification_prompt": None}
        (process,) = evaluate(tmp_path / "ranks", expect=1, timeout_s=30, **given)
        assert wanted in process.text
