"""python -m comms.wireguard: what it writes joins every pair of hosts, keeps its keys and hides what is sent; end to end, in namespaces."""

import base64
import itertools
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.namespaces import ESTABLISHED, LISTEN, ip, local_addresses
from support.ranks import REPOSITORY, log_rows, train_argv
from support.tiers import full

from comms import tunnel_hosts
from comms.tunnel_hosts import Tunnel, read_tunnel, with_addresses
from comms.tunnel_texts import peers_of
from comms.wireguard import main, public_key
from user_error import UserError

THREE = """
hosts:
  - name: berlin
    endpoint: 203.0.113.7:51820
  - name: laptop
  - name: desk
"""


def write(folder: Path, text: str = THREE) -> tuple[Path, list[str]]:
    """A hosts.yaml beside DIR, and the arguments for both."""
    hosts = folder / "hosts.yaml"
    hosts.write_text(text)
    return folder / "out", ["--hosts", str(hosts), "--out", str(folder / "out")]


def sections(path: Path) -> list[dict[str, str]]:
    """[Interface] and every [Peer] of a configuration."""
    found: list[dict[str, str]] = []
    for line in path.read_text().splitlines():
        if line.startswith("["):
            found.append({})
        elif line and not line.startswith("#"):
            key, value = line.split(" = ", 1)
            found[-1][key] = value
    return found


def secrets_of(out: Path) -> set[str]:
    keys = {part[key] for path in out.glob("*/*.conf") for part in sections(path) for key in ("PrivateKey", "PresharedKey") if key in part}
    assert keys
    return keys


def tunnel_of(endpoints: tuple[bool, ...]) -> Tunnel:
    lines = [f"  - name: h{i}\n" + (f"    endpoint: 198.51.100.{i}:51820\n" if has else "") for i, has in enumerate(endpoints, start=1)]
    return with_addresses(read_tunnel("hosts:\n" + "".join(lines)), {})


@pytest.mark.parametrize("endpoints", [e for n in (2, 3, 4) for e in itertools.product((True, False), repeat=n) if any(e)], ids=str)
def test_every_host_reaches_every_other_and_is_let_in_on_the_way(endpoints: tuple[bool, ...]) -> None:
    """WireGuard's own rule played on paper: a packet goes to the peer that allows its target, who takes it if it allows its source."""
    tunnel = tunnel_of(endpoints)
    for source, target in itertools.permutations(tunnel.hosts, 2):
        here, hops = source, 0
        while here != target:
            (peer,) = [p for p in peers_of(here, tunnel) if target.tunnel_address in p.allowed_addresses]
            assert here == source or here == tunnel.relay, "only the relay passes packets on"
            assert here.endpoint or peer.host.endpoint, "somebody can be called"
            (back,) = [p for p in peers_of(peer.host, tunnel) if p.host == here]
            assert source.tunnel_address in back.allowed_addresses
            here, hops = peer.host, hops + 1
        assert hops == (2 if source.endpoint is None and target.endpoint is None else 1)


def test_a_configuration_is_ready_for_wg_quick(tmp_path: Path) -> None:
    out, argv = write(tmp_path, THREE + "    listen_port: 40000\n    keepalive: 11\nlisten_port: 50000\nsubnet: 192.168.77.0/28\n")
    assert main(argv) == 0
    berlin, laptop, desk = (sections(out / name / "wg0.conf") for name in ("berlin", "laptop", "desk"))
    assert [host[0]["Address"] for host in (berlin, laptop, desk)] == ["192.168.77.1/28", "192.168.77.2/28", "192.168.77.3/28"]
    assert [host[0]["ListenPort"] for host in (berlin, laptop, desk)] == ["50000", "50000", "40000"]
    assert berlin[0]["PostUp"] == "sysctl -q -w net.ipv4.conf.%i.forwarding=1" and "PostUp" not in laptop[0]
    assert [peer["AllowedIPs"] for peer in berlin[1:]] == ["192.168.77.2/32", "192.168.77.3/32"]
    assert [peer["AllowedIPs"] for peer in desk[1:]] == ["192.168.77.1/32, 192.168.77.2/32"]
    assert desk[1]["Endpoint"] == "203.0.113.7:51820" and desk[1]["PersistentKeepalive"] == "11"
    assert all("Endpoint" not in peer and "PersistentKeepalive" not in peer for peer in berlin[1:])
    assert berlin[2]["PublicKey"] == public_key(desk[0]["PrivateKey"]) and desk[1]["PublicKey"] == public_key(berlin[0]["PrivateKey"])
    assert berlin[2]["PresharedKey"] == desk[1]["PresharedKey"] != berlin[1]["PresharedKey"] == laptop[1]["PresharedKey"]
    rules = (out / "desk" / "firewall.nft").read_text()
    assert "policy drop" in rules and "udp dport 40000 accept" in rules and 'iifname "wg0" ip saddr { 192.168.77.1, 192.168.77.2 }' in rules
    commands = (out / "README.md").read_text()
    assert "--net-interface wg0 --dist-url tcp://192.168.77.1:9000" in commands and "sudo wg-quick up wg0" in commands
    assert "berlin relays between laptop, desk" in commands and not any(secret in commands for secret in secrets_of(out))


