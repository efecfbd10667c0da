"""The supervisor of one worker that was started by hand: it starts the worker again when that, or a rank that it needs, is lost.

``dist_clm_train.py`` becomes the supervisor (``arrange_supervision``) where --max-restarts or --supervise asks for it, and its child, the
same command, is the worker. The supervisor must outlive what kills workers and cost nothing beside them, so it is this file alone in an
interpreter of its own, with nothing but the standard library. Promises: the worker hears SIGTERM and SIGINT once each and is not started
again after them; it does not outlive its supervisor; one that beats no more is killed and replaced; nothing that no restart can cure (exit
statuses 0, 1, 2, 130) is restarted. What a restarted worker goes on from is settled in start/agreement.py,
how the ranks meet again in meeting.py."""

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # the supervisor itself cannot import it
    from training.config.train import Config

log = logging.getLogger("trainer")

VARIABLE = "TRAINER_SUPERVISED"  # in the worker's environment: a JSON object, see Supervised
EXIT_DEFECT, EXIT_PEER_LOST, EXIT_INTERRUPTED = 70, 75, 130  # of exit_status.py, which this file alone cannot import
RESTARTABLE = (EXIT_DEFECT, EXIT_PEER_LOST)  # and death by a signal
LEAST_SILENCE_S = 45.0  # three times the longest that was seen, 9.6 s, and more: a needless kill costs more than a late one
TICK_S = 0.25
BEAT_S = 1.0
ONE_REQUEST_S = 1.0  # as stopping.py: launchers pass a Ctrl-C on that the terminal has sent already
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When the worker is given up, in restarts, seconds and failures. max_restarts: None for no limit; silence_s: without a beat, from the
    first one on; start_s: without the first one, before which Python reads its packages, from whatever disk; pauses before a restart:
    after an attempt that got further than all before it, and otherwise doubling from first_pause_s; num_crashes: failures of its own in a
    row, without getting further, that end it in any case."""

    who: str = "supervisor"
    max_restarts: int | None = None
    silence_s: float = LEAST_SILENCE_S
    start_s: float = 1800.0
    short_pause_s: float = 0.2
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0
    num_crashes: int = 3


def arrange_supervision(config: "Config", command: Sequence[str]) -> None:
    """Called once by a trainer whose flags are right. A supervised worker begins to beat. Where the flags ask for a supervisor,
    this process becomes that of ``command`` and the call does not return, unless torchrun restarts the workers anyway."""
    supervised = Supervised.from_environment()
    if supervised is not None:
        supervised.pipe.start()
    elif not config.max_restarts and not config.supervise:
        return
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        log.warning("--max-restarts and --supervise of the trainer are ignored: torchrun restarts its workers itself (its --max-restarts)")
    else:
        become_supervisor(policy_for(config), command)


def policy_for(config: "Config") -> Policy:
    """What the flags ask for. --supervise: no limit, whatever --max-restarts says."""
    try:
        silence_s = max(LEAST_SILENCE_S, float(config.peer_timeout))
    except ValueError:  # auto
        silence_s = LEAST_SILENCE_S
    return Policy(
        who=f"rank{config.rank or 0} supervisor", max_restarts=None if config.supervise else config.max_restarts, silence_s=silence_s
    )


def become_supervisor(policy: Policy, command: Sequence[str]) -> NoReturn:
    """Replace this process, whose heavy packages go with it, by the supervisor of ``command``. Its exit status is the last worker's;
    128 + N where signal N killed that."""
    sys.stdout.flush()
    sys.stderr.flush()
    # -I -S: neither the folder of this file nor installed packages can come before the standard library
    isolated = [sys.executable, "-I", "-S", os.path.abspath(__file__)]
    os.execv(sys.executable, [*isolated, json.dumps(dataclasses.asdict(policy)), *command])


class LifePipe:
    """The worker's end. A supervisor that is gone or does not read never holds the worker up."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.set_inheritable(descriptor, False)  # what the worker starts is not the worker
        os.set_blocking(descriptor, False)

    def start(self) -> None:
        """Beat once per second from a thread, to the end of the process. Called once."""
        threading.Thread(target=self._keep_beating, name="life-pipe", daemon=True).start()

    def beat(self) -> None:
        """The process is there and runs."""
        self._say(b"beat\n")

    def step(self, optimizer_step: int) -> None:
        """An optimizer step is done; ``optimizer_step`` counts from the beginning of the run, not of the attempt."""
        self._say(b"step %d\n" % optimizer_step)

    def _keep_beating(self) -> None:
        while self._say(b"beat\n"):
            time.sleep(BEAT_S)

    def _say(self, line: bytes) -> bool:
        """False if there is no supervisor any more."""
        try:
            os.write(self._descriptor, line)
        except BlockingIOError:  # it is suspended and the pipe is full
            return True
        except OSError:
            if sys.platform != "linux":  # there, the kernel has sent this signal already, and a second one would cut the save off
                os.kill(os.getpid(), signal.SIGTERM)
            return False
        return True


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """What a worker is told by its supervisor. run_id: drawn by each supervisor, equal over its restarts; attempt: 0 the first; lost_at:
    seconds as time.time() when the loss of the attempt before was noticed, None for the first; began_at: when the supervisor began."""

    run_id: str
    attempt: int
    lost_at: float | None
    began_at: float
    pipe: LifePipe

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Supervised | None":
        """None where no supervisor has started this process itself. May be called anywhere in a worker, any number of times."""
        try:
            told = json.loads(environment.get(VARIABLE, ""))
            if told["supervisor"] != os.getppid() or not stat.S_ISFIFO(os.fstat(told["pipe"]).st_mode):
                return None  # inherited by what a worker has started
            known = {name: told[name] for name in ("run_id", "attempt", "lost_at", "began_at")}
            return cls(**known, pipe=LifePipe(told["pipe"]))
        except (ValueError, TypeError, KeyError, OSError):
            return None


