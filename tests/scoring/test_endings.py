"""Whole endings are weighed as a plain float64 loop does, and ten letters as four."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.records.scoring import TaskMetric
from lorasmith.scoring.tasks import evaluate_tasks
from tests.tiny import save_base

ENDINGS = ["on the mat in the rain", "in", "the the the the the the", "a dog sat"]


def hellaswag(index: int) -> dict[str, Any]:
    choices = ENDINGS[index % 4 :] + ENDINGS[: index % 4]
    return {
        "id": f"HellaSwag/{index}",
        "prompt": f"cats: the {'cat ' * index}sat",
        "response": choices[index % 3],
        "metadata": {"source": "HellaSwag", "choices": choices, "answer": "ABC"[index % 3]},
    }


def mmlu_pro(index: int, count: int) -> dict[str, Any]:
    return {
        "id": f"MMLU-Pro/{index}",
        "prompt": f"the {'cat ' * index}\nAnswer:",
        "response": "B",
        "metadata": {"source": "MMLU-Pro", "choices": ["in"] * count, "answer": "B"},
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endings")
    save_base(folder / "base")
    rows = [hellaswag(index) for index in range(7)] + [mmlu_pro(0, 10), mmlu_pro(1, 3)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def loglikelihood(model: Any, ids: list[int], scored: list[int]) -> float:
    with torch.no_grad():
        logprobs = model(torch.tensor([ids + scored])).logits[0].log_softmax(-1)
    return sum(float(logprobs[len(ids) - 1 + place, token]) for place, token in enumerate(scored))


def expected(place: Path, template: str) -> list[tuple[str, float, float]]:
    """Letter, accuracy_norm and accuracy of each HellaSwag row, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    found = []
    for index in range(7):
        row = hellaswag(index)
        prompt = row["prompt"]
        chat = f"<|start|>user\n{prompt}<|end|>\n<|start|>assistant\n"
        ids = tokenizer(chat if template == "chat" else prompt, add_special_tokens=False)["input_ids"]
        space = "" if template == "chat" else " "
        sums = []
        for choice in row["metadata"]["choices"]:
            tokens = tokenizer(space + choice, add_special_tokens=False)["input_ids"]
            sums.append(loglikelihood(model, ids, tokens))
        by_length = [value / len(text) for value, text in zip(sums, row["metadata"]["choices"], strict=True)]
        right = "ABCD".index(row["metadata"]["answer"])
        best, best_norm = (values.index(max(values)) for values in (sums, by_length))
        found.append(("ABCD"[best], float(best_norm == right), float(best == right)))
    return found


@pytest.mark.parametrize(("template", "sizes"), [("chat", {}), ("plain", {"batch_tokens": 40})])
def test_endings_are_weighed_as_by_a_plain_float64_loop(
    place: Path, tmp_path: Path, template: str, sizes: dict[str, int]
) -> None:
    result = evaluate_tasks(place / "base", place / "test.jsonl", tmp_path, template=template, **sizes)
    rows = [row for row in pq.read_table(tmp_path / "base_tasks.parquet").to_pylist() if "Hella" in row["id"]]
    found = [(row["answer"], *row["scores"]) for row in sorted(rows, key=lambda row: row["id"])]
    assert rows[0]["metrics"] == ["accuracy_norm", "accuracy"]
    assert found == expected(place, template)
    metrics: dict[str, TaskMetric] = {one.metric: one for one in result.metrics if "Hella" in one.benchmark}
    assert metrics["accuracy_norm"].value == pytest.approx(sum(row[1] for row in found) / 7)
    assert metrics["accuracy"].method == "likelihood" and metrics["accuracy"].scored == 7


def test_a_letter_that_a_row_has_no_choice_for_is_never_its_answer(place: Path, tmp_path: Path) -> None:
    evaluate_tasks(place / "base", place / "test.jsonl", tmp_path)
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "base_tasks.parquet").to_pylist()}
    assert rows["MMLU-Pro/0"]["answer"] in "ABCDEFGHIJ" and rows["MMLU-Pro/1"]["answer"] in "ABC"
    assert all(row["method"] == "likelihood" for row in rows.values())
