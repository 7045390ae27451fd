"""Drop repeated questions of a benchmark before sampling, and find questions that two benchmarks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorasmith.benchmarks.base import SourceRow
from lorasmith.benchmarks.discover import Candidate, reject
from lorasmith.records.base import Finding
from lorasmith.records.dataset import RejectedRow
from lorasmith.testset.normalise import normalise, tokens
from lorasmith.testset.similarity import repeats, shingles

_SHINGLE = 3
_NEARLY = 0.9
"""Jaccard similarity of runs of three words and signs. One number changed in a problem of 60 words gives
0.90, in a shorter one less: those are other questions and stay."""
_TELLING_WORDS = 8
"""Shorter questions ("Which of the following is true?") stand in several benchmarks by chance."""

Keyed = tuple[bytes, Candidate]


def within_benchmark(
    name: str, keyed: Sequence[Keyed]
) -> tuple[list[Keyed], list[Finding], list[RejectedRow]]:
    """Keep the first of each question in the order given; returns kept rows, findings, rejected rows.

    Two different questions under one record id are an error: one of them is not what it says.
    """
    kept: list[Keyed] = []
    findings: list[Finding] = []
    rejected: list[RejectedRow] = []
    questions: set[tuple[str, str]] = set()
    ids: dict[str, SourceRow] = {}
    repeated = 0
    for key, candidate in keyed:
        item, row = candidate.item, candidate.row
        question = (item.scope, normalise(item.question))
        if question in questions:
            repeated += 1
            rejected.append(reject(name, row, "the same question stands in another row"))
        elif item.record_id in ids:
            other = ids[item.record_id]
            rejected.append(reject(name, row, "another question has the same id"))
            findings.append(
                Finding(
                    severity="error",
                    code="duplicate-id",
                    message=f"two different rows of {name} have the id {item.record_id!r}",
                    where=f"{row.file}:{row.number}",
                    expected=f"each id once (also {other.file}:{other.number})",
                    remedy="replace the file with the published one",
                )
            )
        else:
            questions.add(question)
            ids[item.record_id] = row
            kept.append((key, candidate))
    kept, near = _without_near(name, kept)
    if repeated or near:
        message = f"{repeated} repeated and {len(near)} nearly repeated questions of {name} were dropped"
        findings.append(Finding(severity="note", code="duplicates-dropped", message=message))
    return kept, findings, rejected + near


def _without_near(name: str, keyed: Sequence[Keyed]) -> tuple[list[Keyed], list[RejectedRow]]:
    items = [candidate.item for _, candidate in keyed]
    flags = repeats(
        [shingles(tokens(item.question), _SHINGLE) for item in items],
        [item.scope for item in items],
        _NEARLY,
    )
    reason = "nearly the same question stands in another row"
    kept = [pair for pair, repeated in zip(keyed, flags, strict=True) if not repeated]
    dropped = [pair[1].row for pair, repeated in zip(keyed, flags, strict=True) if repeated]
    return kept, [reject(name, row, reason) for row in dropped]


def across_benchmarks(candidates: Mapping[str, Sequence[Candidate]]) -> list[Finding]:
    """One error for each pair of benchmarks that hold the same question: one file is not what it says."""
    seen: dict[str, tuple[str, SourceRow]] = {}
    shared: dict[tuple[str, str], list[tuple[SourceRow, SourceRow]]] = {}
    for name in sorted(candidates):
        for candidate in candidates[name]:
            question = normalise(candidate.item.question)
            if question.count(" ") + 1 < _TELLING_WORDS:
                continue
            other, row = seen.setdefault(question, (name, candidate.row))
            if other != name:
                shared.setdefault((other, name), []).append((row, candidate.row))
    return [
        Finding(
            severity="error",
            code="same-question",
            message=f"{len(rows)} questions stand under both {first} and {second}",
            where=f"{rows[0][0].file}:{rows[0][0].number} and {rows[0][1].file}:{rows[0][1].number}",
            expected="each question under one benchmark",
            remedy="replace the wrong file with the published one",
        )
        for (first, second), rows in sorted(shared.items())
    ]
