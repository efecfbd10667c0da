"""Whether the job that has formed can fit the memory and the disks of its hosts, asked before data
and weights are read.

The arithmetic is in room.py (memory), cures.py (what would fit) and prediction.py.
Here the ranks tell each other what they have and need. Promises: all ranks come to the same end, with
rank 0's words; a job that fits by far costs no rehearsal; ranks that have trained already and only
meet again are not asked.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from checkpoint.tensor_file import TensorSource, explained_disk_errors
from modules.model_config import ModelConfig
from modules.stage import meta_stage
from pipeline_parallel.partition import size_in_words
from training.checkpoints.host_copy import layers_of
from training.compute.build import assemble_stage, make_optimizer, step_weights
from training.compute.in_flight import asked_extra_warmup, in_flight_of
from training.config.precision import precision_of
from training.config.train import Config
from training.job.job import Job, all_say
from training.job.local_facts import cut_of
from training.memory.cures import Predict, advice, cures, evaluation_changes, training_changes
from training.memory.held import count_parameters
from training.memory.room import Needs, Room, at_most, look_at_room, shortages
from user_error import UserError

if TYPE_CHECKING:
    from training.memory.prediction import StageMemory

log = logging.getLogger("trainer")

META = torch.device("meta")
FREED_WITHIN_S, LOOK_AGAIN_S = 10.0, 1.0  # processes that end give their memory back in moments
SHOW_PARTS = "python -m training.memory with the same flags shows every part"

Say = Callable[[str, Any], list[Any]]  # what, mine: everybody's, by rank


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is to fit. bound: more than this rank needs; own: what it is predicted to need; predict:
    the same of all stages under other flags; changes: of flags, that may help; what: in words."""

    what: str
    bound: int
    own: Callable[[], Needs]
    predict: Predict
    changes: Iterator[dict[str, Any]]


def check_training_fits(job: Job, config: Config, *, is_first: bool) -> None:
    """Called by all ranks. is_first: whether this process has not trained yet. Raises UserError,
    alike on all ranks, for what clearly cannot fit memory or disk; warns of what may not fit.

    A cut that is to be measured is held to the memory there (plan.py).
    """
    say: Say = partial(all_say, job, dist.PrefixStore("fitting", job.store))
    if not all(say("first", is_first)):
        return
    _check_disks(job, config, say)
    if config.partition == "measured" and config.num_stages > 1:
        return
    in_flight = in_flight_of(config, asked_extra_warmup(config))[job.place.pp]
    num_layers = job.model_config.num_layers
    subject = _Subject(
        what="this training",
        bound=_bound(config, job.model_config, job.cut[job.place.pp], in_flight),
        own=partial(_predict_own, job, config, in_flight),
        predict=partial(_predict_training, model_config=job.model_config, device=job.device),
        changes=training_changes(config, num_layers, is_cpu=job.device.type == "cpu"),
    )
    _check_memory(job, config, say, subject)


def check_evaluation_fits(job: Job, config: Config) -> None:
    """The same for an evaluation, of which the weights alone are counted."""
    say: Say = partial(all_say, job, dist.PrefixStore("fitting", job.store))
    predict = partial(_predict_weights, model_config=job.model_config, device=job.device)
    whole = meta_stage(job.model_config, *job.cut[job.place.pp])
    subject = _Subject(
        what="the model alone",
        bound=2 * sum(parameter.nbytes for parameter in whole.parameters()),
        own=lambda: predict(config)[job.place.pp],
        predict=predict,
        changes=evaluation_changes(config, job.model_config.num_layers),
    )
    _check_memory(job, config, say, subject)


def _check_memory(job: Job, config: Config, say: Say, subject: _Subject) -> None:
    """Called by all ranks; raises UserError on all of them or on none."""
    is_on_gpu = job.device.type == "cuda"
    on_host = 0 if is_on_gpu and config.optimizer_offload == "none" else subject.bound
    bound = Needs(host=on_host, gpu=subject.bound if is_on_gpu else 0)
    rooms = _rooms(job, say, 0)
    if not shortages(rooms, [Needs(**needs) for needs in say("bound", asdict(bound))]):
        return
    needs = [Needs(**needs) for needs in say("needs", asdict(subject.own()))]
    give_up, number = time.monotonic() + FREED_WITHIN_S, 0
    while (found := shortages(rooms, needs)) and found[0].is_clear:
        number += 1
        if not say(f"again/{number}", time.monotonic() < give_up)[0]:  # rank 0's clock
            break
        time.sleep(LOOK_AGAIN_S)
        rooms = _rooms(job, say, number)
    if not found:
        return
    refusal = None
    if job.place.rank == 0 and found[0].is_clear:
        refusal = f"{subject.what} cannot fit: {found[0].in_words()}"
        log.info("%s; looking for what would", refusal)
        tried = cures(config, subject.changes, subject.predict, found[0])
        refusal = f"{refusal}. {advice(tried, found[0].free)}. {SHOW_PARTS}"
    if (told := say("refusal", refusal)[0]) is not None:
        raise UserError(told)
    if job.place.rank == 0:
        log.warning("%s may not fit: %s. %s", subject.what, found[0].in_words(), SHOW_PARTS)


def _rooms(job: Job, say: Say, number: int) -> list[Room]:
    own = look_at_room(job.place.rank, job.place.pp, job.roster[job.place.rank]["host_id"], job.device)
    return [Room(**room) for room in say(f"room/{number}", asdict(own))]


