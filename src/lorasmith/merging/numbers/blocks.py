"""W + Σ w·s·L·R on blocks of a tensor: float64 candidates and their correct rounding.

Legend of shapes: O rows and I columns of the target as a matrix, K products in all, m × n one block of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.adapters.base import Change, Factor, RowUpdate
from lorasmith.merging.numbers.dither import Thresholds, open_dithered, settle_dithered
from lorasmith.merging.numbers.exact import ExactTerm, round_exactly
from lorasmith.merging.numbers.rounding import (
    TARGETS,
    Array,
    Bound,
    FloatFormat,
    Indices,
    cast,
    error_factor,
    not_finite,
    open_elements,
    overflow,
    settle,
    to_stored,
)
from lorasmith.merging.numbers.threads import Arrays, Scratch
from lorasmith.merging.plan import Output
from lorasmith.records.merging import MergedTensor

# What became of a tensor's elements, block by block, and the record of it.


@dataclass
class Counts:
    """What became of the elements of one tensor, summed over its blocks."""

    changed: int = 0
    updated: int = 0
    """Elements with a product that is not zero."""
    ties: int = 0
    underflowed: int = 0
    base_square: float = 0.0
    """‖W‖²."""
    update_square: float = 0.0
    """‖ΔW‖²."""

    def add(self, other: Counts) -> None:
        """Add another block's counts."""
        for name in vars(other):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def different(merged: torch.Tensor, stored: torch.Tensor, target: FloatFormat, own: Arrays) -> int:
    """Elements that are not the base's values in the merged type.

    Zeros of both signs are equal; only open elements can differ in this, and they are counted by value.
    """
    if stored.dtype != merged.dtype:
        return int(torch.count_nonzero(merged != cast(stored, target)))
    bits = target.bits
    flags = np.not_equal(merged.view(bits).numpy(), stored.view(bits).numpy(), out=own.flags)
    return int(np.count_nonzero(flags))


def different_at(merged: torch.Tensor, stored: torch.Tensor, places: Indices, target: FloatFormat) -> int:
    """What `different` counted at some places."""
    here = torch.from_numpy(places)
    new, old = merged.reshape(-1)[here], stored.reshape(-1)[here]
    if old.dtype != new.dtype:
        return int(torch.count_nonzero(new != cast(old, target)))
    return int(torch.count_nonzero(new.view(target.bits) != old.view(target.bits)))


def underflowed(values: Array, stored: torch.Tensor, target: FloatFormat) -> int:
    """Results below the smallest normal number where the base's value was normal in its own type."""
    own = torch.finfo(stored.dtype).tiny
    was_normal = stored.to(torch.float64).abs().numpy() >= own
    return int(np.count_nonzero(was_normal & (np.abs(values) < target.smallest_normal)))


def merged_tensor(
    output: Output, change: Change, counts: Counts, rounding: str = "nearest", fallback: str = ""
) -> MergedTensor:
    """The record of one changed tensor."""
    scales = {term.scale * term.weight for update in change.updates for term in update.terms}
    return MergedTensor(
        name=output.name,
        formula=change.formula,
        adapter_tensors=list(change.uses),
        scale=scales.pop() if len(scales) == 1 else None,
        shape=list(output.shape),
        dtype_base=output.base_type,
        dtype_merged=output.dtype,
        elements=math.prod(output.shape),
        changed=counts.changed,
        swallowed=max(0, counts.updated - counts.changed),
        rounding=rounding,
        fallback=fallback,
        exact_redone=counts.ties,
        underflowed=counts.underflowed,
        relative_update=four_digits(math.sqrt(counts.update_square / counts.base_square))
        if counts.base_square
        else 0.0,
    )


def four_digits(number: float) -> float:
    """Rounded so far that the order of a sum, which differs between machines, no longer shows."""
    return float(f"{number:.3e}")


LoadFactor = Callable[[Factor], torch.Tensor]
"""Reads a factor and gives it as a float64 matrix; raises for NaN and infinities."""

ROUNDED_UP = 1 + 2.0**-20


