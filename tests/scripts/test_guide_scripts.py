"""The guide's own command names and flags write the guide's paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lorasmith.data.rows import read_examples

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def five_benchmarks(folder: Path) -> None:
    """In the guide author's places: data/benchmarks/*.jsonl."""
    wrong = {f"Incorrect Answer {k}": f"wrong {k}" for k in (1, 2, 3)}
    choices = ["a", "b", "c", "d"]
    sets: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("drop", "gpqa", "humaneval", "math", "mmlu")
    }
    for n in range(120):
        sets["drop"].append({"passage": f"Team {n} won.", "question": "Who won?", "answers": [f"Team {n}"]})
        sets["gpqa"].append({"Question": f"Invented {n}?", "Correct Answer": "right", **wrong})
        sets["humaneval"].append(
            {
                "task_id": f"HumanEval/{n}",
                "prompt": f"def f{n}():\n",
                "entry_point": f"f{n}",
                "canonical_solution": f"    return {n}\n",
                "test": f"def check(f):\n    assert f() == {n}\n",
            }
        )
        solution = f"$\\boxed{{{n + 1}}}$"
        problem = {
            "problem": f"What is ${n}+1$?",
            "level": "Level 3",
            "type": "Algebra",
            "solution": solution,
        }
        sets["math"].append(problem)
        question = {"question": f"Which is {n}?", "choices": choices, "answer": n % 4, "subject": "anatomy"}
        sets["mmlu"].append(question)
    for name, rows in sets.items():
        write(folder / "data" / "benchmarks" / f"{name}.jsonl", rows)


def test_convert_writes_500_rows_where_the_guide_says(tmp_path: Path) -> None:
    five_benchmarks(tmp_path)
    done = run(tmp_path, "convert_benchmarks_to_test.py", "--samples-per-benchmark", "100")
    assert done.returncode == 0, done.stderr
    examples = read_examples(tmp_path / "data" / "benchmarks" / "validation_test.jsonl")
    assert len(examples) == 500
    assert {example.metadata.source for example in examples} == {"DROP", "GPQA", "HumanEval", "MATH", "MMLU"}
    assert "500 examples" in done.stdout
    again = run(tmp_path, "convert_benchmarks_to_test.py", "--samples-per-benchmark", "100")
    assert again.returncode == 0, again.stderr


def test_create_test_set_takes_the_guides_flags_and_keeps_the_training_file(tmp_path: Path) -> None:
    train = tmp_path / "data" / "phase1" / "answers" / "training_data_clean.jsonl"
    levels = ("easy", "medium", "hard")
    rows = [
        {"prompt": f"p{n}", "response": "r", "difficulty": levels[n % 3], "domain": "m"} for n in range(900)
    ]
    write(train, rows)
    before = train.read_bytes()
    flags = [
        *("--train_file", str(train), "--output_file", "data/phase1/test_set.jsonl", "--test_size", "200"),
        *("--stratify_by", "difficulty,domain", "--seed", "42", "--no_backup"),
    ]
    done = run(tmp_path, "phase1_create_test_set.py", *flags)
    assert done.returncode == 0, done.stderr
    assert len(read_examples(tmp_path / "data" / "phase1" / "test_set.jsonl")) == 200
    statistics = json.loads((tmp_path / "data" / "phase1" / "test_split_statistics.json").read_text())
    assert statistics["examples"] == 200
    assert train.read_bytes() == before
    assert "this differs from the guide" in done.stdout
    removed = run(tmp_path, "phase1_create_test_set.py", *flags, "--remove")
    assert removed.returncode == 0, removed.stderr
    assert len(train.read_text().splitlines()) == 700
    assert "differs from the guide" not in removed.stdout


def test_a_mistake_is_one_message_and_exit_2(tmp_path: Path) -> None:
    done = run(tmp_path, "convert_benchmarks_to_test.py", "--samples-per-benchmark", "0")
    assert done.returncode == 2 and "1 or more" in done.stderr and "Traceback" not in done.stderr
    done = run(tmp_path, "phase1_create_test_set.py", "--train_file", "no.jsonl", "--output_file", "t.jsonl")
    assert done.returncode == 2 and "does not exist" in done.stderr and "Traceback" not in done.stderr
