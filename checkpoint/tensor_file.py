"""Writing files that can be trusted later: each is streamed, hashed on the way, flushed to the disk, and never overwritten.

Why an own safetensors writer: the one of the safetensors package wants every tensor of a file in memory at once. This one asks for one
tensor after the other, so writing a file costs the memory of its largest tensor, and the sha256 for the manifest costs no second read.

Promises: a function that returns a FileRecord has put these bytes on the disk (fsync) under a name that did not exist before. A name
becomes durable only with ``fsync_directory``; which folder is complete is for the manifest to say.
Legend: data starts 64-byte aligned in the file; the layout is that of https://github.com/huggingface/safetensors (format section).
"""

import ctypes
import errno
import hashlib
import json
import math
import mmap
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from user_error import UserError

# Safetensors' own names, both ways. What is not here (fp8, packed 4-bit) is no weight of a model that this trainer trains.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK_BYTES = 16 << 20
ALIGNMENT_BYTES = 64
MAX_UNHASHED_CHUNKS = 2  # written and not yet hashed: what the memory of a file costs beside its tensor
_WORTH_A_THREAD_BYTES = 256 << 10  # 0.15 ms of sha256
_CHECKED_AT_ONCE = 1 << 18  # values
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_MADV_POPULATE_READ = 22  # asm-generic/mman-common.h; since Linux 5.14, an error without effect elsewhere
_LIBC = ctypes.CDLL(None)
# What a disk or its owner can do to a write, and the person at the keyboard can cure.
DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.ENOTEMPTY, errno.EBUSY, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.EXDEV, errno.ENAMETOOLONG),
}


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file as the manifest knows it. ``name`` is relative to the folder that the manifest describes, with forward slashes."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A tensor that is put together from ``parts``, all of its shape, when its turn comes to be written: ``compose(*parts)``."""

    parts: tuple[Tensor, ...]
    compose: Callable[..., Tensor]
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.parts[0].shape


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """A tensor to be written: its place in the header, and how to get its values when their turn comes.

    ``dtype``: as which it is written; ``read`` may return another one, which is converted chunk by chunk. ``release`` hears of parts of
    what ``read`` returned when they are not needed any more: for memory that is a mapped file's (weight_file.py).
    """

    name: str
    dtype: torch.dtype
    shape: torch.Size
    read: Callable[[], Tensor]
    release: Callable[[Tensor], object] = lambda part: None

    @classmethod
    def of(cls, name: str, tensor: Tensor | Composed, dtype: torch.dtype | None = None) -> "TensorSource":
        """A tensor that is in memory already, to be written as ``dtype`` (default: its own)."""

        def read() -> Tensor:
            return tensor.compose(*tensor.parts) if isinstance(tensor, Composed) else tensor

        return cls(name=name, dtype=dtype or tensor.dtype, shape=tensor.shape, read=read)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensor_file(
    path: Path, sources: Sequence[TensorSource], *, relative_to: Path, progress: Callable[[int], object] = lambda num_bytes: None
) -> FileRecord:
    """Stream ``sources`` into the new safetensors file ``path``; at most one of them is in memory at a time.

    Wider dtypes come first, so that every tensor is aligned to its own dtype. ``progress`` hears of every chunk's bytes.
    Raises FileExistsError if ``path`` exists (a model that is loaded somewhere may map it), UserError if a finite value is infinite in
    the dtype that it is to be written as.
    """
    assert sys.byteorder == "little", "safetensors files are little-endian and tensors are written as they lie in memory"
    ordered = sorted(sources, key=lambda source: -source.dtype.itemsize)
    assert len({source.name for source in ordered}) == len(ordered), f"a name comes twice in {path.name}"
    with _HashingWriter(path) as writer:
        writer.write(_header(ordered))
        for source in ordered:
            _write_tensor(writer, source, progress)
        return writer.finish(relative_to)


