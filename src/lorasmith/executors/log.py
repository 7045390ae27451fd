"""What computed each chunk of one piece of work, and whether that was everywhere the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lorasmith.errors import os_errors
from lorasmith.files.atomic import write_bytes
from lorasmith.files.journal import Journal, Rows
from lorasmith.records.base import Finding
from lorasmith.records.conditions import ChunkRecord, Conditions


class ChunkLog:
    """Chunks with their conditions, those of an interrupted command as its journal tells them."""

    def __init__(self, part: str = "") -> None:
        """`part` names the piece of work where a result has several."""
        self._part = part
        self._by: dict[tuple[str, Rows], Conditions] = {}

    def note(self, rows: Rows, conditions: Conditions) -> None:
        """A chunk was computed under these conditions."""
        self._by[self._part, rows] = conditions

    def of(self, rows: Rows) -> Conditions:
        """What a chunk was computed under."""
        return self._by[self._part, rows]

    def note_kept(self, rows: Rows, journal: Journal) -> None:
        """A chunk came out of the journal."""
        made_by = journal.made_by(rows)
        if made_by is not None:
            self.note(rows, Conditions.model_validate(made_by))

    def part(self, name: str) -> ChunkLog:
        """The log of one part of the work; what it hears stands here as well."""
        log = ChunkLog(name)
        log._by = self._by
        return log

    def kinds(self) -> dict[str, int]:
        """Each kind of conditions, as a line for a person → how many chunks."""
        return dict(sorted(Counter(conditions.label for conditions in self._by.values()).items()))

    def findings(self) -> list[Finding]:
        """`mixed-hardware` where the chunks were not all computed under equal conditions."""
        kinds = self.kinds()
        if len(kinds) < 2:
            return []
        told = " | ".join(f"{count} on {label}" for label, count in kinds.items())
        finding = Finding(
            severity="note",
            code="mixed-hardware",
            message="mixed hardware: the chunks of this result were computed under several conditions, which "
            f"may differ in the last digits: {told}",
            remedy="for the same bytes each time, give all workers one kind of hardware and one image",
        )
        return [finding]

    def write(self, path: Path, *, wanted: bool, keys: Sequence[str] | None = None) -> None:
        """One line for each chunk, by their rows; no file where that is not wanted and nothing is mixed.

        `keys`: what names each row of the data, to be written as well.
        """
        if not wanted and len(self.kinds()) < 2:
            with os_errors(path, "remove"):
                path.unlink(missing_ok=True)
            return
        lines = (
            ChunkRecord(
                part=part,
                rows=list(rows),
                keys=None if keys is None else [keys[row] for row in rows],
                conditions=conditions,
            ).model_dump(mode="json", exclude_none=True)
            for (part, rows), conditions in sorted(self._by.items(), key=lambda item: item[0])
        )
        write_bytes(path, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
