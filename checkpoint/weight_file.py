"""Reading one file of weights, safetensors or torch's zip, without loading it: names, shapes and dtypes from its header, values by mmap.

Promises: opening reads headers only, and proves that a safetensors file is as long as its header says. ``read`` returns a tensor that
lies in the mapped file: the caller copies what it keeps, and no more than the tensors in use count as memory; who walks through a large
one releases what lies behind him, and needs only the memory of his step. Nothing is ever written into a mapping, so released pages come
back as they were. No code from a file is ever run (torch files go through torch's restricted unpickler). A file that cannot be read is a
UserError that names it. Which files make a model is left to model_folder.py.
"""

import ctypes
import json
import logging
import math
import mmap
import weakref
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from checkpoint.tensor_file import CHUNK_BYTES, DTYPE_NAMES, TensorSource, own_memory
from user_error import UserError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package itself
MAX_ELEMENTS = 2**60 - 1  # their bytes, 8 each at most, are counted in 64 bits
FETCH_AGAIN = "Fetch or write it again."
log = logging.getLogger("checkpoint")
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFile(Protocol):
    """An open file of named tensors."""

    @property
    def path(self) -> Path: ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str) -> Tensor:
        """The tensor, contiguous, mapped where that is possible: copy what you keep, do not write into it."""


class StoredWeight(NamedTuple):
    """Where a weight lies: an open file, and the weight's name in it."""

    file: WeightFile
    name: str

    @property
    def spec(self) -> TensorSpec:
        return self.file.specs[self.name]

    def source(self, name: str, dtype: torch.dtype | None = None) -> TensorSource:
        """The weight as something to be written under ``name`` as ``dtype`` (default: its own), at the memory of a few chunks if mapped."""
        spec, read = self.spec, partial(self.file.read, self.name)
        if isinstance(self.file, (SafetensorsFile, TorchFile)):
            return TensorSource(name=name, dtype=dtype or spec.dtype, shape=spec.shape, read=read, release=self.file.release)
        return TensorSource(name=name, dtype=dtype or spec.dtype, shape=spec.shape, read=read)


def open_weight_file(path: Path) -> WeightFile:
    """Open a ``.safetensors`` file, or else a torch file. Raises UserError if it is missing, truncated or unreadable."""
    if not path.is_file():
        raise UserError(f"a file of weights is missing: {path}. {FETCH_AGAIN}")
    try:
        with open(path, "rb") as file:
            if file.read(24).startswith(b"version https://git-lfs"):
                raise UserError(f"{path} is a git-lfs pointer and not the weights themselves. Run `git lfs pull` in its folder.")
        return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check its permissions and its disk.") from error


