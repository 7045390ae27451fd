"""From base and adapters to what every tensor of the right merge is; every adapter tensor is used once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorasmith.proving.weights_adapter import Adapter
from lorasmith.proving.weights_folder import Stored, TensorFolder
from lorasmith.proving.weights_formula import Expected, Factor, Term


class Plan:
    """The right merge, tensor by tensor, by its name on disk."""

    def __init__(self, base: TensorFolder) -> None:
        self.base = base
        self.expected = {name: Expected(name, stored.dtype, stored) for name, stored in base.tensors.items()}
        self.used: set[tuple[str, str]] = set()

    def use(self, stored: Stored) -> Stored:
        """Note that an adapter tensor has its place in a formula."""
        self.used.add((str(stored.file), stored.name))
        return stored


def make_plan(base: TensorFolder, adapters: Sequence[Adapter]) -> Plan:
    """Raises `AdapterError` naming what has no place in the base."""
    plan = Plan(base)
    for adapter in adapters:
        for module, roles in adapter.modules.items():
            _place(plan, adapter, module, roles)
            for role, stored in roles.items():
                if (str(stored.file), stored.name) not in plan.used:
                    raise adapter.refuse(f"the {role} of {module!r} has no place in the merge")
    return plan


def _place(plan: Plan, adapter: Adapter, module: str, roles: Mapping[str, Stored]) -> None:
    target = plan.expected.get(f"{module}.weight")
    if target is None:
        raise adapter.refuse(f"the base has no tensor {module + '.weight'!r}", "a base with this module")
    if "A" in roles:
        _check_shapes(adapter, module, target.source, roles["A"].shape, roles["B"].shape)
        target.terms.append(
            Term(
                adapter.scale(module),
                adapter.weight,
                Factor(plan.use(roles["B"])),
                Factor(plan.use(roles["A"])),
            )
        )


def _check_shapes(
    adapter: Adapter, module: str, base: Stored, a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    rank = adapter.rank(module)
    fits = len(base.shape) == 2 and a == (rank, base.shape[1]) and b == (base.shape[0], rank)
    if not fits:
        raise adapter.refuse(
            f"{module!r}: lora_A has shape {list(a)}, lora_B {list(b)}, the weight {list(base.shape)}",
            f"A[r, in] and B[out, r] with r = {rank} for W[out, in]",
            "check that this is the base the adapter was trained on",
        )
