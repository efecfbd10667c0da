"""An evaluation of any model folder, checkpoint or adapter: what dist_clm_eval.py and ``training.evaluate`` do.

The order is the trainer's: what one rank can check alone, then the ranks meet, then rank 0 opens tokenizer and data and refuses what cannot
be evaluated, and only then weights are loaded. Adapters are computed beside their base, as in the training, not merged into it.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from checkpoint.adapter_folder import Adapter, is_adapter_folder, read_adapter
from checkpoint.manifest import step_positions
from checkpoint.model_folder import load_weights, read_json_object, resolve_model_folder
from comms.place import place_of
from modules.families import read_model_config
from modules.quantized import quantized_parts
from modules.stage import Stage, meta_stage, stored_name
from pipeline_parallel.decode import Decoder, Generated
from tasks.evaluation_set import EvaluationSet, LabelRow, Prompt
from tasks.metrics import Counts, Verdict, confusion, import_sklearn_metrics, judge, perplexity
from tasks.packing import PackingRules, num_targets
from tasks.shots import Shots
from training.assembly import assemble_stage
from training.config import Config
from training.data import TextEncoder, load_text_encoder, open_sources
from training.evaluation_config import EvalConfig
from training.evaluation_results import Answers, EvaluationResults, check_drawable
from training.evaluator import Evaluator
from training.forward_only import ForwardOnly
from training.job import Job, all_say, meet
from training.precision import precision_of
from training.report import set_up_logging
from training.resuming import newest_in_sight
from user_error import UserError

log = logging.getLogger("trainer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Desk:
    """What rank 0 alone has."""

    encoder: TextEncoder
    records: EvaluationSet
    prompts: list[Prompt]
    label_rows: list[LabelRow]
    sequences: list[np.ndarray]


def evaluate_rank(config: EvalConfig) -> EvaluationResults:
    """One rank of an evaluation, from meeting the others to parting; its numbers alike on all ranks, its examples on rank 0. Raises
    UserError, PeerLost."""
    assert config.rank is not None and config.data_group_size is not None, "complete_eval filled these in"
    set_up_logging(f"rank{config.rank}")
    job_config, adapter = _subject(config)
    started = time.perf_counter()
    with meet(job_config) as job, ExitStack() as cleanup:
        set_up_logging(str(place_of(config.rank, dp_size=config.data_group_size, pp_size=config.num_stages)))
        job.spans.enter_phase("preparing the evaluation")
        seq_length = min(config.seq_length or job.model_config.num_positions, job.model_config.num_positions)
        desk = _open_desk(job, config, seq_length) if job.place.rank == 0 else None
        seq_length = int(all_say(job, job.store, "evaluation length", _longest(desk, seq_length))[0] or seq_length)
        job.spans.enter_phase("loading weights")
        stage = _load(job, job_config, adapter)
        job.spans.enter_phase("evaluating")
        stages = ForwardOnly(job, stage, batch_size=config.batch_size, micro_batch_size=config.micro_batch_size, seq_length=seq_length)
        cleanup.callback(stages.close)
        evaluator = Evaluator(job, stages, stages.decoder(config.batch_size), batch_size=config.batch_size)
        found = _run(config, evaluator, desk, is_rank_0=job.place.rank == 0)
        return dataclasses.replace(found, seconds=time.perf_counter() - started)
