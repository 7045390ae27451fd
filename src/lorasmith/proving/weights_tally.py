"""What was found in a block, added up to a tensor and to a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorasmith.proving.weights_rounding import Ints

FIRST = 16
"""Differences kept per tensor: the proof lists the first ones."""

BUCKETS = (1, 2, 4, 16, 256, 65536)
"""Lower ends of the classes of distances that the record counts, in ulps."""


@dataclass(frozen=True)
class Wrong:
    """One wrong element, in coordinates of the matrix."""

    row: int
    column: int
    found: float | str
    expected: float | str
    ulps: int


@dataclass
class Tally:
    """What was found in a block, a tensor, or a model."""

    elements: int = 0
    wrong: int = 0
    stale: int = 0
    """Wrong elements that hold what the base holds."""
    near: int = 0
    """Wrong elements that are off by no more than a few roundings of the sum's terms."""
    max_ulps: int = 0
    redone: int = 0
    buckets: dict[int, int] = field(default_factory=dict)
    first: list[Wrong] = field(default_factory=list)
    moved: float = 0.0
    """Σ (merged − base)·ΔW over the wrong elements."""
    wanted: float = 0.0
    """Σ ΔW² over the wrong elements."""

    def add(self, other: Tally) -> None:
        """Take in the tally of the next block."""
        self.elements += other.elements
        self.wrong += other.wrong
        self.stale += other.stale
        self.near += other.near
        self.max_ulps = max(self.max_ulps, other.max_ulps)
        self.redone += other.redone
        self.moved += other.moved
        self.wanted += other.wanted
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.first.extend(other.first[: max(0, FIRST - len(self.first))])

    def count(self, distance: Ints) -> None:
        """Enter wrong elements by their distances in ulps."""
        self.wrong += len(distance)
        self.max_ulps = max(self.max_ulps, int(distance.max()))
        for low, end in zip(BUCKETS, (*BUCKETS[1:], None), strict=True):
            inside = distance >= low if end is None else (distance >= low) & (distance < end)
            if inside.any():
                self.buckets[low] = self.buckets.get(low, 0) + int(inside.sum())
