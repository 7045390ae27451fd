"""The sum S + Σ c·L·R over rows of a matrix, in floating point with a bound.

Error bound (Higham, Accuracy and Stability of Numerical Algorithms, 3.1): a sum of n products in any order
is off by at most γ(n)·Σ|products|, γ(n) = n·u/(1 − n·u), u half the distance from 1 to the next number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch

from lorasmith.proving.weights_gain import Gain, gamma
from lorasmith.proving.weights_rounding import Floats, Grid


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
class Block:
    """Rows of the matrix: what the merge stores, and what goes into the formula."""

    name: str
    grid: Grid
    start: int
    """Row of the whole matrix that the block begins with."""
    found: torch.Tensor
    """[rows, columns] in the grid's type."""
    source: torch.Tensor
    """[rows, columns] in its own type."""
    terms: tuple[LoadedTerm, ...]
    magnitudes: torch.Tensor | None = None
    """DoRA with one norm per row: m for the block's rows."""
    gain: Gain | None = None
    """DoRA with one norm per column."""
    seed: int | None = None
    """Of a dithered merge."""


def prepare(
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
    """S + Σ c·L·R of rows from `start` on, the bound of `prepare`, and the relative bound b.

    An element is off by at most b·(|S| + the bound on its row).
    """
    lefts, reach = prepare(terms, start, len(source), kind)
    x = source.to(kind, copy=True)
    for left, term in zip(lefts, terms, strict=True):
        # Not from the quick test's copy in float32: factors may be stored in float64.
        x.addmm_(left, term.right.to(kind))
    # To the additions come c·L in two roundings or three, R in one, and the product.
    rank = sum(term.right.shape[0] for term in terms)
    return x, reach, gamma(rank + 6, torch.finfo(kind).eps / 2)
