"""The records of the steps after the release, as far as a run has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorasmith.files.atomic import read_record
from lorasmith.records.base import Finding, Record
from lorasmith.records.compression import CompressRecord
from lorasmith.records.draft import DraftRecord
from lorasmith.records.followup import (
    RespondRecord,
    RespondTiming,
    SpeculationRecord,
    SpeculationTiming,
)

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class FollowupRecords:
    """What was made of the merged model; None for a step that was not asked for."""

    responses: RespondRecord | None = None
    responses_speed: RespondTiming | None = None
    draft: DraftRecord | None = None
    speculation: SpeculationRecord | None = None
    speculation_speed: SpeculationTiming | None = None
    """Speeds are None where timings are not shown, too."""
    compressed: tuple[CompressRecord, ...] = ()
    """From the largest to the smallest."""

    def __bool__(self) -> bool:
        return any((self.responses, self.draft, self.speculation, self.compressed))

    def findings(self) -> dict[str, list[Finding]]:
        """Name of a step → what there is to know of it."""
        named = {
            "responses": self.responses,
            "draft model": self.draft,
            "speculative decoding": self.speculation,
            **{f"{record.kind}, {record.method}": record for record in self.compressed},
        }
        return {name: record.findings for name, record in named.items() if record is not None}


def load_followup(run: Path, *, timings: bool) -> FollowupRecords:
    """Read what is there. Raises `InputError` for a damaged record."""
    folder = run / "followup"
    compressed = [
        read_record(path, CompressRecord) for path in folder.glob("compressed/*/lorasmith_compress.json")
    ]
    return FollowupRecords(
        responses=_read(folder / "responses" / "responses.json", RespondRecord),
        responses_speed=_read(folder / "responses.timing.json", RespondTiming) if timings else None,
        draft=_read(folder / "draft" / "lorasmith_draft.json", DraftRecord),
        speculation=_read(folder / "speculation.json", SpeculationRecord),
        speculation_speed=_read(folder / "speculation.timing.json", SpeculationTiming) if timings else None,
        compressed=tuple(sorted(compressed, key=lambda record: (-record.bytes, record.kind, record.method))),
    )


def _read(path: Path, kind: type[R]) -> R | None:
    return read_record(path, kind) if path.is_file() else None
