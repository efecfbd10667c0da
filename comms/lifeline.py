"""A rank's side of the hub: joining the job, and hearing at once when another rank is gone.

Promises: join() ends, within the deadline, with the roster or a UserError that says what is wrong and with whom; afterwards one thread
listens and one sends beats, and the callback gets at most one Trouble. Left to others: what to do then (training/)."""

import contextlib
import math
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from comms.connections import keep_alive
from comms.deadlines import DEADLINES, Deadlines
from comms.handshake import MAX_LINE_BYTES, Reply, Session
from comms.heartbeat import BEAT_S, Beat
from comms.links import PeerLost
from comms.roster import Hello
from comms.secret import Secret
from user_error import UserError

RETRY_S, LONGEST_RETRY_S = 0.1, 1.0
BEATS_UNTOLD = 6  # from the end of a connection: the main thread says what it was for, and the hub who has died


class NotLetIn(UserError):
    """Whoever listens at --dist-url and this rank do not know the same secret."""


class _MeetAgain(Exception):
    """The meeting at the door is ending; the next one begins in a moment. Its argument: whether rank 0 has been heard."""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What has happened to the job, in a sentence. meets_again: everybody parts and comes again, and it goes on; otherwise the job ends,
    and restart_helps says whether starting it again with the same command can help. trace: of the exception that ended another rank, ''
    elsewhere than on rank 0."""

    text: str
    meets_again: bool = False
    restart_helps: bool = True
    trace: str = ""


class Lifeline:
    """The connection of one rank to the hub at ``address``, from join() to finish() or leave()."""

    def __init__(
        self,
        address: tuple[str, int],
        secret: Secret,
        *,
        deadline_s: float,
        deadlines: Deadlines = DEADLINES,
        is_known: bool = False,
    ) -> None:
        """is_known: this process has met rank 0 there before, so that a connection which ends means an old meeting that is being closed."""
        self._is_known = is_known
        self._address, self._secret, self._deadline_s = address, secret, deadline_s
        self._silent_s, self._handshake_s = deadlines.silent_s, deadlines.handshake_s
        self._host_said, self._heard_at = "", time.monotonic()
        self._troubled, self._ended, self._all_done = threading.Event(), threading.Event(), threading.Event()
        self._trouble: Trouble | None = None
        self._writing = threading.Lock()
        self._connection: socket.socket | None = None

    @property
    def _place(self) -> str:
        return f"tcp://{self._address[0]}:{self._address[1]}"

    def join(
        self,
        hello: Hello,
        on_wait: Callable[[str], None] = lambda text: None,
        *,
        refused_s: float = math.inf,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Say hello and wait for the verdict. Returns what the hub says once all ranks are there: the roster, checked entry by entry.

        on_wait: called with the reason where the job goes on without this rank for now; then there is no deadline. refused_s: seconds after
        which a machine that refuses connections to the door has no rank 0 any more. Raises UserError: nobody answers, a foreign program
        answers, the secret is another one, the job was refused, or rank 0 went away; PeerLost after refused_s; KeyboardInterrupt when
        is_asked_to_stop() turns true meanwhile.
        """
        give_up, pause_s = time.monotonic() + self._deadline_s, RETRY_S
        while True:
            self._connection = self._connect(give_up, refused_s, is_asked_to_stop)
            try:
                formed = self._say_hello(hello.signed(self._secret), on_wait, is_asked_to_stop)
                break
            except _MeetAgain as again:
                self._connection.close()
                if again.args[0]:  # rank 0 lives: its time to open the next meeting starts now
                    give_up = time.monotonic() + self._deadline_s
                elif time.monotonic() > give_up:
                    raise self._no_answer() from again
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_RETRY_S)  # it may be in the middle of something long
        roster = [Hello.from_json(entry) for entry in formed["roster"]]
        strangers = [entry.in_words for entry in roster if not entry.is_signed(self._secret)]
        if strangers:
            raise UserError(
                f"every rank signs what it says of itself with the job's secret; {strangers[0]} has not. Somebody else is there"
            )
        return formed

    def _say_hello(self, hello: Hello, on_wait: Callable[[str], None], is_asked_to_stop: Callable[[], bool]) -> dict[str, Any]:
        assert self._connection is not None, "connected by join()"
        keep_alive(self._connection)
        self._lines = _Lines(self._connection)
        self._connection.settimeout(min(self._handshake_s, self._deadline_s))
        self._session = self._shake_hands(hello.in_words)
        has_heard = False
        self._connection.settimeout(max(self._handshake_s, self._silent_s))  # the hub ticks while it waits, too
        try:
            self._write(asdict(hello))
            while True:
                said = self._read()
                if said is None:
                    raise ConnectionError("it has ended the connection")
                if is_asked_to_stop():
                    raise KeyboardInterrupt
                has_heard = True
                if "tick" in said:
                    self._write({"beat": asdict(_IDLE)})
                elif "again" in said:
                    raise _MeetAgain(True)
                elif "wait" in said:
                    self._is_known = True
                    on_wait(str(said["wait"]))
                elif "refused" in said:
                    raise _refused(str(said["refused"]), restart_helps=bool(said.get("restart_helps")))
                else:
                    return _checked_formed(said, hello.rank)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            if self._is_known:
                raise _MeetAgain(has_heard) from error
            text = f"rank 0 at {self._place} stopped answering while the ranks were meeting ({error}); see its output"
            raise _refused(text, restart_helps=True) from error

    def _shake_hands(self, who: str) -> Session:
        try:
            greeting = self._lines.next()
            if not greeting:
                raise _MeetAgain(False)  # the old door was closing
            reply = Reply(self._secret, "rank", who, greeting)
            self._send(reply.line)
            answer = self._lines.next()
            if not answer:
                raise _MeetAgain(False)
            session = reply.session(answer)
        except (ConnectionResetError, BrokenPipeError) as error:
            raise _MeetAgain(False) from error
        except (OSError, ValueError) as error:
            if self._is_known or isinstance(error, TimeoutError):  # its host may be too busy to answer
                raise _MeetAgain(False) from error
            raise self._foreign() from error
        if session is None:
            raise NotLetIn(
                f"all ranks of a job share one secret (--secret-file or DIST_SECRET); that of rank 0 at {self._place} is not the one of "
                f"{who}. Copy the same file to every host, and look whether another job or another user listens there"
            )
        return session

    def watch(
        self,
        on_trouble: Callable[[Trouble], None],
        beat: Callable[[], Beat],
        *,
        host_returns: bool,
        host_lives: Callable[[bool], bool],
        has_lost_connection: Callable[[], bool] = lambda: False,
        outlasts_silence: bool = False,
        host_in_words: str = "rank 0",
    ) -> None:
        """Listen and send beats from now on; ``on_trouble`` is called, on the listening thread and at most once. host_returns: whether to
        wait for rank 0 to open another meeting where it falls silent or dies; host_lives: asked where the connection ends as that of a
        dead process does, or (True) was cut; has_lost_connection: asked twice a second, whether one of the process groups has ended;
        outlasts_silence: whether to come to another meeting after silence alone; host_in_words: how messages name rank 0."""
        self._heard_at = time.monotonic()
        self._host = f"{host_in_words} at {self._place}"
        threading.Thread(
            target=self._watch, args=(on_trouble, host_returns, host_lives, outlasts_silence), name="lifeline", daemon=True
        ).start()
        threading.Thread(target=self._keep_beating, args=(beat, has_lost_connection), name="heartbeat", daemon=True).start()

    def _watch(
        self, on_trouble: Callable[[Trouble], None], host_returns: bool, host_lives: Callable[[bool], bool], outlasts_silence: bool
    ) -> None:
        assert self._connection is not None, "join() comes first"
        self._connection.settimeout(self._silent_s)
        trouble, looked_at = None, time.monotonic()
        while trouble is None:
            try:
                said = self._read(within_s=BEAT_S)
                if said is None:
                    trouble = self._without_host("ended", host_returns, not host_returns and host_lives(False))
                elif "tick" in said:
                    self._host_said, self._heard_at = str(said["tick"]), time.monotonic()
                elif "end" in said:
                    self._all_done.set()
                    return
                elif "again" in said:
                    trouble = Trouble(text=str(said["again"]), meets_again=True)
                else:
                    helps = bool(said.get("restart_helps", True))
                    trouble = Trouble(text=str(said.get("text")), restart_helps=helps, trace=str(said.get("trace") or ""))
            except TimeoutError:
                slept = time.monotonic() - looked_at - BEAT_S
                if slept > BEAT_S:  # it was this process that stood still: what came meanwhile is read first
                    self._heard_at += slept
                if time.monotonic() - self._heard_at > self._silent_s:
                    text = f"{self._host} has given no sign of life for {self._silent_s:.0f} s (--peer-timeout), {self._host_last}"
                    trouble = Trouble(
                        text=f"{text}. Its machine may be suspended, or the network between cut",
                        meets_again=host_returns or outlasts_silence,
                    )
            except (OSError, ValueError) as error:
                trouble = self._without_host(f"broke ({error})", host_returns, host_lives(True))
            looked_at = time.monotonic()
        if self._ended.is_set():
            return
        self._trouble = trouble
        on_trouble(trouble)
        self._troubled.set()  # after it: where on_trouble ends the process, no other thread speaks in between

    def _without_host(self, what: str, host_returns: bool, lives: bool) -> Trouble:
        """``what`` has happened to the connection to it."""
        text = f"the connection to {self._host} {what}" if lives else f"{self._host} is gone"
        return Trouble(text=f"{text}, {self._host_last}", meets_again=host_returns or lives)

    @property
    def _host_last(self) -> str:
        doing = f", in {self._host_said}" if self._host_said else ""
        return f"last heard of {time.monotonic() - self._heard_at:.1f} s ago{doing}"

    def _keep_beating(self, beat: Callable[[], Beat], has_lost_connection: Callable[[], bool]) -> None:
        beats_since_loss = 0
        stood_still_s, beat_at = 0.0, time.monotonic()
        with contextlib.suppress(OSError):
            while not self._ended.wait(BEAT_S) and not self._all_done.is_set():
                missed_s, beat_at = time.monotonic() - beat_at - BEAT_S, time.monotonic()
                stood_still_s += missed_s if missed_s > BEAT_S else 0.0
                self._write({"beat": asdict(replace(beat(), stood_still_s=stood_still_s))})
                beats_since_loss = beats_since_loss + 1 if has_lost_connection() else 0
                if beats_since_loss == BEATS_UNTOLD:
                    self.report_broken("a connection of its own has ended, and nobody who waits for it was told")

    def trouble(self, timeout_s: float) -> Trouble | None:
        """What has happened, once on_trouble has dealt with it, waiting at most ``timeout_s``; None if nothing is known."""
        return self._trouble if self._troubled.wait(timeout_s) else None

    def report_broken(self, text: str) -> None:
        """Tell the hub that an exchange failed while nobody is known to be lost."""
        with contextlib.suppress(OSError):
            self._write({"broken": text})

    def report_failure(self, text: str, *, restart_helps: bool, trace: str = "") -> None:
        """Tell the others, through the hub, that this rank stops and why; and whether starting again with the same command can help."""
        self._ended.set()
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._write({"failed": text, "restart_helps": restart_helps, "trace": trace[-(MAX_LINE_BYTES // 4) :]})

    def finish(self) -> None:
        """This rank's work is done: returns when everybody's is, so that nobody's end is taken for a loss; then leave(). Raises PeerLost if
        there was trouble before that."""
        with contextlib.suppress(OSError):  # the listening thread learns of it, too
            self._write({"done": True})
        while not self._all_done.wait(BEAT_S):
            if self._trouble is not None:
                raise PeerLost(self._trouble.text)
        self.leave()

    def leave(self) -> None:
        """This meeting is over for this rank, which comes to the next one."""
        self._ended.set()
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()

    def _connect(self, give_up: float, refused_s: float, is_asked_to_stop: Callable[[], bool]) -> socket.socket:
        began = time.monotonic()
        while True:
            if is_asked_to_stop():
                raise KeyboardInterrupt
            try:
                return socket.create_connection(self._address, timeout=max(0.1, min(5.0, give_up - time.monotonic())))
            except OSError as error:
                if isinstance(error, ConnectionRefusedError) and time.monotonic() - began > refused_s:
                    raise PeerLost(f"rank 0 at {self._place} is gone: its machine refuses connections to it") from error
                if time.monotonic() >= give_up:
                    raise _refused(
                        f"rank 0 must answer at {self._place} (--dist-url) within {self._deadline_s:.0f} s (--rendezvous-timeout); it does "
                        f"not ({error}). "
                        "Start rank 0 there, and check the address, the port and any firewall between",
                        restart_helps=True,
                    ) from error
                time.sleep(RETRY_S)

    def _read(self, within_s: float | None = None) -> dict[str, Any] | None:
        line = self._lines.next(within_s)
        return self._session.open(line) if line else None

    def _write(self, message: dict[str, Any]) -> None:
        with self._writing:  # a line's number is part of its seal
            self._send(self._session.seal(message))

    def _send(self, line: bytes) -> None:
        assert self._connection is not None, "join() comes first"
        self._connection.sendall(line)

    def _no_answer(self) -> UserError:
        """Somebody takes connections there, and no handshake came to its end in time."""
        if not self._is_known:
            return self._foreign()
        text = f"rank 0 at {self._place} takes connections and has not answered for {self._deadline_s:.0f} s"
        return _refused(f"{text}. Its machine may be suspended or overloaded, or something else listens there now", restart_helps=True)

    def _foreign(self) -> UserError:
        return UserError(
            f"--dist-url must be where rank 0 of this job listens; at {self._place} something else answers. Choose a port that "
            "is free on that host"
        )


def _refused(text: str, *, restart_helps: bool) -> UserError:
    error = UserError(text)
    error.restart_helps = restart_helps
    return error


def _checked_formed(said: dict[str, Any], rank: int) -> dict[str, Any]:
    """The verdict that the job has formed, with this ``rank`` in it. Raises ValueError for anything else."""
    formed, kinds = said.get("formed"), {"roster": list, "host_comes_back": bool, "meeting": str}
    if not isinstance(formed, dict) or any(type(formed.get(name)) is not kind for name, kind in kinds.items()):
        raise ValueError("what it says is no verdict")
    if rank not in [Hello.from_json(entry).rank for entry in formed["roster"]]:
        raise ValueError("its roster is without this rank")
    return formed


class _Lines:
    """Lines of a socket; after a time-out reading goes on where it was, which a file made of the socket cannot."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._buffer = connection, b""

    def next(self, within_s: float | None = None) -> bytes:
        """The next line, b"" at the end. Raises TimeoutError where nothing comes for ``within_s`` (None: the socket's own time-out, which
        sending has, too); OSError; ValueError for a line longer than MAX_LINE_BYTES."""
        while b"\n" not in self._buffer:
            if within_s is not None:
                waiting = select.poll()
                waiting.register(self._connection, select.POLLIN)
                if not waiting.poll(1000 * within_s):
                    raise TimeoutError("nothing came")
            if len(self._buffer) > MAX_LINE_BYTES:
                raise ValueError("too long a line")
            piece = self._connection.recv(2**16)
            if not piece:
                return b""
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"


_IDLE = Beat(doing="meeting the others", for_s=0.0, moves=0, is_in_step=False, waits=True, longest_step_s=0.0)
