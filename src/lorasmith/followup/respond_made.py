"""What computed each answer, from the first command of an extraction to the last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic import ValidationError

from lorasmith.errors import DataError
from lorasmith.executors.log import ChunkLog
from lorasmith.files.jsonl import read_rows
from lorasmith.followup.respond_engines import Made
from lorasmith.followup.respond_output import Places
from lorasmith.followup.respond_store import Origin
from lorasmith.records.conditions import ChunkRecord


def earlier_origins(places: Places) -> dict[str, Origin]:
    """Of a finished output's answers by key, as far as its chunks tell."""
    if not places.chunks.exists():
        return {}
    found = {}
    for number, line in read_rows(places.chunks):
        try:
            chunk = ChunkRecord.model_validate(line)
        except ValidationError as error:
            raise DataError(
                f"line {number} tells of no chunk",
                where=places.chunks,
                expected="the file as it was written",
                remedy="remove it; what is made from now on is told of",
            ) from error
        for key in chunk.keys or ():
            found[key] = Origin(f"earlier {number}", chunk.conditions)
    return found


def origin_of(made: Made | None, keys: Sequence[str]) -> Origin | None:
    """What an engine tells, with the rows' keys in place of their numbers."""
    if made is None:
        return None
    return Origin(keys[made.rows[0]] if made.rows else "", made.conditions)


def chunk_log(keys: Sequence[str], finished: Iterable[str], origins: Mapping[str, Origin]) -> ChunkLog:
    """The answers with these keys as chunks of rows of the data, whose keys are `keys`."""
    wanted = set(finished)
    chunks: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(keys):
        if key in wanted and (origin := origins.get(key)):
            chunks.setdefault((origin.group, origin.conditions.model_dump_json()), []).append(row)
    log = ChunkLog()
    for rows in chunks.values():
        log.note(tuple(rows), origins[keys[rows[0]]].conditions)
    return log
