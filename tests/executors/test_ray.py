"""Chunks on a cluster: the results, splits and errors of this process."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorasmith.errors import CheckpointError, MemoryLimitError
from lorasmith.executors.base import WorkSpec, map_chunks
from lorasmith.executors.choose import make_executor
from lorasmith.executors.ray import Cluster, join
from lorasmith.files.journal import Journal
from lorasmith.options import ClusterOptions
from tests.executors.squares import CHUNKS, WANTED, Squares, open_squares, through

ray = pytest.importorskip("ray")


def test_all_chunks_come_from_all_nodes(workers: Cluster, tmp_path: Path) -> None:
    lost = workers.losses
    assert through(workers, marks=str(tmp_path), nodes=2) == WANTED
    assert workers.losses == lost
    assert len(list(tmp_path.iterdir())) == 2


def test_a_parcel_travels_with_its_chunk(workers: Cluster) -> None:
    spec = WorkSpec(open_squares, {}, parcel=lambda rows: {"bonus": sum(rows)})
    for rows, values in workers.map_chunks(CHUNKS[:4], Squares(), None, spec):
        assert values == [row * row + sum(rows) for row in rows]


def test_chunks_that_do_not_fit_are_split_as_they_are_here(workers: Cluster) -> None:
    assert through(workers, largest=2) == WANTED
    local = dict(map_chunks(CHUNKS, Squares(largest=2)))
    assert {row for rows in local for row in rows} == set(WANTED)
    with pytest.raises(MemoryLimitError, match="smallest piece"):
        through(workers, largest=0)


def test_an_error_in_a_worker_is_the_error_here(workers: Cluster) -> None:
    with pytest.raises(CheckpointError, match="a bad row") as raised:
        through(workers, fail_on=20)
    assert raised.value.where == "row 20" and raised.value.remedy == "mend it"


def test_what_the_journal_holds_is_not_computed_again(workers: Cluster, tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", "key", {}) as journal:
        for chunk in CHUNKS:
            journal.add(chunk, json.dumps([0, 0, 0]).encode(), None)
        assert set(through(workers, journal).values()) == {0}


def test_executors_by_name() -> None:
    cluster = ClusterOptions(executor="ray", ray_address="auto", workers=3)
    assert isinstance(make_executor(cluster), Cluster)
    assert make_executor(ClusterOptions()).places(WorkSpec(open_squares, {})) == 1
    assert np.isfinite(Cluster().start_seconds)


def test_joining_a_cluster_leaves_the_handler_of_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own would end a command with exit code 1 where 143 is promised."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    asked: dict[str, Any] = {}

    def init(**options: Any) -> None:
        asked.update(options)
        signal.signal(signal.SIGTERM, lambda *_: None)

    monkeypatch.setattr(ray, "init", init)
    own = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, own)
    try:
        join(None)
        assert signal.getsignal(signal.SIGTERM) is own
        assert asked["address"] == "local"  # not somebody else's cluster that happens to run here
    finally:
        signal.signal(signal.SIGTERM, before)
