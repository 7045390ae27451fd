"""May a command write its folder or file here? Asked before the work, which replaces what is there.

Only what lorasmith itself has left at a place is replaced: never another folder, a file of somebody else, a
link, or a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lorasmith.errors import BusyError, UsageError, os_errors
from lorasmith.files.inputs import special_kind


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


def holds_another(output: Path, *marks: str) -> bool:
    """Whether there is a folder with content and none of the `marks` that lorasmith leaves in its own.

    Raises `UsageError` for a file, a link and anything else that is no folder.
    """
    with os_errors(output, "look into"):
        if output.is_symlink():
            # The finished folder would take the link's own place, not that of what it leads to.
            raise UsageError("the output is a link", where=output, remedy="give the place that it leads to")
        if output.exists() and not output.is_dir():
            kind = special_kind(output.stat().st_mode) or "a file"
            raise UsageError(f"the output is {kind}", where=output, expected="a folder, or nothing yet")
        return (
            output.is_dir() and any(output.iterdir()) and not any((output / mark).exists() for mark in marks)
        )


def require_own_file(output: Path, kind: str, is_own: Callable[[Path], bool]) -> None:
    """Raise `UsageError` where something is at `output` that is no file of lorasmith's of this kind."""
    with os_errors(output, "write"):
        if not output.exists():
            return
        special = "a folder" if output.is_dir() else special_kind(output.stat().st_mode)
        if special is not None:
            raise UsageError(f"the output is {special}", where=output, expected="a file, or nothing yet")
        if output.stat().st_size and not is_own(output):
            raise UsageError(
                f"the output exists and is no {kind} that lorasmith has written",
                where=output,
                expected="a new file, or one that may be replaced",
                remedy="choose another file, or remove this one",
            )


def require_own_record(output: Path) -> None:
    """Raise `UsageError` where something is at `output` that is no record of lorasmith's."""
    require_own_file(output, "record", lambda path: starts_with(path, _RECORD))


_RECORD = b'{\n  "format": "lorasmith/'


def starts_with(path: Path, content: bytes) -> bool:
    """Whether a file begins with these bytes."""
    with path.open("rb") as handle:
        return handle.read(len(content)) == content


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
