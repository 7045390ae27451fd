"""A package folder opened for reading: a manifest that fits its checksums, archives as streams."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorasmith.errors import DamageError, InputError, os_errors
from lorasmith.files.checksums import SUMS, read_sums
from lorasmith.packaging.compress import BROKEN, COMPRESSIONS, Compression
from lorasmith.packaging.pack import MANIFEST
from lorasmith.packaging.parts import JoinedReader
from lorasmith.packaging.tarstream import BLOCK, Advance, Write, check_names, read_tar
from lorasmith.records.base import FileDigest
from lorasmith.records.release import PackageManifest


@dataclass(frozen=True)
class Package:
    """What a package says of itself, with a manifest that fits its checksum."""

    folder: Path
    manifest: PackageManifest
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
        """Of all archives."""
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
    sums = read_sums(folder)
    with os_errors(folder / MANIFEST, "read"):
        content = (folder / MANIFEST).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sums.get(MANIFEST) != found:
        raise DamageError(
            "the manifest is damaged",
            where=folder / MANIFEST,
            expected=f"SHA-256 {sums.get(MANIFEST)}, found {found}",
            remedy="fetch it again",
        )
    return _check(folder, PackageManifest.from_json(content, folder / MANIFEST), sums)


def _check(folder: Path, manifest: PackageManifest, sums: dict[str, str]) -> Package:
    names = [archive.path for archive in manifest.archives]
    consistent = (
        manifest.compression in COMPRESSIONS
        and len(set(names)) == len(names)
        and set(manifest.contents) == set(manifest.stream_sha256) == set(names)
        and set(manifest.parts) <= set(names)
    )
    if not consistent:
        raise DamageError("the manifest contradicts itself", where=folder / MANIFEST)
    package = Package(folder, manifest, sums, COMPRESSIONS[manifest.compression])
    for name in names:
        if not name.endswith(package.method.suffix):
            raise DamageError(f"the manifest lists {name!r}", expected=f"an archive {package.method.suffix}")
        check_names(manifest.contents[name], package.stem(name))
        pieces = package.files(name)
        if sum(piece.bytes for piece in pieces) != package.archive(name).bytes:
            raise DamageError(f"the parts of {name} do not add up", where=folder / MANIFEST)
        for piece in pieces:
            if "/" in piece.path or not piece.path.startswith(name):
                raise DamageError(
                    f"the manifest lists a part called {piece.path!r}", expected=f"{name}.part-…"
                )
    return package


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
        found = _hash(path, advance)
        if found != piece.sha256:
            raise DamageError(
                f"{piece.path} is damaged",
                where=path,
                expected=f"SHA-256 {piece.sha256}, found {found}",
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
            found = read_tar(read, package.manifest.contents[name], open_member, advance)
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamageError(
            f"{name} cannot be decompressed: {error}", where=package.folder, remedy="fetch it again"
        ) from error
    if found != package.manifest.stream_sha256[name]:
        raise DamageError(
            f"the content of {name} is not what the manifest says",
            where=package.folder,
            expected=f"tar stream of SHA-256 {package.manifest.stream_sha256[name]}, found {found}",
        )


@contextmanager
def _stream(files: Sequence[Path]) -> Iterator[io.BufferedReader]:
    with JoinedReader(files) as joined:
        yield io.BufferedReader(joined, BLOCK)
