"""What LoRA over an int8 base learns: accuracy on held-out messages of the SMS Spam Collection, frozen and adapted, for several seeds.

    python benchmarks/lora_sms_spam.py --data sms_spam.tsv > lora_sms_spam.json

A small GPT-J is trained from nothing on the unlabelled texts of the training rows (and on --text); then adapters are trained over it,
frozen in int8, on as many spam as ham messages with their label at the end. Both trainings are dist_clm_train.py as a user starts it.
What is measured is what a user of transformers and peft would load: the folder of the base, and PeftModel.from_pretrained of the
adapters' folder on top. A model's answer is the label (with the end of text behind it) that it finds likelier after the message.

The held-out rows are the same for all seeds, half of them spam, so that a constant answer is right in 50 of 100; no training sees any of
them, nor another row of the same text. A frozen model may be worse than that: it has never seen a label. What adapters gain is therefore
counted from its accuracy or from 50, whichever is more. "frozen_fitted" is no answer of a frozen model but what could be read off it:
its accuracy if the threshold between the answers, and which side of it is spam, are fitted on labelled training rows. A seed draws the
adapters, which ham messages they are trained on and in which order. Every process computes with one thread, whatever else is running."""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import machine, spread

REPOSITORY = Path(__file__).resolve().parent.parent
LABELS = ("ham", "spam")
END_OF_TEXT = "<|endoftext|>"
SEQ_LENGTH = 128
CHANCE = 50.0  # per cent of the held-out rows that a constant answer gets
ROWS_AT_ONCE = 32  # that are scored


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is done. Steps are of ``batch_size`` sequences of SEQ_LENGTH ids."""

    width: int = 256
    layers: int = 3
    vocab: int = 1536
    base_steps: int = 250
    lora_steps: int = 180
    batch_size: int = 8
    held_out_per_label: int = 200
    base_lr: float = 3e-3
    lora_lr: float = 1e-2
    lora_rank: int = 8


QUICK = Plan(width=128, layers=2, vocab=1024, base_steps=100, lora_steps=140, held_out_per_label=100)


class Row(NamedTuple):
    """A message and its label, one of LABELS."""

    label: str
    text: str

    @property
    def prompt(self) -> str:
        """What stands before the label."""
        return f"{self.text}\nlabel:"

    @property
    def document(self) -> str:
        """With the label, as adapters are trained on it."""
        return f"{self.prompt} {self.label}"


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of LABEL<tab>TEXT lines, each text once. Raises ValueError for another label."""
    rows = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        label, _, text = line.partition("\t")
        if label not in LABELS:
            raise ValueError(f"{path}:{number}: a line is LABEL<tab>TEXT with a label of {LABELS}, not {label!r}")
        rows.setdefault(text.strip(), Row(label, text.strip()))
    return list(rows.values())


def hold_out(rows: Sequence[Row], num_per_label: int) -> tuple[list[Row], list[Row]]:
    """(rows to train on, held-out rows: ``num_per_label`` of each label), the same on every call."""
    shuffled = random.Random(0).sample(rows, len(rows))
    held_out = [row for label in LABELS for row in [row for row in shuffled if row.label == label][:num_per_label]]
    taken = set(held_out)
    return [row for row in shuffled if row not in taken], held_out


def balanced(rows: Sequence[Row], seed: int) -> list[Row]:
    """All rows of the rarer label, and as many that ``seed`` draws of the other."""
    draw = random.Random(seed)
    by_label = [[row for row in rows if row.label == label] for label in LABELS]
    chosen = [row for of_label in by_label for row in draw.sample(of_label, min(map(len, by_label)))]
    return draw.sample(chosen, len(chosen))


