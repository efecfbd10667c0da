"""--net-interface selects the interface for real: two hosts (network namespaces) of two interfaces each, by their socket tables."""

import time
from pathlib import Path

import pytest
from support.namespaces import ESTABLISHED, LISTEN, local_addresses, start
from support.ranks import log_rows, train_argv
from support.tiers import sample

NUM_STEPS = 200  # enough that both ranks still train when their sockets are read


@sample(1)
@pytest.mark.parametrize("interface", ["back", None])
def test_store_hub_and_gloo_use_the_chosen_interface_only(
    interface: str | None, two_hosts: None, model_folder: Path, tasks: list[Path], tmp_path: Path
) -> None:
    """With the name, and without it by the route to --dist-url."""
    flags = {
        "model_name": model_folder,
        "task_name": tasks[0],
        "checkpoint_path": tmp_path / "run",
        "seq_length": 32,
        "batch_size": 4,
        "micro_batch_size": 1,
        "total_steps": NUM_STEPS,
        "pipeline_group_size": 2,
        "world_size": 2,
        "dist_url": "tcp://10.81.2.1:9123",
        "num_threads": 1,
        "device": "cpu",
        "rendezvous_timeout": 60,
        "net_interface": interface,
    }
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text("known to both hosts alone")
    processes = [start(rank, train_argv(**flags, rank=rank, secret_file=secret), tmp_path) for rank in (0, 1)]

    def said() -> str:
        return "\n".join((tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1))

    try:
        give_up = time.monotonic() + 60
        log = tmp_path / "run" / "train_log.jsonl"
        while not (log.exists() and len(log.read_text().splitlines()) > 3):
            assert time.monotonic() < give_up and all(process.poll() is None for process in processes), said()
            time.sleep(0.02)
        for number, process in enumerate(processes, start=1):
            # on loopback: torch's store, and every rank's own way to it (comms/store_tunnel.py)
            assert local_addresses(process.pid, LISTEN) == {f"10.81.2.{number}", "127.0.0.1"}
            assert local_addresses(process.pid, ESTABLISHED) == {f"10.81.2.{number}", "127.0.0.1"}
        assert [process.wait(240) for process in processes] == [0, 0], said()
        assert log_rows(tmp_path / "run")[-1]["step"] == NUM_STEPS
    finally:
        for process in processes:
            process.kill()


def test_an_interface_that_does_not_own_the_dist_url_is_refused(
    two_hosts: None, model_folder: Path, tasks: list[Path], tmp_path: Path
) -> None:
    flags = {
        "model_name": model_folder,
        "task_name": tasks[0],
        "checkpoint_path": tmp_path / "run",
        "total_steps": 1,
        "seq_length": 32,
        "dist_url": "tcp://10.81.1.1:9123",
        "net_interface": "back",
        "rank": 0,
        "world_size": 1,
    }
    process = start(0, train_argv(**flags), tmp_path)
    assert process.wait(60) == 1
    text = (tmp_path / "rank0.txt").read_text()
    assert "10.81.1.1 belongs to front, the interface is back (10.81.2.1" in text and "Traceback" not in text


def test_loopback_is_refused_where_the_peer_is_another_host() -> None:
    import socket
    import threading

    from comms.hub import Hub
    from comms.lifeline import Lifeline
    from comms.rendezvous import listen
    from comms.roster import Hello
    from comms.secret import Secret
    from user_error import UserError

    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    secret = Secret(bytes(32))
    hub = Hub(listener, secret=secret, world_size=2, deadline_s=20, store_port=None, describe=str)
    said: list[str] = []

    def join(rank: int) -> None:
        hello = Hello(rank=rank, world_size=2, host=f"h{rank}", host_id=f"id{rank}", pid=1, address="127.0.0.1", is_loopback=True, plan={})
        try:
            Lifeline(("127.0.0.1", port), secret, deadline_s=10).join(hello)
        except UserError as error:
            said.append(str(error))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    hub.close()
    assert len(said) == 2 and all("cannot meet over a loopback interface" in text for text in said)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the hub is closed"
