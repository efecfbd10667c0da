"""How this run's pipeline is laid out, settled once before weights are loaded: which layers where, how many micro-batches ahead.

What flags say is taken as it is. What they leave to measuring (--partition measured, --extra-warmup-forwards auto) every rank
measures at the same time, as it will compute, publishes, and reads from all others; the same figures and the same arithmetic then give
the same plan everywhere. Promises: nobody measures what no flag asks for; no cut and no number ahead changes a bit of the result.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from comms.probe import ROUND_TRIPS, LinkTimes, time_link
from comms.transport import make_transport
from pipeline_parallel.partition import Cut, StageCost, best_cut, layers_that_fit, stage_seconds
from pipeline_parallel.schedule import extra_warmup_for
from training.compute.build import assemble_stage, make_optimizer
from training.compute.gradient import Schedule, wire_codecs
from training.compute.in_flight import asked_extra_warmup, in_flight_of, num_micro_batches
from training.config.precision import precision_of
from training.config.train import Config
from training.job.host_limits import default_memory_limit
from training.job.job import Job, all_say
from training.layout.measure import MeasuredCosts, describe_cut, measure_costs, stage_costs
from training.memory.held import HeldBytes, held_bytes

log = logging.getLogger("trainer")

CUT_BUDGET_S = 2.0  # of measuring layers: the cut follows from it
AHEAD_BUDGET_S = 0.2  # a whole number of micro-batches follows from it
GIB, NO_LIMIT = 2**30, 2**62


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """The same on all ranks. in_flight: by stage, the most micro-batches whose activations it holds; reasons: for the log, may be empty."""

    cut: Cut
    schedule: Schedule
    in_flight: tuple[int, ...]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one rank found out. link: to the next stage, where there is one and it was asked for."""

    costs: MeasuredCosts
    memory_limit_bytes: int
    link: LinkTimes | None

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "Measurement":
        """The reverse of dataclasses.asdict, also behind JSON."""
        link = LinkTimes(**fields["link"]) if fields["link"] is not None else None
        return cls(costs=MeasuredCosts(**fields["costs"]), memory_limit_bytes=fields["memory_limit_bytes"], link=link)


def agree_on_plan(job: Job, config: Config) -> PipelinePlan:
    """Collective over all ranks. Raises UserError, alike on all ranks, when no cut fits the memory; PeerLost."""
    wants_cut, wants_links = _wants_cut(config), _wants_links(config)
    if not (wants_cut or wants_links):
        return _plan(config, job.cut, asked_extra_warmup(config))
    job.wait_for_all()  # all at once, as in training: ranks of one host share its cores and memory

    def others_measure() -> bool:
        """Called when this rank has measured enough."""
        job.store.set(f"measured enough/{job.place.rank}", "1")
        return not job.store.check([f"measured enough/{rank}" for rank in range(job.place.world_size)])

    ranks_here = sum(entry["host_id"] == job.roster[job.place.rank]["host_id"] for entry in job.roster)
    cores = len(os.sched_getaffinity(0))
    if wants_cut and job.device.type == "cpu" and ranks_here * job.num_threads > cores:
        log.warning("%d ranks of %d threads share %d cores here: what is measured may be far off", ranks_here, job.num_threads, cores)
    limit = int(config.memory_limit * GIB) if config.memory_limit is not None else default_memory_limit(job.device, ranks_here)
    precision = precision_of(config, job.device)
    costs = measure_costs(
        job.model_config,
        device=job.device,
        micro_batch_size=config.micro_batch_size,
        seq_length=config.seq_length,
        with_embeddings=job.place.is_first_stage,
        with_head=job.place.is_last_stage,
        recomputes=config.recompute == "layer",
        memory_limit_bytes=limit if wants_cut else NO_LIMIT,
        budget_s=CUT_BUDGET_S if wants_cut else AHEAD_BUDGET_S,
        others_measure=others_measure,
        build=partial(assemble_stage, config, precision=precision),
        held=_held_bytes(job, config),
        spans=job.spans,
    )
    others_measure()  # also where there was no room to measure
    link = None
    if wants_links:
        with job.spans.part("measuring links", 2 * ROUND_TRIPS, "round trips") as part:
            link = _time_links(job, config, part.add)
    mine = Measurement(costs=costs, memory_limit_bytes=limit, link=link)
    measured = all_say(job, job.store, "measured", dataclasses.asdict(mine))
    return settle(job, config, [Measurement.from_fields(fields) for fields in measured])


