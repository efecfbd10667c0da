"""hosts.yaml: which hosts a WireGuard tunnel joins. Read, checked, and every host given an address; comms/wireguard.py writes the rest.

    subnet: 10.88.0.0/24            # addresses inside the tunnel: private IPv4. This is the default
    interface: wg0                  # what the tunnel is called on each host. Default
    listen_port: 51820              # UDP. Default
    keepalive: 25                   # seconds between packets that keep a home router's mapping open. Default
    hosts:
      - name: berlin                # also the folder's name
        endpoint: 203.0.113.7:51820 # host-or-address:port where the others reach it; an IPv6 address in [brackets] and quotes
      - name: laptop                # no endpoint: behind a home router, it calls the others
        address: 10.88.0.9          # left out: what it had before, else the next free one
        open_tcp_ports: [22]        # ports that its firewall.nft leaves open to everybody besides the tunnel. Default: none
        # interface, listen_port and keepalive may be set per host too

Promises: the answer is sound (names are folder names, addresses distinct and inside the subnet, every pair of hosts can meet), or one
UserError lists everything that is wrong. Every scalar is read as text, so nothing in the file is ever anything but words and numbers.
"""

import dataclasses
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address
from typing import Any

import yaml

from user_error import UserError

TOP_KEYS = ("subnet", "interface", "listen_port", "keepalive", "hosts")
HOST_KEYS = ("name", "endpoint", "address", "interface", "listen_port", "keepalive", "open_tcp_ports")
DEFAULTS = {"subnet": "10.88.0.0/24", "interface": "wg0", "listen_port": "51820", "keepalive": "25"}
PRIVATE = tuple(IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"))
HOST_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*\.?")


@dataclass(frozen=True, kw_only=True)
class Host:
    """One host of the tunnel. ``endpoint`` None: behind a router that lets nobody in; ``address`` None: not given yet."""

    name: str
    endpoint: str | None
    address: IPv4Address | None
    interface: str
    listen_port: int
    keepalive_s: int
    open_tcp_ports: tuple[int, ...]

    @property
    def tunnel_address(self) -> IPv4Address:
        """Its address inside the tunnel, after with_addresses."""
        assert self.address is not None, "with_addresses gives every host an address"
        return self.address


@dataclass(frozen=True, kw_only=True)
class Tunnel:
    """All hosts, in the order of the file, and the network of their addresses inside the tunnel."""

    subnet: IPv4Network
    hosts: tuple[Host, ...]

    @property
    def relay(self) -> Host | None:
        """Who passes packets on between hosts without endpoint: the first host that has one. None where no two hosts need it."""
        if sum(host.endpoint is None for host in self.hosts) < 2:
            return None
        return next((host for host in self.hosts if host.endpoint is not None), None)


class _TextLoader(yaml.BaseLoader):
    """Makes nothing but text, lists and mappings; a key that stands twice is an error instead of a silent choice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise UserError(
                f"a key may stand once in a mapping; {_shown(twice[0])} stands twice, line {node.start_mark.line + 1}. Delete one"
            )
        return super().construct_mapping(node, deep=deep)


def read_tunnel(text: str) -> Tunnel:
    """The tunnel that ``text`` (of a hosts.yaml) describes; hosts without address have none yet. Raises UserError with all mistakes."""
    try:
        data = _TextLoader(text).get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"hosts.yaml must be YAML; {reason}. An address in [brackets] needs quotes around it") from error
    if not isinstance(data, dict) or not isinstance(data.get("hosts"), list):
        raise UserError(f"hosts.yaml must hold a list of hosts under 'hosts'; it is {_shown(data)}. See python -m comms.wireguard --help")
    problems: list[str] = []
    _note_unknown(problems, data, TOP_KEYS, "hosts.yaml")
    subnet = _noted(problems, _subnet, data.get("subnet") or DEFAULTS["subnet"])
    hosts = [_noted(problems, _host, entry, place, data) for place, entry in enumerate(data["hosts"], start=1)]
    known = [host for host in hosts if host is not None]
    if len(hosts) < 2:
        problems.append(f"a tunnel needs at least two hosts; there are {len(hosts)}. Add the others under 'hosts'")
    problems += _clashes(known)
    if subnet is not None:
        problems += _misplaced(known, subnet)
        if subnet.num_addresses - 2 < len(hosts):
            problems.append(
                f"subnet must have an address for each of the {len(hosts)} hosts; {subnet} has not. Take a wider one, such as /24"
            )
    if len(known) == len(hosts):
        problems += _unreachable(known)
    if problems or subnet is None:
        raise UserError("\n".join(problems))
    return Tunnel(subnet=subnet, hosts=tuple(known))


def with_addresses(tunnel: Tunnel, before: Mapping[str, IPv4Address]) -> Tunnel:
    """Every host with an address: that of hosts.yaml, else the one it had ``before`` (by name), else the lowest that is free."""
    taken = {host.address for host in tunnel.hosts if host.address is not None}
    kept: dict[str, IPv4Address] = {}
    for host in tunnel.hosts:
        had = before.get(host.name)
        if host.address is None and had is not None and had not in taken and _is_usable(had, tunnel.subnet):
            kept[host.name] = had
            taken.add(had)
    free = (address for address in tunnel.subnet.hosts() if address not in taken)
    given = [host.address or kept.get(host.name) or next(free) for host in tunnel.hosts]
    hosts = (dataclasses.replace(host, address=address) for host, address in zip(tunnel.hosts, given, strict=True))
    return dataclasses.replace(tunnel, hosts=tuple(hosts))


def _host(entry: Any, place: int, top: Mapping[str, Any]) -> Host:
    """The host in the ``place``-th entry under 'hosts'."""
    if not isinstance(entry, dict):
        raise UserError(f"host {place} must be a mapping that begins with a name; it is {_shown(entry)}. Write: - name: berlin")
    name = entry.get("name")
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name)
        or name[-1] == "."
        or name.casefold() == "readme.md"
    ):
        rule = "must be a folder's name of letters, digits, '-', '_' and '.', at most 63 characters, beginning with a letter or digit"
        raise UserError(f"the name of host {place} {rule}; it is {_shown(name)}. Rename it")
    problems: list[str] = []
    _note_unknown(problems, entry, HOST_KEYS, name)
    settings = {key: entry.get(key) or top.get(key) or default for key, default in DEFAULTS.items()}
    endpoint = _noted(problems, _endpoint, name, entry["endpoint"]) if entry.get("endpoint") else None
    address = _noted(problems, _address, name, entry["address"]) if entry.get("address") else None
    interface = _noted(problems, _interface, name, settings["interface"])
    listen_port = _noted(problems, _number, f"{name}: listen_port", settings["listen_port"], "a UDP port")
    keepalive_s = _noted(problems, _number, f"{name}: keepalive", settings["keepalive"], "seconds")
    ports = entry.get("open_tcp_ports") or []
    if not isinstance(ports, list):
        problems.append(f"{name}: open_tcp_ports must be a list; it is {_shown(ports)}. Write: open_tcp_ports: [22]")
        ports = []
    open_tcp_ports = [_noted(problems, _number, f"{name}: an entry of open_tcp_ports", port, "a TCP port") for port in ports]
    if problems or interface is None or listen_port is None or keepalive_s is None:
        raise UserError("\n".join(problems))
    return Host(
        name=name,
        endpoint=endpoint,
        address=address,
        interface=interface,
        listen_port=listen_port,
        keepalive_s=keepalive_s,
        open_tcp_ports=tuple(sorted({port for port in open_tcp_ports if port is not None})),
    )


def _subnet(value: Any) -> IPv4Network:
    try:
        subnet = IPv4Network(value if isinstance(value, str) else "")
    except ValueError as error:
        rule = "must be an IPv4 network whose address ends where its prefix does"
        raise UserError(f"subnet {rule}; it is {_shown(value)} ({error}). Write one such as {DEFAULTS['subnet']}") from error
    if not any(subnet.subnet_of(private) for private in PRIVATE) or subnet.prefixlen > 30:
        ranges = ", ".join(map(str, PRIVATE))
        raise UserError(f"subnet must lie in a private range ({ranges}) and have a prefix of at most 30; it is {subnet}. Take another")
    return subnet


def _endpoint(name: str, value: Any) -> str:
    """``value`` as it is written into a configuration: where other hosts send this one's packets."""
    found = re.fullmatch(r"(?:\[(?P<v6>[^]]*)\]|(?P<host>[^:\[\]]+)):(?P<port>[0-9]{1,5})", value) if isinstance(value, str) else None
    cure = "Write host-or-address:port, such as berlin.example.org:51820 or '[2001:db8::7]:51820'; leave it out for a host behind a router"
    if found is None:
        raise UserError(f"{name}: endpoint must be host-or-address:port; it is {_shown(value)}. {cure}")
    _number(f"{name}: the port of endpoint", found["port"], "a UDP port")
    try:
        if found["v6"] is not None:
            address: IPv4Address | IPv6Address | None = IPv6Address(found["v6"].partition("%")[0])
        else:
            is_dotted = re.fullmatch(r"[0-9.]+", found["host"])
            address = IPv4Address(found["host"]) if is_dotted else None
    except AddressValueError as error:
        raise UserError(f"{name}: endpoint must hold a whole address; it is {_shown(value)} ({error}). {cure}") from error
    if (address is None and not HOST_NAME.fullmatch(found["host"])) or (found["v6"] is not None and "%" in found["v6"]):
        raise UserError(f"{name}: endpoint must hold a host's name or address; it is {_shown(value)}. {cure}")
    if address is not None and (address.is_loopback or address.is_multicast or address.is_unspecified):
        raise UserError(f"{name}: endpoint must be where other hosts reach it; nobody else reaches {address}. {cure}")
    return str(value)


def _address(name: str, value: Any) -> IPv4Address:
    try:
        return IPv4Address(value if isinstance(value, str) else "")
    except AddressValueError as error:
        rule = "address must be an IPv4 address inside the tunnel, without a prefix"
        raise UserError(f"{name}: {rule}; it is {_shown(value)}. Write one such as 10.88.0.9, or leave it out") from error


def _interface(name: str, value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,14}", value):
        return value
    rule = "interface must be 1 to 15 letters, digits, '-' and '_', beginning with a letter"
    raise UserError(f"{name}: {rule}; it is {_shown(value)}. Write one such as wg0")


def _number(what: str, value: Any, unit: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,5}", value) and 1 <= int(value) <= 65535:
        return int(value)
    raise UserError(f"{what} must be a whole number from 1 to 65535 ({unit}); it is {_shown(value)}. Correct it")


def _clashes(hosts: list[Host]) -> list[str]:
    """What may belong to one host only. Names are compared as file systems without upper case see them."""
    problems = []
    for what, cure in (
        ("name", "Rename one"),
        ("address", "Give one another, or none"),
        ("endpoint", "Forward another port to one of them"),
    ):
        owners: dict[str, list[str]] = {}
        for host in hosts:
            if (value := getattr(host, what)) is not None:
                owners.setdefault(str(value).casefold(), []).append(host.name)
        problems += [
            f"no two hosts may have the same {what}; {value} is that of {' and '.join(names)}. {cure}"
            for value, names in owners.items()
            if len(names) > 1
        ]
    return problems


def _misplaced(hosts: list[Host], subnet: IPv4Network) -> list[str]:
    problems = []
    for host in hosts:
        if host.address is not None and not _is_usable(host.address, subnet):
            rule = f"address must be one for a host inside subnet {subnet} (the first and the last of it are not)"
            problems.append(f"{host.name}: {rule}; it is {host.address}. Give it another, or change subnet")
        outer = (host.endpoint or "").rpartition(":")[0]
        if re.fullmatch(r"[0-9.]+", outer) and IPv4Address(outer) in subnet:
            rule = f"endpoint must be outside the tunnel's subnet {subnet}, or the tunnel's packets would be sent into itself"
            problems.append(f"{host.name}: {rule}; it is {host.endpoint}. Change one of the two")
    return problems


def _unreachable(hosts: list[Host]) -> list[str]:
    behind = [host.name for host in hosts if host.endpoint is None]
    if len(behind) < 2 or len(behind) < len(hosts):
        return []
    rule = "of two hosts at least one must have an endpoint, or a third host must have one and relay"
    cure = "Give one an endpoint (on its home router: forward the UDP port to it), or add a host that has one"
    return [f"{rule}; {', '.join(behind)} have none and there is no other host. {cure}"]


def _is_usable(address: IPv4Address, subnet: IPv4Network) -> bool:
    return address in subnet and address not in (subnet.network_address, subnet.broadcast_address)


def _note_unknown(problems: list[str], given: Mapping[Any, Any], keys: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in keys:
            problems.append(f"{where}: keys must be among {', '.join(keys)}; {_shown(key)} is not. Correct or delete it")


def _noted(problems: list[str], check: Any, *values: Any) -> Any:
    """``check(*values)``, or None and its message among ``problems``, so that the user hears of everything at once."""
    try:
        return check(*values)
    except UserError as error:
        problems.append(str(error))
        return None


def _shown(value: Any) -> str:
    """``value`` in few words, however long or deep it is."""
    return reprlib.repr(value)
