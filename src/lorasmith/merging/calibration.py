"""The rows that a calibrated merge looks at: of a training file, never of the test set, within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorasmith.errors import DataError, UsageError
from lorasmith.files.digests import sha256_file
from lorasmith.files.jsonl import read_examples
from lorasmith.models.encode import encode_examples
from lorasmith.models.load import has_tokenizer, load_tokenizer
from lorasmith.records.base import FileDigest
from lorasmith.records.dataset import Example
from lorasmith.records.merging import CalibrationUse

TOKENS = 32_768
"""Budget over all rows: their hidden states stay in memory, 0.5 GB at 4,096 numbers each."""
LONGEST = 2_048
"""Longer rows lose the beginning of their prompt."""


@dataclass(frozen=True)
class Calibration:
    """Rows in tokens, in a fixed order."""

    rows: list[list[int]]
    use: CalibrationUse
    """For the record."""


def load_calibration(
    file: Path, base: Path, adapters: Sequence[Path], *, test_set: Path | None, template: str, seed: int
) -> Calibration:
    """Rows of `file` in an order drawn by `seed`, as many as the budget of tokens holds.

    Raises `DataError` for a file without rows, and for rows that are in the test set by their content: what
    the merge was fitted to could not be measured on them.
    """
    examples = read_examples(file)
    if not examples:
        raise DataError("there are no calibration rows", where=file, expected="at least one row")
    if test_set is not None:
        _refuse_test_rows(examples, test_set, file)
    own = next((folder for folder in adapters if has_tokenizer(folder)), None)
    tokenizer = load_tokenizer(base, adapter=own)
    encoded = encode_examples(examples, tokenizer, template=template, max_length=LONGEST)
    chosen: list[list[int]] = []
    left = TOKENS
    for place in np.random.default_rng(seed).permutation(len(examples)).tolist():
        ids = encoded.rows[place].ids
        if len(ids) <= left:
            chosen.append(ids)
            left -= len(ids)
    digest = FileDigest(path=file.name, bytes=file.stat().st_size, sha256=sha256_file(file))
    use = CalibrationUse(
        file=digest,
        rows=len(chosen),
        tokens=sum(len(ids) for ids in chosen),
        test_set_checked=test_set is not None,
    )
    return Calibration(chosen, use)


def require_file(file: Path | None) -> Path:
    """`UsageError` where a calibrated merge was given no rows."""
    if file is None:
        raise UsageError(
            "calibrated rounding needs rows to calibrate on",
            expected="--calibration FILE",
            remedy="give the training file, or --rounding dithered, which needs no data",
        )
    return file


def _refuse_test_rows(examples: Sequence[Example], test_set: Path, file: Path) -> None:
    held_out = {_content(example) for example in read_examples(test_set)}
    shared = [example.id for example in examples if _content(example) in held_out]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(examples)} calibration rows are in the test set, such as {shared[0]!r}",
            where=file,
            expected="rows that the test set does not hold",
            remedy="calibrate on the training file, or take these rows out (`lorasmith testset split`)",
        )


def _content(example: Example) -> tuple[str, str]:
    """Prompt and response without regard to case and white space: a copy is a copy."""
    return " ".join(example.prompt.casefold().split()), " ".join(example.response.casefold().split())