def write_json_file(path: Path, content: Any, *, relative_to: Path) -> FileRecord:
    """Write the new file ``path`` as JSON."""
    return write_file(path, json_bytes(content), relative_to=relative_to)


def json_bytes(content: Any) -> bytes:
    """A JSON file's content. Floats keep all their digits; NaN and infinity are refused, as JSON has none."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_file(path: Path, content: bytes, *, relative_to: Path) -> FileRecord:
    """Write the new file ``path``."""
    with _HashingWriter(path) as writer:
        writer.write(content)
        return writer.finish(relative_to)


def copy_file(source: Path, path: Path, *, relative_to: Path) -> FileRecord:
    """Copy the bytes of ``source`` into the new file ``path``."""
    with open(source, "rb") as reader, _HashingWriter(path) as writer:
        while chunk := reader.read(CHUNK_BYTES):
            writer.write(chunk)
        return writer.finish(relative_to)


def fsync_directory(path: Path) -> None:
    """Make the names in the folder ``path`` (new files, renames) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses while ``path`` is written (full, read-only, not ours) into a UserError; leave every other error alone."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f" (at {error.filename})" if error.filename else ""
        raise UserError(f"cannot write {path}: {error.strerror}{where}. Free some space or give a folder that you may write to.") from error


def _header(sources: Sequence[TensorSource]) -> bytes:
    """Eight bytes of length, then JSON, padded with spaces such that the data after it starts aligned."""
    entries: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for source in sources:
        begin, end = end, end + source.num_bytes
        entries[source.name] = {"dtype": DTYPE_NAMES[source.dtype], "shape": list(source.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(writer: "_HashingWriter", source: TensorSource, progress: Callable[[int], object]) -> None:
    """A function of its own, so that no local name keeps this tensor in memory while the next one is read."""
    tensor = source.read().detach()
    assert tensor.shape == source.shape, f"{source.name} was announced as {tuple(source.shape)} and is {tuple(tensor.shape)}"
    release = source.release if tensor.is_contiguous() else lambda part: None  # else the parts are those of a copy
    parts = tensor.contiguous().reshape(-1).split(CHUNK_BYTES // max(tensor.dtype.itemsize, source.dtype.itemsize))
    is_converted = tensor.dtype != source.dtype
    # As many as the writer may be using at a time, and one more.
    buffers = [own_memory(parts[0].shape, source.dtype) for _ in parts[: MAX_UNHASHED_CHUNKS + 1] if is_converted]
    for k, part in enumerate(parts):
        _map_pages(part)
        if is_converted:
            data = converted(part, source, buffers[k % len(buffers)][: len(part)])
            release(part)
            writer.write(_bytes_of(data))
        else:
            writer.write(_bytes_of(part), done=partial(release, part))
        progress(part.numel() * source.dtype.itemsize)
    writer.wait_for_hash()


def own_memory(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros in memory that goes back to the system with the tensor. malloc would keep blocks of these sizes, for others that never fit."""
    count = shape.numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype, count=count).reshape(shape)


def converted(part: Tensor, source: TensorSource, out: Tensor | None = None) -> Tensor:
    """``part`` of what ``source`` reads, rounded to its dtype, in ``out`` if given. Raises UserError if a finite value becomes infinite."""
    result = part.to(source.dtype) if out is None else out.copy_(part)
    if not source.dtype.is_floating_point:
        return result
    for values, rounded in zip(part.split(_CHECKED_AT_ONCE), result.split(_CHECKED_AT_ONCE), strict=True):
        infinite = rounded.isinf()
        if bool(infinite.any()) and len(too_large := values[infinite & values.isfinite()]):
            short = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[source.dtype]
            seen = f"it holds {too_large[0].item():g}, and {short} ends at {torch.finfo(source.dtype).max:g}"
            cure = "use bf16, which holds numbers as large as fp32 does" if short == "fp16" else "keep its dtype"
            raise UserError(f"{source.name} does not fit {short}: {seen}; {cure}")
    return result


def _bytes_of(part: Tensor) -> memoryview:
    """The memory of a contiguous vector; of a copy of it where that is not the CPU's."""
    data: memoryview = part.cpu().view(torch.uint8).numpy().data
    return data


def _map_pages(part: Tensor) -> None:
    """Have the system map the pages under ``part`` in one go: two threads that come upon each of them take twice as long to write."""
    if sys.platform == "linux" and part.device.type == "cpu" and part.nbytes >= _WORTH_A_THREAD_BYTES:
        start = part.data_ptr() - part.data_ptr() % mmap.PAGESIZE
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(part.data_ptr() + part.nbytes - start), _MADV_POPULATE_READ)


class _HashingWriter:
    """A new file that knows its size and sha256 when it is finished, and that travels to the disk while it is being written."""

    def __init__(self, path: Path) -> None:
        self._path, self._sha256, self._size = path, _BackgroundSha256(), 0
        self._not_done: deque[Callable[[], object]] = deque()  # of the chunks that are written and may not be hashed yet

    def __enter__(self) -> "_HashingWriter":
        self._file: IO[bytes] = open(self._path, "xb")  # "x": a mapped file is never changed under its readers
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._sha256.stop()
        self._file.close()

    def write(self, data: bytes | memoryview, done: Callable[[], object] = lambda: None) -> None:
        """``data`` is used until ``done`` is called, from this thread, in this or a later call."""
        self._sha256.update(data)
        self._not_done.append(done)
        self._file.write(data)
        if len(data) >= _WORTH_A_THREAD_BYTES:
            _begin_writeback(self._file.fileno(), self._size, len(data))
        self._size += len(data)
        self._settle(MAX_UNHASHED_CHUNKS)

    def wait_for_hash(self) -> None:
        """Afterwards nothing that was written is used any more."""
        self._settle(0)

    def finish(self, relative_to: Path) -> FileRecord:
        self._file.flush()
        os.fsync(self._file.fileno())
        self.wait_for_hash()
        return FileRecord(name=self._path.relative_to(relative_to).as_posix(), size=self._size, sha256=self._sha256.hexdigest())

    def _settle(self, num_left: int) -> None:
        while len(self._not_done) > num_left:
            self._sha256.wait_for_one()
            self._not_done.popleft()()


class _BackgroundSha256:
    """sha256 on a thread of its own, which begins with the first chunk that is worth it: hashlib lets go of the interpreter meanwhile."""

    def __init__(self) -> None:
        self._sha256, self._thread = hashlib.sha256(), threading.Thread(target=self._run, name="sha256", daemon=True)
        self._waiting: queue.SimpleQueue[bytes | memoryview | None] = queue.SimpleQueue()
        self._num_hashed = threading.Semaphore(0)

    def update(self, data: bytes | memoryview) -> None:
        """Take ``data`` in after all before it; it must not change before ``wait_for_one`` has been called as often as this."""
        if self._thread.ident is None:
            if len(data) < _WORTH_A_THREAD_BYTES:
                self._sha256.update(data)
                self._num_hashed.release()
                return
            self._thread.start()
        self._waiting.put(data)

    def wait_for_one(self) -> None:
        self._num_hashed.acquire()

    def hexdigest(self) -> str:
        """Call it after the last wait."""
        return self._sha256.hexdigest()

    def stop(self) -> None:
        if self._thread.ident is not None:
            self._waiting.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (data := self._waiting.get()) is not None:
            self._sha256.update(data)
            data = None  # the waiter counts on nobody holding it
            self._num_hashed.release()


def _begin_writeback(descriptor: int, start: int, length: int) -> None:
    """Let the disk begin with what was just written, or fsync finds all of it left over. Where that cannot be said, fsync does."""
    if hasattr(_LIBC, "sync_file_range"):  # Linux
        _LIBC.sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(length), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
