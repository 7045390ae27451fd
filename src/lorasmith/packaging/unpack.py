"""The other end: nothing of a package is used before every hash has been checked."""

from __future__ import annotations

import hashlib
import shutil
import stat
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import fspath
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from lorasmith.errors import DamageError, DataError, InputError, UsageError, os_errors
from lorasmith.files.atomic import aside, publish_folder, write_bytes
from lorasmith.files.digests import SIGNATURE, SUMS, hash_file, write_sums
from lorasmith.files.jsonl import read_rows
from lorasmith.machine.resources import require_disk
from lorasmith.packaging.archive import Advance, Write
from lorasmith.packaging.contents import RESULTS
from lorasmith.packaging.pack import MANIFEST
from lorasmith.packaging.signing import SIGNED, Verifier, check_signature
from lorasmith.packaging.verify import (
    Package,
    check_files,
    check_members,
    open_package,
    read_members,
    unchecked_signature,
)
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.dataset import Example
from lorasmith.records.release import PackageManifest, Redacted, salted_sha256

_SHOWN = 3
"""Names of files beside the package that a finding repeats."""


@dataclass(frozen=True)
class Unpacked:
    """What came out of a package, and what a person should know of the folder that it came from."""

    manifest: PackageManifest
    findings: list[Finding]
    """Listed files that are not here, files that are not listed, a signature that was not checked."""


def unpack(
    archives: Sequence[Path],
    output: Path,
    *,
    verifier: Verifier | None = None,
    progress: Progress = silent,
) -> Unpacked:
    """Unpack archives of one package into `output`; `manifest.json` and `SHA256SUMS` lie beside them.

    Each of `archives` is an archive, one of its parts, or the package folder for all of them. In `output`
    every archive becomes a folder, beside the manifest and a `SHA256SUMS` of all that was unpacked. Archives
    that lie there already, whole, are kept; further ones are added. Links, devices, climbing, doubled and
    foreign names cannot come out, and no more bytes than the manifest lists. With a `verifier` the signature
    is checked before anything else. A signed list is kept with its signature in the folder `signed`, so that
    what was unpacked can be checked against it at any time.

    An interrupted call continues when it is given again: whole archives are kept, aside.

    Raises `DamageError` for anything that is not as listed, and then leaves nothing of this call behind;
    `InputError` for a missing manifest, `UsageError` for an `output` that is something else, `DiskError`.
    """
    package, names = _select(archives, verifier)
    companions = _companions(package)
    findings = _surroundings(package, names)
    if verifier is None and (package.folder / SIGNATURE).is_file():
        findings.append(unchecked_signature())
    here = _open_output(output, package)
    wanted = [name for name in names if package.stem(name) not in here]
    sizes = sum(member.bytes for name in wanted for member in package.manifest.contents[name])
    packed = sum(package.archive(name).bytes for name in wanted)
    require_disk(output, sizes, "unpack the package")
    temporary = aside(output)
    _prepare(temporary, package)
    try:
        with progress("Unpack", total=packed + sizes, unit="B") as advance:
            for name in wanted:
                check_files(package, name, advance)
            for name in wanted:
                _unpack_one(package, name, temporary, advance)
        _publish(package, [package.stem(name) for name in wanted], here, companions, output)
    except Exception:
        # An interruption leaves the archives that are finished for the next try; a failure leaves nothing.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Unpacked(package.manifest, findings)


def _select(archives: Sequence[Path], verifier: Verifier | None) -> tuple[Package, list[str]]:
    """The package that all of the paths belong to, and the names of its archives that are meant."""
    if not archives:
        raise UsageError("no archive was given", expected="archives, or the folder of a package")
    folders = {path if path.is_dir() else path.parent for path in archives}
    if len(folders) > 1:
        raise UsageError("the archives lie in different folders", expected="archives of one package")
    folder = folders.pop()
    if verifier is not None:
        check_signature(folder, verifier)
    package = open_package(folder)
    names: list[str] = []
    for path in archives:
        if path.is_dir():
            names += [archive.path for archive in package.manifest.archives]
            continue
        meant = [
            archive.path
            for archive in package.manifest.archives
            if path.name in {archive.path, *(piece.path for piece in package.files(archive.path))}
        ]
        if not meant and path.name != MANIFEST:
            known = ", ".join(archive.path for archive in package.manifest.archives)
            raise InputError(f"the manifest does not list {path.name!r}", where=path, expected=known)
        names += meant or [archive.path for archive in package.manifest.archives]
    return package, list(dict.fromkeys(names))


