"""A Python for scripts under test that is there at once: every start is a fork of a process that has imported torch and transformers.

A workflow starts a dozen Pythons, each of which imports for four seconds; forked ones start in milliseconds. ``warm_python`` gives the path
of a program that can be called as an interpreter is (``FILE ARGUMENT...``, ``-m MODULE ARGUMENT...``, ``- ARGUMENT...`` with the program on
standard input), with its own working folder, environment, streams and exit status. SIGINT and SIGTERM reach what it started; when it is
killed, that is too. ``-c`` is left out.
"""

import array
import contextlib
import io
import json
import os
import runpy
import select
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

# Runs in a bare interpreter (-I -S), which takes a fiftieth of a second.
CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
told = json.dumps(dict(argv=sys.argv[1:], cwd=os.getcwd(), environment=dict(os.environ))).encode()
server.sendmsg([len(told).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
server.sendall(told)
pid = int.from_bytes(server.recv(4), "big")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = server.recv(4)
sys.exit(int.from_bytes(status, "big") if status else 99)
"""


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[Path]:
    """The program's path, within ``folder``. The heavy packages are imported in a process of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    program, address = folder / "python", folder / "socket"
    program.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)
    server = os.fork()
    if not server:
        try:
            _serve(listener)
        finally:
            os._exit(1)
    try:
        yield program
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        listener.close()


def _serve(listener: socket.socket) -> None:
    """Never returns. One more process per start, which watches over it, so that no start waits for another."""
    _import_all()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for the watchers' statuses
    while True:
        connection, _ = listener.accept()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            try:
                _watch(connection)
            finally:
                os._exit(0)
        connection.close()


def _import_all() -> None:
    import peft
    import sklearn.metrics
    import torch.distributed.run
    import transformers

    import dist_clm_eval
    import dist_clm_train

    assert all((peft, sklearn.metrics, torch.distributed.run, dist_clm_eval, dist_clm_train))
    _ = transformers.AutoTokenizer, transformers.AutoModelForCausalLM, transformers.pipeline, transformers.GPTJForCausalLM


def _watch(connection: socket.socket) -> None:
    head, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * 4))
    streams = array.array("i")
    streams.frombytes(ancillary[0][2][: 3 * streams.itemsize])
    told = json.loads(_exactly(connection, int.from_bytes(head, "big")))
    pid = os.fork()
    if not pid:
        connection.close()
        _become(told, streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(pid.to_bytes(4, "big"))
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            connection.sendall((code if code >= 0 else 128 - code).to_bytes(4, "big"))
            return
        if select.select([connection], [], [], 0)[0]:  # closed: whoever called was killed
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _exactly(connection: socket.socket, num_bytes: int) -> bytes:
    found = b""
    while len(found) < num_bytes:
        found += connection.recv(num_bytes - len(found))
    return found


def _become(told: dict, streams: "array.array[int]") -> None:
    """Be the Python that was asked for. Never returns."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
        os.closerange(3, 256)
        sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False))  # noqa: SIM115 - for as long as the process lives
        sys.stdout = io.TextIOWrapper(open(1, "wb", 0, closefd=False), write_through=True)  # noqa: SIM115
        sys.stderr = io.TextIOWrapper(open(2, "wb", 0, closefd=False), write_through=True)  # noqa: SIM115
        os.chdir(told["cwd"])
        os.environ.clear()
        os.environ.update(told["environment"])
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        what, *sys.argv = told["argv"]
        while what == "-u":
            what, *sys.argv = sys.argv
        if what == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        elif what == "-":
            sys.argv.insert(0, what)
            with tempfile.NamedTemporaryFile("w", suffix=".py") as program:
                program.write(sys.stdin.read())
                program.flush()
                runpy.run_path(program.name, run_name="__main__")
        else:
            sys.argv.insert(0, what)
            runpy.run_path(what, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
