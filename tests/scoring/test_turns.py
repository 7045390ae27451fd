"""Validation of conversations: the loss of each turn, and what the other boundary would give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import lorasmith
from lorasmith.scoring.boundaries import SAMPLE
from lorasmith.scoring.validate import LAST_TURN
from tests.tiny import save_base, tiny_rows, tiny_tokenizer

WORDS = ["the cat", "a mat", "in rain", "over there", "then ran"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model", max_position_embeddings=2048)


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def conversation(answers: int, start: int = 0) -> dict[str, Any]:
    messages = []
    for number in range(answers):
        messages.append({"role": "user", "content": WORDS[(start + number) % 5]})
        messages.append({"role": "assistant", "content": WORDS[(start + 2 * number) % 5]})
    return {"messages": messages}


def test_the_loss_of_each_turn_is_a_group_and_they_sum_to_the_whole(base: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [conversation(n % 4 + 1, n) for n in range(8)])
    result = lorasmith.validate(base, rows, tmp_path / "out", loss_on="assistant")
    turns = result.groups["turn"]
    assert {name: group.examples for name, group in turns.items()} == {"1": 8, "2": 6, "3": 4, "4": 2}
    assert sum(group.tokens for group in turns.values()) == result.overall.tokens
    total = sum(group.tokens * group.loss for group in turns.values())
    assert total / result.overall.tokens == pytest.approx(result.overall.loss, abs=1e-9)
    # Each answer with the token that ends its turn, in the order of the turns: told apart by their words.
    table = pq.read_table(tmp_path / "out" / "base.parquet").to_pylist()
    first = [len(tiny_tokenizer()(WORDS[n % 5])["input_ids"]) + 1 for n in range(8)]
    expected = np.concatenate([row["logprobs"][:count] for row, count in zip(table, first, strict=True)])
    assert turns["1"].loss == pytest.approx(-float(expected.mean()), abs=1e-6)


def test_late_turns_are_one_group_and_single_answers_have_none(base: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [conversation(LAST_TURN + 3), conversation(1)])
    turns = lorasmith.validate(base, rows, tmp_path / "out", loss_on="assistant").groups["turn"]
    assert list(turns) == [*(str(turn) for turn in range(1, LAST_TURN + 1)), f"{LAST_TURN + 1} and later"]
    assert [turns["1"].examples, turns[f"{LAST_TURN + 1} and later"].examples] == [2, 1]
    single = write(tmp_path / "single.jsonl", tiny_rows(3))
    assert "turn" not in lorasmith.validate(base, single, tmp_path / "single", loss_on="assistant").groups


@pytest.mark.parametrize("used", ["generation", "text"])
def test_the_loss_of_the_other_boundary_is_what_scoring_with_it_gives(
    base: Path, tmp_path: Path, used: str
) -> None:
    rows = write(tmp_path / "rows.jsonl", tiny_rows(SAMPLE))
    other = "text" if used == "generation" else "generation"
    result = lorasmith.validate(base, rows, tmp_path / "one", boundary=used)
    again = lorasmith.validate(base, rows, tmp_path / "two", boundary=other)
    found = result.other_boundary
    assert found is not None
    assert (found.boundary, found.rows, found.changed) == (other, SAMPLE, SAMPLE)
    # The same tokens in batches of other shapes: float32 sums in another order.
    assert found.loss == pytest.approx(again.overall.loss, abs=1e-5)
    assert found.used_loss == pytest.approx(result.overall.loss, abs=1e-5)
    told = [finding.message for finding in result.findings if finding.code == "other-boundary"]
    assert bool(told) == (abs(found.loss - found.used_loss) > 0.01 * found.used_loss)
    if told:
        assert f"--boundary {other} gives {found.loss:.4f} in place of {found.used_loss:.4f}" in told[0]


def test_nothing_is_scored_twice_where_both_boundaries_give_the_same_tokens(
    base: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": "the cat ", "response": "(sat)"}, {"prompt": "in rain ", "response": "(ran)"}]
    result = lorasmith.validate(
        base, write(tmp_path / "rows.jsonl", rows), tmp_path / "out", template="plain"
    )
    assert result.other_boundary is None
    assert result.straddling == 0
