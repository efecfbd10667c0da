"""A stage's weights and training state from a checkpoint, from this host's files or, layer by layer, from those of other ranks.

Where hosts share no disk and the cut or the hosts have changed, a rank gets the files it lacks from one that sees them over the process
group, one layer at a time, each checked against the manifest's sha256, and drops them when the layer is loaded.
"""

import hashlib
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint.layer_loading import load_layer
from checkpoint.layered_folder import file_of_layer
from checkpoint.manifest import TRAIN_STATE
from checkpoint.tensor_file import FileRecord, explained_disk_errors
from checkpoint.weight_file import TensorSpec, open_weight_file
from comms.links import naming_the_peer
from comms.transport import wait_for
from modules.stage import Stage, layer_keys
from optim.build import AdamW
from training.checkpoints.discovery import ResumePoint
from training.checkpoints.shared_folders import COLLECTED_PREFIX
from training.job.job import Job
from user_error import UserError

WIRE_CHUNK_BYTES = 16 << 20


def load_stage_state(job: Job, point: ResumePoint, stage: Stage, optimizer: AdamW, root: Path) -> None:
    """Called by all ranks: parameters, from the fp32 masters where the files are narrower, and optimizer states, from own files or from
    those of other ranks, which pass through a temporary folder in ``root``. Strict. Raises UserError, PeerLost."""
    own = dict(stage.trained_by_layer())
    specs = {
        name: {kind: TensorSpec(dtype=tensor.dtype, shape=tensor.shape) for kind, tensor in state.items()}
        for name, state in optimizer.state().items()
    }
    readers = _readers(job)
    part = job.spans.part("loading the checkpoint", _num_bytes(job, point, readers, own), "bytes")
    with part as loaded, tempfile.TemporaryDirectory(prefix=COLLECTED_PREFIX, dir=root) as temporary:
        for key in layer_keys(job.model_config.num_layers):
            names = _names(point, key)
            if names[0] not in point.records and key not in own:
                continue  # of adapters: nothing of this layer is trained
            paths = [_collect(job, point, name, readers[key], Path(temporary), loaded.add) for name in names]
            if key in own:
                files = [open_weight_file(path) for path in paths]
                shapes = {name: parameter.shape for name, parameter in own[key]}
                states = load_layer(shapes, files[0], files[1] if point.has_optimizer else None, specs, optimizer.assign, loaded.add)
                if point.has_optimizer:
                    optimizer.load_state(states)
            for path in Path(temporary).iterdir():
                path.unlink()


def _names(point: ResumePoint, key: str) -> list[str]:
    """The files of a layer."""
    return [file_of_layer(key), *([f"{TRAIN_STATE}/{file_of_layer(key)}"] if point.has_optimizer else [])]


def _num_bytes(job: Job, point: ResumePoint, readers: Mapping[str, list[int]], own: Collection[str]) -> int:
    """That this rank will load, get and give."""
    rank, total = job.place.rank, 0
    for key, readers_of_layer in readers.items():
        for name in _names(point, key):
            if name in point.records:
                providers = {reader: point.provider(name, reader) for reader in readers_of_layer}
                moved = sum(provider != reader and rank in (provider, reader) for reader, provider in providers.items())
                total += point.records[name].size * (moved + (key in own))
    return total


def _readers(job: Job) -> dict[str, list[int]]:
    """Layer key -> the ranks that train it."""
    keys = layer_keys(job.model_config.num_layers)
    readers: dict[str, list[int]] = {}
    for stage, (first, last) in enumerate(job.cut):
        begin, end = (0 if stage == 0 else first + 1), (len(keys) if stage == job.place.pp_size - 1 else last + 1)
        readers |= dict.fromkeys(keys[begin:end], job.place.replica_ranks_of(stage))
    return readers


def _collect(job: Job, point: ResumePoint, name: str, readers: list[int], temporary: Path, progress: Callable[[int], object]) -> Path:
    """Called by all ranks for the same ``name``: where a reader finds the file; what it lacks comes from the rank that provides it.
    ``progress`` hears the bytes just sent or got."""
    rank, path = job.place.rank, point.folder / name
    for reader in readers:
        provider = point.provider(name, reader)
        if provider == reader:
            continue
        if rank == provider:
            _send_file(job, point.folder / name, reader, progress)
        if rank == reader:
            path = temporary / name.replace("/", ".")
            _receive_file(job, point.records[name], path, provider, progress)
    return path


def _wire_device(job: Job) -> torch.device:
    return job.device if dist.get_backend() == "nccl" else torch.device("cpu")


def _send_file(job: Job, path: Path, reader: int, progress: Callable[[int], object]) -> None:
    with explained_disk_errors(path), open(path, "rb") as file:
        while chunk := file.read(WIRE_CHUNK_BYTES):
            with naming_the_peer(f"giving {path.name} to rank {reader}"):
                message = torch.frombuffer(bytearray(chunk), dtype=torch.uint8).to(_wire_device(job))
                wait_for(dist.isend(message, dst=reader))
            progress(len(chunk))


def _receive_file(job: Job, record: FileRecord, path: Path, provider: int, progress: Callable[[int], object]) -> None:
    digest, left = hashlib.sha256(), record.size
    with explained_disk_errors(path), open(path, "xb") as file:
        while left > 0:
            chunk = torch.empty(min(left, WIRE_CHUNK_BYTES), dtype=torch.uint8, device=_wire_device(job))
            with naming_the_peer(f"getting {record.name} from rank {provider}"):
                wait_for(dist.irecv(chunk, src=provider))
            data = chunk.cpu().numpy().data
            digest.update(data)
            file.write(data)
            left -= len(data)
            progress(len(data))
    if digest.hexdigest() != record.sha256:
        raise UserError(
            f"{record.name}, got from rank {provider}, is not what the manifest says (sha256): its disk holds a damaged copy. Resume with "
            "--verify-checkpoint, which passes such copies over"
        )
