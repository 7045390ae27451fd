"""The examples behind the numbers: a light index, and texts with token losses in packed chunks."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import InputError
from lorasmith.files.jsonl import read_rows
from lorasmith.files.parquet import not_a_table, read_table
from lorasmith.files.run_layout import ROLES, RunRecords
from lorasmith.records.dataset import Example
from lorasmith.records.proof import ExampleComparison
from lorasmith.records.release import is_redacted

# Token ids as the pieces of text a reader sees, with the tokenizer that lies beside the merged weights.


_BROKEN = "\ufffd"
"""What decoding gives for a part of a character."""


class TokenPieces:
    """Cuts a response into the text of its tokens; each id is decoded once."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._anchor = 0
        self._before = ""
        if tokenizer is not None:
            # A first token may lose its leading space when it is decoded alone: decode it after another one.
            self._anchor = next(
                (token for token in range(min(tokenizer.get_vocab_size(), 512)) if self._plain(token)), 0
            )
            self._before = self._decode([self._anchor])

    @classmethod
    def load(cls, file: Path) -> TokenPieces:
        """From a `tokenizer.json`; without one every answer is None."""
        if not file.is_file():
            return cls(None)
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(file)))

    def of(self, ids: Sequence[int]) -> list[str] | None:
        """One piece a token; of a character that spans several tokens, the last one has it, the others ''."""
        if self._tokenizer is None:
            return None
        pieces = [self._piece(token) for token in ids]
        if not any(_BROKEN in piece for piece in pieces):
            return pieces
        return self._join_characters(ids)

    def _piece(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode([self._anchor, token])[len(self._before) :]
        return self._known[token]

    def _join_characters(self, ids: Sequence[int]) -> list[str]:
        pieces, start = [], 0
        for end in range(1, len(ids) + 1):
            text = self._decode([self._anchor, *ids[start:end]])[len(self._before) :]
            if text.endswith(_BROKEN) and end < len(ids) and end - start < 4:
                pieces.append("")
            else:
                pieces.append(text)
                start = end
        return pieces

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)  # type: ignore[union-attr]
        return text

    def _plain(self, token: int) -> bool:
        text = self._decode([token])
        return text.isascii() and text.isalnum()


CHUNK = 50
"""Examples in one packed chunk: small enough to open at once, large enough to pack well."""

BUDGET = 13_500_000
"""Characters of all chunks: with the rest of the page that stays below 15 MB."""

_COLUMNS = ("id", "tokens", "loss", "token_ids", "logprobs")


@dataclass(frozen=True)
class Explorer:
    """What the page's script reads."""

    index: dict[str, Any]
    """Columns over all examples: ids, groups (as numbers into their names), losses, flips, divergence."""
    chunks: list[str]
    """Base64 of deflated JSON, `CHUNK` examples each: prompt, response, pieces, losses."""
    note: str
    """What was left out to keep the page light; empty when nothing was."""


@dataclass(frozen=True)
class _Level:
    """How much of each example is kept."""

    characters: int | None
    """Most characters kept of prompt and response each; None for all of them."""
    tokens: bool


_LEVELS = (
    _Level(None, True),
    _Level(4000, True),
    _Level(2000, True),
    _Level(2000, False),
    _Level(500, False),
)
"""From everything to little: the first one whose chunks fit in `BUDGET` is taken."""


@dataclass(frozen=True)
class _Scored:
    tokens: int
    loss: float
    token_ids: list[int] | None
    losses: list[float] | None


def build_explorer(records: RunRecords) -> Explorer | None:
    """None when nothing was scored or the test set is gone.

    Raises `InputError` for tables that do not fit the test set.
    """
    test_set = records.folder / "testset" / "test_set.jsonl"
    tables = {
        role: _read_table(records.folder / "validation" / f"{role}.parquet")
        for role in ROLES
        if role in records.validations
    }
    if not tables or not test_set.is_file():
        return None
    rows = [row for _, row in read_rows(test_set)]
    scored = [row for row in rows if any(row["id"] in table for table in tables.values())]
    if not scored:
        raise InputError("no row of the test set was scored", where=test_set, remedy="validate again")
    pieces = TokenPieces.load(records.folder / "merged" / "tokenizer.json")
    compared = {entry.id: entry for entry in records.behaviour.examples} if records.behaviour else {}
    details = [_detail(row, tables, pieces) for row in scored]
    chunks, note = _fit(details)
    return Explorer(_index(scored, tables, compared), chunks, note)


def _fit(details: list[dict[str, Any]]) -> tuple[list[str], str]:
    """Chunks that fit the budget, and what was left out for that."""
    for level in _LEVELS:
        kept = [_reduce(detail, level) for detail in details]
        chunks = [_pack(kept[start : start + CHUNK]) for start in range(0, len(kept), CHUNK)]
        if sum(map(len, chunks)) <= BUDGET:
            break
    notes = []
    if level.characters is not None:
        notes.append(f"texts are cut after {level.characters:,} characters")
    if not level.tokens:
        notes.append("the losses of single tokens are left out; they are in validation/*.parquet")
    return chunks, f"To keep this page light, {' and '.join(notes)}." if notes else ""


