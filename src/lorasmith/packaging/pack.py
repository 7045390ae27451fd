"""From a finished run to a package: two archives, a manifest, and checksums that any machine can check."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from lorasmith.errors import CheckpointError, UsageError, os_errors
from lorasmith.files.atomic import aside, publish_folder, write_bytes, write_record
from lorasmith.files.digests import hash_file
from lorasmith.files.machine import require_disk
from lorasmith.packaging.compress import Compression
from lorasmith.packaging.compress import compression as find_compression
from lorasmith.packaging.contents import MODEL, RESULTS, collect, expected_model_digests
from lorasmith.packaging.tarstream import Member, write_tar
from lorasmith.progress import Advance, Progress, silent
from lorasmith.records.base import FileDigest
from lorasmith.records.release import PackageManifest

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"

WriteReport = Callable[[Path, Path], None]
"""Writes the packaged report of a run (first path) to a file (second path): without timings."""


def pack(
    run: Path,
    output: Path,
    *,
    compression: str = "gzip",
    report: WriteReport | None = None,
    progress: Progress = silent,
) -> PackageManifest:
    """Pack a run folder into `output`: evidence, merged model, `manifest.json`, `SHA256SUMS`.

    `report` renders the page that goes with the evidence; it is passed in because packing and reporting do
    not know each other. Every member is hashed while it is read. The package appears as a whole or not at
    all; an older package at `output` is replaced, anything else there is left alone.

    Raises `UsageError` for an unknown compression or an `output` that is no package, `DataError` and
    `CheckpointError` for a run that cannot be packed (see `contents.collect`), `DiskError` for too little
    space.
    """
    method = find_compression(compression)
    _check_output(run, output)
    contents = collect(run, _render(run, report))
    groups = {RESULTS: contents.results, MODEL: contents.model}
    total = sum(member.size() for members in groups.values() for member in members)
    require_disk(output.parent, total, "pack the run")
    temporary = aside(output)
    with os_errors(output, "write the package"):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        archives, members, streams = [], {}, {}
        with progress("Pack", total=total, unit="B") as advance:
            for stem, group in groups.items():
                archive = temporary / f"{stem}{method.suffix}"
                digest, members[archive.name], streams[archive.name] = _archive(
                    archive, group, method, advance
                )
                archives.append(digest)
                if stem == MODEL:
                    _check_model(run, members[archive.name])
        manifest = PackageManifest(
            compression=compression,
            archives=archives,
            contents=members,
            stream_sha256=streams,
            redacted=contents.redacted,
        )
        write_record(temporary / MANIFEST, manifest)
        _write_sums(temporary)
        publish_folder(temporary, output)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def _check_output(run: Path, output: Path) -> None:
    inside, outer = output.resolve(), run.resolve()
    if inside == outer or inside in outer.parents or (outer / "merged") in (inside, *inside.parents):
        raise UsageError("the package cannot replace the run it is made of", where=output)
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise UsageError(
            "this folder exists and is no package",
            where=output,
            expected="a new folder, or an older package",
            remedy="choose another output",
        )
    if output.exists() and not output.is_dir():
        raise UsageError("there is a file of this name", where=output, expected="a folder")


def _render(run: Path, report: WriteReport | None) -> bytes | None:
    if report is None:
        return None
    with tempfile.TemporaryDirectory(prefix="lorasmith-report-") as folder:
        page = Path(folder) / "report.html"
        report(run, page)
        return page.read_bytes()


class _Hashed:
    """Counts and hashes what is written on the way to the next writer."""

    def __init__(self, target: Callable[[bytes], object]) -> None:
        self._target = target
        self._digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._target(data)
        self.bytes += len(data)
        return len(data)

    def sha256(self) -> str:
        return self._digest.hexdigest()


class _HashedFile(_Hashed):
    """The same for a file that a compressor writes to."""

    def __init__(self, handle: BinaryIO) -> None:
        super().__init__(handle.write)
        self.flush = handle.flush


def _archive(
    path: Path, members: list[Member], method: Compression, advance: Advance
) -> tuple[FileDigest, list[FileDigest], str]:
    """Write one archive; returns its digest, its members' digests, and the SHA-256 of its tar stream."""
    with os_errors(path, "write"), path.open("wb") as handle:
        packed = _HashedFile(handle)
        with method.open(packed) as write:
            stream = _Hashed(write)
            digests = write_tar(members, stream.write, advance)
    return FileDigest(path=path.name, bytes=packed.bytes, sha256=packed.sha256()), digests, stream.sha256()


def _check_model(run: Path, members: list[FileDigest]) -> None:
    expected = expected_model_digests(run)
    for member in members:
        if member.sha256 != expected.get(member.path, member.sha256):
            raise CheckpointError(
                "this file is not the one that the merge wrote",
                where=run / "merged" / member.path.split("/", 1)[1],
                expected=f"SHA-256 {expected[member.path]}, found {member.sha256}",
                remedy="merge again, and prove and validate the result",
            )


def _write_sums(folder: Path) -> None:
    lines = [f"{hash_file(file)}  {file.name}\n" for file in sorted(folder.iterdir()) if file.is_file()]
    write_bytes(folder / SUMS, "".join(lines).encode())
