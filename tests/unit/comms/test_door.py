"""Who may come in at rank 0's door: those who know the job's secret, and nobody else; and strangers cost the job nothing."""

import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from support.faults import wait_until
from support.hubs import LOOPBACK, OTHER_SECRET, SECRET, RawRank, at_once, hello_of, lifeline_to, listening_at, open_hub, strangers
from support.ranks import REPOSITORY, eight_sequences, fork, free_port, launch, log_rows, losses, run_ranks, train, train_argv
from support.tiers import full, sample

import comms.connections
from comms.connections import Connections
from comms.deadlines import DEADLINES
from comms.handshake import REFUSAL, Challenge, NotSealed, Reply, Session
from comms.interfaces import Interface, check_not_public
from comms.lifeline import NotLetIn
from comms.secret import HOW_TO_MAKE, Secret, find_secret
from comms.store_tunnel import StoreTunnel, join_store, serve_store
from user_error import UserError

MARKER = "a-secret-that-nobody-may-see-0123456789"


def secret_file(folder: Path, content: str = MARKER, mode: int = 0o600) -> Path:
    path = folder / "secret"
    path.write_text(content + "\n")
    path.chmod(mode)
    return path


def found(file: Path | None, *, is_loopback: bool = False, **environment: str) -> Secret:
    return find_secret(str(file) if file else None, is_loopback=is_loopback, is_alone=False, environment=environment)


def test_a_secret_is_that_of_the_file_then_of_the_environment(tmp_path: Path) -> None:
    file = secret_file(tmp_path)
    assert found(file, DIST_SECRET="e" * 32).mac(b"x") == Secret(MARKER.encode()).mac(b"x")
    assert found(None, DIST_SECRET="e" * 32).mac(b"x") == Secret(b"e" * 32).mac(b"x")
    assert Secret(b"e" * 32).mac(b"ab", b"c") != Secret(b"e" * 32).mac(b"a", b"bc")


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [(MARKER, 0o644, "chmod 600"), (MARKER, 0o640, "640"), ("short-one", 0o600, "at least 16"), ("", 0o600, "has 0")],
)
def test_a_file_that_others_can_read_or_guess_is_refused_and_not_shown(content: str, mode: int, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        found(secret_file(tmp_path, content, mode))
    assert not content or content not in str(caught.value)


def test_a_job_over_a_network_without_a_secret_hears_how_to_make_one(tmp_path: Path) -> None:
    for work in (lambda: found(None), lambda: found(tmp_path / "none"), lambda: found(None, DIST_SECRET="short-one")):
        with pytest.raises(UserError) as caught:
            work()
        assert HOW_TO_MAKE in str(caught.value) and "short-one" not in str(caught.value)


def test_ranks_of_one_host_that_race_for_their_own_secret_get_the_same(tmp_path: Path) -> None:
    def write_mac(rank: int) -> int:
        mac = found(None, is_loopback=True, XDG_CACHE_HOME=str(tmp_path / "cache")).mac(b"x")
        (tmp_path / f"mac{rank}").write_bytes(mac)
        return 0

    processes = [fork(lambda rank=rank: write_mac(rank), tmp_path / f"{rank}.txt") for rank in range(8)]  # type: ignore[misc]
    assert [process.wait(20) for process in processes] == [0] * 8, [process.text for process in processes]
    assert len({(tmp_path / f"mac{rank}").read_bytes() for rank in range(8)}) == 1
    (path,) = (tmp_path / "cache" / "geo-clm-trainer").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o077 == 0


def test_a_secret_is_in_no_repr_and_no_pickle() -> None:
    secret = Secret(MARKER.encode())
    assert MARKER not in f"{secret} {secret!r} {[secret]}"
    with pytest.raises(TypeError, match="not written"):
        pickle.dumps(secret)


def shake_hands(hub_secret: Secret, peer_secret: Secret) -> tuple[Session, Session] | None:
    challenge = Challenge(hub_secret)
    reply = Reply(peer_secret, "rank", "rank 1", challenge.greeting)
    admitted = challenge.admit(reply.line)
    if admitted is None:
        assert reply.session(REFUSAL) is None
        return None
    peer = reply.session(admitted[0])
    assert peer is not None
    return admitted[1], peer


def test_both_sides_prove_that_they_know_the_secret() -> None:
    assert shake_hands(SECRET, SECRET) is not None and shake_hands(SECRET, OTHER_SECRET) is None
    reply = Reply(SECRET, "rank", "rank 1", Challenge(SECRET).greeting)
    assert Challenge(SECRET).admit(reply.line) is None, "an answer to another challenge"
    real = Challenge(SECRET)
    mirror = Reply(SECRET, "rank", "rank 1", real.greeting)
    assert reply.session(mirror.line) is None, "a peer's answer is no hub's"


def test_replayed_reordered_altered_left_out_and_mirrored_lines_are_noticed() -> None:
    def sessions() -> tuple[Session, Session]:
        both = shake_hands(SECRET, SECRET)
        assert both is not None
        return both

    def is_noticed(session: Session, line: bytes) -> None:
        with pytest.raises(NotSealed):
            session.open(line)

    hub, peer = sessions()
    first, second, third = (peer.seal({"n": n}) for n in range(3))
    is_noticed(hub, second)
    is_noticed(hub, first.replace(b"0}", b"1}"))
    assert hub.open(first) == {"n": 0}
    is_noticed(hub, first)
    is_noticed(hub, third)
    is_noticed(peer, second)
    is_noticed(sessions()[0], first)


def test_a_stranger_is_named_and_refused_while_the_right_ranks_meet(caplog: pytest.LogCaptureFixture) -> None:
    with open_hub() as (_, port):
        (refused,) = at_once(lambda: lifeline_to(port, OTHER_SECRET).join(hello_of(1, host="evil")))
        assert isinstance(refused, NotLetIn) and "--secret-file" in str(refused)
        formed = at_once(*(lambda rank=rank: lifeline_to(port).join(hello_of(rank)) for rank in (0, 1)))
    assert all(isinstance(said, dict) and len(said["roster"]) == 2 for said in formed), formed
    named = [record.getMessage() for record in caplog.records if "refused a connection" in record.getMessage()]
    assert len(named) == 1 and "127.0.0.1" in named[0] and "rank 1 (host evil" in named[0]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rank": 0, "pid": 1}, r"rank 0 is taken twice: by pid \d+ on here and pid 1 on here"),
        ({"rank": 1, "plan": {"code": "2"}}, "differ in code: '1' and '2'"),
        ({"rank": 1, "world_size": 3}, "was started with 3, rank 0 with 2"),
        ({"rank": 7}, "--rank must be 0 .. 1"),
    ],
)
def test_who_knows_the_secret_but_does_not_fit_is_named_on_all_ranks(fields: dict[str, Any], reason: str) -> None:
    with open_hub() as (_, port):

        def join_later() -> Any:
            time.sleep(0.3)
            return lifeline_to(port).join(hello_of(**fields))

        said = at_once(lambda: lifeline_to(port).join(hello_of(0)), join_later)
    assert all(isinstance(error, UserError) and re.search(reason, str(error)) for error in said), said


