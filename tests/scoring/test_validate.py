"""Validation of a folder: the same figures as a plain loop, the same bytes twice, every row accounted for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.errors import CheckpointError, DataError, UsageError
from lorasmith.files.atomic import read_record
from lorasmith.files.digests import hash_file
from lorasmith.records.scoring import ValidationResult
from lorasmith.scoring.validate import validate
from tests.tiny import save_adapter, save_base, tiny_rows, tiny_tokenizer

ROWS = 24


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate")
    save_base(folder / "base")
    save_adapter(folder / "adapter", folder / "base")
    write(folder / "test.jsonl", tiny_rows(ROWS))
    return folder


def plain_loop(place: Path, *, adapter: bool, everything: bool = False) -> list[np.ndarray]:
    """Row by row in float64 with PEFT's own forward, chat text written out by hand."""
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float64)
    if adapter:
        model = PeftModel.from_pretrained(model, str(place / "adapter")).double()
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    found = []
    for line in (place / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = f"<|start|>user\n{row['prompt']}<|end|>\n<|start|>assistant\n"
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*prompt, *tokenizer(row["response"] + "<|end|>", add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        start = 1 if everything else len(prompt)
        found.append(np.array([float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids))]))
    return found


@pytest.mark.parametrize("role", ["base", "adapter"])
def test_losses_match_a_plain_float64_loop(place: Path, tmp_path: Path, role: str) -> None:
    adapter = place / "adapter" if role == "adapter" else None
    result = validate(place / "base", place / "test.jsonl", tmp_path, adapter=adapter)
    expected = plain_loop(place, adapter=adapter is not None)
    assert result.overall.tokens == sum(map(len, expected))
    assert result.overall.examples == ROWS
    assert result.overall.loss == pytest.approx(-np.concatenate(expected).mean(), abs=1e-6)
    assert result.overall.perplexity == pytest.approx(math.exp(result.overall.loss))
    table = pq.read_table(tmp_path / f"{role}.parquet").to_pylist()
    for row, logprobs in zip(table, expected, strict=True):
        np.testing.assert_allclose(row["logprobs"], logprobs, atol=5e-5)
        assert row["loss"] == pytest.approx(-logprobs.mean(), abs=1e-5)
    assert result == read_record(tmp_path / f"{role}.json", ValidationResult)
    assert result.per_example.sha256 == hash_file(tmp_path / f"{role}.parquet")


def test_groups_are_weighted_by_tokens_and_add_up(place: Path, tmp_path: Path) -> None:
    result = validate(place / "base", place / "test.jsonl", tmp_path)
    expected = plain_loop(place, adapter=False)
    alpha = np.concatenate(expected[0::3])
    assert result.groups["source"]["alpha"].loss == pytest.approx(-alpha.mean(), abs=1e-6)
    assert set(result.groups["source × difficulty"]) == {"alpha / easy", "beta / medium", "gamma / hard"}
    for groups in result.groups.values():
        assert sum(group.tokens for group in groups.values()) == result.overall.tokens
        for group in groups.values():
            assert group.interval is not None
            assert group.interval.low < group.loss < group.interval.high


def test_a_group_of_all_rows_has_the_figures_of_the_whole(place: Path, tmp_path: Path) -> None:
    rows = tiny_rows(9)
    for row in rows:
        row["metadata"].update(domain="one", source="alpha")
    result = validate(place / "base", write(tmp_path / "t.jsonl", rows), tmp_path)
    for dimension, name in (("domain", "one"), ("source", "alpha"), ("source × domain", "alpha / one")):
        assert result.groups[dimension] == {name: result.overall}  # the interval as well


def test_figures_do_not_move_with_batches_or_order(place: Path, tmp_path: Path) -> None:
    rows = tiny_rows(ROWS)
    backwards = write(tmp_path / "test.jsonl", rows[::-1])
    one = validate(place / "base", place / "test.jsonl", tmp_path / "a", adapter=place / "adapter")
    two = validate(place / "base", backwards, tmp_path / "b", adapter=place / "adapter", batch_tokens=60)
    # The reason for 1e-6: other batches round the last digits of float32 logits otherwise, by some 1e-6 a
    # token with random signs.
    assert one.overall.loss == pytest.approx(two.overall.loss, abs=1e-6)
    for dimension, groups in one.groups.items():
        for name, group in groups.items():
            assert group.loss == pytest.approx(two.groups[dimension][name].loss, abs=1e-6)


