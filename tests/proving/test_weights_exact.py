"""The comparison of blocks: near midpoints, at powers of two and zeros, and where terms cancel."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from lorasmith.proving.weights.blocks import LoadedTerm, RowBlock
from lorasmith.proving.weights.check import compare
from lorasmith.proving.weights.judge import exact_sum, float64_is_exact
from lorasmith.proving.weights.rounding import GRIDS
from tests.proving.small import round_fraction


def block(
    factor: Fraction, left: torch.Tensor, right: torch.Tensor, source: torch.Tensor, grid: str
) -> RowBlock:
    """One term on top of a source, with the source itself as what was stored."""
    norms = right.double().norm(dim=0)
    term = LoadedTerm(factor, left, right, 0, right.float(), right.T.contiguous(), norms, float(norms.max()))
    return RowBlock("w", GRIDS[grid], 0, source.to(GRIDS[grid].dtype), source, (term,))


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


@pytest.mark.parametrize("grid", ["BF16", "F16", "F32"])
def test_acceptance_between_all_kinds_of_neighbours(grid: str) -> None:
    # Numbers at, between and beside neighbours around zero, subnormals, powers of two and the largest.
    form = GRIDS[grid]
    top, one = form.infinity - 1, (form.bias << form.fraction_bits)
    starts = [0, 1, 2, (1 << form.fraction_bits) - 2, 1 << form.fraction_bits, one - 2, one + 5, top - 3]
    magnitudes = sorted({start + k for start in starts for k in range(4) if start + k <= top})
    source, found = [], []
    for magnitude in magnitudes:
        low, high = form.one(magnitude), form.one(magnitude + 1)
        for share in (0.0, 0.2, 0.5 - 2**-12, 0.5, 0.5 + 2**-12, 0.8):
            for candidate in (magnitude - 1, magnitude, magnitude + 1):
                for sign in (1.0, -1.0):
                    for stored_sign in (1.0, -1.0):
                        if 0 <= candidate <= top:
                            source.append(sign * (low + share * (high - low)))
                            found.append(stored_sign * form.one(candidate))
    x = torch.tensor(source, dtype=torch.float64)[None]
    stored = torch.tensor(found, dtype=torch.float64)[None].to(form.dtype)
    right = [
        value == 0 == kept or (value, np.signbit(value)) == (kept, np.signbit(kept))
        for value, kept in zip((_rounded(v, form.dtype) for v in source), found, strict=True)
    ]
    # A zero in the source may keep its sign or lose a minus; a minus must not come from nowhere.
    for k, (value, kept) in enumerate(zip(source, found, strict=True)):
        if value == 0 == kept:
            right[k] = not np.signbit(kept) or bool(np.signbit(value))
        elif value != 0 and _rounded(value, form.dtype) == 0 == kept:
            right[k] = bool(np.signbit(value) == np.signbit(kept))
    tally = compare(RowBlock("w", form, 0, stored, x, ()))
    assert tally.wrong == right.count(False)
    for k in range(len(found)):
        single = compare(RowBlock("w", form, 0, stored[:, k : k + 1], x[:, k : k + 1], ()))
        assert single.wrong == (not right[k]), (source[k], found[k])


def _rounded(value: float, dtype: torch.dtype) -> float:
    return round_fraction(Fraction(value), dtype)


@pytest.mark.parametrize(("grid", "scale"), [("BF16", 2.0**10), ("F16", 2.0**6), ("F32", 2.0**24)])
def test_terms_that_cancel_do_not_hide_a_wrong_rounding(grid: str, scale: float) -> None:
    # Large products that nearly cancel: arithmetic in the quick test's own precision rounds some wrongly,
    # and a bound that forgot the products' size would accept what that arithmetic gives.
    form, narrow = GRIDS[grid], torch.float32 if grid != "F32" else torch.float64
    generator = torch.Generator().manual_seed(4)
    rows, columns = (200, 300) if grid != "F32" else (40, 50)
    big = torch.randn(rows, 4, generator=generator) * scale
    left = torch.cat([big, -big], dim=1)
    right = torch.randn(4, columns, generator=generator)
    right = torch.cat([right, right + torch.randn(4, columns, generator=generator) / scale], dim=0)
    source = torch.randn(rows, columns, generator=generator).to(form.dtype)
    sloppy = source.to(narrow) + left.to(narrow) @ right.to(narrow)
    made = block(Fraction(1), left, right, source, grid)
    stored = torch.tensor(
        [[_rounded(v, form.dtype) for v in row] for row in sloppy.tolist()], dtype=torch.float64
    )
    exact = [[_rounded_exactly(made, float(source[i, j]), i, j) for j in range(columns)] for i in range(rows)]
    wrong = int((stored != torch.tensor(exact, dtype=torch.float64)).sum())
    assert wrong > 0, "the case is hard enough"
    tally = compare(RowBlock("w", form, 0, stored.to(form.dtype), source, made.terms))
    assert tally.wrong == wrong


def _rounded_exactly(made: RowBlock, source: float, row: int, column: int) -> float:
    return round_fraction(exact_sum(made.terms, source, row, column), made.grid.dtype)
