"""What every LoRA variant says about a tensor: a change of the base, as data, before a number is read.

Legend of shapes: O rows and I columns of the target as a matrix (last dimension is I), K rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lorasmith.checkpoint.header import TensorInfo
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.checkpoint.peft_config import PeftConfig

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
class Rows:
    """The products that are added to the rows `start` to `stop` of the target."""

    start: int
    stop: int
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor of the model."""

    target: str
    """The tensor's name in the merged folder."""
    source: str
    """The base's tensor that W is read from; another one than the target where a tied head is separated."""
    formula: str
    uses: tuple[str, ...]
    """Names on disk of the adapter tensors that go into it."""
    rows: tuple[Rows, ...] = ()
    magnitude: Factor | None = None
    """m of DoRA."""
    magnitude_axis: int = 0
    """0: one m per row of the target; 1: one per column."""
    replacement: Factor | None = None
    """Takes the place of the whole tensor."""
    shape: tuple[int, ...] | None = None
    """The shape of the replacement where it differs from the base's."""
    row_replacement: Factor | None = None
    """Takes the place of the rows `row_indices`."""
    row_indices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Site:
    """All tensors that one adapter stores for one module."""

    adapter: int
    path: str
    """The module's path as the adapter spells it."""
    tensors: Mapping[str, TensorInfo]
    """By what stands behind the path, such as `lora_A.weight`."""
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
class Base:
    """The base as the variants look it up."""

    checkpoint: Checkpoint
    modules: Mapping[str, str] = field(default_factory=dict)
    """Every module path of the base that owns a tensor, to itself."""

    def tensor(self, name: str) -> TensorInfo:
        """A tensor's entry; `SiteError` where there is none."""
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise SiteError(f"the base has no tensor {name}")
        return info

    def has(self, name: str) -> bool:
        """Whether the base stores this tensor."""
        return name in self.checkpoint.tensors

    @property
    def config(self) -> Mapping[str, Any]:
        """The base's config."""
        return self.checkpoint.config


class Variant(Protocol):
    """One way in which PEFT changes a module."""

    name: str

    def takes(self, site: Site) -> frozenset[str]:
        """The suffixes of this site that the variant accounts for; none where it is not meant."""

    def changes(self, site: Site, module: str, base: Base) -> list[Change]:
        """The changes of a site that it takes something of; `module` is the path as the base spells it."""
