"""--num-train-epochs: how many steps it takes to pass over the data so many times.

The answer is counted, not guessed: rank 0 runs through one pass of every task as the training will, tokenises it, and adds up what the
packing makes of it. Tasks of a mixture are passed at the pace of their weights, so the run is as long as the slowest of them needs; the
others are passed more often. All ranks are told the one number, which depends on data, tokenizer and flags alone.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import torch.distributed as dist

from tasks.encoded_documents import EncodedDocuments
from tasks.encoding import Encoder
from tasks.mixture import OpenDocuments, draw_task
from tasks.packing import PackingRules, sequences_in_pass
from tasks.task_list import TaskSpec
from training.config.train import Config
from training.data.sources import load_text_encoder, packing_rules, sequences_per_step, training_sources
from training.job.job import Job, all_say
from user_error import UserError

log = logging.getLogger("trainer")


def with_total_steps(job: Job, config: Config) -> Config:
    """Called by all ranks once the job has formed: ``config`` with --total-steps filled in where epochs were given. Raises UserError."""
    if config.num_train_epochs is None:
        return config
    steps = None
    if job.place.rank == 0:
        encoder = load_text_encoder(config, job.model.path, job.model_config.vocab_size, loss_on=config.loss_on).encoder
        sources = training_sources(config, job.spans)
        steps = count_steps(
            sources.tasks,
            sources.open_documents,
            encoder,
            packing_rules(config),
            num_epochs=config.num_train_epochs,
            seed=config.seed,
            sequences_per_step=sequences_per_step(config),
            accumulation=config.gradient_accumulate_step,
        )
    total = int(all_say(job, dist.PrefixStore("epochs", job.store), "steps", steps)[0])
    if config.warmup_steps is not None and config.warmup_steps > total:
        raise UserError(
            f"--warmup-steps must not exceed the run's steps; {config.warmup_steps} is more than the {total} of --num-train-epochs "
            f"{config.num_train_epochs:g}. Give fewer, or --warmup-proportion"
        )
    return dataclasses.replace(config, total_steps=total)


def count_steps(
    tasks: Sequence[TaskSpec],
    open_documents: OpenDocuments,
    encoder: Encoder,
    rules: PackingRules,
    *,
    num_epochs: float,
    seed: int,
    sequences_per_step: int,
    accumulation: int,
) -> int:
    """Accumulation steps until every task whose weight is not 0 was passed ``num_epochs`` times. Raises UserError for bad data."""
    needed: dict[int, int] = {}  # sequences, by place
    for place, task in enumerate(tasks):
        if not task.weight:
            continue
        started, documents = time.perf_counter(), open_documents(task, place)
        try:
            with documents.counted("counting for --num-train-epochs"):
                num = sequences_in_pass(_lengths(EncodedDocuments(documents, encoder)), rules)
        finally:
            documents.close()
        log.info("%s: one pass is %s sequences, counted in %.1f s", documents.name, f"{num:,.1f}", time.perf_counter() - started)
        needed[place] = max(1, math.ceil(round(num * num_epochs, 6)))
    total, last = _draws_until(needed, list(accumulate(task.weight for task in tasks)), seed)
    steps = max(1, -(-total // sequences_per_step)) * accumulation
    log.info("--num-train-epochs %g is --total-steps %d: %s is through last", num_epochs, steps, tasks[last].name)
    return steps


def _draws_until(needed: Mapping[int, int], cumulative_weights: Sequence[float], seed: int) -> tuple[int, int]:
    """How many sequences of the run's own draws it takes until every place of the list has given as many as ``needed``, and the place
    that was the last to. The draws are a pure function of the seed, so this is no estimate."""
    left, total, last = dict(needed), 0, 0
    while left:
        last = draw_task(seed, total, cumulative_weights)
        total += 1
        if last in left:
            left[last] -= 1
            if left[last] == 0:
                del left[last]
    return total, last


def _lengths(documents: EncodedDocuments) -> Iterator[int]:
    """Ids of each document of the first pass, in the order in which a training meets them."""
    position = 0
    while True:
        document = documents.next_good(0, position)
        if document.pass_index > 0:
            return
        yield len(document.encoded.ids)
        position = document.position + 1
