"""How an adapter is merged into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from lorasmith.options.base import Flag
from lorasmith.options.machine import DeviceOptions, SeedOptions
from lorasmith.options.scoring import TemplateOptions
from lorasmith.options.values import Count, LongType, OneOrSeveral


class RoundingOptions(SeedOptions):
    """The type of the merged tensors, and how elements are rounded to it."""

    PANEL: ClassVar[str] = "Merging"

    precision: Annotated[Literal["base", "float32", "bfloat16", "float16"], LongType] = "base"
    """Type of the merged tensors: base (each tensor's own type), float32, bfloat16 or float16."""
    into: Annotated[
        Literal["base", "16bit"] | None, LongType, Flag(default="asked for where the base is quantized")
    ] = None
    """What a quantized base is merged into: 16bit (dequantized, then merged exactly) or base (back onto its
    own grid, in its own format)."""
    rounding: Literal["auto", "nearest", "dithered", "calibrated"] = "auto"
    """Rounding: nearest (each element correctly rounded), dithered (unbiased, by --seed), calibrated (fitted
    to rows), or auto (calibrated where rows are given, else nearest)."""
    # The hidden states of all rows stay in memory: 0.5 GB at 4,096 numbers a token.
    calibration_tokens: Count = 32_768
    """Number of tokens that calibrated rounding looks at; fewer take less time."""


class MergeOptions(RoundingOptions, TemplateOptions, DeviceOptions):
    """What a caller of `merge` may choose."""

    PANEL: ClassVar[str] = "Merging"

    calibration: Annotated[tuple[Path, ...], OneOrSeveral, Flag(metavar="FILE", default="none")] = ()
    """JSONL that calibrated rounding looks at: the training file."""
    test_set: Annotated[Path | None, Flag(metavar="FILE", default="none is kept apart")] = None
    """JSONL whose rows must not be calibrated on."""