def test_everything_in_the_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    out, argv = write(tmp_path)
    before = os.umask(0)
    try:
        assert main(argv) == 0
    finally:
        os.umask(before)
    for path in [out, *out.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert "*" in (out / ".gitignore").read_text().splitlines()
    (out / "desk").chmod(0o755)
    (out / "desk" / "wg0.conf").chmod(0o644)
    assert main(argv) == 0
    assert [stat.S_IMODE((out / name).stat().st_mode) for name in ("desk", "desk/wg0.conf")] == [0o700, 0o600]


def test_a_public_key_is_that_of_rfc_7748() -> None:
    """Bob's keys, section 6.1."""
    private, public = (
        base64.b64encode(bytes.fromhex(text)).decode()
        for text in (
            "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
            "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
        )
    )
    assert public_key(private) == public


def test_a_second_run_keeps_keys_and_addresses_and_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, argv = write(tmp_path)
    assert main(argv) == 0
    first = {path: path.read_text() for path in out.rglob("*") if path.is_file()}
    assert main(argv) == 0
    assert {path: path.read_text() for path in out.rglob("*") if path.is_file()} == first, "nothing changed, no .old is left"
    capsys.readouterr()

    write(tmp_path, "hosts:\n  - name: early\n  - name: desk\n  - name: berlin\n    endpoint: 203.0.113.8:51820\n  - name: laptop\n")
    before = {name: sections(out / name / "wg0.conf") for name in ("berlin", "laptop", "desk")}
    assert main(argv) == 0
    after = {name: sections(out / name / "wg0.conf") for name in ("berlin", "laptop", "desk")}
    for name in before:
        assert {key: before[name][0][key] for key in ("PrivateKey", "Address")} == {
            key: after[name][0][key] for key in ("PrivateKey", "Address")
        }
    assert before["desk"][1]["PresharedKey"] == after["desk"][1]["PresharedKey"]
    assert sections(out / "early" / "wg0.conf")[0]["Address"] == "10.88.0.4/24"
    said = capsys.readouterr().out
    assert "early 10.88.0.4: new keys" in said and "desk 10.88.0.3: known, keys kept" in said
    assert "- Endpoint = 203.0.113.7:51820" in said and "+ Endpoint = 203.0.113.8:51820" in said
    assert (out / "desk" / "wg0.conf.old").read_text() == first[out / "desk" / "wg0.conf"]
    assert not any(secret in said for secret in secrets_of(out))

    write(tmp_path, THREE.replace("desk", "attic"))
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "desk: not in hosts.yaml any more" in said and (out / "desk" / "wg0.conf").exists()
    assert "(hidden; " in said and not any(secret in said for secret in secrets_of(out))


def test_an_interface_of_another_name_keeps_the_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, argv = write(tmp_path)
    assert main(argv) == 0
    write(tmp_path, THREE + "interface: home0\n")
    assert main(argv) == 0
    assert sections(out / "desk" / "home0.conf")[0]["PrivateKey"] == sections(out / "desk" / "wg0.conf")[0]["PrivateKey"]
    assert "wg0.conf is of an earlier name of the interface and holds keys. Delete it" in capsys.readouterr().out


def test_the_lists_in_the_documentation_are_accepted(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "security.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    help_text = tunnel_hosts.__doc__ or ""
    for text in (example, help_text.split("\n\n")[1]):
        out, argv = write(tmp_path, textwrap.dedent(text))
        assert main(argv) == 0 and "tcp dport { 22 } accept" in "".join(path.read_text() for path in out.glob("*/firewall.nft"))


@pytest.mark.parametrize("damage", ["", "hello", "[Interface]\nPrivateKey = short\n", "[Interface]\nPrivateKey = \xff\n[Peer]\n"])
def test_a_damaged_configuration_is_named_and_not_replaced_by_fresh_keys(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, argv = write(tmp_path)
    assert main(argv) == 0
    path = out / "laptop" / "wg0.conf"
    path.write_bytes(damage.encode("latin-1"))
    others = {other: other.read_bytes() for other in out.rglob("*") if other.is_file()}
    assert main(argv) == 2
    assert f"{path} must be a configuration that an earlier run wrote" in capsys.readouterr().err
    assert {other: other.read_bytes() for other in out.rglob("*") if other.is_file()} == others


def test_hosts_without_endpoint_need_one_that_has_one() -> None:
    with pytest.raises(UserError, match="laptop, desk have none and there is no other host"):
        read_tunnel("hosts:\n  - name: laptop\n  - name: desk\n")


BAD = {
    "  - name: a/b": "the name of host 2 must be a folder's name of letters.*'a/b'",
    "  - name: ..": "the name of host 2 must be a folder's name",
    "  - name: README.md": "the name of host 2",
    "  - just text": "host 2 must be a mapping.*'just text'",
    "  - name: Berlin": "no two hosts may have the same name; berlin is that of berlin and Berlin",
    "  - {name: b, endpoint: '203.0.113.7:51820'}": "no two hosts may have the same endpoint",
    "  - {name: b, address: 10.88.0.9}\n  - {name: c, address: 10.88.0.9}": "no two hosts may have the same address; 10.88.0.9",
    "  - {name: b, address: 10.89.0.9}": "b: address must be one for a host inside subnet 10.88.0.0/24.*it is 10.89.0.9",
    "  - {name: b, address: 10.88.0.255}": "b: address must be one for a host inside subnet",
    "  - {name: b, address: 10.88.0.9/24}": "b: address must be an IPv4 address.*'10.88.0.9/24'",
    "  - {name: b, listen_port: 70000}": "b: listen_port must be a whole number from 1 to 65535.*'70000'",
    "  - {name: b, keepalive: 2.5}": "b: keepalive must be a whole number",
    "  - {name: b, interface: 'wg 0'}": "b: interface must be 1 to 15 letters.*'wg 0'",
    "  - {name: b, endpoint: b.example.org}": "b: endpoint must be host-or-address:port",
    "  - {name: b, endpoint: 'b.example.org:0'}": "b: the port of endpoint must be a whole number from 1",
    "  - {name: b, endpoint: '300.1.1.1:51820'}": "b: endpoint must hold a whole address",
    "  - {name: b, endpoint: '127.0.0.1:51820'}": "nobody else reaches 127.0.0.1",
    "  - {name: b, endpoint: '10.88.0.77:51820'}": "endpoint must be outside the tunnel's subnet",
    "  - {name: b, endpoint: [::1]:51820}": "hosts.yaml must be YAML",
    '  - {name: b, endpoint: "b:1\\nPostUp = reboot:1"}': "b: endpoint must be host-or-address:port",
    "  - {name: b, adress: 10.88.0.9}": "b: keys must be among name, endpoint, address.*'adress' is not",
    "  - {name: b, open_tcp_ports: 22}": "b: open_tcp_ports must be a list",
    "  - {name: b, name: c}": "stands twice",
    "  - name: b\nsubnet: 10.88.0.1/24": "subnet must be an IPv4 network",
    "  - name: b\nsubnet: fd00::/64": "subnet must be an IPv4 network",
    "  - name: b\nsubnet: 8.8.8.0/24": "subnet must lie in a private range",
    "  - name: b\n  - name: c\nsubnet: 10.88.0.0/30": "subnet must have an address for each of the 3 hosts",
    "  - name: b\nport: 1": "hosts.yaml: keys must be among",
    "": "a tunnel needs at least two hosts; there are 1",
    "  - name: b\nhosts2: [": "hosts.yaml must be YAML",
}


@pytest.mark.parametrize("text", BAD, ids=str)
def test_bad_input_is_said_with_rule_value_and_cure_and_nothing_is_written(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, argv = write(tmp_path, f"hosts:\n  - name: berlin\n    endpoint: 203.0.113.7:51820\n{text}\n")
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert re.search(BAD[text], said), said
    assert not out.exists() and "Traceback" not in said


def test_all_mistakes_are_said_at_once() -> None:
    with pytest.raises(UserError) as caught:
        read_tunnel("hosts:\n  - {name: a, listen_port: x, keepalive: y}\n  - {name: b, address: z}\nsubnet: w\nmore: v\n")
    assert all(f"'{value}'" in str(caught.value) for value in ("x", "y", "z", "w", "more"))


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--hosts", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert "none.yaml cannot be read or written: No such file" in capsys.readouterr().err
    out, argv = write(tmp_path)
    out.write_text("a file")
    assert main(argv) == 2
    assert f"{out} cannot be read or written" in capsys.readouterr().err
    (tmp_path / "hosts.yaml").write_bytes(b"\xff\xfe\xfa")
    assert main(argv) == 2
    assert "must be text in UTF-8" in capsys.readouterr().err


PIECES = st.sampled_from(
    [
        *("hosts:\n", "  - name: a\n", "  - name: b\n", "    endpoint: x:1\n", "    address: 10.88.0.3\n", "subnet: 10.0.0.0/30\n"),
        *("&a ", "*a", "[", "{", "!!python/object:os.system x\n", "? [a]\n", "<<: ", "0x1f", "\x00", "---\n", "'", "!!int q", "- "),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(PIECES).map("".join)))
def test_any_text_is_a_tunnel_or_a_user_error(text: str) -> None:
    try:
        tunnel = with_addresses(read_tunnel(text), {"a": IPv4Address("10.0.0.1"), "b": IPv4Address("10.0.0.1")})
    except UserError:
        return
    assert len({host.tunnel_address for host in tunnel.hosts}) == len(tunnel.hosts)


def test_a_deep_or_self_containing_file_is_refused() -> None:
    for text in ("[" * 5000, "hosts: &a [*a, *a]", "&a {*a : b}"):
        with pytest.raises(UserError):
            read_tunnel(text)


def test_without_cryptography_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.x25519", None)
    out, argv = write(tmp_path)
    assert main(argv) == 2
    assert "pip install cryptography" in capsys.readouterr().err and not out.exists()


def test_as_a_module_it_answers_help_and_imports_no_optional_package() -> None:
    done = subprocess.run([sys.executable, "-m", "comms.wireguard", "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "keepalive: 25" in done.stdout and not done.stderr
    code = "import comms.wireguard, sys; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


# From here on: three hosts as network namespaces. "hub" has an endpoint and a cable to each of the others, which have neither an endpoint
# nor a way to each other. What runs over the cables is recorded in "hub", where one end of every cable is.

OUTER_PORT = 51820
RECORDER = """
import signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
tap.setsockopt(socket.SOL_SOCKET, 33, 2**26)  # SO_RCVBUFFORCE: lose nothing
with open(sys.argv[1], "w", buffering=1) as file:
    file.write("ready\\n")
    while True:
        frame, (device, *_) = tap.recvfrom(2**16)
        file.write(f"{device} {frame.hex()}\\n")
"""
TOOLS = ("ip", "ping", "wg", "wg-quick", "wireguard-go", "sysctl")


class Net:
    """The three namespaces, by the names of their hosts, and the folder of their configurations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespaces = {name: f"wg{os.getpid()}{name}" for name in ("hub", "left", "right")}
        self.addresses = {"hub": "10.88.0.1", "left": "10.88.0.2", "right": "10.88.0.3"}

    def lay_cables(self) -> None:
        for namespace in self.namespaces.values():
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        hub = self.namespaces["hub"]
        for number, name in enumerate(("left", "right"), start=1):
            ip("link", "add", name, "netns", hub, "type", "veth", "peer", "name", "out", "netns", self.namespaces[name])
            for namespace, device, last in ((hub, name, 1), (self.namespaces[name], "out", 2)):
                ip("-n", namespace, "addr", "add", f"10.83.{number}.{last}/24", "dev", device)
                ip("-n", namespace, "link", "set", device, "up")
        ip("-n", self.namespaces["right"], "route", "add", "10.83.1.1", "via", "10.83.2.1")

    def run(self, host: str, *words: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(["ip", "netns", "exec", self.namespaces[host], *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
        return done

    def start(self, host: str, *words: str, output: Path, cwd: Path = REPOSITORY) -> "subprocess.Popen[bytes]":
        with output.open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespaces[host], *words],
                cwd=cwd,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment(),
            )

    @staticmethod
    def environment() -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
        return {**kept, "WG_QUICK_USERSPACE_IMPLEMENTATION": "wireguard-go"}

    def bring_up(self, host: str) -> None:
        """As a user would, but with a /run of its own: wireguard-go's socket there is named after the interface alone."""
        path = self.folder / "out" / host / "wg0.conf"
        script = f"mount -t tmpfs none /run && mkdir /run/wireguard && exec wg-quick up {path}"
        words = ["ip", "netns", "exec", self.namespaces[host], "sh", "-c", script]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=self.environment())
        assert done.returncode == 0, done.stdout + done.stderr

    def ping(self, source: str, target: str, *, timeout_s: float = 15) -> bool:
        give_up = time.monotonic() + timeout_s
        while time.monotonic() < give_up:
            if self.run(source, "ping", "-c", "1", "-W", "1", self.addresses[target], check=False).returncode == 0:
                return True
        return False

    def clean_up(self) -> None:
        """wireguard-go ends with its interface; whatever is left in our namespaces is ours."""
        for namespace in self.namespaces.values():
            subprocess.run(["ip", "-n", namespace, "link", "del", "wg0"], capture_output=True)
        for namespace in self.namespaces.values():
            for _ in range(30):
                left = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
                if not left:
                    break
                time.sleep(0.1)
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    """Three namespaces joined by what the command wrote, brought up with wg-quick."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install wireguard-go wireguard-tools iproute2 iputils-ping procps)")
    if os.geteuid() != 0:
        pytest.skip("making network namespaces and tunnels needs root")
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"wireguard-go needs /dev/net/tun: {error.strerror}")
    net = Net(tmp_path_factory.mktemp("tunnel"))
    try:
        try:
            net.lay_cables()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
        text = "hosts:\n  - name: hub\n    endpoint: 10.83.1.1:51820\n  - name: left\n  - name: right\n"
        assert main(write(net.folder, text)[1]) == 0
        for name in net.namespaces:
            net.bring_up(name)
        yield net
    finally:
        net.clean_up()


class Recording:
    """Frames seen in "hub", by device."""

    def __init__(self, net: Net, folder: Path) -> None:
        self._file = folder / "frames.txt"
        self._process = net.start("hub", sys.executable, "-c", RECORDER, str(self._file), output=folder / "recorder.txt")
        give_up = time.monotonic() + 20
        while not (self._file.exists() and self._file.read_text().startswith("ready\n")):
            assert time.monotonic() < give_up and self._process.poll() is None, (folder / "recorder.txt").read_text()
            time.sleep(0.02)

    def stop(self) -> tuple[list[bytes], list[bytes]]:
        """Frames on the cables, and packets on wg0."""
        time.sleep(0.3)  # what is in the socket's buffer
        self._process.terminate()
        self._process.wait(20)
        rows = [line.split() for line in self._file.read_text().splitlines()[1:]]
        seen = [(row[0], bytes.fromhex(row[1])) for row in rows if len(row) == 2]
        return [frame for device, frame in seen if device in ("left", "right")], [frame for device, frame in seen if device == "wg0"]


def strangers_in(frames: list[bytes]) -> list[bytes]:
    """Those that are neither the tunnel's nor what finds neighbours (ARP, ICMPv6)."""

    def is_expected(frame: bytes) -> bool:
        kind = frame[12:14]
        if kind == b"\x08\x00" and frame[23] == socket.IPPROTO_UDP:
            start = 14 + 4 * (frame[14] & 15)
            return str(OUTER_PORT) in {str(int.from_bytes(frame[start + i : start + i + 2], "big")) for i in (0, 2)}
        return kind == b"\x08\x06" or kind == b"\x86\xdd"

    return [frame for frame in frames if not is_expected(frame)]


def test_hosts_behind_routers_meet_and_nobody_on_the_cable_can_read_them(net: Net, tmp_path: Path) -> None:
    recording = Recording(net, tmp_path)
    for source, target in itertools.permutations(net.namespaces, 2):
        assert net.ping(source, target), f"{source} does not reach {target}"
    marker = b"what only the ends and the relay may read " * 4
    code = f"import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto({marker!r}, ({net.addresses['right']!r}, 9))"
    net.run("left", sys.executable, "-c", code)
    outer, inner = recording.stop()
    assert len(outer) > 10 and not strangers_in(outer)
    assert any(marker in frame for frame in inner), "the recorder does see what is there to be seen"
    assert not any(marker[:20] in frame for frame in outer)


@full
def test_a_job_over_the_tunnel_is_unreadable_on_the_cable(net: Net, model_folder: Path, tasks: list[Path], tmp_path: Path) -> None:
    """Two stages on the hosts behind routers: rendezvous, store, activations and gradients all go through the relay, and nothing beside."""
    secret = tmp_path / "secret"
    secret.write_text("6f" * 32)
    secret.chmod(0o600)
    flags = {
        "model_name": model_folder,
        "task_name": tasks[0],
        "checkpoint_path": tmp_path / "run",
        "seq_length": 32,
        "batch_size": 4,
        "micro_batch_size": 1,
        "total_steps": 5,
        "pipeline_group_size": 2,
        "world_size": 2,
        "dist_url": f"tcp://{net.addresses['left']}:9000",
        "net_interface": "wg0",
        "secret_file": secret,
        "num_threads": 1,
        "device": "cpu",
        "rendezvous_timeout": 60,
    }
    assert net.ping("left", "right")
    recording = Recording(net, tmp_path)
    processes = [
        net.start(host, sys.executable, "dist_clm_train.py", *train_argv(**flags, rank=rank), output=tmp_path / f"rank{rank}.txt")
        for rank, host in enumerate(("left", "right"))
    ]
    sockets: set[str] = set()
    try:
        give_up = time.monotonic() + 120
        while any(process.poll() is None for process in processes) and time.monotonic() < give_up:
            for process in processes:
                with suppress(OSError):
                    if os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net"):  # it has entered its namespace
                        sockets |= local_addresses(process.pid, LISTEN) | local_addresses(process.pid, ESTABLISHED)
            time.sleep(0.05)
        said = "\n".join((tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1))
        assert [process.poll() for process in processes] == [0, 0], said
    finally:
        for process in processes:
            process.kill()
            process.wait()
        outer, inner = recording.stop()
    assert log_rows(tmp_path / "run")[-1]["step"] == 5
    assert {"10.88.0.2", "10.88.0.3"} <= sockets <= {"10.88.0.2", "10.88.0.3", "127.0.0.1"}
    assert len(outer) > 50 and not strangers_in(outer)
    known = b'"world_size"'  # what every rank says of itself
    assert any(known in frame for frame in inner) and not any(known in frame for frame in outer)
    assert sum(map(len, inner)) > 5 * 4 * 2 * (32 * 32 * 4), "activations and gradients (steps x sequences x both x T x C x fp32) pass too"
    assert not any(secret.read_bytes() in frame for frame in inner), "the secret itself is never sent"


def test_the_firewall_lets_only_the_tunnel_in(net: Net, tmp_path: Path) -> None:
    if shutil.which("nft") is None or net.run("hub", "nft", "list", "tables", check=False).returncode:
        pytest.skip("no nft, or a kernel without nf_tables")
    code = "import socket, time; s = socket.create_server(('0.0.0.0', 8123)); print('ready', flush=True); time.sleep(60)"
    server = net.start("hub", sys.executable, "-c", code, output=tmp_path / "server.txt")

    def connects(address: str) -> bool:
        probe = f"import socket; socket.create_connection(({address!r}, 8123), timeout=2)"
        return net.run("left", sys.executable, "-c", probe, check=False).returncode == 0

    rules = {name: str(net.folder / "out" / name / "firewall.nft") for name in net.namespaces}
    try:
        give_up = time.monotonic() + 20
        while "ready" not in (tmp_path / "server.txt").read_text():
            assert time.monotonic() < give_up
            time.sleep(0.02)
        assert net.ping("left", "hub") and connects("10.83.1.1"), "open before"
        for _ in range(2):  # loading them again is no mistake
            for name, path in rules.items():
                net.run(name, "nft", "-f", path)
        assert connects(net.addresses["hub"]) and not connects("10.83.1.1")
        assert all(net.ping(source, target) for source, target in itertools.permutations(net.namespaces, 2)), "relaying included"
        for name in rules:
            net.run(name, "nft", "delete", "table", "inet", "trainer_tunnel")
        assert connects("10.83.1.1"), "and open again"
    finally:
        for name in rules:
            net.run(name, "nft", "delete", "table", "inet", "trainer_tunnel", check=False)
        server.kill()
        server.wait()
