"""Biases: a bias of the factor B that is added, and trained biases that take the base's place."""

from __future__ import annotations

from lorasmith.adapters.base import BaseView, Change, Factor, RowUpdate, Site, SiteChanges, SiteError, Term

LORA_BIAS = "lora_B.bias"
TRAINED = ("base_layer.bias", "bias")


class LoraBias:
    """`lora_bias`: b + s·bias of the factor B."""

    name = "lora-bias"

    def takes(self, site: Site) -> frozenset[str]:
        """`lora_B.bias`."""
        return frozenset({LORA_BIAS} & set(site.tensors))

    def find(self, site: Site, module: str, base: BaseView) -> SiteChanges:
        """b + s·bias; `SiteError` where the base's layer has no bias to add to."""
        stored = site.tensors[LORA_BIAS]
        name = f"{module}.bias"
        if name not in base.checkpoint.tensors:
            raise SiteError(
                f"the adapter adds a bias to {module}, which has none in the base",
                "a layer with a bias",
                "a merged model of this architecture cannot hold this bias; serve the adapter with PEFT",
            )
        info = base.tensor(name)
        if stored.shape != info.shape or len(info.shape) != 1:
            raise SiteError(f"{stored.name} has the shape {list(stored.shape)}", f"{list(info.shape)}")
        length = info.shape[0]
        # The layer gives B·(A·x) + bias, all of it scaled: on the base's bias that is a product with [[1]].
        one = Factor(site.adapter, stored.name, (("reshape", length, 1),))
        scale = site.config.scale(site.path)
        rows = RowUpdate(0, length, (Term(one, UNIT, 1, scale, site.weight),))
        return SiteChanges((Change(name, name, "b + s·bias", (stored.name,), (rows,)),))


UNIT = Factor(-1, "", ())
"""The matrix [[1]]."""


class TrainedBias:
    """`bias: lora_only` or `all`: biases that were trained themselves."""

    name = "trained-bias"

    def takes(self, site: Site) -> frozenset[str]:
        """`base_layer.bias`, or `bias` of a module that is not saved as a whole."""
        if "weight" in site.tensors:
            return frozenset()
        return frozenset(set(TRAINED) & set(site.tensors))

    def find(self, site: Site, module: str, base: BaseView) -> SiteChanges:
        """The trained bias in the place of the base's."""
        suffix = next(suffix for suffix in TRAINED if suffix in site.tensors)
        stored = site.tensors[suffix]
        info = base.tensor(f"{module}.bias")
        if stored.shape != info.shape:
            raise SiteError(f"{stored.name} has the shape {list(stored.shape)}", f"{list(info.shape)}")
        if site.weight != 1.0:
            raise SiteError(f"the weight {site.weight} is asked for a trained bias", "weight 1")
        change = Change(
            info.name, info.name, "the adapter's bias", (stored.name,), replacement=site.factor(suffix)
        )
        return SiteChanges((change,))
