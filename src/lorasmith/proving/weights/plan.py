"""From base and adapters to what every tensor of the right merge is; every adapter tensor is used once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lorasmith.proving.weights import experts
from lorasmith.proving.weights.adapter import Adapter, find, is_embedding, is_head, is_named
from lorasmith.proving.weights.beside import ModelConfig
from lorasmith.proving.weights.formula import Expected, Factor, Magnitude, Term, transposed
from lorasmith.proving.weights.model_folder import ProvenTensor, TensorFolder
from lorasmith.proving.weights.ties import Ties
from lorasmith.records.base import Finding

CONV1D = frozenset(("c_attn", "c_proj", "c_fc", "q_attn"))
"""Modules that store their weight as [in, out] in the model types below."""
CONV1D_TYPES = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"))


class Plan:
    """The right merge, tensor by tensor, by its name on disk."""

    def __init__(self, base: TensorFolder, config: ModelConfig) -> None:
        self.base = base
        self.model_type = str(config.body.get("model_type", ""))
        self.expected = {
            name: Expected(name, stored.model_dtype or stored.dtype, stored)
            for name, stored in base.tensors.items()
        }
        self.ties = Ties(self.expected, config.ties)
        self.used: set[tuple[str, str]] = set()
        self.base_verified = False
        """Whether an adapter holds a copy of a tensor of the base, which agreed."""
        self.findings: list[Finding] = []

    def use(self, stored: ProvenTensor) -> ProvenTensor:
        """Note that an adapter tensor has its place in a formula."""
        self.used.add((str(stored.file), stored.name))
        return stored

    def target(self, adapter: Adapter, path: str, leaf: str) -> Expected:
        """What becomes of a module's tensor; raises `AdapterError` where the base has no such module."""
        fitting = find(path, leaf, self.expected)
        if len(fitting) == 1:
            return self.expected[fitting[0]]
        raise adapter.refuse(
            f"the base has {'no' if not fitting else 'more than one'} tensor for {path + '.' + leaf!r}",
            ", ".join(fitting) if fitting else "a base with this module",
            "check that this is the base the adapter was trained on",
        )


def plan_proof(base: TensorFolder, config: ModelConfig, adapters: Sequence[Adapter]) -> Plan:
    """Raises `AdapterError` naming what has no place in the base."""
    plan = Plan(base, config)
    for adapter in adapters:
        plan.ties.loosen()
        for module, roles in adapter.modules.items():
            if not module.endswith(".base_layer"):
                _place(plan, adapter, module, roles)
        plan.ties.follow()
        for module, roles in adapter.modules.items():
            for role, stored in roles.items():
                if (str(stored.file), stored.name) not in plan.used:
                    raise adapter.refuse(f"the {role} of {module!r} has no place in the merge")
        _note_gaps(plan, adapter)
    for target in plan.expected.values():
        _check_combination(adapters, target)
    return plan


def _note_gaps(plan: Plan, adapter: Adapter) -> None:
    """Modules that the config's list of targets names too, but that have no tensors in the adapter.

    PEFT would give them fresh factors that do nothing; an adapter file that lost some looks just so.
    """
    targets = adapter.config.get("target_modules")
    narrowed = any(adapter.config.get(key) for key in ("exclude_modules", "layers_to_transform"))
    if not isinstance(targets, list) or narrowed:
        return
    ends = tuple(f".{target}.weight" for target in targets if isinstance(target, str))
    gaps = [
        name
        for name, target in plan.expected.items()
        if len(target.source.shape) == 2 and f".{name}".endswith(ends) and not target.terms
    ]
    if gaps and ends:
        shown = ", ".join(gaps[:3]) + (f" and {len(gaps) - 3} more" if len(gaps) > 3 else "")
        text = f"target_modules fits {len(gaps)} tensors that the adapter does not change: {shown}"
        plan.findings.append(
            Finding(severity="warning", code="untouched-targets", message=text, where=str(adapter.path))
        )


