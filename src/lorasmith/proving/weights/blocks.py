"""Rows of a matrix with what goes into their formula: the sum S + Σ c·L·R in floating point with a bound.

Error bound (Higham, Accuracy and Stability of Numerical Algorithms, 3.1): a sum of n products in any order
is off by at most γ(n)·Σ|products|, γ(n) = n·u/(1 − n·u), u half the distance from 1 to the next number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import torch

from lorasmith.errors import AdapterError
from lorasmith.proving.weights.rounding import Floats, Grid, Ints

UNIT = 2.0**-53
"""Half the distance from 1 to the next number of float64."""
_GROUP = 64
"""Squares are summed in groups of this many, then the groups: the bound on a sum grows with either count."""


def gamma(products: float, unit: float) -> float:
    """γ(n) = n·u/(1 − n·u), the relative error of a sum of n products (Higham, 3.1)."""
    return products * unit / (1 - products * unit)


@dataclass(frozen=True)
class Gain:
    """DoRA's factors m/‖V‖, which scale each row or column of V = W + c·B·A.

    As in arXiv 2402.09353 (eq. 5) and PEFT's unmerged forward: the norm is taken over one output's weights.
    They are known in float64 with one relative bound, and exactly by their squares.
    """

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


@dataclass(frozen=True)
class LoadedTerm:
    """A term with its factors at hand."""

    factor: Fraction
    left: torch.Tensor
    right: torch.Tensor
    first_row: int
    right_quick: torch.Tensor
    """R in the type of the quick test."""
    right_columns: torch.Tensor
    """R the other way round [columns, r], for single elements."""
    right_norms: torch.Tensor
    """2-norms of the columns of R."""
    right_norm: float
    """Largest 2-norm of a column of R."""

    @cached_property
    def columns64(self) -> Floats:
        """`right_columns` in float64."""
        columns: Floats = self.right_columns.to(torch.float64).numpy()
        return columns

    def left_rows(self, start: int, count: int) -> torch.Tensor:
        """Rows of L for rows of the matrix."""
        return self.left[start - self.first_row : start - self.first_row + count]


@dataclass(frozen=True)
class RowBlock:
    """Rows of the matrix: what the merge stores, and what goes into the formula."""

    name: str
    grid: Grid
    start: int
    """Row of the whole matrix that the block begins with."""
    stored: torch.Tensor
    """What the merge stores, [rows, columns] in the grid's type."""
    source: torch.Tensor
    """What the merge was made from, [rows, columns] in its own type."""
    terms: tuple[LoadedTerm, ...]
    magnitudes: torch.Tensor | None = None
    """DoRA with one norm per row: m for the block's rows."""
    gain: Gain | None = None
    """DoRA with one norm per column."""
    seed: int | None = None
    """Seed of a dithered merge."""


def prepare_block(
    terms: Sequence[LoadedTerm], start: int, rows: int, kind: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """c·L of each term for some rows, and a bound [rows, 1] on Σ|c·L|·|R| per element."""
    lefts, reach = [], torch.zeros(rows, 1, dtype=torch.float64)
    for term in terms:
        left = term.left_rows(start, rows).to(torch.float64) * float(term.factor)
        reach += left.square().sum(dim=1, keepdim=True).sqrt_() * term.right_norm
        lefts.append(left.to(kind))
    return lefts, reach


def sums(
    source: torch.Tensor, terms: Sequence[LoadedTerm], start: int, kind: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """S + Σ c·L·R of rows from `start` on, the bound of `prepare_block`, and the relative bound b.

    An element is off by at most b·(|S| + the bound on its row).
    """
    lefts, reach = prepare_block(terms, start, len(source), kind)
    x = source.to(kind, copy=True)
    for left, term in zip(lefts, terms, strict=True):
        # Not from the quick test's copy in float32: factors may be stored in float64.
        x.addmm_(left, term.right.to(kind))
    # To the additions come c·L in two roundings or three, R in one, and the product.
    rank = sum(term.right.shape[0] for term in terms)
    return x, reach, gamma(rank + 6, torch.finfo(kind).eps / 2)


FIRST = 16
"""Differences kept per tensor: the proof lists the first ones."""

BUCKETS = (1, 2, 4, 16, 256, 65536)
"""Lower ends of the classes of distances that the record counts, in ulps."""


@dataclass(frozen=True)
class Wrong:
    """One wrong element, in coordinates of the matrix."""

    row: int
    column: int
    found: float | str
    expected: float | str
    ulps: int


@dataclass
class Tally:
    """Counts of wrong elements in a block, a tensor, or a model."""

    elements: int = 0
    wrong: int = 0
    stale: int = 0
    """Wrong elements that hold what the base holds."""
    near: int = 0
    """Wrong elements that are off by no more than a few roundings of the sum's terms."""
    max_ulps: int = 0
    redone: int = 0
    buckets: dict[int, int] = field(default_factory=dict)
    first: list[Wrong] = field(default_factory=list)
    moved: float = 0.0
    """Σ (merged − base)·ΔW over the wrong elements."""
    wanted: float = 0.0
    """Σ ΔW² over the wrong elements."""

    def add(self, other: Tally) -> None:
        """Take in the tally of the next block."""
        self.elements += other.elements
        self.wrong += other.wrong
        self.stale += other.stale
        self.near += other.near
        self.max_ulps = max(self.max_ulps, other.max_ulps)
        self.redone += other.redone
        self.moved += other.moved
        self.wanted += other.wanted
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.first.extend(other.first[: max(0, FIRST - len(self.first))])

    def count(self, distance: Ints) -> None:
        """Enter wrong elements by their distances in ulps."""
        self.wrong += len(distance)
        self.max_ulps = max(self.max_ulps, int(distance.max()))
        for low, end in zip(BUCKETS, (*BUCKETS[1:], None), strict=True):
            inside = distance >= low if end is None else (distance >= low) & (distance < end)
            if inside.any():
                self.buckets[low] = self.buckets.get(low, 0) + int(inside.sum())
