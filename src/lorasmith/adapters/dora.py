"""DoRA on a linear layer: the low-rank sum, scaled to a learned magnitude per output (arXiv 2402.09353).

V = W + s·B·A and W′ = (m / ‖V‖₂)·V, the norm taken over the inputs of each output: over the rows of a weight
stored as [out, in], over the columns of a Conv1D's [in, out].
"""

from __future__ import annotations

from dataclasses import replace

from lorasmith.adapters.base import BaseView, Change, Site, SiteChanges, SiteError
from lorasmith.adapters.lora import BASE_COPY, MAGNITUDE, OLD_MAGNITUDE, A, B, base_copy, linear_change


def with_magnitude(change: Change, site: Site, length: int, axis: int) -> Change:
    """A low-rank change that is scaled to the site's magnitude vector afterwards."""
    suffix = MAGNITUDE if MAGNITUDE in site.tensors else OLD_MAGNITUDE
    stored = site.tensors[suffix]
    if stored.shape != (length,):
        raise SiteError(f"the magnitude has the shape {list(stored.shape)}", f"[{length}]")
    if not site.config.use_dora:
        raise SiteError("the adapter stores a magnitude, its config says use_dora: false", "use_dora: true")
    if site.weight != 1.0:
        raise SiteError(
            f"the weight {site.weight} is asked for a DoRA adapter",
            "weight 1",
            "a magnitude cannot be weighted: merge it alone",
        )
    return replace(
        change,
        formula=f"m·V/‖V‖ {'per row' if axis == 0 else 'per column'}, V = {change.formula}",
        uses=(*change.uses, stored.name),
        magnitude=site.factor(suffix),
        magnitude_axis=axis,
    )


class Dora:
    """Both factors of a linear layer and its magnitude."""

    name = "dora"

    def takes(self, site: Site) -> frozenset[str]:
        """The factors, the magnitude, and a copy of the base."""
        magnitude = {MAGNITUDE, OLD_MAGNITUDE} & set(site.tensors)
        if not {A, B} <= set(site.tensors) or len(magnitude) != 1:
            return frozenset()
        return frozenset(({A, B, BASE_COPY} & set(site.tensors)) | magnitude)

    def find(self, site: Site, module: str, base: BaseView) -> SiteChanges:
        """m·V/‖V‖ on the module's weight."""
        change, transposed = linear_change(site, module, base)
        outputs = site.tensors[B].shape[0]
        change = with_magnitude(change, site, outputs, 1 if transposed else 0)
        return SiteChanges((change,), base_copy(site, base.weight(module)))
