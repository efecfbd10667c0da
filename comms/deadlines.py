"""How many seconds a rank waits for others before it acts as if something had failed, and why a healthy job never needs more.

A limit that is too short ends a job in which nothing is wrong, so each one here bounds what is bounded by itself, or begins to count only
when a rank has stopped to beat or to get on. Being late is better than being wrong. What may take long (a micro-batch, a message, a load,
a save, an evaluation) has no limit of its own anywhere: the heartbeat decides who is lost (heartbeat.py).

They are values to hand in, so that tests can run with smaller ones.
"""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """All in seconds.

    silent_s: without a beat until a rank is lost. A beat goes out twice a second from a thread that does nothing else. Three times the
        longest time between two that was ever seen: 9.4 s, on two cores with 50 processes that wanted them (docs/LOG.md, 2026-11-28).
    step_s: without progress inside a step, and ten of the longest steps so far where that is more. A span, a bucket, a message or a record
        that was read is progress.
    first_step_s: the same while no step has ended, so that nobody knows how long one takes.
    outside_s: without progress of any rank where one is outside of steps: loading, saving, reading data.
    handshake_s: for the few lines at rank 0's door. Both ends need to run for a moment, which every rank that is not silent does.
    answer_s: for a connection to rank 0's store, which is such a handshake and an exchange more.
    connect_s: for gloo to make one group, once all ranks are at that point: a few short messages. Nothing wakes a rank that waits there for
        another one that has died, so it must end by itself. Each meeting in a row that came to nothing doubles it.
    link_back_s: for a rank to come to another meeting, from when it was last heard of. One that still beats has not yet left its work.
    refused_s: with a closed port at rank 0's door, where the process that listens there is not started again. Between two meetings
        the port is closed for a moment.
    suspicion_s: from a failed exchange until it counts as a broken connection. By then a death is mostly known, and more is said of it.
    leaving_s: at the end, for all ranks to hear that everybody is done.
    waits_s: after the connections were shut, for a rank to come out of a wait; all waits that we know of are ended at once.
    cause_s: beyond silent_s, for what rank 0 says of a failure.
    """

    silent_s: float = 30.0
    step_s: float = 300.0
    first_step_s: float = 1800.0
    outside_s: float = 6 * 3600.0
    handshake_s: float = 30.0
    answer_s: float = 60.0
    connect_s: float = 30.0
    link_back_s: float = 30.0
    refused_s: float = 3.0
    suspicion_s: float = 2.0
    leaving_s: float = 30.0
    waits_s: float = 60.0
    cause_s: float = 5.0

    def for_peer_timeout(self, peer_timeout_s: float | None) -> "Deadlines":
        """With --peer-timeout; None: auto."""
        if peer_timeout_s is None:
            return self
        return dataclasses.replace(
            self,
            silent_s=peer_timeout_s,
            step_s=peer_timeout_s,
            first_step_s=max(self.first_step_s, peer_timeout_s),
            outside_s=max(self.outside_s, peer_timeout_s),
            connect_s=max(self.connect_s, peer_timeout_s),
            link_back_s=max(self.link_back_s, peer_timeout_s),
        )

    def divided_by(self, number: float) -> "Deadlines":
        """All but silent_s, for tests: what is bounded by itself stays so at a fraction of its limit."""
        fields = {field.name: getattr(self, field.name) / number for field in dataclasses.fields(self)}
        return Deadlines(**{**fields, "silent_s": self.silent_s})


DEADLINES = Deadlines()
