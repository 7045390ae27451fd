"""SHA-256 of files and folders, with a cache that a changed file cannot slip past."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

from lorasmith.errors import DamageError, InputError, LorasmithError, os_errors
from lorasmith.files.atomic import write_bytes
from lorasmith.files.inputs import open_input, read_input, require_own_links
from lorasmith.records.base import FileDigest

_SETTLED_SECONDS = 2.0
"""A file younger than this may be written again within one clock tick: it is never cached."""


def cache_folder() -> Path:
    """Where lorasmith keeps what can be made again: `LORASMITH_CACHE`, else below `XDG_CACHE_HOME`."""
    own = os.environ.get("LORASMITH_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorasmith"


def hash_file(path: Path) -> str:
    """SHA-256 of the file's bytes, read now."""
    with os_errors(path, "read"), open_input(path) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_file(path: Path, *, rehash: bool = False) -> str:
    """SHA-256, from the cache where (device, inode, size, mtime, ctime) still match and the file is settled.

    `rehash` ignores the cache; proving and packaging hash what they read and do not call this at all.
    """
    with os_errors(path, "read"):
        status = path.stat()
    if not rehash:
        known = _lookup(status)
        if known is not None:
            return known
    digest = hash_file(path)
    with os_errors(path, "read"):
        after = path.stat()
    if identity(after) != identity(status):
        raise InputError(
            "the file changed while it was read", where=path, remedy="wait until nothing writes to it"
        )
    _store(after, digest)
    return digest


def identity(status: os.stat_result) -> tuple[int, int, int, int, int]:
    """What changes whenever a file is replaced or written to: device, inode, size, mtime and ctime (ns)."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def known_sha256(path: Path) -> str | None:
    """The cached SHA-256 of a file that has not changed since; None where it would have to be read."""
    with os_errors(path, "read"):
        return _lookup(path.stat())


def remember_sha256(path: Path, digest: str) -> None:
    """Keep a digest that was taken while the file was read for another reason."""
    with os_errors(path, "read"):
        _store(path.stat(), digest)


CARD = "README.md"
"""At the top of a model folder it tells of the model and is no part of it: digests pass it over."""


def folder_files(folder: Path) -> list[Path]:
    """All regular files below `folder`, by name, but its `CARD`, our own leftovers and hidden files.

    Raises `InputError` for links that lead out of it, and for pipes, sockets and devices.
    """
    with os_errors(folder, "read"):
        if not folder.is_dir():
            raise InputError("there is no such folder", where=folder, expected="a folder")
        require_own_links(folder)
        files = [
            file
            for file in folder.rglob("*")
            if file.is_file()
            and file != folder / CARD
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        ]
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def describe(files: Iterable[Path], relative_to: Path, *, rehash: bool = False) -> list[FileDigest]:
    """Path, size and SHA-256 of each file."""
    digests = []
    for file in files:
        digest = sha256_file(file, rehash=rehash)
        path = file.relative_to(relative_to).as_posix()
        with os_errors(file, "read"):
            size = file.stat().st_size
        digests.append(FileDigest(path=path, bytes=size, sha256=digest))
    return digests


def combine(digests: Iterable[FileDigest]) -> str:
    """One SHA-256 for a list of files: over the lines `sha256  path`, sorted by path."""
    lines = sorted((digest.path, digest.sha256) for digest in digests)
    listed = "".join(f"{sha}  {path}\n" for path, sha in lines)
    # Names that are not UTF-8 count by their bytes, as they lie on the disk.
    return hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()


def digest_folder(folder: Path, *, rehash: bool = False) -> str:
    """One SHA-256 for all files of a folder: equal exactly when names and contents are equal."""
    return combine(describe(folder_files(folder), folder, rehash=rehash))


def digest_path(path: Path, *, rehash: bool = False) -> str:
    """SHA-256 of a file, or one for all files of a folder."""
    return digest_folder(path, rehash=rehash) if path.is_dir() else sha256_file(path, rehash=rehash)


def _connect() -> sqlite3.Connection:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(folder / "digests.sqlite", timeout=10)
    connection.execute(
        "create table if not exists digest (dev int, ino int, size int, mtime int, ctime int, sha256 text,"
        " primary key (dev, ino))"
    )
    return connection


def _lookup(status: os.stat_result) -> str | None:
    # A cache that cannot be used costs time, never correctness: the file is then hashed.
    try:
        with closing(_connect()) as connection:
            row = connection.execute(
                "select sha256 from digest where dev=? and ino=? and size=? and mtime=? and ctime=?",
                identity(status),
            ).fetchone()
    except (sqlite3.Error, OSError):
        return None
    return row[0] if row else None


def _store(status: os.stat_result, digest: str) -> None:
    youngest = max(status.st_mtime, status.st_ctime)
    if time.time() - youngest < _SETTLED_SECONDS:
        return
    try:
        with closing(_connect()) as connection, connection:
            connection.execute(
                "insert or replace into digest values (?,?,?,?,?,?)", (*identity(status), digest)
            )
    except (sqlite3.Error, OSError):
        return


# `SHA256SUMS`: what `sha256sum -c` reads, written and read in one strict form; and what lies in a folder.


SUMS = "SHA256SUMS"
SIGNATURE = f"{SUMS}.sig"
"""Lies beside the list that it signs, and is in no list itself."""
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n\\]+)")


def write_sums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write name → SHA-256 of all files of a folder, sorted by name.

    Raises `InputError` for a name that the list cannot hold, so that what is written can be read again.
    """
    for name, sha in digests.items():
        # A name that is not UTF-8 reaches Python with halves of surrogate pairs, which cannot be encoded.
        if not _LINE.fullmatch(f"{sha}  {name}") or any("\ud800" <= letter <= "\udfff" for letter in name):
            raise InputError(
                f"{SUMS} cannot list a file of this name",
                where=folder / name,
                expected="a name in UTF-8, without line breaks and backslashes",
                remedy="rename or remove the file",
            )
    lines = [f"{sha}  {name}\n" for name, sha in sorted(digests.items())]
    write_bytes(folder / SUMS, "".join(lines).encode())


