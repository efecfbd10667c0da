"""Every workflow of example_scripts, run whole as a user runs it, on tiny random models and small data: only settings are made small.

Their Pythons are forks of this one (warm_python.py)."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open
from support.models import TEXTS, make_model, make_neox_model, make_tokenizer
from support.ranks import REPOSITORY, free_port, log_rows
from support.tiers import full
from support.warm_python import warm_python

SCRIPTS = REPOSITORY / "example_scripts"
LABELS = ("entailment", "neutral", "contradiction")
WORKFLOWS = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")])


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with warm_python(tmp_path_factory.mktemp("warm")) as program:
        yield program


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GPT-J, an eight-layer GPT-NeoX, MNLI rows, a CSV of two labels and a file of texts."""
    folder = tmp_path_factory.mktemp("workflows")
    make_model(folder / "gptj", n_positions=256)
    make_neox_model(folder / "neox", num_hidden_layers=8)
    for name in ("gptj", "neox"):
        make_tokenizer(folder / name)
    rows = [{"premise": f"Dog {n} barks.", "hypothesis": f"A dog {n % 7}.", "label": LABELS[n % 3]} for n in range(48)]
    (folder / "mnli.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:60]))
    (folder / "rows.csv").write_text("body,verdict\n" + "".join(f'"Fox {n}, {n % 5}",{"good" if n % 3 else "bad"}\n' for n in range(30)))
    return folder


def settings(place: Path, python: Path, **more: object) -> dict[str, str]:
    common = {"PYTHON": python, "PYTHON_EXEC": python, "PORT": free_port(), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    small = {"MODEL": place / "gptj", "TASKS": place / "texts.jsonl", "SEQ_LENGTH": 32, "TOTAL_STEPS": 2, "LOGGING_STEPS": 1}
    plain = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR", "TOKENIZERS_PARALLELISM")}
    return plain | {name: str(value) for name, value in (common | small | more).items()}


def start(script: str, environment: dict[str, str], cwd: Path, *flags: str) -> "subprocess.Popen[str]":
    command = ["bash", str(SCRIPTS / script), *flags]
    return subprocess.Popen(command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: "subprocess.Popen[str]") -> None:
    """As a user would, so that its ranks end too."""
    if process.poll() is None:
        process.terminate()
        process.communicate(timeout=60)


def run(script: str, environment: dict[str, str], cwd: Path, *flags: str, expect: int = 0) -> str:
    process = start(script, environment, cwd, *flags)
    try:
        said, _ = process.communicate(timeout=200)
    finally:
        end(process)
    assert process.returncode == expect, said
    return said


def test_gptneox_is_trained_over_eight_stages(place: Path, python: Path, tmp_path: Path) -> None:
    environment = settings(place, python, MODEL=place / "neox", OUT=tmp_path / "out", BATCH=8, FLAGS="--bf16 true --recompute layer")
    said = run("finetune_gptneox.sh", environment, tmp_path, "--num-threads", "1")
    assert "8 stage(s) (1f1b) x 1 replica(s)" in said
    assert "--recompute                  layer" in said
    assert (tmp_path / "out" / "2" / "manifest.json").exists()
    assert log_rows(tmp_path / "out")[-1]["step"] == 2


def test_two_sites_with_a_disk_each_train_one_model_cut_between_them(place: Path, python: Path, tmp_path: Path) -> None:
    common = settings(place, python, SITE_A_HOST="127.0.0.1", NET_INTERFACE="lo", PIPELINE=2, REPLICAS=2, BATCH=4, ACCUMULATE=1)
    sites = [
        start("finetune_geo_distributed.sh", {**common, "SITE": site, "OUT": str(tmp_path / site)}, tmp_path, "--num-threads", "1")
        for site in "ab"
    ]
    try:
        said = [site.communicate(timeout=120)[0] for site in sites]
    finally:
        for process in sites:
            end(process)
    assert [process.returncode for process in sites] == [0, 0], said
    assert "2 stage(s) (1f1b) x 2 replica(s)" in said[0]
    assert "--wire-dtype                 int8" in said[0]
    logs = [sorted(path.name for path in (tmp_path / site / "logs").iterdir()) for site in "ab"]
    assert logs == [["rank_2.log"], ["rank_3.log"]], "ranks 0 and 2 are stage 0, at a; 1 and 3 are stage 1, at b"
    assert [(tmp_path / site / "2" / "manifest.json").exists() for site in "ab"] == [True, True]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"SITE": "c"}, "SITE must be a or b"), ({"SITE_A_HOST": ""}, "SITE_A_HOST must be"), ({"SPLIT": "4"}, "SPLIT must leave site b")],
)
def test_a_site_that_is_none_is_refused(wrong: dict[str, str], says: str, place: Path, python: Path, tmp_path: Path) -> None:
    environment = settings(place, python, OUT=tmp_path / "out", SITE="a", SITE_A_HOST="127.0.0.1")
    assert says in run("finetune_geo_distributed.sh", {**environment, **wrong}, tmp_path, expect=2)


