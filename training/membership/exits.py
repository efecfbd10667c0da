"""How a process ends that cannot go on, whatever its main thread is in. Called on the lifeline's thread, or on one of its own."""

import logging
import os
import sys
import threading
import time

from comms.lifeline import Trouble
from comms.spans import Spans
from comms.transport import break_off_waits
from training.job.exit_status import EXIT_FAILED, EXIT_PEER_LOST
from training.job.local_facts import LocalFacts

log = logging.getLogger("trainer")

LAST_WORDS_S = 3.0
LOOKS_S = 1.0


def see_it_leave(facts: LocalFacts, spans: Spans, trouble: Trouble, has_left: threading.Event, waits_s: float) -> None:
    """After ``trouble``, until the main thread ``has_left`` the meeting: end its waits, those that it begins only now too, and the process
    where it has been in one for ``waits_s`` seconds since. All connections have been shut down; gloo forgets to tell those who are in the
    middle of a message. A thread that works is let finish."""
    began = time.monotonic()
    while not has_left.wait(LOOKS_S):
        break_off_waits()
        beat = spans.beat
        if beat.waits and min(beat.for_s, time.monotonic() - began) > waits_s:
            text = f"{trouble.text.rstrip('.')}. All ranks meet again, and {facts.place.in_words} does not come out of a wait: {beat.doing}"
            end_process(facts, spans, Trouble(text=text))


def end_process(facts: LocalFacts, spans: Spans, trouble: Trouble) -> None:
    """Called on the lifeline's thread. The main thread may hang in a wait that nothing can cancel, so the process ends here and now."""
    status = EXIT_PEER_LOST if trouble.restart_helps else EXIT_FAILED
    threading.Timer(LAST_WORDS_S, os._exit, [status]).start()  # also if nobody reads our stderr any more
    try:
        helps = trouble.restart_helps
        where = f"This was noticed during {spans.in_words} on {facts.place.in_words}. " if helps else ""
        advice = "The job cannot go on; start it again with the same command and it resumes from its newest checkpoint." if helps else ""
        log.error("%s", f"{trouble.trace}{trouble.text.rstrip('.')}. {where}{advice}".rstrip())
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