def _reduce(detail: dict[str, Any], level: _Level) -> dict[str, Any]:
    if detail.get("redacted") or level == _LEVELS[0]:
        return detail
    most = level.characters
    kept = {"prompt": _cut(detail["prompt"], most), "response": _cut(detail["response"], most)}
    return {**detail, **kept} if level.tokens else kept


def _cut(text: str, most: int | None) -> str:
    if most is None or len(text) <= most:
        return text
    return f"{text[:most]} … ({len(text) - most:,} more characters)"


def _read_table(path: Path) -> dict[str, _Scored]:
    """Example id → what a model's table says of it; raises `DataError` for a damaged table."""
    rows = read_table(path, _COLUMNS).to_pylist()
    try:
        return {row["id"]: _scored(row) for row in rows}
    except (TypeError, ValueError) as error:
        raise not_a_table(path, error, _COLUMNS) from error


def _scored(row: dict[str, Any]) -> _Scored:
    tokens, loss, ids, logprobs = (row[name] for name in _COLUMNS[1:])
    numbers = [loss, *(logprobs or [])]
    if not isinstance(tokens, int) or not all(isinstance(n, float) and math.isfinite(n) for n in numbers):
        raise ValueError(f"row {row['id']!r} has other values than counts and losses")
    # A package leaves out the token ids of rows whose source forbids their text, and keeps the losses.
    if ids and len(ids) != len(logprobs or []):
        raise ValueError(f"row {row['id']!r} has {len(ids or [])} tokens and {len(logprobs or [])} losses")
    return _Scored(tokens, loss, ids, None if logprobs is None else [-value for value in logprobs])


def _index(
    rows: Sequence[dict[str, Any]],
    tables: dict[str, dict[str, _Scored]],
    compared: dict[str, ExampleComparison],
) -> dict[str, Any]:
    index: dict[str, Any] = {"id": [row["id"] for row in rows], "chunk": CHUNK, "roles": list(tables)}
    for kind in ("source", "domain", "difficulty"):
        values = [str(row["metadata"].get(kind, "unknown")) for row in rows]
        names = sorted(set(values))
        places = {name: place for place, name in enumerate(names)}
        index[kind] = {"names": names, "of": [places[value] for value in values]}
    for role, table in tables.items():
        index[role] = [_rounded(table[row["id"]].loss, 6) if row["id"] in table else None for row in rows]
    index["tokens"] = [
        next((table[row["id"]].tokens for table in tables.values() if row["id"] in table), 0) for row in rows
    ]
    pairs = [compared.get(row["id"]) for row in rows]
    index["flips"] = [pair.flips if pair else 0 for pair in pairs]
    index["kl"] = [_rounded(pair.mean_kl, 3) if pair else None for pair in pairs]
    return index


def _detail(
    row: dict[str, Any], tables: dict[str, dict[str, _Scored]], pieces: TokenPieces
) -> dict[str, Any]:
    """Text and token losses of one example, or neither where its source forbids it."""
    if "redacted" in row or is_redacted(str(row["metadata"].get("source", ""))):
        return {"redacted": True}
    detail: dict[str, Any] = _texts(row)
    scored = {role: table[row["id"]] for role, table in tables.items() if row["id"] in table}
    ids = {tuple(entry.token_ids or ()) for entry in scored.values()}
    if len(ids) != 1 or ids == {()}:
        return detail
    texts = pieces.of(next(iter(ids)))
    if texts is None:
        return detail
    detail["pieces"] = texts
    for role, entry in scored.items():
        if role != "merged" or "adapter" not in scored:
            detail[role] = [_rounded(loss, 3) for loss in entry.losses or []]
    if "merged" in scored and "adapter" in scored:
        # The difference is far smaller than either loss: stored by itself it keeps its digits.
        pairs = zip(scored["merged"].losses or [], scored["adapter"].losses or [], strict=True)
        detail["delta"] = [_rounded(merged - adapter, 2) for merged, adapter in pairs]
    return detail


def _texts(row: dict[str, Any]) -> dict[str, str]:
    """What is given and what is answered: of a conversation all turns before its last answer."""
    example = Example.model_validate(row)
    tools = f"tools: {json.dumps(example.tools, ensure_ascii=False)}\n\n" if example.tools else ""
    return {"prompt": tools + example.prompt, "response": example.response}


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _pack(details: list[dict[str, Any]]) -> str:
    text = json.dumps(details, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return base64.b64encode(packer.compress(text.encode()) + packer.flush()).decode()
