"""tidy_profiling: what recording costs, one clock for all ranks, one trace for the whole job, and shares that can be checked by hand."""

import itertools
import json
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.ranks import run_ranks

from comms.clocks import ClockOffset, offset_to_rank_0, on_rank_0
from comms.groups import join_process_group
from comms.place import place_of
from comms.spans import Span, Spans
from training.job.job import COLLECTIVE_TIMEOUT
from training.timeline import tracing
from training.timeline.step_shares import KINDS, StepSpans, TraceSpan, Where, step_pieces
from training.timeline.trace import COLOURS, TRACE_FORMAT, draw, main, read_trace, shares
from training.timeline.tracing import (
    RankTrace,
    RecordingCost,
    TidyProfiler,
    check_trace_path,
    chrome_trace,
    recording_cost,
    span_cost_s,
    write_trace,
)
from user_error import UserError

CPU = torch.device("cpu")
MS = 1_000_000  # nanoseconds

# One step of two stages and two micro-batches, GPipe, times in ms. Stage 0 ends at 113, stage 1 at 115.
STAGE_0 = [
    ("waiting for data", None, 0, 1),
    ("forward", 0, 1, 11),
    ("sending activations", 0, 11, 12),
    ("forward", 1, 12, 22),
    ("sending activations", 1, 22, 23),
    ("receiving gradients", 0, 23, 60),  # its send begins at 56: 33 bubble, 4 exposed
    ("backward", 0, 60, 80),
    ("receiving gradients", 1, 80, 82),  # its send began at 77: 2 exposed
    ("backward", 1, 82, 102),
    ("waiting for sends", None, 102, 103),  # nobody waits for them: 1 bubble
    ("agreeing on the step", None, 103, 110),  # the last to come: 7 exposed
    ("update", None, 111, 113),  # after 1 in no span
]
STAGE_1 = [
    ("waiting for data", None, 0, 2),
    ("receiving activations", 0, 2, 15),  # its send begins at 11: 9 bubble, 4 exposed
    ("forward", 0, 15, 25),
    ("receiving activations", 1, 25, 26),  # 1 exposed
    ("forward", 1, 26, 36),
    ("loss", 0, 36, 38),
    ("backward", 0, 38, 56),
    ("sending gradients", 0, 56, 57),
    ("loss", 1, 57, 59),
    ("allreduce launched", None, 60, 60),
    ("backward", 1, 59, 77),
    ("sending gradients", 1, 77, 78),
    ("waiting for sends", None, 78, 82),  # stage 0 is busy until 80, then waits for it: 2 bubble, 2 exposed
    ("agreeing on the step", None, 82, 110),  # stage 0 comes at 103: 21 bubble, 7 exposed
    ("update", None, 110, 115),
]
EXPECTED_MS = {
    Where(0, 0): {
        "forward": 20,
        "backward": 40,
        "optimizer": 2,
        "bubble": 34,
        "recv": 6,
        "send": 2,
        "allreduce": 7,
        "data-wait": 1,
        "other": 1,
    },
    Where(0, 1): {"forward": 20, "backward": 40, "optimizer": 5, "bubble": 32, "recv": 5, "send": 4, "allreduce": 7, "data-wait": 2},
}


def rank_trace(rows: list[tuple[str, int | None, int, int]], steps: tuple[int, ...] = (7,)) -> RankTrace:
    again = [
        [name, i, step, (start + 200 * n + 5000) * MS, (end + 200 * n + 5000) * MS]
        for n, step in enumerate(steps)
        for name, i, start, end in rows
    ]
    cost = RecordingCost(spans_per_step=len(rows), span_s=1e-6, step_s=0.115)
    return RankTrace(rows=again, clock_offset_s=0.5, clock_uncertainty_s=2e-5, cost=cost)


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    """The two stages above over steps 7, 8 and 9."""
    place = place_of(0, dp_size=1, pp_size=2)
    ranks = [rank_trace(STAGE_0, (7, 8, 9)), rank_trace(STAGE_1, (7, 8, 9))]
    write_trace(tmp_path / "trace.json", chrome_trace(place, ranks, {"schedule": "gpipe", "micro-batches": 2}))
    return tmp_path / "trace.json"


