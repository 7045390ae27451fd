"""The grid of a block of quantized weights: codes, the values they stand for, and the nearest of them.

Every format here is affine by element: value = level[code] · scale / divisor + offset, where the levels are
a table of the format, and scale and offset belong to the element's group and are never changed. All values
are float64 numbers without rounding, but for those with a divisor (LLM.int8's 127), which are the quotient
rounded once to float64.

*Nearest.* A real x goes to the grid point that is nearest to it, and to the end of the grid where it lies
beyond. A tie goes to the point that is nearer to the base's own value. Where that leaves the base's value,
the base's code stays (a zero keeps its sign); else the smallest code with the value is taken.

*Dithered.* Between neighbours a < b, x goes to b exactly if x > a + t·(b − a), t being the element's
threshold; what is on the grid stays, what is beyond its end goes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_SLACK = 2.0**-50
"""Relative: more than the roundings of a midpoint, a boundary and a difference in float64."""
_SHARE_BITS = 25
"""Thresholds are odd multiples of 2⁻²⁵."""


@dataclass(frozen=True)
class Levels:
    """What the codes of a format stand for, before scale and offset."""

    by_code: tuple[float, ...]
    """A number for every code; NaN where a code is none."""

    @cached_property
    def table(self) -> Array:
        """`by_code` as an array."""
        return np.array(self.by_code, dtype=np.float64)

    @cached_property
    def points(self) -> Array:
        """The numbers in ascending order, each once."""
        return np.unique(self.table[np.isfinite(self.table)])

    @cached_property
    def places(self) -> Ints:
        """Code → its place in `points`; meaningless for a code that is no number."""
        return np.searchsorted(self.points, np.nan_to_num(self.table))

    @cached_property
    def code_at(self) -> Codes:
        """Place in `points` → the smallest code that stands for it."""
        codes = np.zeros(len(self.points), dtype=np.uint8)
        for code in reversed(range(len(self.by_code))):
            if np.isfinite(self.table[code]):
                codes[self.places[code]] = code
        return codes

    @cached_property
    def middles(self) -> Array:
        """Halfway between neighbouring points."""
        return (self.points[1:] + self.points[:-1]) / 2


@dataclass(frozen=True)
class Block:
    """Some rows of a weight: m rows of n codes, and what makes numbers of them.

    `scale` and `offset` are float64 and broadcast to [m, n].
    """

    levels: Levels
    codes: Codes
    scale: Array
    offset: Array | None = None
    divisor: float = 1.0

    @cached_property
    def values(self) -> Array:
        """The base's numbers [m, n]."""
        return self.at_levels(self.levels.table[self.codes])

    @cached_property
    def places(self) -> Ints:
        """Where the base's numbers stand among the levels' points."""
        return self.levels.places[self.codes]

    def at_places(self, places: Ints) -> Array:
        """The numbers at some places among the levels' points, [m, n].

        With a negative scale, which GGUF has, a higher place is a lower number.
        """
        return self.at_levels(self.levels.points[places])

    def at_levels(self, levels: Array) -> Array:
        """level · scale / divisor + offset."""
        values = levels * self.scale
        if self.divisor != 1.0:
            values = values / self.divisor
        if self.offset is not None:
            values = values + self.offset
        return values

    @property
    def steps(self) -> Array:
        """The factor from levels to numbers, [m, n]: negative where a higher place is a lower number."""
        return np.broadcast_to(self.scale / self.divisor, self.codes.shape)

    def codes_at(self, places: Ints) -> Codes:
        """Codes of some places; the base's own where the place is the base's."""
        return np.where(places == self.places, self.codes, self.levels.code_at[places])

    def cut(self, rows: Ints, columns: Ints) -> Block:
        """Single elements as a block of one row."""
        shape = self.codes.shape
        scale = np.broadcast_to(self.scale, shape)[rows, columns][None, :]
        offset = None
        if self.offset is not None:
            offset = np.broadcast_to(self.offset, shape)[rows, columns][None, :]
        return Block(self.levels, self.codes[rows, columns][None, :], scale, offset, self.divisor)


