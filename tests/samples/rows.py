"""Rows of a test set, from a seed, and the folder that holds them."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from lorasmith.files.atomic import write_record
from lorasmith.files.digests import hash_file
from lorasmith.files.jsonl import write_examples
from lorasmith.records.base import FileDigest
from lorasmith.records.dataset import ContaminationRecord, DatasetStatistics, Example, Metadata

SOURCES = ("DROP", "GPQA", "HumanEval", "MATH", "MMLU")
DOMAINS = ("reading", "science", "code", "math", "multitask")
DIFFICULTIES = ("easy", "hard", "medium", "hard", "medium")
SECRET = "quintessential-sphinx"
"""Stands in the text of every row that must not be published."""

_TEXT = "the answer follows from a lemma where each term is bounded by its limit so we find"
WORDS = _TEXT.split()
VOCABULARY = [
    "<unk>",
    "<end>",
    *(f"{mark}{word}" for word in [*sorted(set(WORDS)), SECRET] for mark in ("▁", "")),
]


def sha(text: str) -> str:
    """A digest to fill a record with."""
    return hashlib.sha256(text.encode()).hexdigest()


def sample_examples(count: int, *, seed: int = 0, words: int = 30) -> list[Example]:
    """Rows of five sources in turn; those of GPQA hold `SECRET`."""
    chance = random.Random(seed)
    rows = []
    for index in range(count):
        kind = index % len(SOURCES)
        secret = SECRET if SOURCES[kind] == "GPQA" else ""
        prompt = " ".join(chance.choices(WORDS, k=chance.randint(words // 2, 2 * words)))
        response = " ".join(chance.choices(WORDS, k=chance.randint(2, words)))
        rows.append(
            Example(
                id=f"{SOURCES[kind].lower()}-{index:05d}",
                prompt=f"{prompt} {secret}".strip(),
                response=f"{response} {secret}".strip(),
                metadata=Metadata(
                    source=SOURCES[kind],
                    domain=DOMAINS[kind],
                    difficulty=DIFFICULTIES[kind],
                    sha256=sha(prompt),
                ),
            )
        )
    return rows


def write_test_set(run: Path, rows: list[Example]) -> FileDigest:
    """`testset/` with its statistics and a contamination record."""
    file = run / "testset" / "test_set.jsonl"
    write_examples(file, rows)
    found = FileDigest(path="test_set.jsonl", bytes=file.stat().st_size, sha256=hash_file(file))
    counts: dict[str, dict[str, int]] = {
        "source": {},
        "domain": {},
        "difficulty": {},
        "source × difficulty": {},
    }
    for row in rows:
        meta = row.metadata
        crossing = f"{meta.source} / {meta.difficulty}"
        for kind, name in zip(counts, (meta.source, meta.domain, meta.difficulty, crossing), strict=True):
            counts[kind][name] = counts[kind].get(name, 0) + 1
    write_record(
        run / "testset" / "statistics.json",
        DatasetStatistics(
            examples=len(rows),
            file=found,
            seed=42,
            by_source=counts["source"],
            by_domain=counts["domain"],
            by_difficulty=counts["difficulty"],
            crossings={"source × difficulty": counts["source × difficulty"]},
        ),
    )
    write_record(
        run / "testset" / "contamination.json",
        ContaminationRecord(
            verdict="independent",
            test=found,
            train=[FileDigest(path="train.jsonl", bytes=123456, sha256=sha("train"))],
            rows_test=len(rows),
            rows_train=2000,
            parameters={"ngram": 13, "jaccard": 0.8},
            counts={"exact": 0, "ngram": 0, "near": 0},
        ),
    )
    return found