def step_of(**rows: list[tuple[str, str, int | None, float, float]]) -> StepSpans:
    """r0s1=[(name, category, micro-batch, start, end)] -> the spans of a step."""
    return {
        Where(int(key[1]), int(key[3])): [TraceSpan(name, category, 1, i, start, end) for name, category, i, start, end in of_stage]
        for key, of_stage in rows.items()
    }


def seconds(spans: StepSpans, where: Where) -> dict[str, float]:
    found = dict.fromkeys(KINDS, 0.0)
    for piece in step_pieces(spans)[where]:
        found[piece.kind] += piece.end - piece.start
    return {kind: s for kind, s in found.items() if s}


def test_spans_nest_and_a_failing_block_leaves_its_name() -> None:
    spans = Spans(record=True)
    spans.enter_step(12)
    with spans.span("backward", 3):
        with spans.span("weight gradient", 1):
            assert spans.in_words == "step 12, weight gradient of micro-batch 1"
        spans.mark("allreduce launched")
        assert spans.in_words == "step 12, backward of micro-batch 3"
    assert [(span.name, span.micro_batch, span.step) for span in spans.recorded] == [
        ("weight gradient", 1, 12),
        ("allreduce launched", None, 12),
        ("backward", 3, 12),
    ]
    with pytest.raises(OSError, match="gone"), spans.span("allreduce"), spans.span("forward", 4):
        raise OSError("gone")
    assert spans.in_words == "step 12, forward of micro-batch 4"
    assert len(spans.recorded) == 3, "what failed is no work that was done"


def test_recording_starts_and_stops_and_waits_for_the_device_before_an_end_is_taken() -> None:
    now = [0.0]
    spans = Spans(clock=lambda: now[0])

    def device_is_done() -> None:
        now[0] += 5

    with spans.span("forward", 0):
        spans.start_recording(device_is_done)
    with spans.span("forward", 1):
        now[0] += 1
    recorded = spans.stop_recording()
    with spans.span("forward", 2):
        now[0] += 1
    assert recorded == [Span("forward", 1, 0.0, 6.0, None)], "only spans that were opened while recording"
    assert spans.recorded == [] and now[0] == 7.0, "nothing is recorded, and nobody waits, after the end"


def test_the_cost_of_recording_is_said_as_a_share_of_a_step() -> None:
    """A step of 46.2 ms with 66 spans of 2 us each."""
    spans = [Span("forward", i, i * 0.7e-3, (i + 1) * 0.7e-3, step) for step in (1, 2) for i in range(66)]
    cost = recording_cost(spans, 2e-6)
    assert cost.spans_per_step == 66 and cost.step_s == pytest.approx(0.0462)
    assert cost.share == pytest.approx(66 * 2e-6 / 0.0462)


def test_the_cost_of_a_span_is_measured() -> None:
    assert 0 < span_cost_s(num_batches=3, batch_size=10) < 1


def test_three_ranks_recover_how_their_clocks_were_shifted(tmp_path: Path) -> None:
    shifts = (12.5, -3000.25, 77.125)

    def rank_main(rank: int, store: dist.Store) -> None:
        place = place_of(rank, dp_size=1, pp_size=3)
        join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
        found = offset_to_rank_0(place, CPU, lambda: time.perf_counter() + shifts[rank])
        error = abs(found.seconds - (shifts[0] - shifts[rank]))
        assert error <= found.uncertainty + 1e-6, (error, found)
        assert found.uncertainty < 0.5 and (found.uncertainty > 0) == (rank > 0)

    run_ranks(rank_main, 3, tmp_path)


def test_a_drifting_clock_is_corrected_evenly() -> None:
    first, last = ClockOffset(100.0, 5.0, 1e-5), ClockOffset(200.0, 5.01, 1e-5)
    assert on_rank_0(100.0, first, last) == 105.0
    assert on_rank_0(150.0, first, last) == pytest.approx(155.005)
    assert on_rank_0(200.0, first, last) == pytest.approx(205.01)
    assert on_rank_0(1.0, first, first) == 6.0


