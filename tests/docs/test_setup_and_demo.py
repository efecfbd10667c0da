"""What the two commands of the README promise before any training starts: set-up, corpus, demo folder, launcher. No network."""

import importlib.util
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from support.tiers import sample

from user_error import UserError

REPO = Path(__file__).resolve().parent.parent.parent
SCRIPTS = REPO / "example_scripts"
LAUNCHER = SCRIPTS / "finetune_gptj.sh"


def script(name: str) -> ModuleType:
    """A module of example_scripts, which is no package: its files are run, not imported, by users."""
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))
    return importlib.import_module(name)


setup_env = script("setup_env")
lock_requirements = script("lock_requirements")
demo_corpus = script("demo_corpus")
demo = script("demo")


# --- set-up -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "has_driver", "build"), [("", False, "cpu"), ("", True, "cuda"), ("cpu", True, "cpu"), ("cuda", False, "cuda")]
)
def test_torch_follows_the_driver_unless_torch_build_says_otherwise(override: str, has_driver: bool, build: str) -> None:
    assert setup_env.wanted_build(override, has_driver) == build


def test_a_misspelt_torch_build_is_refused() -> None:
    with pytest.raises(setup_env.SetupError, match="must be cpu or cuda, not 'gpu'"):
        setup_env.wanted_build("gpu", False)


def test_the_users_own_indexes_are_asked_for_the_cpu_build_before_the_public_one() -> None:
    asked: list[list[str]] = []

    def only_the_public_one(options: list[str]) -> bool:
        asked.append(options)
        return bool(options)

    assert setup_env.torch_source("cpu", lambda options: True) == ("torch==2.13.0+cpu", [])
    public = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
    assert setup_env.torch_source("cpu", only_the_public_one) == ("torch==2.13.0+cpu", public)
    assert asked == [[], public]


def test_the_plain_build_is_taken_when_no_index_offers_the_cpu_build_or_a_driver_is_there() -> None:
    assert setup_env.torch_source("cpu", lambda options: False) == ("torch===2.13.0", [])
    assert setup_env.torch_source("cuda", lambda options: True) == ("torch===2.13.0", [])


def test_an_nvidia_smi_that_fails_is_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for exit_code, seen in ((9, False), (0, True)):
        tool.write_text(f"#!/bin/sh\nexit {exit_code}\n")
        tool.chmod(0o755)
        assert setup_env.driver_seen(tmp_path / "absent") is seen
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert not setup_env.driver_seen(tmp_path / "absent")
    assert setup_env.driver_seen(tool)  # a driver without its tool, as in many containers


def test_an_old_python_is_told_so_and_how_to_name_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 8, 10))
    with pytest.raises(SystemExit, match=r"Python 3.10 or newer is needed, .* is 3.8. .*PYTHON="):
        runpy.run_path(str(SCRIPTS / "setup_env.py"), run_name="__main__")


