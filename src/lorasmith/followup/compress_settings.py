"""What a caller of `compress` may choose, and what goes together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorasmith.errors import UsageError
from lorasmith.files.paths import StrPath
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


@dataclass(frozen=True)
class CompressOptions:
    """What a caller may choose beside the settings: files, and how the quality is measured and judged."""

    calibration: StrPath | None = None
    """JSONL with prompts and responses, local; needed by the calibrated method."""
    test_set: StrPath | None = None
    """JSONL on which the quality is measured; nothing is measured without."""
    tasks: bool = True
    """Whether the benchmarks' questions of the test set are put as well."""
    limit: int | None = None
    """Only the first rows of the test set."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Gates in place of some of `LIMITS` or beside them: `perplexity_ratio`, `mean_kl` and `q99_kl` (nats),
    `top1_agreement`, `accuracy_drop` (0..1), `bytes`."""
    device: str = "auto"
    work: StrPath | None = None
    """Folder in which measuring goes on after a kill, and which several ways share. None: a hidden one beside
    the output, which is removed at the end."""

    def check(self) -> None:
        """Raise `UsageError` for a value that cannot be."""
        resolve_limits(self.limits)
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit is {self.limit}", expected="1 or more")


def every_way(
    formats: Sequence[str],
    methods: Sequence[str],
    bits: Sequence[int],
    group_size: int | None,
    **shared: int,
) -> list[CompressSettings]:
    """Every combination, formats first; `bits` and `group_size` are those of compressed-tensors.

    A GGUF type has bits and groups of its own, so that it stands once for all `bits`; where nothing else is
    asked for, bits and groups are passed on to be refused. Raises `UsageError` for a value that cannot be and
    for two ways that are the same.
    """
    found = []
    for form in formats:
        choice = form == "compressed-tensors" or "compressed-tensors" not in formats
        for count in bits if choice and bits else [CompressSettings.own_bits(form)]:
            for method in methods:
                group = group_size if choice else None
                way = CompressSettings(method=method, format=form, bits=count, group_size=group, **shared)
                way.check()
                found.append(way)
    check_different(found)
    return found


def check_different(ways: Sequence[CompressSettings]) -> None:
    """Raise `UsageError` where there is no way, or two of them would be written to one folder."""
    names = [way.name for way in ways]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled or not ways:
        raise UsageError(
            f"{doubled[0]} is asked for more than once" if doubled else "no format is asked for",
            expected="each format and method once",
        )


def resolve_limits(given: Mapping[str, float] | None) -> dict[str, float]:
    """The defaults with the caller's in place; raises `UsageError` for an unknown name or a wrong number."""
    known = (*LIMITS, *OPTIONAL)
    for name, value in (given or {}).items():
        if name not in known:
            raise UsageError(f"there is no limit {name!r}", expected=" | ".join(known))
        if not 0 <= value < math.inf:
            raise UsageError(f"the limit {name} is {value}", expected="a number, 0 or more")
    return {**LIMITS, **(given or {})}
