"""Remake requirements.lock: one file of exact pins that fits every Python the project promises.

pip resolves for the interpreter it runs under, and newest releases drop old Pythons, so one freeze does not fit all. This script asks
the pip of each interpreter on PATH, without installing anything, and writes a pin per version with an environment marker where they
differ. Pins of the present file are kept where they still resolve; ``--upgrade`` forgets them.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCH_VERSION = "2.13.0"
# What the CUDA build of torch brings along. Not in the lock: the CPU build must not download gigabytes that it never loads.
CUDA_ONLY = ("nvidia-", "cuda-", "triton")

HEADER = """\
# Exact versions of everything in .venv: what the project needs, the `dev` extra, and what those need.
# Made by `make lock` (example_scripts/lock_requirements.py), which asks the pip of each Python named below; do not edit by hand.
# Remake after a change of pyproject.toml: `make lock` keeps the pins that still fit, `make lock UPGRADE=1` takes the newest.
# torch stands without a local version: setup_env.py installs 2.13.0+cpu or the CUDA build first, and either satisfies the pin.
# The libraries that only the CUDA build needs are not listed; it brings them.
# Resolved for: Python {pythons}, Linux x86_64.
"""


def normal(name: str) -> str:
    """The one spelling of a package name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def marker(some: list[str], every: list[str]) -> str:
    """The environment marker that is true for ``some`` of ``every`` (both ascending); '' when it is all of them."""
    if some == every:
        return ""
    if some == every[: len(some)]:
        return f'python_version < "{every[len(some)]}"'
    if some == every[-len(some) :]:
        return f'python_version >= "{some[0]}"'
    return " or ".join(f'python_version == "{version}"' for version in some)


def merge(pins: dict[str, dict[str, str]]) -> list[str]:
    """Lines of the lock from ``pins``: Python version -> {package: version}."""
    every = list(pins)
    lines = []
    for name in sorted({name for found in pins.values() for name in found}):
        versions: dict[str, list[str]] = {}
        for python in every:
            if name in pins[python]:
                versions.setdefault(pins[python][name], []).append(python)
        for version, some in versions.items():
            condition = marker(some, every)
            lines.append(f"{name}=={version}" + (f" ; {condition}" if condition else ""))
    return lines


def requirements() -> list[str]:
    """Dependencies of the project and of its dev extra, and setuptools, which the editable install needs."""
    text = (ROOT / "pyproject.toml").read_text()

    def listed(key: str) -> list[str]:
        found = re.search(rf"^{key} = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
        if found is None:
            sys.exit(f"lock: pyproject.toml has no list named {key}")
        return re.findall(r'^\s+"([^"]+)"', found.group(1), re.MULTILINE)

    return [*listed("dependencies"), *listed("dev"), f"torch=={TORCH_VERSION}", "setuptools>=77"]


def resolve(python: str, constraints: Path) -> dict[str, str]:
    """{package: version} that pip would install under ``python``, an interpreter's path."""
    with tempfile.TemporaryDirectory() as folder:
        venv, report = Path(folder) / "venv", Path(folder) / "report.json"
        pip = [str(venv / "bin" / "python"), "-m", "pip"]
        subprocess.run([python, "-m", "venv", str(venv)], check=True)
        subprocess.run([*pip, "install", "-q", "--upgrade", "pip"], check=True)  # old ones fetch whole wheels to read their metadata
        command = [*pip, "install", "-q", "--dry-run", "--ignore-installed", "--only-binary", ":all:", "--report", str(report)]
        done = subprocess.run([*command, "-c", str(constraints), *requirements()])
        if done.returncode != 0:
            sys.exit(f"lock: no solution for {python}; pip's message stands above. `make lock UPGRADE=1` drops the old pins.")
        chosen = json.loads(report.read_text())["install"]
    found = {normal(entry["metadata"]["name"]): entry["metadata"]["version"].partition("+")[0] for entry in chosen}
    return {name: version for name, version in found.items() if not name.startswith(CUDA_ONLY)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="forget the pins of the present file")
    parser.add_argument("--constraints", type=Path, default=ROOT / "requirements.lock", help="pins to keep where they resolve")
    parser.add_argument("--output", type=Path, default=ROOT / "requirements.lock", help="file to write")
    options = parser.parse_args()
    found = {version: shutil.which(f"python{version}") for version in PYTHONS}
    missing = [version for version, path in found.items() if path is None]
    if missing:
        sys.exit(f"lock: python{', python'.join(missing)} not on PATH. The lock promises {', '.join(PYTHONS)}, so each has to be asked.")
    constraints = Path("/dev/null") if options.upgrade else options.constraints
    pins = {}
    for version, path in found.items():
        print(f"lock: resolving for Python {version}", flush=True)
        pins[version] = resolve(str(path), constraints)
    options.output.write_text(HEADER.format(pythons=", ".join(PYTHONS)) + "\n".join(merge(pins)) + "\n")
    print(f"lock: wrote {options.output}")


if __name__ == "__main__":
    main()
