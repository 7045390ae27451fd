"""Benchmarks beyond the guide's five are built where they are named, from the rows that are for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasmith.data.rows import read_examples
from lorasmith.files.atomic import read_record
from lorasmith.records.dataset import DatasetFindings
from lorasmith.testset.build import build
from tests.benchmarks.layouts import case_file, write_layout
from tests.testset.invented import GSM8K, mmlu_row, refused, write

MORE = {"ARC": "hub", "GSM8K": "jsonl", "HellaSwag": "original", "MBPP": "full", "MMLU-Pro": "jsonl"}


def layout_of(name: str, wanted: str) -> dict[str, Any]:
    return next(shape for shape in case_file(name)["layouts"] if shape["name"] == wanted)


def findings(output: Path) -> DatasetFindings:
    return read_record(output.parent / "findings.json", DatasetFindings)


@pytest.fixture
def more(five: Path) -> Path:
    """The five, and the others beside them."""
    for name, shape in MORE.items():
        write_layout(five, layout_of(name, shape))
    return five


def test_the_five_are_built_and_what_else_lies_there_is_noted(more: Path, tmp_path: Path) -> None:
    statistics = build(more, tmp_path / "t.jsonl", samples_per_benchmark=5)
    assert set(statistics.by_source) == {"DROP", "GPQA", "HumanEval", "MATH", "MMLU"}
    notes = {finding.message.split()[0]: finding for finding in findings(tmp_path / "t.jsonl").findings}
    assert set(notes) == set(MORE)
    assert {finding.code for finding in notes.values()} == {"not-asked-for"}
    assert all("--only" in str(finding.remedy) for finding in notes.values())


def test_those_that_are_named_are_built(more: Path, tmp_path: Path) -> None:
    statistics = build(more, tmp_path / "t.jsonl", only=["gsm8k", "mmlu-pro", "ARC", "HellaSwag", "MBPP"])
    assert set(statistics.by_source) == set(MORE)
    examples = {example.metadata.source: example for example in read_examples(tmp_path / "t.jsonl")}
    assert examples["ARC"].metadata.extra()["subdomain"] == "ARC-Challenge"
    assert examples["ARC"].metadata.difficulty == "hard"
    assert not any(found.code == "not-asked-for" for found in findings(tmp_path / "t.jsonl").findings)


def test_a_file_that_names_a_longer_benchmark_is_not_taken_for_the_shorter_one(tmp_path: Path) -> None:
    write_layout(tmp_path / "in", layout_of("MMLU-Pro", "jsonl"))
    assert build(tmp_path / "in", tmp_path / "t.jsonl", only=["MMLU-Pro"]).by_source == {"MMLU-Pro": 3}
    write(tmp_path / "wrong" / "mmlu_pro.jsonl", [mmlu_row(number) for number in range(3)])
    (tmp_path / "other").mkdir()
    found = refused(tmp_path / "wrong", tmp_path / "other", ["MMLU-Pro"], "wrong-content")
    assert any("name says MMLU-Pro, the rows are MMLU" in finding.message for finding in found.findings)


def test_tasks_that_the_authors_learn_from_are_kept_out_and_counted(tmp_path: Path) -> None:
    rows = layout_of("MBPP", "full")["rows"]
    others = [{**rows[0], "task_id": number, "text": f"Write function {number}."} for number in (1, 511, 974)]
    write(tmp_path / "in" / "mbpp.jsonl", [*rows, *others])
    build(tmp_path / "in", tmp_path / "t.jsonl", only=["MBPP"])
    assert [example.metadata.record_id for example in read_examples(tmp_path / "t.jsonl")] != []
    assert {example.metadata.record_id for example in read_examples(tmp_path / "t.jsonl")} == {"11", "12"}
    [note] = [one for one in findings(tmp_path / "t.jsonl").findings if one.code == "not-for-tests"]
    assert note.severity == "note" and "3 rows" in note.message and "11 to 510" in note.message
    assert [row.row for row in findings(tmp_path / "t.jsonl").rejected] == [3, 4, 5]


def test_hellaswag_is_taken_from_the_split_that_has_labels(tmp_path: Path) -> None:
    rows = layout_of("HellaSwag", "hub")["rows"]
    write(tmp_path / "in" / "hellaswag_val.jsonl", rows)
    write(tmp_path / "in" / "hellaswag_test.jsonl", [{**row, "label": ""} for row in rows])
    build(tmp_path / "in", tmp_path / "t.jsonl", only=["HellaSwag"])
    assert len(read_examples(tmp_path / "t.jsonl")) == 2
    (tmp_path / "in" / "hellaswag_val.jsonl").unlink()
    found = refused(tmp_path / "in", tmp_path, ["HellaSwag"], "rejected-rows")
    assert "not published" in found.rejected[0].reason


def test_wikihows_marks_are_cleaned_away(tmp_path: Path) -> None:
    write_layout(tmp_path / "in", layout_of("HellaSwag", "original"))
    build(tmp_path / "in", tmp_path / "t.jsonl", only=["HellaSwag"])
    by_origin = {
        example.metadata.extra()["subdomain"]: example for example in read_examples(tmp_path / "t.jsonl")
    }
    wikihow, activitynet = by_origin["wikihow"], by_origin["activitynet"]
    assert wikihow.prompt == "Home and Garden: How to plant an invented bush. Dig. The hole has to be deep."
    assert wikihow.metadata.extra()["choices"][:2] == [" Sing to it.", "Boil the bush. Eat."]
    assert activitynet.prompt == "Planting a tree: A man digs a hole. He"


def test_gsm8k_under_its_own_name_is_read(tmp_path: Path) -> None:
    write(tmp_path / "in" / "gsm8k.jsonl", [GSM8K])
    build(tmp_path / "in", tmp_path / "t.jsonl", only=["GSM8K"])
    [example] = read_examples(tmp_path / "t.jsonl")
    assert example.prompt.startswith(GSM8K["question"]) and "####" in example.prompt
    assert example.metadata.extra()["final_answer"] == "7" and example.response == GSM8K["answer"]
