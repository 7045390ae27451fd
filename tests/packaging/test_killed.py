"""Killed at a dozen writes: what lies there is an old package, a new one or none; the next try succeeds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorasmith.packaging.pack import pack
from lorasmith.packaging.unpack import unpack
from lorasmith.packaging.verify import verify
from tests.faults import in_child, was_killed
from tests.samples import sample_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its package."""
    folder = tmp_path_factory.mktemp("whole")
    pack(sample_run(folder / "run", count=5), folder / "package", part_size=15_000)
    return folder


def _tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _some(total: int) -> list[int]:
    """A dozen of the writes, the first and the last among them."""
    return sorted({1, total, *range(2, total, max(1, total // 10))})


def _writes(folder: Path, work: object) -> int:
    assert in_child(work, die_at=None, count_to=folder / "writes") == 0  # type: ignore[arg-type]
    return int((folder / "writes").read_text())


def test_packing_survives_kill_9(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "package"

    def work() -> None:
        pack(whole / "run", output, part_size=15_000)

    total = _writes(tmp_path, work)
    shutil.rmtree(tmp_path / "out")
    assert total > 10
    for die_at in _some(total):
        assert was_killed(in_child(work, die_at=die_at))
        if output.exists():
            assert verify(output) == [], f"half a package after write {die_at}"
        work()
        assert _tree(output) == _tree(whole / "package")
        assert [path.name for path in output.parent.iterdir() if path != output] in ([], [".package.old"])
        if die_at % 2:
            shutil.rmtree(tmp_path / "out")


def test_unpacking_survives_kill_9(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def work() -> None:
        unpack([whole / "package"], output)

    total = _writes(tmp_path, work)
    right = _tree(output)
    shutil.rmtree(output)
    for die_at in _some(total):
        assert was_killed(in_child(work, die_at=die_at))
        if output.exists():
            assert verify(output) == [], f"half unpacked after write {die_at}"
        work()
        assert _tree(output) == right
        shutil.rmtree(output)


def test_adding_an_archive_survives_kill_9(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = sorted((whole / "package").glob("merged_model*"))[0]

    def work() -> None:
        unpack([whole / "package"], output)

    unpack([first], output)
    total = _writes(tmp_path, work)
    right = _tree(output)
    for die_at in _some(total):
        shutil.rmtree(output)
        unpack([first], output)
        assert was_killed(in_child(work, die_at=die_at))
        work()
        assert _tree(output) == right