def mnli(place: Path, python: Path, out: Path, **more: object) -> dict[str, str]:
    data = {"TRAIN_DATA": place / "mnli.jsonl", "EVAL_DATA": place / "mnli.jsonl", "OUT": out}
    return settings(place, python, **data, BATCH=2, SEQ_LENGTH=64, MAX_EVAL_SAMPLES=6, EVAL_BATCH=3, **more)


def test_mnli_goes_from_rows_to_an_accuracy_that_the_hugging_face_pipeline_confirms(place: Path, python: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = mnli(place, python, out, STAGES=2, STEPS=2, PRECISION="", NUM_SHOWN=3)
    said = run("mnli_text_to_text.sh", environment, tmp_path, "--num-threads", "1")
    assert "--packing                    concat" in said
    assert log_rows(out)[-1]["step"] == 2
    found = json.loads((out / "validation.json").read_text())
    assert found["accuracy"]["total"] == found["num_examples"] == 6
    assert f"generated answers: accuracy {found['accuracy']['accuracy']:.2%}: {found['accuracy']['right']} of 6 right" in said
    confirmed = re.findall(r"pipeline: (.+)   dist_clm_eval.py: (.+)   expected: '(\w+)'", said)
    assert len(confirmed) == 3
    for by_pipeline, by_us, expected in confirmed:
        assert by_pipeline == by_us
        assert expected in LABELS
    again = run("mnli_text_to_text.sh", {**environment, "NUM_SHOWN": "0"}, tmp_path, "--num-threads", "1")
    assert "step 1/2" not in again, "trained anew instead of gone on"
    assert "pipeline:" not in again


@pytest.mark.skipif(shutil.which("taskset") is None, reason="no taskset")
def test_mnli_with_lora_on_cpus_pins_each_rank_and_leaves_a_peft_folder(place: Path, python: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    core = min(os.sched_getaffinity(0))
    more = {"REPLICAS": 2, "CORES": f"{core} {core}", "NUM_THREADS": 1, "MAX_TRAIN_SAMPLES": 20, "EPOCHS": 1, "MICRO_BATCH": 1}
    said = run("mnli_lora_cpu.sh", mnli(place, python, out, **more), tmp_path)
    assert "--max-train-samples          20" in said
    assert re.search(r"generated answers: accuracy .*: \d of 6 right", said)
    newest = max((path for path in out.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    settings_of_adapter = json.loads((newest / "adapter_config.json").read_text())
    assert (settings_of_adapter["r"], settings_of_adapter["lora_alpha"]) == (18, 54)
    with safe_open(newest / "adapter_model.safetensors", "pt") as adapter:
        names = set(adapter.keys())
    assert {name.split(".attn.")[-1].split(".")[0] for name in names} == {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_too_few_lists_of_cores_and_a_missing_allocator_are_named(place: Path, python: Path, tmp_path: Path) -> None:
    environment = mnli(place, python, tmp_path / "out", REPLICAS=2)
    assert "CORES has 1 lists of cores for 2 ranks" in run("mnli_lora_cpu.sh", {**environment, "CORES": "0"}, tmp_path, expect=2)
    assert "there is no /none.so" in run("mnli_lora_cpu.sh", {**environment, "ALLOCATOR": "/none.so"}, tmp_path, expect=2)


@full
def test_classification_over_int8_ends_in_one_table_of_every_way_and_prompt(place: Path, python: Path, tmp_path: Path) -> None:
    data = {"TRAIN_DATA": place / "rows.csv", "EVAL_DATA": place / "rows.csv", "TEXT_COLUMN": "body", "LABEL_COLUMN": "verdict"}
    small = {"SEQ_LENGTH": 128, "BATCH": 2, "STEPS": 2, "SHOTS": 2, "MAX_EVAL_SAMPLES": 8, "EVAL_BATCH": 4, "OUT": tmp_path / "out"}
    environment = settings(place, python, **data, **small)
    few = {"METHODS": "few-shot", "PROMPTS": "raw"}  # the whole product takes twice as long and shows nothing else
    run("classify_8bit.sh", {**environment, **few}, tmp_path, "--num-threads", "1")
    said = run("classify_8bit.sh", {**environment, "PROMPTS": "instruction"}, tmp_path, "--num-threads", "1")
    assert said.count("--base-quantization          int8") == 3
    assert said.count("--balance-labels             True") == 3
    table = (tmp_path / "out" / "table.txt").read_text()
    assert said.endswith(table)
    rows = {tuple(line.split()[:3]) for line in table.splitlines()[1:]}
    ways = ("layernorm", "lora-attention", "lora-all", "few-shot")
    assert rows == {*((way, "instruction", "8") for way in ways), ("few-shot", "raw", "8")}
    prompts = {
        name: json.loads((tmp_path / "out" / "answers" / f"{name}.jsonl").read_text().splitlines()[0])["prompt"]
        for name in ("few-shot.raw", "layernorm.instruction", "few-shot.instruction")
    }
    assert "Classify the text as one of: bad, good." in prompts["layernorm.instruction"]
    assert "Classify" not in prompts["few-shot.raw"]
    assert prompts["few-shot.instruction"].count("Label:") == 3
    again = run("classify_8bit.sh", {**environment, "METHODS": "few-shot", "PROMPTS": "raw instruction"}, tmp_path)
    assert "--- evaluation" not in again
    assert again.endswith(table)


def test_an_unknown_way_is_named(place: Path, python: Path, tmp_path: Path) -> None:
    environment = settings(place, python, METHODS="lora prefix", OUT=tmp_path / "out")
    assert "one of them is 'lora'" in run("classify_8bit.sh", environment, tmp_path, expect=2)


def test_a_failing_rank_ends_the_workflow_with_its_exit_code_and_its_reason(place: Path, python: Path, tmp_path: Path) -> None:
    environment = mnli(place, python, tmp_path / "out", STAGES=2, STEPS=2)
    said = run("mnli_text_to_text.sh", environment, tmp_path, "--micro-batch-size", "3", expect=2)
    assert "--micro-batch-size must divide --batch-size" in said
    assert "--- validation" not in said


def test_a_workflow_told_to_stop_lets_its_training_save_and_ends_there(place: Path, python: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("mnli_text_to_text.sh", mnli(place, python, out, STAGES=2, STEPS=100_000), tmp_path, "--logging-steps", "1")
    give_up = time.monotonic() + 60
    while not (out / "train_log.jsonl").exists() or not log_rows(out):
        assert time.monotonic() < give_up
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "--- validation" not in said
    assert [path for path in out.iterdir() if path.name.isdigit()], said


def test_torchrun_gives_the_rest_of_its_processes_to_replicas(place: Path, python: Path, tmp_path: Path) -> None:
    environment = settings(place, python, GPUS=4, PIPELINE=2, BATCH=2, OUT=tmp_path / "out", OMP_NUM_THREADS=1)
    said = run("finetune_torchrun.sh", environment, tmp_path, "--num-threads", "1")
    assert "2 stage(s) (1f1b) x 2 replica(s)" in said
    assert (tmp_path / "out" / "2" / "manifest.json").exists()


FAKE_SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@" & done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit "$code"
"""


def test_slurm_tasks_become_ranks_that_meet_on_the_first_node(place: Path, python: Path, tmp_path: Path) -> None:
    commands = {"srun": FAKE_SRUN, "scontrol": '#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\nnode2\\n"\n'}
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": free_port() - 10_000, "SLURM_NTASKS": 4, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_DIR": REPOSITORY}
    environment = settings(
        place, python, **slurm, PIPELINE=2, BATCH=2, OUT=tmp_path / "out", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    )
    said = run("finetune_slurm.sbatch", environment, tmp_path, "--num-threads", "1")
    assert "2 stage(s) (1f1b) x 2 replica(s)" in said
    assert (tmp_path / "out" / "2" / "manifest.json").exists()
    text = (SCRIPTS / "finetune_slurm.sbatch").read_text()
    assert "#SBATCH --signal=TERM@" in text, "so that a job saves before its time is over"
    said = run("finetune_slurm.sbatch", {**environment, "SLURM_JOB_NODELIST": ""}, tmp_path, expect=2)
    assert "inside a Slurm job" in said


def test_the_table_says_which_file_is_none_of_dist_clm_eval(place: Path, python: Path, tmp_path: Path) -> None:
    (tmp_path / "lora.raw.json").write_text('{"model": "m", "num_examples": 9, "perplexity": 3.5, "loss": 1.25, "seconds": 1}')
    (tmp_path / "other.json").write_text("{}")
    table = [str(python), str(SCRIPTS / "results_table.py")]
    done = subprocess.run([*table, "--markdown", str(tmp_path / "lora.raw.json")], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "| lora | raw | 9 | 3.5 |"
    wrong = subprocess.run([*table, str(tmp_path / "other.json")], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "it has no num_examples" in wrong.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_workflow_parses_is_short_of_140_columns_and_names_flags_that_are(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    if path.name not in ("common.sh", "finetune_gptj.sh"):
        assert os.access(path, os.X_OK)
        assert "\nset -euo pipefail\n" in text
        assert max(map(len, text.splitlines())) <= 140
    documented = "".join((REPOSITORY / "docs" / name).read_text() for name in ("flags.md", "evaluation_flags.md"))
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("#", "exec srun", "sed", "--master", "fail", "[["))]
    command = "\n".join(line for line in lines if "torch.distributed.run" not in line and "local -a" not in line)
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+\b", command):
        assert f"`{flag}" in documented or flag == "--help", flag


@pytest.mark.parametrize("name", [path.name for path in WORKFLOWS if path.suffix == ".sh" and path.name != "common.sh"])
def test_every_workflow_tells_its_settings(name: str, tmp_path: Path) -> None:
    said = run(name, {"PATH": os.environ["PATH"]}, tmp_path, "--help")
    assert re.search(r"^  MODEL=|^  SITE=", said, re.MULTILINE)
    assert "OUT" in said
