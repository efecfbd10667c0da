"""From a raw table to an accuracy: a small GPT-J learns to classify, and four ways of asking it for its answers agree.

    python benchmarks/classification.py --data sms_spam.tsv > classification.json

For every seed a GPT-J of a few million parameters is trained from nothing by dist_clm_train.py, on rows of the SMS Spam Collection as task
``classification`` (--loss-on completion, --balance-labels, two stages), and asked about held-out rows, half of them spam, so that a
constant answer is right in 50 of 100. The last evaluation inside the training, dist_clm_eval.py with one stage and with two, and
transformers' own generate() on the exported folder must give the same answer to every single row; where they do not, the difference of
the two best logits says how close it was. No held-out text is trained on."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine, spread
from lora_sms_spam import CHANCE, Plan, Row, hold_out, make_model, read_rows

REPOSITORY = Path(__file__).resolve().parent.parent
MAX_NEW_TOKENS = 4
SEQ_LENGTH = 96


def write_table(path: Path, rows: Sequence[Row]) -> Path:
    """LABEL<tab>TEXT, without a header, as the data comes."""
    path.write_text("".join(f"{row.label}\t{row.text}\n" for row in rows), encoding="utf-8")
    return path


def run_script(name: str, stages: int, **flags: Any) -> None:
    """One of the house's scripts as a user starts it, one process per stage."""
    argv = [part for key, value in flags.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    launcher = [sys.executable]
    if stages > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(stages)]
    command = [*launcher, name, *argv, "--pipeline-group-size", str(stages), "--num-threads", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The rows of --output, or of an evaluation inside the training."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def generate(folder: Path, prompts: Sequence[str]) -> list[str]:
    """What transformers alone makes of an exported folder, in batches padded to the left."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    answers = []
    for start in range(0, len(prompts), 32):
        asked = tokenizer(list(prompts[start : start + 32]), return_tensors="pt", padding=True)
        made = model.generate(**asked, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        for ids in made[:, asked["input_ids"].shape[1] :].tolist():
            ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
            answers.append(tokenizer.decode(ids))
    return answers


def one_seed(seed: int, rows: Sequence[Row], held: Sequence[Row], plan: Plan, steps: int, folder: Path) -> dict[str, Any]:
    """Train, ask in four ways, compare."""
    base, run = folder / "base", folder / "run"
    make_model(base, plan, [row.text for row in rows])
    common: dict[str, Any] = {"text_column": 2, "label_column": 1, "classification_prompt": "raw", "micro_batch_size": 8, "seed": seed}
    held_table = f"classification={write_table(folder / 'held.tsv', held)}"
    run_script(
        "dist_clm_train.py",
        2,
        **common,
        model_name=base,
        load_pretrained_model="false",
        task_name=f"classification={write_table(folder / 'train.tsv', rows)}",
        balance_labels="true",
        loss_on="completion",
        packing="none",
        long_documents="truncate",
        seq_length=SEQ_LENGTH,
        batch_size=32,
        total_steps=steps,
        lr=1e-3,
        warmup_steps=steps // 10,
        checkpoint_path=run,
        evaluation_data=held_table,
        evaluation_metric="accuracy",
        evaluation_steps=steps // 4,
        evaluation_max_new_tokens=MAX_NEW_TOKENS,
    )
    ways = {"in training": read_answers(run / "evaluations" / f"{steps}.jsonl")}
    for stages in (1, 2):
        output = folder / f"asked{stages}.jsonl"
        asked = {"model_name": run / str(steps), "evaluation_data": held_table, "metric": "accuracy", "max_new_tokens": MAX_NEW_TOKENS}
        run_script("dist_clm_eval.py", stages, **common, **asked, batch_size=32, seq_length=SEQ_LENGTH, output=output)
        ways[f"dist_clm_eval.py, {stages} stage(s)"] = read_answers(output)
    first = ways["in training"]
    texts = {name: [row["generated"] for row in answers] for name, answers in ways.items()}
    texts["transformers"] = generate(run / str(steps), [row["prompt"] for row in first])
    differing = {
        name: [
            {"row": number, "margin": first[number]["margin"]}
            for number, pair in enumerate(zip(found, texts["in training"], strict=True))
            if pair[0] != pair[1]
        ]
        for name, found in texts.items()
    }
    curve = [json.loads(line) for line in (run / "evaluation_log.jsonl").read_text().splitlines()]
    return {
        "seed": seed,
        "accuracy": 100 * sum(row["verdict"] == "right" for row in first) / len(first),
        "badly_formed": sum(row["verdict"] == "badly formed" for row in first),
        "answers_that_differ": differing,
        "smallest_margin": min(row["margin"] for row in first),
        "accuracy_by_step": {row["step"]: 100 * row["accuracy"] for row in curve},
    }


def main() -> None:
    """Print everything as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a file of LABEL<tab>TEXT lines")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of 32 rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    plan = Plan(width=192, layers=4, vocab=1536, held_out_per_label=150)
    rows, held = hold_out(read_rows(options.data), plan.held_out_per_label)
    found = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found.append(one_seed(seed, rows, held, plan, options.steps, Path(folder)))
            print(f"seed {seed}: {found[-1]['accuracy']:.1f} %", file=sys.stderr)
    gains = [one["accuracy"] - CHANCE for one in found]
    print(
        json.dumps(
            {"machine": machine(), "held_out": len(held), "constant_answer": CHANCE, "gain_points": spread(gains), "seeds": found}, indent=2
        )
    )


if __name__ == "__main__":
    main()