class _Signals:
    """What this process is told by the kernel and by users, as something to wait for."""

    def __init__(self) -> None:
        self._pending: list[int] = []
        self._reader, writer = os.pipe()
        for descriptor in (self._reader, writer):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTSTP, signal.SIGCHLD):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._pending.append(number)

    def wait(self, timeout_s: float, *others: int) -> list[int]:
        """Until a signal comes, one of ``others`` can be read, or the time is over. Returns the signals that came."""
        select.select([self._reader, *others], [], [], max(0.0, timeout_s))
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)
        came, self._pending = self._pending, []
        return came


class _Worker:
    """One attempt. ``silent_s`` counts only time in which the supervisor was awake itself; ``step`` is the newest that was told."""

    def __init__(self, command: Sequence[str], told: Mapping[str, object]) -> None:
        self.life, writer = os.pipe()
        os.set_blocking(self.life, False)
        environment = {**os.environ, VARIABLE: json.dumps({**told, "supervisor": os.getpid(), "pipe": writer})}
        try:
            self.process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, env=environment, pass_fds=(writer,), preexec_fn=_bound_to_this_process()
            )
        finally:
            os.close(writer)
        self.started = time.monotonic()
        self.silent_s, self.has_beaten, self.was_killed, self.is_open = 0.0, False, False, True
        self.step = -1
        self._unread = b""

    def listen(self, passed_s: float) -> None:
        """Take in what it has said during the last ``passed_s`` seconds."""
        self.silent_s += passed_s
        while self.is_open:
            try:
                received = os.read(self.life, 65536)
            except BlockingIOError:
                return
            self.is_open = bool(received)
            if received:
                self.silent_s, self.has_beaten = 0.0, True
            *lines, rest = (self._unread + received).split(b"\n")
            self._unread = rest[-64:]  # whatever somebody writes there
            numbers = [line[5:] for line in lines if line.startswith(b"step ")]
            self.step = max([self.step, *(int(number) for number in numbers if number.isdigit() and len(number) < 20)])

    def send(self, number: int, *, to_all: bool = False) -> None:
        """``to_all``: also to what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number) if to_all else self.process.send_signal(number)

    def kill(self) -> None:
        self.was_killed = True
        self.send(signal.SIGKILL, to_all=True)

    def close(self) -> None:
        os.close(self.life)


def _bound_to_this_process() -> Callable[[], None]:
    """For the child between fork and exec: a process group of its own, or it would hear a Ctrl-C twice; and SIGTERM, upon which it saves
    and ends, when this process dies (on Linux; elsewhere LifePipe sees to it)."""
    supervisor = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def bind() -> None:
        os.setpgid(0, 0)
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != supervisor:  # which died before it could be bound to
            os._exit(1)

    return bind


class Supervisor:
    """Runs ``command`` again and again as ``policy`` allows. One per process, on its main thread: it takes the signals."""

    def __init__(self, command: Sequence[str], policy: Policy) -> None:
        self._command, self._policy = command, policy
        self._signals = _Signals()
        self._num_requests, self._requested_at = 0, -ONE_REQUEST_S

    def run(self) -> int:
        """To the end of the last worker. Returns the exit status."""
        policy = self._policy
        run_id, lost_at, began_at = os.urandom(8).hex(), None, time.time()
        num_restarts = num_crashes = num_fruitless = 0
        furthest = -1
        limit = "without limit" if policy.max_restarts is None else f"at most {policy.max_restarts} times"
        log.info("when the worker or a rank that it needs is lost, the worker is started again, %s", limit)
        while True:
            try:
                worker = _Worker(self._command, {"run_id": run_id, "attempt": num_restarts, "lost_at": lost_at, "began_at": began_at})
            except OSError as error:
                log.error("the worker cannot be started: %s", error)
                return 1
            status = self._attend(worker)
            lost_at = time.time()
            if status == 0:
                return self._end_of_request(status)
            worker.send(signal.SIGKILL, to_all=True)  # what it has started and left: it may hold memory and ports
            exit_status = status if status >= 0 else 128 - status
            if self._num_requests:
                return self._end_of_request(exit_status)
            if status > 0 and status not in RESTARTABLE:
                log.info("the worker ended with status %d, which a restart does not change", status)
                return exit_status
            got_further, furthest = worker.step > furthest, max(furthest, worker.step)
            is_crash = status != EXIT_PEER_LOST  # a peer may be away for as long as it likes
            num_crashes = 0 if got_further else num_crashes + is_crash
            num_fruitless = 0 if got_further else num_fruitless + 1
            what = _what_happened(worker, status, furthest)
            if (refusal := self._refusal(num_restarts, num_crashes)) is not None:
                log.error("%s; %s", what, refusal)
                return exit_status
            num_restarts += 1
            pause_s = policy.short_pause_s if got_further else _pause_s(policy, num_fruitless)
            of = "" if policy.max_restarts is None else f" of {policy.max_restarts}"
            log.warning("%s; restart %d%s in %.3g s", what, num_restarts, of, pause_s)
            if not self._pause(pause_s):
                log.info("asked to stop: no restart")
                return EXIT_INTERRUPTED

    def _refusal(self, num_restarts: int, num_crashes: int) -> str | None:
        """Why there is no further restart, and what to do; None if there is one."""
        again = "start it again with the same command: it goes on from its newest checkpoint"
        if num_crashes >= self._policy.num_crashes:
            cure = f"Its own messages say why; cure that and {again}"
            return f"it failed {num_crashes} times in a row and got no further than before: no more restarts. {cure}"
        if self._policy.max_restarts is not None and num_restarts >= self._policy.max_restarts:
            return f"all {num_restarts} restarts (--max-restarts) are used. To go on, {again}"
        return None

    def _attend(self, worker: _Worker) -> int:
        """Until the worker has ended: pass signals on, and kill it when it beats no more. Returns its status, -N for signal N."""
        policy, before = self._policy, time.monotonic()
        try:
            while True:
                came = self._signals.wait(TICK_S, *([worker.life] if worker.is_open else []))
                now = time.monotonic()
                # not more than a round: where the supervisor was stopped or suspended, the worker mostly was too
                worker.listen(min(now - before, 2 * TICK_S))
                before = now
                for number in came:
                    self._pass_on(number, worker)
                status = worker.process.poll()
                if status is not None:
                    worker.listen(0.0)
                    return status
                limit_s = policy.silence_s if worker.has_beaten else policy.start_s
                if worker.silent_s > limit_s and not worker.was_killed:
                    log.warning("no sign of life from the worker (process %d) for %.3g s: killing it", worker.process.pid, worker.silent_s)
                    worker.kill()
        finally:
            worker.close()

    def _pass_on(self, number: int, worker: _Worker) -> None:
        """The first two requests to stop as they came (the worker saves; it ends at once), the third as SIGKILL."""
        if number == signal.SIGTSTP:  # Ctrl-Z is meant for the worker, which the terminal does not know
            worker.send(signal.SIGSTOP, to_all=True)
            os.kill(os.getpid(), signal.SIGSTOP)
            worker.send(signal.SIGCONT, to_all=True)
        elif self._is_request(number):
            log.info("%s: passed on to the worker, which is not started again", signal.Signals(number).name)
            if self._num_requests > 2:
                worker.kill()
            else:
                worker.send(number)

    def _is_request(self, number: int) -> bool:
        if number not in (signal.SIGTERM, signal.SIGINT) or time.monotonic() - self._requested_at < ONE_REQUEST_S:
            return False
        self._num_requests, self._requested_at = self._num_requests + 1, time.monotonic()
        return True

    def _pause(self, seconds: float) -> bool:
        """False if asked to stop meanwhile."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            for number in self._signals.wait(left):
                if number == signal.SIGTSTP:
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif self._is_request(number):
                    return False
        return True

    def _end_of_request(self, status: int) -> int:
        if self._num_requests:
            log.info("the worker ended with status %d; done, as asked", status)
        return status


