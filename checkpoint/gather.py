"""Put the folders of hosts that share no disk together into one step that a run can resume from and transformers can load.

    python -m checkpoint.gather HOSTDIR... --out DIR [--step N]

Each HOSTDIR is a copy of one host's step folder or of its whole --checkpoint-path. Every file of the checkpoint is compared with the
manifests' size and sha256 while it is copied; where several folders hold a file, a good copy is taken. The result is DIR itself where DIR
is named by the step, else DIR/<step>, because a run resumes only from folders that are named by their step.

Promises: the result appears as a whole or not at all, and nothing that was there before is changed; what is written is one step of one
run, and a whole model. Exit status: 0 written, 1 not (one line on stderr says why), 2 the command line is wrong.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from checkpoint.adapter_folder import ADAPTER_WEIGHTS, is_adapter_folder, merge_layer_files, read_adapter, write_adapter_weights
from checkpoint.atomic_folder import PARTIAL_SUFFIX, atomic_folder, check_target
from checkpoint.command import exit_status, expanded
from checkpoint.companions import CONFIG
from checkpoint.job_lock import LOCK_NAME, JobLock
from checkpoint.layered_folder import INDEX, file_of_layer
from checkpoint.manifest import MANIFEST, TRAIN_STATE, TRAINER_FILE, Manifest, file_problem, read_manifest, step_folders, write_manifest
from checkpoint.model_folder import ModelFolder, check_model_folder, listed, read_json_object
from checkpoint.tensor_file import FileRecord, copy_file, explained_disk_errors
from checkpoint.train_state import read_trainer_state
from comms.progress import counted
from modules.families import read_model_config
from modules.stage import EMBEDDINGS, LM_HEAD, layer_key_of_index
from user_error import UserError

Cut = list[tuple[int, int]]  # layers [first, last) of every stage


@dataclass(frozen=True, kw_only=True)
class HostFolder:
    """One host's folder of a step. manifest None: it cannot be read (``defect`` says why); other hosts' manifests vouch for the files."""

    path: Path
    manifest: Manifest | None
    defect: str

    @classmethod
    def open(cls, path: Path) -> "HostFolder":
        """Raises UserError for the folder of a model, which is no training step."""
        try:
            manifest = read_manifest(path)
        except UserError as error:
            return cls(path=path, manifest=None, defect=str(error))
        if manifest.step is None:
            raise UserError(f"{path} is a model folder, which is whole by itself. Give folders of training steps")
        return cls(path=path, manifest=manifest, defect="")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """One step as several folders hold it, after their manifests were found to agree."""

    folders: Sequence[HostFolder]
    step: int
    position: int | None
    records: dict[str, FileRecord]

    @property
    def num_bytes(self) -> int:
        return sum(record.size for record in self.records.values())


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The step to gather, and what has to be said of newer ones that were passed over."""

    parts: Parts
    passed_over: Sequence[str]


def choose(paths: Sequence[Path], step: int | None) -> Choice:
    """The newest step that all ``paths`` together hold whole, or ``step``. Sizes only are looked at. Raises UserError if there is none."""
    for path in paths:
        if not path.is_dir():
            raise UserError(f"there is no folder {path}. Give copies of the hosts' step folders or of their --checkpoint-path")
    given = [HostFolder.open(path) for path in paths if _is_step(path)]
    roots = [path for path in paths if not _is_step(path)]
    for root in roots:
        if not step_folders(root) and not any(root.glob(f".*{PARTIAL_SUFFIX}")):
            raise UserError(f"{root} holds neither a step ({MANIFEST}) nor folders of steps. Give a step folder or a --checkpoint-path")
    wanted = _wanted_step(given, step)
    if wanted is None:
        numbers = sorted({int(folder.name) for root in roots for folder in step_folders(root)})
        return _newest_whole([_folders_of(number, roots, given) for number in numbers])
    folders = _folders_of(wanted, roots, given)
    if not folders:
        there = sorted({int(folder.name) for root in roots for folder in step_folders(root)})
        raise UserError(f"none of the given folders holds step {wanted}; they hold {', '.join(map(str, there))}. Give another --step")
    parts = join(folders)
    if problem := what_is_missing(parts):
        raise UserError(f"step {wanted} is not whole in the given folders: {problem}")
    return Choice(parts=parts, passed_over=[])


