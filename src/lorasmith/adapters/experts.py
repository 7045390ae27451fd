"""LoRA on stacked experts (`target_parameters`): one product per expert, wherever the base keeps the expert.

The adapter stores A[r·E, in] (expert slowest) and B[out, r·E] (expert fastest) for a parameter F[E, P, Q]
that transformers 5 holds in memory. A base's files hold F whole, or one tensor per expert and projection.
"""

from __future__ import annotations

from lorasmith.adapters.base import (
    BaseView,
    Change,
    Factor,
    RowUpdate,
    Site,
    SiteChanges,
    SiteError,
    Term,
    View,
)
from lorasmith.adapters.lora import A, B, is_experts
from lorasmith.adapters.stacks import ExpertStack, find_stacks

INNER_A, INNER_B = f"base_layer.{A}", f"base_layer.{B}"

TRANSPOSED_MODELS = frozenset({"gpt_oss", "aria_text", "openai_privacy_filter"})
"""Model types whose expert class stores [E, in, out] and says so (`is_transposed`)."""

_STRAIGHT_SINCE = (0, 19)
"""PEFT took every stack for [E, in, out] before this version."""


class Experts:
    """The factors of one or two parameters of a stack of experts."""

    name = "experts"

    def takes(self, site: Site) -> frozenset[str]:
        """Both pairs of factors, the outer and the inner."""
        if not is_experts(site):
            return frozenset()
        pairs = [pair for pair in ({A, B}, {INNER_A, INNER_B}) if pair <= set(site.tensors)]
        return frozenset().union(*pairs) if pairs else frozenset()

    def find(self, site: Site, module: str, base: BaseView) -> SiteChanges:
        """W + s·B·A on every expert's part of the parameter that each pair fits."""
        stacks = find_stacks(module, base)
        changes: list[Change] = []
        used: set[str] = set()
        for a, b in ((INNER_A, INNER_B), (A, B)):
            if a in site.tensors and b in site.tensors:
                stack, straight = match(site, a, b, stacks, base)
                if stack.name in used:
                    raise SiteError(f"two pairs of factors fit {stack.name}", "one pair per parameter")
                used.add(stack.name)
                changes += _changes(site, a, b, stack, straight, base)
        return SiteChanges(tuple(changes))


def match(site: Site, a: str, b: str, stacks: list[ExpertStack], base: BaseView) -> tuple[ExpertStack, bool]:
    """The parameter that a pair of factors fits, and whether Δ[e] = B·A rather than its transpose.

    By shape; where both orientations fit, by the PEFT that wrote the adapter and the model's expert class.
    """
    down, up = site.tensors[a].shape, site.tensors[b].shape
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        raise SiteError(f"the experts' factors have the shapes {list(down)} and {list(up)}")
    fitting = []
    for stack in stacks:
        rank = site.config.rank(f"{site.path}.{stack.name}")
        if down[0] != rank * stack.experts:
            continue
        # Square experts fit both ways; the PEFT that wrote the adapter decides then.
        straight = (up[0], down[1]) == (stack.rows, stack.columns)
        turned = (down[1], up[0]) == (stack.rows, stack.columns)
        if straight or turned:
            fitting.append((stack, straight if straight != turned else not _stored_transposed(site, base)))
    if len(fitting) != 1:
        raise SiteError(
            f"the experts' factors {list(down)} and {list(up)} fit {len(fitting)} of "
            + ", ".join(f"{s.name} [{s.experts}, {s.rows}, {s.columns}]" for s in stacks),
            "exactly one parameter",
            "this adapter was trained on another base",
        )
    return fitting[0]


def _stored_transposed(site: Site, base: BaseView) -> bool:
    version = tuple(int(part) for part in (site.config.peft_version or "").split(".")[:2] if part.isdigit())
    if version and version < _STRAIGHT_SINCE:
        return True
    return base.model_type in TRANSPOSED_MODELS


def _changes(site: Site, a: str, b: str, stack: ExpertStack, straight: bool, base: BaseView) -> list[Change]:
    key = f"{site.path}.{stack.name}"
    rank, scale = site.config.rank(key), site.config.scale(key)
    inputs, outputs = site.tensors[a].shape[1], site.tensors[b].shape[0]
    updates: dict[str, list[RowUpdate]] = {}
    for tensor, start, expert, row, count in stack.pieces:
        down: tuple[View, ...] = (("reshape", stack.experts, rank, inputs), ("select", 0, expert))
        up: tuple[View, ...] = (("reshape", outputs, rank, stack.experts), ("select", 2, expert))
        cut: View = ("narrow", 0, row, count)
        if straight:
            left, right = Factor(site.adapter, site.tensors[b].name, (*up, cut)), _factor(site, a, down)
        else:
            left = Factor(site.adapter, site.tensors[a].name, (*down, ("T",), cut))
            right = _factor(site, b, (*up, ("T",)))
        term = Term(left, right, rank, scale, site.weight)
        updates.setdefault(tensor, []).append(RowUpdate(start, start + count, (term,)))
    uses = (site.tensors[a].name, site.tensors[b].name)
    formula = "W + s·B[e]·A[e]" if straight else "W + s·(B[e]·A[e])ᵀ"
    return [Change(name, name, formula, uses, tuple(rows)) for name, rows in updates.items()]


def _factor(site: Site, suffix: str, view: tuple[View, ...]) -> Factor:
    return Factor(site.adapter, site.tensors[suffix].name, view)
