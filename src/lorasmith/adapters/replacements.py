"""Whole modules and single rows that an adapter stores itself: they take the place of the base's."""

from __future__ import annotations

from collections.abc import Mapping

from lorasmith.adapters.base import BaseView, Change, Copy, Site, SiteChanges, SiteError, Weight

SAVED, ORIGINAL = "modules_to_save", "original_module"
TOKENS = "token_adapter.trainable_tokens_delta"


class SavedModule:
    """`modules_to_save` and resized embeddings: the module's own tensors."""

    name = "saved-module"

    def takes(self, site: Site) -> frozenset[str]:
        """`weight` and `bias` of the module, and the copies that PEFT may save beside them."""
        if not {"weight", "modules_to_save.weight"} & set(site.tensors):
            return frozenset()
        own = {"weight", "bias"}
        return frozenset(
            (own | {f"{kind}.{part}" for kind in (SAVED, ORIGINAL) for part in own}) & set(site.tensors)
        )

    def find(self, site: Site, module: str, base: BaseView) -> SiteChanges:
        """The adapter's tensors in the place of the base's."""
        # A replaced tensor is no difference that could be scaled.
        if site.weight != 1.0:
            raise SiteError(
                f"the weight {site.weight} is asked for a module that the adapter replaces", "weight 1"
            )
        changes: list[Change] = []
        copies: list[Copy] = []
        for part in ("weight", "bias"):
            saved, original = f"{SAVED}.{part}", f"{ORIGINAL}.{part}"
            suffix = part if part in site.tensors else saved
            if suffix not in site.tensors:
                continue
            target = _target(module, part, base)
            changes.append(_change(site, suffix, target, base))
            if suffix == part and saved in site.tensors:
                copies.append(Copy(site.adapter, site.tensors[saved].name, twin=site.tensors[part].name))
            if original in site.tensors:
                copies.append(Copy(site.adapter, site.tensors[original].name, base=target.info.name))
        return SiteChanges(tuple(changes), tuple(copies))


def _target(module: str, part: str, base: BaseView) -> Weight:
    if part == "weight":
        return base.weight(module)
    info = base.tensor(f"{module}.{part}")
    return Weight(info.name, info)


def _change(site: Site, suffix: str, target: Weight, base: BaseView) -> Change:
    stored = site.tensors[suffix]
    resized = stored.shape != target.info.shape
    vocabulary = target.info.name == base.embedding or is_head(target.name)
    if resized and not (vocabulary and stored.shape[1:] == target.info.shape[1:]):
        raise SiteError(
            f"{stored.name} has the shape {list(stored.shape)}, {target.name} has {list(target.info.shape)}",
            "the shape of the base's tensor",
            "this adapter was trained on another base",
        )
    return Change(
        target.name,
        target.info.name,
        "the adapter's tensor" + (", resized" if resized else ""),
        (stored.name,),
        replacement=site.factor(suffix),
        shape=stored.shape,
        # A vocabulary resized before the training keeps its tie, a copy made for it does not.
        head_follows=resized and not _named(site.path, site.config.modules_to_save),
    )


class TrainableTokens:
    """`trainable_token_indices`: some rows of an embedding or a head."""

    name = "trainable-tokens"

    def takes(self, site: Site) -> frozenset[str]:
        """`token_adapter.trainable_tokens_delta`, which holds the rows themselves, not a difference."""
        return frozenset({TOKENS} & set(site.tensors))

    def find(self, site: Site, module: str, base: BaseView) -> SiteChanges:
        """The trained rows in the place of the base's; a tied head follows."""
        stored = site.tensors[TOKENS]
        weight = base.weight(module)
        indices = _indices_of(site, module, base)
        if len(weight.info.shape) != 2 or stored.shape != (len(indices), weight.info.shape[1]):
            raise SiteError(
                f"{stored.name} has the shape {list(stored.shape)}",
                f"[{len(indices)}, {weight.info.shape[-1]}], a row for each of the config's token ids",
            )
        if len(set(indices)) != len(indices) or max(indices, default=-1) >= weight.info.shape[0]:
            raise SiteError(
                f"the config's token ids are {str(list(indices))[:120]}",
                f"distinct ids below {weight.info.shape[0]}",
            )
        if site.weight != 1.0:
            raise SiteError(f"the weight {site.weight} is asked for trained tokens", "weight 1")
        change = Change(
            weight.name,
            weight.info.name,
            "the adapter's rows in the place of the base's",
            (stored.name,),
            row_values=site.factor(TOKENS),
            row_indices=indices,
            head_follows=True,
        )
        return SiteChanges((change,))


def is_head(name: str) -> bool:
    """Whether a tensor is an output head, whose rows are tokens too."""
    return name.rpartition(".")[0].rpartition(".")[2] in ("lm_head", "embed_out", "output")


def _named(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)


def _indices_of(site: Site, module: str, base: BaseView) -> tuple[int, ...]:
    given = site.config.trainable_token_indices
    if isinstance(given, Mapping):
        for name, indices in given.items():
            if _named(site.path, (name,)):
                return indices
    elif given is not None and f"{module}.weight" == base.embedding:
        return given
    raise SiteError(
        "the adapter stores trained rows, its config does not say of which tokens", "trainable_token_indices"
    )
