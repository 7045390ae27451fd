"""Adapters on stacked experts: one pair of factors holds the low-rank updates of all experts of a layer.

For E experts of rank r PEFT stores A[r·E, in], experts slowest, and B[out, r·E], experts fastest:
Δₑ = s·B[:, e::E]·A[e·r : (e+1)·r]. Whether the stacked parameter is [E, out, in] or [E, in, out] changed
sides in peft 0.19; shapes tell, and where both dimensions are equal, the model's type or the version does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch

from lorasmith.proving.weights import adapter as names
from lorasmith.proving.weights.adapter import Adapter
from lorasmith.proving.weights.model_folder import ProvenTensor
from lorasmith.records.base import Finding

# What each tensor of the right merge is, as a formula over stored numbers; nothing is computed here.
#
# A matrix of the merged model is S + Σ c·L·R: a source S (the base's tensor, or one that the adapter
# brings), and per adapter a low-rank term with an exact factor c, the scaling times the adapter's weight. In
# the letters of the LoRA paper (arXiv 2106.09685, 4.1): W + (α/r)·B·A.


View = Callable[[torch.Tensor], torch.Tensor]


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """The view of a factor that is stored the way it is used."""
    return tensor


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The view of a factor that is used the other way round."""
    return tensor.T


@dataclass(frozen=True)
class Factor:
    """A matrix that a term multiplies with, as a view of a stored tensor."""

    stored: ProvenTensor
    view: View = as_stored

    def load(self) -> torch.Tensor:
        """The matrix, mapped from its file."""
        return self.view(self.stored.whole())


@dataclass(frozen=True)
class Term:
    """c·L·R, added to the rows from `first_row` on. L[rows, r], R[r, columns]."""

    scale: float
    """α/r or α/√r in float64."""
    weight: float
    """The adapter's own factor in a merge of several."""
    left: Factor
    right: Factor | None
    """None for a vector that is added as it is: R is then the number one."""
    first_row: int = 0

    @property
    def factor(self) -> Fraction:
        """c, exactly."""
        return Fraction(self.scale) * Fraction(self.weight)


@dataclass(frozen=True)
class Magnitude:
    """DoRA (arXiv 2402.09353, eq. 5): the sum's rows or columns are scaled to these norms."""

    stored: ProvenTensor
    per_row: bool
    """True where a row of the stored matrix is one output."""


@dataclass
class Expected:
    """One tensor of the right merge."""

    name: str
    dtype: str
    """The type the base stores it in; the merge's precision may ask for another."""
    source: ProvenTensor
    terms: list[Term] = field(default_factory=list)
    magnitude: Magnitude | None = None
    rows: Mapping[int, tuple[ProvenTensor, int]] = field(default_factory=dict)
    """Rows of the matrix that are replaced, each by a row of another tensor."""
    replaced: bool = False
    """True where the source is not the base's tensor."""
    rounding: str = "nearest"
    """What the merge claims: `nearest`, `dithered` or `calibrated`."""
    seed: int | None = None
    """Of a dithered tensor."""

    @property
    def kind(self) -> str:
        """The word for it in the record, as far as it does not depend on the precision."""
        if self.replaced and not self.terms:
            return "replaced"
        return "merged" if self.terms or self.magnitude or self.rows else "copied"


_SWAPPED_SINCE = (0, 19)


