"""The rules of the house, held by reading its sources: floors, no hidden state, nothing executed that was read, flags that are real."""

import ast
import dataclasses
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ranks import REPOSITORY

from training.config.evaluation import EvalConfig
from training.config.train import Config

FLOORS = {
    "user_error": 0,
    "modules": 1,
    "comms": 1,
    "pipeline_parallel": 2,
    "data_parallel": 2,
    "optim": 2,
    "checkpoint": 2,
    "tasks": 2,
    "training": 3,
    "converters": 3,
    "dist_clm_train": 4,
    "dist_clm_eval": 4,
    "convert_from_hf_gptj": 4,
    "convert_from_hf_gptneox": 4,
    "convert_to_hf_gptj": 4,
    "convert_to_hf_gptneox": 4,
}
# inside training/: the same rule, a file at its top counts as a room
TRAINING_FLOORS = {
    "config": 0,
    "evaluation_config": 1,
    "job": 1,
    "data": 2,
    "timeline": 2,
    "compute": 3,
    "checkpoints": 4,
    "memory": 5,
    "layout": 6,
    "membership": 6,
    "evaluation": 7,
    "start": 8,
    "loop": 9,
    "runner": 10,
    "api": 11,
    "__init__": 12,
}
SCRIPTS = [name for name, floor in FLOORS.items() if floor == 4]
SPEAKING = [*SCRIPTS, "converters"]  # they have command lines of their own and print
COMMANDS = [
    "checkpoint/gather.py",
    "checkpoint/inspect.py",
    "training/memory/prediction.py",
    "training/config/__main__.py",
    "training/evaluation_config.py",
    "comms/wireguard.py",
]  # the same, as single files: python -m checkpoint.gather


def sources() -> list[Path]:
    """The project's own Python files, tests excepted."""
    return list(_sources())


@functools.cache
def _sources() -> tuple[Path, ...]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(REPOSITORY / name for name in listed.stdout.split() if not name.startswith("tests/") and (REPOSITORY / name).exists())


def house() -> list[Path]:
    return [path for path in sources() if room_of(path) in FLOORS]


def room_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).parts[0].removesuffix(".py")


def speaks(path: Path) -> bool:
    return room_of(path) in SPEAKING or path.relative_to(REPOSITORY).as_posix() in COMMANDS


def trees(paths: list[Path]) -> Iterator[tuple[Path, ast.Module]]:
    for path in paths:
        yield path, tree_of(path)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported_rooms(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            found.add("relative import")
    return found


def test_every_file_has_a_room_and_imports_go_strictly_down() -> None:
    assert {room_of(path) for path in sources()} - {"benchmarks", "example_scripts"} == set(FLOORS)
    for path, tree in trees(house()):
        room = room_of(path)
        for other in imported_rooms(tree):
            assert other != "relative import", f"{path}: imports name the room"
            if other in FLOORS and other != room:
                assert FLOORS[other] < FLOORS[room], f"{path}: {room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"


def imported_rooms_of(package: str, tree: ast.Module) -> set[str]:
    """Rooms inside ``package`` that a file imports."""
    found = set()
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == package:
            names = [f"{package}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith(f"{package}.")}
    return found


def upward_imports(files: dict[str, ast.Module]) -> list[str]:
    """files: by path inside training/. One line for every import that does not go strictly down, or within a room."""
    wrong = []
    for file, tree in files.items():
        room = file.split("/")[0].removesuffix(".py")
        for other in sorted(imported_rooms_of("training", tree) - {room}):
            if TRAINING_FLOORS[other] >= TRAINING_FLOORS[room]:
                wrong.append(f"{file} (floor {TRAINING_FLOORS[room]}) imports training.{other} (floor {TRAINING_FLOORS[other]})")
    return wrong


def test_inside_training_imports_go_strictly_down_too() -> None:
    top = REPOSITORY / "training"
    files = {path.relative_to(top).as_posix(): tree for path, tree in trees(house()) if room_of(path) == "training"}
    assert {file.split("/")[0].removesuffix(".py") for file in files} == set(TRAINING_FLOORS)
    assert upward_imports(files) == []


def test_the_rule_of_floors_notices_an_import_upwards() -> None:
    assert imported_rooms(ast.parse("from training.loop import train")) == {"training"}
    assert FLOORS["training"] > FLOORS["modules"]
    up = [
        "from training.loop import train",
        "import training.start.agreement",
        "from training import evaluation",
        "from training.memory.room import x",
    ]
    for line in up:
        (said,) = upward_imports({"compute/feed.py": ast.parse(line)})
        assert said.startswith("compute/feed.py (floor 3) imports training.")
    assert not upward_imports({"compute/feed.py": ast.parse("from training.compute.build import x\nfrom training.job.job import Job")})


def test_no_test_module_imports_another() -> None:
    """What they share is in tests/support."""
    modules = {path.stem: path for path in (REPOSITORY / "tests").rglob("*.py") if "support" not in path.parts}
    assert len(modules) > 80
    for path, tree in trees(list(modules.values())):
        imported = {name for name in imported_rooms(tree) if name in modules}
        assert not imported, f"{path} imports {imported}"


def stale_pointers(text: str, files: set[str]) -> list[str]:
    """Names of Python files in ``text`` that nobody has. files: by path inside the project."""
    named = re.findall(r"(?<![\w./*}])([a-z_][\w/]*\.py)\b", text)
    return [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)]


def test_files_that_are_pointed_to_exist() -> None:
    files = {path.relative_to(REPOSITORY).as_posix() for path in (*sources(), *(REPOSITORY / "tests").rglob("*.py"))}
    pages = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md")]
    for path in (*house(), *(page for page in pages if page.name != "LOG.md")):
        allowed = ["my_tasks.py"] if path.name in ("README.md", "tasks.md") else []
        assert [name for name in stale_pointers(path.read_text(), files) if name not in allowed] == [], path
    assert stale_pointers("left to others (nowhere.py, training/loop.py, compute/loop.py)", files) == ["nowhere.py", "compute/loop.py"]


def test_models_know_no_ranks_and_only_config_has_seen_argparse() -> None:
    for path, tree in trees(house()):
        rooms = imported_rooms(tree)
        if room_of(path) == "modules":
            assert "torch.distributed" not in path.read_text(), path
        if not speaks(path) and path.name not in ("flags.py",):
            assert "argparse" not in rooms, path


def test_no_star_imports_no_bare_excepts_no_globals_no_print_below_the_scripts() -> None:
    for path, tree in trees(sources()):
        for node in ast.walk(tree):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            assert not (isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)), where
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), where
            assert not isinstance(node, ast.Global), where
    for path, tree in trees(house()):
        if speaks(path):
            continue
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), f"{path}:{getattr(node, 'lineno', 0)}"


