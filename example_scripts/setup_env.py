"""Make .venv from nothing but a python3: the first half of `make demo` and `make test`.

Standard library only, because it runs before anything is installed. It promises: sizes are printed before the first download; the
pins of requirements.lock are what gets installed, never a source build; a run that was interrupted is repaired by the next one; a
run with nothing to do takes well under a second. What to install is decided here; which versions, in requirements.lock.

The text up to the version check must be readable by old Pythons, or they would answer with a SyntaxError instead of the message.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036  (the very reason for this line is to be run by an older Python)
    sys.exit(
        "setup: Python 3.10 or newer is needed, {} is {}.{}. Name a newer one: PYTHON=python3.12 make demo".format(  # noqa: UP032
            sys.executable, sys.version_info[0], sys.version_info[1]
        )
    )

TORCH_VERSION = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's public index of builds without CUDA
PROBE_TIMEOUT_S = 15  # per connection; an index that cannot be reached must not hold up the set-up

# GB downloaded, GB in .venv. CPU: measured in a fresh .venv, Python 3.11, Linux x86_64; CUDA: approximate. docs/LOG.md has the figures.
SIZES_GB = {"cpu": (0.4, 1.8), "cuda": (4.0, 8.0)}

STAMP = "setup_stamp.json"  # inside .venv: what was installed, and whether the installation came to its end


class SetupError(Exception):
    """Something the person at the keyboard can cure; its text is the whole message."""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def needed_gb(build: str) -> float:
    """Disk for one build: the packages, the download while it is unpacked, and pip's own cache of it."""
    download, installed = SIZES_GB[build]
    return installed + 2 * download


def check_disk(free_gb: float, build: str, where: Path) -> None:
    need = needed_gb(build)
    if free_gb < need:
        raise SetupError(
            f"not enough disk: the {build.upper()} build needs about {need:.1f} GB while it installs, "
            f"{free_gb:.1f} GB are free at {where}. Free some space, or clone the repository onto a larger disk."
        )


def free_gb(where: Path) -> float:
    return shutil.disk_usage(where).free / 1e9


def check_venv_modules(have_venv: bool, have_ensurepip: bool, version: tuple[int, int], os_release: str) -> None:
    """Distributions split venv and ensurepip off python3; ``os_release`` is the text of /etc/os-release, '' if there is none."""
    if have_venv and have_ensurepip:
        return
    missing = " and ".join(name for name, have in (("venv", have_venv), ("ensurepip", have_ensurepip)) if not have)
    python = f"python{version[0]}.{version[1]}"
    ids = " ".join(line.partition("=")[2].strip('"') for line in os_release.splitlines() if line.startswith(("ID=", "ID_LIKE=")))
    if "debian" in ids or "ubuntu" in ids:
        cure = f"sudo apt install python3-venv    (or {python}-venv, if {python} is not the system's own python3)"
    elif any(name in ids for name in ("fedora", "rhel", "centos")):
        cure = f"sudo dnf install python3-pip python3-libs    (or {python}, a complete one)"
    elif "suse" in ids:
        cure = f"sudo zypper install {python.replace('.', '')} {python.replace('.', '')}-pip"
    else:
        cure = f"the package that holds venv for {python}: python3-venv on Debian and Ubuntu, python3-libs on Fedora"
    raise SetupError(f"{sys.executable} lacks the module {missing}. Install it, then run the same command again:\n    {cure}")