def _bound(config: Config, model_config: ModelConfig, layers: tuple[int, int], in_flight: int) -> int:
    first, last = layers
    counts = count_parameters(model_config)
    return at_most(
        num_parameters=counts.layer * (last - first) + counts.embeddings + counts.head,
        num_layers=last - first,
        num_tokens=config.micro_batch_size * config.seq_length,
        seq_length=config.seq_length,
        width=model_config.width,
        inner_width=model_config.inner_width,
        num_heads=model_config.num_heads,
        vocab_size=model_config.vocab_size,
        in_flight=in_flight,
    )


def _predict_own(job: Job, config: Config, in_flight: int) -> Needs:
    from training.memory.prediction import predict_stage  # what it needs of torch takes a second to import

    return _needs_of(predict_stage(config, job.model_config, job.cut, job.place.pp, in_flight, job.device))


def _predict_training(config: Config, *, model_config: ModelConfig, device: torch.device) -> list[Needs]:
    from training.memory.prediction import predict_stages

    in_flight = in_flight_of(config, asked_extra_warmup(config))
    cut = cut_of(config, model_config.num_layers)
    return list(map(_needs_of, predict_stages(config, model_config, cut, in_flight, device)))


def _needs_of(stage: "StageMemory") -> Needs:
    if stage.on_host:
        return Needs(host=stage.total - stage.host_copy)
    return Needs(host=stage.host - stage.host_copy, gpu=stage.total)


def _predict_weights(config: Config, *, model_config: ModelConfig, device: torch.device) -> list[Needs]:
    found = []
    for layers in cut_of(config, model_config.num_layers):
        stage = assemble_stage(config, model_config, layers, META, precision_of(config, device))
        size = sum(parameter.nbytes for parameter in stage.parameters())
        found.append(Needs(gpu=size) if device.type == "cuda" else Needs(host=size))
    return found


def _check_disks(job: Job, config: Config, say: Say) -> None:
    """A checkpoint larger than the disk is refused; one that does not fit now is warned of."""
    assert config.checkpoint_path is not None, "parse_config requires it"
    with explained_disk_errors(Path(config.checkpoint_path)):
        root = _existing(Path(config.checkpoint_path))
        usage, device = shutil.disk_usage(root), root.stat().st_dev
    disk = f"{job.roster[job.place.rank]['host_id']} {device}"
    own = {
        "disk": disk,
        "stage": job.place.pp,
        "bytes": _bytes_of_part(job, config),
        "total": usage.total,
        "free": usage.free,
    }
    said = say("disk", own)
    refusal = None
    for name in dict.fromkeys(one["disk"] for one in said):
        here = [one for one in said if one["disk"] == name]
        needed = sum({one["stage"]: one["bytes"] for one in here}.values())  # one replica of a stage writes
        total, free = max(one["total"] for one in here), max(one["free"] for one in here)
        where = f"the disk of {config.checkpoint_path} on host {name.partition('/')[0]}"
        there = f"{where} has {size_in_words(free)} free"
        sizes = f"a checkpoint of this run needs {size_in_words(needed)}, and {there}"
        weights = "--checkpoint-optimizer false (weights alone)"
        cure = f"Use another --checkpoint-path, {weights} or --train lora"
        if 0 < total < needed:  # some filesystems say 0
            refusal = f"{sizes} of {size_in_words(total)} in all. {cure}"
        elif job.place.rank == 0 and _kept_at_once(config) * needed > free:
            log.warning("%s", _too_many(config, sizes, needed, free))
    if refusal is not None:
        raise UserError(refusal)


def _too_many(config: Config, sizes: str, needed: int, free: int) -> str:
    if needed > free:
        return f"{sizes}: unless room is made before the first save, it will fail"
    count = _kept_at_once(config)
    keep = free // needed - 1
    cure = f"--keep-checkpoints {keep} would fit" if keep >= 1 else "--checkpoint-steps 0 saves the last step alone"
    return f"{sizes}; there will be {count} of them at once. {cure}"


def _kept_at_once(config: Config) -> int:
    """Checkpoints of this run on the disk at a time; a new one is whole before an old one goes."""
    every = config.checkpoint_steps
    count = -(-(config.total_steps or 1) // every) if every else 1
    return min(count, config.keep_checkpoints + 1) if config.keep_checkpoints else count


def _bytes_of_part(job: Job, config: Config) -> int:
    """What this rank's stage writes of a checkpoint; of adapters, which are small, 0."""
    if config.train != "all":
        return 0
    stage = assemble_stage(config, job.model_config, job.cut[job.place.pp], META, precision_of(config, job.device))
    optimizer = make_optimizer(config, stage, precision_of(config, job.device))
    specs = step_weights(config, job.model, job.model_config).specs
    dtypes = {name: spec.dtype for name, spec in specs.items()}
    layers = layers_of(stage, optimizer, dtypes, with_optimizer=config.checkpoint_optimizer)
    sources = [TensorSource.of(name, t, dtypes[name]) for layer in layers.values() for name, t in layer.weights.items()]
    sources += [TensorSource.of(name, t) for layer in layers.values() for name, t in layer.train_state.items()]
    return sum(source.num_bytes for source in sources)


def _existing(path: Path) -> Path:
    """The nearest folder that is there already."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
