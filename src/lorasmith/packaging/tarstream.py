"""The same tar stream on every machine: sorted names, no owner, no date, fixed modes, plain files only."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lorasmith.errors import InputError, os_errors
from lorasmith.records.base import FileDigest

Write = Callable[[bytes], object]

BLOCK = 1 << 20
_FILE_MODE = 0o644
_END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Member:
    """One file of an archive: its name within, and where its bytes are."""

    name: str
    """Relative, with forward slashes, the archive's top folder first."""
    content: Path | bytes

    def size(self) -> int:
        """In bytes."""
        if isinstance(self.content, bytes):
            return len(self.content)
        with os_errors(self.content, "read"):
            return self.content.stat().st_size


def write_tar(members: Iterable[Member], write: Write, advance: Callable[[int], None]) -> list[FileDigest]:
    """Write the members in order of their names; returns size and SHA-256 of what was read for each.

    A name that fits the ustar header gets one, a longer one or one outside ASCII gets a pax header before it
    (POSIX.1-2008, "pax Interchange Format"). Raises `InputError` for a file that changes while it is read.
    """
    digests = []
    for member in sorted(members, key=lambda member: member.name.encode()):
        digests.append(_write_member(member, write, advance))
    write(_END)
    return digests


def _write_member(member: Member, write: Write, advance: Callable[[int], None]) -> FileDigest:
    size = member.size()
    write(_header(member.name, size))
    digest = hashlib.sha256()
    for block in _blocks(member, size):
        digest.update(block)
        write(block)
        advance(len(block))
    write(bytes(-size % tarfile.BLOCKSIZE))
    return FileDigest(path=member.name, bytes=size, sha256=digest.hexdigest())


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, _FILE_MODE, 0
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def _blocks(member: Member, size: int) -> Iterator[bytes]:
    if isinstance(member.content, bytes):
        yield member.content
        return
    path = member.content
    left = size
    with os_errors(path, "read"), path.open("rb") as handle:
        while left:
            block = handle.read(min(BLOCK, left))
            if not block:
                raise _changed(path)
            left -= len(block)
            yield block
        if handle.read(1):
            raise _changed(path)


def _changed(path: Path) -> InputError:
    return InputError(
        "the file changed while it was packed",
        where=path,
        remedy="wait until nothing writes to it, then pack again",
    )