def test_two_ranks_with_different_clocks_make_one_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    def rank_main(rank: int, store: dist.Store) -> None:
        place = place_of(rank, dp_size=1, pp_size=2)
        join_process_group(place, dist.PrefixStore("groups", store), "gloo", COLLECTIVE_TIMEOUT)
        job_store = dist.PrefixStore("job", store)
        spans = Spans(clock=lambda: time.perf_counter() + 1000.0 * rank)
        profiler = TidyProfiler(
            place=place, device=CPU, spans=spans, store=job_store, path=path, num_steps=3, num_steps_to_come=8, about={"schedule": "gpipe"}
        )
        message = torch.zeros(4)
        for step in range(1, 9):
            profiler.before_step()
            spans.enter_step(step)
            if rank == 0:
                with spans.span("forward", 0):
                    time.sleep(0.02)
                with spans.span("sending activations", 0):
                    dist.send(message, dst=1)
            else:
                with spans.span("receiving activations", 0):
                    dist.recv(message, src=0)
            with spans.span("agreeing on the step"):
                dist.all_reduce(message)
        profiler.finish()
        profiler.finish()  # nothing is left to do
        assert not job_store.check(["trace/1"]) and not job_store.check(["trace/1/0"])
        assert spans.recorded == []

    run_ranks(rank_main, 2, tmp_path)
    assert [entry.name for entry in tmp_path.glob("*.json*")] == ["trace.json"]
    trace = read_trace(path)
    assert sorted(trace.steps) == [2, 3, 4], "the second and those after it"
    uncertainty = trace.about["ranks"][1]["clock_uncertainty_s"]
    assert abs(trace.about["ranks"][1]["clock_offset_s"] + 1000.0) < uncertainty + 1e-6
    for of_step in trace.steps.values():
        (sent,) = (span for span in of_step[Where(0, 0)] if span.name == "sending activations")
        (received,) = (span for span in of_step[Where(0, 1)] if span.name == "receiving activations")
        assert received.end >= sent.start - uncertainty and received.start < sent.start + 100
    for row in shares(trace):
        assert sum(row.of.values()) == pytest.approx(1.0) and 0 < row.seconds < 30
    assert shares(trace)[1].bubble > 0, "stage 1 waits for stage 0's forwards"
    assert all(rank["overhead"] > 0 for rank in trace.about["ranks"])


def test_a_short_run_is_recorded_whole(tmp_path: Path) -> None:
    def rank_main(rank: int, store: dist.Store) -> None:
        place = place_of(0, dp_size=1, pp_size=1)
        join_process_group(place, store, "gloo", COLLECTIVE_TIMEOUT)
        spans = Spans()
        profiler = TidyProfiler(
            place=place, device=CPU, spans=spans, store=store, path=tmp_path / "t.json", num_steps=5, num_steps_to_come=2, about={}
        )
        for step in (1, 2):
            profiler.before_step()
            spans.enter_step(step)
            with spans.span("forward", 0):
                pass
        profiler.finish()

    run_ranks(rank_main, 1, tmp_path)
    assert sorted(read_trace(tmp_path / "t.json").steps) == [1, 2]


def test_many_spans_pass_through_the_store_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "PIECE_BYTES", 64)
    store, sent = dist.HashStore(), rank_trace(STAGE_1, tuple(range(20)))
    tracing._put(store, 1, sent)
    assert store.num_keys() > 5
    assert tracing._take(store, 1) == sent
    assert store.num_keys() == 0


