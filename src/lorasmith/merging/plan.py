"""Which tensor of the base gets what from which adapter tensor: decided before a number is read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorasmith.adapters.base import Base, Change, Rows, Site, SiteError
from lorasmith.adapters.registry import VARIANTS, split_name
from lorasmith.checkpoint.adapter import PREFIX, Adapter
from lorasmith.checkpoint.header import FLOATS, TensorInfo, nbytes_of
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.checkpoint.names import resolve
from lorasmith.errors import AdapterError, CheckpointError
from lorasmith.records.base import Finding

PRECISIONS: dict[str, str | None] = {"base": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The `precision` argument → the type on disk; None keeps each tensor's own."""


@dataclass(frozen=True)
class Output:
    """One tensor of the merged folder."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo
    """The base's tensor that it is made from."""
    change: Change | None
    """None: copied, or cast where `dtype` is not the source's."""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the merged folder."""
        return nbytes_of(self.dtype, self.shape)


@dataclass(frozen=True)
class Plan:
    """The whole merge: what each output shard holds, in the order of the base's data."""

    shards: dict[str, tuple[Output, ...]]
    untied: bool
    findings: tuple[Finding, ...]

    @property
    def outputs(self) -> list[Output]:
        """All tensors of the merged folder."""
        return [output for outputs in self.shards.values() for output in outputs]


def make_plan(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], precision: str
) -> Plan:
    """Plan a merge.

    Raises `AdapterError` where an adapter tensor has no place in the base, has a wrong shape, or lacks its
    partner, so that every adapter tensor is used exactly once; `CheckpointError` for a target that this
    merge cannot write (integers, float64 kept as float64).
    """
    view = Base(
        base, {module: module for module in sorted({name.rpartition(".")[0] for name in base.tensors})}
    )
    findings: list[Finding] = []
    collected: dict[str, list[Change]] = defaultdict(list)
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        sites = find_sites(adapter, number, weight)
        for change in _changes(sites, view, adapter):
            collected[change.target].append(change)
        findings += _left_out(sites, view, adapter)
    changes = {target: combine(found, adapters) for target, found in collected.items()}
    return Plan(_lay_out(base, changes, PRECISIONS[precision]), untied=False, findings=tuple(findings))


def find_sites(adapter: Adapter, number: int, weight: float) -> list[Site]:
    """Group an adapter's tensors by the module that they belong to."""
    grouped: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in adapter.tensors.items():
        parts = split_name(name.removeprefix(PREFIX))
        if parts is None:
            raise AdapterError(
                f"the adapter tensor {name!r} is of no known kind",
                where=adapter.file.path,
                expected="…lora_A.weight, …lora_B.weight and the other names that PEFT writes for LoRA",
                remedy="nothing of an adapter is left out silently: use a newer lorasmith, or PEFT itself",
            )
        grouped[parts[0]][parts[1]] = info
    return [Site(number, path, tensors, adapter.config, weight) for path, tensors in sorted(grouped.items())]


def _changes(sites: Sequence[Site], base: Base, adapter: Adapter) -> list[Change]:
    found = []
    for site in sites:
        try:
            found += _changes_of_site(site, base)
        except SiteError as error:
            raise AdapterError(
                f"{site.path}: {error.found}",
                where=adapter.file.path,
                expected=error.expected,
                remedy=error.remedy or "check that the adapter was trained on this base",
            ) from error
    return found


def _changes_of_site(site: Site, base: Base) -> list[Change]:
    module = _module_in_base(site, base)
    used: list[str] = []
    changes = []
    for variant in VARIANTS:
        taken = variant.takes(site)
        if taken:
            used += sorted(taken)
            changes += variant.changes(site, module, base)
    left = sorted(set(site.tensors) - set(used))
    if left:
        raise SiteError(
            f"the adapter tensor {site.tensors[left[0]].name} has no use"
            + (" without its partner" if left[0].startswith("lora_") else ""),
            "every adapter tensor used exactly once",
            "the adapter is incomplete, or holds something that cannot be merged",
        )
    assert len(used) == len(set(used)), f"two variants use the same tensor of {site.path}"
    return changes


