"""What the merge did to the model: divergence per token, and what rounding swallowed in each layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorasmith.files.run_layout import RunRecords
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import TokenComparison
from lorasmith.reporting.figures import Axis, linear_axis, log_axis
from lorasmith.reporting.groups import ALL, is_idle, sort_groups

FLOOR = "the adapter against itself"
SERVED = "the adapter in its serving type"
QUANTILES = (("median", "median"), ("q90", "90 %"), ("q95", "95 %"), ("q99", "99 %"), ("q999", "99.9 %"))


@dataclass(frozen=True)
class DivergenceRow:
    """KL divergence per token of one group."""

    name: str
    comparison: TokenComparison
    at: dict[str, float]
    """`mean`, `max` and each quantile in percent of the axis."""


@dataclass(frozen=True)
class DivergenceTable:
    """One kind of group; the limit that decides the grade where there is one."""

    kind: str
    axis: Axis
    limit: float | None
    rows: list[DivergenceRow]


@dataclass(frozen=True)
class Cell:
    """One tensor of the heat map."""

    tensor: str
    swallowed: float
    """Fraction of the updated elements, 0..1."""
    relative_update: float
    shade: float
    """`relative_update` against the largest one, 0..1."""


@dataclass(frozen=True)
class Heat:
    """Layers down, modules across; tensors outside the layers are listed apart."""

    modules: list[str]
    layers: list[tuple[str, list[Cell | None]]]
    others: list[Cell]
    totals: list[float]
    """Swallowed fraction of each whole layer, in the order of `layers`."""


def divergence_tables(records: RunRecords) -> list[DivergenceTable]:
    """Adapter against merged, overall with the floor, then by kind of group."""
    proof = records.behaviour
    if proof is None or proof.grade == "not measured":
        return []
    tables = []
    limit = proof.thresholds.get("mean_kl")
    for kind, groups in (proof.groups or {"": {}}).items():
        if is_idle(kind, len(groups)):
            continue
        compared = {ALL: proof.overall}
        compared.update({name: groups[name] for name in sort_groups(kind, set(groups))})
        if proof.floor is not None:
            compared[FLOOR] = proof.floor
        if proof.serving is not None:
            compared[SERVED] = proof.serving
        axis = log_axis([value for entry in compared.values() for value in _values(entry).values()])
        rows = [
            DivergenceRow(
                name, entry, {quantile: axis.at(value) for quantile, value in _values(entry).items()}
            )
            for name, entry in compared.items()
        ]
        inside = limit is not None and axis.low <= limit <= axis.high
        tables.append(DivergenceTable(kind, axis, axis.at(limit) if inside and limit else None, rows))
    return tables


def _values(entry: TokenComparison) -> dict[str, float]:
    names = ["mean", "max", *(name for name, _ in QUANTILES)]
    return {name: getattr(entry.kl, name) for name in names}


@dataclass(frozen=True)
class Bar:
    """Examples whose difference lies within low … high."""

    low: float
    high: float
    count: int
    height: float
    """Height in percent of the tallest bar."""
    side: str
    """`better`, `even` (around zero) or `worse`."""


@dataclass(frozen=True)
class Shift:
    """How the examples moved by the merge: merged minus adapter, nats per token."""

    axis: Axis
    bars: list[Bar]
    better: int
    worse: int
    same: int
    largest: float


_BARS = 41
"""Odd, so that one bar stands around zero."""
_CORE = 0.98
"""Fraction of the examples that the axis covers; the outer bars hold the few that lie beyond."""


def shifts(index: Mapping[str, Any]) -> Shift | None:
    """A histogram from the explorer's columns; None unless both models scored some example."""
    if "merged" not in index or "adapter" not in index:
        return None
    pairs = zip(index["merged"], index["adapter"], strict=True)
    moves = [merged - adapter for merged, adapter in pairs if merged is not None and adapter is not None]
    if not moves:
        return None
    sizes = sorted(abs(move) for move in moves)
    reach = sizes[min(len(sizes) - 1, int(_CORE * len(sizes)))] or sizes[-1] or 1e-6
    width = 2 * reach / _BARS
    counts = [0] * _BARS
    for move in moves:
        counts[min(_BARS - 1, max(0, int((move + reach) // width)))] += 1
    middle = _BARS // 2
    bars = [
        Bar(
            low=-reach + place * width,
            high=-reach + (place + 1) * width,
            count=number,
            height=round(100 * number / max(counts), 2),
            side="better" if place < middle else "even" if place == middle else "worse",
        )
        for place, number in enumerate(counts)
    ]
    ticks = tuple(tick for tick in linear_axis([-reach, reach]).ticks if abs(tick) <= reach)
    return Shift(
        axis=Axis(-reach, reach, ticks),
        bars=bars,
        better=sum(move < 0 for move in moves),
        worse=sum(move > 0 for move in moves),
        same=sum(move == 0 for move in moves),
        largest=max(moves, key=abs),
    )


_LAYER = re.compile(r"^(?P<stem>.*?)\.(?P<layer>\d+)\.(?P<module>.+?)(\.weight)?$")


def heat_map(merge: MergeRecord | None) -> Heat | None:
    """The merged tensors by layer and module; None when nothing was merged."""
    if merge is None or not merge.tensors:
        return None
    largest = max(tensor.relative_update for tensor in merge.tensors) or 1.0
    counts = {entry.name: (entry.swallowed, entry.changed + entry.swallowed) for entry in merge.tensors}
    placed: dict[tuple[str, int], dict[str, Cell]] = {}
    modules: dict[str, None] = {}
    others = []
    for tensor in merge.tensors:
        updated = tensor.changed + tensor.swallowed
        cell = Cell(
            tensor=tensor.name,
            swallowed=tensor.swallowed / updated if updated else 0.0,
            relative_update=tensor.relative_update,
            shade=tensor.relative_update / largest,
        )
        place = _LAYER.match(tensor.name)
        if place is None:
            others.append(cell)
            continue
        module = place["module"]
        modules[module] = None
        placed.setdefault((place["stem"], int(place["layer"])), {})[module] = cell
    stems = {stem for stem, _ in placed}
    layers = [
        (str(layer) if len(stems) == 1 else f"{stem}.{layer}", [cells.get(module) for module in modules])
        for (stem, layer), cells in sorted(placed.items())
    ]
    totals = [
        sum(counts[cell.tensor][0] for cell in cells.values())
        / max(1, sum(counts[cell.tensor][1] for cell in cells.values()))
        for _, cells in sorted(placed.items())
    ]
    return Heat(list(modules), layers, others, totals)
