"""May a command write its folder here? Asked before the work: a finished folder replaces what is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lorasmith.errors import BusyError, UsageError, os_errors


def require_own_place(output: Path, record: str, inputs: Sequence[Path]) -> None:
    """Raise `UsageError` unless `output` is new, empty, or a folder with the record that the command leaves.

    Nor may it be an input, lie in one or hold one.
    """
    require_outside(output, inputs)
    if holds_another(output, record):
        raise UsageError(
            "the output folder holds something that this command did not write",
            where=output,
            expected=f"a new place, or a folder with {record}, which is replaced",
            remedy="choose another folder, or remove this one",
        )


def require_outside(output: Path, inputs: Sequence[Path]) -> None:
    """Raise `UsageError` where the output is, lies in or holds an input: these are never written to."""
    place = output.resolve()
    for folder in inputs:
        given = folder.resolve()
        if place == given or given in place.parents or place in given.parents:
            raise UsageError(
                f"the output is, lies in or holds the input {folder}",
                where=output,
                remedy="choose another output folder",
            )


def holds_another(output: Path, mark: str) -> bool:
    """Whether there is a folder with content but without the file `mark`; `UsageError` for a file."""
    with os_errors(output, "look into"):
        if output.exists() and not output.is_dir():
            raise UsageError("the output is a file", where=output, expected="a folder, or nothing yet")
        return output.is_dir() and any(output.iterdir()) and not (output / mark).is_file()


# One process at a time for each output.


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
