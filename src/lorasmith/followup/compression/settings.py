"""What a caller of `compress` may choose, and what goes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lorasmith
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.errors import InputError, UsageError
from lorasmith.files.atomic import read_record
from lorasmith.files.digests import describe, digest_folder, folder_files
from lorasmith.followup.compression.sizes import Shape, parse_size, written_bytes
from lorasmith.options import CompressOptions, FormatOptions, QualityOptions
from lorasmith.records.base import FileDigest
from lorasmith.records.compression import CompressRecord

ACCURACY_DROP = 0.05
"""Where the benchmarks' questions were answered: accuracy lost over all of them at most. Chosen as well."""


@dataclass(frozen=True)
class CompressSettings:
    """One way to compress a model: what decides the result, apart from the model and the calibration rows."""

    method: str
    format: str
    bits: int
    group_size: int | None
    """None: the largest of 128, 64 and 32 that divides every width."""
    iterations: int
    """Steps for each block; only where it is calibrated."""
    calibration_rows: int
    calibration_length: int
    """Tokens of a row."""
    seed: int

    @property
    def name(self) -> str:
        """A folder's name: `compressed-tensors-rtn`, `compressed-tensors-8bit-rtn`, `q4_0-calibrated`."""
        kind = self.format.removeprefix("gguf:")
        bits = f"-{self.bits}bit" if self.format == "compressed-tensors" and self.bits != 4 else ""
        return f"{kind}{bits}-{self.method}"

    @staticmethod
    def own_bits(form: str) -> int:
        """The bits of a GGUF type stand in its name; 4 for every other format."""
        return int(form[len("gguf:q")]) if form.startswith("gguf:") else 4

    def check(self) -> None:
        """Raise `UsageError` for bits or groups that the format does not have."""
        if self.format == "compressed-tensors":
            if self.bits not in (4, 8):
                raise UsageError(f"compressed-tensors are not written in {self.bits} bits", expected="4 or 8")
        elif self.bits != (own := self.own_bits(self.format)):
            raise UsageError(f"{self.format} has {own} bits, not {self.bits}", remedy=f"give --bits {own}")
        elif self.group_size is not None:
            raise UsageError(f"{self.format} has its own groups", remedy="leave out --group-size")


def every_way(options: FormatOptions, seed: int) -> list[CompressSettings]:
    """Every combination, formats first; `bits` and `group_size` are those of compressed-tensors.

    A GGUF type has bits and groups of its own, so that it stands once for all `bits`; where nothing else is
    asked for, bits and groups are passed on to be refused. Raises `UsageError` for a value that cannot be and
    for two ways that are the same.
    """
    ways = []
    for form in options.format:
        choice = form == "compressed-tensors" or "compressed-tensors" not in options.format
        for bits in options.bits if choice and options.bits else [CompressSettings.own_bits(form)]:
            for method in options.method:
                way = CompressSettings(
                    method=method,
                    format=form,
                    bits=bits,
                    group_size=options.group_size if choice else None,
                    iterations=options.iterations,
                    calibration_rows=options.calibration_rows,
                    calibration_length=options.calibration_length,
                    seed=seed,
                )
                way.check()
                ways.append(way)
    check_different(ways)
    return ways


def single_way(options: CompressOptions) -> CompressSettings:
    """The way that is asked for; raises `UsageError` where there are several."""
    ways = every_way(options, options.seed)
    if len(ways) > 1:
        names = ", ".join(way.name for way in ways)
        raise UsageError(f"{len(ways)} ways are asked for: {names}", expected="one format and one method")
    return ways[0]


def only_way(options: CompressOptions, way: CompressSettings) -> CompressOptions:
    """The options with one of their ways alone."""
    one = {
        "format": (way.format,),
        "method": (way.method,),
        "bits": (way.bits,),
        "group_size": way.group_size,
    }
    return options.model_copy(update=one)


def check_different(ways: Sequence[CompressSettings]) -> None:
    """Raise `UsageError` where there is no way, or two of them would be written to one folder."""
    names = [way.name for way in ways]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled or not ways:
        raise UsageError(
            f"{doubled[0]} is asked for more than once" if doubled else "no format is asked for",
            expected="each format and method once",
        )


def limits_of(options: QualityOptions) -> dict[str, float]:
    """The gates on the quality by their names; raises `UsageError` for a target that is no size."""
    asked = {
        "perplexity_ratio": options.max_perplexity_ratio,
        "mean_kl": options.max_mean_kl,
        "top1_agreement": options.min_top1,
        "accuracy_drop": options.max_accuracy_drop,
        "q99_kl": options.max_q99_kl,
        "bytes": None if options.target_size is None else parse_size(options.target_size),
    }
    return {name: value for name, value in asked.items() if value is not None}


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
