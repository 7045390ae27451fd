"""The formula at single elements: right for a float64 sum of fractions, and never accepting what is wrong."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from lorasmith.proving.weights.judge import exact_sum
from lorasmith.proving.weights.quick import Unsettled, element_values, settle
from tests.proving.small import round_fraction
from tests.proving.test_weights_exact import block

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("grid", ["BF16", "F16", "F32"])
def test_only_what_is_certainly_right_is_let_go(grid: str) -> None:
    generator = torch.Generator().manual_seed(7)
    factor = Fraction(2.0 / 3.0)
    left = torch.randn(40, 8, generator=generator)
    right = torch.randn(8, 60, generator=generator) / 100
    source = torch.randn(40, 60, generator=generator).to(DTYPES[grid])
    made = block(factor, left, right, source, grid)
    every = np.arange(40 * 60)
    rows, cols = np.divmod(every, 60)
    base = source.double().reshape(-1).numpy()
    truth = [exact_sum(made.terms, base[k], int(rows[k]), int(cols[k])) for k in every]
    nearest = torch.tensor([round_fraction(value, DTYPES[grid]) for value in truth], dtype=torch.float64)
    found = nearest.to(DTYPES[grid])
    wrong = np.sort(np.random.default_rng(1).choice(every, 300, replace=False))
    assert found.dtype == made.grid.dtype
    stored = found.view(made.grid.stored_as)
    stored[torch.from_numpy(wrong)] += torch.tensor([1, -1] * 150, dtype=stored.dtype)
    made = replace(made, stored=found.reshape(40, 60))
    unsettled = Unsettled(every, np.zeros(len(every)), source.reshape(-1), made.stored.reshape(-1))
    kept = settle(made, unsettled, np.full(len(every), np.inf))
    assert set(wrong) <= set(kept)
    # float64 leaves open about one in 2^(52 − fraction bits) of the others: none here.
    assert len(kept) == len(wrong)
    x, error, _ = element_values(made, base, rows, cols)
    for k in every[::50]:
        assert abs(Fraction(float(x[k])) - truth[k]) <= Fraction(float(error[k]))


def test_no_positions_are_no_work() -> None:
    made = block(Fraction(1), torch.ones(2, 1), torch.ones(1, 2), torch.ones(2, 2), "BF16")
    none = Unsettled(np.zeros(0, np.int64), np.zeros(0), made.source[0, :0], made.stored[0, :0])
    assert len(settle(made, none, np.zeros(0))) == 0
