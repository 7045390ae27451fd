"""How test sets are built, split off and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lorasmith.options.base import Flag, Options
from lorasmith.options.machine import SeedOptions
from lorasmith.options.values import Count, WithCommas


class BuildOptions(SeedOptions):
    """What a caller of `build` may choose."""

    samples_per_benchmark: Count = 100
    """Number of rows of each benchmark."""
    samples: Annotated[tuple[str, ...], Flag(metavar="NAME=ROWS", default="as the others")] = ()
    """Number of rows of one benchmark, such as MATH=50; give it again for more."""
    only: Annotated[tuple[str, ...], Flag(metavar="NAME", default="all five")] = ()
    """Names of benchmarks, with commas or given again."""
    difficulty: Literal["guide", "native", "measured"] = "guide"
    """Policy by which rows are called easy, medium or hard."""
    losses: Annotated[Path | None, Flag(metavar="FILE", default="none")] = None
    """Losses for the measured difficulty: base.parquet of a validation of this test set."""
    strict: bool = True
    """Stop at anything wrong with the files."""


class SplitOptions(SeedOptions):
    """What a caller of `split` may choose."""

    size: Count = 200
    """Number of rows to hold out, exactly."""
    stratify_by: Annotated[tuple[str, ...], WithCommas, Flag(text=True, metavar="FIELDS")] = (
        "difficulty",
        "domain",
    )
    """Fields whose shares are kept, with commas."""
    remove: bool = False
    """Take the rows out of the training file, atomically."""
    backup: bool = True
    """Keep the training file as it was, where rows are removed."""


class OverlapOptions(Options):
    """What counts as the same row in test and training data."""

    ngram: Count = 13
    """Number of words in a row that count as copied; a shorter row of 8 words at least counts as a whole."""
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Jaccard similarity of the prompts' shingles that counts as near; 1 is equal, 0 shares nothing."""
