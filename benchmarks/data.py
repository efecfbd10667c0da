"""What the data chain costs: against the tokenizer alone, in memory over a million sequences, and when a run resumes.

    python benchmarks/data.py --tokenizer FOLDER --data mnli=rows.jsonl --json out.json

(1) Tokens per core-second of the whole chain, from the file to packed sequences, on one thread, against the tokenizers library's own
    encode_batch_fast on the same texts, in runs that take turns; with prompts masked, for which those are tokenised too, against the
    library on texts and prompts.
(2) Growth of the resident memory from 10,000 sequences to --sequences of them.
(3) Seconds until the first sequence after a resume in the middle of a pass, for a plain and for a compressed file.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import zstandard
from bench import machine, spread, turning

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread, as the reader of a training has
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tasks.encoding import Encoder, LossOn
from tasks.examples import Example
from tasks.mixture import Mixture, OpenDocuments
from tasks.packing import PackingRules
from tasks.prompts import TaskOptions, tasks_by_name
from tasks.readers import open_documents
from tasks.task_list import parse_task_list


class Tokens:
    """A tokenizer as the trainer uses it."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.backend.no_truncation()
        self.backend.no_padding()

    def encoder(self, loss_on: LossOn = "all") -> Encoder:
        return Encoder(
            token_ids=lambda texts: [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)],
            decode=self.backend.decode,
            eos_token_id=0,
            loss_on=loss_on,
        )


def opener(seed: int = 0) -> OpenDocuments:
    tasks = tasks_by_name(TaskOptions())
    return lambda spec, place: open_documents(spec, tasks, seed=seed, place=place)


def mixture_of(source: str, encoder: Encoder, **rules: Any) -> Mixture:
    return Mixture(tasks=parse_task_list(source), open_documents=opener(), encoder=encoder, rules=PackingRules(**rules), seed=0, state=None)


def examples_of(source: str) -> list[Example]:
    """The documents of one pass, in the order of the chain's."""
    documents = opener()(parse_task_list(source)[0], 0)
    examples, position = [], 0
    while (document := documents.next_good(0, position)).pass_index == 0:
        examples.append(document.example)
        position = document.position + 1
    documents.close()
    return examples


def tokens_per_second(source: str, tokens: Tokens, seq_length: int, num_rounds: int) -> dict[str, Any]:
    examples = examples_of(source)
    texts, prompts = [example.text for example in examples], [example.prompt for example in examples]

    def library(*all_texts: list[str]) -> tuple[float, int]:
        """On all of them; the tokens are those of the last."""
        started = time.thread_time()
        encodings = [tokens.backend.encode_batch_fast(of_a_kind, add_special_tokens=False) for of_a_kind in all_texts]
        seconds = time.thread_time() - started
        return seconds, sum(map(len, encodings[-1])) + len(texts)

    def chain(loss_on: LossOn, mode: Any) -> tuple[float, int]:
        mixture = mixture_of(source, tokens.encoder(loss_on), seq_length=seq_length, mode=mode)
        started = time.thread_time()
        while mixture.state()["tasks"][0]["pass"] == 0:
            for _ in range(16):
                mixture.next_sequence()
        seconds, num_tokens = time.thread_time() - started, mixture.tokens_per_task[0]
        mixture.close()
        return seconds, num_tokens

    contestants = {
        "library": lambda: library(texts),
        "library, prompts too": lambda: library(prompts, texts),
        "documents": lambda: chain("all", "documents"),
        "concat": lambda: chain("all", "concat"),
        "documents, loss on completion": lambda: chain("completion", "documents"),
    }
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for n in range(num_rounds):
        for name in turning(list(contestants), n):
            seconds, num_tokens = contestants[name]()
            speeds[name].append(num_tokens / seconds)
    shares = {
        name: spread(
            ours / theirs
            for ours, theirs in zip(speeds[name], speeds["library, prompts too" if "completion" in name else "library"], strict=True)
        )
        for name in contestants
        if not name.startswith("library")
    }
    return {"texts": len(texts), "tokens_per_core_second": {name: spread(found) for name, found in speeds.items()}, "share": shares}


def synthetic(folder: Path, num_records: int) -> tuple[Path, Path]:
    """A plain and a compressed file of the same records."""
    plain, packed = folder / "a.jsonl", folder / "b.jsonl.zst"
    with plain.open("w") as file, zstandard.open(packed, "wt") as other:
        for n in range(num_records):
            line = json.dumps({"text": f"{n:07d} " + "word " * (10 + n % 50)}) + "\n"
            file.write(line)
            other.write(line)
    return plain, packed


def memory(folder: Path, num_sequences: int) -> dict[str, Any]:
    """Sequences of 32 bytes' ids, half of them from either file."""
    import psutil

    plain, packed = synthetic(folder, 20_000)
    encoder = Encoder(token_ids=lambda texts: [list(text.encode()) for text in texts], decode=str, eos_token_id=256)
    mixture = mixture_of(f"{plain},{packed}", encoder, seq_length=32)
    rss = {}
    for number in range(1, num_sequences + 1):
        mixture.next_sequence()
        if number in (10_000, num_sequences):
            rss[number] = psutil.Process().memory_info().rss
    state = mixture.state()
    mixture.close()
    growth = rss[num_sequences] - rss.get(10_000, rss[num_sequences])
    return {"sequences": num_sequences, "growth_bytes": growth, "state_bytes": len(json.dumps(state))}


def resume(folder: Path, num_records: int, tokens: Tokens) -> dict[str, Any]:
    """Half of a pass away from its beginning."""
    found = {}
    for path in synthetic(folder, num_records):
        state = None
        for kind in ("first sequence of a fresh run", "first sequence of a resumed run"):
            started = time.perf_counter()
            mixture = mixture_of(str(path), tokens.encoder(), seq_length=1024)
            opened = time.perf_counter()
            if kind.endswith("resumed run"):
                mixture.go_to(state)
            mixture.next_sequence()
            found[f"{path.name}: {kind}"] = {"open_s": opened - started, "then_s": time.perf_counter() - opened}
            state = mixture.state()
            state["tasks"][0] |= {"position": num_records // 2, "token_offset": 0}
            mixture.close()
    return {"records": num_records, "seconds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", required=True, help="an item of --task-name")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=10**6)
    parser.add_argument("--records", type=int, default=10**6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokens, report = Tokens(options.tokenizer), {"machine": machine()}
    report["chain"] = tokens_per_second(options.data, tokens, options.seq_length, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        report["memory"] = memory(Path(folder), options.sequences)
        report["resume"] = resume(Path(folder), options.records, tokens)
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
