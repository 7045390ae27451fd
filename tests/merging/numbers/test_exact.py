"""Rational numbers say when they are ties; values are held by test_rounding and test_dither."""

from __future__ import annotations

from fractions import Fraction

import pytest

from lorasmith.merging.numbers.exact import dither_rational, round_rational
from lorasmith.merging.numbers.rounding import TARGETS

STEP = Fraction(1, 128)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Fraction(0), (0.0, False)),
        (1 + STEP / 2, (1.0, True)),
        (1 + STEP * 3 / 2, (1 + 2 / 128, True)),
        (-1 - STEP * 3 / 2, (-1 - 2 / 128, True)),
        (1 + STEP / 2 + Fraction(1, 10**40), (1 + 1 / 128, False)),
        (Fraction(1, 2**134), (0.0, True)),
        (Fraction(3, 2**134), (2.0**-132, True)),
    ],
)
def test_halves_go_to_the_even_neighbour_and_are_ties(value: Fraction, expected: tuple[float, bool]) -> None:
    assert round_rational(value, TARGETS["BF16"]) == expected


@pytest.mark.parametrize(
    ("beyond", "expected"),
    [
        (Fraction(0), (1.0, True)),
        (Fraction(1, 10**40), (1 + 1 / 128, False)),
        (-Fraction(1, 10**40), (1.0, False)),
    ],
)
def test_a_number_at_its_threshold_goes_down_and_says_so(
    beyond: Fraction, expected: tuple[float, bool]
) -> None:
    threshold = 12345671
    value = 1 + STEP * Fraction(threshold, 1 << 25) + beyond
    assert dither_rational(value, threshold, TARGETS["BF16"]) == expected
    assert dither_rational(-value, threshold, TARGETS["BF16"]) == (-expected[0], expected[1])
