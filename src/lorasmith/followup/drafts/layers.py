"""Which layers of its target a draft begins with."""

from __future__ import annotations

import re
from itertools import pairwise

from lorasmith.errors import UsageError
from lorasmith.options import StartOptions


def parse_layers(text: str) -> list[int]:
    """`0,2,4-6` as numbers; raises `UsageError` for anything else, and unless they rise."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise UsageError(f"{text!r} is no list of layers", expected="numbers such as 0,2,4 or 0-3,8")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not found or any(later <= earlier for earlier, later in pairwise(found)):
        raise UsageError(
            f"the layers {text!r} do not rise", expected="each layer once, from the first to the last"
        )
    return found


def kept_layers(options: StartOptions, total: int) -> list[int] | None:
    """The layers of a target of `total` layers, by itself a quarter; None where the draft begins as a model.

    Raises `UsageError` where both are asked for, and for a layer that there is not.
    """
    if options.from_model is not None and options.layers is not None:
        raise UsageError(
            "a draft begins as a model or as layers", expected="followup.draft: from_model or layers"
        )
    if options.from_model is not None:
        return None
    if options.layers is None:
        return spread_layers(total)
    kept = parse_layers(options.layers)
    if kept[-1] >= total:
        raise UsageError(
            f"followup.draft.layers: there is no layer {kept[-1]}", expected=f"layers 0 to {total - 1}"
        )
    return kept


def spread_layers(total: int) -> list[int]:
    """A quarter of the layers, at least one, evenly spread from the first to the last.

    The first reads the embeddings and the last feeds the head, so both stay; of one layer, the last.
    """
    kept = max(1, total // 4)
    if kept == 1:
        return [total - 1]
    return [round(place * (total - 1) / (kept - 1)) for place in range(kept)]