def test_the_same_command_gives_the_same_bytes_without_paths_or_dates(place: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        validate(place / "base", place / "test.jsonl", tmp_path / name)
    for file in ("base.json", "base.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert str(place) not in (tmp_path / "a" / "base.json").read_text()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["base.json", "base.parquet"]


def test_loss_on_all_is_the_full_text_loss_and_says_so(place: Path, tmp_path: Path) -> None:
    result = validate(place / "base", place / "test.jsonl", tmp_path, loss_on="all")
    expected = np.concatenate(plain_loop(place, adapter=False, everything=True))
    assert result.overall.tokens == len(expected)
    assert result.overall.loss == pytest.approx(-expected.mean(), abs=1e-6)
    assert result.settings.loss_on == "all"


def test_the_worst_tokens_are_those_the_model_expected_least(place: Path, tmp_path: Path) -> None:
    validate(place / "base", place / "test.jsonl", tmp_path)
    tokenizer = tiny_tokenizer()
    for row in pq.read_table(tmp_path / "base.parquet").to_pylist():
        assert row["worst"][0]["logprob"] == min(row["logprobs"])
        for worst in row["worst"]:
            assert row["token_ids"][worst["position"]] == worst["token_id"]
            assert worst["text"] == tokenizer.decode([worst["token_id"]])


def test_a_limit_marks_the_result_as_partial(place: Path, tmp_path: Path) -> None:
    result = validate(place / "base", place / "test.jsonl", tmp_path, limit=5)
    assert result.partial
    assert result.overall.examples == 5
    whole = validate(place / "base", place / "test.jsonl", tmp_path, limit=ROWS)
    assert not whole.partial
    with pytest.raises(UsageError):
        validate(place / "base", place / "test.jsonl", tmp_path, limit=0)
    with pytest.raises(UsageError, match="without --limit"):
        validate(place / "base", place / "test.jsonl", tmp_path, shuffle_seed=1)


def test_rows_longer_than_the_context_are_counted_or_refused(place: Path, tmp_path: Path) -> None:
    rows = tiny_rows(3)
    rows[1]["prompt"] = "the cat " * 200
    test_set = write(tmp_path / "long.jsonl", rows)
    result = validate(place / "base", test_set, tmp_path, strict=False)
    assert result.truncated == 1
    [finding] = result.findings
    assert finding.code == "truncated"
    assert "'row-1'; their prompts lost the beginning" in finding.message
    assert finding.remedy is not None
    assert "made for no more" in finding.remedy
    short = validate(place / "base", test_set, tmp_path, max_length=40, strict=False)
    assert "raise --max-length" in str(short.findings[0].remedy)
    rows[2]["response"] = "the cat " * 200
    cut = validate(place / "base", write(tmp_path / "cut.jsonl", rows), tmp_path, strict=False)
    assert "1 of them lost the end of the response" in cut.findings[0].message
    with pytest.raises(DataError, match="row-1"):
        validate(place / "base", test_set, tmp_path)
    with pytest.raises(UsageError, match="256 tokens"):
        validate(place / "base", test_set, tmp_path, max_length=1000)


def test_a_token_beyond_the_embedding_names_the_row(place: Path, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(40)])
    tokenizer.save_pretrained(folder)
    fine = write(tmp_path / "fine.jsonl", tiny_rows(3))
    assert validate(folder, fine, tmp_path / "out").overall.examples == 3
    rows = tiny_rows(3)
    rows[2]["response"] = "so <extra39>"
    with pytest.raises(CheckpointError, match="row-2"):
        validate(folder, write(tmp_path / "t.jsonl", rows), tmp_path / "out")


def test_progress_counts_every_token(place: Path, tmp_path: Path) -> None:
    from collections.abc import Iterator
    from contextlib import contextmanager

    seen: list[tuple[str, int, int]] = []

    @contextmanager
    def watch(label: str, *, total: int, unit: str) -> Iterator[Any]:
        steps: list[int] = []
        yield steps.append
        seen.append((label, total, sum(steps)))

    validate(place / "base", place / "test.jsonl", tmp_path, progress=watch)
    [(label, total, done)] = seen
    assert label == "Validate base"
    assert total == done > 0
