"""Promises of data files named by an http(s) address, over a server on loopback."""

import functools
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from support.packing import open_plainly

from tasks.task_list import parse_task_list
from user_error import UserError


def write(path: Path, lines: list[bytes]) -> Path:
    """A plain or, by its name, a compressed file."""
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(zstandard.compress(content) if path.suffix == ".zst" else content)
    return path


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode()


def read(path: Path | str, num: int = 1) -> list[str]:
    """The first texts in shuffled order, of more than one pass if `num` is more than the file holds."""
    (spec,) = parse_task_list(str(path))
    documents = open_plainly(1)(spec, 0)
    texts, place = [], (0, 0)
    for _ in range(num):
        document = documents.next_good(*place)
        texts.append(document.example.text)
        place = (document.pass_index, document.position + 1)
    documents.close()
    return texts


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A loopback server of tmp_path/served, and a download cache of this test's own."""
    datasets = pytest.importorskip("datasets", reason="addresses need the optional package datasets")
    pytest.importorskip("aiohttp", reason="addresses need the optional package aiohttp")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "served")))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_address_is_read_like_a_local_file(tmp_path: Path, address: str) -> None:
    """In the same order too, by the ending of its name, whatever query follows the name."""
    texts = [f"document {n}" for n in range(30)]
    for name in ("a.jsonl", "b.jsonl.zst"):
        local = write(tmp_path / "served" / name, [line(text) for text in texts])
        assert read(f"{address}/{name}?version=1", 70) == read(local, 70)
        assert sorted(read(local, 30)) == sorted(texts)


def test_bad_data_behind_an_address_is_named_by_the_address(tmp_path: Path, address: str) -> None:
    write(tmp_path / "served" / "a.jsonl", [line("a"), b"oops"])
    with pytest.raises(UserError, match=rf"{address}/a\.jsonl:2: "):
        read(f"{address}/a.jsonl")


def test_an_address_that_cannot_be_downloaded_is_an_error(address: str) -> None:
    url = f"{address}/none.jsonl"
    with pytest.raises(UserError, match=rf"must be downloadable .*; {url} failed with FileNotFoundError.*Correct the address"):
        read(url)


def failing_download(self: object, url: str) -> str:
    raise ImportError('HTTPFileSystem requires "requests" and "aiohttp" to be installed')


@pytest.mark.parametrize("missing", ["datasets", "aiohttp"])
def test_addresses_without_the_optional_packages_are_an_error_that_names_the_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """`datasets` 5 installs without aiohttp, and then fails at the first http address only."""
    pytest.importorskip("datasets", reason="the case of a missing aiohttp needs the optional package datasets")
    if missing == "datasets":
        monkeypatch.setitem(sys.modules, "datasets", None)
    else:
        monkeypatch.setattr("datasets.DownloadManager.download", failing_download)
    with pytest.raises(UserError, match=r"`pip install datasets aiohttp`"):
        read("http://127.0.0.1:9/a.jsonl")