@dataclass(frozen=True)
class Slot:
    """Where rows of one expert's matrix are stored."""

    target: Expected
    expert: int
    first_row: int
    """Within the stored tensor's matrix."""
    rows: range
    """Of the expert's own matrix."""


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter of E matrices [high, wide], wherever its parts are stored."""

    name: str
    """As in `target_parameters`."""
    experts: int
    high: int
    wide: int
    slots: tuple[Slot, ...]


def stacks(path: str, expected: Mapping[str, Expected]) -> list[ExpertParameter]:
    """The parameters of a module of experts, stacked on disk or stored one by one."""
    found: list[ExpertParameter] = []
    starts = set(names.spellings(f"{path}."))
    for name, target in expected.items():
        parent, _, leaf = name.rpartition(".")
        if len(target.source.shape) == 3 and f"{parent}." in starts:
            experts, high, wide = target.source.shape
            slots = tuple(Slot(target, e, e * high, range(high)) for e in range(experts))
            found.append(ExpertParameter(leaf, experts, high, wide, slots))
    for parameter, layouts in names.EXPERT_PARTS.items():
        for parts in layouts:
            one_by_one = [names.expert_names(path, part, expected) for part in parts]
            if all(one_by_one) and not any(stack.name == parameter for stack in found):
                found.append(_gather(parameter, one_by_one, expected))
    return found


def _gather(parameter: str, parts: list[dict[int, str]], expected: Mapping[str, Expected]) -> ExpertParameter:
    slots, high, wide, experts = [], 0, 0, len(parts[0])
    for by_expert in parts:
        shape = expected[by_expert[min(by_expert)]].source.shape
        for expert, name in by_expert.items():
            slots.append(Slot(expected[name], expert, 0, range(high, high + shape[0])))
        high, wide = high + shape[0], shape[1]
    return ExpertParameter(parameter, experts, high, wide, tuple(slots))


def place(
    adapter: Adapter,
    path: str,
    pairs: list[tuple[ProvenTensor, ProvenTensor]],
    found: list[ExpertParameter],
    model_type: str,
) -> None:
    """Give each pair (A, B) of a module its stack, innermost wrapper first; all pairs have one or it raises.

    Raises `AdapterError` where a pair fits none, or where two would fit the same.
    """
    free = list(found)
    for a, b in pairs:
        fits = [(stack, turned) for stack in free for turned in _ways(adapter, path, stack, a, b, model_type)]
        if len({stack.name for stack, _ in fits}) != 1 or len(fits) != 1:
            shapes = ", ".join(f"{stack.name}[{stack.experts}, {stack.high}, {stack.wide}]" for stack in free)
            raise adapter.refuse(
                f"{path!r}: lora_A {list(a.shape)} and lora_B {list(b.shape)} fit "
                f"{'none' if not fits else 'more than one'} of its parameters",
                shapes or "a parameter of the base that holds experts",
                "check that this is the base the adapter was trained on",
            )
        stack, turned = fits[0]
        free.remove(stack)
        for slot in stack.slots:
            left, right = _factors(a, b, stack.experts, slot, turned)
            scale = adapter.scale(f"{path}.{stack.name}")
            slot.target.terms.append(Term(scale, adapter.weight, left, right, slot.first_row))


def _ways(
    adapter: Adapter, path: str, stack: ExpertParameter, a: ProvenTensor, b: ProvenTensor, model_type: str
) -> list[bool]:
    """Ways a pair fits: False for Δ = B·A, True for its transpose."""
    total = adapter.rank(f"{path}.{stack.name}") * stack.experts
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != total or b.shape[1] != total:
        return []
    fits = [
        turned
        for turned, (high, wide) in ((False, (b.shape[0], a.shape[1])), (True, (a.shape[1], b.shape[0])))
        if (high, wide) == (stack.high, stack.wide)
    ]
    if len(fits) == 2:
        return [model_type in names.TRANSPOSED_EXPERTS or _version(adapter) < _SWAPPED_SINCE]
    return fits


def _version(adapter: Adapter) -> tuple[int, ...]:
    """peft's version; those before 0.18 did not write it down."""
    text = str(adapter.config.get("peft_version") or "0")
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def _factors(
    a: ProvenTensor, b: ProvenTensor, experts: int, slot: Slot, turned: bool
) -> tuple[Factor, Factor]:
    rank, expert, rows = a.shape[0] // experts, slot.expert, slice(slot.rows.start, slot.rows.stop)

    def of_a(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(experts, rank, -1)[expert]

    def of_b(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1, rank, experts)[:, :, expert]

    left: View
    right: View
    if turned:
        left, right = (lambda tensor: of_a(tensor).T[rows]), (lambda tensor: of_b(tensor).T)
        return Factor(a, left), Factor(b, right)
    left, right = (lambda tensor: of_b(tensor)[rows]), of_a
    return Factor(b, left), Factor(a, right)


# Tied embeddings: where input embedding and output head are one tensor in the base.
#
# PEFT's modules act on the two separately: an update of one leaves the other as the base has it. So the
# right merge of such an adapter has two tensors, and its config says that they are not tied. Where the
# adapter changes both alike (trainable tokens, a resized vocabulary, one tensor saved for both), they may
# stay one.


class Ties:
    """What a base ties, and what the merge must do about it."""

    def __init__(self, expected: dict[str, Expected], config: Mapping[str, Any]) -> None:
        self.expected = expected
        found = [name for name in expected if names.is_embedding(name.removesuffix(".weight"))]
        self.embedding = found[0] if len(found) == 1 else None
        self.rows = expected[self.embedding].source.shape[0] if self.embedding else None
        stored = [name for name in expected if names.is_head(name.removesuffix(".weight"))]
        said = list(flags(config))
        self.tied = bool(self.embedding) and (all(said) if said else not stored)
        self.head: str | None = stored[0] if stored else ("lm_head.weight" if self.tied else None)
        self.stored_head = bool(stored)
        self.alike = True
        """Whether head and embedding of the right merge are the same matrix."""

    def loosen(self) -> None:
        """Give the head of a tied model a formula of its own, so that adapters can change it."""
        if self.tied and self.head and self.embedding and not self._loose():
            embedding = self.expected[self.embedding]
            self.expected[self.head] = Expected(self.head, embedding.dtype, embedding.source)

    def _loose(self) -> bool:
        return self.head in self.expected and not self.stored_head

    def follow(self) -> None:
        """What a tied head takes over from the embedding although the adapter names the embedding only."""
        if not (self.tied and self.head and self.embedding):
            return
        embedding, head = self.expected[self.embedding], self.expected[self.head]
        if head.terms or head.replaced or head.magnitude:
            return
        if embedding.rows:
            self.expected[self.head] = replace(embedding, name=self.head, terms=list(embedding.terms))
        elif embedding.source.shape != head.source.shape:
            self.expected[self.head] = Expected(self.head, head.dtype, embedding.source, replaced=True)

    def settle(self, merged: Mapping[str, ProvenTensor]) -> None:
        """Once all adapters are placed: may the merge leave the two tied, and does it?"""
        if self.tied and self.head and self.embedding:
            embedding = self.expected[self.embedding]
            self.alike = _alike(embedding, self.expected[self.head])
            touched = embedding.terms or embedding.rows or embedding.replaced or not self.alike
            # A head of its own is a tensor too many where the adapter gave no reason to write one.
            if not self.stored_head and self.alike and not (touched and self.head in merged):
                del self.expected[self.head]

    def check(self, config: Mapping[str, Any], merged: Mapping[str, ProvenTensor]) -> Iterator[Finding]:
        """Does the merged config tie what must be tied, and nothing else?"""
        said = list(flags(config))
        rows = self.expected[self.embedding].source.shape[0] if self.embedding else None
        if rows != self.rows and config.get("vocab_size", rows) != rows:
            yield Finding(
                severity="error",
                code="wrong-vocabulary",
                message=f"vocab_size is {config['vocab_size']!r}",
                where="config.json",
                expected=str(rows),
            )
        if self.tied and self.alike:
            if self.head not in merged and said and not all(said):
                yield _finding("the config does not tie the head, but there is none", "true")
        elif (self.tied and not all(not flag for flag in said)) or (self.tied and not said):
            yield _finding("the config ties head and embedding, which the adapter made different", "false")
        elif not self.tied and self.head and self.embedding and any(said):
            yield _finding("the config ties head and embedding, which the base does not", "false")


def flags(config: Mapping[str, Any]) -> Iterator[bool]:
    """Each `tie_word_embeddings` of a config: its own and its text model's."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            yield bool(part["tie_word_embeddings"])


def _alike(one: Expected, other: Expected) -> bool:
    if one.source.shape != other.source.shape or one.rows != other.rows or one.magnitude or other.magnitude:
        return False
    if one.terms or other.terms:
        return one.source == other.source and one.terms == other.terms
    return one.source == other.source or torch.equal(one.source.rows(), other.source.rows())


def _finding(message: str, expected: str) -> Finding:
    return Finding(
        severity="error",
        code="wrong-tie",
        message=message,
        where="config.json",
        expected=f'"tie_word_embeddings": {expected}',
    )
