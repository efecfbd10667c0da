"""From --dist-url (or torchrun's environment) to a store that all ranks of this job, and only they, use.

Rank 0 binds the one listening socket itself, on the address of the chosen interface: TCPStore left alone would listen on every
address. --dist-url is the hub's door, and the way to the TCPStore that process groups need (store_tunnel.py). Under torchrun the port in
MASTER_PORT is held by its agent, so its store only carries the hub's address (torchrun_store.py)."""

import errno
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from comms.interfaces import Interface, list_interfaces
from comms.torchrun_store import TorchrunStore
from user_error import UserError

DEFAULT_DIST_URL = "tcp://127.0.0.1:9000"


@dataclass(frozen=True, kw_only=True)
class Door:
    """Where the ranks meet: a fixed host and port, or torchrun's agent that says where."""

    host: str
    port: int
    agent_prefix: str | None = None

    def __str__(self) -> str:
        return f"tcp://{self.host}:{self.port}"


def parse_dist_url(url: str) -> Door:
    """Raises UserError unless ``url`` is tcp://HOST:PORT with a port of 1 .. 65535."""
    scheme, separator, rest = url.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not separator or not host or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise UserError(f"--dist-url must be tcp://HOST:PORT with a port of 1 .. 65535, such as tcp://192.168.1.10:9000; it is {url!r}")
    return Door(host=host.strip("[]"), port=int(port))


def door_of_torchrun(environment: Mapping[str, str] = os.environ) -> Door | None:
    """The door that torchrun's variables describe, or None outside torchrun."""
    if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        return None
    prefix = None
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        prefix = f"trainer/{environment.get('TORCHELASTIC_RUN_ID', '')}"
    if not environment["MASTER_PORT"].isdigit():
        raise UserError(
            f"MASTER_PORT of the environment must be a port number; it is {environment['MASTER_PORT']!r}. Set it right or pass --dist-url"
        )
    return Door(host=environment["MASTER_ADDR"], port=int(environment["MASTER_PORT"]), agent_prefix=prefix)


def agent_store(door: Door, timeout: timedelta) -> TorchrunStore:
    """torchrun's store, in which ranks find rank 0."""
    prefix = door.agent_prefix
    assert prefix is not None, "only torchrun has an agent"
    return TorchrunStore(lambda: dist.PrefixStore(prefix, dist.TCPStore(door.host, door.port, is_master=False, timeout=timeout)))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on exactly ``host``:``port`` (port 0: a free one). A port left by a job that just ended can be used at once.

    Raises UserError when the port is taken or the address is not this host's.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(512)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"rank 0 listens at --dist-url, so its port must be free; port {port} on {host} is taken, by another job or "
                "another rank 0. "
                "Choose another port, or end that job"
            ) from error
        if error.errno == errno.EACCES:
            raise UserError(f"rank 0 listens at --dist-url, and port {port} needs privileges; choose a port above 1023") from error
        raise UserError(
            f"rank 0 listens at --dist-url, so its host must be an address of this machine; {host} is not ({error.strerror})"
        ) from error
    return listener


def check_door_is_here(door: Door, interface: Interface) -> str:
    """On rank 0: the address to listen on for ``door``. Raises UserError unless it is one of the chosen interface's."""
    addresses = {str(info[4][0]) for info in socket.getaddrinfo(door.host, door.port, type=socket.SOCK_STREAM)}
    for address in interface.addresses:
        if address.split("%")[0] in addresses:
            return address
    if interface.is_loopback and all(a.startswith("127.") or a == "::1" for a in addresses):
        return sorted(addresses)[0]  # the whole of 127.0.0.0/8 belongs to lo, Debian's 127.0.1.1 for the host name too
    owners = [i.name for i in list_interfaces().values() if addresses & set(i.addresses)]
    where = f"belongs to {owners[0]}" if owners else "is not an address of this machine"
    raise UserError(
        f"rank 0 listens at --dist-url on the chosen interface only; {door.host} {where}, the interface is {interface.name} "
        f"({', '.join(interface.addresses)}). Use an address of {interface.name} in --dist-url, or another --net-interface"
    )
