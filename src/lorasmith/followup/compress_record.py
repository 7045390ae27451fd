"""What identifies a compressed folder, what lies in it, and whether it is a finished one."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lorasmith
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.errors import InputError
from lorasmith.files.atomic import read_record
from lorasmith.files.digests import describe, digest_folder, folder_files
from lorasmith.followup.compress_settings import CompressSettings
from lorasmith.followup.sizes import Shape
from lorasmith.followup.sizes_plan import written_bytes
from lorasmith.records.base import FileDigest
from lorasmith.records.compression import CompressRecord

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
    found = read_record(output / RECORD, CompressRecord)
    if any(getattr(found, name) != getattr(wanted, name) for name in _IDENTITY):
        return None
    return found if files_of(output) == found.files else None


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
