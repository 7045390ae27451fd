"""Plain LoRA on a linear layer: W + s·B·A (arXiv 2106.09685), rank-stabilised or not.

A Conv1D of GPT-2 stores its weight as [in, out]: there the update is the transpose, s·Aᵀ·Bᵀ.
"""

from __future__ import annotations

from lorasmith.adapters.base import Base, Change, Rows, Site, SiteError, Term
from lorasmith.checkpoint.header import TensorInfo

CONV1D_MODULES: dict[str, frozenset[str]] = {
    "gpt2": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
    "openai-gpt": frozenset({"c_attn", "c_proj", "c_fc"}),
    "imagegpt": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
    "decision_transformer": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
}
"""Model type → the layers that transformers builds as Conv1D, so that their weight is stored transposed."""

A, B = "lora_A.weight", "lora_B.weight"


def is_transposed(module: str, base: Base) -> bool:
    """Whether the base stores this layer's weight as [in, out]."""
    return module.rpartition(".")[2] in CONV1D_MODULES.get(str(base.config.get("model_type")), frozenset())


def factor_shapes(site: Site) -> tuple[int, int, int]:
    """(r, in, out) of a site's A[r, in] and B[out, r]; `SiteError` where they do not fit each other or r."""
    down, up = site.tensors[A], site.tensors[B]
    if len(down.shape) != 2 or len(up.shape) != 2:
        raise SiteError(
            f"lora_A has the shape {list(down.shape)}, lora_B {list(up.shape)}",
            "[r, in] and [out, r]",
            "factors of convolutions cannot be merged here",
        )
    rank = site.config.rank(site.path)
    if down.shape[0] != rank or up.shape[1] != rank:
        raise SiteError(
            f"lora_A has the shape {list(down.shape)}, lora_B {list(up.shape)}",
            f"[{rank}, in] and [out, {rank}], as r (with rank_pattern) says",
            "config and tensors are not of the same adapter",
        )
    return rank, down.shape[1], up.shape[0]


def check_shape(weight: TensorInfo, expected: tuple[int, ...], site: Site) -> None:
    """`SiteError` unless the base's weight has the shape that the factors make."""
    if weight.shape != expected:
        raise SiteError(
            f"the update has the shape {list(expected)}, {weight.name} has {list(weight.shape)}",
            "an update of the weight's own shape",
            "this adapter was trained on another base",
        )


def term(site: Site, rank: int, *, transposed: bool) -> Term:
    """The one product of a site, in the orientation of the stored weight."""
    scale = site.config.scale(site.path)
    if transposed:
        return Term(site.factor(A, ("T",)), site.factor(B, ("T",)), rank, scale, site.weight)
    return Term(site.factor(B), site.factor(A), rank, scale, site.weight)


class Lora:
    """Both factors of a linear layer, without a magnitude."""

    name = "lora"

    def takes(self, site: Site) -> frozenset[str]:
        """`lora_A.weight` and `lora_B.weight`, unless DoRA's magnitude stands beside them."""
        plain = A in site.tensors and B in site.tensors and "lora_magnitude_vector" not in site.tensors
        return frozenset({A, B}) if plain else frozenset()

    def changes(self, site: Site, module: str, base: Base) -> list[Change]:
        """W + s·B·A on the module's weight."""
        rank, inputs, outputs = factor_shapes(site)
        weight = base.tensor(f"{module}.weight")
        transposed = is_transposed(module, base)
        shape = (inputs, outputs) if transposed else (outputs, inputs)
        check_shape(weight, shape, site)
        return [
            Change(
                target=weight.name,
                source=weight.name,
                formula="W + s·(B·A)ᵀ" if transposed else "W + s·B·A",
                uses=(site.tensors[A].name, site.tensors[B].name),
                rows=(Rows(0, shape[0], (term(site, rank, transposed=transposed),)),),
            )
        ]
