"""Find word n-grams of a few texts in a stream of many, exactly and vectorised.

The words of the few texts get fixed random 64-bit numbers; every other word is 0. An n-gram's hash is
sum(number[word_k] · odd_k) mod 2^64, computed for all positions of a block of rows at once. Two different
n-grams collide with a chance of about 2^-64 each, which a run of 10^9 positions against 10^5 n-grams meets
with a chance below 10^-5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Words = Sequence[str]
U64 = NDArray[np.uint64]


def number_of(word: str) -> int:
    """A fixed 64-bit number for a word, never 0."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()) | 1


def _odd(position: int) -> np.uint64:
    return np.uint64(number_of(f"position {position}"))


def grams(numbers: U64, n: int) -> tuple[NDArray[np.int64], U64]:
    """Start and hash of each run of n words; a 0 is a gap that no run crosses."""
    if len(numbers) < n:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    gaps = np.concatenate(([0], np.cumsum(numbers == 0)))
    starts = np.flatnonzero(gaps[n:] == gaps[:-n])
    total = np.zeros(len(starts), np.uint64)
    for position in range(n):
        total += numbers[starts + position] * _odd(position)
    return starts, total


def numbers_of(words: Words) -> U64:
    """The numbers of all words of a text."""
    return np.fromiter((number_of(word) for word in words), np.uint64, len(words))


@dataclass(frozen=True)
class Hits:
    """How many different n-grams of a text each row of a block shares, one entry per (row, text) pair."""

    row: NDArray[np.int64]
    text: NDArray[np.int64]
    shared: NDArray[np.int64]


class GramIndex:
    """The distinct n-grams of some texts, given as numbers; `grams[i]` counts those of text i."""

    def __init__(self, texts: Sequence[U64], n: int) -> None:
        self.n = n
        hashes, owners, counts = [], [], []
        for index, numbers in enumerate(texts):
            own = np.unique(grams(numbers, n)[1])
            hashes.append(own)
            owners.append(np.full(len(own), index, np.int64))
            counts.append(len(own))
        flat = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        order = np.argsort(flat, kind="stable")
        self.hashes: U64 = flat[order]
        self.owners: NDArray[np.int64] = (np.concatenate(owners) if owners else np.empty(0, np.int64))[order]
        self.grams: NDArray[np.int64] = np.array(counts, np.int64)
        self.distinct: U64 = np.unique(self.hashes)

    def find(self, numbers: U64, rows: NDArray[np.int32]) -> Hits:
        """Shared n-grams of a block: the numbers of its words (0 for a word of no text) and their rows.

        Rows must be separated by at least one 0.
        """
        starts, total = grams(numbers, self.n)
        if not len(starts) or not len(self.hashes):
            nothing = np.empty(0, np.int64)
            return Hits(nothing, nothing, nothing)
        places = np.searchsorted(self.distinct, total)
        places[places == len(self.distinct)] = 0
        found = self.distinct[places] == total
        pairs = np.unique(np.stack([rows[starts[found]].astype(np.uint64), total[found]]), axis=1)
        return self._expand(pairs[0].astype(np.int64), pairs[1])

    def _expand(self, rows: NDArray[np.int64], hashes: U64) -> Hits:
        """From (row, distinct hash) to (row, text, how many): one n-gram may stand in several texts."""
        low = np.searchsorted(self.hashes, hashes, "left")
        high = np.searchsorted(self.hashes, hashes, "right")
        repeat = high - low
        index = np.repeat(low - np.concatenate(([0], np.cumsum(repeat)[:-1])), repeat) + np.arange(
            repeat.sum()
        )
        code = np.repeat(rows, repeat) * len(self.grams) + self.owners[index]
        codes, shared = np.unique(code, return_counts=True)
        return Hits(codes // len(self.grams), codes % len(self.grams), shared.astype(np.int64))
