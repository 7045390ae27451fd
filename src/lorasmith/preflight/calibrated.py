"""What a calibrated merge would take: its rows in tokens, and the arithmetic of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasmith.checkpoint.model import HEAD_NAMES
from lorasmith.files.jsonl import read_examples
from lorasmith.merging.plan import Plan
from lorasmith.preflight.sizes import EMBEDDINGS, row_lengths

_ROWS = 400
"""Training rows whose tokens are counted; the others are taken to be as long."""
_LONGEST = 2_048
"""merging/calibration.py cuts longer rows."""


@dataclass(frozen=True)
class CalibrationSize:
    """The work of rounding that is fitted to rows; operations over all layers."""

    tokens: int
    squares: int
    """Σ length² over the rows."""
    moments: float
    """Float32 operations of Σ x·xᵀ."""
    factors: float
    """Float64 operations of inverting the second moments."""
    feedback: float
    """Float32 operations of going over the columns."""
    elements: int
    """Weights that are rounded so."""


def calibration_size(plan: Plan, train: Sequence[Path], base: Path, budget: int) -> CalibrationSize:
    """From the shapes of the merge and the lengths of the training rows.

    An input is shared by the layers beside each other that have its width, such as query, key and value.
    Raises `DataError` for training rows that cannot be read.
    """
    tokens, squares = _rows(train, base, budget)
    shapes = _linear(plan)
    inputs = {(_place(name), width) for name, (_, width) in shapes.items()}
    return CalibrationSize(
        tokens=tokens,
        squares=squares,
        moments=sum(2.0 * tokens * width**2 for _, width in inputs),
        # Cholesky's factor (I³/3) and the inverse of a triangle (I³).
        factors=sum(4 / 3 * width**3 for _, width in inputs),
        # The pass (O·I²), what the update does to the outputs (2·O·I²), and twice the refinement (2·O·I² for
        # the gradient, O·I² for keeping it).
        feedback=sum(9.0 * rows * width**2 for rows, width in shapes.values()),
        elements=sum(rows * width for rows, width in shapes.values()),
    )


def _rows(train: Iterable[Path], base: Path, budget: int) -> tuple[int, int]:
    """Tokens, and the sum of squared lengths, of as many rows as the budget holds."""
    examples = [example for file in train for example in read_examples(file)]
    if not examples:
        return 0, 0
    step = max(1, len(examples) // _ROWS)
    pairs, _ = row_lengths(examples[::step][:_ROWS], base)
    lengths = [min(sum(pair), _LONGEST) for pair in pairs]
    mean = sum(lengths) / len(lengths)
    tokens = min(budget, int(mean * len(examples)))
    return tokens, int(tokens * sum(length**2 for length in lengths) / sum(lengths))


def _linear(plan: Plan) -> dict[str, tuple[int, int]]:
    """Changed matrices but embedding and head: name → rows (outputs) and columns (inputs)."""
    found = {}
    for output in plan.outputs:
        outer = output.name.endswith(EMBEDDINGS) or output.name in HEAD_NAMES
        if output.change is not None and len(output.shape) == 2 and not outer:
            found[output.name] = (output.shape[0], output.shape[1])
    return found


def _place(name: str) -> str:
    """The module that a linear layer lies in: `….layers.3.mlp.up_proj.weight` → `….layers.3.mlp`."""
    return name.rsplit(".", 2)[0]
