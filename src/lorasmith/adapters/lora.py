"""Plain LoRA on a linear layer: W + s·B·A (arXiv 2106.09685), rank-stabilised or not.

A Conv1D of GPT-2 stores its weight as [in, out]: there the update is the transpose, s·Aᵀ·Bᵀ.
"""

from __future__ import annotations

from lorasmith.adapters.base import (
    BaseView,
    Change,
    Copy,
    RowUpdate,
    Site,
    SiteChanges,
    SiteError,
    Term,
    Weight,
)
from lorasmith.adapters.stacks import place_in_stack
from lorasmith.checkpoint.header import TensorInfo

CONV1D_MODULES: dict[str, frozenset[str]] = {
    "gpt2": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
    "openai-gpt": frozenset({"c_attn", "c_proj", "c_fc"}),
    "imagegpt": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
    "decision_transformer": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
}
"""Model type → the layers that transformers builds as Conv1D, so that their weight is stored transposed."""

A, B = "lora_A.weight", "lora_B.weight"
BASE_COPY = "base_layer.weight"
MAGNITUDE = "lora_magnitude_vector"
OLD_MAGNITUDE = f"{MAGNITUDE}.weight"
"""The name of the magnitude that PEFT wrote before 0.11."""


def is_transposed(module: str, base: BaseView) -> bool:
    """Whether the base stores this layer's weight as [in, out]."""
    return module.rpartition(".")[2] in CONV1D_MODULES.get(base.model_type, frozenset())


def is_experts(site: Site) -> bool:
    """Whether the site is a stack of experts, whose factors hold all experts side by side."""
    return site.path.rpartition(".")[2] == "experts"


def is_parameter(site: Site) -> bool:
    """Whether the weight was targeted by its own name; PEFT then takes it as it is stored."""
    parameter = f"{site.path}.weight"
    return any(parameter == name or parameter.endswith("." + name) for name in site.config.target_parameters)


def pattern_path(site: Site) -> str:
    """What the patterns are matched against: the module, or its parameter if that is targeted."""
    return f"{site.path}.weight" if is_parameter(site) else site.path


def factor_shapes(site: Site) -> tuple[int, int, int]:
    """(r, in, out) of a site's A[r, in] and B[out, r]; `SiteError` where they do not fit each other or r."""
    down, up = site.tensors[A], site.tensors[B]
    if len(down.shape) != 2 or len(up.shape) != 2:
        raise SiteError(
            f"lora_A has the shape {list(down.shape)}, lora_B {list(up.shape)}",
            "[r, in] and [out, r]",
            "factors of convolutions cannot be merged here",
        )
    rank = site.config.rank(pattern_path(site))
    if down.shape[0] != rank or up.shape[1] != rank:
        raise SiteError(
            f"lora_A has the shape {list(down.shape)}, lora_B {list(up.shape)}",
            f"[{rank}, in] and [out, {rank}], as r (with rank_pattern) says",
            "config and tensors are not of the same adapter",
        )
    return rank, down.shape[1], up.shape[0]


def check_shape(weight: Weight, expected: tuple[int, ...]) -> None:
    """`SiteError` unless the base's weight has the shape that the factors make."""
    if weight.info.shape != expected:
        raise SiteError(
            f"the update has the shape {list(expected)}, {weight.name} has {list(weight.info.shape)}",
            "an update of the weight's own shape",
            "this adapter was trained on another base",
        )


def linear_change(site: Site, module: str, base: BaseView) -> tuple[Change, bool]:
    """W + s·B·A on a linear layer's weight, and whether that is stored as [in, out]."""
    rank, inputs, outputs = factor_shapes(site)
    weight = base.weight(module)
    # A parameter that is targeted by its own name is taken as it is stored, also by a Conv1D.
    transposed = is_transposed(module, base) and not is_parameter(site)
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    check_shape(weight, shape)
    scale = site.config.scale(pattern_path(site))
    if transposed:
        term = Term(site.factor(A, ("T",)), site.factor(B, ("T",)), rank, scale, site.weight)
    else:
        term = Term(site.factor(B), site.factor(A), rank, scale, site.weight)
    change = Change(
        target=weight.name,
        source=weight.info.name,
        formula="W + s·(B·A)ᵀ" if transposed else "W + s·B·A",
        uses=(site.tensors[A].name, site.tensors[B].name),
        updates=(RowUpdate(0, shape[0], (term,)),),
    )
    return change, transposed


def _stacked_change(site: Site, info: TensorInfo, start: int, count: int) -> Change:
    """W + s·B·A on the rows of one expert's projection within a fused tensor [E, P, Q]."""
    rank, inputs, outputs = factor_shapes(site)
    if (outputs, inputs) != (count, info.shape[2]):
        raise SiteError(
            f"the update has the shape {[outputs, inputs]}, its part of {info.name} {[count, info.shape[2]]}",
            "an update of the weight's own shape",
            "this adapter was trained on another base",
        )
    term = Term(site.factor(B), site.factor(A), rank, site.config.scale(site.path), site.weight)
    uses = (site.tensors[A].name, site.tensors[B].name)
    return Change(info.name, info.name, "W + s·B·A", uses, (RowUpdate(start, start + count, (term,)),))


def base_copy(site: Site, weight: Weight) -> tuple[Copy, ...]:
    """The base's own weight, which PEFT saves beside the factors of embeddings and tied heads."""
    if BASE_COPY not in site.tensors:
        return ()
    stored = site.tensors[BASE_COPY]
    if stored.shape != weight.info.shape:
        raise SiteError(
            f"the adapter's copy of {weight.name} has the shape {list(stored.shape)}, the base's "
            f"{list(weight.info.shape)}",
            "the weight that the adapter was trained on",
            "give the base with the embeddings resized as they were for the training",
        )
    return (Copy(site.adapter, stored.name, base=weight.info.name),)


class Lora:
    """Both factors of a linear layer, without a magnitude."""

    name = "lora"

    def takes(self, site: Site) -> frozenset[str]:
        """`lora_A.weight`, `lora_B.weight` and a copy of the base, unless DoRA's magnitude stands beside."""
        magnitude = {MAGNITUDE, OLD_MAGNITUDE} & set(site.tensors)
        if not {A, B} <= set(site.tensors) or magnitude or is_experts(site):
            return frozenset()
        return frozenset({A, B, BASE_COPY} & set(site.tensors))

    def find(self, site: Site, module: str, base: BaseView) -> SiteChanges:
        """W + s·B·A on the module's weight."""
        place = place_in_stack(module, base)
        if place is not None:
            return SiteChanges((_stacked_change(site, *place),))
        change, _ = linear_change(site, module, base)
        return SiteChanges((change,), base_copy(site, base.weight(module)))
