"""A rehearsal of real size: random weights of a public shape go through the public commands.

    python benchmarks/real_scale.py --model gpt-j-6b --parts convert,lora,resume,evaluate,back \\
        --output gptj.json

The parts, always in this order, all on this host, one process per rank, over gloo:

    memory    what python -m training.memory says, by stage
    convert   to layer files and straight back, compared
    lora      adapters over an int8 base
    full      all weights, in bf16
    resume    both of these, one step more, at --resume-stages
    evaluate  the perplexity of two documents
    back      the adapter merged, the checkpoint of a full run written out, compared

Each source is deleted once what was made of it is equal, and one checkpoint is kept. The work
folder is deleted in the end. --keep leaves it, and a later call with other parts goes on there.

Printed as a table and written to --output: seconds, resident peak of each rank beside the
prediction, bytes on the wire, tokens/s, the longest time without a line of output, and whether what
came back is what went in. --beat-gaps adds the longest times between heartbeats. --busy-cores 2
loads the machine while it trains."""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench import machine
from real_commands import (
    REPOSITORY,
    Broken,
    Ran,
    busy_cores,
    memory_table,
    predicted_memory,
    processor,
    run_ranks,
)
from real_weights import (
    MODELS,
    Comparison,
    bytes_of,
    check_disk,
    check_memory,
    compare,
    make_model,
    weights_in,
    weights_of,
)

from checkpoint.tensor_file import TensorSource
from example_scripts.demo_model import train_tokenizer
from user_error import UserError

PARTS = ("memory", "convert", "lora", "full", "resume", "evaluate", "back")
SCRIPTS = {"gptj": "gptj", "gpt_neox": "gptneox"}
LORA_TARGETS = {"gptj": "q_proj,v_proj", "gpt_neox": "query_key_value"}
MARGIN = 1 << 30
PROCESS_BYTES = 600 << 20  # Python and its libraries
SAY_EVERY_BYTES = 10**9


