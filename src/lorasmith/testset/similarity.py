"""Near duplicates among many texts, exactly: pairs whose word shingles have a high Jaccard similarity.

Prefix filtering (Chaudhuri et al. 2006; Xiao et al. 2008, "PPJoin"): with the shingles of every text in one
order, rarest first, two texts with similarity ≥ t share a shingle among the first |A| - ⌈t·|A|⌉ + 1 of each.
So only few pairs are compared, and none is missed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Shingles = frozenset[tuple[str, ...]]


def shingles(tokens: Sequence[str], n: int) -> Shingles:
    """All runs of n tokens; a shorter text is one shingle of its own."""
    if len(tokens) < n:
        return frozenset([tuple(tokens)])
    return frozenset(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def jaccard(first: Shingles, second: Shingles) -> float:
    """Shared part of both sets: 1 for equal ones, 0 for nothing in common."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def repeats(texts: Sequence[Shingles], scopes: Sequence[str], threshold: float) -> list[bool]:
    """Whether an earlier text of the same scope that is kept has a similarity of at least `threshold`."""
    common = Counter(shingle for text in texts for shingle in text)
    starts: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    found: list[bool] = []
    for index, (text, scope) in enumerate(zip(texts, scopes, strict=True)):
        ordered = sorted(text, key=lambda shingle: (common[shingle], shingle))
        prefix = ordered[: len(ordered) - math.ceil(threshold * len(ordered)) + 1]
        candidates = {other for shingle in prefix for other in starts.get((scope, shingle), ())}
        repeated = any(
            min(len(texts[other]), len(text)) >= threshold * max(len(texts[other]), len(text))
            and jaccard(texts[other], text) >= threshold
            for other in candidates
        )
        found.append(repeated)
        if not repeated:
            for shingle in prefix:
                starts.setdefault((scope, shingle), []).append(index)
    return found
