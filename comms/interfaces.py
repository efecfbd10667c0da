"""Which network interface the job talks through, checked before anything listens or connects.

A wrong name on one rank would make the *others* wait a whole timeout, so a name is held against this host's interfaces at once. psutil
lists them (netifaces, which the relatives use, is unmaintained since 2021). What this leaves to others: opening sockets (rendezvous.py).
"""

import contextlib
import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import psutil

from user_error import UserError

SOCKET_VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}


@dataclass(frozen=True, kw_only=True)
class Interface:
    """A network interface of this host that is up, with its addresses (IPv4 first); ``address`` is the one the job listens on."""

    name: str
    addresses: tuple[str, ...]

    @property
    def address(self) -> str:
        return self.addresses[0]

    @property
    def is_loopback(self) -> bool:
        return ip_address(self.address.split("%")[0]).is_loopback


def list_interfaces() -> dict[str, Interface]:
    """The interfaces of this host that are up and have an IP address, by name."""
    stats = psutil.net_if_stats()
    found = {}
    for name, entries in psutil.net_if_addrs().items():
        by_family = {family: [e.address for e in entries if e.family == family] for family in (socket.AF_INET, socket.AF_INET6)}
        addresses = tuple(by_family[socket.AF_INET] + by_family[socket.AF_INET6])
        if addresses and name in stats and stats[name].isup:
            found[name] = Interface(name=name, addresses=addresses)
    return found


class Unreachable(UserError):
    """No such interface, or no way to --dist-url. Where there was one before it may only be away for now: Wi-Fi, a tunnel, a resolver."""


def choose_interface(name: str | None, host: str) -> Interface:
    """The interface called ``name``; without a name the one through which ``host`` (of --dist-url) is reached.

    Raises Unreachable, listing the interfaces there are, when the name is not one of them or nothing routes to the host.
    """
    interfaces = list_interfaces()
    listing = ", ".join(f"{i.name} ({i.address})" for i in interfaces.values()) or "none"
    if name is not None:
        if name not in interfaces:
            raise Unreachable(
                f"--net-interface must name an interface of this host that is up and has an address; {name!r} is not one of: {listing}"
            )
        return interfaces[name]
    source = _source_address(host)
    for interface in interfaces.values():
        if source in interface.addresses or (interface.is_loopback and ip_address(source.split("%")[0]).is_loopback):
            return interface
    raise Unreachable(
        f"no interface of this host reaches {host} of --dist-url (it would be left from {source}); name one with --net-interface: {listing}"
    )


def _source_address(host: str) -> str:
    """The local address that packets to ``host`` would carry. Connecting a datagram socket asks the routing table and sends nothing."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise Unreachable(f"the host of --dist-url must be a name or address this machine can reach; {host!r} is not ({error})") from error


def check_not_public(interface: Interface, *, allowed: bool) -> None:
    """Raises UserError for an interface whose address is one of the public internet, unless that is ``allowed``."""
    if allowed or not ip_address(interface.address.split("%")[0]).is_global or _is_tunnel(interface.name):
        return
    raise UserError(
        f"the ranks must meet over a private network; {interface.name} has the public address {interface.address}, where anybody can "
        "connect to the ports that gloo and NCCL open, and can read what is sent, since neither authenticates or encrypts. Make a tunnel "
        "with python -m comms.wireguard (docs/security.md) and pass --net-interface wg0, or, if that is what you want, "
        "--allow-public-interface"
    )


def _is_tunnel(name: str) -> bool:
    """Whether packets of this interface leave inside of others: WireGuard's and tun devices have no link layer (ARPHRD_NONE)."""
    with contextlib.suppress(OSError):
        return Path(f"/sys/class/net/{name}/type").read_text().strip() == "65534"
    return False


def select_for_transport(interface: Interface, environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell gloo and NCCL to use ``interface`` alone, through the variables they read when a process group is made.

    Raises UserError when a variable already names another interface: silently overriding either choice would hide a mistake.
    """
    for transport, variable in SOCKET_VARIABLES.items():
        wanted = interface.name if transport == "gloo" else f"={interface.name}"  # "=": NCCL would take eth0 as a prefix of eth01
        seen = environment.get(variable)
        if seen is not None and seen.lstrip("=") != interface.name:
            raise UserError(
                f"{variable} and the chosen interface must agree; {variable} is {seen!r} and the interface is {interface.name!r} "
                f"(from --net-interface or the route to --dist-url). Unset {variable} or pass --net-interface {seen.lstrip('=')}"
            )
        environment[variable] = wanted
