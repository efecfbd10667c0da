"""Where a run's snapshots in host memory lie, who sees which, and whether one of them is what the run goes on from."""

import hashlib
import logging
import os
import shutil
import stat
from pathlib import Path

import torch.distributed as dist

from checkpoint.layer_store import remove_partials
from checkpoint.manifest import step_positions
from training.checkpoints.discovery import ResumePoint, find_resume_point
from training.checkpoints.shared_folders import Folders, find_folders
from training.config.train import Config
from training.job.job import Job, all_say
from user_error import UserError

log = logging.getLogger("trainer")

HOST_MEMORY = Path("/dev/shm")  # a tmpfs on every Linux


def rescue_folder(checkpoint_path: str | Path) -> Path:
    """Where this host keeps the snapshots of the run in ``checkpoint_path``. Raises UserError on hosts without such a filesystem."""
    if not HOST_MEMORY.is_dir():
        raise UserError(
            f"--rescue-interval keeps snapshots in {HOST_MEMORY}, which this host does not have. Leave it out, and save more often"
        )
    name = hashlib.sha256(os.path.realpath(checkpoint_path).encode()).hexdigest()[:16]
    return HOST_MEMORY / f"geo-clm-trainer-{os.getuid()}" / name


def find_rescue_folders(job: Job, config: Config) -> Folders | None:
    """Called by all ranks: who sees whose host memory; None without --rescue-interval. Raises UserError."""
    if not config.rescue_interval:
        return None
    assert config.checkpoint_path is not None, "parse_config requires it"
    root = rescue_folder(config.checkpoint_path)
    root.parent.mkdir(mode=0o700, exist_ok=True)
    status = root.parent.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or not stat.S_ISDIR(status.st_mode):
        raise UserError(
            f"--rescue-interval needs {root.parent} to be a folder that only this user can read and write. Remove what is there"
        )
    folders = find_folders(job, root, label="rescue folders")
    if job.place.rank in folders.keepers:
        remove_partials(root)
    return folders


def find_rescue(job: Job, config: Config, point: ResumePoint | None, run_token: str | None) -> ResumePoint | None:
    """Called by all ranks: the newest snapshot that is whole over all hosts, where it is of the run of ``run_token`` (rank 0 knows it) and
    newer than ``point``, the checkpoint that the run would go on from."""
    assert config.checkpoint_path is not None, "parse_config requires it"
    store = dist.PrefixStore("rescue", job.store)
    token = all_say(job, store, "token", run_token)[0]
    if token is None:
        return None
    found = find_resume_point(job, rescue_folder(config.checkpoint_path), only=None, hashes=False, is_required=False, label="rescue")
    if found is None or found.trainer.get("run_token") != token or (point is not None and found.position <= point.position):
        return None
    if job.place.rank == 0:
        log.info("going on from a snapshot in host memory, of step %d", found.step)
    return found


def forget_snapshots(job: Job, config: Config, folders: Folders, point: ResumePoint | None) -> None:
    """Called by all ranks when it is settled where the run goes on: no snapshot but ``point`` will be what a later restart goes on from."""
    assert config.checkpoint_path is not None, "parse_config requires it"
    if job.place.rank in folders.keepers:
        root = rescue_folder(config.checkpoint_path)
        for name in step_positions(root):
            if point is None or root / name != point.folder:
                shutil.rmtree(root / name, ignore_errors=True)
