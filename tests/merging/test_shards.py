"""Shards merged elsewhere, by workers that make the merge from its job: the same bytes, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lorasmith
from lorasmith.errors import CheckpointError, LorasmithError, RemoteError, UsageError
from lorasmith.executors.storage import files_digest
from lorasmith.files.digests import digest_folder, sha256_file
from lorasmith.files.jsonl import write_rows
from lorasmith.merging import shards
from lorasmith.merging.cluster import MergeJob, open_merging
from lorasmith.merging.folder import ShardDone
from lorasmith.merging.shards import ShardMerger
from tests.executors.nearby import Nearby
from tests.tiny import save_adapter, save_base, tiny_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    save_base(folder / "base", max_shard_size="30KB")
    save_adapter(folder / "adapter", folder / "base")
    lorasmith.merge(folder / "base", folder / "adapter", folder / "merged")
    write_rows(folder / "test.jsonl", tiny_rows(4))
    return folder


@pytest.mark.parametrize("rounding", ["nearest", "dithered"])
def test_the_bytes_are_those_of_a_merge_here(place: Path, tmp_path: Path, rounding: str) -> None:
    inputs = (place / "base", place / "adapter")
    here = lorasmith.merge(*inputs, tmp_path / "here", rounding=rounding, seed=3)
    there = lorasmith.merge(*inputs, tmp_path / "there", rounding=rounding, seed=3, executor=Nearby())
    assert digest_folder(tmp_path / "there") == digest_folder(tmp_path / "here")
    assert there == here
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "there"]


def test_a_parallel_merge_that_is_broken_off_goes_on(place: Path, tmp_path: Path) -> None:
    inputs = (place / "base", place / "adapter")
    asked: list[int] = []

    @contextmanager
    def breaking(label: str, *, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        def advance(count: int) -> None:
            asked.append(count)
            if len(asked) == 3:  # what was done before, the first shard, the second
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        lorasmith.merge(*inputs, tmp_path / "out", executor=Nearby(), progress=breaking)
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("*.safetensors")}
    assert len(done) == 2
    lorasmith.merge(*inputs, tmp_path / "out", executor=Nearby())
    assert digest_folder(tmp_path / "out") == digest_folder(place / "merged")
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == before for name, before in done.items())


def test_a_calibrated_merge_is_refused_on_a_cluster(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="calibrated merge runs in one process"):
        lorasmith.merge(
            place / "base",
            place / "adapter",
            tmp_path / "out",
            rounding="calibrated",
            calibration=place / "test.jsonl",
            executor=Nearby(),
        )
    assert not list(tmp_path.iterdir())


def test_a_merge_worker_without_the_storage_says_so(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    (folder / ".merge").mkdir(parents=True)
    (folder / ".merge" / "key").write_text("k")
    job = MergeJob(
        base=str(place / "base"),
        adapters=(str(place / "adapter"),),
        adapter_sha256=(digest_folder(place / "adapter"),),
        weights=(1.0,),
        precision="base",
        into="",
        dither_seed=None,
        folder=str(folder),
        key="k",
        files=files_digest([place / "base"]),
    )
    with open_merging(job) as merging:
        assert merging.run((0,)).done.file.path.endswith(".safetensors")
    for wrong, message in (
        ({"key": "another"}, "does not see the folder"),
        ({"folder": str(tmp_path / "none")}, "does not see the folder"),
        ({"files": "0"}, "finds other files"),
        ({"adapter_sha256": ("0",)}, "finds another adapter"),
    ):
        with (
            pytest.raises(LorasmithError, match=message),
            open_merging(replace(job, **wrong)),
        ):
            pass


def test_a_worker_that_read_another_base_is_found_out(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.merging.merge.known_sha256", sha256_file)
    real = ShardMerger.merge

    def elsewhere(self: ShardMerger, *arguments: Any) -> ShardDone:
        return real(self, *arguments).model_copy(update={"source_sha256": "0" * 64})

    monkeypatch.setattr(ShardMerger, "merge", elsewhere)
    with pytest.raises(CheckpointError, match="read another shard"):
        lorasmith.merge(place / "base", place / "adapter", tmp_path / "out", executor=Nearby())


def test_a_shard_that_is_not_seen_here_is_missed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ShardMerger.merge

    def lost(self: ShardMerger, *arguments: Any) -> ShardDone:
        done = real(self, *arguments)
        (self.folder / done.file.path).unlink()
        return done

    monkeypatch.setattr(ShardMerger, "merge", lost)
    monkeypatch.setattr(shards, "_SEEN_SECONDS", 0.0)
    with pytest.raises(RemoteError, match="not seen here"):
        lorasmith.merge(place / "base", place / "adapter", tmp_path / "out", executor=Nearby())
