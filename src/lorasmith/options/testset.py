"""How test sets are built, split off and checked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lorasmith.options.base import Flag, Options
from lorasmith.options.inputs import ReadingOptions
from lorasmith.options.machine import SeedOptions
from lorasmith.options.values import Count, Names, WithCommas


class BenchmarkOptions(Options):
    """Which benchmarks are meant."""

    only: Annotated[Names, Flag(metavar="NAMES", default="the guide's five")] = ()
    """Names of the benchmarks (`lorasmith benchmarks list`), with commas or given again."""


class BuildOptions(BenchmarkOptions, SeedOptions):
    """What a caller of `build` may choose."""

    samples_per_benchmark: Count = 100
    """Number of rows of each benchmark."""
    samples: Annotated[tuple[str, ...], Flag(metavar="NAME=ROWS", default="as the others")] = ()
    """Number of rows of one benchmark, such as MATH=50; give it again for more."""
    difficulty: Literal["guide", "native", "measured"] = "guide"
    """Policy by which rows are called easy, medium or hard."""
    strict: bool = True
    """Stop at anything wrong with the files."""


class SplitOptions(SeedOptions, ReadingOptions):
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


class OverlapOptions(ReadingOptions):
    """From where on two texts count as the same."""

    ngram: Annotated[int, Field(ge=2)] = 13
    """Number of words in a row that count as copied."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of a test row's runs of --ngram words that a training row may hold before the row counts as
    contaminated; a question that stands there as a whole always does."""
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Jaccard similarity of the prompts' shingles that counts as near; 1 is equal, 0 shares nothing."""
    shingle: Annotated[Count, Flag(hidden=True)] = 3
    """Length of a shingle in words."""
    common: Annotated[Count, Flag(hidden=True)] = 3
    """Number of test rows that may hold a run of words; what more of them hold belongs to none of them."""
    generic: Annotated[Count, Flag(hidden=True)] = 10
    """Number of training rows, or 1 in 100, that may hold a run of words before it is nobody's own."""
