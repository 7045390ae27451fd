"""`lorasmith testset …` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorasmith.benchmarks.registry import BENCHMARKS
from lorasmith.data.rows import read_examples
from lorasmith.files.jsonl import write_rows
from tests.typed import Typed

GOLDS = {"spans": ["2"], "types": ["number"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`in/drop.jsonl` with 30 rows and `train.jsonl` with 40."""
    rows = [
        {
            "passage": f"Team {n} won.",
            "question": f"Who won {n}?",
            "query_id": f"q{n}",
            "answers_spans": GOLDS,
        }
        for n in range(30)
    ]
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "drop.jsonl", rows)
    levels = ("easy", "hard")
    train = [
        {"prompt": f"p{n}", "response": "r", "difficulty": levels[n % 2], "domain": "m"} for n in range(40)
    ]
    write_rows(tmp_path / "train.jsonl", train)
    return tmp_path


def test_build_shows_counts_and_writes_records(folder: Path, here: Typed) -> None:
    output = folder / "out" / "test.jsonl"
    common = ["testset", "build", "--benchmarks", folder / "in", "--output", output, "--only", "drop"]
    done = here(*common, "--samples", "DROP=12")
    assert done.returncode == 0, done.stderr
    assert "12 examples" in done.stdout and "Source by difficulty" in done.stdout
    assert len(read_examples(output)) == 12
    told = here(*common, "--samples-per-benchmark", 12, "--json")
    assert json.loads(told.stdout) == json.loads((output.parent / "statistics.json").read_text())


def test_build_by_measured_losses(folder: Path, here: Typed) -> None:
    output = folder / "out" / "test.jsonl"
    common = ["testset", "build", "--benchmarks", folder / "in", "--output", output, "--only", "drop"]
    assert here(*common, "--samples-per-benchmark", 9).returncode == 0
    ids = [example.id for example in read_examples(output)]
    losses = {"id": ids, "loss": [float(number) for number in range(9)]}
    pq.write_table(pa.table(losses), folder / "base.parquet")
    measured = ["--samples-per-benchmark", 9, "--difficulty", "measured"]
    done = here(*common, *measured, "--losses", folder / "base.parquet")
    assert done.returncode == 0, done.stderr
    labels = [example.metadata.difficulty for example in read_examples(output)]
    assert labels == ["easy"] * 3 + ["medium"] * 3 + ["hard"] * 3
    wrong = here(*common, *measured, "--losses", folder / "train.jsonl")
    assert wrong.returncode == 2 and "no losses" in wrong.stderr


def test_split_then_check(folder: Path, here: Typed) -> None:
    output = folder / "hold" / "test.jsonl"
    done = here("testset", "split", "--train", folder / "train.jsonl", "--output", output, "--size", 10)
    assert done.returncode == 0, done.stderr
    assert "10 rows held out" in done.stdout and "was left as it is" in done.stdout
    assert "independent only if" in done.stdout
    check = ["testset", "check", "--test-set", output, "--train", folder / "train.jsonl"]
    record = folder / "contamination.json"
    found = here(*check, "--output", record)
    assert found.returncode == 1 and "contaminated" in found.stdout
    assert json.loads(record.read_text())["verdict"] == "contaminated"
    assert here(*check, "--allow", 10).returncode == 0
    removed = folder / "removed" / "test.jsonl"
    split = [
        "testset",
        "split",
        "--train",
        folder / "train.jsonl",
        "--output",
        removed,
        "--size",
        10,
        "--remove",
    ]
    done = here(*split)
    assert done.returncode == 0 and "10 rows were removed" in done.stdout and "train.jsonl.bak" in done.stdout
    clean = here("testset", "check", "--test-set", removed, "--train", folder / "train.jsonl")
    assert clean.returncode == 0 and "independent" in clean.stdout


def test_every_benchmark_is_listed_with_how_it_is_answered(here: Typed) -> None:
    listed = here("benchmarks", "list")
    assert listed.returncode == 0
    for benchmark in BENCHMARKS:
        assert benchmark.name in listed.stdout
    assert "likeliest" in listed.stdout and "by default" in listed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--only", "TriviaQA"], "no benchmark named 'TriviaQA'"),
        (["build", "--only", "drop", "--samples", "drop"], "gives no size"),
        (["build", "--only", "drop", "--samples", "MATH=5"], "not in use"),
        (["build", "--only", "drop", "--samples-per-benchmark", "-1"], "--samples-per-benchmark is -1"),
        (["build", "--only", "drop", "--difficulty", "hard"], "--difficulty is"),
        (["build", "--only", "drop", "--difficulty", "measured"], "belong together"),
        (["build"], "no usable rows of"),
    ],
)
def test_mistakes_are_one_message_and_exit_2(
    folder: Path, arguments: list[str], message: str, here: Typed
) -> None:
    name, *rest = arguments
    done = here("testset", name, "--benchmarks", folder / "in", "--output", folder / "t.jsonl", *rest)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