def test_ranks_of_another_code_version_are_refused_on_all_ranks(model_folder: Path, tasks: list[Path], tmp_path: Path) -> None:
    def change_code(rank: int) -> None:
        import training.membership.announce

        if rank == 1:
            training.membership.announce.code_version = lambda root=None: "0000deadbeef"

    flags = {**eight_sequences(model_folder, tasks), "checkpoint_path": tmp_path / "run"}
    for process in train(tmp_path, stages=2, expect=1, before=change_code, **flags):
        assert "differ in code" in process.text and "0000deadbeef" in process.text and "Traceback" not in process.text


def test_the_store_is_on_loopback_alone_and_its_way_is_for_those_who_know_the_secret() -> None:
    store = serve_store(timedelta(seconds=10))
    assert {ip for ip, port in listening_at([os.getpid()]) if port == store.port} == {LOOPBACK}
    with open_hub(store_port=store.port) as (_, port):
        stranger = RawRank(port, purpose="store", secret=OTHER_SECRET)
        assert stranger.maybe_session is None and b"refused" in stranger.answer and stranger.lines.read() == b""
        stranger.close()
        tunnel = StoreTunnel((LOOPBACK, port), SECRET, "rank 1", DEADLINES)
        join_store(tunnel).set("key", "value")
        assert store.get("key") == b"value"
        code = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1])), 5); s.settimeout(5); print(s.recv(1))"
        other = subprocess.run([sys.executable, "-S", "-c", code, str(tunnel.port)], capture_output=True, text=True, timeout=20)
        assert other.stdout == "b''\n" or "ConnectionResetError" in other.stderr, "another process may not use it"
        tunnel.close()
        ignorant = StoreTunnel((LOOPBACK, port), OTHER_SECRET, "rank 1", DEADLINES)
        with socket.create_connection((LOOPBACK, ignorant.port), timeout=10) as client:
            assert client.recv(1) == b""
        ignorant.close()