def _module_in_base(site: Site, base: Base) -> str:
    found = resolve(site.path, base.modules)
    if not found:
        raise SiteError(
            f"the base has no module {site.path!r} under any of its spellings",
            "a module of the base",
            "this adapter was trained on another base",
        )
    if len(found) > 1:
        raise SiteError(f"the module may be {found[0]} or {found[1]} of the base", "one module")
    return found[0]


def combine(changes: Sequence[Change], adapters: Sequence[Adapter]) -> Change:
    """One change from those of several adapters: the sum of their products, as PEFT's `cat` adds them."""
    first = changes[0]
    if len(changes) == 1:
        return first
    additive = all(
        change.magnitude is None and change.replacement is None and change.row_replacement is None
        for change in changes
    )
    ranges = [[(rows.start, rows.stop) for rows in change.rows] for change in changes]
    if not additive or any(found != ranges[0] for found in ranges):
        raise AdapterError(
            f"{first.target} is changed by {len(changes)} adapters, and not by low-rank products alone",
            where=", ".join(str(adapter.folder) for adapter in adapters),
            expected="updates that can be added",
            remedy="DoRA and replaced tensors of several adapters do not add up: merge one adapter",
        )
    rows = tuple(
        Rows(part.start, part.stop, tuple(term for change in changes for term in change.rows[number].terms))
        for number, part in enumerate(first.rows)
    )
    uses = tuple(name for change in changes for name in change.uses)
    return replace(first, formula=first.formula.replace("s·", "Σ w·s·", 1), uses=uses, rows=rows)


def _lay_out(
    base: Checkpoint, changes: dict[str, Change], wanted: str | None
) -> dict[str, tuple[Output, ...]]:
    shards = {}
    for shard in base.shards:
        outputs = []
        for info in shard.tensors.values():
            change = changes.pop(info.name, None)
            dtype = wanted if wanted and info.dtype in FLOATS else info.dtype
            if change is not None:
                _check_target(info, dtype, shard.path)
            shape = change.shape if change and change.shape else info.shape
            outputs.append(Output(info.name, dtype, shape, info, change))
        shards[shard.path.name] = tuple(outputs)
    assert not changes, f"no shard holds {sorted(changes)}"
    return shards


def _check_target(info: TensorInfo, dtype: str, path: Path) -> None:
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"the adapter changes {info.name}, which the base stores as {info.dtype}",
            where=path,
            expected="one of " + ", ".join(FLOATS),
        )
    if dtype == "F64":
        raise CheckpointError(
            f"the adapter changes {info.name}, which the base stores in float64",
            where=path,
            expected="float32, bfloat16 or float16 in the merged model",
            remedy="give --precision float32",
        )


def _left_out(sites: Sequence[Site], base: Base, adapter: Adapter) -> list[Finding]:
    """Modules that the config targets by name and that the adapter has nothing for.

    An error where other layers have the same module (the file is incomplete); a note where no layer has.
    """
    targets = adapter.config.target_modules
    if not isinstance(targets, tuple) or adapter.config.some_layers:
        return []
    adapted = {name for site in sites for name in resolve(site.path, base.modules)}
    kinds = {_kind(name) for name in adapted}
    for module in base.modules:
        targeted = any(module == target or module.endswith("." + target) for target in targets)
        if targeted and module not in adapted and _kind(module) in kinds:
            raise AdapterError(
                f"the config targets {module}, the adapter has no tensors for it",
                where=adapter.file.path,
                expected="tensors for every layer that was trained",
                remedy="the adapter is incomplete: save or fetch it again",
            )
    return [
        Finding(
            severity="note",
            code="target-without-tensors",
            message=f"the config targets {target!r}, the adapter has no tensors for it",
        )
        for target in sorted(targets)
        if not any(site.path == target or site.path.endswith("." + target) for site in sites)
    ]


def _kind(module: str) -> str:
    """The path without the numbers of layers and experts."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))
