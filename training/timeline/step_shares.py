"""What every moment of a step was spent on: computing, waiting for another's work, waiting for the wire. Pure; read from spans.

Why: a trace says when a stage waited; whether the cure is another schedule or a faster wire depends on what for. Every moment of a
step, from a stage's first span of it to its last, gets exactly one kind:

- forward, backward, weight-grad, optimizer, data-wait: time in such spans (the innermost one, where they nest);
- bubble: waiting for work that others have not done yet. In a receive: until the neighbour's send of that micro-batch began. In a
  collective: until its last member had come;
- recv, send, allreduce: exposed communication, the wire held somebody up. In a receive: from the later of its own begin and that of the
  neighbour's send (what there is to decode included). In a collective: from when the last member had come. In a send: all of it. In
  "waiting for sends": while the receiver waited for one of these messages, as above; else the receiver was busy, and that is bubble;
- other: checkpoints, and time in no span.

So the shares of a stage sum to 1. They are as good as the clocks are aligned (comms/clocks.py)."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from comms.spans import OTHER
from user_error import UserError

BUBBLE = "bubble"
COMPUTE = ("forward", "backward", "weight-grad")
COMMUNICATION = ("recv", "send", "allreduce")
KINDS = (*COMPUTE, "optimizer", BUBBLE, *COMMUNICATION, "data-wait", OTHER)
SENDER_OF = {"receiving activations": (-1, "sending activations"), "receiving gradients": (1, "sending gradients")}  # stage, name there
FLUSH = "waiting for sends"
JOINT = {"agreeing on the step": "all ranks", "allreduce": "replicas of the stage"}  # collectives, and who takes part


class Where(NamedTuple):
    """A row of the picture."""

    replica: int
    stage: int


class TraceSpan(NamedTuple):
    """One event "X" of a trace; start and end in seconds from the trace's first span."""

    name: str
    category: str
    step: int
    micro_batch: int | None
    start: float
    end: float


class Interval(NamedTuple):
    """Seconds from the trace's first span."""

    start: float
    end: float


class Piece(NamedTuple):
    """Time of one kind, one of KINDS."""

    kind: str
    micro_batch: int | None
    start: float
    end: float


StepSpans = dict[Where, list[TraceSpan]]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What one stage spent its time on: ``of`` a kind, in shares of ``seconds``; they sum to 1."""

    where: Where
    seconds: float
    of: dict[str, float]

    @property
    def busy(self) -> float:
        return sum(self.of[kind] for kind in COMPUTE)

    @property
    def bubble(self) -> float:
        return self.of[BUBBLE]

    @property
    def exposed_communication(self) -> float:
        return sum(self.of[kind] for kind in COMMUNICATION)


def shares_of(where: Where, seconds: dict[str, float]) -> Shares:
    """From seconds per kind."""
    total = sum(seconds.values())
    return Shares(where=where, seconds=total, of={kind: s / total if total > 0 else 0.0 for kind, s in seconds.items()})


def step_pieces(spans: StepSpans) -> dict[Where, list[Piece]]:
    """One step: for every stage, pieces that cover the time from its first span to its last without gap or overlap."""
    wire = _exposed(spans)
    return {where: _without_gaps(_pieces(where, of_stage, wire)) for where, of_stage in spans.items()}


def _pieces(where: Where, spans: list[TraceSpan], wire: dict[tuple[Where, TraceSpan], list[Interval]]) -> list[Piece]:
    pieces = []
    for span, start, end in _innermost(spans):
        exposed = wire.get((where, span), [Interval(start, end)] if span.category in COMMUNICATION else None)
        if exposed is None:
            pieces.append(Piece(span.category, span.micro_batch, start, end))
            continue
        at = start
        for interval in _merged(exposed):
            begin, stop = max(at, interval.start), min(end, interval.end)
            if stop <= begin:
                continue
            pieces += [Piece(BUBBLE, span.micro_batch, at, begin)] if begin > at else []
            pieces.append(Piece(span.category, span.micro_batch, begin, stop))
            at = stop
        pieces += [Piece(BUBBLE, span.micro_batch, at, end)] if end > at else []
    return pieces


def _exposed(spans: StepSpans) -> dict[tuple[Where, TraceSpan], list[Interval]]:
    """For every span in which a stage may wait for another one's work: when it was the wire that it waited for."""
    exposed: dict[tuple[Where, TraceSpan], list[Interval]] = {}
    sent: dict[Where, list[Interval]] = {where: [] for where in spans}
    numbered = {where: _numbered(of_stage) for where, of_stage in spans.items()}
    for where, of_stage in numbered.items():
        for (name, micro_batch, number), span in of_stage.items():
            if name in SENDER_OF:
                side, send = SENDER_OF[name]
                sender = Where(where.replica, where.stage + side)
                message = numbered.get(sender, {}).get((send, micro_batch, number))
                if message is None:
                    raise UserError(
                        f"every receive must have its send in the trace; step {span.step} of replica {where.replica}, stage {where.stage} "
                        f"has {name} of micro-batch {micro_batch} and stage {sender.stage} no {send} of it. Record the trace again"
                    )
                interval = Interval(max(span.start, message.start), span.end)
                exposed[where, span] = [interval]
                sent[sender].append(interval)
            elif name in JOINT:
                members = [other for other in spans if JOINT[name] == "all ranks" or other.stage == where.stage]
                there = [numbered[other].get((name, micro_batch, number)) for other in members]
                exposed[where, span] = [Interval(max(member.start for member in there if member is not None), span.end)]
    for where, of_stage in numbered.items():
        exposed |= {(where, span): sent[where] for (name, _, _), span in of_stage.items() if name == FLUSH}
    return exposed


def _numbered(spans: Iterable[TraceSpan]) -> dict[tuple[str, int | None, int], TraceSpan]:
    """By name, micro-batch and how many such there were before in this step: accumulation repeats micro-batch numbers."""
    counts: dict[tuple[str, int | None], itertools.count[int]] = {}
    by_start = sorted(spans, key=lambda span: span.start)
    return {(s.name, s.micro_batch, next(counts.setdefault((s.name, s.micro_batch), itertools.count()))): s for s in by_start}


def _innermost(spans: Iterable[TraceSpan]) -> list[tuple[TraceSpan, float, float]]:
    """Where spans nest, the time of the outer one is what the inner ones leave of it. In order of time, without overlap."""
    parts: list[tuple[TraceSpan, float, float]] = []
    stack: list[TraceSpan] = []
    at = float("-inf")

    def advance(until: float) -> None:
        nonlocal at
        if until > at and stack:
            parts.append((stack[-1], at, until))
        at = max(at, until)

    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while stack and stack[-1].end <= span.start:
            advance(stack[-1].end)
            stack.pop()
        advance(span.start)
        stack.append(span)
    while stack:
        advance(stack[-1].end)
        stack.pop()
    return parts


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1].end:
            merged[-1] = Interval(merged[-1].start, max(end, merged[-1].end))
        elif end > start:
            merged.append(Interval(start, end))
    return merged


def _without_gaps(pieces: list[Piece]) -> list[Piece]:
    filled: list[Piece] = []
    for piece in pieces:
        if filled and piece.start > filled[-1].end:
            filled.append(Piece(OTHER, None, filled[-1].end, piece.start))
        filled.append(piece)
    return filled
