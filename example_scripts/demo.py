"""The main job at toy size, end to end, on any machine: what a user does with GPT-J 6B, in a few minutes and without a download.

Run by `make demo` with the Python of .venv. Every step is a command or a function that a user would use as well; the training goes
through example_scripts/finetune_gptj.sh. The demo fails unless the loss really fell. It writes to one folder only, and clears that
folder only if it made it.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import demo_corpus
import demo_model

from user_error import UserError

REPO = Path(__file__).resolve().parent.parent
LAUNCHER = REPO / "example_scripts" / "finetune_gptj.sh"
MARKER = ".made_by_demo"
PROMPTS = ["def __init__(self", "import", "Return the"]
NUM_LAST_ROWS = 5  # a single step's loss is noisy

# What finetune_gptj.sh is given; the rest stays at its defaults.
SETTINGS = {
    "PIPELINE": "2",
    "REPLICAS": "2",
    "NET_INTERFACE": "lo",
    "DP_BACKEND": "gloo",
    "DEVICE": "cpu",
    "NUM_THREADS": "1",
    "SEQ_LENGTH": "128",
    "BATCH": "8",
    "MICRO_BATCH": "4",
    "LR": "3e-3",
    "WARMUP_STEPS": "10",
    "CHECKPOINT_STEPS": "0",
}


def shown(path: Path) -> str:
    """The path as the user would type it in the repository."""
    return str(path.relative_to(REPO)) if path.is_relative_to(REPO) else str(path)


def fresh_folder(folder: Path) -> None:
    """An empty ``folder`` with the demo's mark. One with anything else in it is refused."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{shown(folder)} must be a folder or absent; it is a file or a link. Choose another with --output.")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise UserError(f"{shown(folder)} is not empty and was not made by the demo. Move it away, or choose another with --output.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("Made by example_scripts/demo.py, which deletes this folder when it runs again.\n")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_step(checkpoints: Path) -> Path:
    steps = [entry for entry in checkpoints.iterdir() if entry.name.isdecimal()]
    if not steps:
        raise UserError(f"the training left no checkpoint in {shown(checkpoints)}.")
    return max(steps, key=lambda entry: int(entry.name))


def loss_drop(log: Path, min_drop: float) -> tuple[float, float]:
    """(loss of the first step, mean of the last ones) from train_log.jsonl; raised unless the second is ``min_drop`` nat lower."""
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    if not losses:
        raise UserError(f"{shown(log)} has no rows: nothing was trained.")
    last_rows = losses[-NUM_LAST_ROWS:]
    first, last = losses[0], sum(last_rows) / len(last_rows)
    if not first - last >= min_drop:  # also true for nan
        raise UserError(
            f"the loss must end at least {min_drop} nat below the first step; it went {first:.3f} -> {last:.3f} "
            f"(mean of the last {len(last_rows)} steps). The rows are in {shown(log)}."
        )
    return first, last


def without_settings(environ: dict[str, str]) -> dict[str, str]:
    """The user's environment less what would change the demo: the settings of finetune_gptj.sh and interfaces chosen for other runs.

    Names such as PORT, SEED or PYTHON are exported in many a shell, for other reasons.
    """
    settings = re.findall(r'^: "\$\{(\w+):=', LAUNCHER.read_text(), re.MULTILINE)
    return {key: value for key, value in environ.items() if key not in {*settings, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}}


def run(*command: object, settings: dict[str, str] | None = None) -> None:
    """A step that is a command: shown as it could be typed, on this terminal. Stopped with us, and waited for."""
    words = [str(word) for word in command]
    typed = shlex.join(shown(Path(word)) if Path(word).is_absolute() else word for word in words)
    print("$ " + "".join(f"{key}={shlex.quote(value)} " for key, value in (settings or {}).items()) + typed, flush=True)
    with subprocess.Popen(words, env=without_settings(dict(os.environ)) | (settings or {}), cwd=REPO) as process:
        try:
            code = process.wait()
        except BaseException:  # Ctrl-C or SIGTERM: the launcher needs a moment to stop its ranks, which nobody else would
            process.terminate()
            process.wait()
            raise
    if code != 0:
        raise UserError(f"this command failed with exit code {code}; its own message stands above: {typed}")


