"""What the fuzz tests of files share: damage that a disk, a network or a malicious hand does to a good file, and a place to read it in.

Everything is tried in a forked child that has little memory left and an alarm per example, so that a crash of the interpreter, an
allocation that a small file talks a reader into, and a loop without end are seen as such. The examples are the same in every run.
"""

import copy
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from support.ranks import fork
from support.tiers import num_examples

from checkpoint.model_folder import ModelFolder, check_model_folder
from checkpoint.weight_file import open_weight_file
from modules.families import read_model_config
from user_error import UserError

ROOM_BYTES = 384 << 20  # of address space that a reader of these small files may take; what a header lies of is gigabytes
SECONDS_PER_EXAMPLE = 20

# What json.dumps cannot write is put in as text afterwards.
_AS_TEXT = {"@DEEP@": "[" * 100_000 + "]" * 100_000, "@NESTED@": "[" * 700 + "]" * 700, "@DIGITS@": "7" * 5000, "@OPEN@": '{"a":' * 100_000}
HOSTILE_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**32 + 1, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.5, 1e308, 1e-320),
    *(float("inf"), float("-inf"), float("nan"), "", "x", "0", "\0", "\ud800", "../../etc/passwd", "/etc/passwd", "a" * 300, "é"),
    *([], {}, [[]], [None], {"a": {}}, [0] * 5, ["x", 1], {"": None}, "@DEEP@", "@NESTED@", "@DIGITS@", "@OPEN@"),
]


def text_of(value: Any) -> str:
    """JSON, with what no writer writes in it."""
    text = json.dumps(value)
    for mark, replacement in _AS_TEXT.items():
        text = text.replace(f'"{mark}"', replacement)
    return text


def containers_of(value: Any) -> list[Any]:
    """All objects and arrays in ``value`` that hold anything."""
    if not isinstance(value, (dict, list)) or not value:
        return []
    parts = value.values() if isinstance(value, dict) else value
    return [value, *(inner for part in parts for inner in containers_of(part))]


@st.composite
def damaged_values(draw: st.DrawFn, value: dict[str, Any]) -> dict[str, Any]:
    """``value`` with up to three entries, anywhere in it, of another type or size, gone, or of another name."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        containers = containers_of(value)
        if not containers:
            break
        container = draw(st.sampled_from(containers))
        place = draw(st.sampled_from(sorted(container) if isinstance(container, dict) else range(len(container))))
        what = draw(st.sampled_from(["replace", "replace", "replace", "replace", "remove", "rename"]))
        if what == "replace":
            container[place] = copy.deepcopy(draw(st.sampled_from(HOSTILE_VALUES)))
        else:
            taken = container.pop(place)
            if what == "rename" and isinstance(container, dict):
                container[draw(st.sampled_from(["", "x", "\ud800", "../x", "a" * 300, "__metadata__"]))] = taken
    return value


@st.composite
def damaged_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """``original`` cut short, with other bytes in it, with parts of it twice or missing; or any bytes at all."""
    what = draw(st.sampled_from(["cut", "flip", "flip", "insert", "repeat", "remove", "any"]))
    if what == "any":
        return draw(st.binary(max_size=200))
    place = draw(st.integers(0, len(original)))
    if what == "cut":
        return original[:place]
    if what == "insert":
        return original[:place] + draw(st.one_of(st.binary(min_size=1, max_size=20), st.sampled_from(_INSERTED))) + original[place:]
    end = min(len(original), place + draw(st.integers(1, 200)))
    if what == "repeat":
        return original[:end] + original[place:]
    if what == "remove":
        return original[:place] + original[end:]
    changed = bytearray(original)
    for _ in range(draw(st.integers(1, 6))):
        if changed:
            changed[draw(st.integers(0, min(len(changed), draw(st.sampled_from([16, 400, 10**9]))) - 1))] = draw(st.integers(0, 255))
    return bytes(changed)


_INSERTED = [b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\r", b"\xed\xa0\x80", b'"', b"\n\n", b"{", b"[" * 1500, b"," * 1000, b"9" * 5000]


@st.composite
def damaged_json(draw: st.DrawFn, value: dict[str, Any]) -> bytes:
    """A file of ``value`` that says something else, says one thing twice, or is no JSON any more."""
    what = draw(st.sampled_from(["values", "values", "values", "values", "bytes", "twice", "whole"]))
    if what == "bytes":
        return draw(damaged_bytes(json.dumps(value).encode()))
    if what == "whole":
        return text_of(draw(st.sampled_from(HOSTILE_VALUES))).encode()
    text = text_of(draw(damaged_values(value)))
    if what == "twice" and value:
        key = draw(st.sampled_from(sorted(value)))
        text = text[:-1] + f", {json.dumps(key)}: {text_of(draw(st.sampled_from(HOSTILE_VALUES)))}}}"
    return text.encode()


def put(path: Path, content: bytes) -> None:
    """Write a new file and give it the name: somebody may still have the old one mapped."""
    unnamed = path.with_name("unnamed")
    unnamed.write_bytes(content)
    os.replace(unnamed, path)


def read_or_refuse(read: Callable[[], object], *names: str) -> bool:
    """True if ``read`` gave anything, False if it refused in words with one of ``names`` in them. Whatever else it raises is raised."""
    try:
        read()
    except UserError as error:
        text = str(error)
        assert len(text) < 20_000, f"a message of {len(text)} characters"
        assert text.strip() and any(name in text for name in names), f"the message names none of {names}: {text!a}"
        text.encode(errors="surrogateescape")  # so that a terminal and a log can show it
        return False
    return True


def fuzz(folder: Path, strategy: st.SearchStrategy[Any], try_one: Callable[[Any], object], *, examples: int = 150) -> None:
    """Let ``try_one`` look at so many examples in a child with ROOM_BYTES to take; fails with the child's output."""
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last-example"

    @hypothesis.settings(
        max_examples=num_examples(examples),
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategy)
    def try_all(example: Any) -> None:
        last.write_text(ascii(example)[:2000])  # whoever crashes the interpreter leaves no other trace
        signal.alarm(SECONDS_PER_EXAMPLE)
        try_one(example)

    in_little_room(folder, try_all, lambda: last.read_text() if last.exists() else "none")


def in_little_room(folder: Path, work: Callable[[], object], about: Callable[[], str] = lambda: "") -> None:
    """Run ``work`` in a forked child, which may take ROOM_BYTES more than it has; it must come to its end."""
    folder.mkdir(parents=True, exist_ok=True)

    def child() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.alarm(SECONDS_PER_EXAMPLE)
        work()
        return 0

    process = fork(child, folder / "output.txt")
    status = process.wait(SECONDS_PER_EXAMPLE * 10)
    assert status == 0, f"status {status} (negative: a signal; -14 took too long), at: {about()}\n{process.text[-6000:]}"


def read_model(folder: Path, weights: str) -> None:
    """What every reader of a model does, down to the values."""
    found = ModelFolder.open(folder)
    check_model_folder(found, read_model_config(found.config))
    found.digest()
    found.fingerprint()


def read_tensors(path: Path) -> None:
    """Every byte of every tensor."""
    file = open_weight_file(path)
    for name in file.specs:
        values = file.read(name)
        assert values.shape == file.specs[name].shape and values.dtype == file.specs[name].dtype
        values.reshape(-1).contiguous().view(torch.uint8).sum()
