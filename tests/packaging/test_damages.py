"""Hundreds of random damages to packages, unpacked packages and runs: each one is found."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from lorasmith.files.digests import open_seal, reseal, seal_run
from lorasmith.packaging.verify import verify
from tests.campaigns.damages import FOLDERS, KINDS, SEED, check, check_unpacking, prepare

TIMES = 18
"""Of each of the nine kinds, for each kind of folder; `make campaign` tries more."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its package in parts, and the same one unpacked."""
    return prepare(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run that may be changed."""
    return Path(shutil.copytree(whole / "run", tmp_path / "run"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_damage_is_found(whole: Path, folder: str) -> None:
    assert verify(whole / folder) == []
    chance = random.Random(SEED)
    missed = [text for kind in KINDS.values() for text in check(whole / folder, kind, TIMES, chance).missed]
    assert missed == []


def test_no_damaged_package_is_unpacked(whole: Path) -> None:
    chance = random.Random(7)
    wrong = [text for kind in KINDS.values() for text in check_unpacking(whole, kind, 7, chance).missed]
    assert wrong == []


def test_any_machine_can_check_a_run(run: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=run, check=True)


def test_a_run_that_did_not_end_is_no_sound_run(run: Path) -> None:
    open_seal(run)
    (finding,) = verify(run)
    assert (finding.code, finding.severity) == ("not-sealed", "error")


@pytest.mark.parametrize("name", ["run.json", "timing.json", "report.html", "package/SHA256SUMS"])
def test_files_that_no_record_names_are_checked_too(run: Path, name: str) -> None:
    (run / "report.html").write_text("<p>here</p>")
    seal_run(run)
    assert verify(run) == []
    (run / name).write_bytes((run / name).read_bytes().replace(b"e", b"c", 1))
    assert any(name in finding.message for finding in verify(run))


def test_a_page_made_again_is_listed_and_other_damage_stays_found(run: Path) -> None:
    (run / "report.html").write_text("<html></html>")
    (run / "run.json").write_text("{}")
    reseal(run, run / "report.html")
    assert [finding.where for finding in verify(run)] == ["run.json"]
    (run / "report.html").write_text("<html>changed</html>")
    assert {finding.where for finding in verify(run)} == {"run.json", "report.html"}


def test_a_page_elsewhere_changes_no_list(run: Path, tmp_path: Path) -> None:
    before = (run / "SHA256SUMS").read_bytes()
    (tmp_path / "page.html").write_text("x")
    reseal(run, tmp_path / "page.html")
    assert (run / "SHA256SUMS").read_bytes() == before


def test_another_package_in_its_place_is_noticed(run: Path, whole: Path, tmp_path: Path) -> None:
    from lorasmith.packaging.pack import pack

    shutil.rmtree(run / "package")
    pack(run, run / "package", compression="none")
    assert any("package/SHA256SUMS" in finding.message for finding in verify(run))
    reseal(run, run / "package")
    assert verify(run) == []
