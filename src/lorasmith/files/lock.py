"""One process at a time for each output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lorasmith.errors import BusyError, os_errors


@contextmanager
def locked(path: Path, doing: str, *, found: str, where: Path, remedy: str) -> Iterator[None]:
    """Hold the lock file at `path`, or `BusyError`; the kernel frees it with the process.

    The file stays. `doing` is what cannot be done where the file cannot be opened or locked.
    """
    # A lock that only exists as a file would outlive a killed process: rather an error without the kernel's.
    lock = FileLock(path, fallback_to_soft=False)
    with os_errors(where, doing):
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise BusyError(found, where=where, remedy=remedy) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def only_one(output: Path, work: str) -> Iterator[None]:
    """Hold the lock `.NAME.lock` beside an output, or `BusyError`; it is removed at the end.

    `work` is what is done to it, such as `merge`.
    """
    path = output.with_name(f".{output.name}.lock")
    with os_errors(output, "write"):
        output.parent.mkdir(parents=True, exist_ok=True)
    held = locked(
        path,
        "write",
        found=f"another {work} writes to this output now",
        where=output,
        remedy="wait until it is done, or choose another output",
    )
    with held:
        try:
            yield
        finally:
            # While it is held: whoever has opened it already is refused, for it has no name any more.
            with suppress(OSError):
                path.unlink()
