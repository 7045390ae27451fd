"""Memory: telling its lack from a bug, and giving back what a failed attempt holds."""

from __future__ import annotations

import gc

import torch

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