def settle(job: Job, config: Config, measurements: Sequence[Measurement]) -> PipelinePlan:
    """The plan that these measurements, one per rank, lead to. The same on every rank that asks. Raises UserError as best_cut does."""
    place, num_layers, precision = job.place, job.model_config.num_layers, precision_of(config, job.device)
    by_stage = [[measurements[rank] for rank in place.replica_ranks_of(s)] for s in range(place.pp_size)]
    costs = stage_costs(
        [[m.costs for m in replicas] for replicas in by_stage],
        [min(m.memory_limit_bytes for m in replicas) for replicas in by_stage],
        job.model_config,
        num_tokens=config.micro_batch_size * config.seq_length,
        recomputes=config.recompute == "layer",
        leaves_weight_gradients=config.pp_mode == "zb",
        dtype=precision.compute,
        held=_held_bytes(job, config),
    )
    extra_warmup = asked_extra_warmup(config)
    reasons: list[str] = []
    if _wants_links(config):
        at_least = in_flight_of(config, (0,) * len(extra_warmup))  # how many more are wanted is not known yet
        cut = best_cut(costs, num_layers, at_least) if _wants_cut(config) else job.cut
        compute_s = max(stage_seconds(costs, cut))
        links = [_slowest([m.link for m in replicas if m.link is not None]) for replicas in by_stage[:-1]]
        extra_warmup = tuple(
            min(num_micro_batches(config), extra_warmup_for(latency_s=link.latency_s, transfer_s=link.transfer_s, compute_s=compute_s))
            for link in links
        )
        reasons = [_reason(s, link, compute_s, extra_warmup[s]) for s, link in enumerate(links)]
    if not _wants_cut(config):
        return _plan(config, job.cut, extra_warmup, reasons)
    while not _fits(costs, num_layers, in_flight_of(config, extra_warmup)) and _wants_links(config) and any(extra_warmup):
        extra_warmup = tuple(max(0, extra - 1) for extra in extra_warmup)
        reasons = [*reasons[: place.pp_size - 1], f"memory allows {', '.join(map(str, extra_warmup))} ahead (by link)"]
    in_flight = in_flight_of(config, extra_warmup)
    cut = best_cut(costs, num_layers, in_flight)
    return _plan(config, cut, extra_warmup, [describe_cut(costs, cut, in_flight), *reasons])


def _held_bytes(job: Job, config: Config) -> HeldBytes:
    precision, meta = precision_of(config, job.device), torch.device("meta")
    stage = assemble_stage(config, dataclasses.replace(job.model_config, num_layers=1), (0, 1), meta, precision)
    return held_bytes(stage, make_optimizer(config, stage, precision))


def _fits(costs: Sequence[StageCost], num_layers: int, in_flight: Sequence[int]) -> bool:
    room = layers_that_fit(costs, num_layers, in_flight)
    return min(room) >= 1 and sum(room) >= num_layers


def _wants_cut(config: Config) -> bool:
    return config.partition == "measured" and config.num_stages > 1


def _wants_links(config: Config) -> bool:
    return config.pp_mode != "gpipe" and config.extra_warmup is None and config.num_stages > 1


def _plan(config: Config, cut: Cut, extra_warmup: tuple[int, ...], reasons: Sequence[str] = ()) -> PipelinePlan:
    assert config.wire_dtype_grad is not None, "parse_config filled it in"
    schedule = Schedule(
        mode=config.pp_mode, extra_warmup=extra_warmup, wire_dtype=config.wire_dtype, wire_dtype_grad=config.wire_dtype_grad
    )
    return PipelinePlan(cut=cut, schedule=schedule, in_flight=in_flight_of(config, extra_warmup), reasons=tuple(reasons))


def _time_links(job: Job, config: Config, progress: Callable[[int], object]) -> LinkTimes | None:
    """Of the link to the next stage; None on the last one. Every other link at a time, so that no two share a rank. ``progress`` hears of
    every round trip."""
    place, found = job.place, None
    computed = precision_of(config, job.device).compute
    codecs = wire_codecs(config.wire_dtype, config.wire_dtype_grad or "none", _message_shape(job, config), job.device, computed)
    for parity in (0, 1):
        leads = place.pp % 2 == parity
        pair = job.groups.to_next if leads else job.groups.to_previous
        if pair is None:
            progress(ROUND_TRIPS)
            continue
        peer = place.rank + (1 if leads else -1)
        transport = make_transport(
            send_group=pair.activations if leads else pair.gradients,
            recv_group=pair.gradients if leads else pair.activations,
            peer=peer,
            device=job.device,
        )
        sizes = (codecs[0].num_bytes, codecs[1].num_bytes)
        words = place.at(peer).in_words
        times = time_link(transport, leads=leads, num_bytes=sizes, device=job.device, peer_in_words=words, progress=progress)
        transport.close()
        if leads:
            found = times
    return found


def _message_shape(job: Job, config: Config) -> tuple[int, int, int]:
    return (config.micro_batch_size, config.seq_length, job.model_config.width)


def _slowest(links: Sequence[LinkTimes]) -> LinkTimes:
    """Of a link's replicas: all of them keep the pace of the slowest."""
    return LinkTimes(latency_s=max(link.latency_s for link in links), transfer_s=max(link.transfer_s for link in links))


def _reason(s: int, link: LinkTimes, compute_s: float, extra: int) -> str:
    transfer = f"{link.transfer_s * 1e3:.2f}" if link.transfer_s >= 1e-5 else "less than 0.01"
    narrow = link.transfer_s / 2 > compute_s
    return (
        f"link {s}-{s + 1}: {link.latency_s * 1e3:.2f} ms one way, {transfer} ms for an activation there and its gradient back, "
        f"{compute_s * 1e3:.1f} ms to compute a micro-batch: --extra-warmup-forwards {extra} for the stages before it"
        + ("; the link, not the computation, sets the pace: see --wire-dtype" if narrow else "")
    )
