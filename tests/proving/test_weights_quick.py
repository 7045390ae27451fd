"""The quick test accepts nothing that is wrong, however close to a midpoint and however its sums cancel."""

from __future__ import annotations

import warnings
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from lorasmith.proving.weights.judge import exact_sum
from lorasmith.proving.weights.quick import doubtful, quick_type
from lorasmith.proving.weights.rounding import GRIDS
from tests.proving.small import round_fraction
from tests.proving.test_weights_exact import block

ROWS, COLUMNS, RANK = 24, 40, 16


@pytest.mark.parametrize("grid", ["BF16", "F16"])
@pytest.mark.parametrize("update", [1e-3, 1.0, 300.0])
def test_the_wrong_side_of_a_midpoint_is_never_accepted(grid: str, update: float) -> None:
    generator = torch.Generator().manual_seed(3)
    dtype = GRIDS[grid].dtype
    left = torch.randn(ROWS, RANK, generator=generator)
    right = torch.randn(RANK, COLUMNS, generator=generator) * update
    # Half of the products nearly cancel the other half, so that sums are small beside their parts.
    left[:, RANK // 2 :] = -left[:, : RANK // 2] * (1 + 2.0**-12)
    right[RANK // 2 :] = right[: RANK // 2]
    wanted = (1 + torch.rand(ROWS, COLUMNS, generator=generator)).to(dtype)
    half = 2.0 ** -(GRIDS[grid].fraction_bits + 1)
    # A source that takes the sum to the midpoint above m, up to float32's rounding of the source itself.
    source = (wanted.double() + half - left.double() @ right.double()).float()
    made = replace(block(Fraction(1), left, right, source, grid), stored=wanted)
    assert quick_type(made.grid, RANK, source.dtype) == torch.float32
    flat = source.double().reshape(-1).tolist()
    truth = [exact_sum(made.terms, flat[k], *divmod(k, COLUMNS)) for k in range(len(flat))]
    right_one = torch.tensor([float(round_fraction(value, dtype)) for value in truth]).to(dtype)
    wrong = np.flatnonzero(right_one.ne(wanted.reshape(-1)).numpy())
    # So close to midpoints about half lie beyond them.
    assert len(wrong) > ROWS * COLUMNS / 5
    assert set(wrong) <= set(doubtful(made))


def test_what_is_far_from_every_midpoint_is_accepted() -> None:
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(ROWS, RANK, generator=generator)
    right = torch.randn(RANK, COLUMNS, generator=generator) / 100
    stored = (1.25 + 0.5 * torch.rand(ROWS, COLUMNS, generator=generator)).bfloat16()
    source = (stored.double() - left.double() @ right.double()).float()
    made = replace(block(Fraction(1), left, right, source, "BF16"), stored=stored)
    assert len(doubtful(made)) == 0
    # Not so what no bound can hold for.
    odd = torch.where(torch.arange(COLUMNS) == 7, torch.nan, source)
    odd[:, 9] = torch.inf
    stored[:, 9] = torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(doubtful(replace(made, source=odd)) % COLUMNS) == {7, 9}


def test_factors_in_float64_are_not_rounded_where_float64_is_asked_for() -> None:
    # Two adapters whose ranks together are beyond float32's; each has a copy for its own quick test.
    generator = torch.Generator().manual_seed(7)
    lefts = [torch.randn(ROWS, 40, generator=generator, dtype=torch.float64) for _ in range(2)]
    rights = [torch.randn(40, COLUMNS, generator=generator, dtype=torch.float64) for _ in range(2)]
    stored = (1 + 0.9 * torch.rand(ROWS, COLUMNS, generator=generator)).bfloat16()
    update = lefts[0] @ rights[0] + lefts[1] @ rights[1]
    # Beyond the midpoint by less than rounding the factors to float32 may hide, and by more than float64's.
    source = stored.double() + 2.0**-8 * (1 + 2.0**-22) - update
    blocks = [
        block(Fraction(1), left, right, source, "BF16") for left, right in zip(lefts, rights, strict=True)
    ]
    terms = tuple(one.terms[0] for one in blocks)
    assert all(term.right_quick.dtype == torch.float32 for term in terms)
    made = replace(blocks[0], terms=terms, stored=stored)
    assert len(doubtful(made)) == ROWS * COLUMNS
