"""Which tensor of the base gets what from which adapter tensor: decided before a number is read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorasmith.adapters.base import Base, Change, Copy
from lorasmith.checkpoint.adapter import Adapter
from lorasmith.checkpoint.header import FLOATS, TensorInfo, nbytes_of
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.errors import CheckpointError
from lorasmith.merging.combine import combine
from lorasmith.merging.sites import changes_at, find_sites, left_out, other_base
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
    """The tensor that W is read from."""
    adapter: int | None = None
    """The adapter whose file holds `source`; None: the base."""
    change: Change | None = None
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
    """The whole merge."""

    shards: dict[str, tuple[Output, ...]]
    """Per file: an output for every tensor of the base's file, in its order, then separated heads."""
    untied: bool
    """Whether a head that shared the embedding's tensor has one of its own now."""
    vocabulary: int | None
    """The number of tokens where the adapter changed it."""
    copies: tuple[Copy, ...]
    """What must be equal for the base to be the right one."""
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
    view = Base(base)
    findings: list[Finding] = []
    copies: list[Copy] = []
    collected: dict[str, list[Change]] = defaultdict(list)
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        sites = find_sites(adapter, number, weight)
        for found in changes_at(sites, view, adapter):
            copies += found.copies
            for change in found.changes:
                collected[change.target].append(change)
        findings += left_out(sites, view, adapter)
        findings += other_base(base, adapter)
    changes = {target: combine(parts, adapters) for target, parts in collected.items()}
    untied = separate_head(changes, view)
    shards = _lay_out(base, adapters, changes, PRECISIONS[precision])
    vocabulary = _vocabulary(changes, view)
    return Plan(shards, untied, vocabulary, tuple(copies), tuple(findings))


def separate_head(changes: dict[str, Change], base: Base) -> bool:
    """Give a tied head a tensor of its own where embedding and head no longer agree; True if it needs one.

    Where the head follows a change of the embedding, both stay one tensor.
    """
    head, embedding = base.tied_head, base.embedding
    if head is None or embedding is None or not (head in changes or embedding in changes):
        return False
    stored = head in base.checkpoint.tensors
    change = changes.get(embedding)
    follows = change is not None and change.head_follows
    if change is not None and follows and head not in changes:
        if stored:
            changes[head] = replace(change, target=head, source=head)
        return False
    if head not in changes and not stored:
        changes[head] = Change(head, embedding, "W, separated from the embedding", ())
    return True


def _vocabulary(changes: Mapping[str, Change], base: Base) -> int | None:
    change = changes.get(base.embedding or "")
    if change is None or change.shape is None or base.embedding is None:
        return None
    tokens = change.shape[0]
    return tokens if tokens != base.checkpoint.tensors[base.embedding].shape[0] else None


def _lay_out(
    base: Checkpoint, adapters: Sequence[Adapter], changes: Mapping[str, Change], wanted: str | None
) -> dict[str, tuple[Output, ...]]:
    left = dict(changes)
    shards = {}
    for shard in base.shards:
        outputs = [
            _output(info, left.pop(info.name, None), adapters, wanted, shard.path)
            for info in shard.tensors.values()
        ]
        for target, change in list(left.items()):
            if target not in base.tensors and change.source in shard.tensors:
                info = shard.tensors[change.source]
                outputs.append(_output(info, left.pop(target), adapters, wanted, shard.path))
        shards[shard.path.name] = tuple(outputs)
    if left:
        raise AssertionError(f"no shard holds {sorted(left)}")
    return shards


def _output(
    info: TensorInfo, change: Change | None, adapters: Sequence[Adapter], wanted: str | None, path: Path
) -> Output:
    dtype = wanted if wanted and info.dtype in FLOATS else info.dtype
    if change is None:
        return Output(info.name, dtype, info.shape, info)
    _check_target(info, dtype, path)
    if change.replacement is not None:
        number = change.replacement.adapter
        source = adapters[number].file.tensors[change.replacement.tensor]
        return Output(change.target, dtype, source.shape, source, number, change)
    return Output(change.target, dtype, info.shape, info, None, change)


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
