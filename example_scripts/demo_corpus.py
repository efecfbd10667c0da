"""Training text that every machine already has: the sources and the docstrings of Python's own standard library.

A demo that had to download a data set would fail where there is no network. Two jsonl tasks of different character come out, so that
the demo can train on a weighted mixture. The same Python gives the same files, byte for byte.
"""

import ast
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SOURCES_NAME = "stdlib_sources.jsonl"
DOCSTRINGS_NAME = "stdlib_docstrings.jsonl"

# Not the library: installed packages, tests, and what distributions generate or vendor.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "_vendor", "_bundled"}
SKIPPED_FOLDERS |= {"encodings", "pydoc_data"}  # tables
MAX_FILE_CHARS = 60_000  # a few huge modules must not be most of the corpus
MIN_DOCSTRING_CHARS = 60


def library_files(stdlib: Path) -> Iterator[tuple[str, str]]:
    """(relative path, text) of the library's modules, in an order that mixes the packages and is the same on every run."""
    names = []
    for folder, subfolders, files in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        names += [(Path(folder) / name).relative_to(stdlib).as_posix() for name in files if name.endswith(".py")]
    # by hash: the first few MB of an alphabetical list would be asyncio, collections and ctypes
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        try:
            text = (stdlib / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # a file in another encoding, or one this user may not read: there are plenty
            continue
        if text.strip() and len(text) <= MAX_FILE_CHARS:
            yield name, text


def docstrings(name: str, text: str) -> Iterator[str]:
    """One text per documented module, class and function of a file: its dotted name and arguments, then the docstring."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):  # templates that only look like Python
        return
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def walk(node: ast.AST, title: str) -> Iterator[str]:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(node)
            if doc and len(doc) >= MIN_DOCSTRING_CHARS:
                arguments = f"({ast.unparse(node.args)})" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else ""
                yield f"{title}{arguments}\n\n{doc}\n"
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from walk(child, f"{title}.{child.name}")

    yield from walk(tree, module)


def write_jsonl(path: Path, texts: Iterator[str], max_bytes: int) -> tuple[int, int]:
    """One {"text": ...} record per line until ``max_bytes`` are written; returns (records, bytes)."""
    num_records = num_bytes = 0
    with path.open("wb") as file:
        for text in texts:
            try:
                line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            except UnicodeEncodeError:  # half a surrogate pair, written as an escape in a docstring: no UTF-8 for it
                continue
            if num_bytes + len(line) > max_bytes:
                break
            file.write(line)
            num_records, num_bytes = num_records + 1, num_bytes + len(line)
    return num_records, num_bytes


def write_corpus(folder: Path, *, max_bytes_per_task: int = 2_000_000, stdlib: Path | None = None) -> dict[Path, tuple[int, int]]:
    """Write both tasks to ``folder``; returns path -> (records, bytes). ``stdlib`` is where this Python keeps its library."""
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    sources = (text for _, text in library_files(stdlib))
    documents = (text for name, source in library_files(stdlib) for text in docstrings(name, source))
    return {
        folder / SOURCES_NAME: write_jsonl(folder / SOURCES_NAME, sources, max_bytes_per_task),
        folder / DOCSTRINGS_NAME: write_jsonl(folder / DOCSTRINGS_NAME, documents, max_bytes_per_task),
    }
