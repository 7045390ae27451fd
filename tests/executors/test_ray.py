"""A cluster of several nodes: the bytes of this process, nodes killed in the middle, no row lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorasmith
from lorasmith.errors import CheckpointError, DataError, MemoryLimitError, RemoteError
from lorasmith.executors.base import ChunkLog, Local, WorkSpec, map_chunks
from lorasmith.executors.choose import make_executor
from lorasmith.executors.ray import Cluster, join
from lorasmith.files.journal import Journal
from lorasmith.models.scorer import Scorer
from lorasmith.models.session import ScoringOptions
from lorasmith.options import ClusterOptions
from lorasmith.records.scoring import ChunkRecord
from tests.executors.nodes import add_node
from tests.executors.squares import Squares, open_squares
from tests.tiny import save_adapter, save_base, tiny_rows

ray = pytest.importorskip("ray")

NODE_KILLS = int(os.environ.get("LORASMITH_NODE_KILLS", "1"))
CHUNKS = [(start, start + 1, start + 2) for start in range(0, 36, 3)]


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def chunk_records(path: Path) -> list[ChunkRecord]:
    return [ChunkRecord.model_validate_json(line) for line in path.read_text().splitlines()]


def through(executor: Cluster, journal: Journal | None = None, **settings: Any) -> dict[int, int]:
    spec = WorkSpec(open_squares, settings)
    found: dict[int, int] = {}
    for rows, values in executor.map_chunks(CHUNKS, Squares(**settings), journal, spec):
        assert not set(rows) & set(found), "a row came twice"
        found.update(zip(rows, values, strict=True))
    return found


WANTED = {row: row * row for row in range(36)}


def test_all_chunks_come_from_all_nodes(cluster: Any, tmp_path: Path) -> None:
    executor = Cluster(threads=1)
    assert through(executor, marks=str(tmp_path), nodes=2) == WANTED
    assert executor.losses == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_parcel_travels_with_its_chunk(cluster: Any) -> None:
    spec = WorkSpec(open_squares, {}, parcel=lambda rows: {"bonus": sum(rows)})
    for rows, values in Cluster(threads=1, workers=1).map_chunks(CHUNKS[:4], Squares(), None, spec):
        assert values == [row * row + sum(rows) for row in rows]


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
            found: dict[int, int] = {}
            settings = {"marks": str(marks), "awaited": extra.node_id}
            spec = WorkSpec(open_squares, settings)
            for rows, values in executor.map_chunks(CHUNKS, Squares(), journal, spec):
                found.update(zip(rows, values, strict=True))
                if extra is not None:  # it is at work on a chunk, or no other would have come to its end
                    cluster.remove_node(extra, allow_graceful=False)
                    extra = None
            assert found == WANTED
            assert executor.losses >= 1
            again += executor.losses
            assert len(list(journal.entries())) == len(CHUNKS)  # each chunk was computed to its end once
    print(f"{NODE_KILLS} nodes killed at work, {again} chunks given to others, no row lost or twice")


def test_a_cluster_that_grows_is_used(cluster: Any, tmp_path: Path) -> None:
    """More workers than there is room for wait, which an autoscaler answers, and work when room comes."""
    settings = {"marks": str(tmp_path), "nodes": 3}
    spec = WorkSpec(open_squares, settings)
    found: dict[int, int] = {}
    extra = None
    for rows, values in Cluster(threads=1, workers=3).map_chunks(CHUNKS, Squares(), None, spec):
        found.update(zip(rows, values, strict=True))
        extra = extra or add_node(cluster)
    cluster.remove_node(extra)
    assert found == WANTED
    assert extra is not None and extra.node_id in {mark.name for mark in tmp_path.iterdir()}


def test_a_chunk_that_kills_its_workers_is_held_responsible(cluster: Any) -> None:
    with pytest.raises(RemoteError, match="died over one chunk"):
        through(Cluster(threads=1), kill_on=7)


def test_chunks_that_do_not_fit_are_split_as_they_are_here(cluster: Any) -> None:
    assert through(Cluster(threads=1), largest=2) == WANTED
    local = dict(map_chunks(CHUNKS, Squares(largest=2)))
    assert {row for rows in local for row in rows} == set(WANTED)
    with pytest.raises(MemoryLimitError, match="smallest piece"):
        through(Cluster(threads=1), largest=0)


def test_an_error_in_a_worker_is_the_error_here(cluster: Any) -> None:
    with pytest.raises(CheckpointError, match="a bad row") as raised:
        through(Cluster(threads=1), fail_on=20)
    assert raised.value.where == "row 20" and raised.value.remedy == "mend it"


def test_no_worker_comes(cluster: Any) -> None:
    with pytest.raises(RemoteError, match="no worker has started"):
        through(Cluster(threads=64, workers=1, start_seconds=5.0))


def test_what_the_journal_holds_is_not_computed_again(cluster: Any, tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", "key", {}) as journal:
        for chunk in CHUNKS:
            journal.add(chunk, json.dumps([0, 0, 0]).encode(), None)
        assert set(through(Cluster(threads=1), journal).values()) == {0}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Base, adapter, test set."""
    folder = tmp_path_factory.mktemp("scored")
    base = save_base(folder / "base")
    adapter = save_adapter(folder / "adapter", base)
    test_set = folder / "test.jsonl"
    test_set.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(24)))
    return base, adapter, test_set


