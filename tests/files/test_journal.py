"""Results of finished chunks survive a kill, and nothing else passes for them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest.mock import patch

import pytest

from lorasmith.errors import BusyError, DiskError
from lorasmith.files.journal import Journal


def fill(path: Path, key: str = "key") -> None:
    with Journal(path, key, {"route": "mkl"}) as journal:
        journal.add((0, 1), b"first\nwith a line end", None)
        journal.add((2,), b"second", 40)


def read(path: Path, key: str = "key") -> list[tuple[tuple[int, ...], bytes]]:
    with Journal(path, key, {"route": "other"}) as journal:
        return list(journal.entries())


BOTH = [((0, 1), b"first\nwith a line end"), ((2,), b"second")]


def test_what_was_added_comes_back_with_the_notes_of_the_first_run(tmp_path: Path) -> None:
    fill(tmp_path / "j")
    with Journal(tmp_path / "j", "key", {"route": "other"}) as journal:
        assert list(journal.entries()) == BOTH
        assert journal.notes == {"route": "mkl"}
        assert journal.limit == 40
        assert (0, 1) in journal
        assert (0,) not in journal
        assert journal.touches((1, 5))
        assert not journal.touches((5,))


def test_every_way_to_end_midway_keeps_a_sound_beginning(tmp_path: Path) -> None:
    fill(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for length in range(len(content)):
        path = tmp_path / "cut"
        path.write_bytes(content[:length])
        found = read(path)
        assert found == BOTH[: len(found)]
        with Journal(path, "key", {}) as journal:  # and it can be added to
            journal.add((9,), b"more", None)
        assert read(path)[-1] == ((9,), b"more")


def test_a_changed_byte_never_comes_back_as_a_result(tmp_path: Path) -> None:
    fill(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        (tmp_path / "j").write_bytes(damaged)
        for rows, packed in read(tmp_path / "j"):
            assert (rows, packed) in BOTH


def test_another_key_starts_anew(tmp_path: Path) -> None:
    fill(tmp_path / "j")
    assert read(tmp_path / "j", "another") == []
    assert read(tmp_path / "j") == []


def test_two_processes_do_not_share_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", "key", {}), pytest.raises(BusyError):
        Journal(tmp_path / "j", "key", {})


WRITTEN_BEFORE = (
    b'{"format": "lorasmith/journal/1", "key": "key", "notes": {"route": "mkl"}, "crc": 2841555776}\n'
    b'{"rows": [0, 1], "bytes": 5, "limit": 40, "made_by": {"threads": 2}, "crc": 2284428690}\nfirst\n'
)
"""A journal as version 0.1 left it: an update between two starts of a command loses no work."""


def test_a_journal_of_an_earlier_version_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(WRITTEN_BEFORE)
    with Journal(tmp_path / "j", "key", {}) as journal:
        assert list(journal.entries()) == [((0, 1), b"first")]
        assert (journal.notes, journal.limit) == ({"route": "mkl"}, 40)
        assert journal.made_by((0, 1)) == {"threads": 2}
    assert (tmp_path / "j").read_bytes() == WRITTEN_BEFORE


def test_a_full_disk_leaves_no_torn_result_that_would_hide_the_next(tmp_path: Path) -> None:
    write, room = os.write, 30

    def full(file: int, content: bytes) -> int:
        nonlocal room
        room -= (written := write(file, content[:room]) if room else 0)
        if not written:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written

    with Journal(tmp_path / "j", "key", {}) as journal:
        with patch("lorasmith.files.journal.os.write", full), pytest.raises(DiskError, match="disk is full"):
            journal.add((0, 1), b"no room for it", None)
        assert (0, 1) not in journal
        journal.add((2,), b"second", None)
    assert read(tmp_path / "j") == [((2,), b"second")]
