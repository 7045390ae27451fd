"""DoRA's last step, W′ = m·V/‖V‖ per row or column, correctly rounded or dithered.

The norm needs all of a row or column before its first element can be written, so the tensor is read twice.

*Error of the candidate* x̂ = fl(fl(m/N̂)·v̂), on top of |v̂ − v| ≤ g(|v̂| + 2M) (rounding.py). ‖v̂‖ differs
from N = ‖v‖ by at most the norm of the errors, g(‖v̂‖ + 2‖M‖), where ‖M‖ ≤ ‖L[o,:]‖·‖R‖ for a row and
‖L‖·‖R[:,i]‖ for a column. The squares are added in groups of 64 over ℓ levels, and the sums of successive
blocks with their errors kept, so N̂² is off by a factor within 1 ± γ at n = 64ℓ + 5, and N̂ by half of that and
two roundings. Together N̂ = N(1 + η) with |η| ≤ (64ℓ + 10)·u + g(1 + 2‖M‖/N̂), enlarged by 2⁻²⁰, while this
stays below 2⁻³⁰; and |x̂ − x| ≤ ρ|x̂| + a with ρ = η + g + 4u and a = |m|/N̂·2gM, again enlarged. Where η is
larger (V nearly vanishes against W and the products) every element of the row is decided exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.errors import AdapterError
from lorasmith.merging.numbers.blocks import (
    ROUNDED_UP,
    Counts,
    OpenElements,
    Products,
    Undecided,
    different,
    open_places,
    opened_at,
    settled,
    target_of,
)
from lorasmith.merging.numbers.dither import Thresholds
from lorasmith.merging.numbers.exact import exact_values, round_scaled, sum_of_squares, two_sum
from lorasmith.merging.numbers.rounding import Array, Bound, FloatFormat, not_finite, overflow
from lorasmith.merging.numbers.threads import Scratch

ReadRows = Callable[[int, int], torch.Tensor]
"""The stored W of the rows `start` to `stop`, [rows, I]."""

_GROUP = 64
_U = 2.0**-53
_LARGEST_ETA = 2.0**-30


@dataclass
class Scaling:
    """Norms and magnitudes of a tensor, and the exact squares that were needed so far."""

    axis: int
    magnitude: torch.Tensor
    """m in float64, one per row or per column."""
    norm: torch.Tensor
    """N̂."""
    relative: float
    """ρ of the rows or columns whose norm is good."""
    absolute: torch.Tensor
    """|m|/N̂ per row or column; infinite where the norm is not good."""
    squares: dict[int, Fraction]


def prepare_scaling(
    magnitude: torch.Tensor, axis: int, products: Products, read: ReadRows, rows: int, step: int, name: str
) -> Scaling:
    """Read the tensor once, `step` rows at a time, for its norms; `AdapterError` where one is zero."""
    square, levels = _squares(axis, products, read, rows, step, name)
    norm = square.sqrt()
    if bool((norm == 0).any()):
        place = int((norm == 0).nonzero()[0])
        raise AdapterError(
            f"{name}: W + s·B·A is zero in {('row', 'column')[axis]} {place} and has no norm",
            expected="updates that do not cancel the weight",
        )
    left, right = products.left, products.right
    if axis == 0:
        error = torch.linalg.vector_norm(left, dim=1) * torch.linalg.vector_norm(right)
    else:
        error = torch.linalg.vector_norm(left) * torch.linalg.vector_norm(right, dim=0)
    eta = ((_GROUP * levels + 10) * _U + products.factor * (1 + 2 * error / norm)) * ROUNDED_UP
    good = eta <= _LARGEST_ETA
    largest = float(eta[good].max()) if bool(good.any()) else 0.0
    share = (magnitude.abs() / norm) * ROUNDED_UP
    return Scaling(
        axis=axis,
        magnitude=magnitude,
        norm=norm,
        relative=(largest + products.factor + 4 * _U) * ROUNDED_UP,
        absolute=torch.where(good, share, torch.inf),
        squares={},
    )


def _blocks(rows: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _squares(
    axis: int, products: Products, read: ReadRows, rows: int, step: int, name: str
) -> tuple[torch.Tensor, int]:
    """‖V‖² per row or column and the number of levels of the sums."""
    parts: list[torch.Tensor] = []
    total = rest = None
    levels = 0
    for start, stop in _blocks(rows, step):
        weights = read(start, stop).to(torch.float64)
        if not bool(weights.isfinite().all()):
            raise not_finite(name)
        values = torch.addmm(weights, products.left[start:stop], products.right)
        sums, depth = grouped_sum(values.square(), 1 - axis)
        levels = max(levels, depth)
        if axis == 0:
            parts.append(sums)
        elif total is None or rest is None:
            total, rest = sums.numpy(), np.zeros(len(sums))
        else:
            # Thousands of blocks are summed here: their rounding errors are kept, as the bound assumes.
            total, lost = two_sum(total, sums.numpy())
            rest = rest + lost
    if axis == 0:
        return torch.cat(parts), levels
    assert total is not None and rest is not None
    return torch.from_numpy(total + rest), levels


def grouped_sum(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, int]:
    """Sum over one dimension of a matrix in groups of 64, then groups of groups; and how many levels."""
    values = values.movedim(dim, -1)
    levels = 0
    while True:
        length = values.shape[-1]
        levels += 1
        if length <= _GROUP:
            return values.sum(dim=-1), levels
        padded = torch.nn.functional.pad(values, (0, -length % _GROUP))
        values = padded.reshape(*values.shape[:-1], -1, _GROUP).sum(dim=-1)


def scaled_block(
    stored: torch.Tensor,
    products: Products,
    scaling: Scaling,
    row: int,
    column: int,
    out: torch.Tensor,
    scratch: Scratch,
    thresholds: Thresholds | None = None,
) -> tuple[Counts, OpenElements | None]:
    """Write m·V/‖V‖ of the block of W that begins at (`row`, `column`); open elements as `sum_block` does."""
    target = target_of(out)
    height, width = stored.shape
    own = scratch.of(height, width)
    weights = stored.to(torch.float64)
    candidate = torch.addmm(weights, products.left[row : row + height], products.columns(column, width))
    candidate *= _along(scaling.magnitude / scaling.norm, scaling.axis, row, column, height, width)
    absolute = _bounds(products, scaling, row, column, height, width)
    bound = Bound(scaling.relative, absolute, float(absolute.max()))
    places = open_places(candidate, bound, thresholds, target, own, out)
    difference = candidate - weights
    counts = Counts(
        updated=stored.numel(),
        changed=different(out, stored, target, own),
        base_square=float(torch.dot(weights.view(-1), weights.view(-1))),
        update_square=float(torch.dot(difference.view(-1), difference.view(-1))),
    )
    return counts, opened_at(places, candidate.view(-1), thresholds)


def _bounds(products: Products, scaling: Scaling, row: int, column: int, height: int, width: int) -> Array:
    """a of the bound; infinite where the norm is not good."""
    share = _along(scaling.absolute, scaling.axis, row, column, height, width).numpy()
    # 0 · ∞, where a row has no products and its norm is not good, says nothing: infinite.
    with np.errstate(invalid="ignore"):
        bound = products.absolute[row : row + height] * share
    return np.where(np.isnan(bound), np.inf, bound)


def decide_scaled(
    opened: Undecided, products: Products, scaling: Scaling, target: FloatFormat, name: str, read: ReadRows
) -> tuple[Array, int]:
    """RN of open elements, and how many of them are ties."""
    share = scaling.absolute.numpy()[opened.rows if scaling.axis == 0 else opened.columns]
    with np.errstate(invalid="ignore"):
        absolute = products.absolute[opened.rows, 0] * share
    absolute = np.where(np.isnan(absolute), np.inf, absolute)
    bound = (absolute + scaling.relative * np.abs(opened.candidate)) * ROUNDED_UP
    values, certain = settled(opened, bound, target)
    ties = _decide(values, ~certain, opened, products, scaling, target, read)
    if not np.isfinite(values).all():
        raise overflow(name, target)
    return values, ties


def _along(values: torch.Tensor, axis: int, row: int, column: int, height: int, width: int) -> torch.Tensor:
    return values[row : row + height, None] if axis == 0 else values[None, column : column + width]


def _decide(
    fixed: Array,
    open_: npt.NDArray[np.bool_],
    opened: Undecided,
    products: Products,
    scaling: Scaling,
    target: FloatFormat,
    read: ReadRows,
) -> int:
    """Exact rounding of the elements that are still open, written into `fixed`; how many are ties."""
    ties = 0
    rows, columns = opened.rows, opened.columns
    lines = rows if scaling.axis == 0 else columns
    # An exact norm takes all of a row or column in rationals; it is made once and kept.
    for line in np.unique(lines[open_]):
        values = _exact_line(int(line), products, scaling.axis, read)
        if int(line) not in scaling.squares:
            scaling.squares[int(line)] = sum_of_squares(values)
        for index in np.nonzero(open_ & (lines == line))[0]:
            value = values[columns[index] if scaling.axis == 0 else rows[index]]
            magnitude = float(scaling.magnitude[line])
            threshold = None if opened.thresholds is None else int(opened.thresholds[index])
            fixed[index], tie = round_scaled(magnitude, value, scaling.squares[int(line)], target, threshold)
            ties += tie
    return ties


def _exact_line(line: int, products: Products, axis: int, read: ReadRows) -> list[Fraction]:
    """All of V's values in one row or column as rational numbers."""
    if axis == 0:
        weights = read(line, line + 1).to(torch.float64).numpy().reshape(-1)
        columns = np.arange(len(weights))
        return exact_values(weights, products.exact_terms(np.full(len(weights), line), columns))
    count = len(products.left)
    step = 4096
    parts = [read(start, stop)[:, line].to(torch.float64) for start, stop in _blocks(count, step)]
    weights = torch.cat(parts).numpy()
    return exact_values(weights, products.exact_terms(np.arange(count), np.full(count, line)))
