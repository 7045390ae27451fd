"""`SHA256SUMS`: what `sha256sum -c` reads, written and read in one strict form; and what lies in a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from lorasmith.errors import DamageError, os_errors
from lorasmith.files.atomic import write_bytes

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n\\]+)")


def write_sums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write name → SHA-256 of all files of a folder, sorted by name."""
    lines = [f"{sha}  {name}\n" for name, sha in sorted(digests.items())]
    write_bytes(folder / SUMS, "".join(lines).encode())


def read_sums(folder: Path) -> dict[str, str]:
    """Name → SHA-256; raises `DamageError` for anything but the form that `write_sums` gives."""
    path = folder / SUMS
    with os_errors(path, "read"):
        content = path.read_bytes()
    found: dict[str, str] = {}
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        raise _damaged(path, "it is not UTF-8") from error
    if lines[-1] != "":
        raise _damaged(path, "its last line does not end")
    for number, line in enumerate(lines[:-1], 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise _damaged(path, f"line {number} is no checksum")
        found[match[2]] = match[1]
    if list(found) != sorted(found) or len(found) != len(lines) - 1:
        raise _damaged(path, "its names are not in order")
    return found


def walk(folder: Path, below: str = "") -> dict[str, os.stat_result]:
    """All that lies below a folder but folders: path → status, links not followed."""
    found = {}
    for place, folders, files in os.walk(folder / below):
        for name in [*files, *(name for name in folders if (Path(place) / name).is_symlink())]:
            path = Path(place) / name
            found[path.relative_to(folder).as_posix()] = path.lstat()
    return found


def _damaged(path: Path, why: str) -> DamageError:
    return DamageError(
        f"the list of checksums is damaged: {why}",
        where=path,
        expected="`sha256  name` lines, sorted by name",
        remedy="fetch it again",
    )
