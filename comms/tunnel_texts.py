"""The texts of a WireGuard tunnel: each host's configuration and firewall rules, and the commands to type. Pure; comms/wireguard.py writes.

Who talks to whom: a host talks directly to every other one, unless neither has an endpoint. Such pairs talk through the relay
(Tunnel.relay), which is in AllowedIPs what a router is in a routing table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from comms.tunnel_hosts import Host, Tunnel

FIREWALL, README = "firewall.nft", "README.md"
FIREWALL_TABLE = "trainer_tunnel"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Whom a host talks to directly, and the hosts that it reaches ``through`` that one."""

    host: Host
    through: tuple[Host, ...]

    @property
    def allowed_addresses(self) -> list[IPv4Address]:
        """Addresses inside the tunnel that packets from this peer may carry, and that are sent to it."""
        return [host.tunnel_address for host in (self.host, *self.through)]


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Keys in base64: by host name, and of each pair of hosts by the frozen set of the two names."""

    private: Mapping[str, str] = field(repr=False)
    public: Mapping[str, str]
    preshared: Mapping[frozenset[str], str] = field(repr=False)


def peers_of(host: Host, tunnel: Tunnel) -> list[Peer]:
    """Whom ``host`` talks to directly, in the order of the file. Every other host is one of them or reached through one of them."""
    others = [other for other in tunnel.hosts if other.name != host.name]
    far = tuple(other for other in others if host.endpoint is None and other.endpoint is None)
    return [Peer(host=other, through=far if other == tunnel.relay else ()) for other in others if other not in far]


def configuration(host: Host, tunnel: Tunnel, keys: Keys) -> str:
    """The text of ``host``'s configuration, for wg-quick."""
    relays = host == tunnel.relay
    lines = [
        f"# {host.name}: made by python -m comms.wireguard. The keys are secret; nobody but root may read this file.",
        f"# Put it at /etc/wireguard/{host.interface}.conf, then: sudo wg-quick up {host.interface}",
        "[Interface]",
        f"PrivateKey = {keys.private[host.name]}",
        f"Address = {host.tunnel_address}/{tunnel.subnet.prefixlen}",
        f"ListenPort = {host.listen_port}",
    ]
    if relays:
        behind = ", ".join(other.name for other in tunnel.hosts if other.endpoint is None)
        lines += [
            f"# This host relays between {behind}: packets that come in through the tunnel may be passed on (and no others).",
            "PostUp = sysctl -q -w net.ipv4.conf.%i.forwarding=1",
        ]
    for peer in peers_of(host, tunnel):
        through = f", and through it {', '.join(other.name for other in peer.through)}" if peer.through else ""
        lines += [
            "",
            f"# {peer.host.name}{through}",
            "[Peer]",
            f"PublicKey = {keys.public[peer.host.name]}",
            f"PresharedKey = {keys.preshared[frozenset((host.name, peer.host.name))]}",
            f"AllowedIPs = {', '.join(f'{address}/32' for address in peer.allowed_addresses)}",
        ]
        if peer.host.endpoint is not None:
            lines.append(f"Endpoint = {peer.host.endpoint}")
        if host.endpoint is None:  # its router forgets who may answer; the peer without endpoint is the one that must keep calling
            lines.append(f"PersistentKeepalive = {host.keepalive_s}")
    return "\n".join(lines) + "\n"


