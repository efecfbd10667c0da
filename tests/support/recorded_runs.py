"""The bits of a set of runs, so that a change which must not change any can prove it.

    python tests/support/recorded_runs.py against COMMIT           # records both trees, says what differs
    python tests/support/recorded_runs.py record runs.json         # this tree alone
    python tests/support/recorded_runs.py compare A.json B.json

``against`` checks COMMIT out beside this tree and records the same runs with its code, on this
machine: bits depend on the processor and on torch, so a record of another machine says nothing.

The runs go through the public scripts alone (dist_clm_train.py, dist_clm_eval.py, the converters),
in forked processes. Kept of each: exit statuses; of every log row the fields, and the values of
those that are no time; of every file that a run wrote its hash. JSON files are hashed without what
differs from run to run (times, ports, tokens). The exit status is 1 where something differs.
"""

import argparse
import csv
import fnmatch
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LONGEST_RUN_S = 300.0
# of log rows and JSON files; all that is a time, or is made up anew by every run
VOLATILE = {
    *("tokens_per_s", "data_wait_s", "data_wait_share", "save_stall_s", "seconds", "time"),
    *("seconds_per_sequence", "run_token", "dist_url", "rank", "memory_limit", "written_at"),
}
WHOSE_RUN = (".lock", ".run.json")  # files that say which process runs here
Flags = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command, or one per rank. ``script``: a module with main(argv). ``world_size`` 0: it takes no ranks."""

    script: str
    flags: Flags
    world_size: int = 1
    per_rank: Mapping[int, Flags] = field(default_factory=dict)


def train(stages: int = 1, replicas: int = 1, **flags: Any) -> Step:
    """dist_clm_train.py on stages x replicas ranks: four steps of eight sequences, two checkpoints."""
    common = {
        "model_name": "gptj",
        "task_name": "a.jsonl:0.7,b.jsonl:0.3",
        "seq_length": 32,
        "batch_size": 4,
        "micro_batch_size": 2,
        "total_steps": 4,
        "checkpoint_steps": 2,
        "checkpoint_path": "run",
        "lr": 1e-3,
        "warmup_steps": 2,
        "logging_steps": 1,
    }
    grid = {"pipeline_group_size": stages, "data_group_size": replicas}
    return Step(
        script="dist_clm_train", flags={**common, **grid, **flags}, world_size=stages * replicas
    )


def evaluate(stages: int = 1, replicas: int = 1, **flags: Any) -> Step:
    """dist_clm_eval.py."""
    grid = {"pipeline_group_size": stages, "data_group_size": replicas}
    written = {"json": "results.json", "output": "examples.jsonl"}
    common = {"model_name": "gptj", "seq_length": 64, "micro_batch_size": 2}
    return Step(
        script="dist_clm_eval",
        flags={**common, **written, **grid, **flags},
        world_size=stages * replicas,
    )


def convert(script: str, **flags: Any) -> Step:
    """One of the four converters."""
    return Step(script=script, flags=flags, world_size=0)


# A name and what is done one after the other, in a folder of its own that has the models and data.
RUNS: dict[str, list[Step]] = {
    # grids and schedules
    "one process": [train()],
    "two stages gpipe": [train(2, pp_mode="gpipe")],
    "two stages 1f1b": [train(2)],
    "two stages zb": [train(2, pp_mode="zb")],
    "four stages zb recompute": [train(4, pp_mode="zb", recompute="layer")],
    "three uneven stages": [train(3, stage_layers="1,2,1", extra_warmup_forwards=1)],
    "measured cut": [train(2, partition="measured", micro_batch_size=1)],
    "two replicas": [train(1, 2)],
    "two stages two replicas accumulation": [train(2, 2, gradient_accumulate_step=2)],
    "gptneox": [train(2, model_name="gptneox")],
    "gptneox four stages zb": [train(4, model_name="gptneox", pp_mode="zb")],
    "fresh weights": [train(2, load_pretrained_model="false")],
    # precisions and optimizers
    "bf16 split masters": [train(2, bf16="true")],
    "bf16 whole masters": [train(2, bf16="true", master_weights="fp32")],
    "fp16": [train(2, fp16="true")],
    "fp16 fixed scale": [train(1, fp16="true", loss_scale=128.0)],
    "8-bit adam": [train(2, optimizer="8bit-adam")],
    "bf16 8-bit adam offload": [
        train(2, bf16="true", optimizer="8bit-adam", optimizer_offload="cpu")
    ],
    "curves": [train(1, lr_schedule="cosine", min_lr=1e-4, weight_decay=0.1, clip_grad_norm=0.05)],
    "wire bf16": [train(2, wire_dtype="bf16")],
    "wire int8": [train(2, wire_dtype="int8", wire_dtype_grad="fp16")],
    "dropout": [train(2, dropout=0.1)],
    # what is trained
    "lora": [train(2, train="lora", lora_dropout=0.1)],
    "lora on int8": [train(2, train="lora", base_quantization="int8", quantize_ends="true")],
    "lora on nf4": [train(2, train="lora", base_quantization="nf4", bf16="true")],
    "lora of some linears, bf16": [
        train(2, 2, train="lora", lora_target_modules="q_proj,v_proj", bf16="true")
    ],
    "layernorms": [train(2, train="layernorm", model_name="gptneox")],
    # data
    "concat": [train(1, packing="concat", packing_group=20)],
    "one document a sequence": [train(2, packing="none", long_documents="truncate")],
    "completions": [
        train(1, task_name="pairs.jsonl:2,classification=labels.csv:1", loss_on="completion")
    ],
    "read forwards": [train(1, task_name="a.jsonl.gz", shuffle_window=16)],
    "epochs": [train(1, total_steps=None, num_train_epochs=1, checkpoint_steps=0, seq_length=64)],
    # resumes
    "resume at another degree": [train(2), train(4, total_steps=8), train(1, total_steps=10)],
    "resume replicas verified": [
        train(1, 2, verify_resume="true"),
        train(2, 2, total_steps=8, verify_resume="true", verify_checkpoint="true"),
    ],
    "resume without moments": [
        train(2, checkpoint_optimizer="false"),
        train(1, checkpoint_optimizer="false", total_steps=8),
    ],
    "resume adapters": [train(2, train="lora"), train(1, train="lora", total_steps=8)],
    "resume 8-bit": [
        train(1, optimizer="8bit-adam", bf16="true"),
        train(2, optimizer="8bit-adam", bf16="true", total_steps=8),
    ],
    "resume an older step": [train(2, async_checkpoint="false"), train(1, resume=2, total_steps=6)],
    "keep few": [train(2, keep_checkpoints=1, checkpoint_steps=1)],
    # evaluation
    "evaluations while training": [
        train(
            2, evaluation_data="a.jsonl", evaluation_steps=2, keep_best="true", max_eval_samples=9
        )
    ],
    "accuracy while training": [
        train(
            2,
            task_name="classification=labels.csv",
            evaluation_data="classification=labels.csv",
            evaluation_metric="accuracy",
            evaluation_max_new_tokens=4,
            max_eval_samples=6,
        )
    ],
    "perplexity": [evaluate(evaluation_data="a.jsonl", metric="perplexity", max_eval_samples=20)],
    "labels, few shots": [
        evaluate(
            2,
            evaluation_data="classification=labels.csv",
            metric="perplexity,accuracy,labels",
            max_eval_samples=8,
            num_shots=1,
            max_new_tokens=4,
        )
    ],
    "int8 base of a gptneox": [
        evaluate(
            2,
            2,
            model_name="gptneox",
            evaluation_data="pairs.jsonl",
            metric="perplexity,accuracy",
            base_quantization="int8",
            max_eval_samples=6,
            max_new_tokens=4,
        )
    ],
    # converters
    "gptj there and back": [
        convert("convert_from_hf_gptj", model_name="gptj", save_dir="cut"),
        convert("convert_to_hf_gptj", ckpt_path="cut/gptj", save_path="back"),
        convert("convert_from_hf_gptj", model_name="gptj", save_dir="half", dtype="fp16"),
    ],
    "gptneox there and back": [
        convert("convert_from_hf_gptneox", model_name="gptneox", save_dir="cut"),
        convert(
            "convert_to_hf_gptneox",
            ckpt_path="cut/gptneox",
            save_path="back",
            max_shard_size="50KB",
        ),
    ],
    "legacy layout": [
        convert("convert_from_hf_gptj", model_name="gptj", save_dir="cut", legacy_layout=True),
        convert("convert_to_hf_gptj", ckpt_path="cut/gptj", save_path="back", config_name="gptj"),
    ],
    "merged adapter": [
        train(2, train="lora"),
        convert("convert_to_hf_gptj", ckpt_path="gptj", merge_adapter="run", save_path="merged"),
    ],
    # what is refused, and with which status
    "unknown flag": [train(1, no_such_flag=1)],
    "no such model": [train(1, model_name="nowhere")],
    "no such data": [train(2, task_name="nowhere.jsonl")],
    "cut that leaves layers out": [train(2, num_layers=1)],
    "ranks that differ": [
        Step(
            script="dist_clm_train", flags=train(2).flags, world_size=2, per_rank={1: {"lr": 2e-3}}
        )
    ],
    "over before it began": [train(2, max_seconds=0.001)],
    "resume of other data": [train(1), train(1, seed=1, total_steps=8)],
    "evaluation of nothing": [evaluate(evaluation_data="nowhere.jsonl", metric="perplexity")],
    "conversion of the other family": [
        convert("convert_from_hf_gptneox", model_name="gptj", save_dir="cut")
    ],
}


def make_inputs(folder: Path) -> None:
    """A tiny GPT-J and GPT-NeoX with their tokenizer, and data of each form; equal at every call."""
    import gzip

    from support import models

    models.make_model(folder / "gptj")
    models.make_neox_model(folder / "gptneox")
    for model in ("gptj", "gptneox"):
        models.make_tokenizer(folder / model)
    texts = models.TEXTS
    long = [" ".join(texts[n : n + 1 + n % 5]) for n in range(0, 120, 2)]
    for name, rows in (("a", texts[:150]), ("b", long)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes(), mtime=0))
    pairs = [{"prompt": f"How many foxes? {n} and", "completion": f" {n} dogs"} for n in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        table.writerows([text, ("lazy", "quick")[n % 2]] for n, text in enumerate(texts[:40]))


def command_line(step: Step, rank: int, port: int) -> list[str]:
    """argv of one rank."""
    flags = {**step.flags, **step.per_rank.get(rank, {})}
    if step.world_size:
        flags |= {
            "world_size": step.world_size,
            "rank": rank,
            "dist_url": f"tcp://127.0.0.1:{port}",
            "num_threads": 1,
            "device": "cpu",
        }
    argv = []
    for name, value in flags.items():
        if value is not None:
            argv += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return argv


def _child(tree: Path, script: str, argv: Sequence[str], output: Path) -> None:
    """A forked process: the script's main with its output in a file; ends with its exit status."""
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    status = 99
    try:
        module = importlib.import_module(script)
        assert str(module.__file__).startswith(f"{tree}{os.sep}"), (
            f"{module.__file__} is not of {tree}"
        )
        convert_family = script.rsplit("_", 1)[1]
        status = module.main(convert_family, argv) if "convert" in script else module.main(argv)
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status or 0)