class Steps:
    """Headline and duration of each step."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.durations_s: list[tuple[str, float]] = []

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        print(f"\n=== {len(self.durations_s) + 1}/{self.count} {title}", flush=True)
        started = time.monotonic()
        yield
        self.durations_s.append((title, time.monotonic() - started))


def demo(output: Path, num_steps: int, min_drop: float) -> None:
    print(
        "demo: text -> tokenizer and tiny GPT-J -> layer files -> 4 training processes (2 stages x 2 replicas) -> Hugging Face -> samples\n"
        f"demo: downloads nothing; writes about 40 MB to {shown(output)}, uses about 2 GB of memory, takes 2 to 4 minutes on 2 cores",
        flush=True,
    )
    fresh_folder(output)
    data, hf_start, checkpoints, hf_end = (output / name for name in ("data", "tiny-gptj", "checkpoints", "hf"))
    data.mkdir()
    steps = Steps(count=6)

    with steps.step("Corpus from Python's own library"):
        corpus = demo_corpus.write_corpus(data)
        for path, (num_records, num_bytes) in corpus.items():
            print(f"{shown(path)}: {num_records} records, {num_bytes / 1e6:.1f} MB")
            if num_bytes < 100_000:
                raise UserError(f"{sys.base_prefix} holds only {num_bytes} bytes of text: this Python lacks its library's .py files.")

    with steps.step("Tokenizer and a random GPT-J"):
        num_ids = demo_model.train_tokenizer(list(corpus), hf_start)
        num_parameters = demo_model.make_model(hf_start, num_ids=num_ids)
        print(f"{shown(hf_start)}: {num_ids} token ids, {num_parameters / 1e6:.1f} million parameters")

    with steps.step("Hugging Face -> one file per layer"):
        run(sys.executable, REPO / "convert_from_hf_gptj.py", "--model-name", hf_start, "--save-dir", output / "pretrained")

    with steps.step(f"Training, {num_steps} steps on 4 processes"):
        sources, documents = corpus
        settings = {
            "MODEL": shown(output / "pretrained" / hf_start.name),
            "TASKS": f"{shown(sources)}:0.7,{shown(documents)}:0.3",
            "OUT": shown(checkpoints),
            "PORT": str(free_port()),
            "TOTAL_STEPS": str(num_steps),
            "PYTHON": shown(Path(sys.executable)),
            **SETTINGS,
        }
        run(LAUNCHER, settings=settings)

    with steps.step("Checkpoint -> Hugging Face"):
        checkpoint = last_step(checkpoints)
        run(sys.executable, REPO / "convert_to_hf_gptj.py", "--ckpt-path", checkpoint, "--save-path", hf_end)

    with steps.step("Samples from transformers.pipeline"):
        for sample in demo_model.generate(hf_end, PROMPTS):
            print("---\n" + re.sub(r"\n\s*\n", "\n", sample))  # a model this small likes empty lines

    first, last = loss_drop(checkpoints / "train_log.jsonl", min_drop)
    report(steps, output, checkpoint, hf_end, first, last)


def report(steps: Steps, output: Path, checkpoint: Path, hf_end: Path, first: float, last: float) -> None:
    size_mb = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e6
    drop = f"{first:.3f} -> {last:.3f} nat per token, {first - last:.2f} lower (first step, mean of the last {NUM_LAST_ROWS})"
    print(f"\n=== Done: loss {drop}\n\nWhat was made ({size_mb:.0f} MB):")
    for path, meaning in (
        (output / "data", "two tasks of {text} records"),
        (output / "tiny-gptj", "the random start, Hugging Face format"),
        (output / "pretrained" / "tiny-gptj", "the same, one file per layer"),
        (checkpoint, "the trained checkpoint"),
        (checkpoint.parent / "train_log.jsonl", "one line per step"),
        (hf_end, "the trained model, Hugging Face format"),
    ):
        print(f"  {shown(path):40} {meaning}")
    print("\nHow long it took:")
    for title, duration_s in steps.durations_s:
        print(f"  {duration_s:6.1f} s  {title}")
    print(
        "\nNext, your own model and data (GPT-J 6B: 24 GB to download, as much again on disk; in fp32, 97 GB\n"
        "of GPU memory over the stages of one replica; by default 2 stages x 2 replicas):\n"
        "  .venv/bin/python convert_from_hf_gptj.py --model-name EleutherAI/gpt-j-6b --save-dir pretrained_models\n"
        "  MODEL=pretrained_models/EleutherAI_gpt-j-6b TASKS=my_texts.jsonl OUT=model_checkpoints/mine example_scripts/finetune_gptj.sh\n"
        "  .venv/bin/python convert_to_hf_gptj.py --ckpt-path model_checkpoints/mine/2000 --save-path my-gptj\n"
        'my_texts.jsonl holds one {"text": "..."} per line; example_scripts/finetune_gptj.sh --help lists every setting.'
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="The whole chain at toy size: corpus, model, training on 4 processes, export, samples.")
    parser.add_argument("--output", type=Path, default=REPO / "demo_output", help="folder for everything it makes (default: demo_output)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: 300)")
    parser.add_argument("--min-drop", type=float, default=1.0, help="nat by which the loss has to fall, else the demo fails (default: 1.0)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Everything is local; a look-up on the hub would only be a wait where there is no network.
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    try:
        demo(options.output.resolve(), options.steps, options.min_drop)
    except UserError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