@pytest.fixture
def bare_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that set_up takes for the repository; nothing in it can be installed, since pip is replaced."""
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(setup_env, "driver_seen", lambda: False)
    monkeypatch.setattr(setup_env, "free_gb", lambda where: 100.0)
    monkeypatch.setattr(setup_env, "install", lambda root, venv, wanted: ("3.11", "2.13.0+cpu"))
    return tmp_path


def test_a_python_without_venv_is_answered_with_the_package_to_install(
    bare_clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find_spec(name))
    monkeypatch.setattr(setup_env, "__file__", str(bare_clone / "example_scripts" / "setup_env.py"))
    assert setup_env.main() == 1
    message = capsys.readouterr().err
    assert "lacks the module ensurepip" in message
    assert "Traceback" not in message
    assert not (bare_clone / ".venv").exists()


@pytest.mark.parametrize(
    ("os_release", "cure"),
    [
        ('ID=ubuntu\nID_LIKE="debian"\n', "sudo apt install python3-venv    (or python3.12-venv"),
        ('NAME="Fedora Linux"\nID=fedora\n', "sudo dnf install"),
        ("", "python3-venv on Debian and Ubuntu"),
    ],
)
def test_the_missing_package_is_named_as_the_distribution_names_it(os_release: str, cure: str) -> None:
    setup_env.check_venv_modules(True, True, (3, 12), os_release)
    with pytest.raises(setup_env.SetupError, match=re.escape(cure)):
        setup_env.check_venv_modules(False, True, (3, 12), os_release)


def test_too_small_a_disk_is_refused_before_anything_is_made(bare_clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_gb = setup_env.needed_gb("cpu")
    monkeypatch.setattr(setup_env, "free_gb", lambda where: need_gb - 0.1)
    with pytest.raises(setup_env.SetupError, match=rf"not enough disk: .* needs about {need_gb:.1f} GB .* are free at {bare_clone}"):
        setup_env.set_up(bare_clone, {})
    assert not (bare_clone / ".venv").exists()


def test_sizes_of_both_builds_are_on_the_screen_before_anything_is_installed(
    bare_clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed_before: list[str] = []

    def install(root: Path, venv: Path, wanted: str) -> tuple[str, str]:
        printed_before.append(capsys.readouterr().out)
        return "3.11", "2.13.0+cpu"

    monkeypatch.setattr(setup_env, "install", install)
    monkeypatch.setattr(setup_env, "make_venv", lambda venv, clear: venv.mkdir())
    setup_env.set_up(bare_clone, {})
    for build, (download, disk) in setup_env.SIZES_GB.items():
        assert re.search(rf"{build.upper()} +build: about {download:.1f} GB to download, {disk:.1f} GB on disk", printed_before[0])
    assert str(bare_clone / ".venv") in printed_before[0]


def stand_in_venv(venv: Path, *, finished: bool = True, **fields: str) -> None:
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "pyvenv.cfg").write_text("")
    setup_env.write_stamp(venv, finished=finished, **fields)


def test_a_second_set_up_with_nothing_changed_installs_nothing(bare_clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_venv(bare_clone / ".venv", fingerprint=setup_env.fingerprint(bare_clone, "cpu"))

    def never(*arguments: object) -> None:
        raise AssertionError("nothing was to be installed")

    monkeypatch.setattr(setup_env, "install", never)
    setup_env.set_up(bare_clone, {})
    for changed in ("requirements.lock", "pyproject.toml"):
        before = (bare_clone / changed).read_text()
        (bare_clone / changed).write_text("another")
        assert setup_env.state_of(bare_clone / ".venv", setup_env.fingerprint(bare_clone, "cpu"), "") == "stale"
        (bare_clone / changed).write_text(before)
    assert setup_env.state_of(bare_clone / ".venv", setup_env.fingerprint(bare_clone, "cuda"), "") == "stale"


def test_an_interrupted_set_up_is_started_over_by_the_next_one(bare_clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv = bare_clone / ".venv"

    def quick_venv(command: list[str], **options: object) -> subprocess.CompletedProcess:
        assert command[1:] == ["-m", "venv", str(venv)]
        assert setup_env.state_of(venv, "", "") == "broken", "an interruption of python -m venv has to be noticed as well"
        (venv / "bin").mkdir()
        (venv / "bin" / "python").symlink_to(sys.executable)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(setup_env.subprocess, "run", quick_venv)

    def interrupted(*arguments: object) -> None:
        (venv / "half_a_package.py").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(setup_env, "install", interrupted)
        with pytest.raises(KeyboardInterrupt):
            setup_env.set_up(bare_clone, {})
    assert (venv / "half_a_package.py").exists()
    setup_env.set_up(bare_clone, {})
    assert not (venv / "half_a_package.py").exists()
    assert setup_env.state_of(venv, setup_env.fingerprint(bare_clone, "cpu"), "") == "ready"


def test_a_venv_whose_interpreter_is_gone_or_another_one_than_asked_for_is_made_anew(tmp_path: Path) -> None:
    stand_in_venv(tmp_path / "venv", fingerprint="f", python="3.11")
    assert setup_env.state_of(tmp_path / "venv", "f", "") == "ready"
    assert setup_env.state_of(tmp_path / "venv", "f", "3.12") == "broken"
    (tmp_path / "venv" / "bin" / "python").unlink()
    (tmp_path / "venv" / "bin" / "python").symlink_to(tmp_path / "removed")
    assert setup_env.state_of(tmp_path / "venv", "f", "") == "broken"


def test_a_folder_named_venv_that_holds_something_else_is_left_alone(bare_clone: Path) -> None:
    (bare_clone / ".venv").mkdir()
    (bare_clone / ".venv" / "thesis.txt").write_text("years of work")
    with pytest.raises(setup_env.SetupError, match="is not a virtual environment"):
        setup_env.set_up(bare_clone, {})
    assert (bare_clone / ".venv" / "thesis.txt").exists()


def test_make_test_ends_with_the_test_runner() -> None:
    # As typed in a shell, also where `make test` itself runs this test: an inner make would talk of directories.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    commands = subprocess.run(["make", "-n", "test"], cwd=REPO, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    order = [name for line in commands for name in ("setup_env", "ruff", "mypy", "pytest") if name in line]
    assert order == ["setup_env", "ruff", "mypy", "pytest"]
    assert "pytest" in commands[-1]


# --- the lock ---------------------------------------------------------------------------------------------------------------------


def pins() -> list[Requirement]:
    lines = (REPO / "requirements.lock").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_lock_holds_one_exact_fitting_version_of_every_dependency_for_each_python(python: str) -> None:
    locked: dict[str, str] = {}
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            assert "+" not in specifier.version, "a local version exists on some indexes only"
            name = lock_requirements.normal(pin.name)
            assert name not in locked, f"{name} is pinned twice for Python {python}"
            locked[name] = specifier.version
    assert locked["torch"] == setup_env.TORCH_VERSION == lock_requirements.TORCH_VERSION == "2.13.0"
    wanted = [Requirement(text) for text in lock_requirements.requirements()]
    assert {"torch", "transformers", "pytest", "setuptools"} <= {requirement.name for requirement in wanted}
    for requirement in wanted:
        version = locked.get(lock_requirements.normal(requirement.name))
        assert version is not None, f"{requirement.name} of pyproject.toml is not in requirements.lock: run `make lock`"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} is locked to {version}"


def test_versions_that_differ_between_pythons_get_markers_that_part_them() -> None:
    found = {"3.10": {"numpy": "2.2", "tomli": "2"}, "3.11": {"numpy": "2.4"}, "3.12": {"numpy": "2.4"}}
    assert lock_requirements.merge(found) == [
        'numpy==2.2 ; python_version < "3.11"',
        'numpy==2.4 ; python_version >= "3.11"',
        'tomli==2 ; python_version < "3.11"',
    ]


# --- corpus and demo --------------------------------------------------------------------------------------------------------------


def test_the_corpus_is_two_tasks_of_records_with_nothing_but_text_and_the_same_every_time(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
        written = demo_corpus.write_corpus(folder, max_bytes_per_task=200_000)
    assert [path.name for path in written] == ["stdlib_sources.jsonl", "stdlib_docstrings.jsonl"]
    for path, (num_records, num_bytes) in written.items():
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(records) == num_records > 3
        assert 100_000 < path.stat().st_size == num_bytes <= 200_000
        assert all(list(record) == ["text"] and isinstance(record["text"], str) and record["text"].strip() for record in records)
        assert path.read_bytes() == (first / path.name).read_bytes()
    assert demo_corpus.SOURCES_NAME != demo_corpus.DOCSTRINGS_NAME


def test_library_files_that_cannot_be_read_or_parsed_do_not_stop_the_corpus(tmp_path: Path) -> None:
    stdlib = tmp_path / "lib"
    (stdlib / "site-packages").mkdir(parents=True)
    (stdlib / "site-packages" / "installed.py").write_text("not_ours = 1\n")
    (stdlib / "latin.py").write_bytes("name = 'Löwis'\n".encode("latin-1"))
    (stdlib / "template.py").write_text("def $name(): pass\n")
    long = "Say at some length what it does, so that it counts as documentation."
    (stdlib / "surrogate.py").write_text(f'"""{long} \\ud800"""\n')
    (stdlib / "good.py").write_text(f'def area(width, height=2):\n    """{long}"""\n')
    sources, documents = demo_corpus.write_corpus(tmp_path, stdlib=stdlib)
    assert sorted(json.loads(line)["text"].split()[0] for line in sources.read_text().splitlines()) == ['"""Say', "def", "def"]
    assert [json.loads(line)["text"] for line in documents.read_text().splitlines()] == [f"good.area(width, height=2)\n\n{long}\n"]


