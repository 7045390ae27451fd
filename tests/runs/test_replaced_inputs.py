"""Base, adapter or an own file replaced while a run is at work: the first stage to see it stops the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import lorasmith
from lorasmith.errors import InputError
from lorasmith.files.digests import seal_run
from lorasmith.files.jsonl import write_rows
from lorasmith.merging import merge as merging
from lorasmith.packaging.verify import verify
from lorasmith.progress import Unwatched
from lorasmith.records.base import Finding
from tests.samples import sample_run, sha
from tests.tiny import save_adapter, save_base, tiny_rows


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    write_rows(tmp_path / "test.jsonl", tiny_rows(4))
    return {
        "base": tmp_path / "base",
        "adapter": tmp_path / "adapter",
        "test_set": tmp_path / "test.jsonl",
        "output": tmp_path / "run",
    }


class AtStep(Unwatched):
    """Does something once, just before the step of a title."""

    def __init__(self, title: str, change: Callable[[], None]) -> None:
        self.title, self.change = title, change

    def step(self, number: int, total: int, title: str) -> None:
        if title == self.title:
            self.change()


def scale(file: Path, factor: float) -> None:
    tensors = {name: tensor * factor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


ADAPTER, BASE = "adapter/adapter_model.safetensors", "base/model.safetensors"
MERGED, SCORES = "run/merged/model.safetensors", "run/validation/adapter.json"


@pytest.mark.parametrize(
    ("step", "file"),
    [
        ("Validate LoRA model", BASE),
        ("Merge LoRA weights", ADAPTER),
        ("Merge LoRA weights", BASE),
        ("Prove the weights", ADAPTER),
        ("Validate merged model", MERGED),
        ("Compare adapter and merged model", ADAPTER),
        ("Gates", SCORES),
        ("Report and package", MERGED),
    ],
)
def test_the_first_stage_that_reads_another_file_stops_the_run(
    step: str, file: str, inputs: dict[str, Any], tmp_path: Path
) -> None:
    place = tmp_path / file

    def change() -> None:
        if file == SCORES:
            place.write_text(place.read_text().replace('"loss": ', '"loss": 1', 1))
        else:
            scale(place, 1.5)

    with pytest.raises(InputError, match="changed while the run was at work") as raised:
        lorasmith.run(**inputs, watcher=AtStep(step, change))
    assert raised.value.where and Path(raised.value.where) in (place, *place.parents)
    assert "SHA-256" in (raised.value.expected or "")
    assert not (tmp_path / "run" / "package").exists()


def test_the_same_command_takes_what_was_changed_as_it_is_now(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        watcher = AtStep("Prove the weights", lambda: scale(tmp_path / ADAPTER, 1.5))
        lorasmith.run(**inputs, watcher=watcher)
    assert lorasmith.run(**inputs).weights.grade == "exact"
    assert not verify(tmp_path / "run")


def test_an_adapter_that_was_put_back_after_the_merge_is_noticed_by_what_the_merge_read(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge, weights = merging.merge, tmp_path / ADAPTER

    def of_another_adapter(*arguments: Any, **options: Any) -> object:
        kept = weights.read_bytes()
        scale(weights, 1.5)
        try:
            return merge(*arguments, **options)
        finally:
            weights.write_bytes(kept)

    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match=r"about another adapter than run\.json"),
    ):
        patch.setattr(merging, "merge", of_another_adapter)
        lorasmith.run(**inputs)
    assert lorasmith.run(**inputs).weights.grade == "exact"


@pytest.mark.parametrize(
    ("file", "field", "what"),
    [
        ("merged/lorasmith_merge.json", "base_sha256", "base"),
        ("proof/weights.json", "merged_sha256", "merged model"),
        ("validation/adapter.json", "adapter_sha256", "adapter"),
        ("validation/merged.json", "model_sha256", "merged model"),
    ],
)
def test_verify_compares_what_the_records_were_made_from(
    file: str, field: str, what: str, tmp_path: Path
) -> None:
    run = sample_run(tmp_path / "run", count=5)
    seal_run(run)
    assert not verify(run)
    path = run / file
    body = json.loads(path.read_text())
    (body if field in body else body["model"])[field] = sha("another")
    path.write_text(json.dumps(body))
    seal_run(run)
    findings = [finding for finding in verify(run) if finding.code == "other-input"]
    assert findings and all(f"about another {what} than" in finding.message for finding in findings)
    shutil.rmtree(run)


class Stop(Exception):
    """Ends a run before its first step."""


def test_another_base_than_the_adapters_is_a_warning_before_the_first_step(inputs: dict[str, Any]) -> None:
    for folder, name, key, value in (
        ("adapter", "adapter_config.json", "base_model_name_or_path", "acme/Small-1B"),
        ("base", "config.json", "_name_or_path", "acme/Small-1B-Instruct"),
    ):
        file = inputs[folder] / name
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    told: list[object] = []

    class Told(Unwatched):
        def show(self, stage: str, record: object) -> None:
            told.append(record)

        def step(self, number: int, total: int, title: str) -> None:
            raise Stop

    with pytest.raises(Stop):
        lorasmith.run(**inputs, watcher=Told())
    (warning,) = told
    assert isinstance(warning, Finding) and warning.severity == "warning"
    assert "Small-1B-Instruct" in warning.message
