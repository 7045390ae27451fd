"""A run whose models run on a cluster: the same package as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lorasmith
from lorasmith.errors import UsageError
from lorasmith.executors.ray import Cluster
from lorasmith.files.digests import hash_file
from lorasmith.files.jsonl import write_rows
from lorasmith.options import RunOptions
from lorasmith.runs import step as steps
from lorasmith.runs.step import RunContext
from tests.executors.nearby import Nearby
from tests.tiny import save_adapter, save_base, tiny_rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    save_adapter(folder / "adapter", save_base(folder / "base"))
    write_rows(folder / "test.jsonl", tiny_rows(8))
    return {"base": folder / "base", "adapter": folder / "adapter", "test_set": folder / "test.jsonl"}


def test_a_run_on_a_cluster_packs_the_same_bytes(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lorasmith.run(**inputs, output=tmp_path / "here")
    executor = Nearby()
    monkeypatch.setattr(steps, "make_executor", lambda options: executor)
    lorasmith.run(**inputs, output=tmp_path / "there", executor="ray", workers=2)
    # Validation of three models and the merge; the comparison finds the states that validation kept.
    assert executor.opened == ["open_scoring", "open_scoring", "open_merging", "open_scoring"]
    for name in ("validation_results.tar.gz", "merged_model.tar.gz"):
        assert hash_file(tmp_path / "there/package" / name) == hash_file(tmp_path / "here/package" / name)
    kept = {path.name for path in (tmp_path / "there").rglob("*.chunks.jsonl")}
    assert kept == {f"{name}.chunks.jsonl" for name in ("base", "adapter", "merged", "behaviour")}
    assert not list((tmp_path / "here").rglob("*.chunks.jsonl"))


def test_the_executor_of_a_run_is_the_one_that_was_asked_for(inputs: dict[str, Any], tmp_path: Path) -> None:
    asked = RunOptions.make(
        {
            **inputs,
            "output": tmp_path / "run",
            "executor": "ray",
            "ray_address": "auto",
            "workers": 3,
            "worker_threads": 2,
            "worker_gpus": 0.5,
        }
    )
    executor = RunContext(asked).executor
    assert executor == Cluster(address="auto", workers=3, threads=2, gpus=0.5)
    with pytest.raises(UsageError, match="--workers without a cluster"):
        RunOptions.make({**inputs, "output": tmp_path / "run", "workers": 3})
