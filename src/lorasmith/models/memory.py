"""Memory: telling its lack from a bug, and keeping what batches give back for the next of them."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lorasmith.files.machine import return_memory

_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1
"""Parameters of `mallopt` in the GNU C library (its malloc.h)."""
_LARGEST = 2**31 - 1
_USUAL_MAPS = 65_536
_USUAL_THRESHOLD = 32 << 20
"""What the library's own adapting threshold grows to; its trim threshold is then twice that."""

_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "could not create a memory object",
    "cannot allocate memory",
    "bad_alloc",
)
"""What torch's allocators, oneDNN, the system and C++ say."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` or what caused it says that memory ran out, on the host or a device."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(cause, (RuntimeError, OSError)) and any(sign in str(cause).lower() for sign in _SIGNS):
            return True
        cause = cause.__cause__
    return False


def release_memory() -> None:
    """Give back what a failed attempt still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def keep_memory() -> Iterator[None]:
    """Inside the block, freed memory stays with the process and serves the next batch.

    The GNU C library otherwise maps every large tensor anew and gives it back afterwards, and the system
    clears each page of it again: 8 % of the time of scoring on a processor. What is kept is at most the peak
    that was needed anyway; it goes back to the system at the end. Other C libraries are left as they are.
    """
    library = _allocator()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, _LARGEST)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _USUAL_MAPS)
        library.mallopt(_MMAP_THRESHOLD, _USUAL_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD, 2 * _USUAL_THRESHOLD)
        return_memory()


def _allocator() -> ctypes.CDLL | None:
    """The C library, where it is the GNU one."""
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt and library.gnu_get_libc_version else None
    except (OSError, AttributeError, TypeError):
        return None