def test_a_public_address_is_refused_with_the_reason_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("8.8.8.8", "2001:4860:4860::8888"):
        public = Interface(name="made-up0", addresses=(address,))
        with pytest.raises(UserError, match=r"made-up0 has the public address .*--allow-public-interface"):
            check_not_public(public, allowed=False)
        check_not_public(public, allowed=True)
        with monkeypatch.context() as patch:
            patch.setattr("comms.interfaces._is_tunnel", lambda name: name == "made-up0")
            check_not_public(public, allowed=False)
    for address in ("127.0.0.1", "10.1.2.3", "192.168.1.1", "172.16.0.1", "100.64.0.1", "fe80::1%eth0", "fd00::1"):
        check_not_public(Interface(name="made-up0", addresses=(address,)), allowed=False)


def test_gloos_listeners_answer_nobody_once_the_groups_are_made(tmp_path: Path) -> None:
    """gloo keeps a descriptor for every stranger, and ends the process when there are no more."""

    def work(rank: int, store: dist.Store) -> None:
        connections = Connections(of_gloo=True)
        before = listening_at([os.getpid()])
        for _ in range(2):
            with connections.recorded():
                if not dist.is_initialized():
                    dist.init_process_group("gloo", store=dist.PrefixStore("g", store), rank=rank, world_size=2)
                group = dist.new_group([0, 1])
            own = listening_at([os.getpid()]) - before
            assert own, "gloo listens"
            for address in own:
                with pytest.raises(TimeoutError):
                    socket.create_connection((LOOPBACK, address[1]), timeout=0.2)
            value = torch.ones(1)
            dist.all_reduce(value, group=group)
            assert value == 2
        dist.destroy_process_group()

    run_ranks(work, 2, tmp_path)


def test_a_look_for_lost_connections_stands_no_matter_what_is_made_meanwhile(tmp_path: Path) -> None:
    """The heartbeat looks while the main thread makes connections; and where no descriptor is left to look with."""

    def work(rank: int, store: dist.Store) -> None:
        both("connected to the store", store)
        connections, look = Connections(of_gloo=True), comms.connections.own_sockets
        is_looking, found = threading.Event(), []

        def slowly() -> dict[int, list[int]]:
            here = look()
            if threading.current_thread() is beating:
                is_looking.set()
                time.sleep(0.5)
            return here

        beating = threading.Thread(target=lambda: found.append(connections.has_lost_one()))
        with connections.recorded():
            comms.connections.own_sockets = slowly
            beating.start()
            is_looking.wait()
            dist.init_process_group("gloo", store=dist.PrefixStore("g", store), rank=rank, world_size=2)
            dist.barrier()
        watch(connections, rank, store)
        beating.join()
        assert found == [False] and not connections.has_lost_one()

        def none_left() -> dict[int, list[int]]:
            raise OSError(errno.EMFILE, "Too many open files")

        comms.connections.own_sockets = none_left
        assert not connections.has_lost_one()
        comms.connections.own_sockets = look
        both("checked", store)
        dist.destroy_process_group()

    run_ranks(work, 2, tmp_path)


def both(are: str, store: dist.Store) -> None:
    """Return when both of two ranks have called it."""
    store.add(are, 1)
    wait_until(lambda: int(store.get(are)) == 2, 20, [])


def watch(connections: Connections, rank: int, store: dist.Store) -> None:
    """What the ranks do when they have made their groups."""
    store.set(f"ends/{rank}", json.dumps(connections.ends))
    connections.watch([json.loads(store.get(f"ends/{1 - rank}"))])
    assert connections._between_ranks, "gloo's connections are watched"


def test_what_a_library_opens_and_closes_while_groups_are_made_is_no_lost_connection(tmp_path: Path) -> None:
    """To a server of its own, and to one in the process of another rank: neither is recorded at both ends."""

    def work(rank: int, store: dist.Store) -> None:
        both("connected to the store", store)
        connections = Connections(of_gloo=True)
        with socket.create_server((LOOPBACK, 0)) as server:
            store.set(f"server/{rank}", str(server.getsockname()[1]))
            port_there = int(store.get(f"server/{1 - rank}"))
            with connections.recorded():
                dist.init_process_group("gloo", store=dist.PrefixStore("g", store), rank=rank, world_size=2)
                opened = [socket.create_connection((LOOPBACK, port)) for port in (server.getsockname()[1], port_there)]
                opened += [server.accept()[0], server.accept()[0]]
            watch(connections, rank, store)
            both("watching", store)
            for one in opened:
                one.close()
            assert not connections.has_lost_one()
            dist.barrier()
            assert not connections.has_lost_one()
        both("checked", store)
        dist.destroy_process_group()

    run_ranks(work, 2, tmp_path)


