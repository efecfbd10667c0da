"""A rank's side of the hub: joining the job, and hearing at once when another rank is gone.

Promises: join() ends, within the deadline, with the roster or a UserError that says what is wrong and with whom; afterwards a
thread listens, and the callback gets one sentence naming the lost rank. Left to others: what to do then (training/job.py)."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from comms.hub import MAX_LINE_BYTES, PROTOCOL, Hello, keep_alive
from user_error import UserError

GREETING_TIMEOUT_S = 10.0
VERDICT_MARGIN_S = 15.0


class Lifeline:
    """The connection of one rank to the hub at ``address``, from join() to done()."""

    def __init__(self, address: tuple[str, int], *, deadline_s: float) -> None:
        self._address, self._deadline_s = address, deadline_s
        self._lost = threading.Event()
        self._lost_text = ""
        self._ended = False
        self._connection: socket.socket | None = None

    @property
    def _place(self) -> str:
        return f"tcp://{self._address[0]}:{self._address[1]}"

    def join(self, hello: Hello) -> dict[str, Any]:
        """Say hello and wait for the verdict. Returns what the hub says once all ranks are there: the roster and the store's address.

        Raises UserError: nobody answers, a foreign program answers, the job was refused, or rank 0 went away.
        """
        self._connection = self._connect()
        keep_alive(self._connection)
        self._reader = self._connection.makefile("rb")
        self._connection.settimeout(GREETING_TIMEOUT_S)
        try:
            greeting = self._read()
        except (OSError, ValueError) as error:
            raise self._foreign() from error
        if greeting is None or greeting.get("hub") != PROTOCOL:
            raise self._foreign()
        self._connection.settimeout(self._deadline_s + VERDICT_MARGIN_S)
        try:
            self._write(asdict(hello))
            verdict = self._read()
        except (OSError, ValueError) as error:
            raise UserError(f"rank 0 at {self._place} stopped answering while the ranks were meeting ({error}); see its output") from error
        if verdict is None:
            raise UserError(f"rank 0 at {self._place} went away while the ranks were meeting; see its output")
        if "refused" in verdict:
            raise UserError(str(verdict["refused"]))
        self._connection.settimeout(None)
        return dict(verdict["formed"])

    def watch(self, on_loss: Callable[[str, bool], None]) -> None:
        """Listen from now on; ``on_loss`` is called, on the listening thread and at most once, with a sentence naming the rank that
        is gone, and whether starting again with the same command can help.
        """
        threading.Thread(target=self._watch, args=(on_loss,), name="lifeline", daemon=True).start()

    def _watch(self, on_loss: Callable[[str, bool], None]) -> None:
        try:
            message = self._read()
        except (OSError, ValueError):
            message = None
        if self._ended:
            return
        self._lost_text = str(message["text"]) if message and "text" in message else f"rank 0 at {self._place} is gone"
        on_loss(self._lost_text, bool(message.get("restart_helps", True)) if message else True)
        self._lost.set()  # after it: where on_loss ends the process, no other thread speaks in between

    def cause_of_loss(self, timeout_s: float) -> str | None:
        """The sentence about the lost rank once on_loss has dealt with it, waiting at most ``timeout_s``; None if nobody is known to
        be lost.
        """
        return self._lost_text if self._lost.wait(timeout_s) else None

    def report_failure(self, text: str, *, restart_helps: bool) -> None:
        """Tell the others, through the hub, that this rank stops and why; and whether starting again with the same command can help."""
        self._ended = True
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._write({"failed": text, "restart_helps": restart_helps})

    def done(self) -> None:
        """This rank ends well: its connection may close."""
        self._ended = True
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._write({"done": True})

    def _connect(self) -> socket.socket:
        give_up = time.monotonic() + self._deadline_s
        while True:
            try:
                return socket.create_connection(self._address, timeout=max(0.1, min(5.0, give_up - time.monotonic())))
            except OSError as error:
                if time.monotonic() >= give_up:
                    raise UserError(
                        f"rank 0 must answer at {self._place} (--dist-url) within {self._deadline_s:.0f} s (--rendezvous-timeout); it does "
                        f"not ({error}). "
                        "Start rank 0 there, and check the address, the port and any firewall between"
                    ) from error
                time.sleep(0.1)

    def _read(self) -> dict[str, Any] | None:
        line = self._reader.readline(MAX_LINE_BYTES)
        return json.loads(line) if line else None

    def _write(self, message: dict[str, Any]) -> None:
        assert self._connection is not None, "join() comes first"
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _foreign(self) -> UserError:
        return UserError(
            f"--dist-url must be where rank 0 of this job listens; at {self._place} something else answers. Choose a port that "
            "is free on that host"
        )
