"""A worker that is lost is started again by its supervisor, one that cannot be helped is not, and neither outlives the other."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.ranks import REPOSITORY, log_rows, losses, train, train_argv
from support.tiers import full

from training.config.train import Config
from training.job import exit_status
from training.membership import supervisor

SUPERVISOR = REPOSITORY / "training" / "membership" / "supervisor.py"
FAST = {"short_pause_s": 0.01, "first_pause_s": 0.02, "longest_pause_s": 0.1}

# What a worker of these tests has at hand: `attempt`, `pipe`, `folder`; it notes its process id and what it was told.
PREAMBLE = f"""
import json, os, signal, sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from training.membership import supervisor
supervisor.BEAT_S = 0.1  # far below the limits of these tests, which a busy machine must not reach
worker = supervisor.Supervised.from_environment()
attempt, pipe = worker.attempt, worker.pipe
folder = Path(sys.argv[1])
(folder / f"pid{{attempt}}").write_text(str(os.getpid()))
(folder / f"told{{attempt}}").write_text(json.dumps([worker.run_id, worker.lost_at]))
"""


class Supervision:
    """A supervisor in a process of its own, whose worker runs ``script``; its files and output lie in ``folder``."""

    def __init__(self, folder: Path, script: str, **policy: Any) -> None:
        self.folder, self.output = folder, folder / "output.txt"
        command = [sys.executable, "-c", PREAMBLE + script, str(folder)]
        told = json.dumps({**FAST, **policy})
        with self.output.open("wb") as file:
            self.process = subprocess.Popen([sys.executable, "-I", "-S", str(SUPERVISOR), told, *command], stdout=file, stderr=file)

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait(self) -> int:
        return self.process.wait(30)

    def pids(self) -> list[int]:
        return [int(path.read_text() or 0) for path in sorted(self.folder.glob("pid*"))]

    def wait_for(self, name: str) -> None:
        wait_until(lambda: (self.folder / name).exists() and (self.folder / name).read_text() != "", lambda: self.text)


def wait_until(holds: Callable[[], bool], explain: Callable[[], str], within_s: float = 30) -> None:
    give_up = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < give_up, explain()
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Supervision]]:
    started: list[Supervision] = []

    def begin(script: str, **policy: Any) -> Supervision:
        started.append(Supervision(tmp_path, script, **policy))
        return started[-1]

    yield begin
    left = [pid for supervision in started for pid in supervision.pids() if is_alive(pid)]
    for supervision in started:
        if supervision.process.poll() is None:
            left.append(supervision.process.pid)
            supervision.process.kill()
            supervision.process.wait()
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, "no process stays behind"


def test_a_killed_worker_comes_back_and_is_told_when_the_loss_was_noticed(start: Callable[..., Supervision], tmp_path: Path) -> None:
    before = time.time()
    supervision = start("pipe.step(3 + attempt)\nif attempt < 2: os.kill(os.getpid(), signal.SIGKILL)", max_restarts=2)
    assert supervision.wait() == 0, supervision.text
    told = [json.loads((tmp_path / f"told{n}").read_text()) for n in range(3)]
    assert len({run_id for run_id, _ in told}) == 1 and len(told[0][0]) == 16
    assert told[0][1] is None and before < told[1][1] < told[2][1] < time.time()
    assert "[supervisor] the worker was killed by SIGKILL" in supervision.text and "see dmesg" in supervision.text
    assert "at optimizer step 3" in supervision.text and "restart 2 of 2 in 0.01 s" in supervision.text


@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_what_a_restart_does_not_change_ends_the_supervisor_with_it(status: int, start: Callable[..., Supervision]) -> None:
    supervision = start(f"os._exit({status})")
    assert supervision.wait() == status
    assert len(supervision.pids()) == 1, supervision.text


@pytest.mark.parametrize(("end", "status"), [("os._exit(70)", 70), ("os._exit(75)", 75), ("os.kill(os.getpid(), 11)", 128 + 11)])
def test_restarts_are_counted_and_the_last_status_is_kept(end: str, status: int, start: Callable[..., Supervision]) -> None:
    supervision = start(f"pipe.step(attempt)\n{end}", max_restarts=1)
    assert supervision.wait() == status
    assert len(supervision.pids()) == 2
    assert "all 1 restarts (--max-restarts) are used" in supervision.text


def test_a_crash_loop_is_given_up_even_without_a_limit(start: Callable[..., Supervision]) -> None:
    """Three times at the same step: that it does steps again after each restart, from its checkpoint on, is no progress."""
    supervision = start("pipe.step(5)\npipe.step(6)\nos._exit(70)")
    assert supervision.wait() == 70
    assert len(supervision.pids()) == 4, supervision.text  # the first got further than nothing
    assert "failed 3 times in a row and got no further" in supervision.text


def test_a_peer_may_stay_away_longer_than_a_crash_loop_lasts(start: Callable[..., Supervision]) -> None:
    supervision = start("os._exit(75 if attempt < 6 else 0)")
    assert supervision.wait() == 0, supervision.text
    assert len(supervision.pids()) == 7


def test_pauses_double_up_to_the_longest_where_nothing_is_gained() -> None:
    policy = supervisor.Policy()
    assert [supervisor._pause_s(policy, n) for n in (1, 2, 3, 4, 5, 6, 1000)] == [1, 2, 4, 8, 16, 30, 30]


def test_a_frozen_worker_is_replaced(start: Callable[..., Supervision]) -> None:
    freeze = "if attempt == 0: os.kill(os.getpid(), signal.SIGSTOP)"
    supervision = start(f"pipe.beat()\npipe.start()\n{freeze}\ntime.sleep(3)", silence_s=1.5, max_restarts=1)
    assert supervision.wait() == 0, supervision.text
    assert len(supervision.pids()) == 2, "and the second, which beats for longer than the limit, is left in peace"
    assert "no sign of life from the worker" in supervision.text and "gave no sign of life" in supervision.text
    assert "dmesg" not in supervision.text


def test_a_worker_that_never_begins_to_beat_has_longer_to_start(start: Callable[..., Supervision]) -> None:
    supervision = start("time.sleep(1 if attempt else 60)", silence_s=0.2, start_s=2.5, max_restarts=1)
    assert supervision.wait() == 0, supervision.text
    assert len(supervision.pids()) == 2


def test_a_suspended_host_is_no_frozen_worker(start: Callable[..., Supervision]) -> None:
    """Both are stopped for longer than the limit, the supervisor wakes first."""
    supervision = start("pipe.beat()\npipe.start()\n(folder / 'ready').write_text('x')\ntime.sleep(4.5)", silence_s=2)
    supervision.wait_for("ready")
    (pid,) = supervision.pids()
    os.kill(supervision.process.pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(supervision.process.pid, signal.SIGCONT)
    time.sleep(0.5)
    os.kill(pid, signal.SIGCONT)
    assert supervision.wait() == 0, supervision.text
    assert len(supervision.pids()) == 1, supervision.text


SAVES_ON_REQUEST = """
def save(number, frame):
    with (folder / "requests").open("a") as file:
        file.write(f"{number} ")
    time.sleep(0.3)
    os._exit(0)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