def firewall(host: Host, tunnel: Tunnel) -> str:
    """The text of ``host``'s rules, for nft: in a table of their own, so that they can be taken away again."""
    peers = ", ".join(str(other.tunnel_address) for other in tunnel.hosts if other.name != host.name)
    ports = ", ".join(map(str, host.open_tcp_ports))
    ssh = f"        tcp dport {{ {ports} }} accept" if ports else "        # No other port, SSH included (open_tcp_ports in hosts.yaml)."
    relays = f'        iifname "{host.interface}" oifname "{host.interface}" accept\n' if host == tunnel.relay else ""
    return f"""\
#!/usr/sbin/nft -f
# {host.name}: from outside only the tunnel's UDP port {host.listen_port}; inside the tunnel everything from its hosts.
# WITH THIS LOADED NEW SSH SESSIONS COME IN THROUGH THE TUNNEL ONLY{f", and to TCP port {ports}" if ports else ""}. Open sessions go on.
# Try it for a minute:   sudo sh -c 'nft -f {FIREWALL}; sleep 60; nft delete table inet {FIREWALL_TABLE}'
# Load it:               sudo nft -f {FIREWALL}
# Take it away:          sudo nft delete table inet {FIREWALL_TABLE}
# At every start:        copy it to /etc/wireguard/{FIREWALL}, write  include "/etc/wireguard/{FIREWALL}"  at the end of
#                        /etc/nftables.conf, and  sudo systemctl enable nftables
# Where ufw, firewalld or iptables refuse packets too, the UDP port has to be opened there as well: sudo ufw allow {host.listen_port}/udp
table inet {FIREWALL_TABLE}
delete table inet {FIREWALL_TABLE}
table inet {FIREWALL_TABLE} {{
    chain input {{
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        iifname "lo" accept
        iifname "{host.interface}" ip saddr {{ {peers} }} accept
        iifname "{host.interface}" drop
        udp dport {host.listen_port} accept
{ssh}
        # Without these an IPv6 address is lost after a while: neighbours and routers of this link, and its DHCP server.
        ip6 hoplimit 255 icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert }} accept
        ip6 saddr fe80::/10 udp dport 546 accept
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
{relays}        iifname "{host.interface}" drop
        oifname "{host.interface}" drop
    }}
}}
"""


def readme(tunnel: Tunnel) -> str:
    """The commands to type, in Markdown. Rank 0 is taken to be on the first host; any other will do."""
    first = tunnel.hosts[0]
    rows = [
        f"| {host.name} | {host.tunnel_address} | {host.endpoint or 'behind a router'} | {host.interface} | UDP {host.listen_port} |"
        for host in tunnel.hosts
    ]
    relay = ""
    if tunnel.relay is not None:
        behind = ", ".join(host.name for host in tunnel.hosts if host.endpoint is None)
        relay = f"""
{tunnel.relay.name} relays between {behind}: it must be up, its line carries their traffic twice, and it can read it. If it also runs Docker
or another firewall that passes nothing on: `sudo iptables -I FORWARD -i {tunnel.relay.interface} -o {tunnel.relay.interface} -j ACCEPT`.
"""
    per_host = "".join(_commands(host, rank, tunnel) for rank, host in enumerate(tunnel.hosts))
    return f"""\
# A WireGuard tunnel of {len(tunnel.hosts)} hosts

| host | address in the tunnel | reached at | interface | listens on |
|---|---|---|---|---|
{chr(10).join(rows)}
{relay}
This folder holds the private keys of all hosts. Copy each host its own folder and no other, then keep this one where nobody else reads it:
a later run of `python -m comms.wireguard` takes the keys from here. The UDP port of "reached at" must be forwarded by that host's router.

Install WireGuard first: `sudo apt-get install wireguard-tools nftables`. Then, per host:
{per_host}
The secret is one file, the same on every host (docs/security.md); one rank per host is shown, on the first host rank 0.

`sudo wg show` lists the latest handshake of every peer. Nothing there after 30 s: the UDP port is not let in at "reached at", or a key is
of another run. After a change: copy again, then `sudo wg-quick down {first.interface}; sudo wg-quick up {first.interface}`.
"""


def _commands(host: Host, rank: int, tunnel: Tunnel) -> str:
    """What is typed for one host: here, then there."""
    first, second = tunnel.hosts[:2]
    other = second if host == first else first
    interface = host.interface
    return f"""
## {host.name}

```
scp -r {host.name} USER@{host.name}:tunnel   # from this folder, or on a stick; what follows is typed on {host.name}
sudo install -d -m 700 /etc/wireguard
sudo install -m 600 tunnel/{interface}.conf /etc/wireguard/{interface}.conf
sudo install -m 600 tunnel/{FIREWALL} /etc/wireguard/{FIREWALL}
rm -r tunnel
sudo wg-quick up {interface}   # at every start: sudo systemctl enable wg-quick@{interface}
sudo nft -f /etc/wireguard/{FIREWALL}   # read it first: it closes all other ports
ping -c 3 {other.tunnel_address}
python dist_clm_train.py ... --rank {rank} --world-size {len(tunnel.hosts)} --secret-file secret \\
    --net-interface {interface} --dist-url tcp://{first.tunnel_address}:9000
```
"""
