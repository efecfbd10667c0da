"""Evaluations inside the training: loss and generated answers of the running stages, on all ranks alike, without a trace in the training.

Rank 0 has the data and judges the answers; every rank gets the same few numbers, by which all decide alike whether this step is the best
so far. The steps that follow have the bits they would have had without an evaluation.
"""

import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from checkpoint.tensor_file import explained_disk_errors
from comms.spans import EVALUATING, Spans
from modules.stage import Stage
from pipeline_parallel.decode import Decoder
from tasks.encoding import Encoder
from tasks.evaluation_set import EvaluationSet, Prompt
from tasks.metrics import Counts, perplexity
from tasks.packing import PackingRules
from tasks.readers import ReadingRules
from training.checkpoints.save_options import Best
from training.compute.evaluator import Evaluator
from training.compute.forward_only import make_decoder
from training.compute.gradient import GlobalGradient
from training.config.train import Config
from training.data.sources import TextEncoder, packing_rules, sources_of
from training.evaluation.results import about, finite, judged_rows, write_examples
from training.job.job import Job, all_say

log = logging.getLogger("trainer")

LOG_FILE = "evaluation_log.jsonl"
ANSWERS_FOLDER = "evaluations"  # a file per step, as dist_clm_eval.py --output writes them


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Equal on all ranks. loss: mean of -log p (nats) over all target tokens. counts: of the answers, None where none were generated."""

    loss: float
    num_targets: int
    counts: Counts | None = None
    seconds: float
    data: str = ""  # which records, as hex digits

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def accuracy(self) -> float | None:
        return None if self.counts is None else self.counts.accuracy

    def is_better_than(self, best: Best | None) -> bool:
        """By accuracy where there is one, then by loss; an equal one is not better, so the earliest of equals stays."""
        now = self.as_best(0)
        if best is None or (now.metric, now.data) != (best.metric, best.data):  # the run goes on with others
            return math.isfinite(self.loss)
        if now.metric == "accuracy" and now.value != best.value:
            return now.value > best.value
        return now.loss < best.loss

    def as_best(self, step: int) -> Best:
        """What --keep-best stores of this evaluation of ``step``."""
        if self.accuracy is not None:
            return Best(step=step, metric="accuracy", value=self.accuracy, loss=self.loss, data=self.data)
        return Best(step=step, metric="loss", value=self.loss, loss=self.loss, data=self.data)

    def row(self, step: int) -> dict[str, Any]:
        """A line of evaluation_log.jsonl, and what Weights & Biases gets."""
        judged = {} if self.counts is None else {"accuracy": self.counts.accuracy, **asdict(self.counts)}
        own = {"loss": finite(self.loss), "perplexity": finite(self.perplexity), "target_tokens": self.num_targets}
        return {"step": step, **own, **judged, "seconds": self.seconds}

    def __str__(self) -> str:
        judged = "" if self.counts is None else f"  {self.counts}"
        numbers = f"loss {self.loss:.4f}  perplexity {self.perplexity:.4g}  ({self.num_targets:,} target tokens)"
        return f"{numbers}{judged}  in {self.seconds:.1f} s"


@dataclass(frozen=True, kw_only=True)
class ValidationData:
    """On rank 0: what is evaluated, and how it becomes tokens."""

    records: EvaluationSet
    encoder: Encoder
    rules: PackingRules


def open_validation(config: Config, encoder: TextEncoder, spans: Spans) -> ValidationData | None:
    """On rank 0: the records of --evaluation-data, None if there are none to be. Raises UserError for sources and records that are bad, or
    that cannot be judged as --evaluation-metric asks."""
    if config.evaluation_data is None:
        return None
    rules = ReadingRules(on_bad_record=config.on_bad_record, max_samples=config.max_eval_samples)
    with sources_of(config, config.evaluation_data, rules, spans).opened() as documents:
        records = EvaluationSet(documents)
    if config.evaluation_metric == "accuracy":
        records.check_answerable()
    return ValidationData(records=records, encoder=encoder.encoder, rules=packing_rules(config))


def start_validation(
    job: Job, config: Config, gradient: GlobalGradient, stage: Stage, data: ValidationData | None, root: Path
) -> "Validation | None":
    """Collective over all ranks; ``data`` is rank 0's, and None elsewhere or where nothing is to be evaluated. Raises UserError on rank
    0."""
    if not all_say(job, job.store, "evaluates", data is not None)[0]:
        return None
    decoder = None
    if config.evaluation_metric == "accuracy":
        decoder = make_decoder(job, stage, config.evaluation_batch_size or config.batch_size)
    identity = all_say(job, job.store, "what is evaluated", None if data is None else data.records.fingerprint())[0]
    return Validation(job, config, gradient, decoder, data, root, identity)


class Validation:
    """The evaluations of one run. Called by all ranks alike; ``data`` is rank 0's."""

    def __init__(
        self,
        job: Job,
        config: Config,
        gradient: GlobalGradient,
        decoder: Decoder | None,
        data: ValidationData | None,
        root: Path,
        identity: str,
    ) -> None:
        """Raises UserError on rank 0 for prompts that cannot be continued."""
        self._decoder, self._identity = decoder, identity
        self._config, self._data, self._root = config, data, root
        self._batch_size = config.evaluation_batch_size or config.batch_size
        self._spans = job.spans
        self._is_rank_0 = job.place.rank == 0
        self._num_replicas = job.place.dp_size
        self._evaluator = Evaluator(job, gradient, decoder, batch_size=self._batch_size)
        self._prompts: list[Prompt] | None = None
        self._max_new_tokens = config.evaluation_max_new_tokens
        if data is not None and config.evaluation_metric == "accuracy":
            self._prompts = data.records.prompts(data.encoder, max_length=job.model_config.num_positions - self._max_new_tokens)
            if config.evaluation_num_batch:
                del self._prompts[config.evaluation_num_batch * self._batch_size * self._num_replicas :]

    def is_due(self, before: int, step: int, *, is_last: bool) -> bool:
        """Whether to evaluate behind ``step``, the one after ``before``."""
        every = self._config.evaluation_steps
        return is_last or (every > 0 and step // every > before // every)

    def close(self) -> None:
        """No evaluation comes any more."""
        if self._decoder is not None:
            self._decoder.close()

    def run(self, step: int) -> Evaluation:
        """Evaluate the stages as they are after ``step``, and write down what came of it."""
        started = time.perf_counter()
        loss, targets = self._loss()
        counts = self._counts(step) if self._config.evaluation_metric == "accuracy" else None
        found = Evaluation(loss=loss, num_targets=targets, counts=counts, seconds=time.perf_counter() - started, data=self._identity)
        if self._is_rank_0:
            log.info("evaluation at step %d: %s", step, found)
            with explained_disk_errors(self._root / LOG_FILE), (self._root / LOG_FILE).open("a") as file:
                file.write(json.dumps(found.row(step)) + "\n")
        return found

    def _loss(self) -> tuple[float, int]:
        if self._data is None:
            return self._evaluator.mean_loss(None)
        limit = self._config.evaluation_num_batch * self._batch_size * self._num_replicas or None
        records = self._data.records
        if limit is None:
            part = self._spans.start_part(len(records.examples), "records", EVALUATING)
            return self._evaluator.mean_loss(records.sequences(self._data.encoder, self._data.rules, part.add))
        part = self._spans.start_part(limit, "sequences", EVALUATING)
        first = islice(records.sequences(self._data.encoder, self._data.rules), limit)
        return self._evaluator.mean_loss(first, on_progress=part.add)

    def _counts(self, step: int) -> Counts:
        """Judged on rank 0, which keeps the answers; told to all."""
        asked = None if self._prompts is None else [prompt.ids for prompt in self._prompts]
        eos_token_id = 0 if self._data is None else self._data.encoder.eos_token_id
        num, most = self._evaluator.agree(0 if asked is None else len(asked)), self._max_new_tokens
        part = self._spans.start_part(self._evaluator.tokens_of(num, most), "tokens", "generating answers")
        generated = self._evaluator.answers(asked, max_new_tokens=most, eos_token_id=eos_token_id, on_progress=part.add)
        counts = Counts(right=0, wrong=0, badly_formed=0)
        if self._prompts is not None and self._data is not None:
            rows = judged_rows(self._prompts, generated, self._data.encoder)
            asked_rows = [about(prompt.example) for prompt in self._prompts]
            write_examples(self._root / ANSWERS_FOLDER / f"{step}.jsonl", (a | b for a, b in zip(asked_rows, rows, strict=True)))
            counts = Counts.of([row["verdict"] for row in rows])
        return Counts(**{name: self._evaluator.agree(value) for name, value in asdict(counts).items()})
