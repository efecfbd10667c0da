"""Whatever comes over the wire is understood or refused: never a crash, a hang or an exception that nobody expects."""

import contextlib
import dataclasses
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.hubs import LOOPBACK, SECRET, RawRank, at_once, hello_of, lifeline_to, open_hub
from support.tiers import num_examples, partly

from comms.deadlines import DEADLINES
from comms.handshake import MAX_LINE_BYTES, Challenge, NotSealed, Reply, Session
from comms.heartbeat import Beat, Pulse, find_overdue
from comms.lifeline import Lifeline, Trouble
from comms.links import PeerLost
from comms.members import Rules
from comms.roster import Hello
from user_error import UserError

pytestmark = partly

fuzzed = settings(max_examples=num_examples(150), deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
live = settings(fuzzed, max_examples=15)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=10
)
objects = st.dictionaries(
    st.sampled_from(["purpose", "who", "challenge", "answer", "hub", "refused"]) | st.text(max_size=8), values, max_size=6
)
lines = st.binary(max_size=300) | objects.map(lambda said: json.dumps(said).encode())
NESTED = b"[" * 100_000
ODD = [
    b"",
    b"\n",
    b"null",
    b"[]",
    b"{}",
    NESTED,
    b'{"a":' * 100_000,
    b'{"challenge": ' + b"9" * 5000 + b"}",
    b'{"who": "\\ud800"}',
    b"\xff\xfe{}",
]


def changed(fields: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """``fields`` with some of them replaced by anything."""
    return st.dictionaries(st.sampled_from(sorted(fields)), values, max_size=3).map(lambda new: {**fields, **new})


def refuses(work: Callable[[bytes], Any], line: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert work(line) is None, f"{line[:100]!r} was let in"


@fuzzed
@given(lines)
def test_the_door_refuses_every_answer_that_is_not_of_the_secret(line: bytes) -> None:
    refuses(Challenge(SECRET).admit, line)


@pytest.mark.parametrize("line", ODD)
def test_odd_lines_are_refused_everywhere(line: bytes) -> None:
    refuses(Challenge(SECRET).admit, line)
    refuses(Reply(SECRET, "rank", "me", Challenge(SECRET).greeting).session, line)
    with pytest.raises(ValueError, match=r"."):
        Reply(SECRET, "rank", "me", line)
    with pytest.raises(NotSealed):
        Session(SECRET, is_hub=True).open(line)


WHO = {"purpose": "rank", "who": "me", "challenge": "00" * 16, "answer": "00" * 32}


@fuzzed
@given(changed(WHO))
def test_an_answer_of_the_right_form_and_odd_content_is_refused(said: dict[str, Any]) -> None:
    refuses(Challenge(SECRET).admit, json.dumps(said).encode())


@fuzzed
@given(lines | changed({"hub": "geo-clm-trainer/2", "challenge": "00" * 16}).map(lambda said: json.dumps(said).encode()))
def test_a_greeting_is_a_hubs_or_a_value_error(line: bytes) -> None:
    with contextlib.suppress(ValueError):
        reply = Reply(SECRET, "rank", "me", line)
        assert reply.line.endswith(b"\n")
        refuses(reply.session, line)


@fuzzed
@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 255))
def test_a_line_that_the_other_end_did_not_seal_is_not_opened(line: bytes, place: int, byte: int) -> None:
    hub, peer = Session(SECRET, is_hub=True), Session(SECRET, is_hub=False)
    with pytest.raises(NotSealed):
        hub.open(line)
    sealed = bytearray(peer.seal({"text": "a" * 200}))
    place %= len(sealed) - 1
    was, sealed[place] = sealed[place], byte
    if byte != was and place != 64:  # the space between code and text carries nothing
        with pytest.raises(NotSealed):
            hub.open(bytes(sealed))


@fuzzed
@given(values | changed(asdict(hello_of(1))))
def test_a_hello_is_one_or_a_value_error(fields: Any) -> None:
    with contextlib.suppress(ValueError):
        hello = Hello.from_json(fields)
        assert isinstance(hello.in_words, str) and not hello.is_signed(SECRET)
        assert hello.signed(SECRET).is_signed(SECRET)


BEAT = asdict(Beat(doing="step 1", for_s=0.5, moves=3, is_in_step=True, waits=False, longest_step_s=1.0, part="step 1", done=2, total=9))


@fuzzed
@given(values | changed(BEAT))
def test_a_beat_is_one_or_a_value_error(fields: Any) -> None:
    with contextlib.suppress(ValueError):
        pulse = Pulse(came_at=0.0, moved_at=0.0)
        pulse.feel(Beat.from_json(fields), 1.0)
        assert isinstance(pulse.last_words(2.0), str)
        find_overdue({0: pulse}, 3.0, DEADLINES)


MESSAGES = st.dictionaries(
    st.sampled_from(["beat", "done", "broken", "failed", "restart_helps", "trace", "formed", "end"]),
    values | changed(BEAT),
    min_size=1,
    max_size=3,
)


