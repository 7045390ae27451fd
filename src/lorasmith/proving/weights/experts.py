"""Adapters on stacked experts: one pair of factors holds the low-rank updates of all experts of a layer.

For E experts of rank r PEFT stores A[r·E, in], experts slowest, and B[out, r·E], experts fastest:
Δₑ = s·B[:, e::E]·A[e·r : (e+1)·r]. Whether the stacked parameter is [E, out, in] or [E, in, out] changed
sides in peft 0.19; shapes tell, and where both dimensions are equal, the model's type or the version does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lorasmith.proving.weights.adapter import (
    EXPERT_PARTS,
    TRANSPOSED_EXPERTS,
    Adapter,
    expert_names,
    spellings,
)
from lorasmith.proving.weights.formula import Expected, Factor, Term, View
from lorasmith.proving.weights.model_folder import ProvenTensor

_SWAPPED_SINCE = (0, 19)
"""Version of peft from which on a stack without other signs is [E, out, in]."""


@dataclass(frozen=True)
class Slot:
    """Where rows of one expert's matrix are stored."""

    target: Expected
    expert: int
    first_row: int
    """Within the stored tensor's matrix."""
    rows: range
    """Rows of the expert's own matrix that stand there."""


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter of E matrices [high, wide], wherever its parts are stored."""

    name: str
    """Its name, as `target_parameters` has it."""
    experts: int
    high: int
    wide: int
    slots: tuple[Slot, ...]


def stacks(path: str, expected: Mapping[str, Expected]) -> list[ExpertParameter]:
    """The parameters of a module of experts, stacked on disk or stored one by one."""
    parameters: list[ExpertParameter] = []
    starts = set(spellings(f"{path}."))
    for name, target in expected.items():
        parent, _, leaf = name.rpartition(".")
        if len(target.source.shape) == 3 and f"{parent}." in starts:
            experts, high, wide = target.source.shape
            slots = tuple(Slot(target, e, e * high, range(high)) for e in range(experts))
            parameters.append(ExpertParameter(leaf, experts, high, wide, slots))
    for parameter, layouts in EXPERT_PARTS.items():
        for parts in layouts:
            one_by_one = [expert_names(path, part, expected) for part in parts]
            if all(one_by_one) and not any(stack.name == parameter for stack in parameters):
                parameters.append(_gather(parameter, one_by_one, expected))
    return parameters


def _gather(parameter: str, parts: list[dict[int, str]], expected: Mapping[str, Expected]) -> ExpertParameter:
    slots, high, wide, experts = [], 0, 0, len(parts[0])
    for by_expert in parts:
        shape = expected[by_expert[min(by_expert)]].source.shape
        for expert, name in by_expert.items():
            slots.append(Slot(expected[name], expert, 0, range(high, high + shape[0])))
        high, wide = high + shape[0], shape[1]
    return ExpertParameter(parameter, experts, high, wide, tuple(slots))


def place(
    adapter: Adapter,
    path: str,
    pairs: list[tuple[ProvenTensor, ProvenTensor]],
    parameters: list[ExpertParameter],
    model_type: str,
) -> None:
    """Give each pair (A, B) of a module its stack, innermost wrapper first; all pairs have one or it raises.

    Raises `AdapterError` where a pair fits none, or where two would fit the same.
    """
    free = list(parameters)
    for a, b in pairs:
        fits = [(stack, turned) for stack in free for turned in _ways(adapter, path, stack, a, b, model_type)]
        if len({stack.name for stack, _ in fits}) != 1 or len(fits) != 1:
            shapes = ", ".join(f"{stack.name}[{stack.experts}, {stack.high}, {stack.wide}]" for stack in free)
            raise adapter.refuse(
                f"{path!r}: lora_A {list(a.shape)} and lora_B {list(b.shape)} fit "
                f"{'none' if not fits else 'more than one'} of its parameters",
                shapes or "a parameter of the base that holds experts",
                "check that this is the base the adapter was trained on",
            )
        stack, turned = fits[0]
        free.remove(stack)
        for slot in stack.slots:
            left, right = _factors(a, b, stack.experts, slot, turned)
            scale = adapter.scale(f"{path}.{stack.name}")
            slot.target.terms.append(Term(scale, adapter.weight, left, right, slot.first_row))


def _ways(
    adapter: Adapter, path: str, stack: ExpertParameter, a: ProvenTensor, b: ProvenTensor, model_type: str
) -> list[bool]:
    """The ways in which a pair fits: False for Δ = B·A, True for its transpose."""
    total = adapter.rank(f"{path}.{stack.name}") * stack.experts
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != total or b.shape[1] != total:
        return []
    fits = [
        turned
        for turned, (high, wide) in ((False, (b.shape[0], a.shape[1])), (True, (a.shape[1], b.shape[0])))
        if (high, wide) == (stack.high, stack.wide)
    ]
    if len(fits) == 2:
        return [model_type in TRANSPOSED_EXPERTS or _version(adapter) < _SWAPPED_SINCE]
    return fits


def _version(adapter: Adapter) -> tuple[int, ...]:
    """peft's version; those before 0.18 did not write it down."""
    text = str(adapter.config.get("peft_version") or "0")
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def _factors(
    a: ProvenTensor, b: ProvenTensor, experts: int, slot: Slot, turned: bool
) -> tuple[Factor, Factor]:
    rank, expert, rows = a.shape[0] // experts, slot.expert, slice(slot.rows.start, slot.rows.stop)

    def of_a(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(experts, rank, -1)[expert]

    def of_b(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1, rank, experts)[:, :, expert]

    left: View
    right: View
    if turned:
        left, right = (lambda tensor: of_a(tensor).T[rows]), (lambda tensor: of_b(tensor).T)
        return Factor(a, left), Factor(b, right)
    left, right = (lambda tensor: of_b(tensor)[rows]), of_a
    return Factor(b, left), Factor(a, right)