def read_sums(folder: Path) -> dict[str, str]:
    """Name → SHA-256; raises `DamageError` for anything but the form that `write_sums` gives."""
    path = folder / SUMS
    with os_errors(path, "read"):
        content = read_input(path)
    sums: dict[str, str] = {}
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
        sums[match[2]] = match[1]
    if list(sums) != sorted(sums) or len(sums) != len(lines) - 1:
        raise _damaged(path, "its names are not in order")
    return sums


def walk(folder: Path, below: str = "") -> dict[str, os.stat_result]:
    """All that lies below a folder but folders: path → status, links not followed."""
    statuses = {}
    for place, folders, files in os.walk(folder / below):
        for name in [*files, *(name for name in folders if (Path(place) / name).is_symlink())]:
            path = Path(place) / name
            statuses[path.relative_to(folder).as_posix()] = path.lstat()
    return statuses


def _damaged(path: Path, why: str) -> DamageError:
    return DamageError(
        f"the list of checksums is damaged: {why}",
        where=path,
        expected="`sha256  name` lines, sorted by name",
        remedy="fetch it again",
    )


# `SHA256SUMS` of a run folder: written when a command has ended, so that any later change is found.


LOCK = ".lock"
"""Empty; whoever works on the run holds it open."""


def open_seal(run: Path) -> None:
    """Take the list away before anything below the folder changes: a run without one has not ended."""
    with os_errors(run / SUMS, "write"):
        (run / SUMS).unlink(missing_ok=True)
        (run / SIGNATURE).unlink(missing_ok=True)


def seal_run(run: Path) -> None:
    """List every file of the run with its SHA-256; what was hashed as a stage's output is not read again.

    Not equal between two runs: it lists `timing.json` and the page that shows the times.
    """
    write_sums(run, _digests(run, sealed_names(run)))


def reseal(run: Path, changed: Path) -> bool:
    """Bring one file or folder of a sealed run up to date; the lines of all others stay as they are.

    Nothing happens for a run that is not sealed, whose list is damaged, or for a place outside of it. A
    signature of the old list is removed, for it does not hold any more; returns whether there was one.
    """
    if not (run / SUMS).is_file() or run.resolve() not in changed.resolve().parents:
        return False
    place = changed.resolve().relative_to(run.resolve()).as_posix()
    try:
        known = read_sums(run)
    except LorasmithError:
        return False

    def inside(name: str) -> bool:
        return name == place or name.startswith(f"{place}/")

    kept = {name: sha for name, sha in known.items() if not inside(name)}
    fresh = _digests(run, [name for name in sealed_names(run) if inside(name)])
    signed = (run / SIGNATURE).is_file()
    with os_errors(run / SIGNATURE, "remove"):
        (run / SIGNATURE).unlink(missing_ok=True)
    write_sums(run, {**kept, **fresh})
    return signed


def sealed_names(run: Path) -> list[str]:
    """All files of a run folder but its list, the list's signature and its lock; links and leftovers too."""
    return sorted(set(walk(run)) - {SUMS, SIGNATURE, LOCK})


def _digests(run: Path, names: list[str]) -> Mapping[str, str]:
    # A link is no part of a run: it is not listed, and found as what does not belong there.
    files = [run / name for name in names if not (run / name).is_symlink()]
    return {file.path: file.sha256 for file in describe(files, run)}
