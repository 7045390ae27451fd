"""Records of a merge: what became of every tensor."""

from __future__ import annotations

from typing import ClassVar

from lorasmith.records.base import FileDigest, Finding, Part, Record


class MergedTensor(Part):
    """One tensor of the merged model that an adapter changed."""

    name: str
    formula: str
    """The formula in words, such as `W + s·B·A`."""
    adapter_tensors: list[str]
    scale: float | None = None
    shape: list[int]
    dtype_base: str
    dtype_merged: str
    elements: int
    changed: int
    """Elements whose stored value differs from the base's (after the cast to the merged type)."""
    swallowed: int
    """Elements with a non-zero update that rounding took back to the base's value."""
    exact_redone: int = 0
    """Elements that float64 could not round for certain and that exact arithmetic decided."""
    underflowed: int = 0
    """Elements that became zero or subnormal only by the cast."""
    relative_update: float = 0.0
    """‖ΔW‖₂ / ‖W‖₂ in float64."""


class MergeRecord(Record):
    """`lorasmith_merge.json` in the merged folder."""

    FORMAT: ClassVar[str] = "lorasmith/merge/1"

    lorasmith_version: str
    base_sha256: str
    adapter_sha256: list[str]
    adapter_weights: list[float]
    precision: str
    """`base` (each tensor's own type), `float32`, `bfloat16` or `float16`."""
    rounding: str
    """`nearest`, `dithered` or `calibrated`."""
    seed: int | None = None
    tensors: list[MergedTensor]
    copied: int
    """Tensors taken over byte for byte."""
    cast: int
    """Tensors that only changed their precision."""
    elements_updated: int
    """Elements with a non-zero update."""
    elements_swallowed: int
    swallowed_fraction: float
    """elements_swallowed / elements_updated."""
    untied: bool = False
    files: list[FileDigest]
    """Everything in the merged folder but this record."""
    findings: list[Finding] = []
