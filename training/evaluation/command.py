"""An evaluation of any model folder, checkpoint or adapter: what dist_clm_eval.py and ``training.evaluate`` do.

The order is the trainer's: what one rank can check alone, then the ranks meet, then rank 0 opens tokenizer and data and refuses what cannot
be evaluated, and only then weights are loaded. Adapters are computed beside their base, as in the training, not merged into it.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint.adapter_folder import ADAPTER_CONFIG, Adapter, is_adapter_folder, read_adapter
from checkpoint.manifest import step_positions
from checkpoint.model_folder import load_weights, read_json_object, resolve_model_folder
from comms.place import place_of
from comms.spans import Spans
from modules.families import read_model_config
from modules.lm_ops import IGNORED_TARGET
from modules.stage import Stage, stored_name
from pipeline_parallel.decode import Generated
from tasks.evaluation_set import EvaluationSet, LabelRow, Prompt
from tasks.examples import Example
from tasks.metrics import Confusion, Counts, Verdict, confusion, import_sklearn_metrics, perplexity
from tasks.packing import PackingRules
from tasks.readers import ReadingRules
from tasks.shots import Shots
from training.checkpoints.discovery import newest_in_sight
from training.compute.build import WeightTaker, assemble_stage
from training.compute.evaluator import Evaluator
from training.compute.forward_only import ForwardOnly
from training.config.evaluation import EvalConfig
from training.config.precision import precision_of
from training.config.train import Config
from training.data.sources import TextEncoder, load_text_encoder, sources_of
from training.evaluation.results import Answers, EvaluationResults, about, check_drawable, check_writable, judged_rows
from training.job.job import Job, all_say
from training.job.report import set_up_logging
from training.layout.summary import describe_threads
from training.membership.meeting import Meetings
from training.memory.fitting import check_evaluation_fits
from user_error import UserError

log = logging.getLogger("trainer")

PROMPT_BATCHES = 16  # batches of prompts that are generated from in the order of their lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Desk:
    """What rank 0 alone has. length: of the sequences that go through the stages."""

    encoder: TextEncoder
    records: EvaluationSet
    prompts: list[Prompt]
    label_rows: list[LabelRow]
    length: int


def evaluate_rank(config: EvalConfig) -> EvaluationResults | None:
    """One rank of an evaluation, from meeting the others to parting: what was found, on rank 0. Raises UserError, PeerLost."""
    assert config.rank is not None and config.data_group_size is not None, "complete_eval filled these in"
    set_up_logging(f"rank{config.rank}")
    started = time.perf_counter()
    job_config, adapter = _subject(config)
    with Meetings(job_config, goes_on=False).meet() as job, ExitStack() as cleanup:
        set_up_logging(str(place_of(config.rank, dp_size=config.data_group_size, pp_size=config.num_stages)))
        job.spans.enter_phase("preparing the evaluation")
        if job.place.rank == 0 and job.device.type == "cpu":
            log.info("rank 0 on %s, %s", job.device, describe_threads(config, job))
        check_evaluation_fits(job, job_config)
        desk = _open_desk(job, config) if job.place.rank == 0 else None
        length = int(all_say(job, job.store, "evaluation length", None if desk is None else desk.length)[0])
        job.spans.enter_phase("loading weights")
        stage = _load(job, job_config, adapter)
        job.spans.enter_phase("evaluating")
        stages = ForwardOnly(job, stage, batch_size=config.batch_size, micro_batch_size=config.micro_batch_size, seq_length=length)
        cleanup.callback(stages.close)
        decoder = stages.decoder(config.batch_size) if "accuracy" in config.metrics else None
        evaluator = Evaluator(job, stages, decoder, batch_size=config.batch_size)
        found = _Run(config, evaluator, desk, job.spans).results()
    if found is None:
        return None
    return dataclasses.replace(found, model=str(config.model_name), seconds=time.perf_counter() - started)


def _subject(config: EvalConfig) -> tuple[Config, Adapter | None]:
    """What --model-name means: a model; an adapter, and with it the model it says it belongs to; or the newest step of a training."""
    assert config.model_name is not None, "complete_eval requires it"
    job_config = config.for_job()
    folder = Path(config.model_name).expanduser()
    steps = newest_in_sight([step_positions(folder)])
    if steps and not (folder / "config.json").exists():
        log.info("%s is a training; its newest step, %s, is evaluated", folder, steps[0])
        folder = folder / steps[0]
        job_config = dataclasses.replace(job_config, model_name=str(folder))
    if not is_adapter_folder(folder):
        return job_config, None
    base = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"an adapter must say to which model it belongs (base_model_name_or_path); {folder} does not. Merge it first")
    model_config = read_model_config(read_json_object(resolve_model_folder(base, weights=False) / "config.json"))
    adapter = read_adapter(folder, model_config)
    log.info("%s is an adapter of %s", folder, base)
    trained: dict[str, Any] = {"train": "layernorm"}
    if adapter.lora is not None:
        targets = ",".join(adapter.lora.target_modules)
        alpha = adapter.scaling * adapter.lora.rank
        trained = {"train": "lora", "lora_rank": adapter.lora.rank, "lora_alpha": alpha, "lora_target_modules": targets}
    return dataclasses.replace(job_config, model_name=base, **trained), adapter


def _open_desk(job: Job, config: EvalConfig) -> _Desk:
    """On rank 0, before any weight is read. Raises UserError for data that cannot be evaluated as asked, and packages that are missing."""
    assert config.evaluation_data is not None, "complete_eval requires it on rank 0"
    check_writable(config.json, config.output, config.confusion_png)
    if config.confusion_png is not None:
        check_drawable()
    num_positions = job.model_config.num_positions
    if config.seq_length is not None and config.seq_length > num_positions:
        raise UserError(
            f"--seq-length must not exceed the model's positions; it is {config.seq_length}, config.json says {num_positions}. "
            "Use that or less"
        )
    encoder = load_text_encoder(config, job.model.path, job.model_config.vocab_size, loss_on=config.loss_on)
    rules = ReadingRules(on_bad_record=config.on_bad_record, max_samples=config.max_eval_samples)
    with sources_of(config, config.evaluation_data, rules, job.spans).opened() as documents:
        records = EvaluationSet(documents)
    if config.num_shots:
        shots = Shots(_pool(config, records, job.spans), num_shots=config.num_shots, seed=config.seed, balanced=config.balance_shots)
        records = records.prepared(shots.in_front_of)
    if {"accuracy", "labels"} & set(config.metrics) and records.labels is not None:
        import_sklearn_metrics()
    length = config.seq_length or num_positions
    prompts = records.prompts(encoder.encoder, max_length=length - config.max_new_tokens) if "accuracy" in config.metrics else []
    rows = records.label_rows(encoder.encoder, max_length=length) if "labels" in config.metrics else []
    if "perplexity" not in config.metrics:
        length = rows[0].length if rows else config.micro_batch_size + 1
    return _Desk(encoder=encoder, records=records, prompts=prompts, label_rows=rows, length=length)


def _pool(config: EvalConfig, records: EvaluationSet, spans: Spans) -> list[Example]:
    """The examples that few-shot prompts show."""
    if config.shots_from is None:
        return [example.example for example in records.examples]
    with sources_of(config, config.shots_from, ReadingRules(on_bad_record=config.on_bad_record), spans).opened() as sources:
        return [document.example for documents in sources for document in documents.in_order()]


def _load(job: Job, config: Config, adapter: Adapter | None) -> Stage:
    stage = assemble_stage(config, job.model_config, job.cut[job.place.pp], job.device, precision_of(config, job.device))
    taker = WeightTaker(stage, None)
    with job.spans.part("loading weights", job.model.num_bytes(taker.shapes), "bytes") as part:
        load_weights(job.model, taker.shapes, taker.take, part.add)
    if adapter is not None:
        with torch.no_grad():
            for name, parameter in stage.named_parameters():
                if stored_name(name) in adapter.weights:
                    parameter.copy_(adapter.read(stored_name(name)))
    return stage.requires_grad_(False)


class _Run:
    """The metrics that were asked for, one after the other. Called by all ranks alike; ``desk`` is rank 0's."""

    def __init__(self, config: EvalConfig, evaluator: Evaluator, desk: _Desk | None, spans: Spans) -> None:
        self._config, self._evaluator, self._desk, self._spans = config, evaluator, desk, spans
        self._rows: list[dict[str, Any]] = [about(example) for example in desk.records.examples] if desk is not None else []

    def results(self) -> EvaluationResults | None:
        """On rank 0 all that was found."""
        loss = self._loss() if "perplexity" in self._config.metrics else None
        generated = self._generated() if "accuracy" in self._config.metrics else None
        likeliest = self._likeliest() if "labels" in self._config.metrics else None
        if self._desk is None:
            return None
        found = EvaluationResults(
            model="", num_examples=len(self._desk.records.examples), accuracy=generated, labels=likeliest, examples=self._rows
        )
        if loss is None:
            return found
        return dataclasses.replace(found, loss=loss[0], perplexity=perplexity(loss[0]), target_tokens=loss[1])

    def _loss(self) -> tuple[float, int]:
        rules = PackingRules(
            seq_length=self._desk.length if self._desk else 2, mode=self._config.packing, long_documents=self._config.long_documents
        )
        if self._desk is None:
            return self._evaluator.mean_loss(None)
        with self._spans.part("evaluating", len(self._desk.records.examples), "records") as part:
            return self._evaluator.mean_loss(self._desk.records.sequences(self._desk.encoder.encoder, rules, part.add))

    def _generated(self) -> Answers | None:
        desk = self._desk
        prompts = desk.prompts if desk is not None else []
        num = self._evaluator.agree(len(prompts))
        step = PROMPT_BATCHES * self._config.batch_size * (self._config.data_group_size or 1)
        found: list[Generated] = []
        most = self._config.max_new_tokens
        with self._spans.part("generating answers", self._evaluator.tokens_of(num, most), "tokens") as part:
            for start in range(0, num, step):
                asked = None if desk is None else [prompt.ids for prompt in prompts[start : start + step]]
                eos = 0 if desk is None else desk.encoder.encoder.eos_token_id
                found += self._evaluator.answers(asked, max_new_tokens=most, eos_token_id=eos, on_progress=part.add)
        if desk is None:
            return None
        for row, judged in zip(self._rows, judged_rows(prompts, found, desk.encoder.encoder), strict=True):
            row |= judged
        return self._judged([row["answer"] for row in self._rows], [row["verdict"] for row in self._rows])

    def _likeliest(self) -> Answers | None:
        desk = self._desk
        rows = desk.label_rows if desk is not None else []
        planes = None if desk is None else (_padded(row.planes, desk.length, desk.encoder.encoder.eos_token_id) for row in rows)
        with self._spans.part("comparing labels", self._evaluator.agree(len(rows)), "labels") as part:
            losses = self._evaluator.losses(planes, on_progress=part.add).tolist()
        if desk is None:
            return None
        answers, verdicts = [], []
        by_example = itertools.groupby(zip(rows, losses, strict=True), key=lambda pair: pair[0].example.number)
        for (_, pairs), row in zip(by_example, self._rows, strict=True):
            scored = [(label_row, -loss) for label_row, loss in pairs]
            best = max(scored, key=lambda pair: pair[1])[0]
            answers.append(best.example.task.answer(best.label))
            verdicts.append(best.example.judge(answers[-1]))
            row |= {"label_log_likelihoods": {label_row.label: value for label_row, value in scored}}
            row |= {"likeliest": best.label, "label_verdict": verdicts[-1]}
        return self._judged(answers, verdicts)

    def _judged(self, answers: Sequence[str], verdicts: Sequence[Verdict]) -> Answers:
        assert self._desk is not None, "on rank 0"
        records = self._desk.records
        found: Confusion | None = None
        if records.labels is not None:
            found = confusion([example.expected for example in records.examples], answers, records.labels)
        return Answers(counts=Counts.of(verdicts), confusion=found)


def _padded(planes: np.ndarray, length: int, eos_token_id: int) -> np.ndarray:
    """(3, T) to (3, length): the rest is a segment of padding."""
    rest = length - planes.shape[1]
    padding = np.array([[eos_token_id], [0], [IGNORED_TARGET]], dtype=np.int32).repeat(rest, axis=1)
    padding[1] = np.arange(rest)
    return np.concatenate((planes, padding), axis=1)
