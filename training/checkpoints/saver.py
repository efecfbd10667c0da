"""Checkpoints as a job of many ranks: who writes what, who waits for whom, while training goes on.

    every writer    writes its layers beside the other writers of its folder, and tells the store (or why it could not)
    every keeper    waits for all writers of all folders, completes its folder, tells the store; waits for all keepers, renames; waits
                    for all renames, deletes old steps
    rank 0          says in the log what came of it

All of this is on a thread of each rank that talks through a store connection of its own and calls no collective. A step that one rank
cannot write is given up by all alike, the training goes on, and the checkpoints before it stay. What training reads (fp32 parameters,
moments, data position) is what is saved, keyed by layer.
"""

import base64
import json
import logging
import os
import platform
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint.layer_store import StepWeights, StepWriter, remove_old_steps
from checkpoint.tensor_file import FileRecord, TensorSource, explained_disk_errors
from comms.store_tunnel import another_connection
from modules.stage import Stage
from optim.build import AdamW
from training.checkpoints.host_copy import HostCopy, LayerState, layers_of, num_bytes
from training.checkpoints.save_options import Best, SaveOptions
from training.checkpoints.shared_folders import Folders
from training.job.host_limits import default_memory_limit
from training.job.job import COLLECTIVE_TIMEOUT, Job
from user_error import UserError

log = logging.getLogger("trainer")

BEST_FILE = "best.json"
ROOM_BYTES = 2**20  # for headers, index and manifest
STORE_PIECE_CHARS = 2**20  # a store takes no values of many MB


class StepNotSaved(UserError):
    """A checkpoint could not be written; the message says by which rank and why."""


