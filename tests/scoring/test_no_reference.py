"""Rows without a published answer are asked and have no loss; a metric over instructions counts each one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import lorasmith
from lorasmith.benchmarks.base import Unscored
from lorasmith.benchmarks.ifeval import NO_REFERENCE, IFEval, sentences
from lorasmith.cli import main
from lorasmith.errors import DataError
from lorasmith.files.jsonl import write_rows
from lorasmith.records.dataset import Example
from lorasmith.records.scoring import TaskResult
from lorasmith.scoring.paired import paired_tasks
from lorasmith.scoring.tasks import evaluate_tasks
from tests.executors.nearby import Nearby
from tests.tiny import save_base, tiny_rows


def ifeval(index: int, *instructions: str) -> dict[str, Any]:
    return {
        "id": f"IFEval/{index}",
        "prompt": f"the {'cat ' * index}sat",
        "response": NO_REFERENCE,
        "metadata": {
            "source": "IFEval",
            "instructions": [
                {"id": name, "arguments": {"forbidden_words": ["spoon"]}} for name in instructions
            ],
            "reference": False,
        },
    }


FORBIDDEN, QUOTED, TITLE = "keywords:forbidden_words", "startend:quotation", "detectable_format:title"
# The tiny model knows no spoon and quotes nothing: of six instructions four are followed, of three rows two.
ROWS = [ifeval(0, FORBIDDEN), ifeval(1, FORBIDDEN), ifeval(2, FORBIDDEN, FORBIDDEN, QUOTED, TITLE)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    save_base(folder / "base")
    write_rows(folder / "plain.jsonl", tiny_rows(6))
    write_rows(folder / "mixed.jsonl", [*ROWS, *tiny_rows(6)])
    write_rows(folder / "only.jsonl", ROWS)
    return folder


def values(result: TaskResult) -> dict[str, float | None]:
    return {one.metric: one.value for one in result.metrics}


def test_a_loss_is_that_of_the_other_rows_and_a_note_counts_these(place: Path, tmp_path: Path) -> None:
    plain = lorasmith.validate(place / "base", place / "plain.jsonl", tmp_path / "plain")
    mixed = lorasmith.validate(place / "base", place / "mixed.jsonl", tmp_path / "mixed")
    assert mixed.overall == plain.overall and not mixed.partial
    [note] = [finding for finding in mixed.findings if finding.code == "no-reference"]
    assert note.severity == "note" and "3 rows" in note.message
    with pytest.raises(DataError, match="no row has a reference answer"):
        lorasmith.validate(place / "base", place / "only.jsonl", tmp_path / "only")


def test_instructions_are_counted_one_by_one_here_and_elsewhere(place: Path, tmp_path: Path) -> None:
    here = evaluate_tasks(place / "base", place / "mixed.jsonl", tmp_path / "here")
    found = values(here)
    assert found["prompt_strict"] == pytest.approx(2 / 3)
    assert found["instruction_strict"] == pytest.approx(4 / 6)  # a mean over rows would be 5/6
    assert next(iter(found)) == "prompt_strict"
    there = evaluate_tasks(place / "base", place / "mixed.jsonl", tmp_path / "there", executor=Nearby())
    assert there.metrics == here.metrics
    tables = (tmp_path / "here" / "base_tasks.parquet", tmp_path / "there" / "base_tasks.parquet")
    effects = {effect.metric: effect for effect in paired_tasks(*tables)}
    assert effects["instruction_strict"].value_b == pytest.approx(4 / 6)


def test_a_test_set_of_such_rows_alone_is_asked_by_the_command(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["validate", "--model", str(place / "base"), "--test-set", str(place / "only.jsonl")]
    assert main.run([*command, "--output", str(tmp_path / "out"), "--tasks"]) == 0
    assert "asked only" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "base_tasks.json",
        "base_tasks.parquet",
    ]
    assert main.run([*command, "--output", str(tmp_path / "json"), "--tasks", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["tasks"]
    assert main.run([*command, "--output", str(tmp_path / "loss")]) == 2
    assert "--tasks" in capsys.readouterr().err


def test_a_language_that_nothing_here_can_tell_is_unscored_and_says_what_to_install() -> None:
    example = Example.model_validate(ifeval(0, "change_case:english_capital"))
    with patch("lorasmith.benchmarks.ifeval.find_spec", return_value=None):
        with pytest.raises(Unscored, match="py3langid is not installed"):
            IFEval().score(example, "ALL IN CAPITALS")
        assert IFEval().score(example, "no capitals")["prompt_strict"] == 0.0


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ("One. Two! Three?", 3),
        ("No end", 1),
        ("Dr. Spoon met J. Fork at 3.5 p.m. sharp.", 1),
        ('He said "Stop." She did not.', 2),
        ("What?! Really...", 2),
        ("He left ... and came back.", 1),
        ("", 0),
        ("...", 0),
        ("Line one.\n\n- Line two.\n- Line three.", 3),
    ],
)
def test_sentences_are_counted(answer: str, count: int) -> None:
    assert sentences(answer) == count
