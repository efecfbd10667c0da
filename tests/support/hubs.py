"""What the tests of the door share: hubs on loopback, ranks that join them, and strangers of several kinds."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import psutil

from comms.handshake import Reply, Session
from comms.hub import Hub
from comms.lifeline import Lifeline
from comms.members import Rules
from comms.rendezvous import listen
from comms.roster import Hello
from comms.secret import Secret

SECRET, OTHER_SECRET = Secret(b"s" * 32), Secret(b"t" * 32)
LOOPBACK = "127.0.0.1"


def hello_of(rank: int, world_size: int = 2, **fields: Any) -> Hello:
    """What a rank of this very process says of itself."""
    known: dict[str, Any] = {"host": "here", "host_id": "here/1", "pid": os.getpid(), "address": LOOPBACK, "is_loopback": True}
    return Hello(**{**known, "rank": rank, "world_size": world_size, "plan": {"code": "1"}, **fields})


@contextlib.contextmanager
def open_hub(
    world_size: int = 2,
    deadline_s: float = 20.0,
    store_port: int | None = None,
    rules: Rules | None = None,
    port: int = 0,
    before: Hub | None = None,
) -> Iterator[tuple[Hub, int]]:
    """A hub, and the port of its door (0: a free one)."""
    listener = listen(LOOPBACK, port)
    port = int(listener.getsockname()[1])
    hub = Hub(
        listener,
        secret=SECRET,
        world_size=world_size,
        deadline_s=deadline_s,
        store_port=store_port,
        describe=lambda rank: f"rank {rank}",
        rules=rules,
        before=before,
    )
    try:
        yield hub, port
    finally:
        hub.close(0.1)


def lifeline_to(port: int, secret: Secret = SECRET) -> Lifeline:
    return Lifeline((LOOPBACK, port), secret, deadline_s=10.0)


def outcome(work: Callable[[], Any]) -> Any:
    """What ``work`` returns, or the exception that it raises."""
    try:
        return work()
    except Exception as error:
        return error


def at_once(*works: Callable[[], Any], timeout_s: float = 30.0) -> list[Any]:
    """The outcomes of ``works``, each on a thread of its own; "still there" for one that did not end."""
    found: list[Any] = ["still there"] * len(works)

    def keep(place: int) -> None:
        found[place] = outcome(works[place])

    threads = [threading.Thread(target=keep, args=(place,), daemon=True) for place in range(len(works))]
    for thread in threads:
        thread.start()
    give_up = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, give_up - time.monotonic()))
    return found


class RawRank:
    """A rank that knows the secret and says what a test likes."""

    def __init__(self, port: int, purpose: str = "rank", secret: Secret = SECRET) -> None:
        self.connection = socket.create_connection((LOOPBACK, port), timeout=10.0)
        self.lines = self.connection.makefile("rb")
        reply = Reply(secret, purpose, "a test", self.lines.readline())
        self.connection.sendall(reply.line)
        self.answer = self.lines.readline()
        self.maybe_session = reply.session(self.answer)

    @property
    def session(self) -> Session:
        assert self.maybe_session is not None, "it was refused"
        return self.maybe_session

    def say(self, message: Any) -> None:
        self.connection.sendall(self.session.seal(message))

    def say_hello(self, hello: Hello) -> None:
        self.say(asdict(hello.signed(SECRET)))

    def hear(self) -> dict[str, Any]:
        """The next that is no tick. Raises EOFError where the hub has hung up."""
        while line := self.lines.readline():
            said = self.session.open(line)
            if "tick" not in said:
                return said
        raise EOFError("the hub has hung up")

    def close(self) -> None:
        self.lines.close()
        self.connection.close()


def strangers(address: tuple[str, int], count: int, kind: int | None = None) -> list[socket.socket]:
    """``count`` connections that know nothing: by turns silent, half an answer, garbage, a closed one, an endless line. Returns those that
    are still open. A door that does not answer costs 0.05 s, and the rest are not tried."""
    held = []
    for number in range(count):
        try:
            connection = socket.create_connection(address, timeout=0.05)
        except TimeoutError:
            break
        except OSError:
            continue
        with contextlib.suppress(OSError):
            match number % 5 if kind is None else kind:
                case 1:
                    connection.sendall(b'{"purpose": "rank", "who": ')
                case 2:
                    connection.sendall(os.urandom(200) + b"\n")
                case 3:
                    connection.close()
                    continue
                case 4:
                    connection.sendall(b"x" * 2**16)
        held.append(connection)
    return held


def listening_at(pids: list[int]) -> set[tuple[str, int]]:
    """The TCP addresses at which the processes ``pids`` listen."""
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            for connection in psutil.Process(pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port))
    return found