class SafetensorsFile:
    """A safetensors file; every read maps one tensor alone, so its memory is free again when the tensor is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data_start, header = _read_header(path)
        self._begin: dict[str, int] = {}
        end_of_data = 0
        entries = [(name, *_parse_entry(path, name, entry)) for name, entry in header.items() if name != "__metadata__"]
        for name, begin, end, _ in sorted(entries, key=lambda entry: entry[1:3]):
            if begin != end_of_data:
                where = f"the tensor {name} begins at byte {begin}, and the one before it ends at {end_of_data}"
                raise UserError(f"{path} is damaged: its tensors must lie one after the other, and {where}. {FETCH_AGAIN}")
            self._begin[name], end_of_data = begin, end
        self.specs = {name: spec for name, _, _, spec in entries}
        expected, seen = self._data_start + end_of_data, path.stat().st_size
        if seen != expected:
            state = "truncated" if seen < expected else "damaged"
            raise UserError(f"{path} is {state}: expected {expected} bytes, seen {seen}. {FETCH_AGAIN}")

    def read(self, name: str) -> Tensor:
        spec = self.specs[name]
        count = math.prod(spec.shape)
        if count == 0:
            return torch.empty(spec.shape, dtype=spec.dtype)
        start = self._data_start + self._begin[name]
        page = start - start % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            length = start - page + count * spec.dtype.itemsize
            view = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=page)  # COPY: torch warns of read-only memory
        return torch.frombuffer(view, dtype=spec.dtype, count=count, offset=start - page).reshape(spec.shape)

    def release(self, part: Tensor) -> None:
        """Give the memory under a part of what ``read`` returned back to the system; whoever looks at it again reads the file again."""
        _drop_pages(part.data_ptr(), part.nbytes)


class TorchFile:
    """A ``.bin`` that torch.save wrote: a dict of tensors, mapped where the file is a zip (torch >= 1.6), else held in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        try:
            is_mapped = is_zip and _is_little_endian(path)
            if not is_mapped:
                why = "is in the format of torch before 1.6" if not is_zip else "was written by a big-endian machine"
                cure = "save it anew (torch.load, torch.save) where there is memory for it"
                log.warning("%s %s and cannot be mapped: it takes %.1f GB of memory; or %s", path, why, path.stat().st_size / 1e9, cure)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
        except UserError:
            raise
        except Exception as error:  # the bytes of a foreign file decide what is raised: zip, pickle, key, attribute, end of file ...
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if "Weights only load failed" in str(error):  # torch's text advises to run the code
                reason = "it contains something other than tensors; its code was not run"
            what = f"{path} ({path.stat().st_size} bytes) cannot be read as a file of tensors"
            raise UserError(f"{what}, it is truncated or holds something else: {reason}. {FETCH_AGAIN}") from error
        if not isinstance(content, dict) or not all(is_text(k) and _is_plain(v) for k, v in content.items()):
            raise UserError(f"{path} must hold a dict of named tensors, as save_pretrained writes; it holds something else. {FETCH_AGAIN}")
        self._tensors = {name: tensor.detach() for name, tensor in content.items()}
        self.specs = {name: TensorSpec(dtype=tensor.dtype, shape=tensor.shape) for name, tensor in self._tensors.items()}
        self._mapping = _extent(tensor for tensor in self._tensors.values() if tensor.nbytes) if is_mapped else range(0)

    def read(self, name: str) -> Tensor:
        """As WeightFile.read. A view with gaps (old files keep many tensors in one storage) is put together in memory of its own.

        The pages of a mapped tensor go back to the system when nobody refers to its memory any more: torch maps the file as a whole, for
        as long as any of its tensors exists.
        """
        tensor = self._tensors[name]
        if not tensor.is_contiguous():
            result = own_memory(tensor.shape, tensor.dtype)
            in_order_of_the_file = sorted(range(tensor.ndim), key=lambda d: -tensor.stride(d))
            self._copy_by_blocks(result.permute(in_order_of_the_file), tensor.permute(in_order_of_the_file))
            return result
        if tensor.data_ptr() not in self._mapping or tensor.nbytes == 0:
            return tensor
        memory = tensor.reshape(-1).view(torch.uint8).numpy()
        weakref.finalize(memory, _drop_pages, tensor.data_ptr(), tensor.nbytes).atexit = False
        return torch.from_numpy(memory).view(tensor.dtype).reshape(tensor.shape)

    def release(self, part: Tensor) -> None:
        """As SafetensorsFile.release; does nothing to memory that is not mapped."""
        if part.data_ptr() in self._mapping:
            _drop_pages(part.data_ptr(), part.nbytes)

    def _copy_by_blocks(self, target: Tensor, source: Tensor) -> None:
        """Copy the mapped ``source``, whose strides descend, such that no more than CHUNK_BYTES of the file are in memory at a time."""
        span = _span(source)
        if span <= CHUNK_BYTES or source.ndim == 0:
            target.copy_(source)
            if source.data_ptr() in self._mapping:
                _drop_pages(source.data_ptr(), span)
            return
        rows = CHUNK_BYTES // (source.stride(0) * source.itemsize) if source.stride(0) else 0
        if 1 < rows < len(source):
            parts = zip(target.split(rows), source.split(rows), strict=True)
        else:
            parts = zip(target.unbind(), source.unbind(), strict=True)
        for target_part, source_part in parts:
            self._copy_by_blocks(target_part, source_part)


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _is_little_endian(path: Path) -> bool:
    """torch turns the bytes of the other kind around in memory, in pages that must then not be given back.

    Raises UserError unless the parts lie uncompressed in the file, as torch writes them: torch would unpack whatever size they claim.
    """
    with zipfile.ZipFile(path) as archive:
        parts, size = archive.infolist(), path.stat().st_size
        if any(part.compress_type != zipfile.ZIP_STORED or not part.file_size == part.compress_size <= size for part in parts):
            raise UserError(f"{path} is not as torch writes it: its parts are compressed, or larger than the file. {FETCH_AGAIN}")
        orders = [part for part in parts if part.filename.rpartition("/")[2] == "byteorder"]
        return all(part.file_size == len(b"little") and archive.read(part) == b"little" for part in orders)


def _extent(tensors: Iterable[Tensor]) -> range:
    """The addresses from the first to the last byte: of tensors of one file, the part of its mapping that holds them."""
    spans = [(tensor.data_ptr(), tensor.data_ptr() + _span(tensor)) for tensor in tensors]
    return range(min(begin for begin, _ in spans), max(end for _, end in spans)) if spans else range(0)


def _span(tensor: Tensor) -> int:
    """Bytes from the tensor's first to its last."""
    return (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file starts, and its header."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or (length <= MAX_HEADER_BYTES and 8 + length > size):
            raise UserError(f"{path} is truncated: expected at least {8 + length} bytes, seen {size}. {FETCH_AGAIN}")
        text = file.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except KeyError as error:
        raise UserError(f"{path} is damaged: its header names {error.args[0]!r} twice. {FETCH_AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} ({size} bytes) is not a safetensors file: its header cannot be read. {FETCH_AGAIN}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file: its header is no table of tensors. {FETCH_AGAIN}")
    return 8 + length, header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads, which keeps the last of two. Raises KeyError with the name that is there twice."""
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise KeyError(name)
        table[name] = value
    return table


def is_text(name: object) -> TypeGuard[str]:
    """True for a string that can be printed and written: JSON and pickles can also hold halves of UTF-16 pairs, and zeros."""
    if not isinstance(name, str) or "\0" in name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[int, int, TensorSpec]:
    """(begin, end, spec) of one tensor in a header that a stranger may have written."""
    damaged = (
        f"{path} is damaged: its header does not describe the tensor {ascii(name)[1:-1]} as dtype, shape and bytes that fit. {FETCH_AGAIN}"
    )
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not is_text(name) or not isinstance(dtype_name, str):
            raise UserError(damaged)
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise UserError(damaged)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(damaged) from error
    if dtype_name not in DTYPES:
        raise UserError(f"{path}: the tensor {name} has the dtype {dtype_name}; weights must be one of {', '.join(DTYPES)}")
    if math.prod(max(1, number) for number in shape) > MAX_ELEMENTS:  # an empty tensor can have any size beside its 0
        raise UserError(damaged)
    spec = TensorSpec(dtype=DTYPES[dtype_name], shape=torch.Size(shape))
    if end - begin != spec.num_bytes:
        raise UserError(damaged)
    return begin, end, spec


def _drop_pages(address: int, num_bytes: int) -> None:
    """Give the whole pages in this part of a mapped, unmodified file back to the system."""
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is None:
        return  # not on this system: costs memory, nothing else
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))
