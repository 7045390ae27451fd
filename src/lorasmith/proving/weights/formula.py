"""What each tensor of the right merge is, as a formula over stored numbers; nothing is computed here.

A matrix of the merged model is S + Σ c·L·R: a source S (the base's tensor, or one that the adapter
brings), and per adapter a low-rank term with an exact factor c, the scaling times the adapter's weight. In
the letters of the LoRA paper (arXiv 2106.09685, 4.1): W + (α/r)·B·A.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from lorasmith.proving.weights.model_folder import ProvenTensor

View = Callable[[torch.Tensor], torch.Tensor]


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """The view of a factor that is stored the way it is used."""
    return tensor


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The view of a factor that is used the other way round."""
    return tensor.T


@dataclass(frozen=True)
class Factor:
    """A matrix that a term multiplies with, as a view of a stored tensor."""

    stored: ProvenTensor
    view: View = as_stored

    def load(self) -> torch.Tensor:
        """The matrix, mapped from its file."""
        return self.view(self.stored.whole())


@dataclass(frozen=True)
class Term:
    """c·L·R, added to the rows from `first_row` on. L[rows, r], R[r, columns]."""

    scale: float
    """α/r or α/√r in float64."""
    weight: float
    """The adapter's own factor in a merge of several."""
    left: Factor
    right: Factor | None
    """None for a vector that is added as it is: R is then the number one."""
    first_row: int = 0

    @property
    def factor(self) -> Fraction:
        """c, exactly."""
        return Fraction(self.scale) * Fraction(self.weight)


@dataclass(frozen=True)
class Magnitude:
    """DoRA (arXiv 2402.09353, eq. 5): the sum's rows or columns are scaled to these norms."""

    stored: ProvenTensor
    per_row: bool
    """True where a row of the stored matrix is one output."""


@dataclass
class Expected:
    """One tensor of the right merge."""

    name: str
    dtype: str
    """The type of the base's model for it; the merge's precision may ask for another."""
    source: ProvenTensor
    terms: list[Term] = field(default_factory=list)
    magnitude: Magnitude | None = None
    rows: Mapping[int, tuple[ProvenTensor, int]] = field(default_factory=dict)
    """Rows of the matrix that are replaced, each by a row of another tensor."""
    replaced: bool = False
    """True where the source is not the base's tensor."""
    rounding: str = "nearest"
    """What the merge claims: `nearest`, `dithered` or `calibrated`."""
    seed: int | None = None
    """Seed of a dithered tensor."""

    @property
    def kind(self) -> str:
        """The word for it in the record, as far as it does not depend on the precision."""
        if self.replaced and not self.terms:
            return "replaced"
        return "merged" if self.terms or self.magnitude or self.rows else "copied"
