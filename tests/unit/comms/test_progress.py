"""Nobody waits in silence: what ranks say of how far they are, and what is shown of that, with a clock of the tests' own."""

import logging
import time
from dataclasses import asdict, replace

import pytest

from comms.heartbeat import Beat
from comms.place import place_of
from comms.progress import EVERY_S, FIRST_S, ProgressLine, amount, counted, eta_in_words, eta_s
from comms.spans import Spans
from training.membership import progress_display
from training.membership.progress_display import STEP_S, UNCOUNTED_S, Overview, say_who_is_missing


def said_by(spans: Spans) -> tuple[str, int, int, str]:
    beat = spans.beat
    return beat.part, beat.done, beat.total, beat.unit


def test_a_beat_says_how_much_is_done_and_is_the_same_behind_the_wire() -> None:
    spans = Spans()
    with spans.part("loading weights", 6_000, "bytes") as part:
        part.add(2_100)
        beat = spans.beat
    assert (beat.part, beat.done, beat.total, beat.unit) == ("loading weights", 2_100, 6_000, "bytes")
    assert beat.doing == "loading weights"
    assert Beat.from_json(asdict(beat)) == beat


def test_a_part_inside_another_stands_for_it_while_it_lasts() -> None:
    spans = Spans()
    spans.enter_phase("preparing data")
    assert said_by(spans) == ("preparing data", 0, 0, "")
    spans.enter_step(3)
    spans.start_part(16, "micro-batches")
    spans.advance()
    with spans.part("evaluating", 100, "sequences") as part:
        part.add(7)
        assert said_by(spans) == ("evaluating", 7, 100, "sequences")
        assert spans.in_words == "step 3, evaluating"
    assert said_by(spans) == ("step 3", 1, 16, "micro-batches")
    spans.enter_step(4)
    assert said_by(spans) == ("step 4", 0, 0, "")


def test_a_part_that_fails_stays_what_was_done() -> None:
    spans = Spans()

    def read() -> None:
        with spans.part("loading weights", 10, "bytes") as part:
            part.add(4)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        read()
    assert said_by(spans) == ("loading weights", 4, 10, "bytes")


def test_whoever_counts_gets_on() -> None:
    now = [0.0]
    spans = Spans(clock=lambda: now[0])
    with spans.part("loading weights", 10, "bytes") as part:
        before, now[0] = spans.beat, 100.0
        assert spans.beat.moves == before.moves and spans.beat.for_s == 100.0
        part.add(0)
        assert spans.beat.moves > before.moves and spans.beat.for_s == 0.0


def test_a_thread_that_reads_ahead_gets_on_only_while_somebody_waits_for_it() -> None:
    spans = Spans()
    spans.enter_step(1)
    with spans.span("forward", 0):
        moves = spans.beat.moves
        spans.moved_during("waiting for data")
        assert spans.beat.moves == moves
    with spans.span("waiting for data"):
        moves = spans.beat.moves
        spans.moved_during("waiting for data")
        assert spans.beat.moves > moves


def test_amounts_are_said_in_units_that_one_can_read() -> None:
    assert amount(2_100_000_000, 6_000_000_000, "bytes") == "2.1 of 6.0 GB (35 %)"
    assert amount(900_000, 12_000_000, "bytes") == "0.9 of 12.0 MB (7 %)"
    assert amount(5, 16, "micro-batches") == "5 of 16 micro-batches (31 %)"
    assert amount(1_200, 0, "records") == "1,200 records"
    assert amount(17, 16, "rounds") == "16 of 16 rounds (100 %)"
    assert [eta_in_words(seconds) for seconds in (None, 42.2, 250, 3_723)] == ["ETA unknown", "ETA 0:42", "ETA 4:10", "ETA 1:02:03"]


def test_the_time_left_follows_the_pace_so_far() -> None:
    assert eta_s(25, 100, 0, 10.0) == 30.0
    assert eta_s(25, 100, 15, 10.0) == 75.0, "what was done before nobody looked is no part of the pace"
    assert eta_s(0, 100, 0, 10.0) is None and eta_s(5, 0, 0, 10.0) is None