def _open_output(output: Path, package: Package) -> set[str]:
    """The archives that lie unpacked in `output` already and are whole."""
    if output.exists() and not output.is_dir():
        raise UsageError("there is a file of this name", where=output, expected="a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return set()
    manifest = output / MANIFEST
    if not manifest.is_file() or manifest.read_bytes() != package.manifest_bytes:
        raise UsageError(
            "this folder holds something else",
            where=output,
            expected="a new folder, or one that holds a part of this package",
            remedy="choose another output",
        )
    for leftover in output.glob(".*.partial"):
        if leftover.is_file():
            leftover.unlink()
    here = set()
    for archive in package.manifest.archives:
        stem = package.stem(archive.path)
        if (output / stem).is_dir():
            findings = check_members(output, stem, package.manifest.contents[archive.path])
            if findings:
                raise UsageError(
                    f"{stem} lies here already and is damaged: {findings[0].message}",
                    where=output / stem,
                    remedy="remove it, then unpack again",
                )
            here.add(stem)
    return here


def _prepare(temporary: Path, package: Package) -> None:
    """The folder aside: of what an interrupted call left there, only whole archives are kept."""
    stems = {package.stem(archive.path): archive.path for archive in package.manifest.archives}
    with os_errors(temporary, "write"):
        temporary.mkdir(parents=True, exist_ok=True)
        for path in temporary.iterdir():
            name = stems.get(path.name)
            if name is not None and not check_members(temporary, path.name, package.manifest.contents[name]):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _unpack_one(package: Package, name: str, folder: Path, advance: Advance) -> None:
    """Unpack one archive into `folder`, unless it lies there already."""
    final = folder / package.stem(name)
    if final.exists():
        return
    temporary = aside(final)
    with os_errors(temporary, "write"):
        temporary.mkdir()
    with ExitStack() as stack:
        opened: list[IO[bytes]] = []

        def open_member(member: FileDigest) -> Write:
            if opened:
                opened.pop().close()
            path = temporary / member.path.split("/", 1)[1]
            with os_errors(path, "write"):
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = stack.enter_context(path.open("xb"))
            opened.append(handle)
            return handle.write

        read_members(package, name, open_member, advance)
    with os_errors(final, "write"):
        temporary.rename(final)


def _publish(
    package: Package, new: list[str], here: set[str], companions: dict[str, bytes], output: Path
) -> None:
    """Rename what was unpacked into place: the whole folder, or single archives into one that exists."""
    temporary = aside(output)
    if not here:
        _describe(package, set(new), companions, temporary)
        publish_folder(temporary, output)
        return
    for stem in new:
        publish_folder(temporary / stem, output / stem)
    _describe(package, {*here, *new}, companions, output)
    shutil.rmtree(temporary, ignore_errors=True)


def _companions(package: Package) -> dict[str, bytes]:
    """What was fetched beside archives and manifest; raises `DamageError` for what is not as listed."""
    contents = {}
    for name, sha in package.companions().items():
        path = package.folder / name
        if not path.exists() and not path.is_symlink():
            continue  # said by `_surroundings`
        content = _read_regular(path)
        if hashlib.sha256(content).hexdigest() != sha:
            raise DamageError(f"{name} is damaged", where=path, expected=f"SHA-256 {sha}")
        contents[name] = content
    if (package.folder / SIGNATURE).is_file():
        contents[f"{SIGNED}/{SUMS}"] = _read_regular(package.folder / SUMS)
        contents[f"{SIGNED}/{SIGNATURE}"] = _read_regular(package.folder / SIGNATURE)
    return contents


def _read_regular(path: Path) -> bytes:
    """The content of a plain file: a link may lead anywhere, a pipe never ends."""
    with os_errors(path, "read"):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise DamageError(f"{path.name} is no plain file", where=path, remedy="do not use the package")
        return path.read_bytes()


def _surroundings(package: Package, names: list[str]) -> list[Finding]:
    """What the list names and the folder lacks, but for archives that nobody asked for; and the reverse."""
    left_out = {file.path for file in package.all_files()} - {
        file.path for name in names for file in package.files(name)
    }
    with os_errors(package.folder, "list"):
        present = {path.name for path in package.folder.iterdir()}
    findings = [
        Finding(
            severity="warning",
            code="missing-file",
            message=f"{SUMS} lists {name}, which is not here",
            where=fspath(package.folder),
            remedy="fetch it as well",
        )
        for name in sorted(set(package.sums) - present - left_out)
    ]
    unlisted = sorted(present - {*package.sums, SUMS, SIGNATURE})
    if unlisted:
        more = f" and {len(unlisted) - _SHOWN} more" if len(unlisted) > _SHOWN else ""
        findings.append(
            Finding(
                severity="warning",
                code="extra-file",
                message=f"{SUMS} does not list what lies beside it: {', '.join(unlisted[:_SHOWN])}{more}",
                where=fspath(package.folder),
                remedy="it was left out; do not take it for a part of the package",
            )
        )
    return findings


def _describe(package: Package, stems: set[str], companions: dict[str, bytes], output: Path) -> None:
    """The manifest as it was, what lay beside it, and checksums of what lies here now."""
    write_bytes(output / MANIFEST, package.manifest_bytes)
    digests = {MANIFEST: package.sums[MANIFEST]}
    for name, content in {**_earlier_companions(package, output), **companions}.items():
        write_bytes(output / name, content)
        digests[name] = hashlib.sha256(content).hexdigest()
    for archive in package.manifest.archives:
        if package.stem(archive.path) in stems:
            digests |= {member.path: member.sha256 for member in package.manifest.contents[archive.path]}
    write_sums(output, digests)


def _earlier_companions(package: Package, output: Path) -> dict[str, bytes]:
    """What an earlier call with more at hand left in `output`: it stays listed."""
    earlier = {
        name: (output / name).read_bytes()
        for name, sha in package.companions().items()
        if (output / name).is_file() and hash_file(output / name) == sha
    }
    signed = [output / SIGNED / name for name in (SUMS, SIGNATURE)]
    if all(path.is_file() for path in signed):
        earlier |= {f"{SIGNED}/{path.name}": path.read_bytes() for path in signed}
    return earlier


# Rows that left as ids and hashes, joined again with the text from one's own copy of their source.


def rejoin(folder: Path, own: Iterable[Example]) -> list[Example]:
    """The whole test set of an unpacked package, each hidden row shown to be the one of `own` with its id.

    `own` may hold further rows. Raises `DataError` for a hidden row that `own` lacks, `DamageError` for one
    whose text is not what was used.
    """
    path = _test_set(folder)
    known = {example.id: example for example in own}
    return [_whole(row, known, f"{path}:{number}") for number, row in read_rows(path)]


def _test_set(folder: Path) -> Path:
    for place in (folder / RESULTS, folder):
        path = place / "testset" / "test_set.jsonl"
        if path.is_file():
            return path
    raise DataError(
        "there is no test set here",
        where=folder,
        expected=f"{RESULTS}/testset/test_set.jsonl",
        remedy="unpack validation_results first",
    )


def _whole(row: dict[str, Any], known: dict[str, Example], where: str) -> Example:
    if "redacted" not in row:
        return Example.model_validate(row)
    try:
        redacted = Redacted.model_validate(row["redacted"])
    except ValidationError as error:
        raise DataError("this row's hash is not complete", where=where, expected="salt and sha256") from error
    own = known.get(str(row.get("id")))
    if own is None:
        raise DataError(
            f"your copy has no row {row.get('id')!r}",
            where=where,
            expected="a test set built from the same source with the same seed",
        )
    if salted_sha256(redacted.salt, own.prompt, own.response) != redacted.sha256:
        raise DamageError(
            f"your row {own.id!r} is not the one that was used",
            where=where,
            expected=f"salted SHA-256 {redacted.sha256}",
        )
    return own
