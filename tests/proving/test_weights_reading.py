"""What is hashed is what was read, in whatever order and from however many threads."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorasmith.errors import InputError
from lorasmith.proving.weights import model_folder
from lorasmith.proving.weights.model_folder import ProvenFile

SIZE = 5_000_003
"""Odd, so that the last direct read stops short; several parts above the least direct one."""

Order = Callable[[list[tuple[int, int]]], list[tuple[int, int]]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


def _parts(seed: int) -> list[tuple[int, int]]:
    """Parts of very different sizes that cover the file."""
    chance, parts, at = random.Random(seed), [], 0
    while at < SIZE:
        count = min(SIZE - at, chance.choice([1, 7, 4096, 70_001, 1_100_000, 1_500_001]))
        parts.append((at, count))
        at += count
    return parts


def _shuffled(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return random.Random(1).sample(parts, len(parts))


def _with_repeats_and_gaps(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    overlapping = [(start // 2, count) for start, count in parts[::3]]
    return random.Random(2).sample(parts[::2] + overlapping, len(parts[::2]) + len(overlapping))


@pytest.mark.parametrize("order", [list, _shuffled, _with_repeats_and_gaps])
@pytest.mark.parametrize("held", [64 << 20, 1 << 16], ids=["much may wait", "little may wait"])
@pytest.mark.parametrize("threads", [1, 5])
def test_parts_are_right_and_the_digest_is_the_files(
    file: Path, order: Order, held: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_folder, "_HELD_BYTES", held)
    monkeypatch.setattr(model_folder, "_GAP_BYTES", 300_001)
    whole, proven = file.read_bytes(), ProvenFile(file)
    asked = order(_parts(threads))
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda part: proven.read(*part).numpy().tobytes(), asked))
    assert all(
        part == whole[start : start + count] for (start, count), part in zip(asked, parts, strict=True)
    )
    assert proven.digest() == hashlib.sha256(whole).hexdigest()


def test_a_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    really = os.preadv

    def count(handle: int, views: list[memoryview], at: int) -> int:
        read.append(really(handle, views, at))
        return read[-1]

    monkeypatch.setattr(os, "preadv", count)
    proven = ProvenFile(file)
    for part in _parts(3):
        proven.read(*part)
    proven.digest()
    # Direct reads begin and end on pages: up to two more of them for each part.
    assert SIZE <= sum(read) <= SIZE + 2 * 4096 * len(_parts(3))


def test_without_direct_reads_the_page_cache_serves(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    proven = ProvenFile(file)
    assert proven.read(3, 2_000_000).numpy().tobytes() == file.read_bytes()[3:2_000_003]
    assert proven.digest() == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_read_that_the_disk_refuses_directly_is_done_through_the_cache(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proven = ProvenFile(file)
    plain = proven._file.fileno()
    really = os.preadv

    def refuse(handle: int, views: list[memoryview], at: int) -> int:
        if handle != plain:
            raise OSError(22, "Invalid argument")
        return really(handle, views, at)

    monkeypatch.setattr(os, "preadv", refuse)
    assert proven.read(0, SIZE).numpy().tobytes() == file.read_bytes()


def test_a_file_that_changes_meanwhile_has_no_digest(file: Path) -> None:
    proven = ProvenFile(file)
    proven.read(0, 1000)
    os.utime(file, ns=(1, 1))
    with pytest.raises(InputError, match="changed while it was read"):
        proven.digest()


def test_a_file_that_is_replaced_meanwhile_has_no_digest(file: Path) -> None:
    proven = ProvenFile(file)
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    other.replace(file)
    with pytest.raises(InputError, match="changed while it was read"):
        proven.digest()


def test_a_file_that_is_cut_meanwhile_says_where_it_ends(file: Path) -> None:
    proven = ProvenFile(file)
    os.truncate(file, 1_000_000)
    with pytest.raises(InputError, match="ends at byte 1,000,000"):
        proven.read(0, 2_000_000)
