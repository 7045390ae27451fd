"""A cluster of several nodes: the bytes of this process, nodes killed in the middle, no row lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorasmith
from lorasmith.errors import CheckpointError, MemoryLimitError, RemoteError, UsageError
from lorasmith.executors.base import Recipe, make_executor
from lorasmith.executors.local import work_through
from lorasmith.executors.ray import Cluster
from lorasmith.files.journal import Journal
from tests.executors.squares import Squares
from tests.tiny import save_adapter, save_base, tiny_rows

ray = pytest.importorskip("ray")

CHUNKS = [(start, start + 1, start + 2) for start in range(0, 36, 3)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes on this machine, of one processor each."""
    from ray.cluster_utils import Cluster as Nodes

    store = 80 << 20
    head = {"num_cpus": 1, "object_store_memory": store, "include_dashboard": False}
    nodes = None
    for last in (False, False, True):  # Ray gives a node 30 s to come up, which a busy machine may exceed
        try:
            nodes = Nodes(initialize_head=True, head_node_args=head)
            break
        except Exception:
            if last:
                raise
    nodes.add_node(num_cpus=1, object_store_memory=store)
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    ray.init(
        address=nodes.address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": environment},
    )
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def through(executor: Cluster, journal: Journal | None = None, **settings: Any) -> dict[int, int]:
    recipe = Recipe("tests.executors.squares:open_squares", settings)
    found: dict[int, int] = {}
    for rows, values in executor.work_through(CHUNKS, Squares(**settings), journal, recipe):
        assert not set(rows) & set(found), "a row came twice"
        found.update(zip(rows, values, strict=True))
    return found


WANTED = {row: row * row for row in range(36)}


def test_all_chunks_come_from_all_nodes(cluster: Any) -> None:
    executor = Cluster(threads=1)
    assert through(executor) == WANTED
    assert executor.losses == 0
    (kind,) = executor.hardware()
    assert kind.endswith("1 threads")


def test_a_node_that_dies_costs_its_chunk_in_flight_only(cluster: Any, tmp_path: Path) -> None:
    extra = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    executor = Cluster(threads=1)
    with Journal(tmp_path / "journal", "key", {}) as journal:
        found: dict[int, int] = {}
        marks = tmp_path / "marks"
        marks.mkdir()
        settings = {"marks": str(marks), "awaited": extra.node_id}
        recipe = Recipe("tests.executors.squares:open_squares", settings)
        for rows, values in executor.work_through(CHUNKS, Squares(), journal, recipe):
            found.update(zip(rows, values, strict=True))
            if extra is not None:  # it is at work on a chunk, or no other would have come to its end
                cluster.remove_node(extra, allow_graceful=False)
                extra = None
        assert found == WANTED
        assert executor.losses >= 1
        assert len(list(journal.entries())) == len(CHUNKS)  # each chunk was computed to its end once


def test_a_chunk_that_kills_its_workers_is_held_responsible(cluster: Any) -> None:
    with pytest.raises(RemoteError, match="died over one chunk"):
        through(Cluster(threads=1), kill_on=7)


def test_chunks_that_do_not_fit_are_split_as_they_are_here(cluster: Any) -> None:
    assert through(Cluster(threads=1), largest=2) == WANTED
    local = dict(work_through(CHUNKS, Squares(largest=2)))
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


def test_a_validation_has_the_bytes_of_one_here(cluster: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    test_set = tmp_path / "test.jsonl"
    test_set.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(24)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, executor in (("here", None), ("there", Cluster(threads=1))):
            lorasmith.validate(
                base,
                test_set,
                tmp_path / name,
                adapter=adapter,
                batch_size=3,
                device="cpu",
                executor=executor,
            )
    finally:
        torch.set_num_threads(threads)
    for file in ("adapter.json", "adapter.parquet"):
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()
    assert not list((tmp_path / "there").glob(".*"))


def test_workers_of_several_kinds_are_labelled(tmp_path: Path) -> None:
    """With an executor that computes here and claims to be two machines."""

    class Two:
        def work_through(self, chunks: Any, work: Any, journal: Any, recipe: Recipe) -> Any:
            return work_through(chunks, work, journal)

        def hardware(self) -> list[str]:
            return ["A100, torch 2.13.0, 1 threads", "H100, torch 2.13.0, 1 threads"]

    base = save_base(tmp_path / "base")
    test_set = tmp_path / "test.jsonl"
    test_set.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(4)))
    found = lorasmith.validate(base, test_set, tmp_path / "out", executor=Two())
    (finding,) = [one for one in found.findings if one.code == "mixed-hardware"]
    assert "A100" in finding.message and "H100" in finding.message


def test_executors_by_name() -> None:
    assert isinstance(make_executor("ray", address="auto", workers=3), Cluster)
    assert make_executor("local").hardware() == []
    with pytest.raises(UsageError, match="no executor"):
        make_executor("spark")
    with pytest.raises(UsageError, match="without a cluster"):
        make_executor("local", workers=3)
    assert np.isfinite(Cluster().start_seconds)
