"""Each rounded number is the nearest one, ties to even, in every format and at every edge of it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.merging.numbers.exact import distil, round_rational
from lorasmith.merging.numbers.rounding import (
    TARGETS,
    Array,
    Bound,
    Indices,
    cast,
    open_elements,
    round_expansion,
    round_reals,
    settle,
    to_stored,
)
from lorasmith.merging.numbers.threads import Scratch
from tests.merging.reference import nearest

FORMATS = sorted(TARGETS)


def edges(dtype: str) -> list[float]:
    """Numbers around zero, subnormals, powers of two, midpoints and the largest finite number."""
    target = TARGETS[dtype]
    step = 2.0 ** (1 - target.precision)
    tiny = 2.0**target.emin * step
    found = [0.0, tiny, tiny / 2, tiny / 2 * (1 + 2**-40), tiny * 1.5, tiny * 2.5, target.smallest_normal]
    found += [target.smallest_normal * (1 - step / 2), target.smallest_normal * (1 + step / 2)]
    for exponent in (-3, 0, 5):
        for count in (0, 1, 2, 3):
            for nudge in (-(2.0**-50), 0.0, 2.0**-50):
                found.append(2.0**exponent * (1 + count * step / 2) * (1 + nudge))
    found.append(target.largest)
    return found + [-number for number in found]


@pytest.mark.parametrize("dtype", FORMATS)
def test_edges_round_to_the_nearest_even(dtype: str) -> None:
    values = np.array(edges(dtype))
    expected = [nearest(Fraction(value), dtype) for value in values]
    assert round_reals(values, TARGETS[dtype]).tolist() == expected
    assert [round_rational(Fraction(value), TARGETS[dtype])[0] for value in values] == expected
    assert to_stored(np.array(expected), TARGETS[dtype]).double().tolist() == expected


@pytest.mark.parametrize("dtype", FORMATS)
@settings(max_examples=200, deadline=None)
@given(mantissa=st.integers(-(2**53), 2**53), exponent=st.integers(-75, -40))
def test_any_number_rounds_to_the_nearest(dtype: str, mantissa: int, exponent: int) -> None:
    value = mantissa * 2.0**exponent
    expected = nearest(Fraction(value), dtype)
    assert round_reals(np.array([value]), TARGETS[dtype])[0] == expected
    assert round_rational(Fraction(value), TARGETS[dtype])[0] == expected


@pytest.mark.parametrize("dtype", FORMATS)
def test_beyond_the_largest_number_is_infinite_only_once_rounded(dtype: str) -> None:
    target = TARGETS[dtype]
    step = target.largest - float(np.nextafter(target.largest, 0)) if dtype == "F64" else 0.0
    half_step = 2.0 ** (target.emax - target.precision)
    values = np.array([target.largest, target.largest + half_step * 0.999, target.largest + half_step]) + step
    assert round_reals(values, target).tolist() == [target.largest, target.largest, np.inf]
    assert round_rational(Fraction(target.largest) + Fraction(half_step), target)[0] == np.inf


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_one_rounding_where_float32_on_the_way_would_make_two(dtype: str) -> None:
    """Just above a midpoint, but so little that float32 takes it for the midpoint itself."""
    target = TARGETS[dtype]
    value = 1 + 2.0**-target.precision + 2.0**-40
    twice = torch.tensor([value], dtype=torch.float64).to(torch.float32).to(target.native).item()
    assert twice == 1.0
    assert round_reals(np.array([value]), target)[0] == nearest(Fraction(value), dtype) > 1


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_low_part_breaks_a_tie(dtype: str) -> None:
    target = TARGETS[dtype]
    tie = 1 + 2.0**-target.precision
    for low, expected, is_tie in (
        (0.0, 1.0, True),
        (2.0**-90, 2 * tie - 1, False),
        (-(2.0**-90), 1.0, False),
    ):
        rounded, ties = round_expansion(np.array([tie]), np.array([low]), target)
        assert (rounded[0], ties[0]) == (expected, is_tie)


def fast_path(candidate: Array, relative: float, absolute: Array, dtype: str) -> tuple[torch.Tensor, Indices]:
    values = torch.from_numpy(candidate)
    out = torch.empty(values.shape, dtype=TARGETS[dtype].native)
    arrays = Scratch().of(*values.shape)
    bound = Bound(relative, absolute, float(absolute.max()))
    return out, open_elements(values, bound, TARGETS[dtype], arrays, out)


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_the_fast_path_calls_certain_is_right(dtype: str) -> None:
    """Exact numbers that lie anywhere within the error bound of the candidate round as the candidate does."""
    target = TARGETS[dtype]
    generator = np.random.default_rng(0)
    factor = 22 * 2.0**-53
    exact = generator.standard_normal(20_000) * 2.0 ** generator.integers(-30, 6, 20_000)
    # A third lies on or very near a midpoint.
    step = 2.0 ** (np.floor(np.log2(np.abs(exact[::3]))) - target.precision)
    exact[::3] = (np.floor(exact[::3] / step) + 0.5 * generator.integers(0, 2, len(step))) * step
    size = 2.0 ** generator.integers(-6, 3, len(exact))
    bound = factor * (np.abs(exact) + 2 * size) * (1 - 2.0**-30)
    candidate = exact + bound * generator.choice([-1, 1], len(exact))
    rounded, unsure = fast_path(candidate[:, None], factor, 2 * factor * size[:, None], dtype)
    certain = np.ones(len(exact), dtype=bool)
    certain[unsure] = False
    assert 0.3 < certain.mean() < 1
    truth = round_reals(exact, target)
    assert (rounded.double().numpy().reshape(-1)[certain] == truth[certain]).all()
    values, sure = settle(candidate, bound * (1 + 2.0**-20), target)
    assert (values[sure] == truth[sure]).all()
    assert sure.mean() > 0.5


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_number_that_is_none_is_never_certain(dtype: str) -> None:
    target = TARGETS[dtype]
    for bad in (float("nan"), float("inf"), -float("inf")):
        _, unsure = fast_path(np.array([[bad]]), 2.0**-49, np.full((1, 1), 2.0**-49), dtype)
        assert unsure.tolist() == [0]
        assert not settle(np.array([bad]), np.array([1e-10]), target)[1].any()


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", FORMATS)
def test_casts_round_correctly(dtype: str, source: torch.dtype) -> None:
    values = torch.tensor([value for value in edges("F16") + edges("BF16") if abs(value) < 6e4]).to(source)
    expected = [nearest(Fraction(value), dtype) for value in values.double().tolist()]
    assert cast(values, TARGETS[dtype]).double().tolist() == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.builds(lambda m, e: m * 2.0**e, st.integers(-(2**53), 2**53), st.integers(-80, 20)),
        min_size=1,
        max_size=40,
    )
)
def test_sums_lose_nothing(numbers: list[float]) -> None:
    high, low, certain = distil(np.array([numbers]))
    exact = sum((Fraction(number) for number in numbers), start=Fraction(0))
    found = Fraction(float(high[0])) + Fraction(float(low[0]))
    if certain[0]:
        assert found == exact
    assert abs(found - exact) <= abs(exact) / 2**90