def beat(part: str, done: int = 0, total: int = 0, *, unit: str = "bytes", doing: str | None = None, waits: bool = False) -> Beat:
    return Beat(
        doing=part if doing is None else doing,
        for_s=0.0,
        moves=1,
        is_in_step=False,
        waits=waits,
        longest_step_s=0.0,
        part=part,
        done=done,
        total=total,
        unit=unit,
    )


def names(rank: int) -> str:
    return f"rank {rank}"


def test_the_slowest_rank_of_a_phase_is_shown_with_its_time_left() -> None:
    overview = Overview(names)
    for now in (0.0, 10.0):
        rank_0, rank_1 = beat("loading weights", int(5e8 * now), 6_000_000_000), beat("loading weights", int(2.1e8 * now), 6_000_000_000)
        shown = overview.look({0: rank_0, 1: rank_1}, now)
    assert shown is not None and shown.text == "loading weights: rank 1 2.1 of 6.0 GB (35 %), ETA 0:19"
    assert shown.share == 0.35
    shown = overview.look({0: rank_0, 1: replace(rank_1, done=rank_1.total)}, 11.0)
    assert shown is not None and "rank 0" in shown.text, "the other one is through"


def test_a_rank_that_has_not_begun_to_count_up_is_behind_all_that_have() -> None:
    overview = Overview(names)
    overview.look({0: beat("loading weights", 0, 100), 1: beat("loading weights", 0, 100)}, 0.0)
    shown = overview.look({0: beat("loading weights", 10, 100), 1: beat("loading weights", 0, 100)}, 5.0)
    assert shown is not None and shown.text == "loading weights: rank 1 0 of 100 bytes (0 %), ETA unknown"


def test_where_ranks_are_in_different_phases_the_one_that_is_furthest_behind_is_shown() -> None:
    overview = Overview(names)
    overview.look({0: beat("reading", 1, 10), 1: beat("reading", 1, 10)}, 0.0)
    overview.look({0: beat("reading", 2, 10), 1: beat("loading", 0, 10**9)}, 1.0)
    shown = overview.look({0: beat("reading", 9, 10), 1: beat("loading", 1, 10**9)}, 9.0)
    assert shown is not None and shown.text.startswith("reading: rank 0"), "however long the other one will take"


def test_a_rank_that_only_waits_is_not_the_one_that_is_shown() -> None:
    overview = Overview(names)
    waiting, working = beat("preparing data", waits=True), beat("reading data.jsonl", 1, 100)
    overview.look({0: waiting, 1: beat("preparing data")}, 0.0)
    overview.look({0: waiting, 1: working}, 1.0)
    shown = overview.look({0: waiting, 1: replace(working, done=50)}, 11.0)
    assert shown is not None and "rank 1" in shown.text
    shown = overview.look({0: beat("a", waits=True), 1: beat("a", doing="step 4, forward")}, 12.0)
    shown = overview.look({0: beat("a", waits=True), 1: beat("a", doing="a thing of its own")}, 12.0 + UNCOUNTED_S)
    assert shown is not None and shown.text == "a thing of its own (rank 1), for 0:10 so far"


def test_what_is_quick_is_not_shown() -> None:
    overview = Overview(names)
    assert overview.look({}, 0.0) is None
    assert overview.look({0: beat("loading", 0, 9)}, 0.0) is None
    assert overview.look({0: beat("loading", 1, 9)}, FIRST_S - 0.1) is None
    assert overview.look({0: beat("saving", 1, 9)}, FIRST_S + 0.1) is None, "another phase, which has only begun"
    assert overview.look({0: beat("starting")}, 20.0) is None
    assert overview.look({0: beat("starting")}, 20.0 + UNCOUNTED_S - 0.1) is None, "nothing is counted of it"
    assert overview.look({0: beat("starting")}, 20.0 + UNCOUNTED_S) is not None


def in_step(done: int, doing: str, total: int = 16) -> Beat:
    return beat("step 3", done, total, unit="micro-batches", doing=f"step 3, {doing}")


