"""Numbers as people read them, and axes that hold their values."""

from __future__ import annotations

import pytest

from lorasmith.reporting.figures import duration, linear_axis, log_axis, number, percent, signed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0734, "0.0734"),
        (1.53e-4, "1.53e-4"),
        (-6.8e-5, "−6.80e-5"),
        (12345.6, "12346"),
        (4e6, "4.00e6"),
        (0.0, "0"),
        (9.999, "10.00"),
        (None, "not measured"),
        ("exact", "exact"),
    ],
)
def test_numbers(value: float | str | None, text: str) -> None:
    assert number(value) == text


def test_signs_percents_and_durations() -> None:
    assert (signed(0.5), signed(-0.5), signed(0.0)) == ("+0.500", "−0.500", "0")
    assert percent(0.99134) == "99.13 %"
    assert (duration(0.44), duration(81), duration(7265)) == ("0.4 s", "1 min 21 s", "2 h 01 min")


@pytest.mark.parametrize("values", [[1.2, 3.4], [-0.002, 0.0001], [5.0], [0.0, 0.0], [1e6, 2e9]])
def test_a_linear_axis_holds_its_values_and_has_few_round_ticks(values: list[float]) -> None:
    axis = linear_axis(values)
    assert all(0 < axis.at(value) < 100 for value in values)
    assert 2 <= len(axis.ticks) <= 7
    assert sorted(axis.at(tick) for tick in axis.ticks) == [axis.at(tick) for tick in axis.ticks]


def test_a_logarithmic_axis_runs_over_whole_powers() -> None:
    axis = log_axis([3e-9, 2e-2, 0.0])
    assert (axis.low, axis.high) == (1e-9, 0.1)
    assert axis.at(1e-5) == pytest.approx(50)
    assert axis.at(0.0) == 0
    assert [axis.at(tick) for tick in axis.ticks] == pytest.approx([0, 25, 50, 75, 100])
