"""The other end: what comes out is what went in, and nothing else ever comes out."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import DamageError, DiskError, ExitCode, InputError, UsageError
from lorasmith.files.digests import write_sums
from lorasmith.packaging.archive import parse_size
from lorasmith.packaging.pack import pack
from lorasmith.packaging.unpack import unpack
from lorasmith.packaging.verify import verify
from tests.samples import sample_run


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and a package of each kind of compression."""
    folder = tmp_path_factory.mktemp("packages")
    run = sample_run(folder / "run", count=15)
    for compression in ("gzip", "zstd", "none"):
        pack(run, folder / compression, compression=compression)
    pack(run, folder / "parts", part_size=7_000)
    return folder


def _tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["gzip", "zstd", "none", "parts"])
def test_what_went_in_comes_out(packages: Path, tmp_path: Path, kind: str) -> None:
    unpack([packages / kind], tmp_path / "out")
    found = _tree(tmp_path / "out")
    for name, content in _tree(packages / "run" / "merged").items():
        assert found[f"merged_model/{name}"] == content
    assert found["validation_results/gates.json"] == (packages / "run" / "gates.json").read_bytes()
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    subprocess.run(check, cwd=tmp_path / "out", check=True)
    subprocess.run(check, cwd=packages / kind, check=True)
    assert verify(tmp_path / "out") == []
    assert verify(packages / kind) == []
    assert not list((tmp_path / "out").rglob(".*"))


def test_parts_are_joined_by_cat(packages: Path, tmp_path: Path) -> None:
    parts = sorted((packages / "parts").glob("validation_results.tar.gz.part-*"))
    assert len(parts) > 3
    assert {part.stat().st_size for part in parts[:-1]} == {7_000}
    joined = b"".join(part.read_bytes() for part in parts)
    assert joined == (packages / "gzip" / "validation_results.tar.gz").read_bytes()
    unpack([parts[0]], tmp_path / "out")
    assert (tmp_path / "out" / "validation_results").is_dir()
    assert not (tmp_path / "out" / "merged_model").exists()


def test_the_second_archive_may_come_later(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    unpack([packages / "gzip" / "validation_results.tar.gz"], out)
    assert verify(out) == []
    before = (out / "validation_results" / "run.json").stat().st_mtime_ns
    unpack([packages / "gzip"], out)
    assert (out / "merged_model" / "config.json").is_file()
    assert (out / "validation_results" / "run.json").stat().st_mtime_ns == before, "it was unpacked again"
    assert verify(out) == []
    unpack([packages / "gzip"], out)
    assert verify(out) == []


def test_another_folder_is_left_alone(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="something else"):
        unpack([packages / "gzip"], tmp_path / "home")
    assert _tree(tmp_path / "home") == {"thesis.tex": b"years of work"}


def test_without_a_manifest_nothing_is_unpacked(packages: Path, tmp_path: Path) -> None:
    shutil.copy(packages / "gzip" / "merged_model.tar.gz", tmp_path)
    with pytest.raises(InputError, match=r"manifest\.json is missing"):
        unpack([tmp_path / "merged_model.tar.gz"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_download_cut_short_says_to_go_on(packages: Path, tmp_path: Path) -> None:
    shutil.copytree(packages / "parts", tmp_path / "package")
    part = sorted((tmp_path / "package").glob("*.part-*"))[1]
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(DamageError, match="cut short") as caught:
        unpack([tmp_path / "package"], tmp_path / "out")
    assert caught.value.exit_code == ExitCode.ANSWER_IS_NO
    assert caught.value.remedy == "go on fetching it"
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_told_first(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasmith.packaging import unpack as module

    def full(folder: Path, needed: int, doing: str) -> None:
        raise DiskError("too little disk space", where=folder)

    monkeypatch.setattr(module, "require_disk", full)
    with pytest.raises(DiskError):
        unpack([packages / "gzip"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize(
    ("text", "size"), [("500M", 500_000_000), ("2GB", 2_000_000_000), ("1GiB", 1 << 30), ("4096", 4096)]
)
def test_sizes_of_parts(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "10", "five", "-3M", "1.5G", "2TB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)