def join(folders: Sequence[HostFolder]) -> Parts:
    """The step that ``folders`` hold together. Raises UserError naming folder and file if their manifests are not of one run's step."""
    readable = [(folder.path, folder.manifest) for folder in folders if folder.manifest is not None]
    if not readable:
        raise UserError(f"no given folder has a {MANIFEST} that can be read, which must list the files: {folders[0].defect}")
    first_path, first = readable[0]
    assert first.step is not None, "HostFolder.open refuses model folders"
    records: dict[str, FileRecord] = {}
    listed_by: dict[str, Path] = {}
    for path, manifest in readable:
        if manifest.step != first.step:
            raise UserError(f"not of the same run: {first_path} is step {first.step} and {path} is step {manifest.step}. Give one step's")
        if manifest.position != first.position:
            seen = f"{first_path} was saved after {first.position} sequences and {path} after {manifest.position}"
            raise UserError(f"not of the same run: {seen}, both as step {first.step}. Give folders of one run")
        for name, record in sorted(manifest.everywhere.items()):
            if records.setdefault(name, record) != record:
                raise UserError(_disagreement(name, listed_by[name], path))
            listed_by.setdefault(name, path)
    return Parts(folders=folders, step=first.step, position=first.position, records=records)


def what_is_missing(parts: Parts) -> str:
    """'' if each file is in some folder in full size; else what is not, and which host's folder would have it, as far as manifests say."""
    lacking = [name for name, record in sorted(parts.records.items()) if not _good_sizes(parts, record)]
    damaged = [
        f"{problem} in {folder.path}"
        for name in lacking
        for folder in parts.folders
        if (folder.path / name).exists() and (problem := file_problem(folder.path, parts.records[name]))
    ]
    clauses = [f"{text}. Copy it again from its host" for text in listed("damaged", damaged)]
    absent = [name for name in lacking if not any((folder.path / name).exists() for folder in parts.folders)]
    for folder in parts.folders:
        own = [name for name in absent if folder.manifest is not None and name in folder.manifest.here]
        clauses += [f"{text}. {folder.path} should hold this: copy that folder again from its host" for text in listed("missing", own)]
        absent = [name for name in absent if name not in own]
    whose = _stages_with(absent, _cut(parts.folders))
    clauses += [f"{text}. Give the folder of the host {whose} too" for text in listed("missing from every given folder", absent)]
    if TRAINER_FILE not in parts.records:
        clauses.append(f"no {MANIFEST} lists {TRAINER_FILE}")
    return "; ".join(clauses)


def result_folder(out: Path, step: int) -> Path:
    """``out`` if it is named by ``step``, else ``out``/<step>; raises UserError unless that is missing or empty and can be resumed from."""
    name = out.absolute().name
    if name != str(step) and name.isdigit():
        cure = f"Give {out.parent / str(step)}"
        raise UserError(f"--out must not be named by another step than the gathered one, {step}; it is {out}. {cure}")
    target = out if name == str(step) else out / str(step)
    if (target.parent / CONFIG).exists():
        raise UserError(f"--out must be a folder for steps, and {target.parent} holds a model ({CONFIG}). Give another one")
    with explained_disk_errors(target):
        check_target(target)
    return target


def write_parts(parts: Parts, target: Path) -> list[str]:
    """Copy all files into ``target`` and return a warning for every damaged copy that another one made up for.

    Raises UserError, and leaves nothing, if a file has no good copy or the result is no whole model.
    """
    warnings: list[str] = []
    root_lock = JobLock(target.parent) if (target.parent / LOCK_NAME).exists() else nullcontext()  # no job may be saving there meanwhile
    with _made_parents_removed(target), root_lock, atomic_folder(target, num_bytes=parts.num_bytes) as folder:
        with counted("gathering", parts.num_bytes) as progress:
            for record in sorted(parts.records.values(), key=lambda record: record.name):
                warnings += _copy_verified(record, parts, folder)
                progress(record.size)
        try:
            records = [*parts.records.values(), *_write_adapter(parts, folder)]
            write_manifest(folder, records, parts.step, position=parts.position)
            config = read_model_config(read_json_object(folder / CONFIG))
            if is_adapter_folder(folder):
                read_adapter(folder, config)
            else:
                check_model_folder(ModelFolder.open(folder), config)
        except UserError as error:
            raise UserError(f"these files are as they were saved, and yet they make no model, so nothing was written: {error}") from error
    return warnings