class Saver:
    """One rank's part in saving. Called by all ranks alike; ranks that neither write nor keep a folder do nothing."""

    def __init__(
        self,
        job: Job,
        folders: Folders,
        root: Path,
        stage: Stage,
        optimizer: AdamW,
        options: SaveOptions,
        weights: StepWeights,
        companions: Mapping[str, bytes] | None,
        name: str = "save",
    ) -> None:
        """Collective over all ranks. weights: of all ranks together. companions: on rank 0, the files that go beside them, by name; None
        elsewhere. name: tells the savers of one job apart."""
        self._job, self._folders, self._root, self._stage, self._optimizer, self._options = job, folders, root, stage, optimizer, options
        self._writes, self._keeps = folders.writes(job.place), job.place.rank in folders.keepers
        self._weights = weights
        self._companions = _share_companions(job, folders, companions, name)
        self._store = dist.PrefixStore(name, another_connection(job.store, job.deadlines))  # the writing thread's own
        self._host_copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._work: _StepSave | None = None

    @property
    def keeps(self) -> bool:
        """Whether this rank keeps a folder."""
        return self._keeps

    def prepare(self) -> None:
        """After an update, where saves will come while training goes on: make room for the first one's copy, once, beside the training."""
        if self._options.is_async and self._writes and not self._host_copy.has_room:
            layers = self._layers()
            if self._has_room(layers):
                self._host_copy.prepare(layers)

    def save(
        self, step: int, position: int, trainer: Mapping[str, Any] | None, *, is_last: bool = False, best: Best | None = None
    ) -> float:
        """Save what has been trained up to ``step``, at ``position`` sequences; ``trainer`` is rank 0's. Returns the seconds that training
        stood still. ``best``: the step that --keep-best spares. With --async-checkpoint writing goes on after that, unless it
        ``is_last``; a save that is still running is waited for. Raises, on a later call, only what is no mere failure to write.
        """
        started = time.perf_counter()
        self.wait()
        if not (self._writes or self._keeps):
            return time.perf_counter() - started
        layers = self._layers() if self._writes else {}
        is_async = self._options.is_async and not is_last and self._has_room(layers)
        if is_async:
            with self._job.spans.beside(self._options.waits, "copying what is saved", num_bytes(layers), "bytes") as part:
                layers = self._host_copy.take(layers, part.add)
        work = _StepSave(
            job=self._job,
            folders=self._folders,
            writer=StepWriter(self._root, step),
            store=dist.PrefixStore(f"{step}/{position}", self._store),
            layers=layers,
            weights=self._weights,
            position=position,
            trainer=None if trainer is None else self._completed(step, position, trainer),
            companions=self._companions,
            options=self._options,
            best=best,
            stood_still_s=time.perf_counter() - started if is_async else None,
        )
        if is_async:
            self._thread = threading.Thread(target=self._run, args=[work], name="checkpoint-writer", daemon=True)
            self._thread.start()
        else:
            self._run(work)
        return time.perf_counter() - started

    def wait(self) -> bool:
        """Until nothing is being saved; whether the last save came to something, as far as this rank knows: those that keep a folder do.
        Raises what the writing thread met, unless it was a failure to write, which it has told."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None and not isinstance(self._failure, StepNotSaved):
            raise self._failure
        return self._failure is None

    def give_up(self) -> bool:
        """In place of wait(), where the ranks have lost each other: whether a save was cut off by that. What it has written so far goes."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        was_cut_off = self._failure is not None and not isinstance(self._failure, StepNotSaved)
        if was_cut_off and self._work is not None and self._keeps:
            self._work.writer.give_up()
        return was_cut_off

    def finish(self) -> None:
        """wait(), after the last save. Raises StepNotSaved if that one came to nothing."""
        self.wait()
        if self._failure is not None:
            raise self._failure

    def _run(self, work: "_StepSave") -> None:
        self._failure, self._work = None, work
        try:
            work.run()
        except Exception as error:  # of the store, so of rank 0: carried to the main thread, which raises it
            self._failure = error

    def _layers(self) -> dict[str, LayerState]:
        dtypes = {name: spec.dtype for name, spec in self._weights.specs.items()}
        return layers_of(self._stage, self._optimizer, dtypes, with_optimizer=self._options.with_optimizer)

    def _has_room(self, layers: Mapping[str, LayerState]) -> bool:
        if self._host_copy.has_room or not layers:
            return True
        own_host = self._job.roster[self._job.place.rank]["host_id"]
        ranks_here = sum(entry["host_id"] == own_host for entry in self._job.roster)
        needed, free = num_bytes(layers), default_memory_limit(torch.device("cpu"), ranks_here)
        if needed <= free:
            return True
        log.warning(
            "no room for a copy of this rank's state beside the training (%.1f GB needed, %.1f GB free): training waits while it is "
            "written, as with --async-checkpoint false",
            needed / 1e9,
            free / 1e9,
        )
        self._options = SaveOptions(**{**asdict(self._options), "is_async": False})
        return False

    def _completed(self, step: int, position: int, trainer: Mapping[str, Any]) -> dict[str, Any]:
        place = self._job.place
        return {
            "step": step,
            "position": position,
            "cut": [list(layers) for layers in self._job.cut],
            "grid": {"stages": place.pp_size, "replicas": place.dp_size},
            "num_threads": self._job.num_threads,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            **trainer,
        }


