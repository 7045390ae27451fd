"""Helps, hurts or no clear effect: paired on the examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorasmith.errors import DataError, InputError
from lorasmith.models.text import Encoded
from lorasmith.records.dataset import Example, Metadata
from lorasmith.scoring.paired import paired_effects
from lorasmith.scoring.validate import example_table
from tests.tiny import tiny_tokenizer


def write(
    path: Path, shift: dict[str, float], *, rows: int = 60, seed: int = 0, first_token: int = 9
) -> Path:
    """A per-example file whose log-probabilities are shifted by source; noise and tokens are shared."""
    generator = np.random.default_rng(seed)
    examples, encoded, logprobs = [], [], []
    for index in range(rows):
        source = ("up", "down", "same")[index % 3]
        n = int(generator.integers(1, 30))
        noise = generator.normal(-3, 1, n)
        own = np.random.default_rng([index, len(path.name)]).normal(shift[source], 0.05, n)
        examples.append(Example(id=str(index), prompt="p", response="r", metadata=Metadata(source=source)))
        encoded.append(Encoded.behind([5, first_token, *([7] * (n - 1))], 1))
        logprobs.append((noise + own).astype(np.float32))
    path.write_bytes(example_table(examples, encoded, logprobs, tiny_tokenizer()))
    return path


def test_each_group_gets_its_own_verdict(tmp_path: Path) -> None:
    a = write(tmp_path / "a.parquet", {"up": 0, "down": 0, "same": 0})
    b = write(tmp_path / "bb.parquet", {"up": 0.2, "down": -0.2, "same": 0})
    overall, groups = paired_effects(a, b)
    verdicts = {name: effect.verdict for name, effect in groups["source"].items()}
    assert verdicts == {"up": "helps", "down": "hurts", "same": "no clear effect"}
    assert groups["source"]["up"].loss_delta == pytest.approx(-0.2, abs=0.02)
    assert groups["source"]["up"].p_value < 0.01
    assert overall.examples == 60
    assert sum(effect.tokens for effect in groups["source"].values()) == overall.tokens


def test_the_difference_is_weighted_by_tokens(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    a = write(tmp_path / "a.parquet", {"up": 0, "down": 0, "same": 0})
    b = write(tmp_path / "bb.parquet", {"up": 0.3, "down": -0.1, "same": 0})
    flat = [
        np.concatenate(
            [np.asarray(row["logprobs"], dtype=np.float64) for row in pq.read_table(p).to_pylist()]
        )
        for p in (a, b)
    ]
    overall, _ = paired_effects(a, b)
    assert overall.loss_delta == pytest.approx(float((flat[0] - flat[1]).mean()), abs=1e-12)


def test_a_few_examples_never_give_a_verdict(tmp_path: Path) -> None:
    a = write(tmp_path / "a.parquet", {"up": 0, "down": 0, "same": 0}, rows=4)
    b = write(tmp_path / "bb.parquet", {"up": 3, "down": 3, "same": 3}, rows=4)
    overall, groups = paired_effects(a, b)
    assert overall.verdict == "no clear effect"
    assert groups["source"]["down"].interval is None


def test_files_of_other_examples_or_tokens_are_refused(tmp_path: Path) -> None:
    same = {"up": 0.0, "down": 0.0, "same": 0.0}
    a = write(tmp_path / "a.parquet", same)
    with pytest.raises(DataError, match="different examples"):
        paired_effects(a, write(tmp_path / "b.parquet", same, rows=59))
    with pytest.raises(DataError, match="different tokens of example '0'"):
        paired_effects(a, write(tmp_path / "c.parquet", same, first_token=8))
    (tmp_path / "d.parquet").write_text("no table")
    with pytest.raises(DataError, match="not a table of a validation"):
        paired_effects(a, tmp_path / "d.parquet")
    with pytest.raises(InputError):
        paired_effects(a, tmp_path / "absent.parquet")
