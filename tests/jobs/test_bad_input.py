"""Every mistake a user can make gets one clear message on every rank, a non-zero exit, no hang, no traceback; nothing is overwritten."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_model, make_tokenizer
from support.ranks import REPOSITORY, Process, free_port, launch, train, train_argv
from support.tiers import sample

import dist_clm_train
from comms.deadlines import DEADLINES
from comms.interfaces import list_interfaces


@pytest.fixture
def flags(model_folder: Path, tasks: list[Path], tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name": model_folder,
        "task_name": tasks[0],
        "checkpoint_path": tmp_path / "run",
        "seq_length": 32,
        "batch_size": 4,
        "micro_batch_size": 2,
        "total_steps": 2,
    }


def refused(tmp_path: Path, *wanted: str, stages: int = 2, everywhere: bool = True, **flags: Any) -> list[Process]:
    """The run ends soon, non-zero on all ranks; ``wanted`` stands in the message of every rank (or of one), without a traceback."""
    started = time.monotonic()
    processes = train(tmp_path / "ranks", stages=stages, expect=None, timeout_s=30, **flags)
    assert time.monotonic() - started < 20
    for process in processes:
        assert process.status not in (0, None), process.text
        assert "Traceback" not in process.text, process.text
        assert process.text.strip(), "every rank says something"
    texts = [" ".join(process.text.split()) for process in processes]
    for text in texts if everywhere else [" ".join(texts)]:
        for part in wanted:
            assert part in text, f"{part!r} is not in:\n{text}"
    root = flags.get("checkpoint_path")
    if root is not None and os.path.isdir(root):
        assert not [p for p in Path(root).glob("*") if p.name not in (".lock", "kept")], "nothing is written"
    return processes


@sample(15)
@pytest.mark.parametrize(
    ("wrong", "wanted"),
    [
        ({"world_size": 3, "rendezvous_timeout": 2}, ("--world-size", "3")),
        ({"world_size": 4, "data_group_size": 1, "rendezvous_timeout": 2}, ("4 is not 2 x 1 = 2", "Start 2 processes")),
        ({"micro_batch_size": 3}, ("3 does not divide 4",)),
        ({"num_layers": 1}, ("1 x 2 = 2 of its 4 layers", "use 2")),
        ({"num_layers": 4}, ("stage 1 of 2 would get none",)),
        ({"num_layers": 0}, ("--num-layers must be at least 1",)),
        ({"embedding_dim": 64}, ("it is 64, config.json says 32",)),
        ({"seq_length": 65}, ("it is 65, config.json says 64",)),
        ({"seq_length": 1}, ("--seq-length must be at least 2",)),
        ({"total_steps": 3, "gradient_accumulate_step": 2}, ("3 is none of 2", "Use 4")),
        ({"warmup_steps": 1, "warmup_proportion": 0.1}, ("pass one of them",)),
        ({"net_interface": "nosuch0"}, ("'nosuch0' is not one of", "lo (127.0.0.1)")),
        ({"dist_url": "127.0.0.1:99"}, ("tcp://HOST:PORT", "'127.0.0.1:99'")),
        ({"dist_url": "tcp://127.0.0.1:99999"}, ("1 .. 65535",)),
        ({"fp16": "true", "bf16": "true"}, ("two precisions of the same parameters", "pass one")),
        ({"loss_scale": 512}, ("--loss-scale is for --fp16", "Leave it out")),
        ({"fp16": "true", "loss_scale": 0}, ("--loss-scale must be above 0 and at most 16777216",)),
        ({"fp16": "true", "min_loss_scale": 100000}, ("--min-loss-scale must not exceed --initial-loss-scale",)),
        ({"base_quantization": "int8"}, ("for weights that are not trained, and --train all trains every one", "--train lora")),
        ({"train": "lora", "quantize_ends": "true"}, ("--quantize-ends adds to --base-quantization, which is none",)),
        ({"train": "lora", "lora_rank": 0}, ("rank of LoRA must be at least 1; it is 0",)),
        ({"train": "lora", "lora_rank": -2}, ("rank of LoRA must be at least 1; it is -2",)),
        ({"train": "lora", "lora_alpha": 0}, ("alpha of LoRA must be a number above 0",)),
        ({"train": "lora", "lora_dropout": 1}, ("dropout of LoRA must be at least 0 and below 1",)),
        ({"train": "lora", "lora_target_modules": "query,v_proj"}, ("'query' is none", "q_proj, k_proj, v_proj, out_proj, fc_in, fc_out")),
        ({"train": "lora", "lora_target_modules": ","}, ("there is none", "q_proj")),
        ({"lora_rank": 4}, ("--lora-rank is for --train lora; nothing else reads it",)),
        ({"train": "layernorm", "lora_dropout": 0.1}, ("--lora-dropout is for --train lora",)),
        ({"initial_loss_scale": 4}, ("--initial-loss-scale is for --fp16",)),
        ({"fp16": "true", "loss_scale": 8, "loss_scale_window": 5}, ("--loss-scale-window is for", "without --loss-scale")),
        ({"fp16": "true", "master_weights": "fp32"}, ("--master-weights is for --bf16",)),
        ({"train": "lora", "load_pretrained_model": "false"}, ("adapts a model's weights", "none are read")),
        ({"dropout": 1}, ("--dropout must be 0 or more and below 1",)),
        ({"pp_mode": "interleaved"}, ("--pp-mode", "'interleaved'", "'gpipe', '1f1b', 'zb'")),
        ({"wire_dtype": "int2"}, ("--wire-dtype", "'int2'", "'int8', 'int4'")),
        ({"wire_dtype_grad": "int4"}, ("multiple of 64", "it is 32", "int8")),
        ({"extra_warmup_forwards": "-1"}, ("--extra-warmup-forwards must be auto or a whole number of 0 .. 9999", "'-1'")),
        ({"stage_layers": "1,2"}, ("1,2 sums to 3, the model has 4", "--stage-layers 2,2")),
        ({"stage_layers": "1,1,2"}, ("has 3 and --pipeline-group-size is 2",)),
        ({"stage_layers": "0,4"}, ("gives stage 0 0",)),
        ({"stage_layers": "two,2"}, ("one whole number per stage", "'two,2'")),
        ({"stage_layers": "2,2", "partition": "measured"}, ("--stage-layers and --partition measured are given",)),
        ({"memory_limit": 0}, ("--memory-limit must be above 0 GiB",)),
        ({"partition": "measured", "memory_limit": 1e300}, ("--memory-limit must be above 0 GiB and at most",)),
        ({"trace_path": "trace.json"}, ("--trace-path is where --profiling tidy_profiling writes",)),
        ({"memory_limit": 4}, ("--memory-limit is what --partition measured keeps to",)),
        ({"pp_mode": "gpipe", "extra_warmup_forwards": 2}, ("--extra-warmup-forwards is for --pp-mode 1f1b and zb",)),
        ({"partition": "measured", "memory_limit": 1e-5}, ("must fit the memory of the stages", "it has 0.01 MiB", "--memory-limit")),
        ({"profiling": "tidy_profiling", "trace_path": "/proc/no/such/trace.json"}, ("/proc/no/such",)),
        ({"profiling_steps": 0}, ("--profiling-steps must be at least 1",)),
        ({"dp_backend": "nccl"}, ("nccl carries CUDA tensors only",)),
        ({"device": "cuda"}, ("--device cuda needs a GPU",)),
        ({"model_type": "bert"}, ("--model-type", "gptj")),
        ({"lr": "fast"}, ("--lr", "fast")),
        ({"lr": -1}, ("--lr must be 0 or more",)),
        ({"rendezvous_timeout": "nan"}, ("--rendezvous-timeout must be above 0",)),
        ({"min_lr": 1}, ("--min-lr must not exceed --lr",)),
        ({"no_such_flag": 1}, ("unknown flags", "--no-such-flag")),
        ({"model_name": "/no/such/folder"}, ("/no/such/folder",)),
        ({"model_name": "no-such-name-on-any-hub"}, ("no-such-name-on-any-hub", "HF_HUB_OFFLINE")),
        ({"config": "/no/such.yaml"}, ("--config must name a readable file",)),
        ({"load_pretrained_model": "maybe"}, ("must be true or false", "maybe")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_flag_is_refused_by_every_rank(
    wrong: dict[str, Any], wanted: tuple[str, ...], flags: dict[str, Any], tmp_path: Path
) -> None:
    if wrong.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    refused(tmp_path, *wanted, **{**flags, **wrong})


def test_all_problems_of_a_command_line_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    soon = ("--rendezvous-timeout", "1")
    assert (
        dist_clm_train.main(["--batch-size", "3", "--micro-batch-size", "2", "--world-size", "3", "--pipeline-group-size", "2", *soon]) == 2
    )
    text = capsys.readouterr().err
    for part in ("--model-name is required", "--task-name is required", "2 does not divide 3", "no multiple of --pipeline-group-size 2"):
        assert part in text


def test_more_stages_than_layers(flags: dict[str, Any], tmp_path: Path) -> None:
    refused(tmp_path, "--pipeline-group-size is 5 and the model has 4 layers", stages=5, **flags)


def ended(processes: list[Process], timeout_s: float = 25) -> list[str]:
    try:
        for process in processes:
            assert process.wait(timeout_s) != 0, process.text
            assert "Traceback" not in process.text
    finally:
        for process in processes:
            process.kill()
    return [process.text for process in processes]


def two_ranks(flags: dict[str, Any], tmp_path: Path, **of_rank: dict[str, Any]) -> list[Process]:
    """Two stages; rank0 and rank1 may each get flags of their own."""
    url = f"tcp://127.0.0.1:{free_port()}"
    common = {"rendezvous_timeout": 60, **flags, "pipeline_group_size": 2, "world_size": 2, "dist_url": url, "device": "cpu"}
    return launch(lambda rank: train_argv(**{**common, "rank": rank, **of_rank.get(f"rank{rank}", {})}), 2, tmp_path / "ranks")


def test_a_rank_out_of_range_is_named_to_all(flags: dict[str, Any], tmp_path: Path) -> None:
    texts = ended(two_ranks(flags, tmp_path, rank1={"rank": 7}))
    assert all("--rank must be 0 .. 1" in text and "7" in text for text in texts), texts


def test_a_rank_taken_twice_is_named_to_all(flags: dict[str, Any], tmp_path: Path) -> None:
    common = {**flags, "pipeline_group_size": 4, "world_size": 4, "dist_url": f"tcp://127.0.0.1:{free_port()}", "device": "cpu"}
    processes = launch(lambda n: train_argv(**{**common, "rank": (0, 1, 2, 2)[n]}), 4, tmp_path / "ranks")
    texts = ended(processes)
    assert all("rank 2 is taken twice" in text for text in texts), texts


def test_two_rank_zeros_both_hear_of_each_other(flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.membership.meeting.TELL_OTHERS_S", 3.0)
    processes = two_ranks({**flags, "rendezvous_timeout": 60}, tmp_path, rank1={"rank": 0})
    texts = ended(processes)
    assert all("is taken, by another job or another rank 0" in text for text in texts), texts
    assert any("two processes say they are rank 0" in text and "--rank" in text for text in texts), texts


def test_a_rank_that_never_shows_up_is_named_at_the_deadline(flags: dict[str, Any], tmp_path: Path) -> None:
    common = {
        **flags,
        "pipeline_group_size": 2,
        "data_group_size": 2,
        "dist_url": f"tcp://127.0.0.1:{free_port()}",
        "rendezvous_timeout": 2,
    }
    processes = launch(lambda rank: train_argv(**{**common, "rank": rank, "world_size": 4}), 2, tmp_path / "ranks")
    for text in ended(processes):
        assert "rank 2 (stage 0 of 2, replica 1 of 2), rank 3 (stage 1 of 2, replica 1 of 2)" in text
        assert "within 2 s" in text


def test_rank_0_that_never_shows_up_is_named_at_the_deadline(flags: dict[str, Any], tmp_path: Path) -> None:
    common = {**flags, "pipeline_group_size": 2, "world_size": 2, "dist_url": f"tcp://127.0.0.1:{free_port()}", "rendezvous_timeout": 2}
    (text,) = ended(launch(lambda _: train_argv(**{**common, "rank": 1}), 1, tmp_path / "ranks"))
    assert "rank 0 must answer at tcp://127.0.0.1:" in text


@pytest.fixture
def foreign_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_a_taken_port_is_named_and_a_foreign_program_is_not_taken_for_rank_0(
    foreign_port: int, flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.membership.meeting.DEADLINES", dataclasses.replace(DEADLINES, handshake_s=1.0))
    flags |= {"rendezvous_timeout": 5}
    url = {"dist_url": f"tcp://127.0.0.1:{foreign_port}"}
    texts = ended(two_ranks(flags, tmp_path, rank0=url, rank1=url))
    assert f"port {foreign_port} on 127.0.0.1 is taken" in texts[0]
    assert "something else answers" in texts[1]


def test_other_flags_on_one_rank_are_named_with_both_values(flags: dict[str, Any], tmp_path: Path) -> None:
    for text in ended(two_ranks(flags, tmp_path, rank1={"lr": 0.5})):
        assert "--lr: " in text and "0.5" in text and "1e-05" in text


def test_another_model_on_one_rank_is_noticed(flags: dict[str, Any], tmp_path: Path) -> None:
    make_model(tmp_path / "wider", n_embd=64)
    for text in ended(two_ranks(flags, tmp_path, rank1={"model_name": tmp_path / "wider"})):
        assert "model (configuration and tensor shapes)" in text


def test_another_world_size_on_one_rank_is_named(flags: dict[str, Any], tmp_path: Path) -> None:
    for text in ended(two_ranks(flags, tmp_path, rank1={"world_size": 4, "data_group_size": 2})):
        assert "agree on --world-size" in text


def test_a_wrong_interface_on_rank_0_alone_is_told_to_the_others_at_once(flags: dict[str, Any], tmp_path: Path) -> None:
    started = time.monotonic()
    for text in ended(two_ranks(flags, tmp_path, rank0={"net_interface": "nosuch0"})):
        assert "'nosuch0' is not one of" in text
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_an_interface_variable_that_disagrees_is_an_error_naming_both(variable: str, flags: dict[str, Any], tmp_path: Path) -> None:
    def before(_: int) -> None:
        os.environ[variable] = "eth9"

    refused(tmp_path, variable, "'eth9'", "'lo'", before=before, **flags)


def test_a_wrong_flag_on_one_rank_alone_is_told_to_the_others_at_once(flags: dict[str, Any], tmp_path: Path) -> None:
    for wrong, wanted in (
        ({"micro_batch_size": 3}, "3 does not divide 4"),
        ({"lr": "fast"}, "fast"),
        ({"total_stepz": 3}, "--total-stepz"),
        ({"config": "/no/such.yaml"}, "/no/such.yaml"),
    ):
        started = time.monotonic()
        for text in ended(two_ranks(flags, tmp_path, rank1=wrong)):
            assert wanted in text
        assert time.monotonic() - started < 30
    for text in ended(two_ranks(flags, tmp_path, rank0={"micro_batch_size": 3})):
        assert "3 does not divide 4" in text


def test_data_that_rank_0_was_not_given_is_told_to_the_others_at_once(flags: dict[str, Any], tmp_path: Path) -> None:
    started = time.monotonic()
    for text in ended(two_ranks({**flags, "task_name": None}, tmp_path)):
        assert "--task-name is required" in text
    assert time.monotonic() - started < 30


def test_an_interface_on_rank_0_that_does_not_own_the_dist_url_is_told_to_the_others_at_once(flags: dict[str, Any], tmp_path: Path) -> None:
    others = [name for name, interface in list_interfaces().items() if not interface.is_loopback]
    if not others:
        pytest.skip("this machine has no interface but lo")
    started = time.monotonic()
    for text in ended(two_ranks(flags, tmp_path, rank0={"net_interface": others[0]})):
        assert "127.0.0.1 belongs to lo" in text
    assert time.monotonic() - started < 30


def test_a_mistyped_flag_is_answered_with_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert dist_clm_train.main(["--total-step", "4", "--world-size", "1"]) == 2
    assert "did you mean --total-steps for --total-step" in capsys.readouterr().err


def test_replicas_that_would_start_from_other_weights_are_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    """Same shapes, other numbers: a stale copy of the model on one host."""
    make_model(tmp_path / "stale", seed=5)
    make_tokenizer(tmp_path / "stale")
    grid = {"pipeline_group_size": 1, "data_group_size": 2}
    common = {**flags, **grid, "world_size": 2, "dist_url": f"tcp://127.0.0.1:{free_port()}", "device": "cpu", "rendezvous_timeout": 20}
    stale = {"model_name": tmp_path / "stale"}
    processes = launch(lambda rank: train_argv(**{**common, "rank": rank, **(stale if rank else {})}), 2, tmp_path / "ranks")
    for text in ended(processes):
        assert "all ranks read the same model; rank 1" in text and "has other weights under --model-name than rank 0" in text


def test_a_script_without_its_packages_says_how_to_get_them() -> None:
    for script in ("dist_clm_train.py", "convert_from_hf_gptj.py", "convert_to_hf_gptj.py"):
        done = subprocess.run([sys.executable, "-S", script, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 1
        assert "lacks the package" in done.stderr and "make setup" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["dist_clm_train.py", "dist_clm_eval.py"])
def test_ctrl_c_while_packages_are_imported_shows_no_traceback(script: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, script], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted before anything had begun\n")


def test_a_dist_url_that_is_not_this_machines_is_refused_by_rank_0(flags: dict[str, Any], tmp_path: Path) -> None:
    url = {"dist_url": f"tcp://203.0.113.7:{free_port()}", "rendezvous_timeout": 1, "net_interface": "lo"}
    (text,) = ended(launch(lambda _: train_argv(**{**flags, **url, "rank": 0, "world_size": 1}), 1, tmp_path / "ranks"))
    assert "203.0.113.7 is not an address of this machine" in text


def bad_file(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    return path


GOOD = json.dumps({"text": "a good document"}) + "\n"


@sample(2)
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", ("bad.jsonl",)),
        ("\n\n", ("bad.jsonl",)),
        (GOOD + "{broken\n" + GOOD, ("bad.jsonl:2", "--on-bad-record skip")),
        (GOOD + GOOD + '{"txt": "x"}\n', ("bad.jsonl:3", "text")),
        ('{"text": 7}\n', ("bad.jsonl:1", "text")),
        ("[1]\n", ("bad.jsonl:1",)),
    ],
)
def test_bad_data_is_named_by_file_and_line_on_every_rank(
    content: str, wanted: tuple[str, ...], flags: dict[str, Any], tmp_path: Path
) -> None:
    refused(tmp_path, *wanted, **{**flags, "task_name": bad_file(tmp_path, content)})


def test_bad_records_can_be_skipped(flags: dict[str, Any], tmp_path: Path) -> None:
    path = bad_file(tmp_path, GOOD * 30 + "{broken\n" + GOOD)
    processes = train(tmp_path / "ranks", stages=2, **{**flags, "task_name": path, "on_bad_record": "skip"})
    assert "skip" in processes[0].text and "bad.jsonl" in processes[0].text


@pytest.mark.parametrize(
    ("task_list", "wanted"),
    [
        ("{tmp}/nothing.jsonl", ("nothing.jsonl",)),
        ("{good}:-1", ("-1",)),
        ("{good}:0,{good}:0", ("0",)),
        ("{good}:nan", ("nan",)),
        ("{good},,{good}", ("has no source",)),
        ("{tmp}/x.parquet", ("x.parquet", "Correct the path")),
        ("nonsense={good}", ("nonsense", "mnli")),
        ("cot", ("mmlu-cot.json", "cot=PATH")),
        ("", ("--task-name",)),
    ],
)
def test_bad_task_lists_are_refused(
    task_list: str, wanted: tuple[str, ...], flags: dict[str, Any], tasks: list[Path], tmp_path: Path
) -> None:
    name = task_list.format(tmp=tmp_path, good=tasks[0])
    refused(tmp_path, *wanted, everywhere=False, **{**flags, "task_name": name, "rendezvous_timeout": 3})


def test_a_tokenizer_with_more_ids_than_rows_is_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "large", vocab_size=350)
    refused(tmp_path, "has 3", "the model 320", **{**flags, "tokenizer_name": tmp_path / "large"})


def test_a_folder_without_a_tokenizer_is_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    make_model(tmp_path / "bare")
    refused(tmp_path, "must hold a tokenizer", "--tokenizer-name", **{**flags, "model_name": tmp_path / "bare"})


def damaged_copy(model_folder: Path, tmp_path: Path, damage: str) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder, folder)
    file = folder / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return folder
    tensors = load_file(file)
    if damage == "missing":
        del tensors["transformer.h.2.attn.k_proj.weight"]
    elif damage == "extra":
        tensors["transformer.h.4.ln_1.weight"] = torch.zeros(32)
    elif damage == "shape":
        tensors["lm_head.bias"] = torch.zeros(319)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        ("missing", ("missing", "transformer.h.2.attn.k_proj.weight")),
        ("extra", ("extra", "transformer.h.4.ln_1.weight")),
        ("shape", ("lm_head.bias", "319", "320")),
        ("truncated", ("model.safetensors",)),
    ],
)
def test_a_damaged_model_folder_is_refused_before_any_weight_is_loaded(
    damage: str, wanted: tuple[str, ...], flags: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    refused(tmp_path, *wanted, **{**flags, "model_name": damaged_copy(model_folder, tmp_path, damage)})


@pytest.fixture
def finished(flags: dict[str, Any], tmp_path: Path) -> Path:
    train(tmp_path / "first", **flags)
    return Path(flags["checkpoint_path"])


@sample(2)
@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"seed": 7}, ("--seed: then 42, now 7",)),
        ({"seq_length": 16}, ("--seq-length: then 32, now 16",)),
        ({"task_name": "other"}, ("--task-name", "task0.jsonl", "task1.jsonl")),
        ({"task_name": "reweighted"}, ("--task-name", "0.25")),
        ({"tokenizer_name": "other"}, ("tokenizer: then",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_resume_with_other_data_names_both_values_and_can_start_the_data_over(
    change: dict[str, Any], wanted: tuple[str, ...], flags: dict[str, Any], finished: Path, tasks: list[Path], tmp_path: Path
) -> None:
    change = dict(change)
    if change.get("task_name") == "other":
        change["task_name"] = tasks[1]
    if change.get("task_name") == "reweighted":
        change["task_name"] = f"{tasks[0]}:3,{tasks[0]}:1"
    if "tokenizer_name" in change:
        make_tokenizer(tmp_path / "other", vocab_size=300)
        change["tokenizer_name"] = tmp_path / "other"
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    longer = {**flags, **change, "total_steps": 4, "checkpoint_path": None}
    for process in refused(tmp_path, *wanted, "--allow-data-change", **{**longer, "before": _at(finished)}):
        assert process.status == 1
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != ".lock"} == before
    processes = train(tmp_path / "over", stages=2, **{**longer, "checkpoint_path": finished, "allow_data_change": "true"})
    assert "starts over" in processes[0].text
    assert (finished / "4" / "manifest.json").exists()


def test_a_resume_with_another_global_batch_names_both_and_goes_on_in_the_data_if_allowed(
    flags: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    longer = {**flags, "total_steps": 4, "batch_size": 8, "checkpoint_path": None}
    refused(tmp_path, "global batch", "with 4 sequences", "now there are 8", "--allow-batch-change", **{**longer, "before": _at(finished)})
    train(tmp_path / "on", **{**longer, "checkpoint_path": finished, "allow_batch_change": "true"})
    states = [json.loads((finished / step / "train_state" / "trainer.json").read_text()) for step in ("2", "4")]
    assert [state["position"] for state in states] == [8, 24]
    assert [state["data"]["next_sequence_index"] for state in states] == [8, 24]


def _at(folder: Path) -> Any:
    """refused() holds checkpoint_path to stay empty; this one is not, so it comes in through the environment of the flags."""

    def before(_: int) -> None:
        import sys

        main = dist_clm_train.main
        sys.modules["dist_clm_train"].main = lambda argv: main([*argv, "--checkpoint-path", str(folder)])  # type: ignore[attr-defined]

    return before


@pytest.mark.parametrize("change", ["a line more", "other words of the same length"])
def test_a_data_file_that_changed_is_noticed_on_resume_and_can_start_over(change: str, flags: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(GOOD * 40)
    own = {**flags, "task_name": data}
    train(tmp_path / "first", **own)
    data.write_text(GOOD * 41 if change == "a line more" else GOOD.replace("good", "evil") * 40)
    (process,) = train(tmp_path / "second", expect=1, **{**own, "total_steps": 4})
    assert "contents of the task files: then" in process.text and "--allow-data-change" in process.text
    (process,) = train(tmp_path / "third", **{**own, "total_steps": 4, "allow_data_change": "true"})
    assert "starts over" in process.text


def test_the_same_weights_written_otherwise_are_the_same_task_list(flags: dict[str, Any], tasks: list[Path], tmp_path: Path) -> None:
    train(tmp_path / "first", **{**flags, "task_name": f"{tasks[0]}:0.7,{tasks[1]}:0.1"})
    train(tmp_path / "second", **{**flags, "task_name": f"{tasks[0]}:7,{tasks[1]}:1", "total_steps": 4})


def test_learning_rate_total_and_checkpoint_steps_may_change_on_resume(flags: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    train(tmp_path / "more", stages=2, **{**flags, "total_steps": 4, "lr": 5e-4, "checkpoint_steps": 1})
    assert {"2", "3", "4"} <= {path.name for path in finished.iterdir()}


def test_a_checkpoint_of_another_model_is_refused(flags: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    config = finished / "2" / "config.json"
    text = json.dumps({**json.loads(config.read_text()), "model_type": "gpt_neox"})
    manifest = finished / "2" / "manifest.json"
    listed = json.loads(manifest.read_text())
    listed["files"]["config.json"]["size"] = len(text)
    config.write_text(text)
    manifest.write_text(json.dumps(listed))
    for process in train(tmp_path / "again", stages=2, expect=1, **{**flags, "total_steps": 4}):
        assert "checkpoint of model type 'gpt_neox'" in process.text and "Traceback" not in process.text


def test_a_second_job_on_the_same_checkpoint_path_is_refused_naming_the_owner(flags: dict[str, Any], tmp_path: Path) -> None:
    from checkpoint.job_lock import JobLock

    with JobLock(Path(flags["checkpoint_path"])):
        refused(tmp_path, str(os.getpid()), **flags)


def test_a_checkpoint_path_that_cannot_be_made_is_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    refused(tmp_path, "file", **{**flags, "checkpoint_path": tmp_path / "file" / "run"})
    refused(tmp_path, "file", **{**flags, "checkpoint_path": tmp_path / "file"})
    assert (tmp_path / "file").read_text() == "not a folder"
    refused(tmp_path, "cannot write", **{**flags, "checkpoint_path": "/proc/no-such-folder"})
    refused(tmp_path, "cannot write", **{**flags, "checkpoint_path": tmp_path / ("a" * 300)})


def test_a_checkpoint_path_that_is_a_model_folder_is_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    for process in train(tmp_path / "ranks", expect=1, **{**flags, "checkpoint_path": tmp_path / "model"}):
        assert "holds a model" in process.text
    assert not (tmp_path / "model" / ".lock").exists()


def test_a_log_that_cannot_be_written_is_a_clear_error(flags: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run" / "train_log.jsonl").mkdir(parents=True)
    for process in train(tmp_path / "ranks", stages=2, expect=1, **flags):
        assert "train_log.jsonl" in process.text and "Traceback" not in process.text
