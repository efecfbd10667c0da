"""Adapters over an int8 base learn a task: benchmarks/lora_sms_spam.py at its quick size, and the arithmetic of its answer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.ranks import REPOSITORY, SHARED
from support.tiers import full

SMS_SPAM = SHARED / "data" / "classification" / "sms_spam.tsv"
CHANCE = 50.0


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import lora_sms_spam

    return lora_sms_spam


def write_rows(benchmark: Any, path: Path) -> list[Any]:
    lines = [f"{'spam' if n % 4 == 0 else 'ham'}\tmessage {n}" for n in range(80)]
    path.write_text("\n".join([*lines, lines[3], lines[4]]) + "\n")
    rows: list[Any] = benchmark.read_rows(path)
    return rows


def test_held_out_rows_are_half_spam_and_no_text_of_theirs_is_trained_on(benchmark: Any, tmp_path: Path) -> None:
    rows = write_rows(benchmark, tmp_path / "rows.tsv")
    assert len(rows) == 80, "a text that comes twice is one row"
    training, held_out = benchmark.hold_out(rows, 5)
    assert [row.label for row in held_out] == ["ham"] * 5 + ["spam"] * 5
    assert not {row.text for row in training} & {row.text for row in held_out} and len(training) == 70
    one, other = benchmark.balanced(training, seed=1), benchmark.balanced(training, seed=2)
    assert [row.label for row in one].count("spam") == 15 == len(one) / 2
    assert set(one) != set(other)


def test_a_constant_answer_is_right_in_half_and_a_fitted_one_may_turn_the_preference_round(benchmark: Any, tmp_path: Path) -> None:
    _, held_out = benchmark.hold_out(write_rows(benchmark, tmp_path / "rows.tsv"), 5)
    assert benchmark.accuracy([-1.0] * 10, held_out) == benchmark.accuracy([1.0] * 10, held_out) == CHANCE
    inverse = [9.0 if row.label == "ham" else 7.0 for row in held_out]
    assert benchmark.accuracy(inverse, held_out, 8.0) == 0
    assert benchmark.fitted_accuracy(inverse, held_out, inverse, held_out) == 100


def test_a_line_with_another_label_is_named(benchmark: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("ham\tone\neggs\ttwo\n")
    with pytest.raises(ValueError, match=r"rows\.tsv:2: .*'eggs'"):
        benchmark.read_rows(tmp_path / "rows.tsv")


@full
def test_lora_over_int8_beats_the_frozen_model_by_20_points_on_rows_it_has_not_seen() -> None:
    pytest.importorskip("peft")
    if not SMS_SPAM.exists():
        pytest.skip(f"no {SMS_SPAM}")
    script = REPOSITORY / "benchmarks" / "lora_sms_spam.py"
    done = subprocess.run([sys.executable, script, "--data", SMS_SPAM, "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    ((_, adapted),) = report["adapted"].items()
    assert report["held_out_rows"] == 200
    assert adapted["accuracy"] >= max(report["frozen"], CHANCE) + 20, report
    assert adapted["last_loss"] < adapted["first_loss"]
    assert "int8" in done.stderr, "the trainer says in which form the frozen linears lie"