def test_nothing_from_disk_or_wire_is_ever_executed() -> None:
    for path, tree in trees(sources()):
        assert not imported_rooms(tree) & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, path
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            where = f"{path}:{node.lineno}"
            assert not re.search(
                r"(gather|broadcast|scatter|send|recv)_object(_list)?$|\b(eval|exec)$|yaml\.(load|unsafe_load)$", called
            ), where
            if called.endswith("torch.load"):
                assert any(k.arg == "weights_only" and getattr(k.value, "value", False) is True for k in node.keywords), where


def test_every_file_says_why_it_exists_and_public_things_have_contracts() -> None:
    for path, tree in trees(house()):
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in tree.body if room_of(path) not in SCRIPTS else []:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_functions_stay_under_a_screen() -> None:
    for path, tree in trees(house()):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None and node.end_lineno - node.lineno < 70, f"{path}: {node.name} is longer than a screen"


def flags_of_both() -> list[tuple[str, "dataclasses.Field[object]"]]:
    pages = {"flags.md": Config, "evaluation_flags.md": EvalConfig}
    return [(page, field) for page, settings in pages.items() for field in dataclasses.fields(settings)]


@functools.cache
def flags_read(paths: tuple[Path, ...]) -> set[str]:
    """Names read as attributes of something called config or of self (inside Config itself)."""
    found = set()
    for _, tree in trees(paths):
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Load)
                and ast.unparse(node.value) in ("config", "self._config", "self")
            ):
                found.add(node.attr)
    return found


@pytest.mark.parametrize(("page", "field"), flags_of_both(), ids=lambda given: getattr(given, "name", given))
def test_every_flag_is_documented_and_read(page: str, field: "dataclasses.Field[object]") -> None:
    documented = (REPOSITORY / "docs" / page).read_text()
    assert re.search(rf"^\| `--{field.name.replace('_', '-')}[ `]", documented, re.MULTILINE)
    assert len(field.metadata["help"]) > 10
    is_read_in = tuple(path for path in house() if room_of(path) in ("training", "dist_clm_eval"))
    assert field.name in flags_read(is_read_in), "a flag nobody reads is a defect"


def test_optional_packages_and_cuda_are_not_touched_at_import() -> None:
    code = (
        "import sys, torch, dist_clm_train, dist_clm_eval, convert_from_hf_gptj, convert_to_hf_gptneox, converters.from_hf, "
        "converters.to_hf\n"
        "loaded = {'wandb', 'bitsandbytes', 'cupy', 'datasets', 'peft', 'transformers', 'sklearn', 'matplotlib', 'pyarrow'} & "
        "set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
