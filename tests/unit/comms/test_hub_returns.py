"""Who comes to the hub while a job is running, or meets again: who is taken in, who waits, who is refused. Ranks here are connections
that say what a test likes; whole jobs: test_coming_back.py."""

import dataclasses
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

import pytest
from support.hubs import RawRank, hello_of, open_hub

from comms.deadlines import DEADLINES
from comms.heartbeat import BEAT_S, Beat
from comms.members import Rules
from comms.place import whole_replicas

WORLD = 4  # 2 replicas of 2 stages


def who_goes_on(present: Collection[int]) -> list[int]:
    return whole_replicas(present, dp_size=2, pp_size=2)


def rules(**others: Any) -> Rules:
    return Rules(**{"may_meet_again": True, "who_goes_on": who_goes_on, "is_first_meeting": False, **others})


def join(port: int, rank: int, **fields: Any) -> RawRank:
    one = RawRank(port)
    one.say_hello(hello_of(rank, WORLD, **fields))
    return one


def wait_until(what: Callable[[], bool], within_s: float) -> None:
    give_up = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def roster_of(said: dict[str, Any]) -> list[int]:
    return [entry["rank"] for entry in said["formed"]["roster"]]


def beat(one: RawRank, for_s: float = 0.0, moves: int | None = None) -> None:
    """moves: None: it gets on."""
    moves = time.monotonic_ns() if moves is None else moves
    said = Beat(doing="a test", for_s=for_s, moves=moves, is_in_step=True, waits=False, longest_step_s=0.1)
    one.say({"beat": asdict(said)})


def test_a_rank_taken_twice_while_it_waits_to_be_taken_back_is_named() -> None:
    with open_hub(WORLD, rules=rules(dead=frozenset({3}))) as (hub, port):
        members = [join(port, rank) for rank in (0, 1)]
        first = join(port, 2)
        assert roster_of(members[0].hear()) == [0, 1] and "wait" in first.hear()
        back = join(port, 3, pid=100)
        assert "wait" in back.hear()
        wait_until(lambda: hub.replica_is_back, 5)
        again = join(port, 3, pid=101)
        assert again.hear()["refused"].startswith("every process needs its own --rank; rank 3 is taken twice: by pid 100 on here")
        assert hub.replica_is_back, "the one that came first still waits"
        after_restart = join(port, 3, pid=102, attempt=1)
        assert "wait" in after_restart.hear(), "its supervisor has started it again"
        for one in (*members, first, back, again, after_restart):
            one.close()


def test_a_rank_of_another_job_is_turned_away_alone_and_the_seat_stays_free() -> None:
    with open_hub(WORLD, rules=rules()) as (_, port):
        early = join(port, 1)
        assert "again" in early.hear(), "rank 0 speaks for the job, and is not here yet"
        ours = {rank: join(port, rank) for rank in (0, 2, 3)}
        other = join(port, 1, plan={"--seed": 7})
        assert "rank 1 (host here" in (said := other.hear()["refused"]) and "--seed" in said
        ours[1] = join(port, 1)
        for one in ours.values():
            assert roster_of(one.hear()) == [0, 1, 2, 3]
        for one in (*ours.values(), early, other):
            one.close()


def test_who_falls_silent_while_it_waits_does_not_count_as_back() -> None:
    with open_hub(WORLD, rules=rules(dead=frozenset({2, 3}), deadlines=DEADLINES.for_peer_timeout(4 * BEAT_S))) as (hub, port):
        members = [join(port, rank) for rank in (0, 1)]
        waiting = [join(port, rank) for rank in (2, 3)]
        assert roster_of(members[0].hear()) == [0, 1]
        wait_until(lambda: hub.replica_is_back, 5)

        def is_back(*more: RawRank) -> bool:
            for one in (*members, waiting[0], *more):  # rank 3 says nothing
                beat(one)
            return hub.replica_is_back

        wait_until(lambda: not is_back(), 10 * BEAT_S)
        another = join(port, 3, pid=7)
        assert "wait" in another.hear(), "its place is free again"
        wait_until(lambda: is_back(another), 5)
        for one in (*members, *waiting, another):
            one.close()


@pytest.mark.parametrize("gets_on", [True, False])
def test_a_rank_that_has_not_left_the_meeting_before_is_waited_for_while_it_beats_and_gets_on(gets_on: bool) -> None:
    """It is in the middle of a long computation. The limits: a second to come, and five seconds without progress."""
    deadlines = dataclasses.replace(DEADLINES, step_s=5.0)
    again = Rules(may_meet_again=True, is_first_meeting=False, deadlines=deadlines)
    with open_hub(2, rules=Rules(may_meet_again=True, deadlines=deadlines)) as (first, port):
        host, busy = RawRank(port), RawRank(port)
        for rank, one in enumerate((host, busy)):
            one.say_hello(hello_of(rank))
        assert "formed" in host.hear() and "formed" in busy.hear()
        first.meet_again("a link broke")
        assert "again" in host.hear() and "again" in busy.hear()
        first.retire()
        with open_hub(2, deadline_s=1.0, rules=again, port=port, before=first) as (_, port):
            came, began = RawRank(port), time.monotonic()
            came.say_hello(hello_of(0))
            while (for_s := time.monotonic() - began) < 4.0:
                beat(busy, for_s=for_s + (0.0 if gets_on else 3.0), moves=2)
                time.sleep(BEAT_S / 2)
            if gets_on:
                busy.close()
                busy = RawRank(port)
                busy.say_hello(hello_of(1))
                assert "formed" in came.hear() and "formed" in busy.hear()
            else:
                said = came.hear()["refused"]
                assert "within 1 s (to meet again); missing: rank 1 (last heard of" in said and "in a test)" in said, said
            for one in (host, busy, came):
                one.close()


