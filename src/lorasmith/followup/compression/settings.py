"""What a caller of `compress` may choose, and what goes together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lorasmith
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.errors import InputError, UsageError
from lorasmith.files.atomic import StrPath, read_record
from lorasmith.files.digests import describe, digest_folder, folder_files
from lorasmith.followup.compression.sizes import GGUF_TYPES, Shape, written_bytes
from lorasmith.records.base import FileDigest
from lorasmith.records.compression import CompressRecord

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
        """A folder's name: `compressed-tensors-rtn`, `compressed-tensors-8bit-rtn`, `q4_0-calibrated`."""
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
    ways = []
    for form in formats:
        choice = form == "compressed-tensors" or "compressed-tensors" not in formats
        for count in bits if choice and bits else [CompressSettings.own_bits(form)]:
            for method in methods:
                group = group_size if choice else None
                way = CompressSettings(method=method, format=form, bits=count, group_size=group, **shared)
                way.check()
                ways.append(way)
    check_different(ways)
    return ways


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


# What identifies a compressed folder, what lies in it, and whether it is a finished one.


RECORD = "lorasmith_compress.json"

_IDENTITY = ("versions", "model_sha256", "file_format", "method", "settings", "calibration")
"""Fields that decide the bytes of the folder."""


def planned_record(
    source: Checkpoint, shapes: list[Shape], chosen: CompressSettings, calibration: Path | None
) -> CompressRecord:
    """The record before anything is done: what identifies the output, and the plan.

    Raises `InputError` where a library is missing.
    """
    used = asdict(chosen)
    if chosen.method == "rtn":
        for name in ("iterations", "calibration_rows", "calibration_length"):
            del used[name]
        calibration = None
    return CompressRecord(
        lorasmith_version=lorasmith.__version__,
        versions={name: _version(name) for name in ("auto-round", "torch", "transformers")},
        model_sha256=digest_folder(source.folder),
        file_format=chosen.format,
        method=chosen.method,
        bits=chosen.bits,
        group_size=chosen.group_size or 32,
        settings=used,
        calibration=describe([calibration], calibration.parent)[0] if calibration else None,
        parameters=sum(shape.elements for shape in shapes),
        original_bytes=sum(shard.size for shard in source.shards),
        bytes=0,
        planned_bytes=written_bytes(shapes, source.tied, chosen.format, chosen.bits, chosen.group_size or 32),
        bits_per_weight=0.0,
        files=[],
    )


def finished(output: Path, wanted: CompressRecord) -> CompressRecord | None:
    """The record of an output made of the same inputs in the same way, whose files are as it says."""
    if not (output / RECORD).is_file():
        return None
    record = read_record(output / RECORD, CompressRecord)
    if any(getattr(record, name) != getattr(wanted, name) for name in _IDENTITY):
        return None
    return record if files_of(output) == record.files else None


def files_of(folder: Path) -> list[FileDigest]:
    """Everything in the folder but the record itself."""
    return describe([file for file in folder_files(folder) if file.name != RECORD], folder)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError as error:
        raise InputError(
            f"compression needs {name}, which is not installed", remedy="pip install 'lorasmith[compress]'"
        ) from error