def _place(plan: Plan, adapter: Adapter, module: str, roles: Mapping[str, ProvenTensor]) -> None:
    for role, leaf in (("weight", "weight"), ("bias", "bias")):
        if role in roles:
            _replace(adapter, plan.target(adapter, module, leaf), plan.use(roles[role]))
    if "copy" in roles:
        _take_copy(plan, adapter, module, roles["copy"])
    if "A" in roles:
        if find(module, "weight", plan.expected) and f"{module}.base_layer" not in adapter.modules:
            _place_linear(plan, adapter, module, roles)
        else:
            _place_experts(plan, adapter, module)
    if "embedding_A" in roles:
        _place_embedding(plan, adapter, module, roles)
    if "B.bias" in roles:
        _place_bias(plan, adapter, module, plan.use(roles["B.bias"]))
    if "tokens" in roles:
        _place_tokens(plan, adapter, module, plan.use(roles["tokens"]))


def _place_linear(plan: Plan, adapter: Adapter, module: str, roles: Mapping[str, ProvenTensor]) -> None:
    target, a, b = plan.target(adapter, module, "weight"), plan.use(roles["A"]), plan.use(roles["B"])
    if is_named(f"{module}.weight", adapter.config.get("target_parameters")):
        module = f"{module}.weight"  # no longer a Conv1D: PEFT takes parameters as they are stored
    turned = plan.model_type in CONV1D_TYPES and module.rpartition(".")[2] in CONV1D
    wanted = target.source.shape[::-1] if turned else target.source.shape
    _check_shapes(adapter, module, wanted, (b.shape, a.shape))
    left, right = (Factor(a, transposed), Factor(b, transposed)) if turned else (Factor(b), Factor(a))
    target.terms.append(Term(adapter.scale(module), adapter.weight, left, right))
    if "magnitude" in roles:
        _scale(adapter, target, plan.use(roles["magnitude"]), per_row=not turned)


def _place_embedding(plan: Plan, adapter: Adapter, module: str, roles: Mapping[str, ProvenTensor]) -> None:
    target = plan.target(adapter, module, "weight")
    a, b = plan.use(roles["embedding_A"]), plan.use(roles["embedding_B"])
    shape = target.source.shape
    _check_shapes(adapter, module, shape[::-1] if len(shape) == 2 else shape, (b.shape, a.shape))
    target.terms.append(
        Term(adapter.scale(module), adapter.weight, Factor(a, transposed), Factor(b, transposed))
    )
    if "magnitude" in roles:
        _scale(adapter, target, plan.use(roles["magnitude"]), per_row=False)


