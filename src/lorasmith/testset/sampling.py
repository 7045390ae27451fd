"""Seeded choice without a random generator: rows are ordered by a hash, so every machine chooses alike.

The hash of a row depends on the seed and the row alone. Hence the choice does not depend on the order of
files, on Python's version, or on which other benchmarks are sampled beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from lorasmith.benchmarks.base import canonical
from lorasmith.errors import UsageError


def sort_key(seed: int, *parts: Any) -> bytes:
    """32 bytes that place a row among others: SHA-256 of the canonical JSON of seed and parts."""
    return hashlib.sha256(canonical([seed, *parts])).digest()


def require_size(size: int, what: str) -> None:
    """Raise `UsageError` unless `size` is at least 1."""
    if size < 1:
        raise UsageError(f"{what} is {size}", expected="a whole number of at least 1")


def allocate(
    rows: Mapping[str, int],
    size: int,
    seed: int,
    *,
    at_least: Mapping[str, int] | None = None,
    at_most: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Share `size` among strata in proportion to their rows by the method of largest remainders.

    No stratum gets more than it has (or than `at_most` says); `at_least` keeps rare strata where `size`
    allows it. The shares add up to `size`, or to all there is when that is less. Ties are
    drawn by the seed: by name, the same strata would win in every test set.
    """
    total = sum(rows.values())
    most = {name: min(count, (at_most or rows).get(name, 0)) for name, count in rows.items()}
    size = min(size, sum(most.values()))
    if size == 0:
        return dict.fromkeys(rows, 0)
    least = {name: min(most[name], (at_least or {}).get(name, 0)) for name in rows}
    if sum(least.values()) > size:
        least = dict.fromkeys(rows, 0)
    shares = {name: min(most[name], max(least[name], size * rows[name] // total)) for name in rows}

    def excess(name: str) -> int:
        """How far the share is above its quota, times `total`: whole numbers in place of fractions."""
        return shares[name] * total - size * rows[name]

    drawn = {name: sort_key(seed, name) for name in rows}
    while (surplus := sum(shares.values()) - size) != 0:
        if surplus > 0:
            order = sorted((n for n in shares if shares[n] > least[n]), key=lambda n: (-excess(n), drawn[n]))
        else:
            order = sorted((n for n in shares if shares[n] < most[n]), key=lambda n: (excess(n), drawn[n]))
        for name in order[: abs(surplus)]:
            shares[name] += -1 if surplus > 0 else 1
    return shares