pipe.start()
(folder / "ready").write_text("x")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_reaches_the_worker_once_and_nothing_is_started_again(
    number: signal.Signals, start: Callable[..., Supervision], tmp_path: Path
) -> None:
    supervision = start(SAVES_ON_REQUEST)
    supervision.wait_for("ready")
    for _ in range(2):  # as from a launcher that passes on what the terminal has sent
        supervision.process.send_signal(number)
    assert supervision.wait() == 0, supervision.text
    assert (tmp_path / "requests").read_text() == f"{number} "
    assert len(supervision.pids()) == 1


def test_ctrl_c_reaches_the_worker_once(tmp_path: Path) -> None:
    """A terminal sends it to every process in its foreground: the worker is not among them, and hears it from its supervisor."""
    command = [sys.executable, "-c", PREAMBLE + SAVES_ON_REQUEST, str(tmp_path)]
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-I", "-S", str(SUPERVISOR), json.dumps(FAST), *command])
    try:
        wait_until((tmp_path / "ready").exists, lambda: "the worker does not begin")
        os.write(terminal, b"\x03")
        wait_until(lambda: not is_alive(pid), lambda: "Ctrl-C must end it", within_s=10)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)  # and the worker hears of it
            os.waitpid(pid, 0)
        os.close(terminal)
    assert (tmp_path / "requests").read_text() == f"{int(signal.SIGINT)} "
    assert not is_alive(int((tmp_path / "pid0").read_text()))


