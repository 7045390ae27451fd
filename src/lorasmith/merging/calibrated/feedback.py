"""Rounding with error feedback: what one column loses is made up for by the columns that come after it.

A linear layer y = W·x with inputs x of second moment H = E[x·xᵀ] loses E‖(Q − W)·x‖² = tr((Q − W)·H·(Q − W)ᵀ)
when Q takes the place of W. Both steps below lower it, every output row on its own:

*The pass* is GPTQ's (Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", arXiv 2210.17323, algorithm 1): with U the upper Cholesky factor of
(H + λI)⁻¹, column j is rounded, and its error divided by Uⱼⱼ times Uⱼₖ is taken from every later column k.
The columns go by falling Hⱼⱼ, so that those that matter most are rounded while most others can still make up
for them. Their grid is the target format's own, whose step differs from element to element.

*The refinement* goes over the columns again: with G = (Q − W)·H, the best value of column j given all others
is Qⱼ − Gⱼ/Hⱼⱼ, and the grid point next to it never raises the loss.

What is then left of the loss is not all noise. Where an update Δ is smaller than the grid's steps, a part of
it stays lost in every row: Q − W leans towards −Δ, and what so many rows miss in common is seen in the
output, however small each part is. So each round of the refinement first measures how much of a row's update
is missing, a = −(q − w)·H·δᵀ / δ·H·δᵀ, and aims at w + a·δ in place of w, a being summed over the rounds.

Both work on blocks of columns, so that most of the arithmetic is products of matrices. An element stays
within a number of grid steps of the exact value's own rounding, which is what the proof can check.
O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from lorasmith.merging.numbers.rounding import FloatFormat

BLOCK = 32
"""Columns of a block: short enough that going back over its columns is cheap, long enough that most of the
arithmetic is in the products behind it."""


@dataclass(frozen=True)
class Feedback:
    """How the columns are gone through."""

    damping: float = 0.03
    """λ over the mean of H's diagonal. With few rows H says more than they know: measured on unseen rows,
    0.03 lost less than 0.001 and 0.01, and left the model nearer to the adapter than 0.1
    (docs/faithful-merge.md)."""
    passes: int = 2
    """How often the refinement goes over all columns."""
    most_steps: int = 15
    """How far from its own rounding an element may go, in steps of the grid. That rounding is taken from
    float32, so it may be the neighbour of the exact one: the proof allows one step more."""


class SingularError(ArithmeticError):
    """H + λI has no Cholesky factor: some inputs are not finite, or all are zero."""


@dataclass(frozen=True)
class Curvature:
    """What one second moment gives for every layer that it belongs to."""

    order: torch.Tensor
    """The columns by falling diagonal."""
    moments: torch.Tensor
    """H + λI in that order, float32."""
    factor: torch.Tensor
    """U in that order."""


def prepare_curvature(second_moment: torch.Tensor, settings: Feedback) -> Curvature:
    """Order, dampen and factorise a second moment [I, I] in float64.

    Raises `SingularError` where the second moment, damped, cannot be inverted.
    """
    diagonal = second_moment.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    damped = second_moment[order][:, order].to(torch.float64)
    damped.diagonal().add_(settings.damping * float(diagonal.mean()))
    return Curvature(order, damped.to(torch.float32), inverse_factor(damped))


class Grid(Protocol):
    """The numbers that each element may take, within its limits: columns [I, O] in a curvature's order."""

    def nearest(self, values: torch.Tensor, column: int) -> torch.Tensor:
        """The grid's numbers that are nearest to float32 values [O] of one column; `values` is used up."""


@dataclass(frozen=True)
class FloatGrid:
    """A 16-bit float format's numbers, up to some steps from each element's own rounding."""

    target: FloatFormat
    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def around(cls, columns: torch.Tensor, target: FloatFormat, most_steps: int) -> FloatGrid:
        """The numbers around exact values [I, O] in float64."""
        return cls(target, *limits(columns, target, most_steps))

    def nearest(self, values: torch.Tensor, column: int) -> torch.Tensor:
        """By the format's own rounding."""
        return to_grid(values.clamp_(self.low[column], self.high[column]), self.target)


def round_with_feedback(
    exact: torch.Tensor,
    update: torch.Tensor,
    curvature: Curvature,
    target: FloatFormat,
    settings: Feedback,
) -> torch.Tensor:
    """`exact` [O, I] in float64 on the target's grid; float32 values. No row depends on another.

    `update` is what of `exact` the adapter has brought.
    """
    columns = exact[:, curvature.order].T.contiguous()
    grid = FloatGrid.around(columns, target, settings.most_steps)
    rounded = fit_to_grid(columns, update[:, curvature.order].T, curvature, grid, settings)
    result = torch.empty(exact.shape, dtype=torch.float32)
    result[:, curvature.order] = rounded.T
    return result


