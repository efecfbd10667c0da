"""Read a trace of --profiling tidy_profiling: what share of the steps each stage computed or waited, and a picture of one step.

    python -m training.timeline TRACE [--png timeline.png] [--step N]

What the kinds of time mean, bubble and exposed communication above all, is said in training/timeline/step_shares.py. Needs no torch."""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comms.spans import OTHER
from training.config.flags import flag, parse_flags
from training.timeline.step_shares import (
    BUBBLE,
    COMMUNICATION,
    COMPUTE,
    KINDS,
    Piece,
    Shares,
    StepSpans,
    TraceSpan,
    Where,
    shares_of,
    step_pieces,
)
from user_error import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRACE_FORMAT = "tidy_profiling 1"  # what training/timeline/tracing.py writes
COLOURS = {  # told apart by most eyes (Okabe and Ito)
    "forward": "#56B4E9",
    "backward": "#009E73",
    "weight-grad": "#0072B2",
    "optimizer": "#CC79A7",
    BUBBLE: "#ECECEC",
    "recv": "#D55E00",
    "send": "#E69F00",
    "allreduce": "#7A1F1F",
    "data-wait": "#F0E442",
    OTHER: "#9A9A9A",
}
FIGURE_WIDTH_INCHES, LEFT, RIGHT = 15.0, 0.08, 0.99  # axes in shares of the width
TITLE_INCHES, ROW_INCHES, LEGEND_INCHES = 0.35, 0.5, 0.75
DIGIT_INCHES = 0.075  # at font size 7


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A trace as read: spans of every step by stage, and what the trace says of its run."""

    path: Path
    steps: dict[int, StepSpans]
    about: dict[str, Any]

    def chosen(self, step: int | None) -> int:
        """``step`` if it was recorded, the middle recorded one for None. Raises UserError."""
        known = sorted(self.steps)
        if step is None:
            return known[len(known) // 2]
        if step not in self.steps:
            raise UserError(f"--step must be one that was recorded; {step} is not: {self.path} holds {', '.join(map(str, known))}")
        return step


def read_trace(path: Path) -> Trace:
    """Read what training/timeline/tracing.py wrote. Raises UserError if it is anything else."""
    rule = "the trace must be a file that --profiling tidy_profiling wrote"
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{rule}; {path}: {error.strerror}. Give the path that the training printed") from error
    except (ValueError, RecursionError) as error:  # not JSON, not even text
        raise UserError(f"{rule}; {path} is no JSON ({error}). Give the path that the training printed") from error
    about = content.get("otherData") if isinstance(content, dict) else None
    found = about.get("format") if isinstance(about, dict) else None
    if found != TRACE_FORMAT:
        raise UserError(f"{rule}; {path} is of format {found!r}, not {TRACE_FORMAT!r}. Give the path that the training printed")
    assert isinstance(about, dict), "it has a format"
    steps: dict[int, StepSpans] = {}
    try:
        for event in content["traceEvents"]:
            if event["ph"] == "X" and event["args"]["step"] is not None:
                where, span = Where(event["pid"], event["tid"]), _span(event)
                steps.setdefault(span.step, {}).setdefault(where, []).append(span)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{rule}; {path} is damaged ({type(error).__name__}: {error}). Record it again") from error
    if not all({"clock_uncertainty_s", "overhead"} <= rank.keys() for rank in about.get("ranks", [])):
        raise UserError(f"{rule}; {path} is damaged (what it says of its ranks is incomplete). Record it again")
    if not steps:
        raise UserError(f"the trace must hold at least one optimizer step; {path} holds none. Record a longer run")
    return Trace(path=path, steps=steps, about=about)


def is_trace(path: Path) -> bool:
    """Whether the file is one that training/timeline/tracing.py wrote, whole or not; any other is not to be replaced."""
    try:
        read_trace(path)
    except UserError:
        return False
    return True


def _span(event: dict[str, Any]) -> TraceSpan:
    start, arguments = event["ts"] / 1e6, event["args"]
    kind = event["cat"] if event["cat"] in KINDS else OTHER
    return TraceSpan(event["name"], kind, int(arguments["step"]), arguments.get("micro_batch"), start, start + event["dur"] / 1e6)


def shares(trace: Trace, step: int | None = None) -> list[Shares]:
    """Per stage in order of (replica, stage): over all recorded steps, or over one of them. Raises UserError for an unknown step."""
    seconds: dict[Where, dict[str, float]] = {}
    for number in sorted(trace.steps) if step is None else [trace.chosen(step)]:
        for where, pieces in step_pieces(trace.steps[number]).items():
            of = seconds.setdefault(where, dict.fromkeys(KINDS, 0.0))
            for piece in pieces:
                of[piece.kind] += piece.end - piece.start
    return [shares_of(where, seconds[where]) for where in sorted(seconds)]


def describe(trace: Trace) -> str:
    """The shares of all stages and their mean, as a table, below what the trace says of its run."""
    rows, steps = shares(trace), sorted(trace.steps)
    ranks = trace.about.get("ranks", [])
    run = ", ".join(f"{key} {value}" for key, value in trace.about.items() if key not in ("format", "ranks"))
    clocks_ms = 1e3 * max((rank["clock_uncertainty_s"] for rank in ranks), default=0.0)
    cost = 100 * max((rank["overhead"] for rank in ranks), default=0.0)
    percents = [_percents(row) for row in rows]
    mean = {name: statistics.fmean(percent[name] for percent in percents) for name in percents[0]}
    lines = [("replica", "stage", *mean, "s/step")]
    for row, percent in zip(rows, percents, strict=True):
        lines.append((*map(str, row.where), *(f"{value:.1f}" for value in percent.values()), f"{row.seconds / len(steps):.4g}"))
    mean_s = statistics.fmean(row.seconds for row in rows) / len(steps)
    lines.append(("mean", "", *(f"{value:.1f}" for value in mean.values()), f"{mean_s:.4g}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        [
            f"{trace.path}: {run}",
            f"steps {', '.join(map(str, steps))}; clocks agree within {clocks_ms:.3g} ms (what is finer than that, bubble and recv may be "
            f"mixed up); recording cost an estimated {cost:.2g} % of a step",
            "shares in %; exposed = recv + send + allreduce (of gradients, and the agreement that ends a step); bubble = waiting for work "
            "that others have not done yet; on the last stage, loss and head count as backward",
            *("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines),
            totals(rows),
        ]
    )


def _percents(row: Shares) -> dict[str, float]:
    """The columns of the table."""
    columns = {
        "busy": row.busy,
        **{kind: row.of[kind] for kind in (*COMPUTE, "optimizer", BUBBLE)},
        "exposed": row.exposed_communication,
        **{kind: row.of[kind] for kind in (*COMMUNICATION, "data-wait", OTHER)},
    }
    return {name: 100 * share for name, share in columns.items()}


def totals(rows: Sequence[Shares]) -> str:
    """Such as "bubble 12.3 %, exposed communication 4.5 %, busy 80.1 %": means over the stages."""
    means = {
        "bubble": statistics.fmean(row.bubble for row in rows),
        "exposed communication": statistics.fmean(row.exposed_communication for row in rows),
        "busy": statistics.fmean(row.busy for row in rows),
    }
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in means.items())


def draw(trace: Trace, png: Path, step: int | None = None) -> None:
    """Draw one step (None: the middle one), a row per stage. Raises UserError: unknown step, no matplotlib, a place not writable."""
    number = trace.chosen(step)
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise UserError("--png needs the package matplotlib; install it with: pip install matplotlib") from error
    by_stage = step_pieces(trace.steps[number])
    rows = sorted(by_stage)
    zero = min(pieces[0].start for pieces in by_stage.values())
    length = max(pieces[-1].end for pieces in by_stage.values()) - zero
    height = TITLE_INCHES + ROW_INCHES * len(rows) + LEGEND_INCHES
    figure = Figure(figsize=(FIGURE_WIDTH_INCHES, height), dpi=120)
    axes = figure.add_axes((LEFT, LEGEND_INCHES / height, RIGHT - LEFT, ROW_INCHES * len(rows) / height))
    for y, where in enumerate(rows):
        _draw_row(axes, y, by_stage[where], zero, length)
    has_replicas = len({where.replica for where in rows}) > 1
    axes.set_yticks(range(len(rows)), [f"{f'replica {w.replica}, ' if has_replicas else ''}stage {w.stage}" for w in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1000 * length)
    axes.set_xlabel("ms", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_title(f"step {number}: {totals(shares(trace, number))}", fontsize=10)
    present = {piece.kind for pieces in by_stage.values() for piece in pieces}
    patches = [Patch(facecolor=colour, edgecolor="black", linewidth=0.3, label=kind) for kind, colour in COLOURS.items() if kind in present]
    figure.legend(handles=patches, loc="lower center", ncols=len(patches), fontsize=8, frameon=False)
    try:
        figure.savefig(png, format="png")
    except OSError as error:
        raise UserError(f"--png must be a file that can be written; {png}: {error.strerror}. Name another one") from error


def _draw_row(axes: "Axes", y: int, pieces: list[Piece], zero: float, length: float) -> None:
    """Boxes, and the micro-batch in those that are wide enough for its number."""
    bars = [(1000 * (piece.start - zero), 1000 * (piece.end - piece.start)) for piece in pieces]
    axes.broken_barh(bars, (y - 0.4, 0.8), facecolors=[COLOURS[piece.kind] for piece in pieces], edgecolors="black", linewidths=0.3)
    for piece, (left, width) in zip(pieces, bars, strict=True):
        inches = width / (1000 * length) * FIGURE_WIDTH_INCHES * (RIGHT - LEFT) if length > 0 else 0.0
        if piece.micro_batch is not None and piece.kind != BUBBLE and inches > DIGIT_INCHES * (1 + len(str(piece.micro_batch))):
            axes.text(left + width / 2, y, str(piece.micro_batch), ha="center", va="center", fontsize=7)


@dataclass(frozen=True, kw_only=True)
class TimelineFlags:
    """The command line of this tool."""

    trace: str | None = flag(None, "the trace, also given without the flag's name; required", group="timeline")
    png: str | None = flag(None, "file to draw one step into; left out: print the shares only", group="timeline")
    step: int | None = flag(None, "the step to draw; left out: the middle recorded one", group="timeline")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the shares of a trace, draw it if asked. Returns the exit status: 1, and one line, for what the user can cure."""
    try:
        flags = parse_flags(TimelineFlags, _name_the_trace(sys.argv[1:] if argv is None else argv), "Shares and picture of a trace.")
        if flags.trace is None:
            raise UserError("which trace? Usage: python -m training.timeline TRACE [--png FILE.png] [--step N]")
        if flags.png is not None and Path(flags.png).suffix.lower() != ".png":
            raise UserError(f"--png must name a .png file, because that is what is drawn; it is {flags.png!r}")
        if flags.step is not None and flags.png is None:
            raise UserError("--step chooses the step that --png draws; give --png FILE.png too, or leave --step out")
        trace = read_trace(Path(flags.trace))
        trace.chosen(flags.step)
        sys.stdout.write(describe(trace) + "\n")
        if flags.png is not None:
            draw(trace, Path(flags.png), flags.step)
            sys.stdout.write(f"drew step {trace.chosen(flags.step)}: {flags.png}\n")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _name_the_trace(argv: Sequence[str]) -> list[str]:
    """TRACE --png out.png -> --trace TRACE --png out.png; every flag takes one value."""
    named: list[str] = []
    for before, word in zip(["", *argv], argv, strict=False):
        is_value = before.startswith("--") and "=" not in before and before != "--help"
        named += [word] if word.startswith("-") or is_value else [f"--trace={word}"]
    return named
