"""Cut L layers into S stages: evenly, by hand, or by what each stage would cost.

Pure: numbers in, ranges of layers out; every layer is covered, every stage gets one. Left to others: finding out the costs
(training/layout/plan.py).
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from user_error import UserError

Cut = tuple[tuple[int, int], ...]  # stage s holds layers [first, last)

NOTABLE_RATIO = 1.2  # of one stage's seconds per layer to another's


def even_cut(num_layers: int, num_stages: int) -> Cut:
    """Stages that differ by one layer at most; the longer ones come first, because the last stage also has the head.

    Raises UserError when there are more stages than layers.
    """
    if num_stages > num_layers:
        raise UserError(
            f"every stage needs a layer: --pipeline-group-size is {num_stages} and the model has {num_layers} layers. "
            f"Use --pipeline-group-size {num_layers} or less"
        )
    base, longer = divmod(num_layers, num_stages)
    bounds = [s * base + min(s, longer) for s in range(num_stages + 1)]
    return tuple(itertools.pairwise(bounds))


def cut_by_num_layers(num_layers: int, num_stages: int, layers_per_stage: int) -> Cut:
    """Stage s holds [s*N, min((s+1)*N, L)), as --num-layers N of the relatives means it.

    Raises UserError unless every layer is covered and every stage gets one; they would train a truncated model without a word.
    """
    fitting = f"Leave --num-layers out for an even cut, or use {-(-num_layers // num_stages)}"
    if layers_per_stage < 1:
        raise UserError(f"--num-layers must be at least 1; it is {layers_per_stage}. {fitting}")
    if layers_per_stage * num_stages < num_layers:
        raise UserError(
            f"--num-layers x --pipeline-group-size must cover the model: {layers_per_stage} x {num_stages} = "
            f"{layers_per_stage * num_stages} "
            f"of its {num_layers} layers. {fitting}"
        )
    if layers_per_stage * (num_stages - 1) >= num_layers:
        raise UserError(
            f"every stage needs a layer: with --num-layers {layers_per_stage} stage {num_stages - 1} of {num_stages} would get none of the "
            f"model's {num_layers} layers. {fitting}"
        )
    return tuple((s * layers_per_stage, min((s + 1) * layers_per_stage, num_layers)) for s in range(num_stages))


def parse_stage_layers(text: str) -> tuple[int, ...]:
    """'6,8,8,6', the layers of each stage as --stage-layers takes them, to (6, 8, 8, 6). Raises UserError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"--stage-layers must be one whole number per stage, with commas between them, such as 6,8,8,6; it is {text!r}"
        ) from error


def cut_by_stage_layers(num_layers: int, num_stages: int, stage_layers: Sequence[int]) -> Cut:
    """Stage s holds stage_layers[s] layers, as --stage-layers means it. Raises UserError unless they fit the model and the stages."""
    given = ",".join(map(str, stage_layers))
    fitting = f"For instance: --stage-layers {','.join(str(last - first) for first, last in even_cut(num_layers, num_stages))}"
    if len(stage_layers) != num_stages:
        raise UserError(
            f"--stage-layers must have one number per stage; {given} has {len(stage_layers)} and --pipeline-group-size is {num_stages}. "
            f"{fitting}"
        )
    if min(stage_layers) < 1:
        s = stage_layers.index(min(stage_layers))
        raise UserError(f"every stage needs a layer: --stage-layers {given} gives stage {s} {stage_layers[s]}. {fitting}")
    if sum(stage_layers) != num_layers:
        raise UserError(
            f"--stage-layers must sum to the model's layers: {given} sums to {sum(stage_layers)}, the model has {num_layers}. {fitting}"
        )
    return _cut_of(stage_layers)


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage pays for what it may hold. Seconds: forward and backward of one micro-batch. Bytes: held all the time, or for
    every micro-batch in flight; fixed_bytes whatever it holds. The embeddings count on the first stage, the head (with the final
    norm) on the last, nowhere else."""

    layer_s: float
    embeddings_s: float = 0.0
    head_s: float = 0.0
    fixed_bytes: int = 0
    layer_bytes: int = 0
    embeddings_bytes: int = 0
    head_bytes: int = 0
    layer_bytes_in_flight: int = 0
    output_bytes_in_flight: int = 0
    memory_limit_bytes: int


def stage_seconds(costs: Sequence[StageCost], cut: Cut) -> list[float]:
    """Forward and backward of one micro-batch, by stage."""
    return [_seconds(costs, s, last - first) for s, (first, last) in enumerate(cut)]


def stage_bytes(costs: Sequence[StageCost], cut: Cut, in_flight: Sequence[int]) -> list[int]:
    """What each stage needs when in_flight[s] micro-batches are in flight on it."""
    return [
        _fixed_bytes(costs, s, in_flight) + (last - first) * _bytes_per_layer(costs, s, in_flight) for s, (first, last) in enumerate(cut)
    ]


def best_cut(costs: Sequence[StageCost], num_layers: int, in_flight: Sequence[int]) -> Cut:
    """The cut whose slowest stage takes the least time, among all that give every stage a layer and no more than its memory.

    costs, in_flight: by stage; in_flight counts the micro-batches whose activations it holds at once. Raises UserError when no cut fits.

    Exact: all layers cost a stage the same, so only their number matters, and a stage with n of them takes f_s(n), which never falls
    as n grows. Every stage starts with one; each further layer goes where f_s(n + 1) is least. That picks the L - S smallest
    of all those values, so the largest picked is as small as it can be. Where the slowest stage leaves a choice, the others come out
    as level as they can be, too (the second slowest as fast as possible, and so on): a stage that is only a little slower than
    measured then delays nobody. Equal values: the earlier stage, as in even_cut.
    """
    num_stages = len(costs)
    assert len(in_flight) == num_stages, "one count of micro-batches in flight per stage"
    even_cut(num_layers, num_stages)  # raises where there are more stages than layers
    room = layers_that_fit(costs, num_layers, in_flight)
    if min(room) < 1 or sum(room) < num_layers:
        raise UserError(_no_cut_fits(costs, num_layers, room, in_flight))
    return _most_level_cut(costs, num_layers, room)


def layers_that_fit(costs: Sequence[StageCost], num_layers: int, in_flight: Sequence[int]) -> list[int]:
    """How many layers each stage has memory for, 0 .. num_layers."""
    room = []
    for s, cost in enumerate(costs):
        left, per_layer = cost.memory_limit_bytes - _fixed_bytes(costs, s, in_flight), _bytes_per_layer(costs, s, in_flight)
        fit = num_layers if per_layer == 0 and left >= 0 else left // max(1, per_layer)
        room.append(min(num_layers, max(0, fit)))
    return room


def size_in_words(num_bytes: int) -> str:
    """A number of bytes for people, in the unit of --memory-limit."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


