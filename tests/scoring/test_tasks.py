"""The benchmarks' own metrics: choices against a plain loop, written answers, unscored is not 0."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.benchmarks.base import Unscored
from lorasmith.benchmarks.drop import Drop
from lorasmith.cli import main
from lorasmith.errors import CheckpointError, DataError, MachineError
from lorasmith.files.atomic import read_record
from lorasmith.options import AnswerOptions
from lorasmith.records.scoring import TaskMetric, TaskResult
from lorasmith.scoring import answers
from lorasmith.scoring.answers import cut, room_for
from lorasmith.scoring.paired import paired_tasks
from lorasmith.scoring.tasks import evaluate_tasks, foresee_questions
from tests.tiny import save_adapter, save_base, tiny_rows


def mmlu(index: int) -> dict[str, Any]:
    return {
        "id": f"MMLU/{index}",
        "prompt": f"the {'cat ' * index}\nA. one\nB. two\nC. in\nD. on\nAnswer:",
        "response": "ABCD"[index % 4],
        "metadata": {
            "source": "MMLU",
            "choices": ["one", "two", "in", "on"],
            "answer": "ABCD"[index % 4],
        },
    }


def drop(index: int) -> dict[str, Any]:
    return {
        "id": f"DROP/{index}",
        "prompt": f"Passage: the {'rain ' * index}\nQuestion: how many?\nAnswer:",
        "response": "7",
        "metadata": {"source": "DROP", "golds": [["7"]]},
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    save_base(folder / "base")
    save_adapter(folder / "adapter", folder / "base")
    rows = [mmlu(i) for i in range(12)] + [drop(i) for i in range(5)] + tiny_rows(2)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def metric(result: TaskResult, benchmark: str, name: str) -> TaskMetric:
    [found] = [one for one in result.metrics if (one.benchmark, one.metric) == (benchmark, name)]
    return found


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_choices_are_the_likeliest_letter_of_a_plain_float64_loop(
    place: Path, tmp_path: Path, template: str
) -> None:
    result = evaluate_tasks(place / "base", place / "test.jsonl", tmp_path, template=template)
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    expected = []
    for index in range(12):
        prompt = mmlu(index)["prompt"]
        # The tokenizer spells a space apart: a plain answer " B" begins with the same token for all.
        text = f"<|start|>user\n{prompt}<|end|>\n<|start|>assistant\n" if template == "chat" else prompt + " "
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ABCD"]
        with torch.no_grad():
            expected.append("ABCD"[int(model(torch.tensor([ids])).logits[0, -1, letters].argmax())])
    table = {row["id"]: row for row in pq.read_table(tmp_path / "base_tasks.parquet").to_pylist()}
    assert [table[f"MMLU/{index}"]["answer"] for index in range(12)] == expected
    right = sum(answer == "ABCD"[index % 4] for index, answer in enumerate(expected))
    assert metric(result, "MMLU", "accuracy").value == pytest.approx(right / 12)
    assert result == read_record(tmp_path / "base_tasks.json", TaskResult)


def test_written_answers_are_judged_and_limits_and_strangers_counted(place: Path, tmp_path: Path) -> None:
    result = evaluate_tasks(place / "base", place / "test.jsonl", tmp_path)
    found = metric(result, "DROP", "f1")
    assert (found.examples, found.method, found.max_new_tokens) == (5, "generation", 64)
    assert found.hit_limit > 0  # random weights hardly ever end a text
    assert [(f.code, "2 of 19" in f.message) for f in result.findings] == [("no-task", True)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base_tasks.json", "base_tasks.parquet"]


def test_rates_are_over_all_rows_those_without_a_verdict_too(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(self: Drop, example: Any, answer: str) -> dict[str, float]:
        if example.id in ("DROP/0", "DROP/1"):
            raise Unscored("no verdict")
        return {"f1": 1.0}

    monkeypatch.setattr(Drop, "judge", judge)
    found = metric(evaluate_tasks(place / "base", place / "test.jsonl", tmp_path), "DROP", "f1")
    assert (found.scored, found.unscored, found.value, found.reasons) == (3, 2, 0.6, {"no verdict": 2})
    monkeypatch.setattr(Drop, "judge", lambda *_: (_ for _ in ()).throw(Unscored("none")))
    [none] = [
        m
        for m in evaluate_tasks(place / "base", place / "test.jsonl", tmp_path).metrics
        if m.method == "generation"
    ]
    assert (none.value, none.scored, none.interval) == (None, 0, None)


def test_an_answer_that_its_judge_fails_over_leaves_the_others_their_scores(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is nested too deep for a parser, or leaves folders too deep to be removed."""

    def judge(self: Drop, example: Any, answer: str) -> dict[str, float]:
        if example.id == "DROP/3":
            json.loads("[" * 100_000)
        return {"f1": 1.0}

    monkeypatch.setattr(Drop, "judge", judge)
    result = evaluate_tasks(place / "base", place / "test.jsonl", tmp_path)
    f1 = metric(result, "DROP", "f1")
    assert (f1.scored, f1.unscored, f1.reasons) == (4, 1, {"the judge failed: RecursionError": 1})
    [warning] = [one for one in result.findings if one.severity == "warning"]
    assert warning.code == "judge-failed" and "'DROP/3'" in warning.message
    rows = pq.read_table(tmp_path / "base_tasks.parquet").to_pylist()
    assert [row["id"] for row in rows if row["unscored"]] == ["DROP/3"]


