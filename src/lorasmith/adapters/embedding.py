"""LoRA and DoRA on an embedding: W[V, d] + s·(B·A)ᵀ, with A[r, V] and B[d, r]; DoRA's norm is per column."""

from __future__ import annotations

from lorasmith.adapters.base import BaseView, Change, RowUpdate, Site, SiteChanges, SiteError, Term
from lorasmith.adapters.dora import with_magnitude
from lorasmith.adapters.lora import BASE_COPY, MAGNITUDE, OLD_MAGNITUDE, base_copy, check_shape

A, B = "lora_embedding_A", "lora_embedding_B"


class EmbeddingLora:
    """Both factors of an embedding, with or without a magnitude."""

    name = "embedding"

    def takes(self, site: Site) -> frozenset[str]:
        """The factors, a magnitude, and a copy of the base."""
        if not {A, B} <= set(site.tensors):
            return frozenset()
        return frozenset({A, B, BASE_COPY, MAGNITUDE, OLD_MAGNITUDE} & set(site.tensors))

    def find(self, site: Site, module: str, base: BaseView) -> SiteChanges:
        """W + s·(B·A)ᵀ on the embedding's weight; a tied head keeps W."""
        down, up = site.tensors[A], site.tensors[B]
        rank = site.config.rank(site.path)
        if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != rank or up.shape[1] != rank:
            raise SiteError(
                f"lora_embedding_A has the shape {list(down.shape)}, lora_embedding_B {list(up.shape)}",
                f"[{rank}, vocabulary] and [width, {rank}]",
            )
        weight = base.weight(module)
        copies = base_copy(site, weight)
        check_shape(weight, (down.shape[1], up.shape[0]))
        scale = site.config.scale(site.path)
        # PEFT looks tokens up in A: stored as [r, V], the update of W[V, d] is Aᵀ·Bᵀ.
        term = Term(site.factor(A, ("T",)), site.factor(B, ("T",)), rank, scale, site.weight)
        change = Change(
            target=weight.name,
            source=weight.info.name,
            formula="W + s·(B·A)ᵀ",
            uses=(down.name, up.name),
            updates=(RowUpdate(0, down.shape[1], (term,)),),
        )
        if {MAGNITUDE, OLD_MAGNITUDE} & set(site.tensors):
            change = with_magnitude(change, site, up.shape[0], 1)
        return SiteChanges((change,), copies)
