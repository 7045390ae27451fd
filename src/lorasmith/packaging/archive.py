"""The same tar stream on every machine: sorted names, no owner, no date, fixed modes, plain files only.

Because there is one possible stream for given members, reading is writing backwards: each header has to be
the header that would be written. A link, a device, a doubled, foreign or climbing name has no way in.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import IO, Self

from lorasmith.errors import DamageError, InputError, UsageError, os_errors
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
        """Size in bytes."""
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
        actual = _exactly(read, len(header), member.path)
        if actual != header:
            raise _foreign(actual, member)
        stream.update(actual)
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
        entry = "something that is no tar header"
    else:
        kind = _KINDS.get(info.type, "an entry")
        entry = f"{kind} called {info.name!r} of {info.size} bytes, mode {info.mode:o}, date {info.mtime}"
    return DamageError(
        f"the archive holds {entry}",
        expected=f"the file {member.path!r} of {member.bytes} bytes, without owner or date",
        remedy="do not use it; fetch the package again",
    )


# A SHA-256 that is taken in a thread of its own, while the caller compresses and writes.


_WAITING = 8
"""Pieces that may wait: the memory that they take, against a thread that idles."""


class BackgroundHash:
    """Give it the pieces of a stream in order; after the block it knows their SHA-256.

    hashlib lets go of the interpreter's lock, so that hashing and compressing share the cores: with fast
    compressors it is the hashes that packing waits for (benches/package.py).
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pieces: Queue[bytes | None] = Queue(_WAITING)
        self._thread = Thread(target=self._work, name="lorasmith-hash", daemon=True)

    def update(self, piece: bytes) -> None:
        """Take the next piece; waits where too many wait already. The piece must not change any more."""
        self._pieces.put(piece)

    def hexdigest(self) -> str:
        """SHA-256 of all pieces; known only after the block."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pieces.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._digest.update(piece)


# Archives in one piece or in several: written and read as one stream, hashed as a whole and by piece.


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SMALLEST = 1000
"""Bytes of a part: below this a large model would become millions of files."""


def parse_size(text: str) -> int:
    """`500M`, `2GB`, `1GiB` or a plain number of bytes; raises `UsageError` for anything else."""
    match = re.fullmatch(r"(\d+)\s*([KMG]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) * _UNITS[match[2]] < _SMALLEST:
        raise UsageError(
            f"{text!r} is no size of a part",
            expected=f"such as 500M, 2GB or 1GiB, at least {_SMALLEST} bytes",
        )
    return int(match[1]) * _UNITS[match[2]]


def part_name(archive: str, number: int) -> str:
    """`merged_model.tar.gz.part-0000`: `cat` in order of names joins them."""
    return f"{archive}.part-{number:04d}"


class ArchiveWriter:
    """A file, or parts of `part_size` bytes, that hashes all that is written."""

    def __init__(self, path: Path, part_size: int | None) -> None:
        self._path = path
        self._part_size = part_size
        self._part = hashlib.sha256()
        # One piece is the whole: its bytes are not hashed twice.
        self._whole = self._part if part_size is None else hashlib.sha256()
        self._handle: IO[bytes] | None = None
        self._in_part = 0
        self.bytes = 0
        self.parts: list[FileDigest] = []

    def write(self, data: bytes, /) -> int:
        """Take all bytes, opening new parts as they fill."""
        view = memoryview(data)
        if self._whole is not self._part:
            self._whole.update(view)
        self.bytes += len(view)
        done = 0
        while done < len(view):
            handle = self._handle or self._open()
            room = len(view) if self._part_size is None else self._part_size - self._in_part
            piece = view[done : done + room]
            handle.write(piece)
            self._part.update(piece)
            self._in_part += len(piece)
            done += len(piece)
            if self._in_part == self._part_size:
                self._close_part()
        return len(view)

    def flush(self) -> None:
        """Hand on what is buffered."""
        if self._handle is not None:
            self._handle.flush()

    def digest(self) -> FileDigest:
        """Size and SHA-256 of the archive as one file."""
        return FileDigest(path=self._path.name, bytes=self.bytes, sha256=self._whole.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._close_part()

    def _current(self) -> Path:
        if self._part_size is None:
            return self._path
        return self._path.with_name(part_name(self._path.name, len(self.parts)))

    def _open(self) -> IO[bytes]:
        with os_errors(self._current(), "write"):
            self._handle = self._current().open("wb")
        return self._handle

    def _close_part(self) -> None:
        assert self._handle is not None
        self._handle.close()
        self._handle = None
        self.parts.append(
            FileDigest(path=self._current().name, bytes=self._in_part, sha256=self._part.hexdigest())
        )
        if self._part_size is not None:
            self._part = hashlib.sha256()
        self._in_part = 0


class JoinedReader(io.RawIOBase):
    """Several files read one after another as if they were one."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._left = list(files)
        self._handle: IO[bytes] | None = None

    def readable(self) -> bool:
        """Readable, which `io.BufferedReader` asks for."""
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """Fill the buffer from the current file, going on to the next at its end."""
        while True:
            if self._handle is None:
                if not self._left:
                    return 0
                path = self._left.pop(0)
                with os_errors(path, "read"):
                    self._handle = path.open("rb")
            count = self._handle.readinto(buffer)  # type: ignore[attr-defined]
            if count:
                return int(count)
            self._handle.close()
            self._handle = None

    def close(self) -> None:
        """Close the file that is open."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None
        super().close()