def test_what_the_machine_cannot_do_is_no_fault_of_an_answer(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(self: Drop, example: Any, answer: str) -> dict[str, float]:
        raise MachineError("no space is left")

    monkeypatch.setattr(Drop, "judge", judge)
    with pytest.raises(MachineError, match="no space"):
        evaluate_tasks(place / "base", place / "test.jsonl", tmp_path)


@pytest.mark.parametrize("stop", [2, 7])
def test_interrupted_answers_go_on_and_end_with_the_same_bytes(
    place: Path, tmp_path: Path, stop: int
) -> None:
    class Stop(Exception):
        pass

    steps: list[int] = []

    @contextmanager
    def watch(label: str, *, total: int, unit: str) -> Iterator[Any]:
        def advance(count: int) -> None:
            steps.append(count)
            if len(steps) == stop:  # among the choices, or among the written answers
                raise Stop

        yield advance

    arguments = (place / "base", place / "test.jsonl")
    with pytest.raises(Stop):
        evaluate_tasks(*arguments, tmp_path / "stopped", batch_size=2, progress=watch)
    calls = {}
    for name in ("stopped", "whole"):
        with patch.object(answers, "generate_greedy", side_effect=answers.generate_greedy) as generate:
            evaluate_tasks(*arguments, tmp_path / name, batch_size=2)
        calls[name] = generate.call_count
    for file in ("base_tasks.json", "base_tasks.parquet"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert calls["whole"] == 3  # five written answers, two at a time
    assert calls["stopped"] == (3 if stop == 2 else 2)
    assert not list((tmp_path / "stopped").glob(".*"))


def test_two_models_are_paired_by_example(place: Path, tmp_path: Path) -> None:
    evaluate_tasks(place / "base", place / "test.jsonl", tmp_path)
    evaluate_tasks(place / "base", place / "test.jsonl", tmp_path, adapter=place / "adapter")
    base, adapter = (
        metric(read_record(tmp_path / f"{role}_tasks.json", TaskResult), "MMLU", "accuracy").value
        for role in ("base", "adapter")
    )
    effects = {
        (effect.benchmark, effect.metric): effect
        for effect in paired_tasks(tmp_path / "base_tasks.parquet", tmp_path / "adapter_tasks.parquet")
    }
    effect = effects["MMLU", "accuracy"]
    assert (effect.value_a, effect.value_b, effect.examples) == (base, adapter, 12)
    same = paired_tasks(tmp_path / "base_tasks.parquet", tmp_path / "base_tasks.parquet")
    assert all((one.delta, one.verdict) == (0.0, "no clear effect") for one in same)


@pytest.mark.parametrize(("question", "words"), [(mmlu, "down_proj"), (drop, "after 0 tokens")])
def test_logits_that_are_not_finite_are_no_answer(
    place: Path, tmp_path: Path, question: Any, words: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(place / "base").save_pretrained(tmp_path / "model")
    (tmp_path / "one.jsonl").write_text(json.dumps(question(1)) + "\n")
    with pytest.raises(CheckpointError, match="not finite") as caught:
        evaluate_tasks(tmp_path / "model", tmp_path / "one.jsonl", tmp_path)
    assert words in caught.value.message()
    assert question(1)["id"] in caught.value.message()


def test_a_command_without_questions_ends_before_the_validation(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(3)))
    words = ["validate", "--model", place / "base", "--test-set", tmp_path / "plain.jsonl", "--tasks"]
    assert main.run([str(word) for word in [*words, "--output", tmp_path / "out"]]) == 2
    assert "no row belongs to a benchmark" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_both_records_are_one_json_object(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(mmlu(i)) + "\n" for i in range(3)))
    words = [
        "validate",
        "--model",
        place / "base",
        "--test-set",
        tmp_path / "asked.jsonl",
        "--tasks",
        "--json",
    ]
    assert main.run([str(word) for word in [*words, "--output", tmp_path / "out"]]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {
        "validation": json.loads((tmp_path / "out" / "base.json").read_text()),
        "tasks": json.loads((tmp_path / "out" / "base_tasks.json").read_text()),
    }


def test_a_test_set_without_benchmarks_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(3)))
    with pytest.raises(DataError, match="no row belongs"):
        evaluate_tasks(place / "base", tmp_path / "t.jsonl", tmp_path / "out")