def test_a_worker_that_fails_after_a_request_to_stop_is_not_started_again(start: Callable[..., Supervision]) -> None:
    supervision = start(SAVES_ON_REQUEST.replace("os._exit(0)", "os._exit(75)"))
    supervision.wait_for("ready")
    supervision.process.terminate()
    assert supervision.wait() == 75
    assert len(supervision.pids()) == 1


def test_a_request_to_stop_ends_the_pause_before_a_restart(start: Callable[..., Supervision]) -> None:
    supervision = start("os._exit(75)", first_pause_s=60, longest_pause_s=60)
    wait_until(lambda: "restart 1" in supervision.text, lambda: supervision.text)
    supervision.process.terminate()
    assert supervision.wait() == 130


def test_a_worker_that_hears_no_request_is_killed_at_the_third(start: Callable[..., Supervision]) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\npipe.start()\n(folder / 'ready').write_text('x')\ntime.sleep(60)"
    supervision = start(deaf)
    supervision.wait_for("ready")
    for _ in range(3):
        supervision.process.terminate()
        time.sleep(supervisor.ONE_REQUEST_S + 0.1)
    assert supervision.wait() == 128 + signal.SIGKILL


def test_a_worker_does_not_outlive_its_supervisor_and_may_save(start: Callable[..., Supervision], tmp_path: Path) -> None:
    supervision = start(SAVES_ON_REQUEST)
    supervision.wait_for("ready")
    (pid,) = supervision.pids()
    supervision.process.kill()
    wait_until(lambda: not is_alive(pid), lambda: "the worker trains on unseen", within_s=5)
    assert (tmp_path / "requests").read_text() == f"{int(signal.SIGTERM)} ", "asked once: a second time would cut its save off"


def test_ctrl_z_stops_the_worker_too(start: Callable[..., Supervision]) -> None:
    supervision = start("pipe.start()\n(folder / 'ready').write_text('x')\ntime.sleep(2)", silence_s=1.5)
    supervision.wait_for("ready")
    (pid,) = supervision.pids()
    supervision.process.send_signal(signal.SIGTSTP)
    for process in (pid, supervision.process.pid):
        wait_until(lambda process=process: psutil.Process(process).status() == psutil.STATUS_STOPPED, lambda: supervision.text)  # type: ignore[misc]
    time.sleep(2)
    supervision.process.send_signal(signal.SIGCONT)
    assert supervision.wait() == 0, supervision.text
    assert len(supervision.pids()) == 1