def _check_shapes(
    adapter: Adapter, module: str, wanted: tuple[int, ...], factors: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    rank = adapter.rank(module)
    if len(wanted) != 2 or factors != ((wanted[0], rank), (rank, wanted[1])):
        raise adapter.refuse(
            f"{module!r}: lora_A has shape {list(factors[1])}, lora_B {list(factors[0])}, "
            f"the base's weight {list(wanted)}",
            f"A[r, in] and B[out, r] with r = {rank}",
            "check that this is the base the adapter was trained on",
        )


def _scale(adapter: Adapter, target: Expected, magnitude: ProvenTensor, *, per_row: bool) -> None:
    outputs = target.source.shape[0 if per_row else 1]
    if magnitude.elements != outputs:
        raise adapter.refuse(f"{magnitude.name!r} has {magnitude.elements} elements", f"{outputs}")
    target.magnitude = Magnitude(magnitude, per_row)


def _place_bias(plan: Plan, adapter: Adapter, module: str, bias: ProvenTensor) -> None:
    target = plan.target(adapter, module, "bias")
    if bias.shape != target.source.shape:
        raise adapter.refuse(f"{bias.name!r} has shape {list(bias.shape)}", f"{list(target.source.shape)}")
    column = Factor(bias, lambda tensor: tensor.reshape(-1, 1))
    target.terms.append(Term(adapter.scale(module), adapter.weight, column, None))


def _place_tokens(plan: Plan, adapter: Adapter, module: str, rows: ProvenTensor) -> None:
    target = plan.target(adapter, module, "weight")
    asked = adapter.config.get("trainable_token_indices")
    if isinstance(asked, dict):
        fitting = [value for key, value in asked.items() if module == key or module.endswith(f".{key}")]
        asked = fitting[0] if len(fitting) == 1 else None
    shape = target.source.shape
    tokens = asked if isinstance(asked, list) and all(type(token) is int for token in asked) else []
    known = len(shape) == 2 and all(0 <= token < shape[0] for token in tokens)
    if not tokens or not known or len(set(tokens)) != len(tokens) or rows.shape != (len(tokens), shape[1]):
        raise adapter.refuse(
            f"{rows.name!r} has shape {list(rows.shape)}, and trainable_token_indices is {asked!r}",
            f"one row of {shape[-1]} for each of the listed tokens",
        )
    target.rows = {token: (rows, position) for position, token in enumerate(tokens)}


def _place_experts(plan: Plan, adapter: Adapter, module: str) -> None:
    pairs, path = [], module
    while path in adapter.modules and "A" in adapter.modules[path]:
        roles = adapter.modules[path]
        if set(roles) != {"A", "B"}:
            raise adapter.refuse(f"{path!r} has {', '.join(sorted(roles))}", "lora_A and lora_B alone")
        pairs.append((plan.use(roles["A"]), plan.use(roles["B"])))
        path += ".base_layer"
    stacks = experts.stacks(module, plan.expected)
    if not stacks:
        plan.target(adapter, module, "weight")
    experts.place(adapter, module, pairs[::-1], stacks, plan.model_type)


def _replace(adapter: Adapter, target: Expected, stored: ProvenTensor) -> None:
    path, old, new = target.name.rpartition(".")[0], target.source.shape, stored.shape
    # Only a vocabulary may change its size: rows of the embedding and of the head.
    resized = len(old) == len(new) == 2 and new[1] == old[1] and (is_embedding(path) or is_head(path))
    if new != old and not resized:
        raise adapter.refuse(f"{stored.name!r} has shape {list(new)}", f"{list(old)}, as in the base")
    if target.replaced:
        raise adapter.refuse(f"{target.name!r} is replaced by more than one tensor", "one")
    target.source, target.replaced = stored, True


def _take_copy(plan: Plan, adapter: Adapter, module: str, copy: ProvenTensor) -> None:
    """The base's own tensor, saved with the adapter: the new source where it was resized, else a check."""
    target = plan.target(adapter, module, "weight")
    plan.use(copy)
    if copy.shape != target.source.shape:
        _replace(adapter, target, copy)
        return
    if not _same_values(copy, target.source):
        raise adapter.refuse(
            f"the adapter's copy of {target.name!r} is not the base's tensor",
            "the same values",
            "give the base the adapter was trained on",
        )
    plan.base_verified = True


def _same_values(copy: ProvenTensor, base: ProvenTensor) -> bool:
    """Equal after rounding to the copy's precision, which may be less than the base's."""
    step = max(1, (1 << 22) // copy.columns)
    for start in range(0, copy.shape[0], step):
        part = (slice(start, min(start + step, copy.shape[0])),)
        a, b = copy.rows(part), base.rows(part)
        if not torch.equal(a.double(), b.to(a.dtype).double()):
            return False
    return True


def _check_combination(adapters: Sequence[Adapter], target: Expected) -> None:
    if target.magnitude and (len(target.terms) != 1 or target.terms[0].weight != 1.0):
        raise adapters[0].refuse(
            f"{target.name!r}: DoRA cannot be combined with another adapter or a weight",
            "DoRA alone, with weight 1",
        )
    if target.rows and (target.terms or target.replaced):
        raise adapters[0].refuse(f"{target.name!r} has trainable tokens and another change", "one of them")
    if target.replaced and len({id(adapter) for adapter in adapters}) > 1 and target.terms:
        raise adapters[0].refuse(
            f"{target.name!r} is replaced by one adapter and changed by another", "one of them"
        )