def test_texts_are_cut_at_the_first_stop_and_prompts_at_their_beginning() -> None:
    assert cut("    return 1\n\ndef other():\nclass X", ("\nclass", "\ndef")) == "    return 1\n"
    assert cut("all of it", ("\n",)) == "all of it"
    assert room_for([1, 2, 3, 4, 5], 7, 4) == [3, 4, 5]
    assert room_for([1, 2, 3], None, 4) == [1, 2, 3]


def test_code_that_ran_without_a_promise_kept_is_a_finding(place: Path, tmp_path: Path) -> None:
    task = {
        "id": "HumanEval/0",
        "prompt": "def f():\n    ",
        "response": "return 1",
        "metadata": {"source": "HumanEval", "tests": "def check(c):\n    c()\n", "entry_point": "f"},
    }
    (tmp_path / "test.jsonl").write_text(json.dumps(task) + "\n" + json.dumps(mmlu(1)) + "\n")
    with patch("lorasmith.scoring.tasks.unkept", lambda: ["files", "disk"]):
        result = evaluate_tasks(place / "base", tmp_path / "test.jsonl", tmp_path / "out")
    [finding] = [one for one in result.findings if one.code == "code-ran-unprotected"]
    assert "files, disk" in finding.message and finding.severity == "warning"


def test_a_flag_for_code_without_questions_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "validate",
        "--model",
        place / "base",
        "--test-set",
        place / "test.jsonl",
        "--output",
        tmp_path,
    ]
    assert main.run([*map(str, command), "--run-code-anyway"]) == 2
    assert "--tasks" in capsys.readouterr().err


def test_a_row_that_cannot_be_judged_is_refused_before_anything_is_answered(
    place: Path, tmp_path: Path
) -> None:
    row = drop(1)
    del row["metadata"]["golds"]
    (tmp_path / "test.jsonl").write_text(json.dumps(drop(0)) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"'DROP/1' cannot be judged as one of DROP: metadata.golds"):
        foresee_questions(tmp_path / "test.jsonl", AnswerOptions())
    with pytest.raises(DataError, match=r"metadata\.golds is missing"):
        evaluate_tasks(place / "base", tmp_path / "test.jsonl", tmp_path / "out")
