"""What is remembered of other machines: a job is found by its beginning, whatever lies beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorasmith.errors import InputError, UsageError
from lorasmith.records.remote import RemoteJob
from lorasmith.remote.state import find_job, save_job, state_folder


def a_job(name: str, age: float) -> Path:
    save_job(
        RemoteJob(id=name, host="a@b", folder="~/x", command=["merge"], inputs=[], outputs=[], extras=[])
    )
    path = state_folder() / "jobs" / f"{name}.json"
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_a_job_is_found_by_its_beginning_or_as_the_newest() -> None:
    with pytest.raises(InputError, match="no job is known here"):
        find_job(None)
    a_job("aa11", 10)
    a_job("ab22", 5)
    assert find_job(None).id == "ab22" and find_job("aa").id == "aa11"
    for name, count in (("a", 2), ("c", 0)):
        with pytest.raises(UsageError, match=f"the beginning of {count} jobs"):
            find_job(name)


def test_a_damaged_record_is_in_the_way_of_its_own_job_alone() -> None:
    a_job("aa11", 10)
    a_job("ab22", 5).write_bytes(b"{")
    assert find_job("aa").id == "aa11"
    for name in ("ab", None):  # never another job in its place
        with pytest.raises(InputError, match="JSON"):
            find_job(name)