def _pause_s(policy: Policy, num_fruitless: int) -> float:
    """Doubling with every attempt in a row that got no further."""
    return min(policy.longest_pause_s, policy.first_pause_s * 2.0 ** min(num_fruitless - 1, 30))


def _what_happened(worker: _Worker, status: int, furthest: int) -> str:
    """For the log: how the worker ended, when, and how far it had come."""
    lived = f"after {time.monotonic() - worker.started:.0f} s"
    at = f", at optimizer step {worker.step}" if worker.step >= 0 else ", before its first optimizer step"
    at += f" ({furthest} was reached before)" if furthest > worker.step >= 0 else ""
    if status == EXIT_PEER_LOST:
        return f"the worker lost a peer {lived}{at}"
    if status >= 0:
        return f"the worker failed with status {status} {lived}{at}"
    if worker.was_killed:
        return f"the worker was killed, as it gave no sign of life, {lived}{at}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # a real-time one
        name = f"signal {-status}"
    guess = ", not by its supervisor; where memory is short the kernel does that (see dmesg)" if -status == signal.SIGKILL else ""
    return f"the worker was killed by {name} {lived}{at}{guess}"


def main(argv: Sequence[str]) -> int:
    """``argv``: a Policy as JSON, then the worker's command."""
    policy = Policy(**json.loads(argv[0]))
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"[{policy.who}] %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    return Supervisor(argv[1:], policy).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