def driver_seen(proc_entry: Path = Path("/proc/driver/nvidia/version")) -> bool:
    """Whether an NVIDIA driver answers. WSL has no /proc entry, containers may have no nvidia-smi: either will do."""
    if proc_entry.exists():
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        return subprocess.run([tool, "-L"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def wanted_build(override: str, has_driver: bool) -> str:
    """'cpu' or 'cuda'. ``override`` is TORCH_BUILD from the environment, '' when it is not set."""
    if override not in ("", "cpu", "cuda"):
        raise SetupError(f"TORCH_BUILD must be cpu or cuda, not {override!r}; without it the build follows the driver.")
    return override or ("cuda" if has_driver else "cpu")


def torch_source(wanted: str, offers_cpu: Callable[[list[str]], bool]) -> tuple[str, list[str]]:
    """(requirement, extra pip options) for the wanted build.

    ``offers_cpu(options) -> bool`` asks whether the indexes that pip uses under these options have the CPU build. The user's own
    come first: a mirror or a folder of wheels is there because the public one is not to be used. `===` keeps a local CPU wheel from
    passing for the CUDA build.
    """
    if wanted == "cpu":
        for options in ([], ["--extra-index-url", CPU_INDEX]):
            if offers_cpu(options):
                return f"torch=={TORCH_VERSION}+cpu", options
    return f"torch==={TORCH_VERSION}", []


def fingerprint(root: Path, wanted: str) -> str:
    """What the content of .venv depends on. The folder counts, since scripts in .venv and the editable install name it."""
    digest = hashlib.sha256(f"{wanted}\n{root}\n".encode())
    for name in ("requirements.lock", "pyproject.toml"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def state_of(venv: Path, wanted_fingerprint: str, python_asked: str) -> str:
    """'ready', 'stale' (install again in place), 'broken' (start over) or 'absent'.

    ``python_asked`` is the "3.12" of an interpreter that was named by hand; '' lets an existing .venv keep the one it has.
    """
    if not venv.exists():
        return "absent"
    entries = [entry.name for entry in venv.iterdir()]
    if not entries:
        return "absent"
    if "pyvenv.cfg" not in entries and STAMP not in entries:
        raise SetupError(f"{venv} exists but is not a virtual environment. Move it away, then run the same command again.")
    try:
        stamp = json.loads((venv / STAMP).read_text()) if STAMP in entries else {"finished": True}  # made by hand: only completed, in place
    except ValueError:
        return "broken"
    # exists() follows the link: an interpreter that has been removed since shows here
    if not stamp.get("finished") or not (venv / "bin" / "python").exists():
        return "broken"
    if python_asked and stamp.get("python", python_asked) != python_asked:
        return "broken"
    return "ready" if stamp.get("fingerprint") == wanted_fingerprint else "stale"


def write_stamp(venv: Path, **fields: object) -> None:
    """Whole or not at all, so that an interruption never leaves a stamp that claims too much."""
    aside = venv / (STAMP + ".new")
    aside.write_text(json.dumps(fields, indent=1) + "\n")
    aside.replace(venv / STAMP)


class Pip:
    """pip of one .venv, under the user's own configuration of indexes and proxies."""

    def __init__(self, venv: Path) -> None:
        self.python = str(venv / "bin" / "python")
        scratch = venv / "tmp"  # wheels are unpacked beside their goal: a small /tmp cannot fail the set-up
        scratch.mkdir(exist_ok=True)
        self.env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "PIP_USER")}
        self.env.update(TMPDIR=str(scratch), PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_USER="0")

    def offers(self, version: str, options: list[str]) -> bool:
        """Whether ``torch`` can be had in this version. Lists only: nothing is downloaded."""
        quick = ["--timeout", str(PROBE_TIMEOUT_S), "--retries", "0", "--only-binary", ":all:"]
        command = [self.python, "-m", "pip", "index", "versions", "torch", *quick, *options]
        try:
            answer = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=4 * PROBE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return False
        for line in answer.stdout.splitlines():
            if line.startswith("Available versions:"):
                return version in [found.strip() for found in line.partition(":")[2].split(",")]
        return False

    def run(self, *arguments: str) -> None:
        """pip shows its own progress on a terminal; elsewhere only errors."""
        quiet = [] if sys.stdout.isatty() else ["-qq"]
        done = subprocess.run([self.python, "-m", "pip", arguments[0], *quiet, *arguments[1:]], env=self.env)
        if done.returncode != 0:
            raise SetupError(
                f"pip failed (exit code {done.returncode}) at: pip {' '.join(arguments)}\n"
                "Its own message stands above. What was downloaded is kept in pip's cache: run the same command again."
            )


def make_venv(venv: Path, *, clear: bool) -> None:
    """An empty virtual environment that is stamped as unfinished from its first moment on."""
    if clear and venv.exists():
        shutil.rmtree(venv)
    venv.mkdir(exist_ok=True)
    write_stamp(venv, finished=False)
    done = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SetupError(
            f"{sys.executable} -m venv failed:\n{(done.stdout + done.stderr).strip()}\n"
            "On Debian and Ubuntu the cure is: sudo apt install python3-venv"
        )


def install(root: Path, venv: Path, wanted: str) -> tuple[str, str]:
    """Fill .venv; returns the versions of Python and torch that are now in it."""
    pip = Pip(venv)
    requirement, options = torch_source(wanted, lambda extra: pip.offers(f"{TORCH_VERSION}+cpu", extra))
    if wanted == "cpu" and not requirement.endswith("+cpu"):
        download, installed = SIZES_GB["cuda"]
        say(
            f"note: no index offers the CPU build of torch {TORCH_VERSION}; taking the CUDA build, which also runs on CPU but downloads "
            f"about {download:.0f} GB and takes about {installed:.0f} GB."
        )
        check_disk(free_gb(root), "cuda", root)
    say(f"installing {requirement.replace('===', '==')} and the pins of requirements.lock")
    # torch alone and first: PyTorch's index serves copies of other packages too, which are not to be taken from there
    pip.run("install", "--only-binary", ":all:", "--no-deps", *options, requirement)
    pip.run("install", "--only-binary", ":all:", "-r", str(root / "requirements.lock"))
    # setuptools is in the lock, so that the project itself needs no build environment and no network
    pip.run("install", "--no-deps", "--no-build-isolation", "-e", str(root))
    shutil.rmtree(venv / "tmp", ignore_errors=True)
    versions = "import sys, torch; print('%d.%d' % sys.version_info[:2], torch.__version__)"
    probe = subprocess.run([pip.python, "-c", versions], env=pip.env, capture_output=True, text=True)
    if probe.returncode != 0:
        raise SetupError(f"torch was installed but cannot be imported:\n{probe.stderr.strip()}")
    python_version, torch_version = probe.stdout.split()
    return python_version, torch_version


def set_up(root: Path, environ: dict[str, str]) -> None:
    started = time.monotonic()
    venv = root / ".venv"
    wanted = wanted_build(environ.get("TORCH_BUILD", ""), driver_seen())
    mark = fingerprint(root, wanted)
    own_version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    state = state_of(venv, mark, own_version if environ.get("PYTHON") else "")
    if state == "ready":
        say(".venv is up to date")
        return

    for build, (download, installed) in SIZES_GB.items():
        chosen = "   <- this machine" if build == wanted else ""
        say(f"{build.upper():4} build: about {download:.1f} GB to download, {installed:.1f} GB on disk{chosen}")
    say(f"goes to {venv}; {free_gb(root):.1f} GB are free there")
    check_disk(free_gb(root), wanted, root)
    os_release = Path("/etc/os-release")
    check_venv_modules(
        importlib.util.find_spec("venv") is not None,
        importlib.util.find_spec("ensurepip") is not None,
        sys.version_info[:2],
        os_release.read_text() if os_release.exists() else "",
    )
    if state == "broken":
        say("the existing .venv is unfinished, damaged or of another Python: starting over")
    if state == "stale":
        say("requirements.lock, pyproject.toml or the choice of torch changed: updating .venv")
        if (venv / STAMP).exists():  # one that somebody made by hand is never ours to throw away
            write_stamp(venv, finished=False)
    else:
        make_venv(venv, clear=state == "broken")
    python_version, torch_version = install(root, venv, wanted)
    write_stamp(venv, finished=True, fingerprint=mark, python=python_version, torch=torch_version)
    say(f"done in {time.monotonic() - started:.0f} s: .venv with torch {torch_version}")


def main() -> int:
    try:
        set_up(Path(__file__).resolve().parent.parent, dict(os.environ))
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the next run repairs .venv and uses what pip has already downloaded", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