def fit_to_grid(
    columns: torch.Tensor, update: torch.Tensor, curvature: Curvature, grid: Grid, settings: Feedback
) -> torch.Tensor:
    """`columns` [I, O] in float64, in the order of the curvature, on the grid; float32 values [I, O].

    `update` [I, O] is what of them the adapter has brought.
    """
    rounded = _pass(columns.to(torch.float32), curvature.factor, grid)
    change = update.to(torch.float32)
    effect = curvature.moments @ change
    energy = (effect * change).sum(0)
    overshoot = torch.zeros_like(energy)
    for _ in range(settings.passes):
        # Computed anew from the exact values in each round, so that no error of summing stays.
        gradient = curvature.moments @ (rounded.to(torch.float64) - columns).to(torch.float32)
        missing = -(gradient * change).sum(0) / energy
        overshoot += torch.where(energy > 0, missing, 0.0)
        # Aiming at w + a·δ: its gradient is that at w less a·H·δ.
        gradient.addcmul_(effect, overshoot, value=-1)
        _refine(rounded, gradient, curvature.moments, grid)
    return rounded


def inverse_factor(damped: torch.Tensor) -> torch.Tensor:
    """U with UᵀU = H⁻¹, upper, in float32, from H in float64.

    With the columns in reverse H = R·Rᵀ for an upper R, as Cholesky's method gives it; then U = R⁻¹.
    """
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed) or not bool(lower.isfinite().all()):
        raise SingularError("the second moment of the inputs cannot be inverted")
    one = torch.eye(len(damped), dtype=torch.float64)
    return torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True).to(torch.float32)


def _pass(weights: torch.Tensor, factor: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[I, O] rounded; `weights` is used up."""
    rounded = torch.empty_like(weights)
    errors = torch.empty(BLOCK, weights.shape[1])
    shares = factor / factor.diagonal()[:, None]
    for start in range(0, len(weights), BLOCK):
        stop = min(start + BLOCK, len(weights))
        own = shares[start:stop, start:stop].T.contiguous()
        for column in range(stop - start):
            place = start + column
            value = weights[place]
            if column:  # what the block's columns before this one have lost
                value = torch.addmv(value, errors[:column].T, own[column, :column], alpha=-1)
            near = grid.nearest(value.clone(), place)
            torch.sub(value, near, out=errors[column])
            rounded[place] = near
        weights[stop:].addmm_(shares[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return rounded


def _refine(
    rounded: torch.Tensor,
    gradient: torch.Tensor,
    moments: torch.Tensor,
    grid: Grid,
) -> None:
    """One round of coordinate descent on [I, O], in place; `gradient` is used up."""
    steps = torch.empty(BLOCK, rounded.shape[1])
    curvature = moments.diagonal().tolist()
    for start in range(0, len(rounded), BLOCK):
        stop = min(start + BLOCK, len(rounded))
        own = moments[start:stop, start:stop]
        for column in range(stop - start):
            place = start + column
            slope, before = gradient[place], rounded[place]
            if column:  # how the block's columns before this one have moved
                slope = torch.addmv(slope, steps[:column].T, own[column, :column])
            best = torch.add(before, slope, alpha=-1 / curvature[place])
            near = grid.nearest(best, place)
            torch.sub(near, before, out=steps[column])
            before.copy_(near)
        gradient[stop:].addmm_(moments[stop:, start:stop], steps[: stop - start])


def to_grid(values: torch.Tensor, target: FloatFormat) -> torch.Tensor:
    """Float32 values on the target's grid, each the nearest."""
    return values.to(target.native).to(torch.float32)


def limits(exact: torch.Tensor, target: FloatFormat, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 values `steps` grid points below and above each number's own rounding; finite.

    For 16-bit targets: to float32 the adapter's own arithmetic is no finer, and nothing is calibrated.
    """
    stored = exact.to(torch.float32).to(target.native).view(target.bits).to(torch.int32)
    sign = 1 << 15
    # Counted from zero, downwards for negative numbers: neighbours differ by one across zero, too.
    counted = torch.where(stored < 0, -(stored & (sign - 1)), stored)
    largest = int(torch.tensor(target.largest, dtype=target.native).view(target.bits))
    ends = []
    for moved in (counted - steps, counted + steps):
        moved.clamp_(-largest, largest)
        bits = torch.where(moved < 0, -moved - sign, moved).to(target.bits)
        ends.append(bits.view(target.native).to(torch.float32))
    return ends[0], ends[1]