@dataclass(frozen=True, kw_only=True)
class _StepSave:
    """One rank's part in one step's save; run() is its whole life."""

    job: Job
    folders: Folders
    writer: StepWriter
    store: dist.Store
    layers: dict[str, LayerState]
    weights: StepWeights
    position: int
    trainer: dict[str, Any] | None
    companions: Mapping[str, bytes]
    options: SaveOptions
    best: Best | None
    stood_still_s: float | None  # of the training, before the writing; None: as long as it takes

    def run(self) -> None:
        """Raises StepNotSaved, alike on all keepers, if any rank could not do its part."""
        started = time.perf_counter()
        place, step = self.job.place, self.writer.step
        if place.rank == 0:
            self.store.set("trainer", json.dumps(self.trainer))
        is_keeper = place.rank in self.folders.keepers
        if self.folders.writes(place):
            self.store.set(f"bytes/{place.rank}", str(self._num_bytes))
        if is_keeper:
            self._part("begun", self._begin)
        if self.folders.writes(place):
            self._part("wrote", self._write)
        if not is_keeper:
            return
        try:
            wrote = self._outcomes("wrote", self.folders.writers(place))
            self._part("ready", lambda: self._prepare(wrote))
            self._outcomes("ready", self.folders.keepers)
            self._part("there", lambda: str(self.writer.commit()))
            self._outcomes("there", self.folders.keepers)
        except StepNotSaved as error:
            self.writer.abandon()
            self.store.set(f"abandoned/{place.rank}", "1")  # the last save's failure ends the job, and nobody's before he has tidied up
            self.store.wait([f"abandoned/{rank}" for rank in self.folders.keepers], COLLECTIVE_TIMEOUT)
            if place.rank == 0:
                log.error("error: the %s of step %d was not written, those before it stay. %s", self.options.kind, step, error)
            raise
        self._name_best()
        removed = self._remove_old()
        if place.rank == 0:
            size = sum(record["size"] for records in wrote.values() for record in records)
            seconds = time.perf_counter() - started
            still = "meanwhile" if self.stood_still_s is None else f"for {self.stood_still_s:.2g} s"
            old = f"; removed {', '.join(removed)}" if removed else ""
            written = f"{tqdm.format_sizeof(size, 'B')} in {seconds:.1f} s"
            say = log.debug if self.options.is_snapshot else log.info
            say("saved %s (%s; training stood still %s%s)", self.writer.final, written, still, old)

    def _name_best(self) -> None:
        """Behind the commit, so that best.json never names a step that does not exist."""
        if self.best is None:
            return
        try:
            unnamed = self.writer.root / f".{BEST_FILE}"
            unnamed.write_text(json.dumps(asdict(self.best)) + "\n")
            os.replace(unnamed, self.writer.root / BEST_FILE)
        except OSError as error:
            log.warning("%s could not be written: %s; step %d is the best so far", BEST_FILE, error.strerror, self.best.step)

    def _forget_best(self) -> None:
        """best.json of a run that kept the best, where this one does not: its step is not spared any more."""
        if self.best is None and self.options.keep:
            (self.writer.root / BEST_FILE).unlink(missing_ok=True)

    def _remove_old(self) -> list[str]:
        try:
            self._forget_best()
            spared = str(self.best.step) if self.best else None
            keep = self.options.keep
            return remove_old_steps(self.writer.root, self.writer.final, keep, spared=spared) if keep else []
        except (UserError, OSError) as error:
            log.warning("old checkpoints could not be removed (--keep-checkpoints): %s", error)
            return []

    def _part(self, name: str, work: Callable[[], Any]) -> None:
        """Do ``work`` and tell the others its result, or why there is none."""
        try:
            outcome = {"result": work()}
        except StepNotSaved as error:  # another rank's failure, which this one waited for
            outcome = {"failed": str(error)}
        except dist.DistError:  # no store, no others: the meeting is over
            raise
        except UserError as error:
            outcome = {"failed": f"{self.job.peer_names[self.job.place.rank]}: {error}"}
        except Exception as error:  # whatever a filesystem or a defect of ours comes up with costs this checkpoint and not the training
            log.error("%s", traceback.format_exc())
            outcome = {"failed": f"{self.job.peer_names[self.job.place.rank]}: {type(error).__name__}: {error}"}
        self.store.set(f"{name}/{self.job.place.rank}", json.dumps(outcome))

    def _outcomes(self, name: str, ranks: Sequence[int]) -> dict[int, Any]:
        """What ``ranks`` made of their parts; raises StepNotSaved with the first failure."""
        keys = [f"{name}/{rank}" for rank in ranks]
        self.store.wait(keys, COLLECTIVE_TIMEOUT)
        outcomes = {rank: json.loads(self.store.get(key)) for rank, key in zip(ranks, keys, strict=True)}
        failed = [outcome["failed"] for outcome in outcomes.values() if "failed" in outcome]
        if failed:
            raise StepNotSaved(failed[0])
        return {rank: outcome["result"] for rank, outcome in outcomes.items()}

    @property
    def _num_bytes(self) -> int:
        """Of the files that this rank will write."""
        dtypes = {name: spec.dtype for name, spec in self.weights.specs.items()}
        sources = [TensorSource.of(name, t, dtypes[name]) for layer in self.layers.values() for name, t in layer.weights.items()]
        sources += [TensorSource.of(name, t) for layer in self.layers.values() for name, t in layer.train_state.items()]
        return sum(source.num_bytes for source in sources)

    def _begin(self) -> None:
        """The keeper, before anybody writes into its folder: is there room for what all of them will?"""
        own = self.folders.of(self.job.place.rank)
        keys = [f"bytes/{rank}" for rank in self.folders.writers(self.job.place) if rank in own]
        if keys:
            self.store.wait(keys, COLLECTIVE_TIMEOUT)
        needed = sum(int(self.store.get(key)) for key in keys) + sum(map(len, self.companions.values())) + ROOM_BYTES
        with explained_disk_errors(self.writer.root):
            free = shutil.disk_usage(self.writer.root).free
        if free < needed:
            raise UserError(
                f"a checkpoint needs {tqdm.format_sizeof(needed, 'B')} in {self.writer.root}, where {tqdm.format_sizeof(free, 'B')} are "
                "free. Make room, let --keep-checkpoints delete old ones, or use another --checkpoint-path"
            )
        self.writer.begin()

    def _write(self) -> list[dict[str, Any]]:
        self._outcomes("begun", [self.folders.keeper(self.job.place.rank)])
        records: list[FileRecord] = []
        title = f"writing the {self.options.kind} of step {self.writer.step}"
        with self.job.spans.beside(self.options.waits, title, self._num_bytes, "bytes") as part:
            for key, layer in self.layers.items():
                dtypes = {name: self.weights.specs[name].dtype for name in layer.weights}
                records.append(self.writer.write_layer(key, layer.weights, dtypes, part.add))
                if layer.train_state:
                    records.append(self.writer.write_train_state(key, layer.train_state, part.add))
        return [asdict(record) for record in records]

    def _prepare(self, wrote: Mapping[int, list[dict[str, Any]]]) -> None:
        own = self.folders.of(self.job.place.rank)
        records = {rank: [FileRecord(**record) for record in entries] for rank, entries in wrote.items()}
        here = {record.name: record for rank in wrote if rank in own for record in records[rank]}
        elsewhere: dict[str, FileRecord] = {}
        for rank in wrote:
            for record in records[rank]:
                known = here.get(record.name) or elsewhere.get(record.name)
                if known is not None and known != record:
                    raise UserError(f"replicas hold the same weights, and two wrote {record.name} differently. Resume from an older step")
                if known is None:
                    elsewhere[record.name] = record
        here |= {record.name: record for record in self.writer.write_companions(self.companions)}
        self.store.wait(["trainer"], COLLECTIVE_TIMEOUT)
        self.writer.prepare(
            list(here.values()),
            list(elsewhere.values()),
            position=self.position,
            weights=self.weights,
            trainer=json.loads(self.store.get("trainer")),
        )


def _share_companions(job: Job, folders: Folders, contents: Mapping[str, bytes] | None, name: str) -> Mapping[str, bytes]:
    """Called by all ranks: rank 0's ``contents``, which go into every folder of every step; {} on ranks that keep none.

    Read once, so that a save depends on no other folder, and every host's part says the same of the model.
    """
    store = dist.PrefixStore(f"{name}/companions", job.store)
    if job.place.rank == 0:
        assert contents is not None, "rank 0 has them"
        if len(folders.groups) > 1:
            text = json.dumps({name: base64.b64encode(content).decode() for name, content in contents.items()})
            pieces = [text[at : at + STORE_PIECE_CHARS] for at in range(0, len(text), STORE_PIECE_CHARS)]
            for number, piece in enumerate(pieces):
                store.set(str(number), piece)
            store.set("count", str(len(pieces)))
        return contents
    if job.place.rank not in folders.keepers:
        return {}
    store.wait(["count"], COLLECTIVE_TIMEOUT)
    text = "".join(store.get(str(number)).decode() for number in range(int(store.get("count"))))
    return {name: base64.b64decode(content) for name, content in json.loads(text).items()}