def explain_cut(costs: Sequence[StageCost], cut: Cut, in_flight: Sequence[int]) -> str:
    """In a sentence why ``cut``, best_cut's answer, is as it is: against the even cut, and what memory had to say."""
    num_layers = cut[-1][1]
    even = even_cut(num_layers, len(cut))
    ours, evens = max(stage_seconds(costs, cut)), max(stage_seconds(costs, even))
    if cut == even:
        said = [f"the even cut is the best one: slowest stage {ours * 1e3:.1f} ms"]
    else:
        gain = f", {evens / ours:.2f} times faster" if ours < evens else ""
        said = [f"even cut: slowest stage {evens * 1e3:.1f} ms", f"measured cut: {ours * 1e3:.1f} ms{gain}"]
    if costs[-1].layer_s > 0:
        said.append(f"the head costs as much as {costs[-1].head_s / costs[-1].layer_s:.1f} layers")
    slowest, fastest = (choose(range(len(costs)), key=lambda s: costs[s].layer_s) for choose in (max, min))
    if costs[slowest].layer_s > NOTABLE_RATIO * costs[fastest].layer_s > 0:
        ratio = costs[slowest].layer_s / costs[fastest].layer_s
        said.append(f"a layer takes {ratio:.1f} times as long on stage {slowest} as on stage {fastest}")
    room = layers_that_fit(costs, num_layers, in_flight)
    unlimited = best_cut([replace(cost, memory_limit_bytes=2**62) for cost in costs], num_layers, in_flight)
    if max(stage_seconds(costs, unlimited)) < ours:
        full = ", ".join(str(s) for s, (first, last) in enumerate(unlimited) if last - first > room[s])
        said.append(f"memory decided: without the limit of stage {full} it would be {max(stage_seconds(costs, unlimited)) * 1e3:.1f} ms")
    elif any(last - first > room[s] for s, (first, last) in enumerate(even)):
        said.append("the even cut does not fit the memory")
    return "; ".join(said)


def _most_level_cut(costs: Sequence[StageCost], num_layers: int, room: Sequence[int]) -> Cut:
    sizes = [1] * len(costs)
    heap = [(_seconds(costs, s, 2), s) for s in range(len(costs)) if room[s] > 1]
    heapq.heapify(heap)
    for _ in range(num_layers - len(costs)):
        _, s = heapq.heappop(heap)
        sizes[s] += 1
        if sizes[s] < room[s]:
            heapq.heappush(heap, (_seconds(costs, s, sizes[s] + 1), s))
    return _cut_of(sizes)


def _cut_of(sizes: Sequence[int]) -> Cut:
    return tuple(itertools.pairwise(itertools.accumulate(sizes, initial=0)))


def _seconds(costs: Sequence[StageCost], s: int, num_layers: int) -> float:
    ends = (costs[s].embeddings_s if s == 0 else 0.0) + (costs[s].head_s if s == len(costs) - 1 else 0.0)
    return num_layers * costs[s].layer_s + ends


def _fixed_bytes(costs: Sequence[StageCost], s: int, in_flight: Sequence[int]) -> int:
    ends = (costs[s].embeddings_bytes if s == 0 else 0) + (costs[s].head_bytes if s == len(costs) - 1 else 0)
    return costs[s].fixed_bytes + ends + in_flight[s] * costs[s].output_bytes_in_flight


def _bytes_per_layer(costs: Sequence[StageCost], s: int, in_flight: Sequence[int]) -> int:
    return costs[s].layer_bytes + in_flight[s] * costs[s].layer_bytes_in_flight


def _no_cut_fits(costs: Sequence[StageCost], num_layers: int, room: Sequence[int], in_flight: Sequence[int]) -> str:
    even = even_cut(num_layers, len(costs))
    stages = "; ".join(
        f"stage {s} needs {size_in_words(needed)} for {last - first} layer(s) and {in_flight[s]} micro-batch(es) in flight, it has "
        f"{size_in_words(costs[s].memory_limit_bytes)}, room for {room[s]}"
        for s, ((first, last), needed) in enumerate(zip(even, stage_bytes(costs, even, in_flight), strict=True))
    )
    empty = [str(s) for s, fit in enumerate(room) if fit < 1]
    reason = f"stage {', '.join(empty)} has no room for a single one" if empty else f"together the stages have room for {sum(room)}"
    return (
        f"the model's {num_layers} layers must fit the memory of the stages; {reason}. With an even cut {stages}. Use more stages "
        "(--pipeline-group-size), --recompute layer (not in zb), --extra-warmup-forwards 0, a smaller --micro-batch-size or --seq-length, "
        "or ranks with more free memory (a higher --memory-limit)"
    )
