"""A stage's weights and training state from a checkpoint, from this host's files or, layer by layer, from those of other ranks.

Where hosts share no disk and the cut or the hosts have changed, a rank gets the files it lacks from one that sees them over the process
group, one layer at a time, each checked against the manifest's sha256, and drops them when the layer is loaded.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.layer_loading import load_layer
from checkpoint.layered_folder import file_of_layer
from checkpoint.manifest import TRAIN_STATE
from checkpoint.tensor_file import FileRecord, explained_disk_errors
from checkpoint.weight_file import open_weight_file
from comms.links import naming_the_peer
from modules.stage import Stage, layer_keys
from optim.build import AdamW
from training.folders import COLLECTED_PREFIX
from training.job import Job
from training.resuming import ResumePoint
from user_error import UserError

WIRE_CHUNK_BYTES = 16 << 20


def load_stage_state(job: Job, point: ResumePoint, stage: Stage, optimizer: AdamW, root: Path) -> None:
    """Called by all ranks: parameters, from the fp32 masters where the files are narrower, and optimizer states, from own files or from
    those of other ranks, which pass through a temporary folder in ``root``. Strict. Raises UserError, PeerLost."""
    own = dict(stage.parameters_by_layer())
    states: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix=COLLECTED_PREFIX, dir=root) as temporary:
        for key in layer_keys(job.model_config.num_layers):
            names = [file_of_layer(key)]
            if point.has_optimizer:
                names.append(f"{TRAIN_STATE}/{file_of_layer(key)}")
            paths = {name: _collect(job, point, name, key in own, Path(temporary)) for name in names}
            if key in own:
                files = [open_weight_file(paths[name]) for name in names]
                states |= load_layer(own[key], files[0], files[1] if point.has_optimizer else None)
            for path in Path(temporary).iterdir():
                path.unlink()
    if point.has_optimizer:
        optimizer.load_state(states)


def _collect(job: Job, point: ResumePoint, name: str, needed: bool, temporary: Path) -> Path:
    """Called by all ranks for the same ``name``: where this rank finds the file; what it lacks comes from the rank that provides it."""
    rank = job.place.rank
    needs = [reader for reader in range(job.place.world_size) if name in _names_of_rank(job, reader, point)]
    for reader in needs:
        provider = point.provider(name, reader)
        if provider == reader:
            continue
        if rank == provider:
            _send_file(job, point.folder / name, reader)
        if rank == reader:
            _receive_file(job, point.records[name], temporary / name.replace("/", "."), provider)
    if needed and name not in point.sees[rank]:
        return temporary / name.replace("/", ".")
    return point.folder / name


def _names_of_rank(job: Job, rank: int, point: ResumePoint) -> set[str]:
    """The files of the layers that ``rank`` trains."""
    stage = job.place.at(rank).pp
    first, last = job.cut[stage]
    keys = layer_keys(job.model_config.num_layers)
    begin, end = (0 if stage == 0 else first + 1), (len(keys) if stage == job.place.pp_size - 1 else last + 1)
    files = {file_of_layer(key) for key in keys[begin:end]}
    return {name for name in point.records if name.removeprefix(f"{TRAIN_STATE}/") in files}


def _wire_device(job: Job) -> torch.device:
    return job.device if dist.get_backend() == "nccl" else torch.device("cpu")


def _send_file(job: Job, path: Path, reader: int) -> None:
    with explained_disk_errors(path), open(path, "rb") as file:
        while chunk := file.read(WIRE_CHUNK_BYTES):
            with naming_the_peer(f"giving {path.name} to rank {reader}"):
                dist.send(torch.frombuffer(bytearray(chunk), dtype=torch.uint8).to(_wire_device(job)), dst=reader)


def _receive_file(job: Job, record: FileRecord, path: Path, provider: int) -> None:
    digest, left = hashlib.sha256(), record.size
    with explained_disk_errors(path), open(path, "xb") as file:
        while left > 0:
            chunk = torch.empty(min(left, WIRE_CHUNK_BYTES), dtype=torch.uint8, device=_wire_device(job))
            with naming_the_peer(f"getting {record.name} from rank {provider}"):
                dist.recv(chunk, src=provider)
            data = chunk.cpu().numpy().data
            digest.update(data)
            file.write(data)
            left -= len(data)
    if digest.hexdigest() != record.sha256:
        raise UserError(
            f"{record.name}, got from rank {provider}, is not what the manifest says (sha256): its disk holds a damaged copy. Resume with "
            "--verify-checkpoint, which passes such copies over"
        )
