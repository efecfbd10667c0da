"""A private network for hosts in different homes: one ready WireGuard configuration per host, from one list of hosts.

    python -m comms.wireguard --hosts hosts.yaml --out DIR

hosts.yaml is described in comms/tunnel_hosts.py. DIR gets, readable by you alone, README.md with the commands to type, and per host
    DIR/<name>/wg0.conf       for wg-quick: its keys, its address, its peers; a key of its own for every pair of hosts besides
    DIR/<name>/firewall.nft   for nft: from outside only the tunnel's UDP port, inside the tunnel everything from peers

Two hosts without endpoint cannot call each other: the first host with one relays between them, and can read what they say.

Promises: run again, it keeps the keys and addresses of hosts that DIR knows and makes keys for new ones; it says what changed and leaves
the file as it was beside the new one (wg0.conf.old). Nothing is written if anything is wrong. No key is shown, logged or in an argument.
Exit status: 0 written, 2 hosts.yaml, DIR or the command line is wrong. Leaves to others: copying the files, and bringing the tunnel up.
"""

import argparse
import base64
import binascii
import contextlib
import difflib
import hashlib
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING

import comms.tunnel_hosts
from comms.tunnel_hosts import Tunnel, read_tunnel, with_addresses
from comms.tunnel_texts import FIREWALL, README, Keys, configuration, firewall, peers_of, readme
from user_error import UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

KEY_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Known:
    """What an earlier run wrote into a host's configuration. Keys are in base64, as WireGuard has them."""

    private_key: str
    address: IPv4Address | None
    preshared_keys: Mapping[str, str] = field(repr=False)  # by the peer's public key


def public_key(private_key: str) -> str:
    """The public half of a private key, both in base64 (X25519, RFC 7748). Raises UserError if the package cryptography is missing."""
    private_type = _x25519()
    return _text(private_type.from_private_bytes(_key_bytes(private_key)).public_key().public_bytes_raw())


def make_keys(tunnel: Tunnel, known: Mapping[str, Known]) -> Keys:
    """The keys of ``known`` hosts and pairs, and fresh random ones for the rest."""
    fresh = _x25519()
    private = {
        host.name: known[host.name].private_key if host.name in known else _text(fresh.generate().private_bytes_raw())
        for host in tunnel.hosts
    }
    public = {name: public_key(key) for name, key in private.items()}
    preshared: dict[frozenset[str], str] = {}
    for host in tunnel.hosts:
        for peer in peers_of(host, tunnel):
            pair = frozenset((host.name, peer.host.name))
            had = known[host.name].preshared_keys.get(public[peer.host.name]) if host.name in known else None
            if had is not None:
                preshared.setdefault(pair, had)
    for host in tunnel.hosts:
        for peer in peers_of(host, tunnel):
            preshared.setdefault(frozenset((host.name, peer.host.name)), _text(secrets.token_bytes(KEY_BYTES)))
    return Keys(private=private, public=public, preshared=preshared)


def read_known(text: str, path: Path) -> Known:
    """What a configuration of an earlier run says. Raises UserError naming ``path`` if it is none; it is not replaced by fresh keys."""
    sections: list[dict[str, str]] = []
    for line in text.splitlines():
        words = line.partition("#")[0].strip()
        if words.startswith("["):
            sections.append({})
        elif "=" in words and sections:
            key, _, value = words.partition("=")
            sections[-1][key.strip().casefold()] = value.strip()
    cure = "Mend it, or move it away for fresh keys (the other hosts then need their files again)"
    try:
        own, *peers = sections or [{}]
        private = own.get("privatekey", "")
        _key_bytes(private)
        preshared = {peer["publickey"]: peer["presharedkey"] for peer in peers if "publickey" in peer and "presharedkey" in peer}
        for key in preshared.values():
            _key_bytes(key)
    except ValueError as error:
        raise UserError(
            f"{path} must be a configuration that an earlier run wrote; a key in it is no 32 bytes in base64. {cure}"
        ) from error
    with contextlib.suppress(AddressValueError):
        return Known(private_key=private, address=IPv4Address(own.get("address", "").partition("/")[0]), preshared_keys=preshared)
    return Known(private_key=private, address=None, preshared_keys=preshared)


def known_hosts(tunnel: Tunnel, out: Path) -> dict[str, Known]:
    """What DIR knows of the tunnel's hosts, by name. Raises UserError where a file cannot be read."""
    found = {}
    for host in tunnel.hosts:
        path = out / host.name / f"{host.interface}.conf"
        if not path.is_file():  # its interface may have had another name
            others = sorted((out / host.name).glob("*.conf"))
            path = others[0] if len(others) == 1 else path
        if path.is_file():
            found[host.name] = read_known(path.read_bytes().decode(errors="replace"), path)
    return found


