"""Workers and nodes of a cluster that come, stay, never come, or die in the middle of a chunk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import RemoteError
from lorasmith.executors.base import ChunkLog, WorkSpec
from lorasmith.executors.ray import Cluster
from lorasmith.files.journal import Journal
from tests.executors.nodes import add_node
from tests.executors.squares import CHUNKS, WANTED, Squares, open_squares, through

pytest.importorskip("ray")

NODE_KILLS = int(os.environ.get("LORASMITH_NODE_KILLS", "1"))


def test_workers_stay_within_a_block(cluster: Any) -> None:
    with Cluster(threads=1, workers=1) as executor:
        assert through(executor) == through(executor) == WANTED
        assert executor._pool is not None and len(executor._pool._workers) == 1
    assert executor._pool is None


def test_a_node_that_dies_costs_its_chunk_in_flight_only(cluster: Any, tmp_path: Path) -> None:
    again = 0
    for number in range(NODE_KILLS):
        extra = add_node(cluster)
        executor = Cluster(threads=1)
        marks = tmp_path / f"marks{number}"
        marks.mkdir()
        with Journal(tmp_path / f"journal{number}", "key", {}) as journal:
            squares: dict[int, int] = {}
            settings = {"marks": str(marks), "awaited": extra.node_id}
            spec = WorkSpec(open_squares, settings)
            for rows, values in executor.map_chunks(CHUNKS, Squares(), journal, spec):
                squares.update(zip(rows, values, strict=True))
                if extra is not None:  # it is at work on a chunk, or no other would have come to its end
                    cluster.remove_node(extra, allow_graceful=False)
                    extra = None
            assert squares == WANTED
            assert executor.losses >= 1
            again += executor.losses
            assert len(list(journal.entries())) == len(CHUNKS)  # each chunk was computed to its end once
    print(f"{NODE_KILLS} nodes killed at work, {again} chunks given to others, no row lost or twice")


def test_a_cluster_that_grows_is_used(cluster: Any, tmp_path: Path) -> None:
    """More workers than there is room for wait, which an autoscaler answers, and work when room comes."""
    settings = {"marks": str(tmp_path), "nodes": 3}
    spec = WorkSpec(open_squares, settings)
    squares: dict[int, int] = {}
    extra = None
    for rows, values in Cluster(threads=1, workers=3).map_chunks(CHUNKS, Squares(), None, spec):
        squares.update(zip(rows, values, strict=True))
        extra = extra or add_node(cluster)
    cluster.remove_node(extra)
    assert squares == WANTED
    assert extra is not None and extra.node_id in {mark.name for mark in tmp_path.iterdir()}


def test_a_chunk_that_kills_its_workers_is_held_responsible(cluster: Any) -> None:
    with pytest.raises(RemoteError, match="died over one chunk"):
        through(Cluster(threads=1), kill_on=7)


def test_no_worker_comes(cluster: Any) -> None:
    with pytest.raises(RemoteError, match="no worker has started"):
        through(Cluster(threads=64, workers=1, start_seconds=5.0))


def test_workers_of_several_kinds_are_labelled(cluster: Any, tmp_path: Path) -> None:
    extra = add_node(cluster, env_vars={"TEST_PROCESSOR": "other"})
    marks = tmp_path / "marks"
    marks.mkdir()
    settings = {"marks": str(marks), "nodes": 3}  # each of them takes part
    log, work = ChunkLog(), Squares()
    spec = WorkSpec(open_squares, settings)
    squares = dict(Cluster(threads=1, workers=3).map_chunks(CHUNKS, work, None, spec, log))
    cluster.remove_node(extra)
    assert {row for rows in squares for row in rows} == set(WANTED)
    assert {kind.split("; ")[1] for kind in log.kinds()} == {"other", "usual"}
    (finding,) = log.findings()
    assert finding.code == "mixed-hardware" and "other" in finding.message