def test_the_trace_is_in_chromes_format(trace_file: Path) -> None:
    content = json.loads(trace_file.read_text())
    events = content["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "i"}
    names = {(event["name"], event["pid"], event["tid"]): event["args"] for event in events if event["ph"] == "M"}
    assert names["process_name", 0, 0] == {"name": "replica 0"} and names["thread_name", 0, 1] == {"name": "stage 1 (rank 1)"}
    timed = [event for event in events if event["ph"] == "X"]
    assert len(timed) == 3 * (len(STAGE_0) + len(STAGE_1) - 1)
    for event in timed:
        assert isinstance(event["name"], str) and event["cat"] in KINDS and event["ts"] >= 0 and event["dur"] >= 0
        assert event["pid"] == 0 and event["tid"] in (0, 1) and event["args"]["step"] in (7, 8, 9)
    assert min(event["ts"] for event in timed) == 0 and [e["ts"] for e in timed] == sorted(e["ts"] for e in timed)
    forward = next(event for event in timed if event["name"] == "forward")
    assert forward["cat"] == "forward" and forward["args"] == {"step": 7, "micro_batch": 0}
    assert (forward["ts"], forward["dur"]) == (1000.0, 10_000.0), "microseconds"
    assert next(event for event in events if event["ph"] == "i")["s"] == "t"
    about = content["otherData"]
    assert about["format"] == TRACE_FORMAT and (about["stages"], about["replicas"], about["schedule"]) == (2, 1, "gpipe")
    assert about["ranks"][1]["clock_uncertainty_s"] == 2e-5 and about["ranks"][1]["overhead"] == pytest.approx(15e-6 / 0.115)


def test_shares_are_those_computed_by_hand(trace_file: Path) -> None:
    trace = read_trace(trace_file)
    for step, num_steps in ((None, 3), (8, 1)):
        for row in shares(trace, step):
            expected = EXPECTED_MS[row.where]
            total = sum(expected.values())
            assert row.seconds == pytest.approx(num_steps * total / 1000)
            assert row.of == pytest.approx({kind: expected.get(kind, 0) / total for kind in KINDS})
            assert sum(row.of.values()) == pytest.approx(1.0)
            assert row.busy == pytest.approx(60 / total) and row.bubble == pytest.approx(expected["bubble"] / total)
            assert row.exposed_communication == pytest.approx((expected["recv"] + expected["send"] + expected["allreduce"]) / total)


def test_inner_spans_take_their_time_from_outer_ones() -> None:
    spans = step_of(
        r0s0=[
            ("backward", "backward", 0, 0.0, 10.0),
            ("weight gradient", "weight-grad", 0, 2.0, 5.0),
            ("allreduce", "allreduce", None, 3.0, 4.0),
            ("saving a checkpoint", "other", None, 12.0, 20.0),
        ]
    )
    assert seconds(spans, Where(0, 0)) == {"backward": 7.0, "weight-grad": 2.0, "allreduce": 1.0, "other": 10.0}


def test_replicas_wait_for_their_own_stage_only_and_accumulation_repeats_micro_batches() -> None:
    def stage(arrival: float) -> list[tuple[str, str, int | None, float, float]]:
        return [("backward", "backward", 0, 0.0, arrival), ("allreduce", "allreduce", None, arrival, 20.0)]

    spans = step_of(r0s0=stage(8), r1s0=stage(18), r0s1=stage(5), r1s1=stage(6))
    assert seconds(spans, Where(0, 0)) == {"backward": 8.0, "bubble": 10.0, "allreduce": 2.0}
    assert seconds(spans, Where(0, 1)) == {"backward": 5.0, "bubble": 1.0, "allreduce": 14.0}
    send, receive = ("sending activations", "send", 0), ("receiving activations", "recv", 0)
    spans = step_of(r0s0=[(*send, 3.0, 3.5), (*send, 8.0, 8.5)], r0s1=[(*receive, 0.0, 4.0), (*receive, 4.0, 10.0)])
    assert seconds(spans, Where(0, 1)) == {"bubble": 7.0, "recv": 3.0}
    with pytest.raises(UserError, match="step 1 of replica 0, stage 1 has receiving activations of micro-batch 0 and stage 0 no sending"):
        step_pieces(step_of(r0s0=[(*send, 3.0, 3.5)], r0s1=[(*receive, 0.0, 4.0), (*receive, 4.0, 10.0)]))


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 50), st.integers(0, 20)), min_size=1))
def test_every_moment_has_exactly_one_kind(drawn: list[tuple[str, int, int]]) -> None:
    rows = [("some work", kind, None, float(start), float(start + length)) for kind, start, length in drawn]
    pieces = step_pieces(step_of(r0s0=[*rows, ("the first", "other", None, -1.0, 0.0)]))[Where(0, 0)]
    assert pieces[0].start == -1.0 and pieces[-1].end == max(0.0, *(end for *_, start, end in rows if end > start), 0.0)
    assert all(piece.end > piece.start for piece in pieces)
    assert all(before.end == after.start for before, after in itertools.pairwise(pieces))


def test_the_picture_shows_each_kind_as_large_as_its_share(trace_file: Path, tmp_path: Path) -> None:
    from PIL import Image

    png = tmp_path / "out.png"
    draw(read_trace(trace_file), png)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    assert width > 1000 and height > 200
    pixels = np.asarray(Image.open(png).convert("RGB")).reshape(-1, 3)

    def area(kind: str) -> int:
        colour = [int(COLOURS[kind][n : n + 2], 16) for n in (1, 3, 5)]
        return int((pixels == colour).all(axis=1).sum())

    assert area("backward") / area("forward") == pytest.approx(80 / 40, rel=0.1)
    assert area("bubble") / area("backward") == pytest.approx(66 / 80, rel=0.1)
    assert area("recv") / area("backward") == pytest.approx(11 / 80, rel=0.35)
    assert area("weight-grad") == 0, "kinds that do not occur are not in the legend either"


