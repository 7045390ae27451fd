"""The target's responses as rows to learn from: tokens, stored probabilities, a difficulty label.

What a row is stands at `records.followup.RespondRecord`: the JSONL, and beside it `NAME.logprobs.parquet`
with the tokens as the target wrote them and its K likeliest tokens at each place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorasmith.errors import DataError, UsageError
from lorasmith.files.atomic import read_record
from lorasmith.files.jsonl import read_rows
from lorasmith.models.text import Frame, Manner, encode_example, frame, prompt_tokens, response_tokens
from lorasmith.records.base import Finding
from lorasmith.records.dataset import Example
from lorasmith.records.followup import RespondRecord

UNLABELLED = "unknown"
"""Difficulty of a row that has none."""


@dataclass(frozen=True)
class DraftRow:
    """One response. n tokens, K likeliest tokens of the target at each of them."""

    id: str
    ids: list[int]
    """Prompt and response."""
    n_prompt: int
    top_ids: npt.NDArray[np.int64] | None
    """[n, K]"""
    top_logprobs: npt.NDArray[np.float32] | None
    """[n, K], in nats, at temperature 1."""
    confidence: float | None
    """The target's mean log-probability of its own response."""
    difficulty: str
    label: int = -1
    """Index into the labels; −1 where there is none."""

    @property
    def scored(self) -> int:
        """Response tokens."""
        return len(self.ids) - self.n_prompt


def logprobs_beside(responses: Path) -> Path:
    """Where the stored probabilities of a responses file lie."""
    return responses.with_name(f"{responses.name.removesuffix('.jsonl')}.logprobs.parquet")


def record_beside(responses: Path) -> RespondRecord | None:
    """What `lorasmith respond` says of the file; None for a file from elsewhere."""
    path = responses.with_name(f"{responses.name.removesuffix('.jsonl')}.json")
    return read_record(path, RespondRecord) if path.is_file() else None


def read_responses(
    responses: Path, tokenizer: Any, *, max_length: int
) -> tuple[list[DraftRow], list[Finding]]:
    """The rows of a responses file, with stored probabilities where the file beside it has them.

    Rows beyond `max_length` tokens lose the end of their response; a row whose prompt fills it is left out.
    Both are counted in the findings.
    Raises `DataError` for a file without usable rows, and for stored rows that are not of these responses.
    """
    made_by = record_beside(responses)
    stored = _stored(logprobs_beside(responses))
    if made_by is not None and made_by.settings.system is not None and not stored:
        raise DataError(
            "the responses were written under a system prompt, and their tokens are not stored",
            where=responses,
            remedy="extract them with --top-logprobs, which stores the tokens",
        )
    template = "auto" if made_by is None else made_by.settings.template
    around = frame(tokenizer, template, end_of_turn=True)
    rows = []
    cut = left_out = 0
    for number, row in read_rows(responses):
        where = f"{responses}:{number}"
        if stored and row.get("key") not in stored:
            raise DataError(
                "this response has no stored probabilities, others have",
                where=where,
                expected=f"its key in {logprobs_beside(responses).name}",
                remedy="extract the responses again, or move the Parquet file away to train without it",
            )
        made = _from_stored(row, stored[row["key"]]) if stored else _encode(row, tokenizer, around, where)
        if made.n_prompt < max_length and made.scored:
            cut += len(made.ids) > max_length
            rows.append(_cut(made, max_length))
        else:
            left_out += 1
    if len(rows) < 3:
        raise DataError(
            f"the file has {len(rows)} usable responses",
            where=responses,
            expected="at least three: to train on, to decide when to stop, and to report on",
        )
    return rows, _lengths(cut, left_out, len(rows), max_length, responses)


def _lengths(cut: int, left_out: int, kept: int, max_length: int, responses: Path) -> list[Finding]:
    """What `max_length` took away."""
    told = (
        ("cut", cut, f"{cut} of {kept} responses were cut to {max_length:,} tokens"),
        ("left-out", left_out, f"{left_out} rows were left out: no response within {max_length:,} tokens"),
    )
    return [
        Finding(
            severity="warning", code=code, message=message, where=responses.name, remedy="raise --max-length"
        )
        for code, count, message in told
        if count
    ]


def _stored(path: Path) -> dict[str, dict[str, Any]]:
    """The Parquet file's rows by key; empty where there is no file."""
    if not path.is_file():
        return {}
    import pyarrow.parquet as pq

    rows = {}
    with pq.ParquetFile(path) as source:
        for batch in source.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                rows[row["key"]] = row
    return rows


