"""DoRA: the factor m/‖V‖ that scales each row or column of V = W + c·B·A, with a bound and in squares.

As in arXiv 2402.09353 (eq. 5) and PEFT's unmerged forward: the norm is taken over one output's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch

from lorasmith.errors import AdapterError

UNIT = 2.0**-53
_GROUP = 64
"""Squares are summed in groups of this many, then the groups: the bound on a sum grows with either count."""


def gamma(products: float, unit: float) -> float:
    """γ(n) = n·u/(1 − n·u), the relative error of a sum of n products (Higham, 3.1)."""
    return products * unit / (1 - products * unit)


@dataclass(frozen=True)
class Gain:
    """Factors in float64 with one relative bound, and what decides an element exactly."""

    values: torch.Tensor
    """[rows, 1] or [1, columns]."""
    per_row: bool
    error: float
    magnitudes: torch.Tensor
    """[rows] or [columns], as stored."""
    exact_square: Callable[[int], Fraction]
    """‖V‖² of a row or column, as a rational number."""


def sum_of_squares(v: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Σ over the columns of each row of v², float64, and the relative bound on its rounding."""
    squares, columns = v.square(), v.shape[1]
    whole = columns - columns % _GROUP
    total = squares[:, :whole].reshape(len(v), -1, _GROUP).sum(dim=2).sum(dim=1)
    total += squares[:, whole:].sum(dim=1)
    return total, gamma(_GROUP + columns // _GROUP + 3, UNIT)


def make_gain(
    squares: torch.Tensor,
    spread: torch.Tensor,
    error: float,
    magnitudes: torch.Tensor,
    *,
    per_row: bool,
    exact_square: Callable[[int], Fraction],
    name: str,
) -> Gain:
    """m/√squares; `error` bounds squares relatively, `spread` is ‖computed V − V‖ absolutely.

    Raises `AdapterError` where a norm is zero or not finite: PEFT itself would divide by it.
    """
    norms = squares.sqrt()
    if not bool(((norms > 0) & torch.isfinite(norms)).all()) or not bool(torch.isfinite(magnitudes).all()):
        raise AdapterError(
            f"the update of {name!r} has a row whose norm or magnitude is zero or not finite",
            expected="finite norms above zero, which DoRA divides by",
        )
    relative = float((spread / norms).max())
    # Where the computed row may be far from the true one, nothing is known: all its elements stay open.
    bound = (relative + error + 8 * UNIT) / (1 - relative) if relative < 0.5 else math.inf
    values = magnitudes.to(torch.float64) / norms
    shaped = values[:, None] if per_row else values[None, :]
    return Gain(shaped, per_row, bound, magnitudes, exact_square)
