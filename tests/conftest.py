"""Fixtures: a tiny random GPT-J and GPT-NeoX with a tokenizer, and data for them, made once per session with transformers and tokenizers.

No downloads.
"""

import json
import os
import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; what the tests start is to hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from support import tiers
from support.models import TEXTS, make_model, make_neox_model, make_tokenizer
from support.namespaces import HOSTS, clean_up, ip

torch.set_num_threads(1)  # forked ranks: OpenMP's threads do not survive a fork
transformers.AutoTokenizer  # noqa: B018 - imported for real here, so that forked ranks need not
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=tiers.TIERS, default=tiers.ALL, help="quick: make test; rest: what that leaves out")
    parser.addoption("--sample-seed", type=int, help="which cases of matrices are in tier quick; left out: by the commit")


def pytest_configure(config: pytest.Config) -> None:
    """Into the environment, for what is decided while test modules are imported, and for the workers of pytest-xdist."""
    config.addinivalue_line("markers", "full: in make test-all alone")
    config.addinivalue_line("markers", "sample(keep, by): make test runs some of its cases")
    config.addinivalue_line("markers", "partly: make test tries some of what it loops over")
    seed = config.getoption("--sample-seed")
    if seed is not None or tiers.SEED_VARIABLE not in os.environ:
        os.environ[tiers.SEED_VARIABLE] = str(tiers.seed_of_commit() if seed is None else seed)
    os.environ[tiers.TIER_VARIABLE] = config.getoption("--tier")


def pytest_sessionstart(session: pytest.Session) -> None:
    """The header of pytest is not shown with -q."""
    if not hasattr(session.config, "workerinput"):
        given = f"--tier {session.config.getoption('--tier')} --sample-seed {os.environ[tiers.SEED_VARIABLE]}"
        session.config.get_terminal_writer().line(f"to run the same tests: {given}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tier = config.getoption("--tier")
    tiers.mark_what_is_left_out(items)

    def has(item: pytest.Item, marker: str) -> bool:
        return item.get_closest_marker(marker) is not None

    chosen = [tiers.is_in(tier, is_full=has(item, "full"), is_partly=has(item, "partly")) for item in items]
    left_out = [item for item, is_chosen in zip(items, chosen, strict=True) if not is_chosen]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item, is_chosen in zip(items, chosen, strict=True) if is_chosen]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face GPT-J of 4 layers, width 32, 320 rows, 64 positions, with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gptj"
    make_model(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def neox_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face GPT-NeoX of 4 layers, width 32, 320 rows, 64 positions, with the same tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gptneox"
    make_neox_model(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three jsonl files of documents of unequal length."""
    folder = tmp_path_factory.mktemp("tasks")
    paths = []
    for place, size in enumerate((1, 3, 7)):
        path = folder / f"task{place}.jsonl"
        texts = [" ".join(TEXTS[i : i + 1 + i % size]) for i in range(place, 120, place + 1)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        paths.append(path)
    return paths


@pytest.fixture
def two_hosts() -> Iterator[None]:
    """Hosts .1 and .2 of 10.81.1.0/24 over "front" and of 10.81.2.0/24 over "back"."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making network namespaces needs root and iproute2")
    clean_up()
    try:
        for host in HOSTS:
            ip("netns", "add", host)
            ip("-n", host, "link", "set", "lo", "up")
        for net, name in ((1, "front"), (2, "back")):
            ip("link", "add", name, "netns", HOSTS[0], "type", "veth", "peer", "name", name, "netns", HOSTS[1])
            for number, host in enumerate(HOSTS, start=1):
                ip("-n", host, "addr", "add", f"10.81.{net}.{number}/24", "dev", name)
                ip("-n", host, "link", "set", name, "up")
    except subprocess.CalledProcessError as error:
        clean_up()
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
    yield
    clean_up()