def nearest(block: Block, x: Array, bound: Array) -> tuple[Ints, Mask]:
    """Places of the grid points nearest to numbers within `bound` of x, and which are not certain; [m, n]."""
    places = _near(block, x)
    low, high = _neighbours(block, places)
    here = block.at_places(places)
    # Distances to the midpoints on both sides, towards lower and towards higher places.
    slack = bound + _SLACK * (np.abs(here) + np.abs(x) + np.maximum(np.abs(low), np.abs(high)))
    sign = np.sign(block.steps)
    up = np.where(places < len(block.levels.points) - 1, sign * ((here + high) / 2 - x), np.inf)
    down = np.where(places > 0, sign * (x - (here + low) / 2), np.inf)
    # Where the scale is zero all points are the base's number.
    return places, ~((up > slack) & (down > slack)) & (sign != 0)


def dithered(block: Block, x: Array, bound: Array, thresholds: Ints) -> tuple[Ints, Mask]:
    """The same for dithering; `thresholds` are odd multiples of 2⁻²⁵."""
    places = _near(block, x)
    low, high = _neighbours(block, places)
    here, sign = block.at_places(places), np.sign(block.steps)
    last = len(block.levels.points) - 1
    # Which cell x lies in: that above `here`, or that below it, by value.
    above = x > here
    other_place = np.where(above == (sign > 0), places + 1, places - 1)
    outside = (other_place < 0) | (other_place > last)
    other = np.where(above == (sign > 0), high, low)
    a, b = np.minimum(here, other), np.maximum(here, other)
    share = thresholds * 2.0**-_SHARE_BITS
    boundary = a + share * (b - a)
    upper = x > boundary
    take_here = outside | (upper == (here > other))
    size = np.abs(a) + np.abs(b) + np.abs(x)
    slack = bound + _SLACK * size
    open_ = (np.abs(x - boundary) <= slack) & ~outside
    # Next to a grid point, x may lie in the cell on the other side of it.
    open_ |= np.abs(x - here) <= slack
    on_grid = (x == here) & (bound == 0)
    return np.where(take_here, places, np.clip(other_place, 0, last)), open_ & ~on_grid & (sign != 0)


def _near(block: Block, x: Array) -> Ints:
    """Places next to x as float64 finds them: nearest but for rounding."""
    places = block.places.copy()
    steps = block.steps
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        moved = (x - block.values) / steps
    points = block.levels.points
    half_up = np.append(block.levels.middles, np.inf)[places] - points[places]
    half_down = points[places] - np.insert(block.levels.middles, 0, -np.inf)[places]
    # An update is mostly far below half a step, so that next to nothing needs a search.
    left = ~((moved < half_up) & (moved > -half_down)) & (steps != 0)
    if left.any():
        target = points[places[left]] + moved[left]
        places[left] = np.searchsorted(block.levels.middles, target)
    return places


def _neighbours(block: Block, places: Ints) -> tuple[Array, Array]:
    last = len(block.levels.points) - 1
    return block.at_places(np.maximum(places - 1, 0)), block.at_places(np.minimum(places + 1, last))


# Single elements in rational numbers, where float64 leaves doubt.


def exact_places(
    block: Block, x: Sequence[Fraction], guess: Ints, thresholds: Ints | None = None
) -> tuple[Ints, int]:
    """Places of the elements of a block of one row, and how many of them were ties."""
    places, ties = np.empty(len(x), dtype=np.int64), 0
    last = len(block.levels.points) - 1
    for index, value in enumerate(x):
        place = int(guess[index])
        window = np.arange(max(0, place - 2), min(last, place + 2) + 1)
        one = block.cut(np.array([0]), np.array([index]))
        around = [Fraction(float(number)) for number in one.at_places(window)[0]]
        base = Fraction(float(one.values[0, 0]))
        if thresholds is None:
            best = min(range(len(window)), key=lambda i: (abs(around[i] - value), abs(around[i] - base)))
            ties += sum(abs(number - value) == abs(around[best] - value) for number in around) > 1
        else:
            best = _dithered_exactly(around, value, Fraction(int(thresholds[index]), 1 << _SHARE_BITS))
        places[index] = window[best]
    return places, ties


def _dithered_exactly(around: Sequence[Fraction], value: Fraction, share: Fraction) -> int:
    order = sorted(range(len(around)), key=lambda i: around[i])
    below = [i for i in order if around[i] <= value]
    above = [i for i in order if around[i] > value]
    if not below:
        return above[0]
    if not above:
        return below[-1]
    a, b = around[below[-1]], around[above[0]]
    return above[0] if value > a + share * (b - a) else below[-1]
