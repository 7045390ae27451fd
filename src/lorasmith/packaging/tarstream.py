"""The same tar stream on every machine: sorted names, no owner, no date, fixed modes, plain files only.

Because there is one possible stream for given members, reading is writing backwards: each header has to be
the header that would be written. A link, a device, a doubled, foreign or climbing name has no way in.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lorasmith.errors import DamageError, InputError, os_errors
from lorasmith.records.base import FileDigest

Write = Callable[[bytes], object]
Read = Callable[[int], bytes]
Advance = Callable[[int], None]

BLOCK = 1 << 20
_FILE_MODE = 0o644
_END = bytes(2 * tarfile.BLOCKSIZE)
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


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


def write_tar(members: Iterable[Member], write: Write, advance: Advance) -> list[FileDigest]:
    """Write the members in order of their names; returns size and SHA-256 of what was read for each.

    A name that fits the ustar header gets one, a longer one or one outside ASCII gets a pax header before it
    (POSIX.1-2008, "pax Interchange Format"). Raises `InputError` for a file that changes while it is read.
    """
    digests = []
    for member in sorted(members, key=lambda member: member.name.encode()):
        digests.append(_write_member(member, write, advance))
    write(_END)
    return digests


def _write_member(member: Member, write: Write, advance: Advance) -> FileDigest:
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


def check_names(members: Sequence[FileDigest], top: str) -> None:
    """Raise `DamageError` unless every name is plain, below `top`, and unlike the others in any case."""
    seen: set[str] = set()
    for member in members:
        parts = PurePosixPath(member.path).parts
        plain = member.path == "/".join(parts) and not any(
            part in ("..", ".") or "\\" in part or "\0" in part or ":" in part for part in parts
        )
        if not plain or len(parts) < 2 or parts[0] != top:
            raise DamageError(
                f"the manifest lists a name that leaves the folder: {member.path!r}",
                expected=f"a plain name below {top}/",
            )
        if member.path.casefold() in seen:
            raise DamageError(f"the manifest lists {member.path!r} twice", expected="each name once")
        seen.add(member.path.casefold())


def read_tar(
    read: Read,
    members: Sequence[FileDigest],
    open_member: Callable[[FileDigest], Write],
    advance: Advance,
) -> str:
    """Read exactly these members; returns the SHA-256 of the stream.

    `open_member` gives the writer for a member's bytes. Never holds more than `BLOCK` bytes, and never reads
    further than the members' sizes allow. Raises `DamageError` for the first thing that is not as expected.
    """
    stream = hashlib.sha256()
    for member in sorted(members, key=lambda member: member.path.encode()):
        header = _header(member.path, member.bytes)
        found = _exactly(read, len(header), member.path)
        if found != header:
            raise _foreign(found, member)
        stream.update(found)
        digest = hashlib.sha256()
        write = open_member(member)
        left = member.bytes
        while left:
            block = _exactly(read, min(BLOCK, left), member.path)
            digest.update(block)
            stream.update(block)
            write(block)
            advance(len(block))
            left -= len(block)
        if digest.hexdigest() != member.sha256:
            raise DamageError(
                f"{member.path} is damaged",
                expected=f"SHA-256 {member.sha256}, found {digest.hexdigest()}",
                remedy="fetch the package again",
            )
        padding = bytes(-member.bytes % tarfile.BLOCKSIZE)
        if padding and _exactly(read, len(padding), member.path) != padding:
            raise DamageError(f"there are stray bytes after {member.path}", expected="zeros")
        stream.update(padding)
    if _exactly(read, len(_END), "the end") != _END or read(1):
        raise DamageError(
            "the archive holds more than the manifest lists", expected="its end", remedy="do not use it"
        )
    stream.update(_END)
    return stream.hexdigest()


def _exactly(read: Read, size: int, where: str) -> bytes:
    data = read(size)
    if len(data) != size:
        raise DamageError(
            f"the archive ends early, within {where}",
            expected=f"{size - len(data)} more bytes",
            remedy="fetch the package again",
        )
    return data


def _foreign(header: bytes, member: FileDigest) -> DamageError:
    """Say what stands where a member was expected."""
    try:
        info = tarfile.TarInfo.frombuf(header[:512], "utf-8", "replace")
    except tarfile.HeaderError:
        found = "something that is no tar header"
    else:
        kind = _KINDS.get(info.type, "an entry")
        found = f"{kind} called {info.name!r} of {info.size} bytes, mode {info.mode:o}, date {info.mtime}"
    return DamageError(
        f"the archive holds {found}",
        expected=f"the file {member.path!r} of {member.bytes} bytes, without owner or date",
        remedy="do not use it; fetch the package again",
    )
