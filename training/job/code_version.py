"""Which code a rank runs, as a short digest of its source files: ranks with different code would agree on flags and differ in bytes."""

import hashlib
from pathlib import Path

ROOMS = ("checkpoint", "comms", "data_parallel", "modules", "optim", "pipeline_parallel", "tasks", "training")
DIGITS = 12


def code_version(root: Path | None = None) -> str:
    """Hex digits of the sha256 over the names and bytes of all Python files in the rooms that take part in a training. root: of the
    project; left out: the one this file is in."""
    root = root or Path(__file__).resolve().parents[2]
    digest = hashlib.sha256((root / "user_error.py").read_bytes())
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:DIGITS]
