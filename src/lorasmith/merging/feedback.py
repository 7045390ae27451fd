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

Both work on blocks of columns, so that most of the arithmetic is products of matrices. An element stays
within a number of grid steps of the exact value's own rounding, which is what the proof can check.
O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorasmith.merging.rounding import Target

BLOCK = 64
"""Columns of a block: its O × 64 numbers stay in the cache."""


@dataclass(frozen=True)
class Feedback:
    """How the columns are gone through."""

    damping: float = 0.03
    """λ over the mean of H's diagonal. With few rows H says more than they know: measured on unseen rows,
    0.03 lost less than 0.001, 0.01 and 0.1 (docs/faithful-merge.md)."""
    passes: int = 2
    """Of the refinement."""
    most_steps: int = 15
    """How far from its own rounding an element may go, in steps of the grid. That rounding is taken from
    float32, so it may be the neighbour of the exact one: the proof allows one step more."""


class SingularError(ArithmeticError):
    """H + λI has no Cholesky factor: some inputs are not finite, or all are zero."""


def round_with_feedback(
    exact: torch.Tensor, second_moment: torch.Tensor, target: Target, settings: Feedback
) -> torch.Tensor:
    """`exact` [O, I] in float64 on the target's grid, for inputs of `second_moment` [I, I]; float32 values.

    Raises `SingularError` where the second moment, damped, cannot be inverted.
    """
    diagonal = second_moment.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    damped = second_moment[order][:, order].to(torch.float64)
    damped.diagonal().add_(settings.damping * float(diagonal.mean()))
    factor = inverse_factor(damped)
    columns = exact[:, order].T.contiguous()
    low, high = limits(columns, target, settings.most_steps)
    weights = columns.to(torch.float32)
    rounded = _pass(weights.clone(), factor, low, high, target)
    moments = damped.to(torch.float32)
    for _ in range(settings.passes):
        _refine(rounded, columns, moments, low, high, target)
    result = torch.empty(exact.shape, dtype=torch.float32)
    result[:, order] = rounded.T
    return result


def inverse_factor(damped: torch.Tensor) -> torch.Tensor:
    """U with UᵀU = H⁻¹, upper, in float32, from H in float64."""
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) or not bool(lower.isfinite().all()):
        raise SingularError("the second moment of the inputs cannot be inverted")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).to(torch.float32)


def _pass(
    weights: torch.Tensor, factor: torch.Tensor, low: torch.Tensor, high: torch.Tensor, target: Target
) -> torch.Tensor:
    """[I, O] rounded; `weights` is used up."""
    count = len(weights)
    rounded = torch.empty_like(weights)
    errors = torch.empty(BLOCK, weights.shape[1])
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        own, here = factor[start:stop, start:stop], weights[start:stop]
        for column in range(stop - start):
            value = here[column]
            near = to_grid(value.clamp(low[start + column], high[start + column]), target)
            rounded[start + column] = near
            torch.sub(value, near, out=errors[column]).div_(own[column, column])
            here[column + 1 :].addr_(own[column, column + 1 :], errors[column], alpha=-1)
        weights[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return rounded


def _refine(
    rounded: torch.Tensor,
    exact: torch.Tensor,
    moments: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    target: Target,
) -> None:
    """One round of coordinate descent on [I, O], in place."""
    # Computed anew from the exact values in each round, so that no error of summing stays.
    gradient = moments @ (rounded.to(torch.float64) - exact).to(torch.float32)
    steps = torch.empty(BLOCK, rounded.shape[1])
    for start in range(0, len(rounded), BLOCK):
        stop = min(start + BLOCK, len(rounded))
        own, here = moments[start:stop, start:stop], gradient[start:stop]
        for column in range(stop - start):
            place = start + column
            best = torch.addcdiv(rounded[place], here[column], own[column, column], value=-1)
            near = to_grid(best.clamp(low[place], high[place]), target)
            torch.sub(near, rounded[place], out=steps[column])
            here.addr_(own[:, column], steps[column])
            rounded[place] = near
        gradient[stop:].addmm_(moments[stop:, start:stop], steps[: stop - start])


def to_grid(values: torch.Tensor, target: Target) -> torch.Tensor:
    """Float32 values on the target's grid, each the nearest."""
    return values.to(target.native).to(torch.float32)


def limits(exact: torch.Tensor, target: Target, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 values `steps` grid points below and above each number's own rounding; finite.

    For 16-bit targets: to float32 the adapter's own arithmetic is no finer, and nothing is calibrated.
    """
    stored = exact.to(torch.float32).to(target.native).view(target.bits).to(torch.int32)
    sign = 1 << 15
    # Counted from zero, downwards for negative numbers: neighbours differ by one across zero, too.
    counted = torch.where(stored < 0, -(stored & (sign - 1)), stored)
    largest = int(torch.tensor(target.largest, dtype=target.native).view(target.bits))
    found = []
    for moved in (counted - steps, counted + steps):
        moved.clamp_(-largest, largest)
        bits = torch.where(moved < 0, -moved - sign, moved).to(target.bits)
        found.append(bits.view(target.native).to(torch.float32))
    return found[0], found[1]


def loss_of(rounded: torch.Tensor, exact: torch.Tensor, second_moment: torch.Tensor) -> float:
    """tr((Q − W)·H·(Q − W)ᵀ) over tr(W·H·Wᵀ): the share of the output's energy that rounding loses."""
    moments = second_moment.to(torch.float64)
    difference = rounded.to(torch.float64) - exact
    lost = float(((difference @ moments) * difference).sum())
    whole = float(((exact @ moments) * exact).sum())
    return lost / whole if whole else 0.0