def test_the_tokenizer_gives_back_any_text_and_ends_with_gptjs_own_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "def area(width):\n    return width * width\n" * 50}) + "\n")
    size = script("demo_model").train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "tokenizer", vocab_size=300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = "def naïve(x):\n\n    return  '→ 漢字'\t# ok\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == size
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eos_token_id]


def test_the_demo_deletes_no_folder_that_it_did_not_make(tmp_path: Path) -> None:
    output = tmp_path / "out"
    demo.fresh_folder(output)
    (output / "old.txt").write_text("of an earlier demo")
    demo.fresh_folder(output)
    assert not (output / "old.txt").exists()

    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "1.jpg").write_text("x")
    link = tmp_path / "link"
    link.symlink_to(output)
    for refused in (foreign, link, foreign / "1.jpg"):
        with pytest.raises(UserError):
            demo.fresh_folder(refused)
    assert (foreign / "1.jpg").exists()


@pytest.mark.parametrize(("last", "passes"), [(6.5, True), (6.7, False), (math.nan, False), (7.6, False)])
def test_the_demo_fails_unless_the_loss_ends_a_nat_below_the_first_step(tmp_path: Path, last: float, passes: bool) -> None:
    log = tmp_path / "train_log.jsonl"
    # one lucky step at the end must not be enough: the last five count together
    losses = [7.6, 7.0, last, last, last, last, last]
    log.write_text("".join(json.dumps({"step": i + 1, "loss": loss}) + "\n" for i, loss in enumerate(losses)))
    if passes:
        assert demo.loss_drop(log, 1.0) == (7.6, pytest.approx(last))
    else:
        with pytest.raises(UserError, match=r"at least 1\.0 nat below"):
            demo.loss_drop(log, 1.0)