def test_a_validation_has_the_bytes_of_one_here(
    cluster: Any, scored: tuple[Path, ...], tmp_path: Path
) -> None:
    base, adapter, test_set = scored
    for name, executor in (("here", None), ("there", Cluster(threads=1))):
        with one_thread():
            lorasmith.validate(
                base,
                test_set,
                tmp_path / name,
                adapter=adapter,
                batch_size=3,
                device="cpu",
                executor=executor,
            )
    for file in ("adapter.json", "adapter.parquet"):
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()
    assert not list((tmp_path / "there").glob(".*"))
    lines = chunk_records(tmp_path / "there/adapter.chunks.jsonl")
    assert sorted(row for line in lines for row in line.rows) == list(range(24))
    assert len({line.conditions.label for line in lines}) == 1
    assert not (tmp_path / "here/adapter.chunks.jsonl").exists()


def test_a_worker_that_sees_other_files_says_so(scored: tuple[Path, ...], tmp_path: Path) -> None:
    base, _, test_set = scored
    options = ScoringOptions(arithmetic="mkl")
    scorer = Scorer.load(base, test_set, options, options.place()[1])
    replica = scorer.replica
    assert replica.open().work.rows == scorer.work.rows
    assert replica.options.device == scorer.loaded.device.type  # not auto: a worker must not take another
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(24, seed=1)))
    with pytest.raises(DataError, match="reads other rows"):
        replace(replica, test_set=str(other)).open()
    with pytest.raises(CheckpointError, match="finds other files"):
        replace(replica, model=str(save_base(tmp_path / "small", hidden_size=16))).open()


def test_workers_of_several_kinds_are_labelled(cluster: Any, tmp_path: Path) -> None:
    extra = add_node(cluster, env_vars={"TEST_PROCESSOR": "other"})
    marks = tmp_path / "marks"
    marks.mkdir()
    settings = {"marks": str(marks), "nodes": 3}  # each of them takes part
    log, work = ChunkLog(), Squares()
    spec = WorkSpec(open_squares, settings)
    found = dict(Cluster(threads=1, workers=3).map_chunks(CHUNKS, work, None, spec, log))
    cluster.remove_node(extra)
    assert {row for rows in found for row in rows} == set(WANTED)
    assert {kind.split("; ")[1] for kind in log.kinds()} == {"other", "usual"}
    (finding,) = log.findings()
    assert finding.code == "mixed-hardware" and "other" in finding.message


def test_a_validation_that_began_under_other_conditions_says_so(
    cluster: Any, scored: tuple[Path, ...], tmp_path: Path
) -> None:
    """Begun here with two threads, ended there with one: no row is lost, none counted twice, all within
    the noise of float32 sums, and labelled."""
    base, adapter, test_set = scored

    class Breaks(Local):
        def map_chunks(self, *arguments: Any) -> Any:
            for count, found in enumerate(super().map_chunks(*arguments)):
                if count == 3:
                    raise KeyboardInterrupt
                yield found

    options: dict[str, Any] = {"adapter": adapter, "batch_size": 3, "device": "cpu", "arithmetic": "mkl"}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            lorasmith.validate(base, test_set, tmp_path / "out", executor=Breaks(), **options)
    finally:
        torch.set_num_threads(threads)
    mixed = lorasmith.validate(base, test_set, tmp_path / "out", executor=Cluster(threads=1), **options)
    (finding,) = [one for one in mixed.findings if one.code == "mixed-hardware"]
    assert "2 threads" in finding.message and "1 thread" in finding.message
    lines = chunk_records(tmp_path / "out/adapter.chunks.jsonl")
    assert sorted(row for line in lines for row in line.rows) == list(range(24))
    assert sum(line.conditions.threads == 2 for line in lines) >= 3
    alone = lorasmith.validate(base, test_set, tmp_path / "alone", **options)
    # float32 sums in another order differ by some 1e-7 of their size
    assert mixed.overall.loss == pytest.approx(alone.overall.loss, abs=1e-5)


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
