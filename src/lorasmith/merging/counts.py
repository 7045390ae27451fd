"""What became of a tensor's elements, block by block, and the record of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from lorasmith.adapters.base import Change
from lorasmith.merging.plan import Output
from lorasmith.merging.rounding import Array, Indices, Target, cast
from lorasmith.merging.workers import Arrays
from lorasmith.records.merging import MergedTensor


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


def different(merged: torch.Tensor, stored: torch.Tensor, target: Target, own: Arrays) -> int:
    """Elements that are not the base's values in the merged type.

    Zeros of both signs are equal; only open elements can differ in this, and they are counted by value.
    """
    if stored.dtype != merged.dtype:
        return int(torch.count_nonzero(merged != cast(stored, target)))
    bits = target.bits
    flags = np.not_equal(merged.view(bits).numpy(), stored.view(bits).numpy(), out=own.flags)
    return int(np.count_nonzero(flags))


def different_at(merged: torch.Tensor, stored: torch.Tensor, places: Indices, target: Target) -> int:
    """What `different` counted at some places."""
    here = torch.from_numpy(places)
    new, old = merged.reshape(-1)[here], stored.reshape(-1)[here]
    if old.dtype != new.dtype:
        return int(torch.count_nonzero(new != cast(old, target)))
    return int(torch.count_nonzero(new.view(target.bits) != old.view(target.bits)))


def underflowed(values: Array, stored: torch.Tensor, target: Target) -> int:
    """Results below the smallest normal number where the base's value was normal in its own type."""
    own = torch.finfo(stored.dtype).tiny
    was_normal = stored.to(torch.float64).abs().numpy() >= own
    return int(np.count_nonzero(was_normal & (np.abs(values) < target.smallest_normal)))


def merged_tensor(
    output: Output, change: Change, counts: Counts, rounding: str = "nearest", fallback: str = ""
) -> MergedTensor:
    """The record of one changed tensor."""
    scales = {term.scale * term.weight for rows in change.rows for term in rows.terms}
    return MergedTensor(
        name=output.name,
        formula=change.formula,
        adapter_tensors=list(change.uses),
        scale=scales.pop() if len(scales) == 1 else None,
        shape=list(output.shape),
        dtype_base=output.source.dtype,
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
