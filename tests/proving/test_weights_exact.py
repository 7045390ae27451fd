"""Where floating point is called exact it is, and where it is not, rational numbers decide quickly."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from lorasmith.proving.weights_compare import compare
from lorasmith.proving.weights_exact import exact_sum, float64_is_exact
from lorasmith.proving.weights_rounding import GRIDS
from lorasmith.proving.weights_terms import Block, LoadedTerm


def block(
    factor: Fraction, left: torch.Tensor, right: torch.Tensor, source: torch.Tensor, grid: str
) -> Block:
    """One term on top of a source, with the source itself as what was stored."""
    norms = right.double().norm(dim=0)
    term = LoadedTerm(factor, left, right, 0, right.float(), right.T.contiguous(), norms, float(norms.max()))
    return Block("w", GRIDS[grid], 0, source.to(GRIDS[grid].dtype), source, (term,))


@pytest.mark.parametrize("exponents", [1, 8, 24, 40])
@pytest.mark.parametrize(
    "factor", [Fraction(2), Fraction(0.5), Fraction(2 / 3), Fraction(0.1) * Fraction(0.3)]
)
def test_exact_means_exact(exponents: int, factor: Fraction) -> None:
    generator = torch.Generator().manual_seed(exponents)

    def numbers(*shape: int) -> torch.Tensor:
        scale = torch.randint(-exponents, 1, shape, generator=generator)
        return torch.ldexp(torch.randint(-9, 10, shape, generator=generator).float(), scale)

    source, left, right = numbers(20, 30), numbers(20, 4), numbers(4, 30)
    made = block(factor, left, right, source, "F32")
    rows, cols = (index.reshape(-1) for index in np.indices((20, 30)))
    size = (source.abs().double() + float(factor) * (left.abs().double() @ right.abs().double())).reshape(-1)
    flat = source.double().reshape(-1).numpy()
    exact = float64_is_exact(made, flat, size.numpy(), rows, cols)
    computed = (source.double() + float(factor) * (left.double() @ right.double())).reshape(-1)
    for k in np.flatnonzero(exact):
        value = exact_sum(made.terms, flat[k], int(rows[k]), int(cols[k]))
        assert Fraction(float(computed[k])) == value
    if factor in (Fraction(2), Fraction(0.5)) and exponents <= 8:
        assert exact.all()
    if exponents == 40:
        assert not exact.all()


def test_a_matrix_of_ties_takes_no_rational_number() -> None:
    # W in [1, 2) on bfloat16's grid, and an update of exactly half a step: 65,536 ties.
    source = (1 + torch.arange(65536).reshape(256, 256) % 127 / 128).bfloat16()
    made = block(Fraction(2), torch.ones(256, 1), torch.full((1, 256), 2.0**-9), source, "BF16")
    tally = compare(made)
    odd = int((source.view(torch.int16) & 1).sum())
    assert tally.wrong == odd
    assert tally.redone == 0


@pytest.mark.parametrize("grid", ["BF16", "F16", "F32"])
def test_near_ties_are_decided_one_by_one(grid: str) -> None:
    # Half a step less or more by far less than float64 resolves beside 1: only rational numbers can tell.
    half = 2.0 ** -(GRIDS[grid].fraction_bits + 1)
    source = torch.ones(64, 64)
    speck = 2.0**-90
    left = torch.stack([torch.ones(64), torch.tensor([speck, -speck] * 32)], dim=1)
    made = block(Fraction(1), left, torch.tensor([[half], [1.0]]).repeat(1, 64), source, grid)
    tally = compare(made)
    assert tally.redone == 64 * 64
    assert tally.wrong == 32 * 64, "above the midpoint the next number is right"
    assert tally.max_ulps == 1
