"""What a checkpoint holds of one rank, by layer: as references that are written before training goes on, or as a copy in host memory
that is written while it does."""

import contextlib
import mmap
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from checkpoint.tensor_file import Composed
from checkpoint.train_state import pack_train_state
from modules.stage import Stage
from optim.build import AdamW
from optim.masters import Master

PIECE_BYTES = 16 << 20
MADV_POPULATE_WRITE = 23  # of Linux; Python's mmap has no name for it yet


@dataclass(frozen=True, kw_only=True)
class LayerState:
    """One layer: weights by name, as they are to be rounded to the dtype of their file, and the tensors of its training state ({} where
    none is kept)."""

    weights: dict[str, Tensor | Composed]
    train_state: dict[str, Tensor | Composed]


def layers_of(stage: Stage, optimizer: AdamW, file_dtypes: Mapping[str, torch.dtype], *, with_optimizer: bool) -> dict[str, LayerState]:
    """Layer key -> its state, nothing copied. file_dtypes: of the weight files, which decide where a master is stored besides."""
    states = optimizer.state() if with_optimizer else {}
    layers: dict[str, LayerState] = {}
    for key, parameters in stage.trained_by_layer():
        masters = {name: _values(optimizer.masters()[name]) for name, _ in parameters}
        # a file in the parameters' own dtype holds them as they are: the master, rounded by other rules, could be a neighbour
        weights = {name: parameter.detach() if parameter.dtype == file_dtypes[name] else masters[name] for name, parameter in parameters}
        state = pack_train_state(masters, states, file_dtypes) if with_optimizer else {}
        layers[key] = LayerState(weights=weights, train_state=state)
    return layers


def _values(master: Master) -> Tensor | Composed:
    parts = master.parts
    return parts[0] if len(parts) == 1 else Composed(parts=parts, compose=master.compose, dtype=torch.float32)


def _parts(tensor: Tensor | Composed) -> tuple[Tensor, ...]:
    return tensor.parts if isinstance(tensor, Composed) else (tensor,)


class HostCopy:
    """Room in host memory for one rank's layers, used again by every copy: the page faults of new memory take longer than copying."""

    def __init__(self) -> None:
        self._room: dict[tuple[str, str, int], Tensor] = {}
        self._preparing: threading.Thread | None = None

    @property
    def has_room(self) -> bool:
        """True behind prepare() or the first copy."""
        return self._preparing is not None or bool(self._room)

    def prepare(self, layers: Mapping[str, LayerState]) -> None:
        """Begin to make the room for ``layers`` on another thread, so that the first copy finds its pages there."""
        wanted: dict[int, tuple[tuple[str, str, int], torch.Size, torch.dtype, bool]] = {}
        for layer in layers.values():
            for kind, tensors in (("weight", layer.weights), ("state", layer.train_state)):
                for name, whole in tensors.items():
                    for number, part in enumerate(_parts(whole)):
                        wanted.setdefault(part.data_ptr(), ((kind, name, number), part.shape, part.dtype, part.is_cuda))

        def make() -> None:
            for key, shape, dtype, is_cuda in wanted.values():
                self._room[key] = torch.empty(shape, dtype=dtype, pin_memory=True) if is_cuda else _touched(shape, dtype)

        self._preparing = threading.Thread(target=make, name="snapshot-room", daemon=True)
        self._preparing.start()

    def take(self, layers: Mapping[str, LayerState], progress: Callable[[int], object] = lambda num_bytes: None) -> dict[str, LayerState]:
        """Copy everything; when this returns the originals may change. What was taken before is overwritten. ``progress`` hears the bytes
        just copied."""
        if self._preparing is not None:
            self._preparing.join()
        copied: dict[int, Tensor] = {}  # a master is the parameter itself, or has it as a part: stored twice in the folder, copied once

        def copy_part(place: tuple[str, str, int], tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in copied or tensor.numel() == 0:
                room = self._room.get(place)
                if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
                    room = self._room[place] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copied[tensor.data_ptr()] = room.copy_(tensor, non_blocking=True)
                progress(tensor.nbytes)
            return copied[tensor.data_ptr()]

        def copy(kind: str, name: str, tensor: Tensor | Composed) -> Tensor | Composed:
            parts = tuple(copy_part((kind, name, number), part) for number, part in enumerate(_parts(tensor)))
            return replace(tensor, parts=parts) if isinstance(tensor, Composed) else parts[0]

        taken = {
            key: LayerState(
                weights={name: copy("weight", name, tensor) for name, tensor in layer.weights.items()},
                train_state={name: copy("state", name, tensor) for name, tensor in layer.train_state.items()},
            )
            for key, layer in layers.items()
        }
        if any(part.is_cuda for layer in layers.values() for tensor in layer.weights.values() for part in _parts(tensor)):
            torch.cuda.synchronize()
        return taken


def _touched(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros whose pages the system has given already, a piece at a time: the interpreter waits for each."""
    size = shape.numel() * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size)
    with contextlib.suppress(OSError):  # kernels before 5.14: the pages come with the first copy
        for start in range(0, size, PIECE_BYTES):
            memory.madvise(MADV_POPULATE_WRITE, start, min(PIECE_BYTES, size - start))
    return torch.frombuffer(memory, dtype=dtype).reshape(shape)


def num_bytes(layers: Mapping[str, LayerState]) -> int:
    """Of host memory that a copy takes; a master that is the parameter itself counts once."""
    tensors = (tensor for layer in layers.values() for tensor in (*layer.weights.values(), *layer.train_state.values()))
    return sum({part.data_ptr(): part.nbytes for tensor in tensors for part in _parts(tensor)}.values())
