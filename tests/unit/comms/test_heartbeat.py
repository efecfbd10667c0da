"""Who is taken for lost: the rules, with times of a test's own."""

import dataclasses

import pytest

from comms.deadlines import DEADLINES
from comms.heartbeat import BEAT_S, STEPS_WITHOUT_PROGRESS, WAKING_S, Beat, Pulse, Standstill, find_overdue
from comms.spans import Spans

NOW = 100_000.0
SILENT_S, STUCK_S, FIRST_STEP_S = DEADLINES.silent_s, DEADLINES.step_s, DEADLINES.first_step_s


def pulse(*, still_s: float, silent_s: float = 0.0, in_step: bool = True, waits: bool = False, longest_step_s: float = 1.0) -> Pulse:
    """Of a rank that has not got on for ``still_s`` and not been heard for ``silent_s``."""
    doing = Beat(doing="a test", for_s=0.0, moves=1, is_in_step=in_step, waits=waits, longest_step_s=longest_step_s)
    return Pulse(came_at=NOW - silent_s, moved_at=NOW - still_s, beat=doing)


def lost(*pulses: Pulse, peer_timeout_s: float | None = None) -> int | None:
    found = find_overdue(dict(enumerate(pulses)), NOW, DEADLINES.for_peer_timeout(peer_timeout_s))
    return None if found is None else found.rank


def test_the_longest_silence_counts_first() -> None:
    assert lost() is None
    assert lost(pulse(still_s=0), pulse(still_s=0, silent_s=SILENT_S - 1)) is None
    assert lost(pulse(still_s=0), pulse(still_s=0, silent_s=SILENT_S + 1), pulse(still_s=0, silent_s=SILENT_S + 2)) == 2
    assert lost(pulse(still_s=0, silent_s=4), peer_timeout_s=3) == 0


def test_who_works_and_does_not_get_on_is_lost_and_not_those_who_wait_for_it() -> None:
    waiting = pulse(still_s=STUCK_S + 50, waits=True)
    assert lost(waiting, pulse(still_s=STUCK_S - 1)) is None
    assert lost(waiting, pulse(still_s=STUCK_S + 1)) == 1
    assert lost(waiting, pulse(still_s=STUCK_S + 1, in_step=False)) is None, "a save takes as long as it takes"
    all_waiting = {0: waiting, 1: pulse(still_s=STUCK_S + 1, waits=True)}
    found = find_overdue(all_waiting, NOW, DEADLINES)
    assert found is not None and found.rank == 0 and found.all_wait, "for each other, or for nothing"
    found = find_overdue({0: waiting, 1: pulse(still_s=STUCK_S + 1)}, NOW, DEADLINES)
    assert found is not None and not found.all_wait


def test_outside_of_steps_ranks_are_lost_where_none_of_them_gets_on_for_hours() -> None:
    long = DEADLINES.outside_s + 100
    saving, gone_on = pulse(still_s=long, in_step=False), pulse(still_s=10, in_step=False)
    assert lost(saving, gone_on) is None, "one that waits for another that gets on is not to blame"
    assert lost(saving, pulse(still_s=DEADLINES.outside_s - 1, in_step=False)) is None
    assert lost(saving, pulse(still_s=long + 5, in_step=False)) == 1, "the one that has not got on for longest"
    assert lost(saving, pulse(still_s=long + 5, waits=True)) == 0, "one that waits inside a step waits for somebody"


def test_the_limit_follows_the_longest_step() -> None:
    for peer_timeout_s in (None, 3.0):
        slow = pulse(still_s=STEPS_WITHOUT_PROGRESS * 100.0 - 1, longest_step_s=100.0)
        assert lost(slow, peer_timeout_s=peer_timeout_s) is None
        slow.moved_at -= 2
        assert lost(slow, peer_timeout_s=peer_timeout_s) == 0
    assert lost(pulse(still_s=FIRST_STEP_S - 1, longest_step_s=0.0)) is None
    assert lost(pulse(still_s=FIRST_STEP_S + 1, longest_step_s=0.0)) == 0


def test_time_in_which_a_process_does_not_run_is_not_held_against_it() -> None:
    """Stopped for 12 of every 12.25 s, it takes 50 times as long for a span."""
    alive = Beat(doing="a test", for_s=0.0, moves=1, is_in_step=True, waits=False, longest_step_s=1.0)
    one = Pulse(came_at=NOW, moved_at=NOW, beat=alive)
    for n in range(1, 100):
        one.feel(dataclasses.replace(alive, stood_still_s=12.0 * n), NOW + 12.25 * n)
        assert find_overdue({0: one}, NOW + 12.25 * n, DEADLINES) is None
    hangs = Pulse(came_at=NOW, moved_at=NOW, beat=alive)
    hangs.feel(alive, NOW + STUCK_S + 1)
    assert find_overdue({0: hangs}, NOW + STUCK_S + 1, DEADLINES) is not None


def test_rank_0_works_while_it_reads_its_data_and_the_others_wait_for_that() -> None:
    for reads in (True, False):
        spans = Spans()
        spans.reads_data = reads
        spans.enter_step(3)
        with spans.span("waiting for data"):
            assert spans.beat.waits is not reads


@pytest.mark.parametrize(
    ("name", "is_in_step", "waits"),
    [
        ("forward", True, False),
        ("receiving gradients", True, True),
        ("evaluating", True, True),  # others may be generating answers meanwhile: lost only where all stand still
        ("receiving tokens", True, True),
        ("choosing tokens", True, False),
        ("saving a checkpoint", False, False),
    ],
)
def test_what_the_work_of_a_step_is(name: str, is_in_step: bool, waits: bool) -> None:
    spans = Spans()
    with spans.span(name):
        assert not spans.beat.is_in_step, "outside of steps"
    spans.enter_step(3)
    with spans.span(name):
        assert (spans.beat.is_in_step, spans.beat.waits) == (is_in_step, waits)


def test_who_judges_knows_that_it_stood_still_itself() -> None:
    own, slept = Standstill(NOW), pytest.approx(20 - BEAT_S)
    assert own.look(NOW + BEAT_S) == 0.0 and own.look(NOW + 2.5 * BEAT_S) == 0.0, "a look may come late"
    now = woke_at = NOW + 2.5 * BEAT_S + 20
    assert own.lately_s(now) == slept, "nobody has looked yet"
    assert own.look(now) == slept
    while now < woke_at + WAKING_S:
        assert own.lately_s(now) == slept
        now += BEAT_S
        assert own.look(now) == 0.0
    assert own.lately_s(now) == 0.0
