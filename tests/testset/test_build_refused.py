"""Wrong content never passes: another benchmark under the name, empty levels, damaged files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lorasmith.errors import DataError
from lorasmith.testset.build import build
from tests.testset.invented import (
    GSM8K,
    code_row,
    findings_text,
    math_row,
    refused,
    write,
)


@pytest.mark.parametrize("name", ["gpqa", "math"])
def test_gsm8k_under_another_name_is_found(five: Path, tmp_path: Path, name: str) -> None:
    write(five / f"{name}.jsonl", [GSM8K] * 3)
    found = refused(five, tmp_path, [name], "wrong-content")
    [wrong] = [finding for finding in found.findings if finding.code == "wrong-content"]
    assert "GSM8K" in wrong.message and wrong.where == f"{name}.jsonl"
    assert str(wrong.expected).startswith(f"rows of {name.upper()}: ") and wrong.remedy


def test_many_wrong_files_in_a_benchmarks_folder_are_one_message_with_the_columns(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / "in" / "mmlu" / "test" / f"subject{number}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("query,reply\nWhat is it?,A thing\n")
    found = refused(tmp_path / "in", tmp_path, ["MMLU"], "wrong-content")
    [wrong] = [finding for finding in found.findings if finding.code == "wrong-content"]
    assert "20 files" in wrong.message and "query, reply" in wrong.message
    assert "question, choices" in str(wrong.expected) and wrong.where == "mmlu/test/subject0.csv"


def test_many_files_with_the_same_fault_are_one_message(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / "in" / "math" / f"{number}.jsonl", [math_row(number, solution="no box")] * 2)
    found = refused(tmp_path / "in", tmp_path, ["MATH"], "rejected-rows")
    [wrong] = [finding for finding in found.findings if finding.code == "rejected-rows"]
    assert wrong.message == "every row is unusable, in 20 files: the solution has no \\boxed{} answer"
    assert len(found.rejected) == 40


def test_another_file_in_a_benchmarks_folder_stops_nothing(tmp_path: Path) -> None:
    write(tmp_path / "in" / "math" / "test.jsonl", [math_row(number) for number in range(5)])
    write(tmp_path / "in" / "math" / "subjects.jsonl", [{"subject": "Algebra", "rows": 5}])
    assert build(tmp_path / "in", tmp_path / "t.jsonl", only=["MATH"]).examples == 5
    for number in range(2):
        write(tmp_path / "in" / "mmlu" / f"{number}.jsonl", [GSM8K])
    found = refused(tmp_path / "in", tmp_path, ["MATH"], "wrong-content")
    assert [one.message for one in found.findings if one.code == "wrong-content"] == [
        "the folder says MMLU, the rows are GSM8K, in 2 files"
    ]


def test_the_rows_of_a_table_without_a_header_are_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "in" / "gpqa").mkdir(parents=True)
    secret = "A question that nobody should find in any message, " * 3
    (tmp_path / "in" / "gpqa" / "part.csv").write_text(f'"{secret}",yes,no\n')
    found = refused(tmp_path / "in", tmp_path, ["GPQA"], "wrong-content")
    assert not any("nobody should" in str(finding) for finding in found.findings)


def test_one_benchmark_under_the_name_of_another_is_found(five: Path, tmp_path: Path) -> None:
    (five / "math.jsonl").write_bytes((five / "mmlu.jsonl").read_bytes())
    found = refused(five, tmp_path, ["MATH", "MMLU"], "wrong-content")
    assert any("name says MATH, the rows are MMLU" in finding.message for finding in found.findings)


def test_empty_levels_everywhere_are_found_and_can_be_accepted(tmp_path: Path) -> None:
    write(tmp_path / "in" / "math.jsonl", [math_row(number, level="") for number in range(20)])
    refused(tmp_path / "in", tmp_path, ["MATH"], "no-difficulty")
    output = tmp_path / "test.jsonl"
    statistics = build(tmp_path / "in", output, samples_per_benchmark=5, only=["MATH"], strict=False)
    assert statistics.by_difficulty == {"hard": 5}


def test_a_set_of_empty_rows_is_found(tmp_path: Path) -> None:
    empty = dict.fromkeys(math_row(0), "")
    write(tmp_path / "in" / "math.jsonl", [empty] * 4)
    found = refused(tmp_path / "in", tmp_path, ["MATH"], "rejected-rows")
    assert [row.row for row in found.rejected] == [1, 2, 3, 4]
    assert found.rejected[0].reason == "the field 'problem' is empty"
    with pytest.raises(DataError):
        build(tmp_path / "in", tmp_path / "t.jsonl", only=["MATH"], strict=False)


def test_a_rejected_row_stops_and_is_left_out_when_told_so(tmp_path: Path) -> None:
    rows = [math_row(number) for number in range(10)] + [math_row(10, solution="no box")]
    write(tmp_path / "in" / "math.jsonl", rows)
    found = refused(tmp_path / "in", tmp_path, ["MATH"], "rejected-rows")
    assert found.rejected[0].row == 11
    output = tmp_path / "test.jsonl"
    statistics = build(tmp_path / "in", output, samples_per_benchmark=11, only=["MATH"], strict=False)
    assert statistics.examples == 10
    assert {finding.code for finding in statistics.findings} == {"rejected-rows", "fewer-than-asked"}


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "lfs-pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "html-page": (b"<!DOCTYPE html>\n<html><body>Log in</body></html>", "download"),
    "utf-16": ('{"problem": 1}\n'.encode("utf-16"), "UTF-8"),
    "nul-bytes": (b'{"a": 1}\n' + bytes(100), "damaged"),
    "empty-file": (b"", "get it again"),
}


@pytest.mark.parametrize("code", BAD_FILES)
def test_files_that_are_no_data_are_found(tmp_path: Path, code: str) -> None:
    content, remedy = BAD_FILES[code]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "math.jsonl").write_bytes(content)
    found = refused(tmp_path / "in", tmp_path, ["MATH"], code)
    [wrong] = [finding for finding in found.findings if finding.code == code]
    assert wrong.where == "math.jsonl" and remedy in str(wrong.remedy)


def test_truncated_downloads_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    rows = [math_row(number) for number in range(200)]
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    folder.mkdir()
    packed = gzip.compress(whole)
    for name, content in (
        ("math.jsonl.gz", packed[: len(packed) // 2]),
        ("math.jsonl", whole[:-30]),
        ("math.json", json.dumps(rows).encode()[:-30]),
        ("math.parquet", b"PAR1" + bytes(50)),
        ("math.csv", b'problem,level,type,solution\n"broken,Level 1,Algebra,x\n'),
    ):
        for old in folder.iterdir():
            old.unlink()
        (folder / name).write_bytes(content)
        refused(folder, tmp_path, ["MATH"], "unreadable")


def test_json_of_another_shape_is_found(tmp_path: Path) -> None:
    for document in (
        [1, 2, 3],
        {"columns": ["problem"], "rows": [[1]]},
        "text",
        [["problem", "level"]],
        None,
    ):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / "math.json").write_text(json.dumps(document))
        refused(tmp_path / "in", tmp_path, ["MATH"], "wrong-content")


def test_the_same_question_under_two_benchmarks_is_found(five: Path, tmp_path: Path) -> None:
    row = math_row(3)
    short = {"question": row["problem"], "answer": "6"}
    write(
        five / "gpqa.jsonl", [short, *({"question": f"Another one, {n}?", "answer": "x"} for n in range(5))]
    )
    found = refused(five, tmp_path, ["GPQA", "MATH"], "same-question")
    [shared] = [finding for finding in found.findings if finding.code == "same-question"]
    assert shared.message == "1 questions stand under both GPQA and MATH"
    assert row["problem"] not in findings_text(tmp_path / "refused" / "test.jsonl")


def test_two_questions_under_one_id_are_found(tmp_path: Path) -> None:
    rows = [code_row(number) for number in range(6)]
    rows.append({**code_row(9), "task_id": "HumanEval/3"})
    write(tmp_path / "in" / "HumanEval.jsonl", rows)
    refused(tmp_path / "in", tmp_path, ["HumanEval"], "duplicate-id")


def test_a_missing_benchmark_is_an_error_that_names_only(five: Path, tmp_path: Path) -> None:
    (five / "gpqa.jsonl").unlink()
    found = refused(five, tmp_path, ["GPQA", "DROP"], "missing-benchmark")
    assert "--only" in str(found.findings[0].remedy)


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_place_without_benchmarks_is_one_message(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "empty":
        place.mkdir()
    if kind == "file":
        place.write_text("hello")
    with pytest.raises((DataError, Exception)) as caught:
        build(place, tmp_path / "t.jsonl")
    assert type(caught.value).__module__ == "lorasmith.errors"
