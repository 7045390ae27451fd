"""Tensors whose rounding was fitted to calibration rows beforehand, and those for which it could not be."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from lorasmith.merging.lowrank import LowRank
from lorasmith.merging.plan import Output
from lorasmith.merging.rounding import TARGETS, cast
from lorasmith.merging.running import Finish
from lorasmith.merging.tensors import TORCH_TYPES
from lorasmith.records.merging import MergedTensor


@dataclass
class Calibrated:
    """Where the rounded tensors lie, and why others were not calibrated."""

    files: dict[str, Path] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)


class Fitted:
    """A tensor that lies in a file already."""

    def __init__(self, output: Output, plain: LowRank, file: Path) -> None:
        self._output = output
        self._plain = plain
        self._values = load_file(file)[output.name].reshape(-1)
        self._changed = 0

    def piece(self, raw: torch.Tensor, first: int, out: torch.Tensor) -> Finish:
        """The fitted values; the plain merge runs beside it for what it counts and refuses."""
        output, target = self._output, TARGETS[self._output.dtype]
        plain = self._plain.piece(raw, first, torch.empty_like(out))
        stored = raw.view(TORCH_TYPES[output.source.dtype])
        here = self._values[first : first + len(stored)]
        self._changed += int(torch.count_nonzero(here != cast(stored, target)))
        out.copy_(here.view(torch.uint8))
        return plain

    def result(self) -> MergedTensor:
        """The plain merge's counts with what this rounding moved; an element may move without an update."""
        found = self._plain.result()
        updated = found.changed + found.swallowed
        swallowed = max(0, updated - self._changed)
        moved = {
            "changed": self._changed,
            "swallowed": swallowed,
            "rounding": "calibrated",
            "exact_redone": 0,
        }
        return found.model_copy(update=moved)
