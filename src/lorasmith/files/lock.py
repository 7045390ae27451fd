"""One process at a time for each output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorasmith.errors import BusyError, os_errors
from lorasmith.files.sealed import lock_file


@contextmanager
def only_one(output: Path, work: str) -> Iterator[None]:
    """Hold the lock `.NAME.lock` beside an output, or `BusyError`; the kernel frees it with the process.

    `work` is what is done to it, such as `merge`.
    """
    lock = output.with_name(f".{output.name}.lock")
    with os_errors(output, "write"):
        output.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        lock_file(
            handle,
            found=f"another {work} writes to this output now",
            where=output,
            remedy="wait until it is done, or choose another output",
        )
        # The holder before us may have removed the name between our open and our lock.
        if not lock.exists() or lock.stat().st_ino != os.fstat(handle).st_ino:
            raise BusyError(f"another {work} has just used this output", where=output, remedy="try again")
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
    finally:
        os.close(handle)