def test_a_step_of_more_than_half_a_minute_says_where_it_is() -> None:
    overview = Overview(names)
    assert overview.look(dict.fromkeys(range(3), in_step(0, "waiting for data", 0)), 0.0) is None
    assert overview.look(dict.fromkeys(range(3), in_step(0, "forward of micro-batch 0")), 2.0) is None
    waiting = replace(in_step(4, "receiving gradients of micro-batch 4"), waits=True, for_s=9.0)
    beats = {0: waiting, 1: in_step(5, "loss of micro-batch 5"), 2: replace(in_step(6, "waiting for sends"), waits=True)}
    assert overview.look(beats, STEP_S - 0.5) is None
    shown = overview.look(beats, STEP_S + 2)
    assert shown is not None
    assert shown.text == "step 3: 4 of 16 micro-batches (25 %) done, ETA 1:30 (rank 1 is in loss of micro-batch 5)"
    shown = overview.look({0: in_step(16, "update"), 1: in_step(16, "allreduce")}, STEP_S + 100)
    assert shown is not None and shown.text == "step 3, update (rank 0), 2:10 after the step began"


def test_a_job_of_one_rank_names_no_rank() -> None:
    overview = Overview(lambda rank: "")
    overview.look({0: beat("loading weights", 0, 100)}, 0.0)
    shown = overview.look({0: beat("loading weights", 50, 100)}, 10.0)
    assert shown is not None and shown.text == "loading weights: 50 of 100 bytes (50 %), ETA 0:10"


def test_a_file_gets_a_line_every_ten_seconds_and_one_for_each_new_thing() -> None:
    now, said = [0.0], []
    line = ProgressLine(said.append, on_terminal=False, clock=lambda: now[0])
    for now[0] in (3.0, 3.5, 3.0 + EVERY_S - 0.1, 3.0 + EVERY_S):
        line.show("loading", f"loading at {now[0]}")
    line.show("saving", "saving")
    line.hide()
    line.show("saving", "saving again")
    assert said == ["loading at 3.0", "loading at 13.0", "saving", "saving again"]


def test_a_command_says_how_far_it_is_without_a_terminal_and_nothing_if_it_is_quick(monkeypatch, capsys) -> None:
    with counted("gathering", 100) as add:
        add(100)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("comms.progress.FIRST_S", 0.1)
    with counted("gathering", 100) as add:
        add(40)
        time.sleep(0.5)
    assert capsys.readouterr().err.startswith("gathering: 40 of 100 bytes (40 %), ETA 0:0")


def test_rank_0_says_every_so_often_who_has_not_come(monkeypatch, caplog) -> None:
    monkeypatch.setattr(progress_display, "MISSING_FIRST_S", 0.1)
    monkeypatch.setattr(progress_display, "MISSING_EVERY_S", 0.2)
    monkeypatch.setattr(progress_display.log, "handlers", [caplog.handler])
    monkeypatch.setattr(progress_display.log, "level", logging.INFO)
    place = place_of(0, dp_size=1, pp_size=3)
    missing = {1, 2}
    with say_who_is_missing(lambda: missing, place):
        time.sleep(0.2)
        missing = {2}
        time.sleep(0.6)
        missing = set()
        time.sleep(0.3)
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0].startswith("waiting for 2 of 3 ranks, for 0:00 so far; missing: rank 1 (stage 1 of 3, replica 0 of 1), rank 2 (")
    assert len(texts) >= 2 and "waiting for 1 of 3 ranks" in texts[-1] and "rank 1 (" not in texts[-1]


def test_where_nobody_counts_any_more_the_rank_that_came_last_is_shown() -> None:
    overview = Overview(names)
    loading, through = beat("loading", 1, 9), beat("loading")
    overview.look({0: loading, 1: loading}, 0.0)
    overview.look({0: through, 1: loading}, 1.0)
    overview.look({0: through, 1: through}, 20.0)
    assert overview.look({0: through, 1: through}, 20.0 + UNCOUNTED_S - 0.1) is None, "rank 0 has only waited"
    shown = overview.look({0: through, 1: through}, 20.0 + UNCOUNTED_S)
    assert shown is not None and shown.text == "loading (rank 1), for 0:10 so far"