def run_step(tree: Path, step: Step, folder: Path, number: int) -> list[int | None]:
    """The exit statuses of a step's processes, which run in ``folder``; None: it did not end in time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    os.chdir(folder)
    processes = []
    for rank in range(max(1, step.world_size)):
        output = folder / f".said_{number}_{rank}.txt"
        argv = command_line(step, rank, port)
        processes.append(fork.Process(target=_child, args=(tree, step.script, argv, output)))
        processes[-1].start()
    for process in processes:
        process.join(LONGEST_RUN_S)
        process.kill()
    return [process.exitcode for process in processes]


def stable(value: Any) -> Any:
    """``value`` of a JSON file without what is volatile."""
    if isinstance(value, dict):
        return {name: stable(entry) for name, entry in value.items() if name not in VOLATILE}
    return [stable(entry) for entry in value] if isinstance(value, list) else value


def fingerprint(path: Path, folder: Path) -> str:
    """16 hex digits of a file's content, wherever the ``folder`` of its run lies."""
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        content = content.replace(str(folder).encode(), b"FOLDER")
    if path.name == "manifest.json":  # hashes of files that are all looked at themselves
        entries = json.loads(content)
        names = {kind: sorted(entries.pop(kind)) for kind in ("files", "elsewhere")}
        content = json.dumps([names, stable(entries)]).encode()
    elif path.suffix == ".json":
        content = json.dumps(stable(json.loads(content)), sort_keys=True).encode()
    elif path.suffix == ".jsonl":
        rows = [stable(json.loads(line)) for line in content.splitlines()]
        content = json.dumps(rows, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def outcome(folder: Path, inputs: Sequence[str]) -> dict[str, Any]:
    """What a run left: rows of its log, and files by name."""
    found: dict[str, Any] = {"rows": [], "fields": [], "files": {}}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        own = path.is_file() and name.split("/")[0] not in inputs
        if not own or path.name.startswith((".said_", *WHOSE_RUN)):
            continue
        found["files"][name] = fingerprint(path, folder)
        if path.name == "train_log.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found["fields"] += [sorted(row) for row in rows]
            found["rows"] += [stable(row) for row in rows]
    return found


def record(tree: Path, only: str, show: Callable[[str], None]) -> dict[str, Any]:
    """All runs whose name matches the pattern ``only``, with the code of ``tree``."""
    import torch
    import transformers

    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    transformers.AutoTokenizer  # noqa: B018 - imported here, so that no forked process has to
    found: dict[str, Any] = {}
    chosen = [name for name in RUNS if fnmatch.fnmatch(name, only)]
    with tempfile.TemporaryDirectory() as root:
        make_inputs(Path(root) / "inputs")
        inputs = sorted(entry.name for entry in (Path(root) / "inputs").iterdir())
        for number, name in enumerate(chosen, 1):
            show(f"{number} of {len(chosen)}: {name}")
            folder = Path(root) / "work"
            shutil.copytree(Path(root) / "inputs", folder)
            statuses = [run_step(tree, step, folder, n) for n, step in enumerate(RUNS[name])]
            said = {p.name: p.read_text()[-2000:] for p in sorted(folder.glob(".said_*"))}
            found[name] = {"statuses": statuses, **outcome(folder, inputs), "said": said}
            os.chdir(REPOSITORY)
            shutil.rmtree(folder)
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """One line for everything that differs. What the processes said does not count."""
    for name in sorted({*before, *after}):
        if name not in before or name not in after:
            yield f"{name}: only {'before' if name in before else 'after'}"
            continue
        old, new = before[name], after[name]
        for what in ("statuses", "fields", "rows"):
            if old[what] != new[what]:
                yield f"{name}: {what}: {_first_difference(old[what], new[what])}"
        for file in sorted({*old["files"], *new["files"]}):
            one, other = old["files"].get(file, "no file"), new["files"].get(file, "no file")
            if one != other:
                yield f"{name}: {file}: {one}, now {other}"


def _first_difference(old: Sequence[Any], new: Sequence[Any]) -> str:
    if len(old) != len(new):
        return f"{len(old)} entries, now {len(new)}"
    place = next(n for n, (one, other) in enumerate(zip(old, new, strict=True)) if one != other)
    return f"entry {place}: {old[place]}, now {new[place]}"


def record_in(tree: Path, file: Path, only: str) -> None:
    """Record with the code of ``tree``, in a process of its own, into ``file``."""
    command = [sys.executable, str(Path(__file__).resolve()), "record", str(file), "--only", only]
    subprocess.run([*command, "--tree", str(tree)], check=True)


def against(commit: str, only: str) -> list[str]:
    """Record ``commit`` and this tree; what differs."""
    with tempfile.TemporaryDirectory() as root:
        tree = Path(root) / "tree"
        git = ["git", "-C", str(REPOSITORY), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            record_in(tree, Path(root) / "before.json", only)
            record_in(REPOSITORY, Path(root) / "after.json", only)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
        return list(
            differences(*(_read(Path(root) / name) for name in ("before.json", "after.json")))
        )


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="the runs of one tree, into a file")
    recording.add_argument("file", type=Path)
    recording.add_argument("--tree", type=Path, default=REPOSITORY, help="whose code runs")
    comparing = commands.add_parser("compare", help="two files of record")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    both = commands.add_parser("against", help="a commit's tree and this one")
    both.add_argument("commit")
    for one in (recording, both):
        one.add_argument("--only", default="*", help="runs whose name matches, such as 'resume*'")
    options = parser.parse_args(argv)
    if options.command == "record":
        file = options.file.absolute()
        tree = options.tree.resolve()
        sys.path[:0] = [str(tree), str(REPOSITORY / "tests")]
        found = record(tree, options.only, lambda line: print(line, file=sys.stderr))
        file.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    if options.command == "compare":
        lines = list(differences(_read(options.before), _read(options.after)))
    else:
        lines = against(options.commit, options.only)
    print("\n".join(lines) if lines else "nothing differs")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