@dataclass
class Products:
    """The products of one range of rows, ready for blocks of it."""

    start: int
    left: torch.Tensor
    """L̂ [O, K]: all terms side by side, w·s multiplied in."""
    right: torch.Tensor
    """R [K, I]."""
    bound: torch.Tensor
    """[O, 1]: no less than M of any element of the row."""
    factor: float
    """g of the error bound."""
    updated: torch.Tensor | None
    """[O, I] of booleans where some products are zero; None where none is."""
    parts: list[tuple[float, float, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """(scale, weight, L, R) of each term, as stored."""

    @property
    def update_square(self) -> float:
        """‖L̂·R‖² = Σ (L̂ᵀL̂) ∘ (R·Rᵀ), without making the product."""
        return float(((self.left.T @ self.left) * (self.right @ self.right.T)).sum())

    @cached_property
    def absolute(self) -> Array:
        """a of the error bound, [O, 1]."""
        return (self.bound * (2 * self.factor)).numpy()

    @cached_property
    def largest(self) -> float:
        """The largest a."""
        return float(self.absolute.max()) if self.absolute.size else 0.0

    def columns(self, start: int, width: int) -> torch.Tensor:
        """R of some columns, [K, width]."""
        whole = width == self.right.shape[1]
        return self.right if whole else self.right[:, start : start + width]

    def exact_terms(self, rows: Indices, columns: Indices) -> list[ExactTerm]:
        """The stored numbers that make the elements (rows[i], columns[i])."""
        return [
            ExactTerm(scale, weight, left.numpy()[rows], right.numpy()[:, columns].T)
            for scale, weight, left, right in self.parts
        ]


@dataclass(frozen=True)
class OpenElements:
    """Elements of a block that the error bound leaves open, to be decided together with those of others."""

    places: Indices
    """Flat positions within the block."""
    candidate: Array
    thresholds: Thresholds | None = None
    """None where the merge is rounded to nearest."""


@dataclass(frozen=True)
class Undecided:
    """Open elements of one range of rows."""

    rows: Indices
    columns: Indices
    candidate: Array
    weights: Array
    """W of each, in float64."""
    thresholds: Thresholds | None = None


def prepare_products(update: RowUpdate, load: LoadFactor) -> Products:
    """Read the factors of a range of rows and what their error bound needs."""
    parts = [(term.scale, term.weight, load(term.left), load(term.right)) for term in update.terms]
    left = torch.cat([part * (weight * scale) for scale, weight, part, _ in parts], dim=1).contiguous()
    right = torch.cat([part for *_, part in parts], dim=0).contiguous()
    row_norm = torch.linalg.vector_norm(left, dim=1, keepdim=True)
    column_norm = torch.linalg.vector_norm(right, dim=0).max() if right.numel() else torch.tensor(0.0)
    return Products(
        start=update.start,
        left=left,
        right=right,
        bound=row_norm * column_norm * ROUNDED_UP,
        factor=error_factor(right.shape[0]),
        updated=_updated(left, right),
        parts=parts,
    )


def _updated(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    # Nearly every adapter has no zero at all; then nothing of the target's size needs to be made.
    if bool((left != 0).all()) and bool((right != 0).all()):
        return None
    return ((left != 0).to(torch.float32) @ (right != 0).to(torch.float32)) > 0


def sum_block(
    stored: torch.Tensor,
    products: Products,
    row: int,
    column: int,
    out: torch.Tensor,
    scratch: Scratch,
    thresholds: Thresholds | None = None,
) -> tuple[Counts, OpenElements | None]:
    """Write the merged values of the block that begins at (`row`, `column`) of its range of rows.

    `stored` [m, n] holds W as the base stores it, `out` [m, n] has the target's type; `thresholds` dither.
    The elements that come back as open have no value yet.
    """
    height, width = stored.shape
    target = target_of(out)
    own = scratch.of(height, width)
    values = own.double.copy_(stored)
    # Not numpy's dot: its library has threads of its own, which wait for each other by spinning.
    counts = Counts(updated=height * width, base_square=torch.dot(own.flat, own.flat).item())
    values.addmm_(products.left[row : row + height], products.columns(column, width))
    bound = Bound(products.factor, products.absolute[row : row + height], products.largest)
    places = open_places(values, bound, thresholds, target, own, out)
    counts.changed = different(out, stored, target, own)
    if products.updated is not None:
        here = products.updated[row : row + height, column : column + width]
        counts.updated = int(torch.count_nonzero(here))
    return counts, opened_at(places, own.flat, thresholds)


def open_places(
    candidate: torch.Tensor,
    bound: Bound,
    thresholds: Thresholds | None,
    target: FloatFormat,
    own: Arrays,
    out: torch.Tensor,
) -> Indices:
    """Round candidates into `out`, to nearest or dithered; what the bound leaves open."""
    if thresholds is None:
        return open_elements(candidate, bound, target, own, out)
    return open_dithered(candidate, bound, thresholds, target, own, out)


def opened_at(places: Indices, candidate: torch.Tensor, thresholds: Thresholds | None) -> OpenElements | None:
    """The open elements of a block whose candidates are given flat; None where there are none."""
    if not len(places):
        return None
    return OpenElements(places, candidate.numpy()[places], None if thresholds is None else thresholds[places])


_BY_TYPE = {target.native: target for target in TARGETS.values()}


def target_of(out: torch.Tensor) -> FloatFormat:
    """The format of a tensor."""
    return _BY_TYPE[out.dtype]


def decide(opened: Undecided, products: Products, target: FloatFormat, name: str) -> tuple[Array, int]:
    """RN of open elements, and how many of them are ties.

    Raises `CheckpointError` for NaN or infinities in W, and for a result beyond the target's range.
    """
    if not np.isfinite(opened.weights).all():
        raise not_finite(name)
    size = products.bound.numpy()[opened.rows, 0]
    bound = products.factor * (np.abs(opened.candidate) + 2 * size) * ROUNDED_UP
    # First by each element's own bound, which is tighter than its block's; what is left, exactly.
    values, certain = settled(opened, bound, target)
    ties = 0
    left_open = np.nonzero(~certain)[0]
    if len(left_open):
        terms = products.exact_terms(opened.rows[left_open], opened.columns[left_open])
        thresholds = None if opened.thresholds is None else opened.thresholds[left_open]
        values[left_open], tied, _ = round_exactly(opened.weights[left_open], terms, target, thresholds)
        ties = int(np.count_nonzero(tied))
    if not np.isfinite(values).all():
        raise overflow(name, target)
    return values, ties


def settled(opened: Undecided, bound: Array, target: FloatFormat) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Open elements rounded by their own bounds, and which of them are certain."""
    if opened.thresholds is None:
        return settle(opened.candidate, bound, target)
    return settle_dithered(opened.candidate, bound, opened.thresholds, target)


def patch(
    out: torch.Tensor, stored: torch.Tensor, places: Indices, values: Array, target: FloatFormat
) -> Counts:
    """Write decided values at flat positions, and count anew what became of them."""
    here = torch.from_numpy(places)
    old = stored.reshape(-1)[here]
    new = to_stored(values, target)
    counted = different_at(out, stored, places, target)
    out.view(-1)[here] = new
    changed = int(torch.count_nonzero(new != cast(old, target)))
    return Counts(changed=changed - counted, underflowed=underflowed(values, old, target))


def cast_piece(stored: torch.Tensor, dtype: str, name: str) -> tuple[torch.Tensor, int]:
    """A piece of a tensor that only changes its type, and how many of its values became subnormal or zero.

    Infinities and NaN of the base stay what they are; a finite value that overflows is an error.
    """
    target = TARGETS[dtype]
    result = cast(stored, target)
    if bool((result.isinf() & stored.isfinite()).any()):
        raise overflow(name, target)
    small = result.abs() < target.smallest_normal
    was_normal = stored.abs() >= torch.finfo(stored.dtype).tiny
    return result, int(torch.count_nonzero(small & was_normal))