def test_the_end_of_a_connection_between_ranks_is_noticed_and_that_of_a_strangers_is_not(tmp_path: Path) -> None:
    """Strangers that came while the groups were made: gloo ends the connections of some and holds on to those of others."""

    def work(rank: int, store: dist.Store) -> None:
        both("connected to the store", store)
        connections = Connections(of_gloo=True)
        before, strangers_said = listening_at([os.getpid()]), (b"", b"abc", b"12345678", b"x" * 100)
        came = [(socket.socket(), said) for said in strangers_said]  # made before, so that their own ends are not recorded
        with connections.recorded():
            dist.init_process_group("gloo", store=dist.PrefixStore("g", store), rank=rank, world_size=2)
            (address,) = listening_at([os.getpid()]) - before
            for stranger, said in came:
                stranger.connect((LOOPBACK, address[1]))
                stranger.sendall(said)
            dist.new_group([0, 1])
        watch(connections, rank, store)
        assert not connections.has_lost_one()
        for stranger, _ in came:
            stranger.close()
        time.sleep(0.3)
        dist.barrier()
        assert not connections.has_lost_one()
        dist.barrier()
        both("checked", store)  # a barrier ends for one rank before it does for the other, who still needs the connections
        if rank == 0:
            connections.break_all()
        wait_until(connections.has_lost_one, 20, [])
        dist.destroy_process_group()

    run_ranks(work, 2, tmp_path)


def disturbed(port: int, pids: Callable[[], list[int]], stop: threading.Event, first: threading.Event) -> int:
    """Strangers at the door, 300 of them before the ranks meet, and at every port of the ranks; until ``stop``. How many were taken."""
    held: list[socket.socket] = []
    count = 0
    while not stop.is_set():
        places = {(LOOPBACK, port), *listening_at(pids())} if first.is_set() else {(LOOPBACK, port)}
        for address in places:
            came = strangers(address, 300 if not held else 20)
            held, count = held + came, count + len(came)
        while len(held) > 400:
            held.pop(0).close()
        if held:
            first.set()
        time.sleep(0.02)
    for connection in held:
        connection.close()
    return count


def timed_run(folder: Path, *, with_strangers: bool, **flags: Any) -> tuple[float, int]:
    """Seconds from the start to the first step, and how many strangers came in all."""
    port = free_port()
    common = {"pipeline_group_size": 2, "world_size": 2, "dist_url": f"tcp://{LOOPBACK}:{port}", "num_threads": 1, "device": "cpu"}
    common |= {"rendezvous_timeout": 60, "checkpoint_path": folder / "run", **flags}
    began, first_row_s, log = time.monotonic(), 0.0, folder / "run" / "train_log.jsonl"
    processes = launch(lambda rank: train_argv(**common, rank=rank), 2, folder)
    stop, first = threading.Event(), threading.Event()
    counts: list[int] = []
    pester = threading.Thread(
        target=lambda: counts.append(disturbed(port, lambda: [process.pid for process in processes], stop, first)), daemon=True
    )
    try:
        if with_strangers:
            pester.start()
        while any(process.poll() is None for process in processes):
            if not first_row_s and log.exists() and log.stat().st_size:
                first_row_s = time.monotonic() - began
            time.sleep(0.02)
            assert time.monotonic() - began < 90, "\n".join(process.text for process in processes)
        assert [process.wait(1) for process in processes] == [0, 0], "\n".join(process.text for process in processes)
    finally:
        stop.set()
        for process in processes:
            process.kill()
        if with_strangers:
            pester.join(10)
    return first_row_s, sum(counts)


@full
def test_a_thousand_strangers_at_all_ports_change_no_loss_and_delay_no_start(model_folder: Path, tasks: list[Path], tmp_path: Path) -> None:
    flags = {**eight_sequences(model_folder, tasks), "total_steps": 40, "checkpoint_steps": 1000}
    quiet = sorted(timed_run(tmp_path / f"quiet{n}", with_strangers=False, **flags)[0] for n in range(2))
    loud = [timed_run(tmp_path / f"loud{n}", with_strangers=True, **flags) for n in range(2)]
    assert min(count for _, count in loud) >= 300 and sum(count for _, count in loud) >= 1000, loud
    assert min(first_s for first_s, _ in loud) - quiet[0] < 2.0, (quiet, loud)
    assert losses(tmp_path / "loud0" / "run") == losses(tmp_path / "loud1" / "run") == losses(tmp_path / "quiet0" / "run")


