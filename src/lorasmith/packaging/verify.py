"""A package, an unpacked package or a run folder, checked again: every byte against its hash."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from lorasmith.errors import DamageError, InputError, LorasmithError
from lorasmith.files.checksums import SUMS, walk
from lorasmith.files.digests import hash_file
from lorasmith.packaging.contents import RESULTS
from lorasmith.packaging.opened import Package, check_files, open_package, read_members
from lorasmith.packaging.pack import MANIFEST
from lorasmith.packaging.run_check import PACKAGE, check_run, is_run
from lorasmith.packaging.signing import SIGNATURE, Verifier, check_signature
from lorasmith.packaging.tarstream import Advance
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest, Finding


def verify(folder: Path, *, verifier: Verifier | None = None, progress: Progress = silent) -> list[Finding]:
    """All that is wrong in a package, an unpacked package, or a run folder; empty when nothing is.

    A package is right when its files are exactly those of `SHA256SUMS`, each with its hash, and when both
    archives, read to the end, give exactly the members of the manifest. A run is right when its files are
    exactly those of its own `SHA256SUMS`, when every output that its records name has the hash that they
    name, and when the package in it is right. With a `verifier` the signature is checked too; a signature
    that nobody asked about is a note. Raises `InputError` for a folder that is none of these.
    """
    if not folder.is_dir():
        raise InputError("there is no such folder", where=folder, expected="a package or a run")
    if (folder / MANIFEST).exists() or ((folder / SUMS).exists() and not is_run(folder)):
        return _verify_package(folder, verifier, progress)
    if folder.name == RESULTS and (folder.parent / SUMS).is_file() and (folder.parent / MANIFEST).is_file():
        # A part of an unpacked package, whose redacted files are right by the manifest and not by the run.
        return _verify_package(folder.parent, verifier, progress)
    if is_run(folder):
        findings = check_run(folder, progress)
        if (folder / PACKAGE).is_dir():
            inside = _verify_package(folder / PACKAGE, verifier, progress)
            findings += [_below(PACKAGE, finding) for finding in inside]
        return findings
    raise InputError(
        "this is neither a package nor a run",
        where=folder,
        expected=f"{MANIFEST} and {SUMS}, or run.json",
        remedy="give the folder that holds them",
    )


def check_members(folder: Path, stem: str, members: Sequence[FileDigest]) -> list[Finding]:
    """The unpacked files of one archive against the manifest: each there, whole, and no other."""
    expected = {member.path: member.sha256 for member in members}
    return _compare(folder, expected, walk(folder, below=stem))


def _verify_package(folder: Path, verifier: Verifier | None, progress: Progress) -> list[Finding]:
    try:
        if verifier is not None:
            check_signature(folder, verifier)
        package = open_package(folder)
    except LorasmithError as error:
        return [damage(error)]
    unpacked = [
        archive.path
        for archive in package.manifest.archives
        if any(name.startswith(f"{package.stem(archive.path)}/") for name in package.sums)
    ]
    found = walk(folder)
    found.pop(SUMS, None)
    signature = found.pop(SIGNATURE, None)
    if unpacked:
        findings = _compare(folder, package.sums, found)
        for name in unpacked:
            listed = {member.path: member.sha256 for member in package.manifest.contents[name]}
            if any(package.sums.get(path) != sha for path, sha in listed.items()):
                findings.append(_finding("contradiction", f"{SUMS} and {MANIFEST} disagree on {name}", SUMS))
        return findings
    findings = _verify_archives(package, found, progress)
    if signature is not None and verifier is None:
        findings.append(
            Finding(
                severity="note",
                code="signature-not-checked",
                message="the package is signed, and its signature was not checked",
                where=SIGNATURE,
                remedy="give the public key of its maker",
            )
        )
    return findings


def _verify_archives(package: Package, found: dict[str, os.stat_result], progress: Progress) -> list[Finding]:
    pieces = {piece.path for piece in package.all_files()}
    others = {name: sha for name, sha in package.sums.items() if name not in pieces}
    findings = _compare(
        package.folder, others, {name: at for name, at in found.items() if name not in pieces}
    )
    findings += [
        _finding("contradiction", f"{SUMS} does not list {name}", SUMS)
        for name in sorted(pieces - set(package.sums))
    ]
    total = sum(
        archive.bytes + sum(member.bytes for member in package.manifest.contents[archive.path])
        for archive in package.manifest.archives
    )
    with progress("Verify", total=total, unit="B") as advance:
        for archive in package.manifest.archives:
            findings += _verify_archive(package, archive.path, advance)
    return findings


def _verify_archive(package: Package, name: str, advance: Advance) -> list[Finding]:
    try:
        check_files(package, name, advance)
        read_members(package, name, lambda member: lambda data: None, advance)
    except DamageError as error:
        return [damage(error)]
    return []


def _compare(folder: Path, expected: dict[str, str], found: dict[str, os.stat_result]) -> list[Finding]:
    findings = []
    for name in sorted(set(expected) | set(found)):
        if name not in found:
            findings.append(_finding("missing-file", f"{name} is missing", name))
        elif name not in expected:
            findings.append(_finding("extra-file", f"{name} does not belong here", name))
        elif not stat.S_ISREG(found[name].st_mode):
            findings.append(_finding("not-a-file", f"{name} is a link or a device", name))
        else:
            sha = hash_file(folder / name)
            if sha != expected[name]:
                findings.append(
                    _finding("damaged-file", f"{name} is damaged: SHA-256 {sha}", name, expected[name])
                )
    return findings


def damage(error: LorasmithError) -> Finding:
    """An error as a finding."""
    return Finding(
        severity="error",
        code="damaged",
        message=error.found,
        where=error.where,
        expected=error.expected,
        remedy=error.remedy,
    )


def _finding(code: str, message: str, where: str, expected: str | None = None) -> Finding:
    return Finding(severity="error", code=code, message=message, where=where, expected=expected)


def _below(folder: str, finding: Finding) -> Finding:
    return finding.model_copy(update={"where": f"{folder}: {finding.where}" if finding.where else folder})


def worst(findings: Iterable[Finding]) -> bool:
    """Whether any finding is an error."""
    return any(finding.severity == "error" for finding in findings)
