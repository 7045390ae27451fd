"""How many verbatim questions the check finds, and how many clean rows it flags, on real questions."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lorasmith.data.rows import read_examples
from lorasmith.files.jsonl import write_examples, write_rows
from lorasmith.records.dataset import ContaminationRecord, Example
from lorasmith.testset.build import build
from lorasmith.testset.check import check
from lorasmith.testset.overlap import _Asked

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder of real benchmark rows")

WRAPPINGS = (
    lambda question: {"prompt": question, "response": "I do not know."},
    lambda question: {"prompt": f"Human: {question}\n\nAssistant:", "response": "No idea at all, sorry."},
    lambda question: {
        "messages": [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hello, what is it?"},
            {"role": "user", "content": f"Here is my question: {question} Thanks!"},
            {"role": "assistant", "content": "Let me think about it."},
        ]
    },
    lambda question: {"text": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\nB<|im_end|>"},
    lambda question: {"instruction": "Solve it.", "input": question, "output": "It depends."},
)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    folder = tmp_path_factory.mktemp("recall")
    build(DATA, folder / "set.jsonl", only=("MMLU", "DROP"), samples_per_benchmark=200, strict=False)
    return read_examples(folder / "set.jsonl")


def checked(folder: Path, test: list[Example], train: list[dict[str, object]]) -> ContaminationRecord:
    write_examples(folder / "test.jsonl", test)
    write_rows(folder / "train.jsonl", train)
    return check(folder / "test.jsonl", [folder / "train.jsonl"])


@pytest.mark.parametrize("wrapping", WRAPPINGS, ids=["bare", "turns", "conversation", "template", "alpaca"])
def test_questions_that_stand_in_the_training_data_are_found_in_any_wrapping(
    questions: list[Example], tmp_path: Path, wrapping: object
) -> None:
    asked = {example.id: _Asked.of(example) for example in questions}
    rows = [dict(wrapping(f"{one.passage}\n{one.question}".strip()), id=name) for name, one in asked.items()]  # type: ignore[operator]
    record = checked(tmp_path, questions, rows)
    found = {
        hit.test_id
        for hit in record.hits
        if hit.kind in ("question", "exact") and hit.train_id == hit.test_id
    }
    assert len(found) >= 0.99 * len(questions), sorted({one.id for one in questions} - found)[:5]


def test_other_questions_of_the_same_benchmarks_are_not_flagged(
    questions: list[Example], tmp_path: Path
) -> None:
    """A test set against questions that are not in it: what both share is the benchmark's own wording."""
    order = random.Random(1).sample(range(len(questions)), len(questions))
    half = len(order) // 2
    test = [questions[place] for place in order[:half]]
    passages = {example.metadata.extra().get("passage_id", example.id) for example in test}
    rest = [questions[place] for place in order[half:]]
    other = [one for one in rest if one.metadata.extra().get("passage_id", one.id) not in passages]
    # Questions of MMLU on one text hold it themselves: these are no strangers to each other.
    texts = {" ".join(one.prompt.split()[:20]) for one in test}
    other = [one for one in other if " ".join(one.prompt.split()[:20]) not in texts]
    train = [json.loads(json.dumps(one.model_dump(mode="json"))) for one in other]
    record = checked(tmp_path, test, train)
    flagged = record.counts["test_rows"]
    assert flagged <= 0.01 * len(test), [(hit.kind, hit.test_id, hit.score) for hit in record.hits][:8]
