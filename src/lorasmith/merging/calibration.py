"""The rows that a calibrated merge looks at: of a training file, never of the test set, within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorasmith.errors import DataError
from lorasmith.files.digests import sha256_file
from lorasmith.files.jsonl import read_examples
from lorasmith.models.encode import encode_examples
from lorasmith.models.load import has_tokenizer, load_tokenizer
from lorasmith.records.base import FileDigest
from lorasmith.records.merging import CalibrationUse

TOKENS = 32_768
"""Default budget over all rows: their hidden states stay in memory, 0.5 GB at 4,096 numbers each."""
LONGEST = 2_048
"""Longer rows lose the beginning of their prompt."""


@dataclass(frozen=True)
class Calibration:
    """Rows in tokens, in a fixed order."""

    rows: list[list[int]]
    use: CalibrationUse
    """For the record."""


def load_calibration(
    files: Sequence[Path],
    base: Path,
    adapters: Sequence[Path],
    *,
    budget: int = TOKENS,
    test_set: Path | None,
    leave_out: bool,
    template: str,
    seed: int,
) -> Calibration:
    """Rows of `files` in an order drawn by `seed`, as many as `budget` tokens hold.

    Raises `DataError` where there are no rows; and for rows that are in the test set by their content, unless
    they are to be left out: what the merge was fitted to could not be measured on them.
    """
    examples = [example for file in files for example in read_examples(file)]
    held_out = set() if test_set is None else {example.content for example in read_examples(test_set)}
    own = [example for example in examples if example.content not in held_out]
    if len(own) < len(examples) and not leave_out:
        shared = next(example for example in examples if example.content in held_out)
        raise DataError(
            f"{len(examples) - len(own)} of {len(examples)} calibration rows are in the test set, such as "
            f"{shared.id!r}",
            where=files[0],
            expected="rows that the test set does not hold",
            remedy="calibrate on the training file, or take these rows out (`lorasmith testset split`)",
        )
    if not own:
        raise DataError(
            "there are no calibration rows" + (" beside those of the test set" if examples else ""),
            where=files[0],
            expected="at least one row",
        )
    folder = next((folder for folder in adapters if has_tokenizer(folder)), None)
    tokenizer = load_tokenizer(base, adapter=folder)
    encoded = encode_examples(own, tokenizer, template=template, max_length=LONGEST)
    chosen: list[list[int]] = []
    left = budget
    for place in np.random.default_rng(seed).permutation(len(own)).tolist():
        ids = encoded.rows[place].ids
        if len(ids) <= left:
            chosen.append(ids)
            left -= len(ids)
    use = CalibrationUse(
        files=[
            FileDigest(path=file.name, bytes=file.stat().st_size, sha256=sha256_file(file)) for file in files
        ],
        rows=len(chosen),
        tokens=budget - left,
        left_out=len(examples) - len(own),
        test_set_checked=test_set is not None,
    )
    return Calibration(chosen, use)
