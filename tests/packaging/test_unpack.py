"""The other end: what comes out is what went in, and nothing else ever comes out."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lorasmith.errors import DamageError, DiskError, ExitCode, InputError, UsageError
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


@pytest.mark.parametrize(
    ("text", "size"), [("500M", 500_000_000), ("2GB", 2_000_000_000), ("1GiB", 1 << 30), ("4096", 4096)]
)
def test_sizes_of_parts(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "10", "five", "-3M", "1.5G", "2TB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_what_is_missing_or_stands_unlisted_is_said(packages: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(packages / "gzip", package)
    assert unpack([package], tmp_path / "whole").findings == []
    (package / "bom.cdx.json").unlink()
    (package / "setup.py").write_text("boom")
    findings = unpack([package], tmp_path / "out").findings
    assert [(finding.severity, finding.code) for finding in findings] == [
        ("warning", "missing-file"),
        ("warning", "extra-file"),
    ]
    assert "bom.cdx.json" in findings[0].message
    assert "setup.py" in findings[1].message
    assert not (tmp_path / "out" / "setup.py").exists()
    assert verify(tmp_path / "out") == []


def test_an_archive_that_was_not_asked_for_need_not_be_there(packages: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(packages / "parts", package)
    for part in package.glob("merged_model*"):
        part.unlink()
    first = next(package.glob("validation_results*"))
    assert unpack([first], tmp_path / "out").findings == []
