"""Adapters on stacked experts: one pair of factors holds the low-rank updates of all experts of a layer.

For E experts of rank r PEFT stores A[r·E, in], experts slowest, and B[out, r·E], experts fastest:
Δₑ = s·B[:, e::E]·A[e·r : (e+1)·r]. Whether the stacked parameter is [E, out, in] or [E, in, out] changed
sides in peft 0.19; shapes tell, and where both dimensions are equal, the model's type or the version does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lorasmith.proving import weights_names as names
from lorasmith.proving.weights_adapter import Adapter
from lorasmith.proving.weights_formula import Expected, Factor, Term, View
from lorasmith.proving.weights_stored import Stored

_SWAPPED_SINCE = (0, 19)


@dataclass(frozen=True)
class Slot:
    """Where rows of one expert's matrix are stored."""

    target: Expected
    expert: int
    first_row: int
    """Within the stored tensor's matrix."""
    rows: range
    """Of the expert's own matrix."""


@dataclass(frozen=True)
class Stack:
    """A parameter of E matrices [high, wide], wherever its parts are stored."""

    name: str
    """As in `target_parameters`."""
    experts: int
    high: int
    wide: int
    slots: tuple[Slot, ...]


def stacks(path: str, expected: Mapping[str, Expected]) -> list[Stack]:
    """The parameters of a module of experts, stacked on disk or stored one by one."""
    found: list[Stack] = []
    starts = set(names.spellings(f"{path}."))
    for name, target in expected.items():
        parent, _, leaf = name.rpartition(".")
        if len(target.source.shape) == 3 and f"{parent}." in starts:
            experts, high, wide = target.source.shape
            slots = tuple(Slot(target, e, e * high, range(high)) for e in range(experts))
            found.append(Stack(leaf, experts, high, wide, slots))
    for parameter, layouts in names.EXPERT_PARTS.items():
        for parts in layouts:
            one_by_one = [names.expert_names(path, part, expected) for part in parts]
            if all(one_by_one) and not any(stack.name == parameter for stack in found):
                found.append(_gather(parameter, one_by_one, expected))
    return found


def _gather(parameter: str, parts: list[dict[int, str]], expected: Mapping[str, Expected]) -> Stack:
    slots, high, wide, experts = [], 0, 0, len(parts[0])
    for by_expert in parts:
        shape = expected[by_expert[min(by_expert)]].source.shape
        for expert, name in by_expert.items():
            slots.append(Slot(expected[name], expert, 0, range(high, high + shape[0])))
        high, wide = high + shape[0], shape[1]
    return Stack(parameter, experts, high, wide, tuple(slots))


def place(
    adapter: Adapter, path: str, pairs: list[tuple[Stored, Stored]], found: list[Stack], model_type: str
) -> None:
    """Give each pair (A, B) of a module its stack, innermost wrapper first; all pairs have one or it raises.

    Raises `AdapterError` where a pair fits none, or where two would fit the same.
    """
    free = list(found)
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


def _ways(adapter: Adapter, path: str, stack: Stack, a: Stored, b: Stored, model_type: str) -> list[bool]:
    """Ways a pair fits: False for Δ = B·A, True for its transpose."""
    total = adapter.rank(f"{path}.{stack.name}") * stack.experts
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != total or b.shape[1] != total:
        return []
    fits = [
        turned
        for turned, (high, wide) in ((False, (b.shape[0], a.shape[1])), (True, (a.shape[1], b.shape[0])))
        if (high, wide) == (stack.high, stack.wide)
    ]
    if len(fits) == 2:
        return [model_type in names.TRANSPOSED_EXPERTS or _version(adapter) < _SWAPPED_SINCE]
    return fits


def _version(adapter: Adapter) -> tuple[int, ...]:
    """peft's version; those before 0.18 did not write it down."""
    text = str(adapter.config.get("peft_version") or "0")
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def _factors(a: Stored, b: Stored, experts: int, slot: Slot, turned: bool) -> tuple[Factor, Factor]:
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
