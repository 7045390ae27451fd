"""Packages made to do harm: their hashes fit, and still nothing of them comes out or is left behind."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import DamageError, DiskError, LorasmithError
from lorasmith.files.digests import write_sums
from lorasmith.packaging.pack import pack
from lorasmith.packaging.unpack import unpack
from lorasmith.packaging.verify import verify
from tests.samples import sample_run


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of each kind of compression."""
    folder = tmp_path_factory.mktemp("packages")
    run = sample_run(folder / "run", count=15)
    for compression in ("gzip", "zstd"):
        pack(run, folder / compression, compression=compression)
    return folder


# An attacker who controls the package controls its manifest as well: hashes fit, contents are hostile.

GOOD = "merged_model/config.json"
BODY = b'{"model_type": "llama"}\n'


def _entry(name: str, body: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(body), 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info, body


def _hostile(folder: Path, entries: list[tuple[tarfile.TarInfo, bytes]], listed: dict[str, bytes]) -> None:
    """A package whose model archive holds `entries` while its manifest lists `listed`."""
    folder.mkdir()
    stream = io.BytesIO()
    for info, body in entries:
        stream.write(info.tobuf(tarfile.PAX_FORMAT) + body + bytes(-len(body) % 512))
    stream.write(bytes(1024))
    data = stream.getvalue()
    archive = "merged_model.tar"
    (folder / archive).write_bytes(data)
    sha = hashlib.sha256(data).hexdigest()
    manifest = {
        "format": "lorasmith/package/1",
        "compression": "none",
        "archives": [{"path": archive, "bytes": len(data), "sha256": sha}],
        "contents": {
            archive: [
                {"path": name, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
                for name, body in listed.items()
            ]
        },
        "stream_sha256": {archive: sha},
    }
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    write_sums(folder, {archive: sha, "manifest.json": hashlib.sha256(content).hexdigest()})


ATTACKS: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], dict[str, bytes]]] = {
    "symbolic link": (
        [_entry(GOOD, type=tarfile.SYMTYPE, linkname="/etc/passwd")],
        {GOOD: b""},
    ),
    "hard link": ([_entry(GOOD, type=tarfile.LNKTYPE, linkname="/etc/passwd")], {GOOD: b""}),
    "device": ([_entry(GOOD, type=tarfile.CHRTYPE, devmajor=1, devminor=3)], {GOOD: b""}),
    "pipe": ([_entry(GOOD, type=tarfile.FIFOTYPE)], {GOOD: b""}),
    "doubled": ([_entry(GOOD, BODY), _entry(GOOD, BODY)], {GOOD: BODY}),
    "extra": ([_entry(GOOD, BODY), _entry("merged_model/evil.py", b"boom")], {GOOD: BODY}),
    "other name": ([_entry("merged_model/evil.json", BODY)], {GOOD: BODY}),
    "climbing name": ([_entry("merged_model/../../evil", BODY)], {GOOD: BODY}),
    "climbing name, listed": (
        [_entry("merged_model/../../evil", BODY)],
        {"merged_model/../../evil": BODY},
    ),
    "absolute name, listed": ([_entry("/tmp/evil", BODY)], {"/tmp/evil": BODY}),
    "other top folder, listed": ([_entry("evil/x", BODY)], {"evil/x": BODY}),
    "backslash, listed": ([_entry("merged_model/..\\evil", BODY)], {"merged_model/..\\evil": BODY}),
    "drive, listed": ([_entry("merged_model/c:evil", BODY)], {"merged_model/c:evil": BODY}),
    "same name in capitals, listed": (
        [_entry("merged_model/CONFIG.json", BODY), _entry(GOOD, BODY)],
        {"merged_model/CONFIG.json": BODY, GOOD: BODY},
    ),
    "executable": ([_entry(GOOD, BODY, mode=0o755)], {GOOD: BODY}),
    "owner": ([_entry(GOOD, BODY, uid=1000)], {GOOD: BODY}),
    "missing": ([_entry(GOOD, BODY)], {GOOD: BODY, "merged_model/model.safetensors": b"weights"}),
    "other bytes": ([_entry(GOOD, BODY.replace(b"llama", b"qwen2"))], {GOOD: BODY}),
    "longer": ([_entry(GOOD, BODY + b" ")], {GOOD: BODY}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_archives_are_refused_and_leave_nothing(tmp_path: Path, attack: str) -> None:
    entries, listed = ATTACKS[attack]
    _hostile(tmp_path / "package", entries, listed)
    with pytest.raises(DamageError):
        unpack([tmp_path / "package"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["package"]
    assert [finding.severity for finding in verify(tmp_path / "package")] == ["error"]


def test_the_harmless_twin_of_the_attacks_is_accepted(tmp_path: Path) -> None:
    _hostile(tmp_path / "package", [_entry(GOOD, BODY)], {GOOD: BODY})
    unpack([tmp_path / "package"], tmp_path / "out")
    assert (tmp_path / "out" / GOOD).read_bytes() == BODY


def _rewrite(package: Path, name: str, data: bytes, change: Callable[[dict[str, Any]], None]) -> None:
    (package / name).write_bytes(data)
    manifest = json.loads((package / "manifest.json").read_text())
    for archive in manifest["archives"]:
        if archive["path"] == name:
            archive |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(manifest)
    content = json.dumps(manifest).encode()
    (package / "manifest.json").write_bytes(content)
    names = [path for path in package.iterdir() if path.name != "SHA256SUMS"]
    write_sums(package, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names})


def test_a_bomb_goes_no_further_than_the_listed_size(packages: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(packages / "gzip", package)
    stream = gzip.decompress((package / "merged_model.tar.gz").read_bytes())
    bomb = gzip.compress(stream[:-1024] + bytes(300 << 20), 1, mtime=0)
    assert len(bomb) < 3 << 20
    _rewrite(package, "merged_model.tar.gz", bomb, lambda manifest: None)
    with pytest.raises(DamageError, match="more than the manifest lists"):
        unpack([package], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bomb_that_is_listed_meets_the_disk(packages: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(packages / "gzip", package)

    def inflate(manifest: dict[str, Any]) -> None:
        manifest["contents"]["merged_model.tar.gz"][0]["bytes"] = 1 << 60

    _rewrite(package, "merged_model.tar.gz", (package / "merged_model.tar.gz").read_bytes(), inflate)
    with pytest.raises((DiskError, DamageError)):
        unpack([package], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_what_does_not_decompress_is_damage(packages: Path, tmp_path: Path, kind: str) -> None:
    package = tmp_path / "package"
    shutil.copytree(packages / kind, package)
    name = next(path.name for path in package.glob("merged_model*"))
    data = bytearray((package / name).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8] = b"\xff" * 8
    _rewrite(package, name, bytes(data), lambda manifest: None)
    with pytest.raises(DamageError):
        unpack([package], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Names: of archives, of their parts, of members and in the list of checksums.


def _rename_archive(name: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        old = manifest["archives"][0]["path"]
        manifest["archives"][0]["path"] = name
        for field in ("contents", "stream_sha256"):
            manifest[field][name] = manifest[field].pop(old)

    return change


def _add_archive(name: str) -> Callable[[dict[str, Any]], None]:
    """An archive of no bytes and no members: nothing of it is ever hashed."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["archives"].insert(0, {"path": name, "bytes": 0, "sha256": "0" * 64})
        manifest["contents"][name] = []
        manifest["stream_sha256"][name] = "0" * 64
        manifest["parts"] = {name: []}

    return change


def _rename_member(name: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["contents"]["merged_model.tar"][0]["path"] = name

    return change


def _resize(size: int) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["contents"]["merged_model.tar"][0]["bytes"] = size

    return change


def _cut_into(name: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["parts"] = {"merged_model.tar": [{**manifest["archives"][0], "path": name}]}

    return change


NAMES: dict[str, Callable[[dict[str, Any]], None]] = {
    **{
        f"archive {name[:30]!a}": change(f"{name}.tar")
        for change in (_rename_archive, _add_archive)
        for name in (
            "",
            ".",
            "..",
            "/tmp/lorasmith-victim",
            "../victim",
            "../../victim",
            "a/b",
            "manifest.json",
            "SHA256SUMS",
            "Signed",
            ".merged_model.partial",
            "a\0b",
            "a\x1b[2J",
            "a\ud800",
            "a" * 300,
        )
    },
    **{
        f"member {name[:40]!a}": _rename_member(name)
        for name in (
            "merged_model/\ud800",
            "merged_model/a\0b",
            "merged_model/" + "a" * 300,
            "merged_model/" + "/".join(["a" * 200] * 30),
            "merged_model/\x1b]0;owned\x07",
            "merged_model/a\nb",
            "merged_model/\u202eexe.json",
            "merged_model//a",
            "merged_model/a/",
            "merged_model/./a",
            "merged_model",
            "/merged_model/a",
            "",
        )
    },
    "size below zero": _resize(-5),
    "size beyond all": _resize(10**40),
    "part elsewhere": _cut_into("../merged_model.tar"),
    "part of another name": _cut_into("other.tar"),
    "nothing at all": lambda manifest: manifest.update(archives=[], contents={}, stream_sha256={}),
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_that_must_not_be_written_is_damage_before_anything_is(tmp_path: Path, kind: str) -> None:
    inner = tmp_path / "here" / "below"
    inner.mkdir(parents=True)
    package = inner / "package"
    _hostile(package, [_entry(GOOD, BODY)], {GOOD: BODY})
    manifest = json.loads((package / "manifest.json").read_text())
    NAMES[kind](manifest)
    content = json.dumps(manifest).encode()
    (package / "manifest.json").write_bytes(content)
    archive = hashlib.sha256((package / "merged_model.tar").read_bytes()).hexdigest()
    sums = {"manifest.json": hashlib.sha256(content).hexdigest(), "merged_model.tar": archive}
    write_sums(package, sums)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DamageError):
        unpack([package], inner / "out")
    assert [finding.severity for finding in verify(package)] == ["error"]
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/lorasmith-victim").exists()


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../b", "..", "A\x1b[2J", "merged_model"]
)
def test_a_list_of_checksums_names_nothing_elsewhere(tmp_path: Path, name: str) -> None:
    package = tmp_path / "package"
    _hostile(package, [_entry(GOOD, BODY)], {GOOD: BODY})
    lines = [*(package / "SHA256SUMS").read_text().splitlines(), f"{'0' * 64}  {name}"]
    lines.sort(key=lambda line: line[66:])
    (package / "SHA256SUMS").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(DamageError):
        unpack([package], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["package"]
    assert [finding.severity for finding in verify(package)] == ["error"]


DEEP = [
    b'{"a":' + b"[" * 100_000,
    b'{"a":' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"n": ' + b"9" * 10_000 + b"}",
]


@pytest.mark.parametrize("content", DEEP, ids=["very deep", "deep", "long number"])
def test_a_manifest_that_no_parser_likes_is_refused(tmp_path: Path, content: bytes) -> None:
    package = tmp_path / "package"
    _hostile(package, [_entry(GOOD, BODY)], {GOOD: BODY})
    (package / "manifest.json").write_bytes(content)
    archive = hashlib.sha256((package / "merged_model.tar").read_bytes()).hexdigest()
    sums = {"manifest.json": hashlib.sha256(content).hexdigest(), "merged_model.tar": archive}
    write_sums(package, sums)
    with pytest.raises(LorasmithError, match="not JSON"):
        unpack([package], tmp_path / "out")
    assert [finding.severity for finding in verify(package)] == ["error"]


@pytest.mark.parametrize("name", ["notes.txt", "merged_model.tar", "manifest.json"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_pipe_or_a_link_in_a_file_s_place_is_damage(tmp_path: Path, name: str, kind: str) -> None:
    package = tmp_path / "package"
    _hostile(package, [_entry(GOOD, BODY)], {GOOD: BODY})
    (package / "notes.txt").write_text("notes")
    sums = {path.name: path for path in package.iterdir() if path.name != "SHA256SUMS"}
    write_sums(package, {n: hashlib.sha256(path.read_bytes()).hexdigest() for n, path in sums.items()})
    (package / name).rename(tmp_path / "target")
    if kind == "pipe":
        os.mkfifo(package / name)
    else:
        (package / name).symlink_to(tmp_path / "target")
    with pytest.raises(LorasmithError):
        unpack([package], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "error" in {finding.severity for finding in verify(package)}
