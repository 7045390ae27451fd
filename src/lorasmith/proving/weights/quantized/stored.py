"""What a decoder finds: a weight, the tensors that make it, and how to read its elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from lorasmith.errors import CheckpointError
from lorasmith.proving.weights.model_folder import ProvenTensor

_STEP = 1 << 16
"""Elements decoded together: the arrays of a step stay near a core, and memory small."""


@dataclass(frozen=True)
class Elements:
    """Some elements of a weight, all [n]: level[code] · scale / divisor + shift."""

    code: torch.Tensor
    """int64."""
    scale: torch.Tensor
    """float64."""
    shift: torch.Tensor | None = None


@dataclass(frozen=True)
class Found:
    """One quantized weight of the base."""

    name: str
    shape: tuple[int, ...]
    format: str
    codes: ProvenTensor
    """The tensor in whose place the weight stands."""
    levels: torch.Tensor
    """What each code stands for before its scale, float64; NaN for a code that is no number."""
    read: Callable[[int, int], Elements]
    """Some elements, from the first on, counted through the whole weight."""
    used: tuple[str, ...]
    """Names of all stored tensors that belong to it."""
    divisor: int = 1
    block: tuple[int, int, int] | None = None
    """Where codes and scales share a tensor: bytes of a block, where its codes begin, where they end."""

    def values(self, elements: Elements, levels: torch.Tensor) -> torch.Tensor:
        """The numbers that levels stand for in the place of these elements."""
        values = levels * elements.scale
        if self.divisor != 1:
            values = values / self.divisor
        return values if elements.shift is None else values + elements.shift

    def decode(self, first: int, count: int) -> torch.Tensor:
        """The values of some elements in float64."""
        values = torch.empty(count, dtype=torch.float64)
        for start in range(0, count, _STEP):
            part = min(_STEP, count - start)
            values[start : start + part] = self.numbers(self.read(first + start, part))
        return values

    def numbers(self, elements: Elements) -> torch.Tensor:
        """The numbers of elements by their own codes; raises `CheckpointError` for what is not finite."""
        values = self.values(elements, self.levels[elements.code])
        if not bool(values.isfinite().all()):
            raise CheckpointError(
                f"the weight {self.name!r} is not finite", where=self.codes.file, expected="finite weights"
            )
        return values

    @cached_property
    def points(self) -> torch.Tensor:
        """The levels in ascending order, each once."""
        return self.levels[self.levels.isfinite()].unique()


@lru_cache(maxsize=8)
def kept(stored: ProvenTensor, first: int = 0, count: int | None = None) -> torch.Tensor:
    """A whole tensor, or some elements of it flat, for formats that lie across the rows of the model.

    All parts of a weight need it; its file is of this proof, so that nothing older is kept.
    """
    return stored.whole() if count is None else stored.flat(first, count)


def companion(tensors: Mapping[str, ProvenTensor], name: str, weight: str) -> ProvenTensor:
    """A tensor that a weight cannot be read without."""
    if name not in tensors:
        raise CheckpointError(
            f"the quantized weight {weight!r} lacks {name!r}", expected="all tensors that its format stores"
        )
    return tensors[name]


def nibble(codes: ProvenTensor, element: torch.Tensor, *, high_first: bool) -> torch.Tensor:
    """Codes of four bits, two a byte, of elements that follow each other."""
    begin = int(element[0]) // 2
    byte = codes.flat(begin, int(element[-1]) // 2 - begin + 1)[element // 2 - begin].long()
    first = (element % 2 == 0) == high_first
    return torch.where(first, byte // 16, byte % 16)