def test_settings_exported_for_other_programs_do_not_reach_the_demos_training() -> None:
    environ = {"PORT": "8080", "SEED": "x", "PYTHON": "python3.12", "TOKENIZER": "t", "GLOO_SOCKET_IFNAME": "eth7", "HOME": "/home/a"}
    assert demo.without_settings(environ) == {"HOME": "/home/a"}


# --- the launcher -----------------------------------------------------------------------------------------------------------------

# Stands in for dist_clm_train.py: notes its process ids and flags, then fails, ends or waits as its plan says.
FAKE_TRAINER = """
import json, os, pathlib, signal, subprocess, sys, time
rank = sys.argv[sys.argv.index("--rank") + 1]
worker = subprocess.Popen(["sleep", "60"])
folder = pathlib.Path(os.environ["NOTES"])

def save_and_end(*_):
    (folder / f"{rank}.saved").touch()
    if os.environ.get("SAVING") != "takes long":
        worker.kill()
        os._exit(0)

if os.environ.get("SAVING"):
    signal.signal(signal.SIGTERM, save_and_end)
(folder / f"{rank}.new").write_text(json.dumps({"pids": [os.getpid(), worker.pid], "flags": sys.argv[1:]}))
(folder / f"{rank}.new").rename(folder / f"{rank}.json")
while len(list(folder.glob("*.json"))) < 4:
    time.sleep(0.02)
if rank == os.environ.get("FAILING"):
    print("--lr must be positive, not -1: give a larger one", flush=True)
    sys.exit(7)
if os.environ.get("FAILING"):
    time.sleep(60)
worker.kill()
"""