def test_the_tool_prints_shares_and_draws_the_step_that_was_asked_for(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--png", str(tmp_path / "a.png"), str(trace_file), "--step=9"]) == 0
    out = capsys.readouterr().out
    assert "stages 2, replicas 1, schedule gpipe, micro-batches 2" in out and "clocks agree within 0.02 ms" in out
    table = [line.split() for line in out.splitlines() if line.split()[:1] in (["0"], ["mean"])]
    assert table[0][:3] == ["0", "0", "53.1"] and float(table[0][-1]) == 0.113, "busy 60 of 113 ms"
    assert "bubble 29.0 %, exposed communication 13.6 %, busy 52.6 %" in out
    assert "drew step 9" in out and (tmp_path / "a.png").stat().st_size > 5000
    assert main([str(trace_file)]) == 0
    assert "drew" not in capsys.readouterr().out


def test_what_the_user_can_cure_is_one_line(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.json").write_text('{"traceEvents": []}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "text").write_bytes(b"\xff\xfe no JSON")
    (tmp_path / "damaged.json").write_text(json.dumps({"traceEvents": [{"ph": "X"}], "otherData": {"format": TRACE_FORMAT}}))
    (tmp_path / "empty.json").write_text(json.dumps({"traceEvents": [], "otherData": {"format": TRACE_FORMAT}}))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for arguments, message in (
        ([str(tmp_path / "missing")], "missing: No such file"),
        ([str(tmp_path)], "Is a directory"),
        ([str(tmp_path / "other.json")], "is of format None"),
        ([str(tmp_path / "list.json")], "is of format None"),
        ([str(tmp_path / "text")], "is no JSON"),
        ([str(tmp_path / "damaged.json")], "is damaged"),
        ([str(tmp_path / "empty.json")], "holds none"),
        ([str(trace_file), "--step", "6", "--png", str(tmp_path / "c.png")], "6 is not: .* holds 7, 8, 9"),
        ([str(trace_file), "--step", "7"], "--step chooses the step that --png draws"),
        ([str(trace_file), "--png", str(tmp_path / "b.svg")], "--png must name a .png file"),
        ([str(trace_file), "--png", str(tmp_path / "b.png")], "pip install matplotlib"),
        ([str(trace_file), "--pgn", "x"], "did you mean --png"),
        ([], "Usage: python -m training.timeline TRACE"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        with pytest.raises(UserError, match=message):
            raise UserError(error)
        assert error.startswith("error: ") and len(error.splitlines()) == 1
    monkeypatch.undo()
    assert main([str(trace_file), "--png", str(trace_file / "b.png")]) == 1
    assert "--png must be a file that can be written" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    """Root may write into read-only folders, so these are places where nobody may."""
    (tmp_path / "file").write_text("kept")
    for path, reason in (
        (tmp_path / "file" / "trace.json", "(Not a directory|File exists)"),
        (Path("/proc/self/trace.json"), "No such file"),
        (tmp_path, "it is a folder"),
        (Path("/dev/null"), "it is no ordinary file"),
        (tmp_path / ("x" * 300), "name too long"),
    ):
        with pytest.raises(UserError, match=rf"--profiling tidy_profiling writes its trace .*{reason}.*Name a file"):
            check_trace_path(path)
    assert (tmp_path / "file").read_text() == "kept"
    model = tmp_path / "config.json"
    model.write_text('{"model_type": "gptj"}')
    with pytest.raises(UserError, match=r"config\.json cannot be it: it holds something else, which would be lost"):
        check_trace_path(model)
    assert model.read_text() == '{"model_type": "gptj"}'
    (tmp_path / "empty").touch()
    check_trace_path(tmp_path / "empty")
    check_trace_path(tmp_path / "new" / "folders" / "trace.json")
    assert list((tmp_path / "new" / "folders").iterdir()) == [], "looking leaves nothing behind"


def test_a_trace_replaces_the_older_one_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    write_trace(path, {"one": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracing.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*trace\.json: No space left"):
        write_trace(path, {"two": 2})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"one": 1} and list(tmp_path.iterdir()) == [path]
    write_trace(path, {"two": 2})
    assert json.loads(path.read_text()) == {"two": 2}
