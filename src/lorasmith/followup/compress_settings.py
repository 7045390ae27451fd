"""What a caller of `compress` may choose, and what goes together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lorasmith.errors import UsageError
from lorasmith.followup.sizes import GGUF_TYPES

METHODS = ("rtn", "calibrated")
FORMATS = ("compressed-tensors", *(f"gguf:{name}" for name in GGUF_TYPES))

LIMITS: Mapping[str, float] = {"perplexity_ratio": 1.05, "mean_kl": 0.05, "top1_agreement": 0.9}
"""What a compressed model may lose: 5 % of perplexity, 0.05 nats a token, one choice in ten. Chosen, not
measured: how much is too much depends on the use, so each can be set."""

ACCURACY_DROP = 0.05
"""Where the benchmarks' questions were answered: accuracy lost over all of them at most. Chosen as well."""

OPTIONAL = ("bytes", "q99_kl", "accuracy_drop")
"""Further limits: the size of the weight files, the 99 % quantile of the KL in nats, accuracy lost (0..1)."""


@dataclass(frozen=True)
class CompressSettings:
    """What decides the compressed model, apart from the model and the calibration rows."""

    method: str = "rtn"
    format: str = "compressed-tensors"
    bits: int = 4
    group_size: int | None = None
    """None: the largest of 128, 64 and 32 that divides every width."""
    iterations: int = 200
    """Steps for each block; only where it is calibrated."""
    calibration_rows: int = 128
    calibration_length: int = 512
    """Tokens of a row."""
    seed: int = 42

    @property
    def name(self) -> str:
        """For a folder: `compressed-tensors-rtn`, `compressed-tensors-8bit-rtn`, `q4_0-calibrated`."""
        kind = self.format.removeprefix("gguf:")
        bits = f"-{self.bits}bit" if self.format == "compressed-tensors" and self.bits != 4 else ""
        return f"{kind}{bits}-{self.method}"

    @staticmethod
    def own_bits(form: str) -> int:
        """The bits of a GGUF type stand in its name; 4 for every other format."""
        return int(form[len("gguf:q")]) if form in FORMATS and form.startswith("gguf:") else 4

    def check(self) -> None:
        """Raise `UsageError` for a value that cannot be."""
        if self.method not in METHODS:
            raise UsageError(f"there is no method {self.method!r}", expected=" | ".join(METHODS))
        if self.format not in FORMATS:
            raise UsageError(f"there is no format {self.format!r}", expected=" | ".join(FORMATS))
        for name in ("iterations", "calibration_rows", "calibration_length"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} is {getattr(self, name)}", expected="at least 1")
        if self.format == "compressed-tensors":
            if self.bits not in (4, 8):
                raise UsageError(f"compressed-tensors are not written in {self.bits} bits", expected="4 or 8")
        elif self.bits != (own := self.own_bits(self.format)):
            raise UsageError(f"{self.format} has {own} bits, not {self.bits}", remedy=f"give --bits {own}")
        elif self.group_size is not None:
            raise UsageError(f"{self.format} has its own groups", remedy="leave out --group-size")


def resolve_limits(given: Mapping[str, float] | None) -> dict[str, float]:
    """The defaults with the caller's in place; raises `UsageError` for an unknown name or a wrong number."""
    known = (*LIMITS, *OPTIONAL)
    for name, value in (given or {}).items():
        if name not in known:
            raise UsageError(f"there is no limit {name!r}", expected=" | ".join(known))
        if not 0 <= value < math.inf:
            raise UsageError(f"the limit {name} is {value}", expected="a number, 0 or more")
    return {**LIMITS, **(given or {})}
