"""The interval test against Python's own rational rounding."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.proving.weights import rounding
from lorasmith.proving.weights.rounding import GRIDS, Grid
from tests.proving.small import FORMATS, round_fraction

ALL = pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)


def _neighbours(grid: Grid, magnitude: int) -> list[Fraction]:
    """Points on, between and beside three neighbouring numbers and their midpoints."""
    low, mid, high = (
        Fraction(float(grid.value(np.array([m]))[0]))
        for m in (max(magnitude - 1, 0), magnitude, magnitude + 1)
    )
    speck = Fraction(1, 2**300)
    points = [mid, (low + mid) / 2, (mid + high) / 2, low, high, (3 * mid + high) / 4]
    return [point + change for point in points for change in (-speck, 0, speck)]


@ALL
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_exact_nearest_rounds_as_python_does(grid: Grid, data: st.DataObject) -> None:
    magnitude = data.draw(st.integers(0, grid.infinity - 1))
    for x in _neighbours(grid, magnitude):
        found, negative = rounding.exact_nearest(grid, x, False)
        assert grid.show(found, negative) == _shown(round_fraction(x, grid.dtype)), (magnitude, x)


def _shown(value: float) -> float | str:
    return value if np.isfinite(value) else str(value)


@ALL
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_judge_accepts_the_nearest_and_nothing_else(grid: Grid, data: st.DataObject) -> None:
    bits = FORMATS[grid.dtype][0]
    step = data.draw(st.integers(-(2 ** (bits + 3)), 2 ** (bits + 3)))
    exponent = data.draw(st.integers(-30, 12))
    x = float(step) * 2.0**exponent
    right = round_fraction(Fraction(x), grid.dtype)
    if x == 0 or not np.isfinite(right):
        return
    stored = torch.tensor([right], dtype=torch.float64).to(grid.dtype)
    magnitude, negative = grid.magnitudes(stored)
    candidates = np.clip(np.arange(-2, 3) + magnitude[0], 0, grid.infinity - 1)
    for candidate in candidates:
        verdict = rounding.judge_rounding(
            grid, np.array([candidate]), negative, np.array([x]), np.zeros(1), np.zeros(1, bool)
        )
        assert bool(verdict.right[0]) == (candidate == magnitude[0])
        assert bool(verdict.wrong[0]) == (candidate != magnitude[0])
        flipped = rounding.judge_rounding(
            grid, np.array([candidate]), ~negative, np.array([x]), np.zeros(1), np.zeros(1, bool)
        )
        assert bool(flipped.wrong[0]), "the sign is part of the number, of a zero too"


@ALL
def test_nearest_agrees_with_rational_rounding(grid: Grid) -> None:
    generator = np.random.default_rng(3)
    x = generator.standard_normal(2000) * 2.0 ** generator.integers(-45, 14, 2000)
    magnitude, negative = rounding.nearest(grid, x, np.signbit(x))
    for k, value in enumerate(x):
        assert (int(magnitude[k]), bool(negative[k])) == rounding.exact_nearest(grid, Fraction(value), False)


@ALL
def test_a_bound_that_reaches_over_a_midpoint_leaves_the_element_open(grid: Grid) -> None:
    magnitude = np.array([grid.infinity // 2])
    middle = grid.midpoint(magnitude)
    for error, is_open in ((1e-12, True), (0.0, False)):
        verdict = rounding.judge_rounding(
            grid, magnitude, np.array([False]), middle, middle * error, np.zeros(1, bool)
        )
        assert bool(verdict.open[0]) == is_open


@ALL
def test_halfway_to_infinity_is_never_right(grid: Grid) -> None:
    largest = np.array([grid.infinity - 1])
    overflow = grid.midpoint(largest)
    nothing = np.zeros(1)
    below = rounding.judge_rounding(
        grid, largest, np.array([False]), np.nextafter(overflow, 0), nothing, np.zeros(1, bool)
    )
    at = rounding.judge_rounding(grid, largest, np.array([False]), overflow, nothing, np.zeros(1, bool))
    assert below.right[0]
    assert at.wrong[0]


@ALL
def test_a_negative_zero_needs_one_in_the_base(grid: Grid) -> None:
    zero, nothing = np.zeros(1, np.int64), np.zeros(1)
    for minus, base_minus, right in ((0, 0, 1), (0, 1, 1), (1, 0, 0), (1, 1, 1)):
        verdict = rounding.judge_rounding(
            grid, zero, np.array([bool(minus)]), nothing, nothing, np.array([bool(base_minus)])
        )
        assert bool(verdict.right[0]) == bool(right)
        assert bool(verdict.wrong[0]) != bool(right)


@ALL
def test_distance_counts_every_number_between(grid: Grid) -> None:
    one = grid.magnitudes(torch.tensor([1.0], dtype=grid.dtype))[0]
    plus, minus = np.array([False]), np.array([True])
    assert rounding.ulps(one, plus, one + 3, plus)[0] == 3
    assert rounding.ulps(np.array([0]), minus, np.array([0]), plus)[0] == 1
    assert rounding.ulps(np.array([1]), minus, np.array([1]), plus)[0] == 3


def test_exact_dot_is_exact_over_the_whole_range() -> None:
    left, right = [2.0**-149, 1.5, 3e38], [2.0**-149, -(2.0**-60), 3e38]
    expected = sum((Fraction(a) * Fraction(b) for a, b in zip(left, right, strict=True)), Fraction(0))
    assert rounding.exact_dot(left, right) == expected
