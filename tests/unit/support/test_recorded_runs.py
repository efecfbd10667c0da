"""The proof that a redesign changed nothing notices a change: of a bit, a field, a status, a file."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import recorded_runs
from support.recorded_runs import RUNS, Step, command_line, differences, fingerprint
from support.tiers import full

BEFORE: dict[str, Any] = {
    "a run": {
        "statuses": [[0, 0]],
        "fields": [["loss", "step"]],
        "rows": [{"step": 1, "loss": 5.5}],
        "files": {"run/2/lm_head.safetensors": "0" * 16},
    }
}


def changed(**parts: Any) -> dict[str, Any]:
    after = copy.deepcopy(BEFORE)
    after["a run"].update(parts)
    return after


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (changed(statuses=[[0, 75]]), "a run: statuses: entry 0: [0, 0], now [0, 75]"),
        (changed(fields=[["loss", "step", "new"]]), "a run: fields: "),
        (changed(rows=[{"step": 1, "loss": 5.500000000000001}]), "a run: rows: "),
        (changed(rows=[]), "a run: rows: 1 entries, now 0"),
        (changed(files={}), "a run: run/2/lm_head.safetensors: 0000000000000000, now no file"),
        (changed(files={"run/2/lm_head.safetensors": "1" * 16}), "a run: run/2/lm_head.safetensors: "),
        ({}, "a run: only before"),
    ],
)
def test_whatever_differs_is_said(after: dict[str, Any], said: str) -> None:
    (line,) = differences(BEFORE, after)
    assert line.startswith(said)


def test_equal_runs_differ_in_nothing() -> None:
    assert list(differences(BEFORE, copy.deepcopy(BEFORE))) == []


def test_times_and_names_made_up_by_a_run_are_no_difference(tmp_path: Path) -> None:
    one, other, third = (tmp_path / str(n) / "trainer.json" for n in range(3))
    for path, token, loss in ((one, "a", 1), (other, "b", 1), (third, "a", 2)):
        path.parent.mkdir()
        path.write_text(json.dumps({"run_token": token, "flags": {"dist_url": token, "at": str(path.parent)}, "loss": loss}))
    prints = [fingerprint(path, path.parent) for path in (one, other, third)]
    assert prints[0] == prints[1] != prints[2]


def test_every_run_is_one_of_the_public_scripts() -> None:
    scripts = {step.script for steps in RUNS.values() for step in steps}
    assert scripts == {
        *("dist_clm_train", "dist_clm_eval"),
        *(f"convert_{way}_hf_{family}" for way in ("from", "to") for family in ("gptj", "gptneox")),
    }


def test_a_rank_has_the_flags_of_all_and_its_own() -> None:
    step = Step(script="dist_clm_train", flags={"lr": 1, "resume": None}, world_size=2, per_rank={1: {"lr": 2}})
    assert command_line(step, 0, 5)[:2] == ["--lr", "1"]
    argv = command_line(step, 1, 5)
    assert argv[:2] == ["--lr", "2"] and "--resume" not in argv
    assert argv[argv.index("--rank") + 1] == "1" and "tcp://127.0.0.1:5" in argv


@full
def test_one_run_recorded_twice_is_equal(tmp_path: Path) -> None:
    """Through the real trainer, in a process of its own as the script starts it."""
    files = [tmp_path / f"{n}.json" for n in range(2)]
    for file in files:
        command = [sys.executable, recorded_runs.__file__, "record", str(file), "--only", "one process"]
        subprocess.run(command, check=True, capture_output=True)
    first, second = (json.loads(file.read_text()) for file in files)
    assert first["one process"]["statuses"] == [[0]] and len(first["one process"]["rows"]) == 4
    assert list(differences(first, second)) == []
