"""Whole commands on a cluster, most of them while its workers die: the bytes of one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith
from lorasmith.errors import CheckpointError, DataError, UsageError
from lorasmith.executors.base import Local
from lorasmith.executors.ray import Cluster
from lorasmith.files.digests import digest_folder
from lorasmith.followup.responses.cluster import group_size
from lorasmith.followup.responses.respond import respond
from lorasmith.models.generation.decoding import Sampling
from lorasmith.models.scorer import Scorer
from lorasmith.models.session import resolve_place
from lorasmith.options import RespondOptions, ScoringOptions
from lorasmith.progress import Advance, Progress, Unwatched
from lorasmith.records.scoring import ChunkRecord
from lorasmith.scoring.tasks import evaluate_tasks
from tests.scoring.test_tasks import drop, mmlu
from tests.tiny import save_adapter, save_base, tiny_rows

ray = pytest.importorskip("ray")

ROWS = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    save_base(folder / "base", max_shard_size="10KB")
    save_adapter(folder / "adapter", folder / "base")
    lorasmith.merge(folder / "base", folder / "adapter", folder / "merged")
    write(folder / "test.jsonl", tiny_rows(ROWS))
    write(folder / "tasks.jsonl", [mmlu(i) for i in range(9)] + [drop(i) for i in range(5)] + tiny_rows(2))
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chunks(path: Path) -> list[ChunkRecord]:
    return [ChunkRecord.model_validate_json(line) for line in path.read_text().splitlines()]


def killing(executor: Cluster) -> Progress:
    """Progress that kills a worker as soon as something is done: it has its next chunk in hand then."""
    left = 1

    @contextmanager
    def progress(label: str, *, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        def advance(count: int) -> None:
            nonlocal left
            if left and count and executor._pool:
                ray.kill(executor._pool._workers[0])
                left -= 1

        yield advance

    return progress


def test_a_validation_has_the_bytes_of_one_here(workers: Cluster, place: Path, tmp_path: Path) -> None:
    base, adapter, test_set = place / "base", place / "adapter", place / "test.jsonl"
    for name, executor in (("here", None), ("there", workers)):
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
    lines = chunks(tmp_path / "there/adapter.chunks.jsonl")
    assert sorted(row for line in lines for row in line.rows) == list(range(ROWS))
    assert len({line.conditions.label for line in lines}) == 1
    assert not (tmp_path / "here/adapter.chunks.jsonl").exists()


def test_a_worker_that_sees_other_files_says_so(place: Path, tmp_path: Path) -> None:
    base, test_set = place / "base", place / "test.jsonl"
    options = ScoringOptions(arithmetic="mkl")
    scorer = Scorer.load(base, test_set, options, resolve_place(options)[1])
    replica = scorer.replica
    assert replica.open().work.rows == scorer.work.rows
    assert replica.options.device == scorer.loaded.device.type  # not auto: a worker must not take another
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(ROWS, seed=1)))
    with pytest.raises(DataError, match="reads other rows"):
        replace(replica, test_set=str(other)).open()
    with pytest.raises(CheckpointError, match="finds other files"):
        replace(replica, model=str(save_base(tmp_path / "small", hidden_size=16))).open()


def test_a_validation_that_began_under_other_conditions_says_so(
    workers: Cluster, place: Path, tmp_path: Path
) -> None:
    """Begun here with two threads, ended there with one: no row is lost, none counted twice, all within
    the noise of float32 sums, and labelled."""
    base, adapter, test_set = place / "base", place / "adapter", place / "test.jsonl"

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
    mixed = lorasmith.validate(base, test_set, tmp_path / "out", executor=workers, **options)
    (finding,) = [one for one in mixed.findings if one.code == "mixed-hardware"]
    assert "2 threads" in finding.message and "1 thread" in finding.message
    lines = chunks(tmp_path / "out/adapter.chunks.jsonl")
    assert sorted(row for line in lines for row in line.rows) == list(range(ROWS))
    assert sum(line.conditions.threads == 2 for line in lines) >= 3
    alone = lorasmith.validate(base, test_set, tmp_path / "alone", **options)
    # float32 sums in another order differ by some 1e-7 of their size
    assert mixed.overall.loss == pytest.approx(alone.overall.loss, abs=1e-5)


def test_a_comparison_has_the_bytes_of_one_here(workers: Cluster, place: Path, tmp_path: Path) -> None:
    models = (place / "base", place / "adapter", place / "merged", place / "test.jsonl")
    options: dict[str, Any] = {"batch_size": 3, "device": "cpu", "arithmetic": "mkl", "generate": 6}
    lorasmith.compare(*models, tmp_path / "here.json", **options)
    lost = workers.losses
    lorasmith.compare(
        *models, tmp_path / "there.json", executor=workers, progress=killing(workers), **options
    )
    assert workers.losses > lost
    assert (tmp_path / "there.json").read_bytes() == (tmp_path / "here.json").read_bytes()
    lines = chunks(tmp_path / "there.chunks.jsonl")
    for part in ("adapter", "merged", "adapter texts", "merged texts"):
        assert sorted(row for line in lines if line.part == part for row in line.rows) == list(range(ROWS))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "here.json",
        "there.chunks.jsonl",
        "there.json",
    ]


def test_task_metrics_have_the_bytes_of_those_here(workers: Cluster, place: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "batch_size": 2,
        "device": "cpu",
        "arithmetic": "mkl",
        "adapter": place / "adapter",
    }
    evaluate_tasks(place / "base", place / "tasks.jsonl", tmp_path / "here", **options)
    lost = workers.losses
    evaluate_tasks(
        place / "base",
        place / "tasks.jsonl",
        tmp_path / "there",
        executor=workers,
        progress=killing(workers),
        **options,
    )
    assert workers.losses > lost
    for file in ("adapter_tasks.json", "adapter_tasks.parquet"):
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()
    parts = {line.part for line in chunks(tmp_path / "there/adapter_tasks.chunks.jsonl")}
    assert parts == {"answers", "choices"}


class Kills(Unwatched):
    """Kills all workers after the first answer, or breaks off after some."""

    def __init__(self, executor: Cluster, break_after: int | None = None) -> None:
        self.executor, self.break_after, self.rows = executor, break_after, 0

    @contextmanager
    def progress(self, label: str, *, total: int, unit: str) -> Iterator[Advance]:
        yield self.ended

    def ended(self, rows: int) -> None:
        self.rows += rows
        if self.break_after is not None and self.rows >= self.break_after:
            raise KeyboardInterrupt
        if self.rows == 1 and self.executor._pool:
            for worker in self.executor._pool._workers:
                ray.kill(worker)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.3, "top_k": 20, "seed": 7}], ids=["greedy", "drawn"]
)
def test_responses_are_those_of_one_process(
    workers: Cluster, place: Path, tmp_path: Path, sampling: dict[str, Any]
) -> None:
    options = RespondOptions(max_new_tokens=8, batch_size=2, device="cpu", **sampling)
    respond(place / "base", place / "test.jsonl", tmp_path / "here.jsonl", options=options)
    there = tmp_path / "there.jsonl"
    with pytest.raises(KeyboardInterrupt):  # the command is broken off, and given once more
        broken = Kills(workers, break_after=3)
        respond(
            place / "base", place / "test.jsonl", there, options=options, executor=workers, watcher=broken
        )
    before = broken.rows
    lost, watcher = workers.losses, Kills(workers)
    record = respond(
        place / "base", place / "test.jsonl", there, options=options, executor=workers, watcher=watcher
    )
    assert there.read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    assert watcher.rows == ROWS - before and workers.losses > lost  # what was answered is not answered again
    assert (record.rows, record.failed, record.findings) == (ROWS, 0, record.findings)
    done = sorted(row for line in chunks(tmp_path / "there.chunks.jsonl") for row in line.rows)
    assert done == list(range(ROWS))  # those of the command that was broken off as well


def test_groups_that_are_answered_as_a_whole_give_the_same_log_probabilities(
    workers: Cluster, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.followup.responses.work.GROUP_ROWS", 8)
    monkeypatch.setattr("lorasmith.followup.responses.respond.GROUP_ROWS", 8)
    options = RespondOptions(max_new_tokens=6, batch_size=4, top_logprobs=2, whole_groups=True, device="cpu")
    for name, executor in (("here", None), ("there", workers)):
        respond(
            place / "base",
            place / "test.jsonl",
            tmp_path / f"{name}.jsonl",
            options=options,
            executor=executor,
        )
    for ending in (".jsonl", ".logprobs.parquet"):
        assert (tmp_path / f"there{ending}").read_bytes() == (tmp_path / f"here{ending}").read_bytes()
    assert [len(line.rows) for line in chunks(tmp_path / "there.chunks.jsonl")].count(8) == 2


def test_groups_are_large_enough_to_batch_and_small_enough_to_share() -> None:
    assert group_size(100_000, 16, 10) == 128  # eight rounds of the slots
    assert group_size(320, 16, 10) == 16  # two groups for each worker, or one that fills its slots
    assert group_size(640, 16, 10) == 32
    assert group_size(8_000, 64, 1_000) == 8  # fewer rows than slots: each worker gets its share at once
    assert group_size(0, 16, 4) == 1


def test_an_engine_that_does_not_spread_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="vllm engine does not run on a cluster"):
        respond(
            place / "base",
            place / "test.jsonl",
            tmp_path / "r.jsonl",
            options=RespondOptions(engine="vllm"),
            executor=Cluster(),
        )


def test_shards_merged_in_parallel_have_the_bytes_of_those_here(
    workers: Cluster, place: Path, tmp_path: Path
) -> None:
    inputs = (place / "base", place / "adapter")
    lost = workers.losses
    for rounding, progress in (("nearest", killing(workers)), ("dithered", killing(workers))):
        here = lorasmith.merge(*inputs, tmp_path / f"{rounding}-here", rounding=rounding, seed=3)
        there = lorasmith.merge(
            *inputs,
            tmp_path / f"{rounding}-there",
            rounding=rounding,
            seed=3,
            executor=workers,
            progress=progress,
        )
        assert len(list((place / "base").glob("*.safetensors"))) > 3
        assert digest_folder(tmp_path / f"{rounding}-there") == digest_folder(tmp_path / f"{rounding}-here")
        assert there.model_dump(exclude={"direct_io"}) == here.model_dump(exclude={"direct_io"})
    assert workers.losses >= lost + 2
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_worker_whose_model_is_another_says_so(place: Path, tmp_path: Path) -> None:
    from lorasmith.followup.responses.cluster import open_responding
    from lorasmith.models.generation.decoding import GenerationLimits

    limits = GenerationLimits(4, frozenset([2]))
    with (
        pytest.raises(CheckpointError, match="finds other files"),
        open_responding(str(place / "base"), None, "0", limits, Sampling(), device="cpu"),
    ):
        pass