@live
@given(st.lists(MESSAGES | objects, max_size=4), st.binary(max_size=200))
def test_a_rank_that_says_anything_ends_the_job_by_its_name_or_not_at_all(messages: list[dict[str, Any]], rest: bytes) -> None:
    """It knows the secret, so it may end the job; but the hub lives on, and the others hear who it was."""
    with open_hub(rules=Rules(deadlines=dataclasses.replace(DEADLINES, suspicion_s=0.01))) as (_, port):
        first, odd = RawRank(port), RawRank(port)
        first.say_hello(hello_of(0))
        odd.say_hello(hello_of(1, pid=2**22 + 1))  # a process that is not there
        assert "formed" in first.hear() and "formed" in odd.hear()
        with contextlib.suppress(OSError):
            for message in messages:
                odd.say(message)
            odd.connection.sendall(rest + b"\n")
        if not any(message.get("done") for message in messages):  # who is done may go
            said = first.hear()
            assert said.get("lost") == 1 and "rank 1" in said["text"], said
        late = RawRank(port)  # the hub lives
        late.say_hello(hello_of(1))
        assert "refused" in late.hear()
        for rank in (first, odd, late):
            rank.close()


@live
@given(values | changed(asdict(hello_of(1))) | lines)
def test_a_rank_whose_hello_is_anything_does_not_keep_the_right_ones_from_meeting(hello: Any) -> None:
    with open_hub(deadline_s=5.0) as (_, port):
        odd = RawRank(port)
        with contextlib.suppress(OSError):
            odd.connection.sendall(hello + b"\n" if isinstance(hello, bytes) else odd.session.seal(hello))
        found = at_once(*(lambda rank=rank: lifeline_to(port).join(hello_of(rank)) for rank in (0, 1)), timeout_s=10)
        assert all(isinstance(formed, dict) and len(formed["roster"]) == 2 for formed in found), found
        odd.close()


class OddHub:
    """Knows the secret, lets one rank in, says ``messages`` and hangs up."""

    def __init__(self, messages: list[Any]) -> None:
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port = int(self._listener.getsockname()[1])
        self._messages = messages
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        self._listener.close()
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as said:
            challenge = Challenge(SECRET)
            connection.sendall(challenge.greeting)
            admitted = challenge.admit(said.readline())
            assert admitted is not None
            answer, session = admitted
            connection.sendall(answer)
            said.readline()  # its hello
            for message in self._messages:
                connection.sendall(message + b"\n" if isinstance(message, bytes) else session.seal(message))
            said.readline()


VERDICTS = st.dictionaries(st.sampled_from(["formed", "refused", "wait", "tick", "restart_helps"]), values, min_size=1, max_size=2)
FORMED = st.fixed_dictionaries(
    {"formed": values | st.fixed_dictionaries({"roster": st.lists(values | changed(asdict(hello_of(0))), max_size=2)})}
)


@live
@given(st.lists(VERDICTS | FORMED, max_size=3), st.binary(max_size=100))
def test_a_rank_whose_hub_says_anything_gets_a_roster_or_a_user_error(messages: list[Any], rest: bytes) -> None:
    hub = OddHub([*messages, rest])
    lifeline = Lifeline((LOOPBACK, hub.port), SECRET, deadline_s=0.3)
    [found] = at_once(lambda: lifeline.join(hello_of(1)), timeout_s=10)
    assert isinstance(found, (UserError, PeerLost, dict)), (messages, found)


AFTERWARDS = st.dictionaries(st.sampled_from(["tick", "end", "again", "lost", "text", "restart_helps", "trace"]), values, max_size=3)


@live
@given(st.lists(AFTERWARDS | objects | st.binary(max_size=50), max_size=4))
def test_a_rank_at_work_whose_hub_says_anything_gets_one_trouble_or_its_end(messages: list[Any]) -> None:
    good = {"roster": [asdict(hello_of(rank).signed(SECRET)) for rank in (0, 1)], "host_comes_back": False, "meeting": "first"}
    hub = OddHub([{"formed": good}, *messages])
    lifeline = Lifeline((LOOPBACK, hub.port), SECRET, deadline_s=5.0, deadlines=DEADLINES.for_peer_timeout(1.0))
    assert lifeline.join(hello_of(1)) == good
    troubles: list[Trouble] = []
    lifeline.watch(troubles.append, lambda: Beat(**BEAT), host_returns=False, host_lives=lambda was_cut: False)
    [found] = at_once(lifeline.finish, timeout_s=10)
    assert found is None or isinstance(found, PeerLost), found
    assert len(troubles) <= 1 and all(isinstance(trouble.text, str) and isinstance(trouble.trace, str) for trouble in troubles)
    lifeline.leave()


def test_no_line_is_longer_than_the_limit() -> None:
    refuses(Challenge(SECRET).admit, b" " * (MAX_LINE_BYTES + 1))
    hub = OddHub([b"x" * (2 * MAX_LINE_BYTES)])
    [found] = at_once(lambda: lifeline_to(hub.port).join(hello_of(1)), timeout_s=10)
    assert isinstance(found, UserError) and "too long a line" in str(found)
