"""Which changes of flags would make a run fit, by the predictor that says it does not."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline_parallel.partition import size_in_words
from training.config.flags import flag_name
from training.config.train import Config
from training.memory.room import Needs, Shortage
from user_error import UserError

MOST_SAID = 4  # cures in one message


@dataclass(frozen=True, kw_only=True)
class Cure:
    """flags: as they are typed; needed: bytes that the ranks of the shortage would then take;
    times: as many ``where`` (hosts or GPUs) as now."""

    flags: str
    needed: int
    times: int = 1
    where: str = "hosts"

    def in_words(self) -> str:
        """The flags and what they lead to."""
        more = f" on {self.times} times the {self.where}" if self.times > 1 else ""
        return f"{self.flags}{more} ({size_in_words(self.needed)})"


Predict = Callable[[Config], Sequence[Needs]]  # by stage; raises UserError where that cannot be run


def training_changes(config: Config, num_layers: int, *, is_cpu: bool) -> Iterator[dict[str, Any]]:
    """What may help a training, flags by field name; what changes least of it comes first."""
    singles: list[dict[str, Any]] = []
    if config.recompute == "none":
        singles.append({"recompute": "layer"})
    if config.micro_batch_size > 1:
        singles.append({"micro_batch_size": 1})
    if config.optimizer == "adam":
        singles.append({"optimizer": "8bit-adam"})
    if config.optimizer_offload == "none" and not is_cpu:
        singles.append({"optimizer_offload": "cpu"})
    yield from singles
    together = {name: value for single in singles for name, value in single.items()}
    small = {"recompute": "layer", "micro_batch_size": 1}
    if config.train == "all" and config.load_pretrained_model:
        yield {"train": "lora"}
        yield {"train": "lora", "base_quantization": "int8"}
        yield {"train": "lora", "base_quantization": "int8", **small}
    elif config.train != "all":
        yield {"base_quantization": "int8"}
        yield {"base_quantization": "int8", **small}
    yield together
    yield from more_stages(config, num_layers)
    for change in more_stages(config, num_layers):
        yield {**together, **change}


def evaluation_changes(config: Config, num_layers: int) -> Iterator[dict[str, Any]]:
    """What may help an evaluation, flags by field name."""
    if not (config.bf16 or config.fp16):
        yield {"bf16": True}
    yield {"base_quantization": "int8"}
    yield {"base_quantization": "int8", "quantize_ends": True}
    yield from more_stages(config, num_layers)


def more_stages(config: Config, num_layers: int) -> Iterator[dict[str, Any]]:
    """2, 4, 8 ... times as many, on as many times the hosts or GPUs."""
    stages = 2 * config.num_stages
    while stages <= num_layers:
        yield {"pipeline_group_size": stages}
        stages *= 2


def cures(config: Config, changes: Iterator[dict[str, Any]], predict: Predict, shortage: Shortage) -> list[Cure]:
    """The changes that can be run, in their order, with what the ranks of ``shortage`` would need.

    Ends behind MOST_SAID that fit, and tries no larger number of stages than the first that does:
    each takes the predictor a second or more.
    """
    found: list[Cure] = []
    seen: set[str] = set()
    for change in changes:
        different = {name: it for name, it in change.items() if getattr(config, name) != it}
        flags = " ".join(f"{flag_name(name)} {_typed(it)}" for name, it in different.items())
        fitting = [cure for cure in found if cure.needed <= shortage.free]
        times = different.get("pipeline_group_size", config.num_stages) // config.num_stages
        if len(fitting) == MOST_SAID or (times > 1 and any(cure.times > 1 for cure in fitting)):
            break
        if not different or flags in seen:
            continue
        seen.add(flags)
        if times > 1:
            world_size = (config.world_size or 1) * times
            different |= {"world_size": world_size, "stage_layers": None, "num_layers": None}
        try:
            by_stage = predict(dataclasses.replace(config, **different))
        except UserError:  # a package that is missing, flags that do not go together
            continue
        found.append(_cure(flags, times, by_stage, shortage))
    return found


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cure(flags: str, times: int, by_stage: Sequence[Needs], shortage: Shortage) -> Cure:
    """Where there are more stages, as many ranks as now are taken to share the memory that is
    short, those with the largest stages, and the rest to be elsewhere."""
    sizes = [getattr(needs, shortage.kind) for needs in by_stage]
    largest = sorted(sizes, reverse=True)[: len(shortage.ranks)]
    taken = largest if times > 1 else [sizes[stage] for stage in shortage.stages]
    where = "hosts" if shortage.kind == "host" else "GPUs"
    return Cure(flags=flags, needed=sum(taken), times=times, where=where)


def advice(found: Sequence[Cure], free: int) -> str:
    """A sentence: the cures that fit ``free`` bytes, or the nearest where none does."""
    fitting = [cure for cure in found if cure.needed <= free]
    if fitting:
        said = ", or ".join(cure.in_words() for cure in fitting)
        return f"By the same prediction this would fit: {said}"
    if not found:
        return "Nothing that flags can change would make it fit: use more memory or a smaller model"
    nearest = min(found, key=lambda cure: cure.needed).in_words()
    more = "Use more hosts, or a smaller model"
    return f"Nothing that was tried would fit; nearest comes {nearest}. {more}"