@pytest.mark.parametrize("takes_in", [False, True])
def test_ranks_that_hold_nothing_wait_where_the_others_can_go_on_from_what_they_hold(takes_in: bool) -> None:
    """After a broken link; all ranks are taken in where they have agreed on it."""
    with open_hub(WORLD, rules=rules(takes_in=takes_in)) as (hub, port):
        held = {0: "m7", 1: "m7", 2: "m5", 3: ""}  # rank 2 was left behind in an earlier meeting, rank 3 has been started anew
        ranks = {rank: join(port, rank, meeting=meeting) for rank, meeting in held.items()}
        assert roster_of(ranks[0].hear()) == ([0, 1, 2, 3] if takes_in else [0, 1])
        assert ("formed" if takes_in else "wait") in ranks[3].hear()
        wait_until(lambda: hub.replica_is_back is not takes_in, 5)
        for one in ranks.values():
            one.close()


def test_where_the_replica_of_rank_0_holds_nothing_whole_all_go_back_together() -> None:
    with open_hub(WORLD, rules=rules(takes_in=False)) as (_, port):
        ranks = {rank: join(port, rank, meeting="" if rank == 1 else "m7") for rank in range(WORLD)}
        assert roster_of(ranks[0].hear()) == [0, 1, 2, 3]
        for one in ranks.values():
            one.close()


def test_whoever_comes_hears_it_where_rank_0_does_not_get_to_the_next_meeting() -> None:
    """It hangs between the two; its hub's thread lives on and would say "again" for ever."""
    deadlines = dataclasses.replace(DEADLINES, link_back_s=1.0)
    with open_hub(2, rules=Rules(may_meet_again=True, deadlines=deadlines)) as (hub, port):
        host, other = RawRank(port), RawRank(port)
        for rank, one in enumerate((host, other)):
            one.say_hello(hello_of(rank))
        assert "formed" in host.hear() and "formed" in other.hear()
        hub.meet_again("a link broke")

        def comes() -> dict[str, Any]:
            one = RawRank(port)
            one.say_hello(hello_of(1))
            said = one.hear()
            one.close()
            return said

        began = time.monotonic()
        while time.monotonic() - began < 2.0:
            beat(host)
            assert comes() == {"again": "a link broke"}, "it beats and gets on"
            time.sleep(0.1)
        time.sleep(1.2)
        said = comes()
        assert "rank 0 does not come to the next meeting (last heard of" in said["refused"] and said["restart_helps"]
        for one in (host, other):
            one.close()


def test_a_rank_whose_connection_breaks_at_the_new_door_has_its_time_to_come_again() -> None:
    rules = Rules(may_meet_again=True, is_first_meeting=False)
    with open_hub(3, deadline_s=2.0, rules=rules) as (_, port):
        host, cut = RawRank(port), RawRank(port)
        host.say_hello(hello_of(0, 3))
        cut.say_hello(hello_of(1, 3))
        time.sleep(1.6)
        cut.close()
        slow = RawRank(port)
        slow.say_hello(hello_of(2, 3))
        time.sleep(1.0)
        back = RawRank(port)
        back.say_hello(hello_of(1, 3))
        assert "formed" in host.hear() and "formed" in back.hear()
        for one in (host, slow, back):
            one.close()


def test_a_replica_that_is_on_its_way_is_not_left_behind_because_another_one_is_dead() -> None:
    """Three replicas: the first is here, the second computes, the third has died with the link."""

    def whole(present: Collection[int]) -> list[int]:
        return sorted(present)

    both = Rules(may_meet_again=True, who_goes_on=whole)
    again = Rules(may_meet_again=True, who_goes_on=whole, is_first_meeting=False, grace_s=1.0)
    with open_hub(3, rules=both) as (first, port):
        ranks = [RawRank(port) for _ in range(3)]
        for rank, one in enumerate(ranks):
            one.say_hello(hello_of(rank, 3))
        assert all("formed" in one.hear() for one in ranks)
        first.meet_again("a link broke")
        ranks[2].close()
        first.retire()
        with open_hub(3, rules=again, port=port, before=first) as (_, port):
            host = RawRank(port)
            host.say_hello(hello_of(0, 3))
            began = time.monotonic()
            while time.monotonic() - began < 3.0:
                beat(ranks[1])
                time.sleep(BEAT_S / 2)
            ranks[1].close()
            came = RawRank(port)
            came.say_hello(hello_of(1, 3))
            assert roster_of(host.hear()) == [0, 1] == roster_of(came.hear())
            for one in (host, came, ranks[0]):
                one.close()
