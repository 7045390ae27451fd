"""Seeded choice without a random generator: rows are ordered by a hash, so every machine chooses alike.

The hash of a row depends on the seed and the row alone. Hence the choice does not depend on the order of
files, on Python's version, or on which other benchmarks are sampled beside it.
"""

from __future__ import annotations

import hashlib
import heapq
import tempfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from lorasmith.benchmarks.base import canonical
from lorasmith.data.rows import fault_error, iterate_rows
from lorasmith.errors import DataError, UsageError
from lorasmith.progress import Advance
from lorasmith.testset import rows as training_rows
from lorasmith.testset.overlap import normalise


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


# One pass over a training file that keeps, per stratum, only the rows a hold-out can need.


_MAX_STRATA = 100_000
_BLOCK_ROWS = 1 << 16


class Choice(NamedTuple):
    """A row that may be held out; sorts by its key."""

    key: bytes
    """Hash of seed and prompt: rows with one prompt have one key."""
    row: bytes
    """The row's canonical JSON: among rows with one prompt the smallest stands for all."""
    line: int


@dataclass
class Reservoir:
    """Counts, the rows with the smallest keys of each stratum, and one short key per row on disk."""

    size: int
    rows: dict[str, int] = field(default_factory=dict)
    kept: dict[str, _Smallest] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    """Grouping fields that no row has."""
    keys: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    """(line, first 8 bytes of the key) of every row: finds rows that share a prompt without reading again."""

    def candidates(self) -> dict[str, list[Choice]]:
        """Per stratum the choices in order, each prompt under one stratum only."""
        owner: dict[bytes, tuple[bytes, str]] = {}
        for name in sorted(self.kept):
            for choice in self.kept[name].choices():
                owner[choice.key] = min(owner.get(choice.key, (choice.row, name)), (choice.row, name))
        return {
            name: [choice for choice in self.kept[name].choices() if owner[choice.key] == (choice.row, name)]
            for name in sorted(self.kept)
        }

    def rows_sharing(self, chosen: Iterable[Choice]) -> set[int]:
        """The lines of all rows whose prompt was chosen."""
        wanted = {int.from_bytes(choice.key[:8], "little") for choice in chosen}
        lines: set[int] = set()
        self.keys.seek(0)
        while block := self.keys.read(16 * _BLOCK_ROWS):
            pairs = array("Q", block)
            lines.update(line for line, key in zip(pairs[0::2], pairs[1::2], strict=True) if key in wanted)
        return lines


class _Smallest:
    """The `size` smallest keys seen, one choice per key."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.by_key: dict[bytes, Choice] = {}
        self.heap: list[tuple[int, bytes]] = []
        self.limit = b"\xff" * 33

    def offer(self, key: bytes, row: dict[str, object], line: int) -> None:
        if key > self.limit:
            return
        choice = Choice(key, canonical(row), line)
        known = self.by_key.get(key)
        if known is not None:
            self.by_key[key] = min(known, choice)
            return
        self.by_key[key] = choice
        heapq.heappush(self.heap, (-int.from_bytes(key), key))
        if len(self.heap) > self.size:
            del self.by_key[heapq.heappop(self.heap)[1]]
        if len(self.heap) == self.size:
            self.limit = self.heap[0][1]

    def choices(self) -> list[Choice]:
        return sorted(self.by_key.values())


def scan(path: Path, fields: Sequence[str], size: int, seed: int, advance: Advance) -> Reservoir:
    """Read every row once. Memory grows with size × strata, not with the rows.

    Raises `DataError` for a row without prompt and response, or for more strata than a sample can balance.
    """
    reservoir = Reservoir(size, absent=set(fields))
    block = array("Q")
    for read in iterate_rows(path, advance=advance):
        if read.example is None:
            raise fault_error(read, path)
        number, row = read.number, dict(read.value)
        values = [training_rows.field(row, name) for name in fields]
        reservoir.absent -= {name for name, value in zip(fields, values, strict=True) if value != "unknown"}
        stratum = " / ".join(values) or "all"
        key = sort_key(seed, normalise(read.example.prompt))
        reservoir.rows[stratum] = reservoir.rows.get(stratum, 0) + 1
        if stratum not in reservoir.kept:
            if len(reservoir.kept) == _MAX_STRATA:
                raise DataError(
                    f"there are more than {_MAX_STRATA} strata by {', '.join(fields)}",
                    where=path,
                    remedy="stratify by fields with few values",
                )
            reservoir.kept[stratum] = _Smallest(size)
        reservoir.kept[stratum].offer(key, row, number)
        block.extend((number, int.from_bytes(key[:8], "little")))
        if len(block) >= 2 * _BLOCK_ROWS:
            reservoir.keys.write(block.tobytes())
            block = array("Q")
    reservoir.keys.write(block.tobytes())
    return reservoir