class Said:
    """Lines about the bytes that the script itself goes through."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done, self._said, self.began = (
            what,
            total,
            0,
            0,
            time.monotonic(),
        )

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._done - self._said >= SAY_EVERY_BYTES:
            self._said = self._done
            print(
                f"[{self._what}] {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB", flush=True
            )

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self.began


class RealScale:
    """The parts. Each leaves rows for the report, and files for the parts after it."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.config = options, folder, MODELS[options.model]
        self.kind = self.config["model_type"]
        self.num_bytes = bytes_of(self.config)
        self.layers, self.data, self.logs = (
            folder / "layers" / options.model,
            folder / "texts.jsonl",
            folder / "logs",
        )
        self.logs.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        self.tables: dict[str, str] = {}
        write_texts(self.data)

    def memory(self) -> None:
        """Needs config.json alone."""
        folder = self.folder / "config_only"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        for name, flags in {
            "lora": self.lora_flags(folder),
            "full": self.full_flags(folder),
        }.items():
            self.tables[name] = memory_table(flags)
            print(
                f"[memory] {name}, {self.options.stages} stages:\n{self.tables[name]}", flush=True
            )

    def convert(self) -> None:
        """To layers, compared with the source; and back, compared with what was drawn."""
        check_disk(self.folder, 2 * self.num_bytes + MARGIN, f"{self.options.model} twice")
        self._make_layers(compared=True)
        back = self.folder / "back"
        flags = {"ckpt_path": self.layers, "save_path": back}
        ran = run_ranks(f"convert_to_hf_{SCRIPTS[self.kind]}.py", flags, self.logs, "convert back")
        found = self._compared(weights_of(self.config, self.options.seed), back, "convert back")
        self._row("convert back", ran, compared=found)
        shutil.rmtree(back)

    def _make_layers(self, *, compared: bool) -> None:
        source = self.folder / "hf" / self.options.model
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(self.layers, ignore_errors=True)
        said = Said("make weights", self.num_bytes)
        make_model(source, self.config, self.options.seed, progress=said)
        write_tokenizer(source, self.data, self.options.tokenizer, self.config["vocab_size"])
        self.rows.append(
            {"part": "make weights", "seconds": said.seconds, "gb": self.num_bytes / 1e9}
        )
        flags = {"model_name": source, "save_dir": self.folder / "converted"}
        ran = run_ranks(f"convert_from_hf_{SCRIPTS[self.kind]}.py", flags, self.logs, "convert")
        (made,) = (self.folder / "converted").iterdir()
        self.layers.parent.mkdir(exist_ok=True)
        made.rename(self.layers)
        found = self._compared(weights_in(source), self.layers, "convert") if compared else None
        self._row("convert", ran, compared=found)
        shutil.rmtree(source)

    def lora(self) -> None:
        """--steps optimizer steps over an int8 base."""
        self._train("lora", self.lora_flags(self._layers()), self.options.stages)

    def full(self) -> None:
        """--steps optimizer steps of all weights."""
        check_disk(
            self.folder,
            8 * self.num_bytes + MARGIN,
            "two checkpoints with their optimizer, for a moment,",
        )
        self._train("full", self.full_flags(self._layers()), self.options.stages)

    def resume(self) -> None:
        """One step more of every training that is there, at another number of stages."""
        stages = self.options.resume_stages
        more = {"total_steps": self.options.steps + 1, "pipeline_group_size": stages}
        for name, flags in {"lora": self.lora_flags, "full": self.full_flags}.items():
            if (self.folder / name).exists():
                self._train(name, {**flags(self._layers()), **more}, stages, part=f"resume {name}")

    def evaluate(self) -> None:
        """The perplexity of two documents, by the adapter over the int8 base where there is one."""
        name = next((name for name in ("lora", "full") if (self.folder / name).exists()), None)
        flags = {
            "model_name": self._newest(name) if name else self._layers(),
            "evaluation_data": self.data,
            "max_eval_samples": 2,
            "long_documents": "truncate",
            "seq_length": self.options.seq_length,
            "bf16": "true",
            "device": "cpu",
            "pipeline_group_size": self.options.stages,
            "json": self.folder / "evaluation.json",
            **({"base_quantization": "int8"} if name == "lora" else {}),
        }
        how = {"num_ranks": self.options.stages, "beat_gaps": self.options.beat_gaps}
        ran = run_ranks("dist_clm_eval.py", flags, self.logs, "evaluate", **how)
        self._row(
            "evaluate", ran, results=json.loads((self.folder / "evaluation.json").read_text())
        )

    def back(self) -> None:
        """Plain Hugging Face folders of what was trained."""
        check_disk(self.folder, self.num_bytes + MARGIN, "the model that comes back")
        target = self.folder / "back"
        for name in ("lora", "full"):
            if not (self.folder / name).exists():
                continue
            newest = self._newest(name)
            merging = (
                {"ckpt_path": self._layers(), "merge_adapter": newest}
                if name == "lora"
                else {"ckpt_path": newest}
            )
            flags = {**merging, "save_path": target}
            ran = run_ranks(
                f"convert_to_hf_{SCRIPTS[self.kind]}.py", flags, self.logs, f"back {name}"
            )
            expected = (
                weights_of(self.config, self.options.seed) if name == "lora" else weights_in(newest)
            )
            found = self._compared(
                expected, target, f"back {name}", adapter=newest if name == "lora" else None
            )
            self._row(f"back {name}", ran, compared=found)
            shutil.rmtree(target)

    def lora_flags(self, model: Path) -> dict[str, Any]:
        """Of the trainer, which python -m training.memory takes too."""
        adapters = {
            "lora_rank": 8,
            "lora_alpha": 16,
            "lora_target_modules": LORA_TARGETS[self.kind],
            "lr": 1e-3,
        }
        return {
            **self._common_flags(model, "lora"),
            "train": "lora",
            "base_quantization": "int8",
            **adapters,
        }

    def full_flags(self, model: Path) -> dict[str, Any]:
        """Likewise."""
        return {
            **self._common_flags(model, "full"),
            "optimizer": self.options.optimizer,
            "lr": 1e-5,
        }

    def _common_flags(self, model: Path, name: str) -> dict[str, Any]:
        return {
            "model_name": model,
            "task_name": self.data,
            "checkpoint_path": self.folder / name,
            "keep_checkpoints": 1,
            "total_steps": self.options.steps,
            "lr_schedule": "constant",
            "bf16": "true",
            "recompute": "layer",
            "seq_length": self.options.seq_length,
            "batch_size": self.options.batch_size,
            "micro_batch_size": 1,
            "pipeline_group_size": self.options.stages,
            "dp_backend": "gloo",
            "device": "cpu",
        }

    def _layers(self) -> Path:
        if not self.layers.exists():
            check_disk(self.folder, 2 * self.num_bytes + MARGIN, f"{self.options.model} twice")
            self._make_layers(compared=False)
        return self.layers

    def _newest(self, name: str) -> Path:
        steps = [path for path in (self.folder / name).iterdir() if path.name.isdigit()]
        return max(steps, key=lambda path: int(path.name))

    def _train(
        self, name: str, flags: Mapping[str, Any], stages: int, *, part: str | None = None
    ) -> None:
        part = part or name
        predicted = predicted_memory(flags)
        check_memory(
            sum(predicted) + stages * PROCESS_BYTES, f"the part {part} with {stages} stages"
        )
        log = self.folder / name / "train_log.jsonl"
        before = len(log.read_text().splitlines()) if log.exists() else 0
        with busy_cores(self.options.busy_cores):
            how = {"num_ranks": stages, "beat_gaps": self.options.beat_gaps}
            ran = run_ranks("dist_clm_train.py", flags, self.logs, part, **how)
        steps = [json.loads(line) for line in log.read_text().splitlines()[before:]]
        kept = sum(file.stat().st_size for file in self._newest(name).rglob("*") if file.is_file())
        self._row(part, ran, predicted=predicted, steps=steps, checkpoint_gb=kept / 1e9)

    def _compared(
        self,
        expected: Mapping[str, TensorSource],
        folder: Path,
        part: str,
        *,
        adapter: Path | None = None,
    ) -> Comparison:
        said = Said(f"{part}: compare", self.num_bytes)
        found = compare(expected, weights_in(folder), adapter=adapter, progress=said)
        print(f"[{part}] compared in {said.seconds:.0f} s: {found.in_words}", flush=True)
        if found.differing:
            raise Broken(f"{part}: what came back is not what went in: {found.in_words}")
        return found

    def _row(self, part: str, ran: Ran, *, compared: Comparison | None = None, **more: Any) -> None:
        words = {"compared": compared.in_words} if compared else {}
        self.rows.append({"part": part, **asdict(ran), **words, **more})