def _write_adapter(parts: Parts, folder: Path) -> list[FileRecord]:
    """What hosts without a shared disk could not write, each having some of the layers: an adapter's weights as peft reads them."""
    if not is_adapter_folder(folder) or ADAPTER_WEIGHTS in parts.records:
        return []
    layers = [folder / name for name in sorted(parts.records) if "/" not in name and name.endswith(".safetensors")]
    return [write_adapter_weights(folder, merge_layer_files(layers))]


def gather(paths: Sequence[Path], out: Path, step: int | None) -> None:
    """The whole command; raises UserError for whatever the user can cure, and then has written nothing."""
    choice = choose(paths, step)
    parts = choice.parts
    target = result_folder(out, parts.step)
    for text in [*choice.passed_over, *(f"{f.defect} Its files are compared with the other manifests" for f in parts.folders if f.defect)]:
        _warn(text)
    why = "as asked for" if step is not None else "the step of the given folders" if not choice.passed_over else "the newest whole one"
    print(f"gathering step {parts.step} ({why}): {len(parts.records)} files, {_gigabytes(parts.num_bytes)}, from")
    for folder in parts.folders:
        print(f"  {folder.path}")
    for text in write_parts(parts, target):
        _warn(text)
    where = "" if target == out else f" (a folder named by its step inside {out}: a run resumes from no other)"
    position = "" if parts.position is None else f", trained on {parts.position} sequences"
    what = "the adapters of a whole model" if is_adapter_folder(target) else "a whole model"
    print(f"wrote {target}{where}: every file verified, {what}{position}")
    newest = step_folders(target.parent)[0]
    if newest != target:
        _warn(f"{target.parent} also holds {newest.name}, which is newer: a run resumes from that one if it is whole")
    print("next, with the flags of the run, on every host that sees this folder or has a copy of it:")
    print(f"  python dist_clm_train.py --checkpoint-path {shlex.quote(str(target.parent))} ...")
    print(f"or look at it: python -m checkpoint.inspect {shlex.quote(str(target))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv``; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint.gather", description="Put one step together from the folders of hosts that share no disk."
    )
    parser.add_argument("hostdirs", nargs="+", type=Path, metavar="HOSTDIR", help="copy of a host's step folder or --checkpoint-path")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="write DIR, if it is named by the step, else DIR/<step>")
    parser.add_argument("--step", type=int, metavar="N", help="the step to gather; left out: the newest one that is whole")
    arguments = parser.parse_args(argv)

    def work() -> int:
        gather([expanded(path) for path in arguments.hostdirs], expanded(arguments.out), arguments.step)
        return 0

    return exit_status(work, before_error="error: ")


def _is_step(path: Path) -> bool:
    """True for a step folder, also one that has lost its manifest; False for a folder of steps."""
    return (path / MANIFEST).exists() or any(path.glob("*.safetensors")) or (path / TRAIN_STATE).is_dir()


def _wanted_step(given: Sequence[HostFolder], step: int | None) -> int | None:
    """The one step that can be meant where step folders are given, or --step; None where only roots are."""
    for folder in given:
        if folder.manifest is not None and step is not None and folder.manifest.step != step:
            raise UserError(f"--step is {step} and {folder.path} is step {folder.manifest.step}. Give that host's folder of step {step}")
    numbers = [folder.manifest.step for folder in given if folder.manifest is not None]
    if given and not numbers and step is None:
        join(given)  # says why
    return step if step is not None else next(iter(numbers), None)


def _folders_of(step: int, roots: Sequence[Path], given: Sequence[HostFolder]) -> list[HostFolder]:
    """The folders of ``step``: all given ones, and that of every root: the partial one where the host died before its last rename."""
    found = list(given)
    for root in roots:
        partial = root / f".{step}{PARTIAL_SUFFIX}"
        if (root / str(step)).is_dir():
            found.append(HostFolder.open(root / str(step)))
        elif (partial / MANIFEST).exists():
            found.append(HostFolder.open(partial))
    return found


