"""What rounding to nearest swallowed in each tensor, over the size of its update, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lorasmith.files.atomic import read_record
from lorasmith.records.merging import MergeRecord

_COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#c2185b", "#7b5ea7", "#8c564b", "#5f6368")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720, 420, 64, 56, 20, 140


def plot(merges: Sequence[Path], output: Path) -> None:
    """Share of updated elements that kept the base's value over ‖ΔW‖/‖W‖, one point a tensor, as SVG."""
    points = [
        (one.relative_update, one.swallowed / (one.swallowed + one.changed), one.name.split(".")[-2])
        for merge in merges
        for one in read_record(merge / "lorasmith_merge.json", MergeRecord).tensors
        if one.relative_update and one.swallowed + one.changed
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(_svg(points))


def _svg(points: list[tuple[float, float, str]]) -> str:
    low = math.floor(math.log10(min(x for x, *_ in points)) * 4) / 4
    high = math.ceil(math.log10(max(x for x, *_ in points)) * 4) / 4

    def across(x: float) -> float:
        return _LEFT + (math.log10(x) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - y * (_HEIGHT - _BOTTOM - _TOP)

    kinds = sorted({kind for *_, kind in points})
    colour = dict(zip(kinds, _COLOURS * len(kinds), strict=False))
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    parts.append('<rect width="100%" height="100%" fill="#fff"/>')
    right = _WIDTH - _RIGHT
    for tenth in range(0, 11, 2):
        y = up(tenth / 10)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tenth * 10} %</text>')
    base = _HEIGHT - _BOTTOM
    for decade in range(math.floor(low), math.ceil(high)):
        for share in (10.0**decade, 3 * 10.0**decade):
            if 10**low <= share <= 10**high:
                x = across(share)
                parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 5}" stroke="#333"/>')
                label = f"{100 * share:.3g} %"
                parts.append(f'<text x="{x:.1f}" y="{base + 20}" text-anchor="middle">{label}</text>')
    for x_value, y_value, kind in points:
        place = f'cx="{across(x_value):.1f}" cy="{up(y_value):.1f}"'
        parts.append(f'<circle {place} r="3" fill="{colour[kind]}" fill-opacity="0.7"/>')
    for number, kind in enumerate(kinds):
        y = _TOP + 14 + 20 * number
        parts.append(f'<circle cx="{right + 20}" cy="{y - 4}" r="4" fill="{colour[kind]}"/>')
        parts.append(f'<text x="{right + 30}" y="{y}">{kind}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 12}" text-anchor="middle">‖ΔW‖ / ‖W‖</text>')
    parts.append(
        f'<text transform="translate(16 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        "updates swallowed by rounding to nearest</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"
