"""Several changes of one tensor as one: products of adapters and sites added up, range of rows by range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from lorasmith.adapters.base import Change, Rows, Term
from lorasmith.checkpoint.adapter import Adapter
from lorasmith.errors import AdapterError


def combine(changes: Sequence[Change], adapters: Sequence[Adapter]) -> Change:
    """One change from those of several sites or adapters: products are added, as PEFT's `cat` does.

    Products of different rows of a tensor, such as experts of a stack, stay apart.
    """
    first = changes[0]
    if len(changes) == 1:
        return first
    kept = [(change.magnitude, change.replacement, change.row_values) for change in changes]
    if any(part is not None for parts in kept for part in parts):
        raise AdapterError(
            f"{first.target} is changed {len(changes)} times, and not by low-rank products alone",
            where=", ".join(str(adapter.folder) for adapter in adapters),
            expected="updates that can be added",
            remedy="DoRA and replaced tensors of several adapters do not add up: merge one adapter",
        )
    parts = [part for change in changes for part in change.rows]
    edges = sorted({part.start for part in parts} | {part.stop for part in parts})
    rows = []
    for start, stop in pairwise(edges):
        terms = tuple(term for part in parts if part.start <= start < part.stop for term in part.terms)
        if terms:
            rows.append(_cut(start, stop, parts, terms))
    uses = tuple(dict.fromkeys(name for change in changes for name in change.uses))
    summed = len({term.left.adapter for part in parts for term in part.terms}) > 1
    formula = first.formula.replace("s·", "Σ w·s·", 1) if summed else first.formula
    return replace(first, formula=formula, uses=uses, rows=tuple(rows))


def _cut(start: int, stop: int, parts: Sequence[Rows], terms: tuple[Term, ...]) -> Rows:
    """The products of the rows `start` to `stop`, each cut out of the range that it was made for."""
    cut = []
    for part in parts:
        if not part.start <= start < part.stop:
            continue
        for term in part.terms:
            if (part.start, part.stop) == (start, stop):
                cut.append(term)
                continue
            view = ("narrow", 0, start - part.start, stop - start)
            cut.append(replace(term, left=replace(term.left, view=(*term.left.view, view))))
    return Rows(start, stop, tuple(cut))