SLOW_NAMES = """
import socket, sys, threading, time
sys.path[:0] = ["tests", "."]
from datetime import timedelta
silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); silent.bind(("127.0.0.1", 53))
began = time.monotonic()
try: socket.getnameinfo(("10.82.0.1", 1), socket.NI_NAMEREQD)
except OSError: pass
if time.monotonic() - began < 4: print("names are fast here"); sys.exit(3)
from comms.hub import Hub
from comms.rendezvous import listen
from comms.store_tunnel import StoreTunnel, join_store, serve_store
from comms.deadlines import Deadlines
from comms.lifeline import Lifeline
from support.hubs import SECRET, at_once, hello_of, strangers
began = time.monotonic()
listener, store = listen("10.82.0.1", 0), serve_store(timedelta(seconds=10))
served_s = time.monotonic() - began
door = listener.getsockname()
hub = Hub(listener, secret=SECRET, world_size=2, deadline_s=20, store_port=store.port, describe=str)
held = strangers(door, 300)
began = time.monotonic()
said = at_once(*(lambda rank=rank: Lifeline(door, SECRET, deadline_s=20).join(hello_of(rank)) for rank in (0, 1)))
join_store(StoreTunnel(door, SECRET, "rank 1", Deadlines())).set("a", "b")
took_s = served_s + time.monotonic() - began
print(said, took_s)
sys.exit(0 if len(held) > 100 and took_s < 2 and store.get("a") == b"b" and all("roster" in s for s in said) else 1)
"""


@full
def test_names_that_take_seconds_to_look_up_delay_no_start() -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making network namespaces needs root and iproute2")
    name = f"clm{os.getpid()}names"
    folder = Path("/etc/netns") / name
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:5 attempts:1\n")
        for words in (f"netns add {name}", f"-n {name} link set lo up", f"-n {name} addr add 10.82.0.1/32 dev lo"):
            if subprocess.run(["ip", *words.split()], capture_output=True).returncode:
                pytest.skip("this machine makes no network namespaces")
        command = ["ip", "netns", "exec", name, sys.executable, "-c", SLOW_NAMES]
        ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
        if ran.returncode == 3:
            pytest.skip("this machine gives a namespace no resolver of its own")
        assert ran.returncode == 0, ran.stdout + ran.stderr
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def holds_marker(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "secret" and MARKER.encode() in path.read_bytes()]


@sample(1)
@pytest.mark.parametrize("way", ["file", "environment"])
def test_the_secret_is_in_nothing_that_a_job_leaves(way: str, model_folder: Path, tasks: list[Path], tmp_path: Path) -> None:
    flags = {**eight_sequences(model_folder, tasks), "total_steps": 2, "checkpoint_path": tmp_path / "run"}
    with contextlib.suppress(ImportError):
        import wandb  # noqa: F401

        flags["train_log_backend"] = "wandb"
    file = secret_file(tmp_path)
    before = (lambda rank: None) if way == "file" else (lambda rank: os.environ.update(DIST_SECRET=MARKER))
    train(tmp_path, stages=2, before=before, secret_file=file if way == "file" else None, **flags)
    assert log_rows(tmp_path / "run") and holds_marker(tmp_path) == []


@full
def test_the_secret_is_in_no_argument_and_not_in_what_a_supervisor_tells(model_folder: Path, tasks: list[Path], tmp_path: Path) -> None:
    flags = {**eight_sequences(model_folder, tasks), "total_steps": 100_000, "checkpoint_path": tmp_path / "run", "max_restarts": 1}
    flags |= {"rank": 0, "world_size": 1, "device": "cpu", "dist_url": f"tcp://{LOOPBACK}:{free_port()}", "num_threads": 1}
    with (tmp_path / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "dist_clm_train.py", *train_argv(**flags)],
            cwd=REPOSITORY,
            env={**os.environ, "DIST_SECRET": MARKER},
            stdout=output,
            stderr=output,
        )
    try:
        give_up = time.monotonic() + 60
        while not (workers := psutil.Process(process.pid).children(recursive=True)) or not (tmp_path / "run").exists():
            assert process.poll() is None and time.monotonic() < give_up, (tmp_path / "output.txt").read_text()
            time.sleep(0.05)
        for seen in (psutil.Process(process.pid), *workers):
            assert MARKER not in " ".join(seen.cmdline()) and MARKER not in seen.environ().get("TRAINER_SUPERVISED", "")
        assert any("TRAINER_SUPERVISED" in worker.environ() for worker in workers)
    finally:
        for seen in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
            with contextlib.suppress(psutil.Error):
                seen.kill()
        process.wait(20)
    assert holds_marker(tmp_path) == []
