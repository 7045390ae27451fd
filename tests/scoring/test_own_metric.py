"""A person's own metric asks, judges and is recorded; a mistake in it is one message that names the line."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest

from lorasmith.cli import main
from lorasmith.errors import DataError, UsageError
from lorasmith.files.jsonl import write_rows
from lorasmith.models.generation.generate import generate_greedy
from lorasmith.records.dataset import Example, Metadata
from lorasmith.records.scoring import TaskMetric, TaskResult
from lorasmith.scoring import answers
from lorasmith.scoring.own_metric import OwnMetric
from lorasmith.scoring.tasks import evaluate_tasks
from tests.scoring.test_tasks import mmlu
from tests.tiny import save_base, tiny_rows

PAGE = Path(__file__).parents[2] / "docs" / "own-metric.md"
COUNTS = """NAME = "words"
MAX_NEW_TOKENS = 5
def score(example, answer): return min(1, len(answer.split()) / 10)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    save_base(folder / "base")
    write_rows(folder / "test.jsonl", [*tiny_rows(4), *(mmlu(index) for index in range(3))])
    return folder


def module(folder: Path, text: str, name: str = "mine.py") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def metrics(result: TaskResult) -> dict[tuple[str, str], TaskMetric]:
    return {(one.benchmark, one.metric): one for one in result.metrics}


def row(prompt: str, response: str, source: str = "orders") -> Example:
    return Example(id="one", prompt=prompt, response=response, metadata=Metadata(source=source))


def test_it_judges_the_rows_of_no_benchmark_and_the_record_says_whose_code_it_was(
    place: Path, tmp_path: Path
) -> None:
    mine = module(tmp_path / "code", COUNTS)
    result = evaluate_tasks(place / "base", place / "test.jsonl", tmp_path / "out", task_module=mine)
    table = pq.read_table(tmp_path / "out" / "base_tasks.parquet").to_pylist()
    own = [one for one in table if one["benchmark"] == "words"]
    assert len(own) == 4 and len(table) == 7  # the questions of MMLU keep their own metric
    expected = [min(1, len(one["answer"].split()) / 10) for one in own]
    assert [one["scores"] for one in own] == [[value] for value in expected]
    found = metrics(result)["words", "score"]
    assert found.value == pytest.approx(sum(expected) / 4)
    assert (found.scored, found.max_new_tokens, found.method) == (4, 5, "generation")
    assert metrics(result)["MMLU", "accuracy"].scored == 3
    assert result.task_module is not None
    assert result.task_module.path == "mine.py"
    assert result.task_module.sha256 == hashlib.sha256(COUNTS.encode()).hexdigest()
    [note] = [finding for finding in result.findings if finding.code == "own-metric"]
    assert "4 rows" in note.message and result.task_module.sha256[:16] in note.message


def test_its_prompt_is_what_the_model_is_asked(place: Path, tmp_path: Path) -> None:
    plain = module(tmp_path / "plain", COUNTS)
    asks = module(tmp_path / "asks", COUNTS + "def prompt(example): return 'the cat sat on the mat'\n")
    texts: dict[str, list[str]] = {}
    for name, mine in (("plain", plain), ("asks", asks)):
        evaluate_tasks(place / "base", place / "test.jsonl", tmp_path / name, task_module=mine)
        table = pq.read_table(tmp_path / name / "base_tasks.parquet").to_pylist()
        texts[name] = [one["answer"] for one in table if one["benchmark"] == "words"]
    assert len(set(texts["asks"])) == 1 and len(set(texts["plain"])) > 1


