"""Stacks of experts: a parameter that is one tensor in memory, wherever a base's files keep its parts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorasmith.adapters.base import BaseView, SiteError
from lorasmith.checkpoint.header import TensorInfo

PER_EXPERT: tuple[dict[str, tuple[str, ...]], ...] = (
    {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
)
"""Files with a tensor per expert: fused parameter → the projections that are its rows, in order."""

_ONE = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class ExpertStack:
    """A parameter F[E, P, Q]: where its rows are on disk."""

    name: str
    experts: int
    rows: int
    columns: int
    pieces: tuple[tuple[str, int, int, int, int], ...]
    """(tensor, first row in that tensor, expert, first row in F[e], number of rows)."""


def find_stacks(module: str, base: BaseView) -> list[ExpertStack]:
    """The parameters of a module `….experts`, fused on disk or in one tensor per expert."""
    tensors = base.checkpoint.tensors
    fused = [
        info for name, info in tensors.items() if name.rpartition(".")[0] == module and len(info.shape) == 3
    ]
    if fused:
        return [_fused(info) for info in fused]
    for family in PER_EXPERT:
        stacks = [_per_expert(module, name, parts, base) for name, parts in family.items()]
        present = [stack for stack in stacks if stack is not None]
        if present:
            return present
    raise SiteError(f"the base keeps no experts under {module}", "fused experts, or one tensor per expert")


def _fused(info: TensorInfo) -> ExpertStack:
    experts, rows, columns = info.shape
    pieces = tuple((info.name, expert * rows, expert, 0, rows) for expert in range(experts))
    return ExpertStack(info.name.rpartition(".")[2], experts, rows, columns, pieces)


def _per_expert(module: str, name: str, parts: tuple[str, ...], base: BaseView) -> ExpertStack | None:
    tensors = base.checkpoint.tensors
    count = 0
    while f"{module}.{count}.{parts[0]}.weight" in tensors:
        count += 1
    if not count:
        return None
    pieces = []
    columns = tensors[f"{module}.0.{parts[0]}.weight"].shape[-1]
    for expert in range(count):
        row = 0
        for part in parts:
            info = base.tensor(f"{module}.{expert}.{part}.weight")
            if len(info.shape) != 2 or info.shape[1] != columns:
                raise SiteError(f"{info.name} has the shape {list(info.shape)}", f"[rows, {columns}]")
            pieces.append((info.name, 0, expert, row, info.shape[0]))
            row += info.shape[0]
    return ExpertStack(name, count, row, columns, tuple(pieces))


def place_in_stack(module: str, base: BaseView) -> tuple[TensorInfo, int, int] | None:
    """Where a base that keeps its experts fused has one expert's projection: (tensor, first row, rows).

    None for a module that is none, or that the base keeps as a tensor of its own.
    """
    parts_of_name = _ONE.fullmatch(module)
    if parts_of_name is None or f"{module}.weight" in base.checkpoint.tensors:
        return None
    path, expert, projection = parts_of_name[1], int(parts_of_name[2]), parts_of_name[3]
    for family in PER_EXPERT:
        for fused, parts in family.items():
            info = base.checkpoint.tensors.get(f"{path}.{fused}")
            if projection in parts and info is not None and len(info.shape) == 3:
                rows = info.shape[1] // len(parts)
                if expert >= info.shape[0] or info.shape[1] % len(parts):
                    raise SiteError(
                        f"{info.name} has the shape {list(info.shape)}, without room for {module}"
                    )
                return info, expert * info.shape[1] + parts.index(projection) * rows, rows
    return None
