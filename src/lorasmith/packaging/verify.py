"""A package, an unpacked package or a run folder, checked again: every byte against its hash."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorasmith.errors import DamageError, InputError, LorasmithError, os_errors
from lorasmith.files import run_layout as layout
from lorasmith.files.atomic import read_record
from lorasmith.files.digests import LOCK, SIGNATURE, SUMS, hash_file, read_sums, sealed_names, walk
from lorasmith.files.names import safe_member, safe_members
from lorasmith.files.run_sources import contradictions
from lorasmith.packaging.archive import BLOCK, Advance, JoinedReader, Write, read_tar
from lorasmith.packaging.compress import BROKEN, COMPRESSIONS, Compression
from lorasmith.packaging.contents import RESULTS
from lorasmith.packaging.pack import MANIFEST
from lorasmith.packaging.signing import SIGNED, Verifier, check_signature
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest, Finding, Record
from lorasmith.records.merging import MergeRecord
from lorasmith.records.release import PackageManifest, RunRecord, StageRecord
from lorasmith.records.scoring import TaskResult, ValidationResult

# A package folder opened for reading: a manifest that fits its checksums, archives as streams.


_MOST_BYTES = 1 << 63
"""No file system holds a larger file."""


@dataclass(frozen=True)
class Package:
    """What a package says of itself, with a manifest that fits its checksum."""

    folder: Path
    manifest: PackageManifest
    manifest_bytes: bytes
    """The manifest as it was read: what is signed is its hash."""
    sums: dict[str, str]
    method: Compression

    def archive(self, name: str) -> FileDigest:
        """The archive as one file; raises `InputError` for a name that the manifest does not have."""
        for archive in self.manifest.archives:
            if archive.path == name:
                return archive
        known = ", ".join(archive.path for archive in self.manifest.archives)
        raise InputError(f"the manifest does not list {name!r}", where=self.folder, expected=known)

    def stem(self, name: str) -> str:
        """The top folder within an archive."""
        return name.removesuffix(self.method.suffix)

    def files(self, name: str) -> list[FileDigest]:
        """The file or the parts that an archive consists of."""
        return self.manifest.parts.get(name, [self.archive(name)])

    def all_files(self) -> list[FileDigest]:
        """The files and parts of all archives."""
        return [file for archive in self.manifest.archives for file in self.files(archive.path)]

    def companions(self) -> dict[str, str]:
        """Name → SHA-256 of what lies beside archives and manifest, such as the bill of materials."""
        own = {MANIFEST, *(file.path for file in self.all_files())}
        return {name: sha for name, sha in self.sums.items() if name not in own and "/" not in name}


def open_package(folder: Path) -> Package:
    """Read `SHA256SUMS` and `manifest.json`.

    Raises `InputError` where one is missing, `DamageError` where one is damaged, they contradict each
    other, or the manifest lists names that must not be written.
    """
    for name in (MANIFEST, SUMS):
        if not (folder / name).is_file():
            raise InputError(
                f"{name} is missing",
                where=folder,
                expected=f"{MANIFEST} and {SUMS} beside the archives",
                remedy="fetch it as well: without it nothing can be checked",
            )
        if (folder / name).is_symlink():
            raise DamageError(f"{name} is a link", where=folder, expected="a file", remedy="fetch it again")
    sums = read_sums(folder)
    with os_errors(folder / MANIFEST, "read"):
        content = (folder / MANIFEST).read_bytes()
    sha = hashlib.sha256(content).hexdigest()
    if sums.get(MANIFEST) != sha:
        raise DamageError(
            "the manifest is damaged",
            where=folder / MANIFEST,
            expected=f"SHA-256 {sums.get(MANIFEST)}, found {sha}",
            remedy="fetch it again",
        )
    manifest = PackageManifest.from_json(content, folder / MANIFEST)
    _check_agreement(folder, manifest)
    package = Package(folder, manifest, content, sums, COMPRESSIONS[manifest.compression])
    _check_names(package)
    return package


def _check_agreement(folder: Path, manifest: PackageManifest) -> None:
    names = [archive.path for archive in manifest.archives]
    consistent = (
        names
        and manifest.compression in COMPRESSIONS
        and len(set(names)) == len(names)
        and set(manifest.contents) == set(manifest.stream_sha256) == set(names)
        and set(manifest.parts) <= set(names)
    )
    if not consistent:
        raise DamageError("the manifest contradicts itself", where=folder / MANIFEST)
    for members in manifest.contents.values():
        if any(not 0 <= member.bytes < _MOST_BYTES for member in members):
            raise DamageError("the manifest lists a file of an impossible size", where=folder / MANIFEST)


def _check_names(package: Package) -> None:
    """Every name that the manifest and the list give, before any of them is joined to a folder."""
    where = package.folder / MANIFEST
    safe_members(package.sums, where=package.folder / SUMS)
    names = [safe_member(archive.path, where=where) for archive in package.manifest.archives]
    for name in names:
        stem = package.stem(name)
        if "/" in name or stem.startswith(".") or not stem or not name.endswith(package.method.suffix):
            raise DamageError(
                f"the manifest lists {name!a}",
                where=where,
                expected=f"an archive NAME{package.method.suffix} beside it",
            )
        safe_members([member.path for member in package.manifest.contents[name]], where=where, below=stem)
        pieces = package.files(name)
        if sum(piece.bytes for piece in pieces) != package.archive(name).bytes:
            raise DamageError(f"the parts of {name} do not add up", where=where)
        for piece in pieces:
            safe_member(piece.path, where=where)
            if "/" in piece.path or not piece.path.startswith(name):
                raise DamageError(
                    f"the manifest lists a part called {piece.path!r}", expected=f"{name}.part-…"
                )
    # What lies side by side in the unpacked folder must not meet there either.
    own = (MANIFEST, SUMS, SIGNATURE, SIGNED)
    safe_members([*own, *map(package.stem, names), *package.companions()], where=where)


def check_files(package: Package, name: str, advance: Advance) -> None:
    """Hash the archive's file or parts; raises `DamageError` for the first that is not as listed."""
    for piece in package.files(name):
        path = package.folder / piece.path
        listed = package.sums.get(piece.path)
        if listed != piece.sha256:
            raise DamageError(f"manifest and {SUMS} disagree on {piece.path}", where=package.folder)
        if path.is_symlink() or not path.is_file():
            raise DamageError(f"{piece.path} is missing", where=package.folder, remedy="fetch it")
        with os_errors(path, "read"):
            size = path.stat().st_size
        if size != piece.bytes:
            raise DamageError(
                f"{piece.path} is {'cut short' if size < piece.bytes else 'too long'}",
                where=path,
                expected=f"{piece.bytes} bytes, found {size}",
                remedy="go on fetching it" if size < piece.bytes else "fetch it again",
            )
        sha = _hash(path, advance)
        if sha != piece.sha256:
            raise DamageError(
                f"{piece.path} is damaged",
                where=path,
                expected=f"SHA-256 {piece.sha256}, found {sha}",
                remedy="fetch it again",
            )


