"""How glibc's malloc treats the large blocks that a training step frees and asks for again.

By default it returns the free end of its heap to the system as soon as that exceeds some tens of MB, and gets it back page by page: up to
80 000 page faults per step of a small model on a CPU, 2 - 7 % of its time. Without glibc nothing happens.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER = -1
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc takes no more; larger blocks still come from the system one by one


def keep_freed_memory() -> None:
    """Called once per process, before the first step. The process then holds on to its peak."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
