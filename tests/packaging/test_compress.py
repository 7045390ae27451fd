"""Compressed bytes depend on the content alone: not on threads, not on how it arrives."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess

import pytest

from lorasmith.packaging.compress import BROKEN, COMPRESSIONS

COMMANDS = {"gzip": "gzip", "zstd": "zstd"}


def _content(size: int = 5_300_000) -> bytes:
    """Of 64 values: compressible, but not by finding repeats."""
    return random.Random(1).randbytes(size).translate(bytes(value & 63 for value in range(256)))


def _packed(kind: str, content: bytes, piece: int) -> bytes:
    target = io.BytesIO()
    with COMPRESSIONS[kind].writer(target) as write:
        for start in range(0, len(content), piece):
            write(content[start : start + piece])
    return target.getvalue()


@pytest.mark.parametrize("kind", sorted(COMPRESSIONS))
def test_how_the_bytes_arrive_does_not_show(kind: str) -> None:
    content = _content()
    assert len({_packed(kind, content, piece) for piece in (99_991, 1 << 20, 1_500_007, len(content))}) == 1


@pytest.mark.parametrize("kind", sorted(COMPRESSIONS))
def test_the_number_of_cores_does_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = _content()
    found = set()
    for cores in (1, 2, 3, 8):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        found.add(_packed(kind, content, 1 << 20))
    assert len(found) == 1


@pytest.mark.parametrize("kind", sorted(COMPRESSIONS))
@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, 3_000_001])
def test_it_comes_back(kind: str, size: int) -> None:
    content = _content()[:size]
    with COMPRESSIONS[kind].reader(io.BytesIO(_packed(kind, content, 70_000))) as read:
        assert read(size + 10) == content
        assert read(1) == b""


@pytest.mark.parametrize("kind", sorted(COMMANDS))
def test_the_common_tool_reads_it(kind: str) -> None:
    if shutil.which(COMMANDS[kind]) is None:
        pytest.skip(f"no {COMMANDS[kind]} on this machine")
    content = _content(300_000)
    assert subprocess.check_output([COMMANDS[kind], "-dc"], input=_packed(kind, content, 4096)) == content


@pytest.mark.parametrize("kind", sorted(COMMANDS))
def test_garbage_raises_what_readers_catch(kind: str) -> None:
    data = bytearray(_packed(kind, _content(3_000_000), 1 << 20))
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    with pytest.raises(BROKEN), COMPRESSIONS[kind].reader(io.BytesIO(bytes(data))) as read:
        while read(1 << 20):
            pass