def _newest_whole(candidates: Sequence[Sequence[HostFolder]]) -> Choice:
    """Of several steps, the newest whole one."""
    whole: list[Parts] = []
    broken: list[tuple[tuple[int, int] | None, int, str]] = []
    for folders in candidates:
        number = int(next(folder.path.name for folder in folders if folder.path.name.isdigit()))
        try:
            parts = join(folders)
            reason = f"the folders of step {number} say they are step {parts.step}" if parts.step != number else what_is_missing(parts)
        except UserError as error:
            reason = str(error)
        if reason:
            manifests = [folder.manifest for folder in folders if folder.manifest is not None]
            age = max((_age(manifest.step, manifest.position) for manifest in manifests), default=None)
            broken.append((age, number, f"passed over step {number}: {reason}"))
        else:
            whole.append(parts)
    if not whole:
        raise UserError("no step is whole in the given folders: " + "; ".join(text for _, _, text in reversed(broken)))
    newest = max(whole, key=lambda parts: _age(parts.step, parts.position))
    age_of_newest = _age(newest.step, newest.position)
    newer = [text for age, number, text in reversed(broken) if (number > newest.step if age is None else age > age_of_newest)]
    return Choice(parts=newest, passed_over=newer)


def _age(step: int | None, position: int | None) -> tuple[int, int]:
    """Sorts steps, newest last: by position, and by number those that do not say it."""
    return -1 if position is None else position, -1 if step is None else step


def _disagreement(name: str, one: Path, other: Path) -> str:
    """Two manifests describe the same file differently."""
    cure = "Give folders of one run"
    if not name.endswith(".safetensors"):
        cure += f", or if you know they are: cp -r {other}/. MERGED; cp -r {one}/. MERGED, and give MERGED"
    return f"not of the same run: the manifests of {one} and {other} list different contents for {name}. {cure}"


def _good_sizes(parts: Parts, record: FileRecord) -> list[HostFolder]:
    return [folder for folder in parts.folders if file_problem(folder.path, record) is None]


def _copy_verified(record: FileRecord, parts: Parts, target: Path) -> list[str]:
    """Copy the first good copy of a file; what is wrong with those before it. Raises UserError if no copy is good."""
    problems: list[str] = []
    (target / record.name).parent.mkdir(parents=True, exist_ok=True)
    for folder in parts.folders:
        problem = file_problem(folder.path, record)
        if problem is None:
            problem = _copy_once(record, folder.path, target)
        if problem is None:
            return [f"{text}; another folder's copy was taken" for text in problems]
        if (folder.path / record.name).exists():
            problems.append(f"{problem} ({folder.path})")
    raise UserError(
        f"no good copy of a file of step {parts.step}, so nothing was written: {'; '.join(problems) or record.name + ' has gone'}. "
        "Copy it again from its host, or give the --step of an older step"
    )


def _copy_once(record: FileRecord, source: Path, target: Path) -> str | None:
    """Copy one file; what is wrong with the source, as a clause, or None. What is wrong with the target is raised."""
    try:
        if copy_file(source / record.name, target / record.name, relative_to=target) == record:
            return None
        problem = f"{record.name} is damaged: its sha256 is not the one in {MANIFEST}"
    except OSError:
        found = file_problem(source, record, hashes=True)
        if found is None:
            raise
        problem = found
    (target / record.name).unlink(missing_ok=True)
    return problem


def _cut(folders: Sequence[HostFolder]) -> Cut:
    """The layers of each stage of the run; [] if nobody says it."""
    for folder in folders:
        with suppress(UserError, TypeError, ValueError):
            return [(int(first), int(last)) for first, last in read_trainer_state(folder.path).get("cut") or []]
    return []


def _stages_with(names: Sequence[str], cut: Cut) -> str:
    """Who held these files: "that ran stage 1 of 2"."""
    files = [
        {file_of_layer(key) for key in map(layer_key_of_index, range(first, last))}
        | ({file_of_layer(EMBEDDINGS)} if first == 0 else set())
        | ({file_of_layer(LM_HEAD)} if (first, last) == cut[-1] else set())
        for first, last in cut
    ]
    stages = [s for s, of_stage in enumerate(files) if of_stage & {Path(name).name for name in names if name != INDEX}]
    if not stages:
        return "that holds them"
    return f"that ran stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))} (of 0 to {len(cut) - 1})"


@contextmanager
def _made_parents_removed(target: Path) -> Iterator[None]:
    """On an error, remove those folders above ``target`` that were not there before."""
    made = [folder for folder in target.absolute().parents if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