def test_what_a_dead_worker_has_started_is_gone_before_the_next_begins(start: Callable[..., Supervision], tmp_path: Path) -> None:
    helper = (
        "import subprocess\n"
        "if attempt == 0:\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        "    (folder / 'helper').write_text(str(child.pid))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert start(helper, max_restarts=1).wait() == 0
    helper_pid = int((tmp_path / "helper").read_text())
    wait_until(lambda: not is_alive(helper_pid), lambda: "the helper of the dead worker lives on", within_s=5)


def test_a_worker_s_own_helpers_are_not_supervised(start: Callable[..., Supervision]) -> None:
    code = "from training.membership.supervisor import Supervised; raise SystemExit(3 if Supervised.from_environment() else 4)"
    environment = f"dict(os.environ, PYTHONPATH={str(REPOSITORY)!r})"
    script = f"import subprocess\nos._exit(subprocess.run([sys.executable, '-c', {code!r}], env={environment}).returncode - 4)"
    supervision = start(script)
    assert supervision.wait() == 0, supervision.text


@pytest.mark.parametrize("told", ["", "x", "[]", "1", "{}", '{"supervisor": 1}', '{"supervisor": "x", "pipe": -1}'])
def test_nonsense_in_the_environment_is_no_supervisor(told: str) -> None:
    assert supervisor.Supervised.from_environment({supervisor.VARIABLE: told}) is None


def test_flags_make_a_policy() -> None:
    policy = supervisor.policy_for(Config(rank=2, max_restarts=3, peer_timeout="90"))
    assert (policy.who, policy.max_restarts, policy.silence_s) == ("rank2 supervisor", 3, 90)
    policy = supervisor.policy_for(Config(rank=2, max_restarts=3, supervise=True, peer_timeout="5"))
    assert (policy.max_restarts, policy.silence_s) == (None, 45)
    assert supervisor.policy_for(Config(max_restarts=1)).silence_s == 45


def test_under_torchrun_nobody_else_restarts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(supervisor.log, "propagate", True)
    supervisor.arrange_supervision(Config(rank=0, supervise=True), ["false"])
    assert "are ignored: torchrun restarts its workers itself" in caplog.text


def test_supervisor_and_worker_mean_the_same_statuses() -> None:
    for name in ("EXIT_DEFECT", "EXIT_PEER_LOST", "EXIT_INTERRUPTED"):
        assert getattr(exit_status, name) == getattr(supervisor, name)


def test_a_supervisor_is_small(start: Callable[..., Supervision]) -> None:
    supervision = start("pipe.start()\n(folder / 'ready').write_text('x')\ntime.sleep(1)")
    supervision.wait_for("ready")
    assert psutil.Process(supervision.process.pid).memory_info().rss < 40 * 2**20
    assert supervision.wait() == 0


def run_trainer(output: Path, **flags: Any) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        argv = [sys.executable, "dist_clm_train.py", *train_argv(**flags)]
        return subprocess.Popen(argv, cwd=REPOSITORY, stdout=file, stderr=file)


def test_a_wrong_command_line_makes_no_supervisor(tmp_path: Path) -> None:
    process = run_trainer(tmp_path / "output.txt", supervise=True)
    assert process.wait(60) == 2
    assert "supervisor" not in (tmp_path / "output.txt").read_text()


@full
def test_a_trainer_that_is_killed_ends_with_the_losses_of_an_undisturbed_run(model_folder: Path, tasks: list[Path], tmp_path: Path) -> None:
    """--resume none is for the first attempt: a restart goes on, or it would begin again for ever."""
    flags = {"model_name": model_folder, "task_name": tasks[0], "seq_length": 32, "batch_size": 4, "micro_batch_size": 2}
    flags |= {"total_steps": 200, "checkpoint_steps": 20, "device": "cpu", "num_threads": 1, "resume": "none"}
    run, output = tmp_path / "run", tmp_path / "output.txt"
    process = run_trainer(output, **flags, checkpoint_path=run, max_restarts=2)
    try:
        wait_until(lambda: process.poll() is not None or (run / "20" / "manifest.json").exists(), output.read_text, within_s=90)
        assert process.poll() is None, output.read_text()
        (worker,) = psutil.Process(process.pid).children()
        worker.kill()
        assert process.wait(90) == 0, output.read_text()
    finally:
        process.kill()
    text = output.read_text()
    assert "[rank0 supervisor] the worker was killed by SIGKILL" in text and "restart 1 of 2" in text
    assert "restarted: going on from the newest checkpoint of this run, not with --resume none" in text
    assert (run / "200" / "manifest.json").exists() and not is_alive(worker.pid)
    undisturbed = tmp_path / "undisturbed"
    train(tmp_path / "ranks", **flags, checkpoint_path=undisturbed)
    assert {row["step"]: row["loss"] for row in log_rows(run)} == dict(zip(range(1, 201), losses(undisturbed), strict=True))
