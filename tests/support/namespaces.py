"""Two hosts in one: network namespaces with cables between them, and the sockets that a process has there."""

import os
import subprocess
import sys
from pathlib import Path

from support.ranks import REPOSITORY

HOSTS = (f"clm{os.getpid()}a", f"clm{os.getpid()}b")  # other test processes make their own


LISTEN, ESTABLISHED = "0A", "01"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def clean_up() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], capture_output=True)


def local_addresses(pid: int, state: str) -> set[str]:
    """Local addresses of the TCP sockets in ``state`` in the network namespace of process ``pid``."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, seen, *_ = line.split()
            if seen == state:
                packed = local.split(":")[0].removeprefix("0000000000000000FFFF0000")  # an IPv4 address in IPv6 clothes
                found.add(".".join(str(byte) for byte in reversed(bytes.fromhex(packed))) if len(packed) == 8 else packed)
    return found


def start(rank: int, argv: list[str], folder: Path) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    with (folder / f"rank{rank}.txt").open("wb") as output:
        return subprocess.Popen(
            ["ip", "netns", "exec", HOSTS[rank], sys.executable, "dist_clm_train.py", *argv],
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
