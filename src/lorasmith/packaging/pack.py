"""From a finished run to a package: two archives, a manifest, and checksums that any machine can check."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorasmith.errors import CheckpointError, DamageError, InputError, UsageError, os_errors
from lorasmith.files.atomic import aside, publish_folder, write_bytes
from lorasmith.files.digests import write_sums
from lorasmith.files.names import safe_members
from lorasmith.files.output_folder import holds_another
from lorasmith.machine.resources import require_disk
from lorasmith.packaging.archive import Advance, ArchiveWriter, BackgroundHash, Member, write_tar
from lorasmith.packaging.compress import Compression, find_compression
from lorasmith.packaging.contents import (
    BOM,
    MODEL,
    RESULTS,
    bill_of_materials,
    collect,
    expected_model_digests,
)
from lorasmith.packaging.signing import Signer, sign_folder
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest
from lorasmith.records.release import PackageManifest

MANIFEST = "manifest.json"

WriteReport = Callable[[Path, Path], None]
"""Writes the packaged report of a run (first path) to a file (second path): without timings."""


@dataclass(frozen=True)
class WrittenArchive:
    """What was written of one archive."""

    whole: FileDigest
    parts: list[FileDigest]
    members: list[FileDigest]
    stream_sha256: str


def pack(
    run: Path,
    output: Path,
    *,
    compression: str = "gzip",
    part_size: int | None = None,
    report: WriteReport | None = None,
    signer: Signer | None = None,
    progress: Progress = silent,
) -> PackageManifest:
    """Pack a run folder into `output`: evidence, model, manifest, bill of materials, `SHA256SUMS`.

    `compression` is `gzip`, `zstd` or `none`; with `part_size` (bytes) an archive is cut into numbered parts
    that `cat` joins. `report` renders the page that goes with the evidence; it is passed in because packing
    and reporting do not know each other. `signer` signs the whole (see `packaging.signing`). Every member is
    hashed while it is read. The package appears as a whole or not at all; an older package at `output` is
    replaced, anything else there is left alone.

    Raises `UsageError` for an unknown compression or an `output` that is no package, `DataError` and
    `CheckpointError` for a run that cannot be packed (see `contents.collect`), `DiskError` for too little
    space.
    """
    method = find_compression(compression)
    _check_output(run, output)
    contents = collect(run, _render(run, report))
    groups = {RESULTS: contents.results, MODEL: contents.model}
    for stem, members in groups.items():
        _check_names(run, stem, members)
    total = sum(member.size() for members in groups.values() for member in members)
    require_disk(output.parent, total, "pack the run")
    temporary = aside(output)
    with os_errors(output, "write the package"):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        archives: dict[str, WrittenArchive] = {}
        with progress("Pack", total=total, unit="B") as advance:
            for stem, members in groups.items():
                path = temporary / f"{stem}{method.suffix}"
                archives[path.name] = write_archive(path, members, method, part_size, advance)
                if stem == MODEL:
                    _check_model(run, archives[path.name].members)
        manifest = PackageManifest(
            compression=compression,
            archives=[archive.whole for archive in archives.values()],
            contents={name: archive.members for name, archive in archives.items()},
            stream_sha256={name: archive.stream_sha256 for name, archive in archives.items()},
            parts={name: archive.parts for name, archive in archives.items() if part_size is not None},
            redacted=contents.redacted,
        )
        (model,) = (archive for name, archive in archives.items() if name.startswith(MODEL))
        _finish(temporary, manifest, bill_of_materials(run, model.members, model.whole))
        if signer is not None:
            sign_folder(temporary, signer)
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
    if holds_another(output, MANIFEST):
        raise UsageError(
            "this folder exists and is no package",
            where=output,
            expected="a new folder, or an older package",
            remedy="choose another output",
        )


def _check_names(run: Path, stem: str, members: list[Member]) -> None:
    """Refuse to write what `unpack` would refuse to read."""
    try:
        safe_members([member.name for member in members], below=stem)
    except DamageError as error:
        raise InputError(
            f"this run cannot be packed: {error.found}",
            where=run,
            expected=error.expected,
            remedy="rename the file where it comes from, in base or adapter, and run again",
        ) from error


def _render(run: Path, report: WriteReport | None) -> bytes | None:
    if report is None:
        return None
    with tempfile.TemporaryDirectory(prefix="lorasmith-report-") as folder:
        page = Path(folder) / "report.html"
        report(run, page)
        return page.read_bytes()


def write_archive(
    path: Path, members: list[Member], method: Compression, part_size: int | None, advance: Advance
) -> WrittenArchive:
    """Write one archive in one piece or in parts, hashing members, tar stream and files on the way."""
    with (
        os_errors(path, "write"),
        BackgroundHash() as stream,
        ArchiveWriter(path, part_size) as target,
        method.writer(target) as pack_bytes,
    ):

        def write(data: bytes) -> None:
            stream.update(data)
            pack_bytes(data)

        digests = write_tar(members, write, advance)
    return WrittenArchive(target.digest(), target.parts, digests, stream.hexdigest())


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


def _finish(folder: Path, manifest: PackageManifest, bom: bytes) -> None:
    """Write manifest and bill of materials, and the checksums of everything that lies in the folder."""
    digests = {}
    for name, content in ((MANIFEST, manifest.to_json()), (BOM, bom)):
        write_bytes(folder / name, content)
        digests[name] = hashlib.sha256(content).hexdigest()
    for archive in manifest.archives:
        for file in manifest.parts.get(archive.path, [archive]):
            digests[file.path] = file.sha256
    write_sums(folder, digests)
