"""A merge into a quantized base's own format: codes by the grid, every other tensor as the base stores it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from lorasmith.errors import AdapterError
from lorasmith.machine.allocator import keep_memory
from lorasmith.progress import Advance
from lorasmith.proving.weights.blocks import Tally
from lorasmith.proving.weights.check import Checked, one_thread_per_operation
from lorasmith.proving.weights.formula import Expected
from lorasmith.proving.weights.model_folder import ProvenTensor
from lorasmith.proving.weights.plan import Plan
from lorasmith.proving.weights.quantized.on_grid import rows_to_check
from lorasmith.proving.weights.quantized.stored import Found
from lorasmith.proving.weights.report import BOUNDED_MOST, Report

_BYTES = 1 << 24
"""Bytes of blocks that are compared at a time."""


SMALL_GRID, MOST_ON_SMALL = 16, 3
"""Points of a 4-bit grid, and how many of them a calibrated code may be away from the nearest: more is not
needed, and 16 would allow every code there is."""


@dataclass(frozen=True)
class CodesOfWeight:
    """The codes of a weight that the adapter changes."""

    expected: Expected
    base: Found
    merged: Found


def split(
    plan: Plan, stored: Mapping[str, ProvenTensor], base: Mapping[str, Found], merged: Mapping[str, Found]
) -> tuple[dict[str, Expected], list[CodesOfWeight]]:
    """What each stored tensor has to be as it is, and the codes that go by the grid instead."""
    by_codes = {one.codes.name: one for one in base.values()}
    whole: dict[str, Expected] = {}
    codes: list[CodesOfWeight] = []
    for name, tensor in stored.items():
        one = by_codes.get(name)
        if one is None:
            whole[name] = plan.expected.get(name) or Expected(name, tensor.dtype, tensor)
            continue
        expected = plan.expected[one.name]
        _require_products(expected)
        if expected.terms and one.name in merged and merged[one.name].shape == one.shape:
            codes.append(CodesOfWeight(expected, one, merged[one.name]))
        else:
            whole[name] = Expected(name, tensor.dtype, tensor)
    return whole, codes


def _require_products(expected: Expected) -> None:
    if expected.magnitude or expected.rows or expected.replaced:
        raise AdapterError(
            f"the adapter replaces or scales {expected.name!r}, for which the base's grid has no rule",
            expected="updates by products alone",
            remedy="merge into 16 bits",
        )


def check_all(codes: list[CodesOfWeight], report: Report, advance: Advance) -> None:
    """Check every element of these weights, and enter them."""
    with keep_memory(), one_thread_per_operation(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for one in codes:
            _check_one(one, report, advance, pool)


def _check_one(one: CodesOfWeight, report: Report, advance: Advance, pool: ThreadPoolExecutor) -> None:
    report.claim(one.expected)
    tally = Tally()
    for part in pool.map(lambda work: work(), rows_to_check(one.expected, one.base, one.merged)):
        tally.add(part)
    if not _same_scales(one.base, one.merged):
        report.note("scales-differ", "blocks hold other scales than the base's", one.base.name)
    advance(one.merged.codes.bytes)
    shown = replace(one.merged.codes, name=one.base.name, shape=one.base.shape, dtype=one.base.format)
    most = MOST_ON_SMALL if len(one.base.points) <= SMALL_GRID else BOUNDED_MOST
    report.take(Checked(one.expected, shown, tally), on_grid=True, most=most)


def _same_scales(base: Found, merged: Found) -> bool:
    """Whether blocks that hold codes and scales are the same but for their codes."""
    if base.block is None:
        return True
    size, first, last = base.block
    step = size * (_BYTES // size)
    for start in range(0, base.codes.bytes, step):
        count = min(step, base.codes.bytes - start)
        ours, theirs = (one.codes.flat(start, count).reshape(-1, size) for one in (base, merged))
        for part in (slice(0, first), slice(last, size)):
            if not torch.equal(ours[:, part], theirs[:, part]):
                return False
    return True