def write_texts(path: Path, texts: Iterable[str]) -> Path:
    """One {"text": ...} record a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def make_model(folder: Path, plan: Plan, texts: Iterable[str]) -> None:
    """A GPT-J with fresh weights and a byte-level BPE learnt from ``texts``, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=plan.vocab, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT).save_pretrained(folder)
    shape = {"n_embd": plan.width, "n_layer": plan.layers, "n_head": 4, "rotary_dim": plan.width // 8, "n_positions": 4 * SEQ_LENGTH}
    torch.manual_seed(0)
    GPTJForCausalLM(GPTJConfig(**shape, vocab_size=plan.vocab, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)


def train(root: Path, **flags: Any) -> tuple[Path, dict[str, float]]:
    """dist_clm_train.py in a process of its own; (folder of its only checkpoint, first and last loss and seconds). ``root``: its
    --checkpoint-path. Raises CalledProcessError; what it said is on our stderr."""
    flags |= {
        "checkpoint_path": root,
        "seq_length": SEQ_LENGTH,
        "micro_batch_size": 4,
        "num_threads": 1,
        "warmup_proportion": 0.1,
        "weight_decay": 0,
    }
    argv = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    started = time.perf_counter()
    subprocess.run([sys.executable, str(REPOSITORY / "dist_clm_train.py"), *argv], stdout=sys.stderr, check=True)
    losses = [json.loads(line)["loss"] for line in (root / "train_log.jsonl").read_text().splitlines()]
    found = {"first_loss": losses[0], "last_loss": losses[-1], "seconds": time.perf_counter() - started}
    return root / str(flags["total_steps"]), found


def preferences(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[float]:
    """For each row log P(spam, end | prompt) - log P(ham, end | prompt)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    differences: list[float] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        scores = []
        for label in LABELS:
            documents, starts = [], []
            for row in rows[start : start + ROWS_AT_ONCE]:
                prompt, ids = tokenizer(row.prompt)["input_ids"], tokenizer(f"{row.prompt} {label}")["input_ids"]
                assert ids[: len(prompt)] == prompt, "a label begins with a token of its own"
                documents.append(torch.tensor([*ids, tokenizer.eos_token_id]))
                starts.append(len(prompt))
            padded = pad_sequence(documents, batch_first=True, padding_value=tokenizer.eos_token_id)  # (B, T); causal: nothing sees it
            with torch.inference_mode():
                log_probabilities = model(padded).logits.float().log_softmax(-1)[:, :-1]  # (B, T - 1, V), of the next id
            of_ids = log_probabilities.gather(2, padded[:, 1:, None])[..., 0]  # (B, T - 1)
            spans = zip(of_ids, starts, documents, strict=True)
            scores.append([of_row[first - 1 : len(document) - 1].sum().item() for of_row, first, document in spans])
        differences += [spam - ham for ham, spam in zip(*scores, strict=True)]
    return differences


def accuracy(differences: Sequence[float], rows: Sequence[Row], threshold: float = 0.0) -> float:
    """Per cent of ``rows`` whose label is the answer: spam above ``threshold``."""
    return 100 * statistics.mean(
        (difference > threshold) == (row.label == "spam") for difference, row in zip(differences, rows, strict=True)
    )


def fitted_accuracy(differences: Sequence[float], rows: Sequence[Row], fit_to: Sequence[float], fit_rows: Sequence[Row]) -> float:
    """The same with threshold (the median) and direction taken from ``fit_to``, those of ``fit_rows``, about half of them spam."""
    threshold = statistics.median(fit_to)
    seen = accuracy(differences, rows, threshold)
    return seen if accuracy(fit_to, fit_rows, threshold) >= CHANCE else 100 - seen


def run(plan: Plan, data: Path, texts: Sequence[Path], seeds: Sequence[int], folder: Path) -> dict[str, Any]:
    """The whole experiment; everything is written below ``folder``."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    training_rows, held_out = hold_out(read_rows(data), plan.held_out_per_label)
    messages = write_texts(folder / "messages.jsonl", (row.text for row in training_rows))
    make_model(folder / "fresh", plan, [row.text for row in training_rows])
    common = {"batch_size": plan.batch_size, "device": "cpu"}
    tasks = ",".join(map(str, [messages, *texts]))
    base, base_report = train(
        folder / "base", model_name=folder / "fresh", task_name=tasks, total_steps=plan.base_steps, lr=plan.base_lr, **common
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    frozen = AutoModelForCausalLM.from_pretrained(base)  # in evaluation mode, as peft's too
    fit_rows = balanced(training_rows, seed=0)[: len(held_out)]
    of_frozen = preferences(frozen, tokenizer, held_out)
    report: dict[str, Any] = {
        "num_parameters": frozen.num_parameters(),
        "training_rows": len(training_rows),
        "held_out_rows": len(held_out),
        "base": base_report,
        "frozen": accuracy(of_frozen, held_out),
        "frozen_fitted": fitted_accuracy(of_frozen, held_out, preferences(frozen, tokenizer, fit_rows), fit_rows),
        "adapted": {},
    }
    for seed in seeds:
        task = write_texts(folder / f"labelled{seed}.jsonl", (row.document for row in balanced(training_rows, seed)))
        adapter, found = train(
            folder / f"adapters{seed}",
            model_name=base,
            task_name=task,
            total_steps=plan.lora_steps,
            lr=plan.lora_lr,
            train="lora",
            lora_rank=plan.lora_rank,
            base_quantization="int8",
            seed=seed,
            **common,
        )
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        report["adapted"][seed] = {"accuracy": accuracy(preferences(model, tokenizer, held_out), held_out), **found}
    bar = max(report["frozen"], CHANCE)
    report["points_above_frozen_or_chance"] = spread(found["accuracy"] - bar for found in report["adapted"].values())
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the collection: lines of LABEL<tab>TEXT")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="jsonl files that the base model is trained on besides")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--quick", action="store_true", help="a smaller model and the first seed alone")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    plan, seeds = (QUICK, options.seeds[:1]) if options.quick else (Plan(), options.seeds)
    before, started = machine(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = run(plan, options.data, options.text, seeds, Path(folder))
    report = {"benchmark": "lora_sms_spam", "plan": vars(plan), **before, **found, "seconds": time.perf_counter() - started}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
