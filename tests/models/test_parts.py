"""Parts of a training batch: every row once, none above the budget, similar lengths together."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from lorasmith.models.batches import split_batch


@dataclass(frozen=True)
class Row:
    ids: list[int]


@given(st.lists(st.integers(1, 40), max_size=20), st.integers(1, 60))
def test_parts_hold_every_row_once_within_the_budget(lengths: list[int], most: int) -> None:
    parts = list(split_batch([Row([place] * length) for place, length in enumerate(lengths)], most))
    assert sorted(row.ids[0] for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(len(row.ids) for row in part) <= most
