"""Rows of a merged tensor against their formula, or against the base's where nothing is to change."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from lorasmith.proving.weights_dither import Dither, doubtful_dithered, make_dither
from lorasmith.proving.weights_exact import row_gain
from lorasmith.proving.weights_judge import judge_elements
from lorasmith.proving.weights_quick import doubtful
from lorasmith.proving.weights_rounding import Ints
from lorasmith.proving.weights_tally import FIRST, Tally, Wrong
from lorasmith.proving.weights_terms import Block

_SLOW_ELEMENTS = 1 << 13
"""Elements judged slowly at a time, so that memory stays small when all are wrong."""


def compare(block: Block) -> Tally:
    """Check every element of the block."""
    if block.magnitudes is not None:
        block = replace(block, gain=row_gain(block, block.magnitudes))
    tally = Tally(elements=block.found.numel())
    dither = _dither_of(block)
    open_ = doubtful(block) if dither is None else doubtful_dithered(block, dither)
    for start in range(0, len(open_), _SLOW_ELEMENTS):
        tally.add(judge_elements(block, open_[start : start + _SLOW_ELEMENTS], dither))
    return tally


def _dither_of(block: Block) -> Dither | None:
    """The stream of a dithered tensor; rows that nothing is added to are rounded to nearest all the same."""
    if block.seed is None or not (block.terms or block.gain):
        return None
    return make_dither(block.seed, block.name, block.found.shape[1])


def compare_bytes(found: torch.Tensor, source: torch.Tensor, first_row: int) -> Tally:
    """Of a tensor that nothing changes: it has the base's bytes, signs of zeros and NaNs included.

    Both are matrices of one type. The distance of integers is their difference, of numbers the count of
    numbers between.
    """
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.dtype.itemsize]
    a, b = found.view(integer), source.view(integer)
    if torch.equal(a, b):
        return Tally(elements=found.numel())
    flat = a.ne(b).reshape(-1).nonzero().view(-1)
    tally = Tally(elements=found.numel())
    found, source = found.reshape(-1)[flat], source.reshape(-1)[flat]
    tally.count(np.maximum(_steps(found, source), 1))
    for k in range(min(FIRST, len(flat))):
        row, column = divmod(int(flat[k]), a.shape[1])
        far = int(np.maximum(_steps(found[k : k + 1], source[k : k + 1]), 1)[0])
        tally.first.append(Wrong(first_row + row, column, _show(found[k]), _show(source[k]), far))
    return tally


def _steps(a: torch.Tensor, b: torch.Tensor) -> Ints:
    """Distances of stored numbers of one type, at most 2⁶²."""
    if a.dtype.is_floating_point:
        width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
        least = torch.iinfo(width).min
        a, b = (torch.where(bits < 0, least - 1 - bits, bits) for bits in (a.view(width), b.view(width)))
    steps = (a.double() - b.double()).abs().clamp(max=2.0**62)
    return steps.long().numpy()


def _show(value: torch.Tensor) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)
