"""Comparison, task metrics and responses computed in other processes: the bytes of one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith
from lorasmith.files.jsonl import write_rows
from lorasmith.followup.responses.cluster import ClusterEngine
from lorasmith.followup.responses.engines import TransformersEngine
from lorasmith.followup.responses.respond import respond
from lorasmith.options import RespondOptions
from lorasmith.progress import Advance, Unwatched
from lorasmith.records.followup import RespondRecord
from lorasmith.records.scoring import ChunkRecord, Conditions
from lorasmith.scoring.tasks import evaluate_tasks
from tests.executors.nearby import Nearby
from tests.scoring.test_tasks import drop, mmlu
from tests.tiny import save_adapter, save_base, tiny_rows

ROWS = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("specs")
    save_base(folder / "base")
    save_adapter(folder / "adapter", folder / "base")
    lorasmith.merge(folder / "base", folder / "adapter", folder / "merged")
    write_rows(folder / "test.jsonl", tiny_rows(ROWS))
    write_rows(folder / "tasks.jsonl", [*(mmlu(i) for i in range(5)), *(drop(i) for i in range(3))])
    return folder


def chunks(path: Path) -> list[ChunkRecord]:
    return [ChunkRecord.model_validate_json(line) for line in path.read_text().splitlines()]


def test_a_comparison_has_the_bytes_of_one_here(place: Path, tmp_path: Path) -> None:
    models = (place / "base", place / "adapter", place / "merged", place / "test.jsonl")
    options: dict[str, Any] = {"batch_size": 3, "device": "cpu", "arithmetic": "mkl", "generate": 6}
    lorasmith.compare(*models, tmp_path / "here.json", **options)
    lorasmith.compare(*models, tmp_path / "there.json", executor=Nearby(), **options)
    assert (tmp_path / "there.json").read_bytes() == (tmp_path / "here.json").read_bytes()
    lines = chunks(tmp_path / "there.chunks.jsonl")
    for part in ("adapter", "merged", "adapter texts", "merged texts"):
        assert sorted(row for line in lines if line.part == part for row in line.rows) == list(range(ROWS))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["here.json", "there.chunks.jsonl", "there.json"]


def test_states_of_two_kinds_of_machines_label_a_comparison(place: Path, tmp_path: Path) -> None:
    """The adapter was validated under one kind of conditions, the merged model under another."""

    class Otherwise(Nearby):
        def map_chunks(self, *arguments: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                kind = "lorasmith.models.scoring.conditions_of"
                patch.setattr(kind, lambda device: real(device).model_copy(update={"processor": "another"}))
                yield from super().map_chunks(*arguments)

    from lorasmith.models.device import conditions_of as real

    options: dict[str, Any] = {"device": "cpu", "arithmetic": "mkl", "states": tmp_path / "states"}
    rows = place / "test.jsonl"
    lorasmith.validate(place / "base", rows, tmp_path, adapter=place / "adapter", **options)
    lorasmith.validate(place / "merged", rows, tmp_path, role="merged", executor=Otherwise(), **options)
    models = (place / "base", place / "adapter", place / "merged", rows)
    proof = lorasmith.compare(*models, tmp_path / "proof.json", **options)
    (finding,) = [one for one in proof.findings if one.code == "mixed-hardware"]
    assert "another" in finding.message
    kinds = {(line.part, line.conditions.processor) for line in chunks(tmp_path / "proof.chunks.jsonl")}
    assert {part for part, processor in kinds if processor == "another"} == {"merged"}


def test_task_metrics_have_the_bytes_of_those_here(place: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 2, "device": "cpu", "arithmetic": "mkl"}
    arguments = (place / "base", place / "tasks.jsonl")
    evaluate_tasks(*arguments, tmp_path / "here", adapter=place / "adapter", **options)
    evaluate_tasks(*arguments, tmp_path / "there", adapter=place / "adapter", executor=Nearby(), **options)
    for file in ("adapter_tasks.json", "adapter_tasks.parquet"):
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()
    assert {line.part for line in chunks(tmp_path / "there/adapter_tasks.chunks.jsonl")} == {
        "answers",
        "choices",
    }


@pytest.mark.parametrize("removed", [None, "generation_config.json"])
def test_a_cluster_knows_of_a_model_what_its_engine_knows(
    place: Path, tmp_path: Path, removed: str | None
) -> None:
    """Without loading it: when an answer ends, how much room there is, in which type it computes."""
    shutil.copytree(place / "base", tmp_path / "base")
    if removed:
        (tmp_path / "base" / removed).unlink()
    here = TransformersEngine(tmp_path / "base", None, device="cpu", dtype="auto", batch_size=None)
    there = ClusterEngine(Nearby(), tmp_path / "base", None, device="cpu")
    for template in ("chat", "plain"):
        assert there.stops(template) == here.stops(template)
    assert (there.name, there.context, there.dtype, there.slots) == (
        here.name,
        here.context,
        here.dtype,
        here.slots,
    )


def test_responses_made_under_several_conditions_are_labelled(place: Path, tmp_path: Path) -> None:
    class Alternating(Nearby):
        def map_chunks(self, *arguments: Any) -> Any:
            log = arguments[-1]
            for count, (rows, answers) in enumerate(super().map_chunks(*arguments)):
                log.note(rows, Conditions(device="cpu", processor=f"kind {count % 2}", threads=1))
                yield rows, answers

    record = respond(
        place / "base",
        place / "test.jsonl",
        tmp_path / "r.jsonl",
        options=RespondOptions(max_new_tokens=3, batch_size=1, device="cpu"),
        executor=Alternating(),
    )
    (finding,) = [one for one in record.findings if one.code == "mixed-hardware"]
    assert "kind 0" in finding.message and "kind 1" in finding.message
    lines = chunks(tmp_path / "r.chunks.jsonl")
    assert sorted(row for line in lines for row in line.rows) == list(range(ROWS))


class Elsewhere(Nearby):
    """A cluster of another processor."""

    def __init__(self, processor: str) -> None:
        super().__init__()
        self.processor = processor

    def map_chunks(self, *arguments: Any) -> Any:
        log = arguments[-1]
        for rows, answers in super().map_chunks(*arguments):
            log.note(rows, Conditions(device="cpu", processor=self.processor, threads=1))
            yield rows, answers


class BreaksOff(Unwatched):
    """The command ends after so many rows."""

    def __init__(self, rows: int) -> None:
        self.left = rows

    @contextmanager
    def progress(self, label: str, *, total: int, unit: str) -> Iterator[Advance]:
        yield self.ended

    def ended(self, rows: int) -> None:
        self.left -= rows
        if self.left <= 0:
            raise KeyboardInterrupt


def test_a_command_that_goes_on_elsewhere_keeps_what_computed_the_first_answers(
    place: Path, tmp_path: Path
) -> None:
    """Begun on one cluster, gone on with in this process, ended on another cluster; then more rows come."""
    data, output = tmp_path / "rows.jsonl", tmp_path / "r.jsonl"
    lines = (place / "test.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[2:]))
    options = RespondOptions(max_new_tokens=3, batch_size=1, device="cpu")

    def go_on(executor: Nearby | None, break_after: int | None = None) -> RespondRecord:
        watcher = BreaksOff(break_after) if break_after else None
        return respond(place / "base", data, output, options=options, executor=executor, watcher=watcher)

    for executor in (Elsewhere("one"), None):
        with pytest.raises(KeyboardInterrupt):
            go_on(executor, break_after=3)
    record = go_on(Elsewhere("two"))
    told = {line.conditions.processor: line.rows for line in chunks(tmp_path / "r.chunks.jsonl")}
    here = next(name for name in told if name not in ("one", "two"))
    counts = dict.fromkeys(("one", here, "two"), 0)
    for line in chunks(tmp_path / "r.chunks.jsonl"):
        counts[line.conditions.processor] += len(line.rows)
    assert counts == {"one": 3, here: 3, "two": ROWS - 2 - 6}
    (finding,) = [one for one in record.findings if one.code == "mixed-hardware"]
    assert "one" in finding.message and "two" in finding.message
    # Two rows more, above the others: the earlier ones keep what is known of them, at their new places.
    before = {key: line.conditions for line in chunks(tmp_path / "r.chunks.jsonl") for key in line.keys or ()}
    data.write_text("".join(lines))
    go_on(Elsewhere("two"))
    after = chunks(tmp_path / "r.chunks.jsonl")
    assert sorted(row for line in after for row in line.rows) == list(range(ROWS))
    found = {key: line.conditions for line in after for key in line.keys or ()}
    assert {key: found[key] for key in before} == before and len(found) == ROWS


def test_an_extraction_in_one_process_that_changes_is_labelled_too(place: Path, tmp_path: Path) -> None:
    options = RespondOptions(max_new_tokens=3, batch_size=1, device="cpu")
    threads = torch.get_num_threads()

    def go_on(break_after: int | None = None) -> RespondRecord:
        watcher = BreaksOff(break_after) if break_after else None
        return respond(
            place / "base", place / "test.jsonl", tmp_path / "r.jsonl", options=options, watcher=watcher
        )

    with pytest.raises(KeyboardInterrupt):
        go_on(break_after=4)
    torch.set_num_threads(threads + 1)
    try:
        record = go_on()
    finally:
        torch.set_num_threads(threads)
    assert [one.code for one in record.findings].count("mixed-hardware") == 1
    lines = chunks(tmp_path / "r.chunks.jsonl")
    assert sorted(len(line.rows) for line in lines) == [4, ROWS - 4]
