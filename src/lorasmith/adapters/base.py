"""What every LoRA variant says about a tensor: a change of the base, as data, before a number is read.

Legend of shapes: O rows and I columns of the target as a matrix (last dimension is I), K rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from lorasmith.checkpoint.adapter import PeftConfig
from lorasmith.checkpoint.header import TensorInfo
from lorasmith.checkpoint.model import Checkpoint, text_config

EMBEDDING_LEAVES = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings"})
"""What the module of the input embedding is called, over the architectures."""

View = tuple[str | int, ...]
"""One step from a stored tensor to the matrix that is meant: `("T",)`, `("reshape", …)`,
`("select", dim, i)`, `("narrow", dim, start, length)`."""


@dataclass(frozen=True)
class Factor:
    """A matrix that an adapter stores, and how to see it."""

    adapter: int
    """Which of the adapters of this merge, from 0."""
    tensor: str
    """Its name on disk."""
    view: tuple[View, ...] = ()


@dataclass(frozen=True)
class Term:
    """One product of the update: weight · scale · L[O,K] · R[K,I]."""

    left: Factor
    right: Factor
    rank: int
    scale: float
    """s, in float64 as PEFT holds it."""
    weight: float = 1.0
    """w of this adapter among several."""


@dataclass(frozen=True)
class RowUpdate:
    """The products that are added to the rows `start` to `stop` of the target."""

    start: int
    stop: int
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor of the model.

    W is the base's `source`, or the adapter's own `replacement`; then rows are replaced, products added, and
    what results is scaled to DoRA's magnitude, as far as each is there.
    """

    target: str
    """The tensor's name in the merged folder."""
    source: str
    """The base's tensor that W is read from; not the target's where a tied head is separated."""
    formula: str
    uses: tuple[str, ...]
    """Names on disk of the adapter tensors that go into it."""
    updates: tuple[RowUpdate, ...] = ()
    magnitude: Factor | None = None
    """m of DoRA."""
    magnitude_axis: int = 0
    """0: one m per row of the target; 1: one per column."""
    replacement: Factor | None = None
    """W itself, as the adapter stores it."""
    shape: tuple[int, ...] | None = None
    """The replacement's shape where it differs from the base's."""
    row_values: Factor | None = None
    """Takes the place of the rows `row_indices`."""
    row_indices: tuple[int, ...] = ()
    head_follows: bool = False
    """True where a tied head takes part in the change; else it keeps the base's values and is separated."""


@dataclass(frozen=True)
class Copy:
    """An adapter tensor that must equal another one, mostly of the base: does the adapter belong to it?"""

    adapter: int
    tensor: str
    base: str | None = None
    """The base's tensor; where one of the two has more rows, the common ones must agree."""
    twin: str | None = None
    """Another tensor of the same adapter that it must equal in place of the base's."""


@dataclass(frozen=True)
class Site:
    """All tensors that one adapter stores for one module."""

    adapter: int
    path: str
    """The module's path as the adapter spells it."""
    tensors: Mapping[str, TensorInfo]
    """Its tensors by what stands behind the path, such as `lora_A.weight`."""
    config: PeftConfig
    weight: float = 1.0

    def factor(self, suffix: str, *view: View) -> Factor:
        """One of its tensors as a matrix."""
        return Factor(self.adapter, self.tensors[suffix].name, view)


class SiteError(Exception):
    """A site that does not fit the base; the planner adds where it was found."""

    def __init__(self, found: str, expected: str | None = None, remedy: str | None = None) -> None:
        self.found = found
        self.expected = expected
        self.remedy = remedy
        super().__init__(found)


@dataclass(frozen=True)
class Weight:
    """A tensor of the model: its name in the merged folder, and where the base keeps its values."""

    name: str
    info: TensorInfo


@dataclass(frozen=True)
class BaseView:
    """The base as the variants look it up."""

    checkpoint: Checkpoint

    @cached_property
    def modules(self) -> frozenset[str]:
        """Every module path of the base that owns a tensor, and that of a tied head."""
        owners = {name.rpartition(".")[0] for name in self.checkpoint.tensors}
        head = self.tied_head
        return frozenset(owners | {head.rpartition(".")[0]} if head else owners)

    @cached_property
    def embedding(self) -> str | None:
        """The name of the input embedding's tensor."""
        embeddings = [
            name
            for name in self.checkpoint.tensors
            if name.rpartition(".")[0].rpartition(".")[2] in EMBEDDING_LEAVES and name.endswith(".weight")
        ]
        return embeddings[0] if len(embeddings) == 1 else None

    @cached_property
    def tied_head(self) -> str | None:
        """The name of the head's tensor where the head shares the embedding's; None where it has its own."""
        if not self.checkpoint.tied or self.embedding is None:
            return None
        # Vision-language models keep the head beside the language model's own prefix on disk.
        inner = self.embedding.startswith("language_model.model.")
        return "language_model.lm_head.weight" if inner else "lm_head.weight"

    def weight(self, module: str) -> Weight:
        """A module's weight, a tied head's included; `SiteError` where there is none."""
        name = f"{module}.weight"
        if name not in self.checkpoint.tensors and name == self.tied_head and self.embedding:
            return Weight(name, self.tensor(self.embedding))
        return Weight(name, self.tensor(name))

    def tensor(self, name: str) -> TensorInfo:
        """A tensor's entry; `SiteError` where there is none."""
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise SiteError(f"the base has no tensor {name}")
        return info

    @property
    def model_type(self) -> str:
        """The model type of the language part."""
        return str(text_config(self.checkpoint.config).get("model_type"))


@dataclass(frozen=True)
class SiteChanges:
    """What a variant makes of a site."""

    changes: tuple[Change, ...] = ()
    copies: tuple[Copy, ...] = ()


class Variant(Protocol):
    """One way in which PEFT changes a module."""

    name: str

    def takes(self, site: Site) -> frozenset[str]:
        """The suffixes of this site that the variant accounts for; none where it is not meant."""

    def find(self, site: Site, module: str, base: BaseView) -> SiteChanges:
        """The changes by a site that it takes something of; `module` is the path as the base spells it."""