def _from_stored(row: dict[str, Any], stored: dict[str, Any]) -> DraftRow:
    tops = stored["top_tokens"]
    has_tops = bool(tops) and bool(tops[0])
    return DraftRow(
        id=str(row.get("id", stored["key"])),
        ids=[*stored["prompt"], *stored["tokens"]],
        n_prompt=len(stored["prompt"]),
        top_ids=np.array(tops, dtype=np.int64) if has_tops else None,
        top_logprobs=np.array(stored["top_logprobs"], dtype=np.float32) if has_tops else None,
        confidence=float(np.mean(stored["logprobs"])) if stored["logprobs"] else None,
        difficulty=_difficulty(row),
    )


def _encode(row: dict[str, Any], tokenizer: Any, around: Frame, where: str) -> DraftRow:
    prompt, response = row.get("prompt"), row.get("response")
    if not isinstance(prompt, str) or not isinstance(response, str) or not prompt.strip():
        raise DataError(
            "the row has no prompt and response",
            where=where,
            expected='{"prompt": …, "response": …} as `lorasmith respond` writes it',
            remedy="conversations need their tokens: extract them with --top-logprobs",
        )
    if row.get("finish_reason", "stop") == "stop" and response.strip():
        example = Example.model_validate(
            {"id": "row", "prompt": prompt, "response": response, "metadata": {"source": "responses"}}
        )
        encoded = encode_example(example, tokenizer, Manner(around))
        ids, n_prompt = encoded.ids, encoded.n_prompt
    else:  # cut off: it does not end with the token that ends a turn
        before = prompt_tokens(tokenizer, prompt, around)
        ids, n_prompt = [*before, *response_tokens(tokenizer, response, around)], len(before)
    return DraftRow(str(row.get("id", where)), ids, n_prompt, None, None, None, _difficulty(row))


def _difficulty(row: dict[str, Any]) -> str:
    metadata = row.get("metadata")
    return str((metadata if isinstance(metadata, dict) else {}).get("difficulty", UNLABELLED))


def _cut(row: DraftRow, max_length: int) -> DraftRow:
    keep = max_length - row.n_prompt
    if row.scored <= keep:
        return row
    return replace(
        row,
        ids=row.ids[:max_length],
        top_ids=None if row.top_ids is None else row.top_ids[:keep],
        top_logprobs=None if row.top_logprobs is None else row.top_logprobs[:keep],
    )


# Which responses train, decide and are held out, and how difficult each prompt is.


LABELS = ("auto", "data", "confidence", "none")


@dataclass(frozen=True)
class Split:
    """Indices of the rows that train, that decide when to stop, and that only the report sees."""

    train: list[int]
    validation: list[int]
    held_out: list[int]


def split_rows(count: int, *, validation: float, held_out: float, seed: int) -> Split:
    """A seeded split; validation and held-out rows get at least one each, and so does training.

    Raises `UsageError` for fractions that leave nothing to train on.
    """
    sizes = [max(1, round(count * part)) for part in (validation, held_out)]
    if min(validation, held_out) <= 0 or sum(sizes) >= count:
        raise UsageError(
            f"--validation {validation:g} and --held-out {held_out:g} of {count} rows leave none to train on",
            expected="two fractions above 0 whose sum is well below 1",
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count).tolist()
    return Split(sorted(order[sum(sizes) :]), order[: sizes[0]], order[sizes[0] : sum(sizes)])


def label_rows(
    rows: Sequence[DraftRow], train: Sequence[int], asked: str
) -> tuple[list[DraftRow], list[str], str]:
    """The rows with their labels, the labels' names, and where they come from (`none` for no classifier).

    `confidence` cuts the target's mean log-probability at the median of the training rows: below it is hard.
    Raises `UsageError` where labels are asked for that the rows do not have.
    """
    if asked not in LABELS:
        raise UsageError(f"there are no labels {asked!r}", expected=" | ".join(LABELS))
    names = sorted({rows[index].difficulty for index in train} - {UNLABELLED})
    confident = [value for index in train if (value := rows[index].confidence) is not None]
    if asked == "data" and len(names) < 2:
        raise UsageError(
            f"the training rows have {len(names)} difficulty label(s)",
            expected="two or more values of metadata.difficulty",
            remedy="give --labels confidence or --labels none",
        )
    if asked == "confidence" and not confident:
        raise UsageError(
            "the responses have no stored probabilities to tell their difficulty by",
            remedy="extract them with --top-logprobs, or give --labels data",
        )
    if asked == "data" or (asked == "auto" and len(names) > 1):
        place = {name: index for index, name in enumerate(names)}
        return [replace(row, label=place.get(row.difficulty, -1)) for row in rows], names, "data"
    if asked == "confidence" or (asked == "auto" and confident):
        middle = float(np.median(confident))
        labels = [-1 if row.confidence is None else int(row.confidence < middle) for row in rows]
        return (
            [replace(row, label=label) for row, label in zip(rows, labels, strict=True)],
            ["easy", "hard"],
            "confidence",
        )
    return list(rows), [], "none"