def test_a_conversation_is_put_with_all_its_turns_before_the_last_answer(place: Path, tmp_path: Path) -> None:
    turns = [
        ("system", "the cat"),
        ("user", "sat"),
        ("assistant", "on"),
        ("user", "the mat"),
        ("assistant", "in"),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    write_rows(tmp_path / "chat.jsonl", [row])
    mine = module(
        tmp_path / "code", "def score(example, answer): return len(example.messages) / 10\nMAX_NEW_TOKENS = 2"
    )
    asked: list[str] = []

    def write(loaded: Any, prompts: list[list[int]], **how: Any) -> Any:
        asked.extend(loaded.tokenizer.decode(prompt) for prompt in prompts)
        return generate_greedy(loaded, prompts, **how)

    with patch.object(answers, "generate_greedy", write):
        result = evaluate_tasks(place / "base", tmp_path / "chat.jsonl", tmp_path / "out", task_module=mine)
    told = [f"<|start|>{role}\n{content}<|end|>\n" for role, content in turns[:-1]]
    assert asked == ["".join(told) + "<|start|>assistant\n"]
    assert metrics(result)["mine", "score"].value == 0.5


def test_the_page_shows_a_module_that_works() -> None:
    [example] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    folder = Path(PAGE.parent)
    with patch("lorasmith.scoring.own_metric.read_input", return_value=example.encode()):
        own = OwnMetric(folder / "orders.py")
    assert (own.name, own.max_new_tokens, own.stop_texts) == ("orders", 80, ("\n\n",))
    order = row("Two spoons, please.", '{"item": "spoon", "count": 2}')
    assert str(own.prompt(order)).startswith(order.prompt)
    assert own.score(order, order.response) == {"fields": 1.0, "valid": 1.0}
    assert own.score(order, '{"item": "spoon", "count": 3}') == {"fields": 0.5, "valid": 1.0}
    assert own.score(order, "") == own.score(order, "two spoons") == {"fields": 0.0, "valid": 0.0}


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("def score(example, answer):\n    return 1 / 0\n", "mine.py:2", "ZeroDivisionError"),
        ("import json\n\nraise OSError('no such corpus')\n", "mine.py:3", "no such corpus"),
        ("def score(example, answer)\n    return 1\n", "mine.py:1", "SyntaxError"),
        ("import a_module_that_is_not_there\n", "mine.py:1", "ModuleNotFoundError"),
        ("raise SystemExit(0)\n", "mine.py:1", "SystemExit"),
        ("SCORE = 1\n", "mine.py", "no function score"),
        ("\ndef score(example, answer): return 2\n", "mine.py:2", "score gave 2"),
        ("def score(example, answer): return float('nan')\n", "mine.py:1", "score gave nan"),
        ("def score(example, answer): return 'good'\n", "mine.py:1", "score gave 'good'"),
        ("def score(example, answer): return {}\n", "mine.py:1", "score gave {}"),
        ("def score(example, answer): return {'a': -1}\n", "mine.py:1", "score gave {'a': -1}"),
        ("NAME = 'MATH'\ndef score(example, answer): return 1\n", "mine.py", "NAME is 'MATH'"),
        ("MAX_NEW_TOKENS = '5'\ndef score(example, answer): return 1\n", "mine.py", "MAX_NEW_TOKENS"),
        ("SOURCES = 'orders'\ndef score(example, answer): return 1\n", "mine.py", "SOURCES"),
        (
            "class E(Exception):\n def __str__(self): raise E\ndef score(*_): raise E\n",
            "mine.py:3",
            "E: a E that",
        ),
        ("def score(*_): return {'a' * 10**6: 2}\n", "mine.py:1", f"score gave {{'{'a' * 298}…"),
        (
            "def prompt(example): return ''\ndef score(example, answer): return 1\n",
            "mine.py:1",
            "prompt gave",
        ),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_mistake_is_one_message_with_its_line_and_exit_2_before_any_answer(
    place: Path, tmp_path: Path, text: str, where: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = module(tmp_path / "code", text)
    command = ["validate", "--model", str(place / "base"), "--test-set", str(place / "test.jsonl")]
    command += ["--output", str(tmp_path / "out"), "--tasks", "--task-module", str(mine)]
    assert main.run(command) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and said.count("error:") == 1
    assert re.search(rf"where: .*{re.escape(where)}$", said, re.MULTILINE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "asks", ["MAX_NEW_TOKENS = 3\n", "def prompt(example): return 'a cat'\n", "STOP_TEXTS = ['a']\n"]
)
def test_answers_are_kept_when_the_score_fails_later_and_a_mended_one_takes_them(
    place: Path, tmp_path: Path, asks: str
) -> None:
    fails = (
        "SEEN = []\ndef score(example, answer):\n    SEEN.append(answer)\n    return 1 / (len(SEEN) < 3)\n"
    )
    mine, output = tmp_path / "code" / "mine.py", tmp_path / "out"

    def evaluate(text: str) -> TaskResult:
        module(mine.parent, text)
        return evaluate_tasks(place / "base", place / "test.jsonl", output, task_module=mine)

    with pytest.raises(UsageError, match=r"ZeroDivisionError.*\n.*mine.py:4"):
        evaluate(fails)
    # What decides the answers has changed: they are asked for again.
    with (
        patch.object(answers, "generate_greedy", side_effect=answers.generate_greedy) as asking,
        pytest.raises(UsageError, match="ZeroDivisionError"),
    ):
        evaluate(fails + asks)
    assert asking.called
    with patch.object(answers, "generate_greedy", side_effect=AssertionError("asked again")):
        result = evaluate("def score(example, answer): return 1\n" + asks)
    assert metrics(result)["mine", "score"].value == 1.0


def test_a_row_without_a_verdict_is_unscored_and_other_metrics_than_before_are_refused(
    place: Path, tmp_path: Path
) -> None:
    own = OwnMetric(
        module(tmp_path / "a", "def score(example, answer): return None if answer == 'x' else 1\n")
    )
    assert own.score(row("p", "r"), "y") == {"score": 1.0}
    result = evaluate_tasks(
        place / "base",
        place / "test.jsonl",
        tmp_path / "out",
        task_module=module(tmp_path / "b", "def score(example, answer): return None\n"),
    )
    found = metrics(result)["mine", "unscored"]
    assert (found.unscored, found.value, found.reasons) == (4, None, {"score gave None": 4})
    changes = OwnMetric(module(tmp_path / "c", "def score(example, answer): return {answer: 1}\n"))
    changes.score(row("p", "r"), "first")
    with pytest.raises(UsageError, match="those of the rows before: first"):
        changes.score(row("p", "r"), "second")


def test_sources_choose_the_rows_a_benchmarks_too(place: Path, tmp_path: Path) -> None:
    takes = "SOURCES = ['MMLU']\nMAX_NEW_TOKENS = 3\ndef score(example, answer): return 'A' in answer\n"
    mine = module(tmp_path / "a", takes)
    result = evaluate_tasks(place / "base", place / "test.jsonl", tmp_path / "out", task_module=mine)
    assert set(metrics(result)) == {("mine", "score")}
    assert metrics(result)["mine", "score"].scored == 3
    assert any(finding.code == "no-task" and "4 of 7" in finding.message for finding in result.findings)
    nobody = module(tmp_path / "b", takes.replace("MMLU", "orders"))
    with pytest.raises(DataError, match=r"no row is one that mine\.py judges"):
        evaluate_tasks(place / "base", place / "test.jsonl", tmp_path / "none", task_module=nobody)


def test_without_tasks_it_is_refused_and_a_file_that_is_not_there_too(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["validate", "--model", str(place / "base"), "--test-set", str(place / "test.jsonl")]
    command += ["--output", str(tmp_path / "out"), "--task-module", str(tmp_path / "mine.py")]
    assert main.run(command) == 2
    assert "--task-module without --tasks" in capsys.readouterr().err
    assert main.run([*command, "--tasks"]) == 2
    assert "mine.py" in capsys.readouterr().err


def test_what_a_module_defines_works_as_in_a_file_of_its_own(tmp_path: Path) -> None:
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Parsed:\n    words: list[str]\n"
        "def score(example, answer):\n    return bool(Parsed(answer.split()).words)\n"
    )
    own = OwnMetric(module(tmp_path, text))
    assert own.score(row("p", "r"), "a word") == {"score": 1.0}
    assert json.dumps(own.score(row("p", "r"), " ")) == '{"score": 0.0}'
