"""Building a test set: exact sizes, the same rows everywhere, each question once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from lorasmith.benchmarks.base import Unscored
from lorasmith.benchmarks.registry import by_name
from lorasmith.data.rows import read_examples
from lorasmith.errors import DataError, UsageError
from lorasmith.records.dataset import DatasetStatistics
from lorasmith.testset.build import build
from tests.testset.invented import (
    codes,
    findings,
    gpqa_row,
    math_row,
    mmlu_row,
    write,
)


def test_exactly_n_rows_of_each_with_statistics_beside_them(five: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "test.jsonl"
    statistics = build(five, output, samples_per_benchmark=20)
    assert statistics.by_source == dict.fromkeys(("DROP", "GPQA", "HumanEval", "MATH", "MMLU"), 20)
    assert statistics.by_domain == dict.fromkeys(
        ("code generation", "math", "multitask understanding", "reading comprehension", "science Q&A"), 20
    )
    # The guide's policy: DROP easy; HumanEval and these MMLU rows medium; MATH by level; GPQA hard.
    levels = [
        int(e.metadata.extra()["native_difficulty"][-1]) for e in read_examples(output) if e.id[:4] == "MATH"
    ]
    easy_levels = sum(level <= 2 for level in levels)
    assert statistics.by_difficulty == {"easy": 20, "hard": 40 - easy_levels, "medium": 40 + easy_levels}
    path = output.parent / "statistics.json"
    assert DatasetStatistics.from_json(path.read_bytes(), path) == statistics
    assert sum(statistics.crossings["source × difficulty"].values()) == 100


def test_every_row_says_where_it_comes_from(five: Path, tmp_path: Path) -> None:
    output = tmp_path / "test.jsonl"
    build(five, output, samples_per_benchmark=5)
    examples = read_examples(output)
    for example in examples:
        metadata = example.metadata
        assert example.id.startswith(f"{metadata.source}/")
        assert metadata.file == f"{metadata.source.lower()}.jsonl" and len(metadata.sha256) == 64
        assert metadata.difficulty_from.startswith("guide:") and metadata.record_id
    kept = {example.metadata.source: set(example.metadata.extra()) for example in examples}
    assert kept["DROP"] >= {"golds"} and kept["MATH"] >= {"final_answer"}
    assert kept["HumanEval"] >= {"tests", "entry_point"} and kept["MMLU"] >= {"choices", "answer"}


def test_the_rows_depend_neither_on_file_order_nor_on_other_benchmarks(five: Path, tmp_path: Path) -> None:
    first = tmp_path / "a" / "test.jsonl"
    build(five, first, samples_per_benchmark=10)
    other = tmp_path / "again"
    for path in five.iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        random.Random(1).shuffle(rows)
        write(other / path.name, rows)
    second = tmp_path / "b" / "test.jsonl"
    build(other, second, samples_per_benchmark=10)
    assert first.read_bytes() == second.read_bytes()
    alone = tmp_path / "c" / "test.jsonl"
    build(other, alone, samples_per_benchmark=10, only=["MATH"])
    assert [e for e in read_examples(first) if e.metadata.source == "MATH"] == read_examples(alone)


def test_the_same_bytes_in_another_process_with_another_hash_seed(five: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "test.jsonl", tmp_path / "b" / "test.jsonl"
    build(five, first, samples_per_benchmark=10)
    code = (
        "import sys; from pathlib import Path; from lorasmith.testset.build import build; "
        "build(Path(sys.argv[1]), Path(sys.argv[2]), samples_per_benchmark=10)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, five, second], check=True, env=environment)
    assert first.read_bytes() == second.read_bytes()


def test_the_choice_is_pinned(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "math.jsonl", [math_row(number) for number in range(40)])
    output = tmp_path / "test.jsonl"
    build(source.parent, output, samples_per_benchmark=4, only=["MATH"], seed=42)
    chosen = [example.prompt.split("number ")[1].split(".")[0] for example in read_examples(output)]
    assert chosen == PINNED


PINNED = ["18", "20", "24", "7"]
"""Must never change: test sets built by any version, machine and Python with one seed are the same."""


def test_another_seed_gives_other_rows(five: Path, tmp_path: Path) -> None:
    ids = []
    for seed in (1, 2):
        output = tmp_path / str(seed) / "test.jsonl"
        build(five, output, samples_per_benchmark=10, only=["MATH"], seed=seed)
        ids.append([example.id for example in read_examples(output)])
    assert set(ids[0]) != set(ids[1])


def test_sizes_per_benchmark_and_a_file_with_fewer_rows_is_said(five: Path, tmp_path: Path) -> None:
    output = tmp_path / "test.jsonl"
    statistics = build(five, output, samples_per_benchmark=100, samples=["drop=3"], only=["drop", "mmlu"])
    assert statistics.by_source == {"DROP": 3, "MMLU": 40}
    assert statistics.asked == {"DROP": 3, "MMLU": 100}
    assert codes(output) == {"fewer-than-asked"}


def test_strata_are_shared_by_largest_remainder(tmp_path: Path) -> None:
    rows = [mmlu_row(n, "anatomy") for n in range(60)] + [mmlu_row(n + 100, "virology") for n in range(30)]
    write(tmp_path / "in" / "mmlu.jsonl", rows)
    statistics = build(tmp_path / "in", tmp_path / "test.jsonl", samples_per_benchmark=10, only=["MMLU"])
    # Quotas 6.67 and 3.33.
    assert statistics.crossings["source × subdomain"] == {"MMLU / anatomy": 7, "MMLU / virology": 3}


def test_policies_relabel_the_same_rows(five: Path, tmp_path: Path) -> None:
    guide, native, measured = (tmp_path / name / "t.jsonl" for name in ("guide", "native", "measured"))
    build(five, guide, samples_per_benchmark=9)
    build(five, native, samples_per_benchmark=9, difficulty="native")
    ids = [example.id for example in read_examples(guide)]
    losses = {example: float(rank) for rank, example in enumerate(ids)}
    statistics = build(five, measured, samples_per_benchmark=9, difficulty="measured", losses=losses)
    assert statistics.by_difficulty == {"easy": 15, "hard": 15, "medium": 15}
    assert [e.id for e in read_examples(native)] == [e.id for e in read_examples(measured)] == ids
    by_source = {e.metadata.source: e.metadata for e in read_examples(native)}
    assert by_source["MATH"].difficulty.startswith("Level ")
    assert by_source["MATH"].difficulty_from == "native:level"
    assert by_source["DROP"].difficulty == "unknown"
    assert {e.metadata.difficulty_from for e in read_examples(measured)} == {"measured:loss"}
    assert [e.metadata.difficulty for e in read_examples(measured)] == ["easy"] * 15 + ["medium"] * 15 + [
        "hard"
    ] * 15


def test_measured_losses_must_cover_every_row(five: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="45 examples have no measured loss"):
        build(five, tmp_path / "t.jsonl", samples_per_benchmark=9, difficulty="measured", losses={})
    with pytest.raises(UsageError, match="belong together"):
        build(five, tmp_path / "t.jsonl", difficulty="measured")


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_refused(five: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match="1 or more"):
        build(five, tmp_path / "t.jsonl", samples_per_benchmark=size)


def test_repeated_and_nearly_repeated_questions_are_dropped_before_sampling(tmp_path: Path) -> None:
    long = " ".join(f"word{number}" for number in range(60))
    rows = [math_row(0), math_row(0, solution="Other words, $\\boxed{0}$.")]
    rows += [math_row(1, problem=f"{long} A?")]
    rows += [math_row(1, problem=f"{long} B?")]
    rows += [math_row(1, problem="Simplify $x+1$."), math_row(1, problem="Simplify $x-1$.")]
    write(tmp_path / "in" / "math.jsonl", rows)
    output = tmp_path / "t.jsonl"
    statistics = build(tmp_path / "in", output, samples_per_benchmark=10, only=["MATH"])
    assert statistics.examples == 4
    reasons = sorted(row.reason for row in findings(output).rejected)
    assert reasons == [
        "nearly the same question stands in another row",
        "the same question stands in another row",
    ]


def test_questions_about_one_passage_are_no_duplicates(tmp_path: Path) -> None:
    passage = "The long invented passage about the game between the teams of the north and the south. " * 9
    questions = [
        "How many points were scored in the first quarter?",
        "How many points were scored in the last quarter?",
    ]
    rows = [{"passage": passage, "question": question, "answers": ["3"]} for question in questions]
    write(tmp_path / "in" / "drop.jsonl", rows)
    assert build(tmp_path / "in", tmp_path / "t.jsonl", samples_per_benchmark=2, only=["DROP"]).examples == 2


def test_the_test_split_is_taken_and_the_others_are_named(tmp_path: Path) -> None:
    for split, start in (("dev", 0), ("test", 100), ("train", 200)):
        rows = [mmlu_row(number) for number in range(start, start + 10)]
        write(tmp_path / "in" / split / f"anatomy_{split}.jsonl", rows)
    output = tmp_path / "t.jsonl"
    build(tmp_path / "in", output, samples_per_benchmark=10, only=["MMLU"])
    assert {example.metadata.file for example in read_examples(output)} == {"test/anatomy_test.jsonl"}
    [note] = findings(output).findings
    assert note.code == "split-chosen" and "validation, train" in note.message


def test_its_own_output_in_the_folder_is_passed_over(five: Path) -> None:
    output = five / "validation_test.jsonl"
    build(five, output, samples_per_benchmark=5)
    first = output.read_bytes()
    build(five, output, samples_per_benchmark=5)
    assert output.read_bytes() == first


def test_gpqa_text_appears_in_no_finding_or_statistic(five: Path, tmp_path: Path) -> None:
    rows = [gpqa_row(number) for number in range(10)] + [gpqa_row(11) | {"Incorrect Answer 1": ""}]
    write(five / "gpqa.jsonl", rows)
    output = tmp_path / "out" / "t.jsonl"
    build(five, output, samples_per_benchmark=5, strict=False)
    for name in ("findings.json", "statistics.json"):
        text = (output.parent / name).read_text()
        assert "invented constant" not in text and "right for" not in text


def test_gold_answers_score_one_over_real_rows(real_rows: Path, tmp_path: Path) -> None:
    """MMLU, DROP (original, jsonl): the folder holds real rows with their licences."""
    output = tmp_path / "t.jsonl"
    build(real_rows, output, samples_per_benchmark=5000, only=["DROP", "MMLU"])
    examples = read_examples(output)
    assert len(examples) > 1000
    for example in examples:
        try:
            scores = by_name(example.metadata.source).score(example, example.response)
        except Unscored as reason:
            raise AssertionError(f"{example.id}: {reason}") from reason
        assert set(scores.values()) == {1.0}, (example.id, scores)