def _hash(path: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    with os_errors(path, "read"), path.open("rb") as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def read_members(
    package: Package, name: str, open_member: Callable[[FileDigest], Write], advance: Advance
) -> None:
    """Unpack one archive into the writers of `open_member`; raises `DamageError` as `read_tar` does."""
    files = [package.folder / piece.path for piece in package.files(name)]
    try:
        with _stream(files) as source, package.method.reader(source) as read:
            stream = read_tar(read, package.manifest.contents[name], open_member, advance)
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamageError(
            f"{name} cannot be decompressed: {error}", where=package.folder, remedy="fetch it again"
        ) from error
    if stream != package.manifest.stream_sha256[name]:
        raise DamageError(
            f"the content of {name} is not what the manifest says",
            where=package.folder,
            expected=f"tar stream of SHA-256 {package.manifest.stream_sha256[name]}, found {stream}",
        )


@contextmanager
def _stream(files: Sequence[Path]) -> Iterator[io.BufferedReader]:
    with JoinedReader(files) as joined:
        yield io.BufferedReader(joined, BLOCK)


# A run folder against its list of checksums and its own records: every file is read again.


R = TypeVar("R", bound=Record)

PACKAGE = "package"
"""Below the run folder; whoever checks the run checks it as a package."""
_ENTRANCE = (f"{PACKAGE}/{SUMS}", f"{PACKAGE}/{SIGNATURE}")
"""What all other files of a package are checked against is checked with the run."""


def is_run(folder: Path) -> bool:
    """Whether this is a run folder, also one that lost its `run.json` or its list of checksums."""
    return (folder / "run.json").is_file() or (folder / "stages").is_dir()


def check_run(run: Path, progress: Progress) -> list[Finding]:
    """Findings for files that are missing, added, or not what the list or the records say.

    The archives of a package inside are left out.
    """
    expected, findings = _expected(run)
    findings += _check_inputs(run)
    findings += _check_list(run, expected)
    present = walk(run)
    lock = present.get(LOCK)
    if lock is not None and (lock.st_size or not stat.S_ISREG(lock.st_mode)):
        findings.append(_finding("damaged-file", f"{LOCK} is not empty", LOCK))
    total = sum(present[name].st_size for name in expected if name in present)
    with progress("Verify", total=total, unit="B") as advance:
        for name, named in sorted(expected.items()):
            if name not in present:
                findings.append(_finding("missing-file", f"{name} is missing", name))
                continue
            if not stat.S_ISREG(present[name].st_mode):
                findings.append(_finding("not-a-file", f"{name} is a link or a device", name))
                continue
            sha = hash_file(run / name)
            for source, wanted in sorted(named.items()):
                if sha != wanted:
                    message = f"{name} is not what {source} says"
                    findings.append(_finding("damaged-file", message, name, f"SHA-256 {wanted}, found {sha}"))
            advance(present[name].st_size)
    return findings


def _check_inputs(run: Path) -> list[Finding]:
    """Errors for records that were made from another base or adapter than the run names."""
    quiet: list[Finding] = []  # whatever cannot be read is found by its hash
    asked = _read(layout.RUN.at(run), RunRecord, quiet)
    if asked is None:
        return []
    records = {file.path: _read(file.at(run), file.kind, quiet) for file in layout.PACKED}
    stages = [_read(path, StageRecord, quiet) for path in sorted((run / layout.STAGES).glob("*.json"))]
    return contradictions(
        asked,
        {path: record for path, record in records.items() if record is not None},
        [stage for stage in stages if stage is not None],
    )


def _check_list(run: Path, expected: dict[str, dict[str, str]]) -> list[Finding]:
    """Adds what `SHA256SUMS` says to `expected`; findings for files that it does not list."""
    if not (run / SUMS).is_file():
        missing = _finding("not-sealed", f"the run has no {SUMS}: it did not end, or lost it", str(run), SUMS)
        return [missing.model_copy(update={"remedy": "give the command of the run again"})]
    try:
        listed = read_sums(run)
    except LorasmithError as error:
        return [_finding("damaged-file", error.found, SUMS, error.expected)]
    for name, sha in listed.items():
        if not name.startswith(f"{PACKAGE}/") or name in _ENTRANCE:
            expected.setdefault(name, {})[SUMS] = sha
    extra = [name for name in sealed_names(run) if name not in listed and not name.startswith(f"{PACKAGE}/")]
    findings = [_finding("extra-file", f"{name} does not belong here", name) for name in extra]
    if not (run / PACKAGE).is_dir() and any(name.startswith(f"{PACKAGE}/") for name in listed):
        findings.append(_finding("missing-file", f"the folder {PACKAGE} is missing", PACKAGE))
    return findings


def _expected(run: Path) -> tuple[dict[str, dict[str, str]], list[Finding]]:
    """File → record that names it → SHA-256; and records that cannot be read."""
    expected: dict[str, dict[str, str]] = {}
    findings: list[Finding] = []

    def name(file: str, source: Path, sha256: str) -> None:
        expected.setdefault(file, {})[source.relative_to(run).as_posix()] = sha256

    for path in sorted((run / "stages").glob("*.json")):
        stage = _read(path, StageRecord, findings)
        for output in stage.outputs if stage and stage.stage != PACKAGE else []:
            name(output.path, path, output.sha256)
    for path in sorted((run / "validation").glob("*.json")):
        kind: type[TaskResult | ValidationResult] = (
            TaskResult if path.stem.endswith("_tasks") else ValidationResult
        )
        result = _read(path, kind, findings)
        if result:
            name(f"validation/{result.per_example.path}", path, result.per_example.sha256)
            name("testset/test_set.jsonl", path, result.test_set.sha256)
    path = run / "merged" / "lorasmith_merge.json"
    merge = _read(path, MergeRecord, findings) if path.is_file() else None
    for file in merge.files if merge else []:
        name(f"merged/{file.path}", path, file.sha256)
    return expected, findings


def _read(path: Path, kind: type[R], findings: list[Finding]) -> R | None:
    try:
        return read_record(path, kind)
    except LorasmithError as error:
        findings.append(_finding("damaged-record", error.found, str(path), error.expected))
        return None


def _finding(code: str, message: str, where: str, expected: str | None = None) -> Finding:
    return Finding(severity="error", code=code, message=message, where=where, expected=expected)


def verify(folder: Path, *, verifier: Verifier | None = None, progress: Progress = silent) -> list[Finding]:
    """All that is wrong in a package, an unpacked package, or a run folder; empty when nothing is.

    A package is right when its files are exactly those of `SHA256SUMS`, each with its hash, and when both
    archives, read to the end, give exactly the members of the manifest. A run is right when its files are
    exactly those of its own `SHA256SUMS`, when every output that its records name has the hash that they
    name, and when the package in it is right. With a `verifier` only what is signed is right: the list of
    the folder has to bear the signature, in a run that of its package as well, in an unpacked package the
    list that it was unpacked by. A signature that nobody asked about is a note. Raises `InputError` for a
    folder that is none of these.
    """
    if not folder.is_dir():
        raise InputError("there is no such folder", where=folder, expected="a package or a run")
    if (folder / MANIFEST).exists() or ((folder / SUMS).exists() and not is_run(folder)):
        return _verify_package(folder, verifier, progress)
    if folder.name == RESULTS and (folder.parent / SUMS).is_file() and (folder.parent / MANIFEST).is_file():
        # A part of an unpacked package, whose redacted files are right by the manifest and not by the run.
        return _verify_package(folder.parent, verifier, progress)
    if is_run(folder):
        findings = _check_signature(folder, verifier) + check_run(folder, progress)
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


def _check_signature(folder: Path, verifier: Verifier | None) -> list[Finding]:
    """An error where a signature is asked for and does not hold, a note where one is there unasked."""
    if verifier is None:
        return [unchecked_signature()] if (folder / SIGNATURE).is_file() else []
    try:
        check_signature(folder, verifier)
    except LorasmithError as error:
        return [damage(error)]
    return []


def unchecked_signature() -> Finding:
    """The note that there is a signature which nobody asked to check."""
    return Finding(
        severity="note",
        code="signature-not-checked",
        message="there is a signature, and it was not checked",
        where=SIGNATURE,
        remedy="give the public key of its maker with --public-key",
    )


def _verify_package(folder: Path, verifier: Verifier | None, progress: Progress) -> list[Finding]:
    # The list of an unpacked package names other files than the one that was signed, which lies in `signed`.
    kept = folder / SIGNED
    findings = _check_signature(kept if kept.is_dir() else folder, verifier)
    if worst(findings):
        return findings  # what a stranger may have written is not read
    try:
        package = open_package(folder)
        if kept.is_dir():
            findings += _check_origin(package, read_sums(kept))
    except LorasmithError as error:
        return [*findings, damage(error)]
    unpacked = [
        archive.path
        for archive in package.manifest.archives
        if any(name.startswith(f"{package.stem(archive.path)}/") for name in package.sums)
    ]
    present = walk(folder)
    present.pop(SUMS, None)
    if unpacked:
        findings += _compare(folder, package.sums, present)
        for name in unpacked:
            listed = {member.path: member.sha256 for member in package.manifest.contents[name]}
            if any(package.sums.get(path) != sha for path, sha in listed.items()):
                findings.append(_finding("contradiction", f"{SUMS} and {MANIFEST} disagree on {name}", SUMS))
        return findings
    present.pop(SIGNATURE, None)
    return findings + _verify_archives(package, present, progress)


def _check_origin(package: Package, signed: dict[str, str]) -> list[Finding]:
    """Findings for files of an unpacked package that the list which was signed does not vouch for.

    It vouches for what lay beside the archives, and through the manifest for everything in them.
    """
    if signed.get(MANIFEST) != package.sums[MANIFEST]:
        return [_finding("unsigned-file", f"{MANIFEST} is not the one that was signed", MANIFEST)]
    vouched = dict(signed)
    for members in package.manifest.contents.values():
        vouched |= {member.path: member.sha256 for member in members}
    own = (f"{SIGNED}/{SUMS}", f"{SIGNED}/{SIGNATURE}")
    return [
        _finding("unsigned-file", f"{name} is not what was signed", name)
        for name, sha in package.sums.items()
        if name not in own and vouched.get(name) != sha
    ]


def _verify_archives(
    package: Package, present: dict[str, os.stat_result], progress: Progress
) -> list[Finding]:
    pieces = {piece.path for piece in package.all_files()}
    others = {name: sha for name, sha in package.sums.items() if name not in pieces}
    findings = _compare(
        package.folder, others, {name: at for name, at in present.items() if name not in pieces}
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


def _compare(folder: Path, expected: dict[str, str], present: dict[str, os.stat_result]) -> list[Finding]:
    findings = []
    for name in sorted(set(expected) | set(present)):
        if name not in present:
            findings.append(_finding("missing-file", f"{name} is missing", name))
        elif name not in expected:
            findings.append(_finding("extra-file", f"{name} does not belong here", name))
        elif not stat.S_ISREG(present[name].st_mode):
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


def _below(folder: str, finding: Finding) -> Finding:
    return finding.model_copy(update={"where": f"{folder}: {finding.where}" if finding.where else folder})


def worst(findings: Iterable[Finding]) -> bool:
    """Whether any finding is an error."""
    return any(finding.severity == "error" for finding in findings)
