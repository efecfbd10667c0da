"""What the ranks say of how far they are."""

from dataclasses import asdict

import pytest

from comms.heartbeat import Beat
from comms.spans import Spans


def counted(spans: Spans) -> tuple[str, int, int, str]:
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
    assert counted(spans) == ("preparing data", 0, 0, "")
    spans.enter_step(3)
    spans.start_part(16, "micro-batches")
    spans.advance()
    with spans.part("evaluating", 100, "sequences") as part:
        part.add(7)
        assert counted(spans) == ("evaluating", 7, 100, "sequences")
        assert spans.in_words == "step 3, evaluating"
    assert counted(spans) == ("step 3", 1, 16, "micro-batches")
    spans.enter_step(4)
    assert counted(spans) == ("step 4", 0, 0, "")


def test_a_part_that_fails_stays_what_was_done() -> None:
    spans = Spans()

    def read() -> None:
        with spans.part("loading weights", 10, "bytes") as part:
            part.add(4)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        read()
    assert counted(spans) == ("loading weights", 4, 10, "bytes")


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