def changes(before: str, after: str) -> list[str]:
    """The lines that differ, each behind - or +, with a digest's beginning in the place of every secret key."""
    old, new = ([_without_secret(line) for line in text.splitlines()] for text in (before, after))
    lines = list(difflib.unified_diff(old, new, lineterm="", n=0))[2:]
    return [f"{line[0]} {line[1:]}" for line in lines if not line.startswith("@@") and line[1:].strip()]


def write_all(tunnel: Tunnel, out: Path) -> list[str]:
    """Make or renew DIR. Returns what was done, a line each. Raises UserError, or OSError where the disk refuses."""
    known = known_hosts(tunnel, out)
    tunnel = with_addresses(tunnel, {name: had.address for name, had in known.items() if had.address is not None})
    keys = make_keys(tunnel, known)
    texts = {
        host.name: {f"{host.interface}.conf": configuration(host, tunnel, keys), FIREWALL: firewall(host, tunnel)} for host in tunnel.hosts
    }
    _private_folder(out)
    said = []
    for host in tunnel.hosts:
        _private_folder(out / host.name)
        written = [line for name, text in texts[host.name].items() for line in _renew(out / host.name / name, text)]
        kept = "known, keys kept" if host.name in known else "new keys"
        said += [f"{host.name} {host.tunnel_address}: {kept}{'' if written else ', unchanged'}", *written]
        said += [
            f"  {path} is of an earlier name of the interface and holds keys. Delete it"
            for path in sorted((out / host.name).glob("*.conf"))
            if path.name not in texts[host.name]
        ]
    _renew(out / README, readme(tunnel))
    _renew(out / ".gitignore", "# Private keys.\n*\n")
    names = {host.name for host in tunnel.hosts}
    left = sorted(path.name for path in out.iterdir() if path.is_dir() and path.name not in names and any(path.glob("*.conf")))
    said += [f"{name}: not in hosts.yaml any more, so no host talks to it; {out / name} holds its keys. Delete it" for name in left]
    if tunnel.relay is not None:
        said.append(f"{tunnel.relay.name} relays between hosts without endpoint: it can read what they say to each other")
    return [*said, f"The commands to type are in {out / README}"]


def _renew(path: Path, text: str) -> list[str]:
    """Write ``text``, readable by the owner alone, in one go; an earlier one that differs stays as .old. Returns lines to say."""
    before = path.read_bytes() if path.exists() else None
    if before == text.encode():
        path.chmod(0o600)
        return []
    if before is not None and path.name not in (README, ".gitignore"):
        _write_private(path.with_name(f"{path.name}.old"), before)
    _write_private(path, text.encode())
    if before is None:
        return [f"  wrote {path}"]
    return [f"  changed {path} (before: {path.name}.old)", *(f"    {line}" for line in changes(before.decode(errors="replace"), text))]


def _write_private(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _private_folder(path: Path) -> None:
    path.mkdir(mode=0o700, parents=path.parent != path and not path.parent.exists(), exist_ok=True)
    path.chmod(0o700)


def _x25519() -> "type[X25519PrivateKey]":
    try:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    except ImportError as error:
        raise UserError(
            "making WireGuard keys needs the package cryptography, which is not installed. "
            "pip install cryptography, or this project's extra: pip install '.[wireguard]'"
        ) from error
    return X25519PrivateKey


def _text(key: bytes) -> str:
    return base64.b64encode(key).decode()


def _key_bytes(text: str) -> bytes:
    """Raises ValueError unless ``text`` is 32 bytes in base64."""
    key = base64.b64decode(text, validate=True)
    if len(key) != KEY_BYTES:
        raise binascii.Error(f"{len(key)} bytes")
    return key


def _without_secret(line: str) -> str:
    def hide(found: re.Match[str]) -> str:
        return f"{found[1]}(hidden; {hashlib.sha256(found[2].encode()).hexdigest()[:6]})"

    return re.sub(r"(?i)^(\s*(?:PrivateKey|PresharedKey)\s*=\s*)(.*)$", hide, line)


def main(argv: Sequence[str] | None = None) -> int:
    """The command of the module's docstring; returns the exit status."""
    about = f"{__doc__}\nThe format of the list: {comms.tunnel_hosts.__doc__}"
    parser = argparse.ArgumentParser(
        prog="python -m comms.wireguard", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=Path, required=True, metavar="hosts.yaml", help="the list of hosts")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="made or renewed; keys in it are kept")
    arguments = parser.parse_args(argv)
    try:
        text = arguments.hosts.read_bytes().decode()
        for line in write_all(read_tunnel(text), arguments.out):
            print(line)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
    except UnicodeDecodeError as error:
        sys.stderr.write(f"{arguments.hosts} must be text in UTF-8; it is not ({error}). Save it as UTF-8\n")
    except OSError as error:
        path = error.filename or arguments.out
        sys.stderr.write(f"{path} cannot be read or written: {error.strerror or error}. Check the path and its permissions\n")
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