def write_texts(file: Path) -> None:
    """The project's own pages, a paragraph each."""
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    texts = [
        text
        for page in pages
        for text in page.read_text(encoding="utf-8").split("\n## ")
        if len(text) > 2000
    ]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def write_tokenizer(folder: Path, data: Path, source: Path | None, vocab: int) -> None:
    """Copies of the files of ``source``, else of one that is trained here."""
    if source is None:
        train_tokenizer([data], folder, vocab_size=min(2048, vocab))
        return
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """What the JSON says, at a glance."""
    lines = [("part", "s", "peak GB", "predicted", "MB sent", "tokens/s", "silent s", "result")]
    for row in rows:
        steps = row.get("steps", [])
        lines.append(
            (
                row["part"],
                f"{row['seconds']:.0f}",
                " ".join(f"{peak / 1e9:.2f}" for peak in row.get("peaks", [])),
                " ".join(f"{num / 1e9:.2f}" for num in row.get("predicted", [])),
                f"{sum(step['wire_bytes'] for step in steps) / 1e6:.1f}" if steps else "",
                " ".join(f"{step['tokens_per_s']:.1f}" for step in steps),
                f"{max((silence['s'] for silence in row.get('silences', [])), default=0):.1f}",
                row.get("compared") or " ".join(f"loss {step['loss']:.3f}" for step in steps),
            )
        )
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument(
        "--parts", default="memory,convert", help=f"with commas, of {', '.join(PARTS)}"
    )
    parser.add_argument("--output", type=Path, default=Path("real_scale.json"))
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "real_scale",
        help="for everything on disk",
    )
    parser.add_argument("--keep", action="store_true", help="leave the folder there")
    parser.add_argument(
        "--tokenizer", type=Path, help="a folder with its files; left out: a small one is trained"
    )
    parser.add_argument(
        "--optimizer", choices=("adam", "8bit-adam"), default="adam", help="of the part full"
    )
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--resume-stages", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, default=2, help="before the resume, which takes one more"
    )
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2, help="in micro-batches of 1")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--beat-gaps", action="store_true", help="measure the times between heartbeats"
    )
    parser.add_argument(
        "--busy-cores", type=int, default=0, help="processes that load the machine while it trains"
    )
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"--parts takes {', '.join(PARTS)}; not {', '.join(sorted(unknown))}")
    return options


def run_parts(real: RealScale, write: Callable[[str], None]) -> str:
    """In order. Returns what went wrong, ''  for nothing; ``write`` is called after each part."""
    for part in PARTS:
        if part in real.options.parts:
            print(f"[{part}] {real.options.model}, load {os.getloadavg()[0]:.1f}", flush=True)
            try:
                getattr(real, part)()
            except (Broken, UserError) as error:
                return f"{part}: {error}"
            finally:
                write("")
    return ""


def main() -> int:
    """The exit status: 0 if every command ended with 0 and everything came back as it went in."""
    options = parse()
    torch.set_num_threads(1)  # comparing: threads that wait for each other lose on a busy machine
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # ends the ranks, too
    folder = options.folder / options.model
    folder.mkdir(parents=True, exist_ok=True)
    before = {**machine(), "processor": processor()}
    real = RealScale(options, folder)

    def write(error: str) -> None:
        asked = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
        }
        report = {
            "benchmark": "real_scale",
            "options": asked,
            "machine": {**before, "load_after": os.getloadavg()[0]},
        }
        report |= {"error": error, "rows": real.rows, "memory": real.tables}
        options.output.write_text(json.dumps(report, indent=1, default=str))

    error = run_parts(real, write)
    write(error)
    print(table(real.rows))
    if error:
        print(f"error: {error}", file=sys.stderr)
    if not options.keep:
        shutil.rmtree(folder)
    return 1 if error else 0


if __name__ == "__main__":
    sys.exit(main())
