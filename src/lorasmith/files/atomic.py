"""Write aside, then rename: a file or folder is there as a whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import BinaryIO, TypeVar

from lorasmith.errors import UsageError, os_errors
from lorasmith.files.inputs import read_input, special_kind
from lorasmith.records.base import Record

R = TypeVar("R", bound=Record)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sync_folder(folder: Path) -> None:
    """Make a rename within `folder` durable; not all file systems let a folder be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def aside(path: Path) -> Path:
    """The hidden sibling that a file or folder is written to before it is renamed."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when the block ends without an error, synced to disk."""
    with os_errors(path, "write"):
        _require_no_device(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            # What a killed process of this number left; never through a link or a pipe of this name.
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def _require_no_device(path: Path) -> None:
    """Raise `UsageError` for a device, a pipe or a socket: the rename would take it away from the system."""
    kind = special_kind(path.stat().st_mode) if path.exists() else None
    if kind is not None:
        raise UsageError(f"the output is {kind}", where=path, expected="a file, or nothing yet")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole small file atomically."""
    with atomic_file(path) as handle:
        handle.write(content)


def write_record(path: Path, record: Record) -> None:
    """Write a record as canonical JSON."""
    write_bytes(path, record.to_json())


def read_record(path: Path, kind: type[R]) -> R:
    """Read and check a record; raises `InputError` naming the file and what is wrong with it."""
    with os_errors(path, "read"):
        content = read_input(path)
    return kind.from_json(content, path)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system or its file system cannot (only Linux can)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def publish_folder(temporary: Path, final: Path) -> None:
    """Rename a finished folder into place, replacing an older one; every file is synced first."""
    with os_errors(final, "write"):
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.is_dir() and _swap(temporary, final):
            temporary.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        elif final.is_dir():
            final.rename(old)
            temporary.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(final)
        sync_folder(final.parent)


# Paths as people give them to the public functions: text or `Path`.


StrPath = str | PathLike[str]