def launch(tmp_path: Path, *arguments: str, **settings: str) -> "subprocess.Popen[str]":
    (tmp_path / "fake.py").write_text(FAKE_TRAINER)
    (tmp_path / "notes").mkdir()
    env = demo.without_settings(dict(os.environ)) | {
        "NOTES": str(tmp_path / "notes"),
        "TRAINER": str(tmp_path / "fake.py"),
        "PYTHON": sys.executable,
        "TASKS": "a.jsonl:0.5,b.jsonl:0.5",
        "OUT": str(tmp_path / "out"),
        **settings,
    }
    return subprocess.Popen([str(LAUNCHER), *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def notes(tmp_path: Path, key: str) -> list[list]:
    return [json.loads(path.read_text())[key] for path in sorted((tmp_path / "notes").glob("*.json"))]


def running(pid: int) -> bool:
    """Whether the process still does something; one that has ended but was not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_nothing_is_left(tmp_path: Path) -> None:
    pids = [pid for of_rank in notes(tmp_path, "pids") for pid in of_rank]
    assert len(pids) == 8
    deadline = time.monotonic() + 2
    while any(running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if running(pid)]


def test_when_one_rank_fails_the_launcher_stops_all_others_shows_why_and_fails_alike(tmp_path: Path) -> None:
    launcher = launch(tmp_path, FAILING="2")
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 7
    assert "rank 2 failed with exit code 7" in output
    assert "--lr must be positive, not -1: give a larger one" in output
    assert_nothing_is_left(tmp_path)


@sample(2)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("saving", ["", "at once", "takes long"], ids=["before training", "saves", "told twice"])
def test_a_launcher_that_is_told_to_stop_takes_all_its_ranks_along(saving: str, tmp_path: Path, number: signal.Signals, code: int) -> None:
    launcher = launch(tmp_path, FAILING="none", SAVING=saving)
    deadline = time.monotonic() + 20
    while len(notes(tmp_path, "pids")) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.send_signal(number)
    if saving == "takes long":
        while len(list((tmp_path / "notes").glob("*.saved"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert launcher.poll() is None, "it waits for ranks that save"
        launcher.send_signal(number)
    launcher.communicate(timeout=30)
    assert launcher.returncode == code
    assert len(list((tmp_path / "notes").glob("*.saved"))) == (4 if saving else 0)
    assert_nothing_is_left(tmp_path)


def test_the_launcher_gives_every_rank_its_number_its_device_the_grid_and_the_users_flags(tmp_path: Path) -> None:
    launcher = launch(tmp_path, "--min-lr", "1e-6", PIPELINE="2", REPLICAS="2", PORT="4711", NET_INTERFACE="lo", LR="0.5")
    launcher.communicate(timeout=30)
    assert launcher.returncode == 0
    for rank, flags in enumerate(notes(tmp_path, "flags")):
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        assert given["--rank"] == given["--cuda-id"] == str(rank)
        assert (given["--world-size"], given["--pipeline-group-size"], given["--data-group-size"]) == ("4", "2", "2")
        assert (given["--dist-url"], given["--net-interface"], given["--lr"]) == ("tcp://127.0.0.1:4711", "lo", "0.5")
        assert (given["--task-name"], given["--min-lr"]) == ("a.jsonl:0.5,b.jsonl:0.5", "1e-6")
        assert "--num-threads" not in given  # a setting left empty is left to the trainer's own default


@pytest.mark.parametrize("setting", ["PIPELINE", "REPLICAS"])
@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5"])
def test_the_launcher_refuses_a_grid_that_is_none(setting: str, value: str, tmp_path: Path) -> None:
    launcher = launch(tmp_path, **{setting: value})
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 2
    assert f"{setting} must be a number of at least 1; it is '{value}'" in output
    assert notes(tmp_path, "pids") == []


def test_the_launcher_asks_for_training_data_instead_of_starting_without(tmp_path: Path) -> None:
    launcher = launch(tmp_path, TASKS="")
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 2
    assert "TASKS=" in output
    assert notes(tmp_path, "pids") == []


@pytest.mark.parametrize("path", [LAUNCHER, REPO / ".ci" / "run"], ids=lambda path: path.name)
def test_shell_scripts_parse_and_can_be_executed(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
