"""Figures over the responses, and how fast they came."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lorasmith.files.machine import hardware
from lorasmith.records.base import Finding
from lorasmith.records.followup import LengthSummary, RespondTiming


def count_ends(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The counted fields of `RespondRecord`, from rows of the output."""
    finish: Counter[str] = Counter()
    lengths: list[int] = []
    repeating = prompt_tokens = 0
    for row in rows:
        finish[row["finish_reason"]] += 1
        lengths.append(row["response_tokens"])
        repeating += row["repeats"]
        prompt_tokens += row["prompt_tokens"]
    lengths.sort()
    return {
        "rows": len(lengths),
        "finish": dict(sorted(finish.items())),
        "cut_off": (len(lengths) - finish["stop"]) / len(lengths) if lengths else 0.0,
        "repeating": repeating,
        "prompt_tokens": prompt_tokens,
        "response_tokens": sum(lengths),
        "lengths": _summary(lengths),
    }


def speed_since_start(rows: int, tokens: int, seconds: float, price: float | None) -> RespondTiming:
    """How fast rows came since the command was started, and what that cost at a price per hour."""
    seconds = max(seconds, 1e-9)
    return RespondTiming(
        rows=rows,
        tokens=tokens,
        seconds=seconds,
        rows_per_second=rows / seconds,
        tokens_per_second=tokens / seconds,
        cost=None if price is None else price * seconds / 3600,
        hardware=hardware(),
    )


def _summary(lengths: list[int]) -> LengthSummary | None:
    if not lengths:
        return None
    last = len(lengths) - 1
    return LengthSummary(
        least=lengths[0], median=lengths[last // 2], p90=lengths[last * 9 // 10], most=lengths[-1]
    )


def not_in_data(count: int) -> Finding:
    """Responses of an earlier command whose rows are gone."""
    return Finding(
        severity="warning",
        code="rows-not-in-data",
        message=f"{count} responses of the earlier output belong to rows that the data no longer has; "
        "they are kept at its end",
        remedy="give another --output for another data file",
    )
