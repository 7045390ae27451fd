"""Compressed tiny models for tests: what they are, workers in compressed of auto-round, questions to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasmith.files.atomic import read_record
from lorasmith.followup.compression.settings import RECORD
from lorasmith.models import load
from lorasmith.records.compression import CompressRecord

TINY = {"hidden_size": 64, "intermediate_size": 128}
LOOSE: dict[str, Any] = {"max_mean_kl": 100.0, "max_perplexity_ratio": 100.0, "min_top1": 0.0}
"""Gates that a model of random weights passes."""


def record_of(folder: Path) -> CompressRecord:
    return read_record(folder / RECORD, CompressRecord)


def unpacked(folder: Path) -> Any:
    """The compressed model in float32, as every command loads it."""
    return load.load_model(folder).model


def questions() -> list[dict[str, Any]]:
    """Choices of two subjects; a model of random weights is right by luck alone."""
    return [
        {
            "id": f"MMLU/{index}",
            "prompt": f"the {'cat ' * (index % 7)}in rain\nA. one\nB. two\nC. in\nD. on\nAnswer:",
            "response": "ABCD"[index % 4],
            "metadata": {
                "source": "MMLU",
                "domain": ("anatomy", "law")[index % 3 == 0],
                "choices": ["one", "two", "in", "on"],
                "answer": "ABCD"[index % 4],
            },
        }
        for index in range(24)
    ]


def copies(compressed: Path) -> tuple[str, str]:
    """A worker that is done at once: it leaves what round to nearest gave."""
    return (
        "-c",
        "import json, sys, shutil; job = json.load(open(sys.argv[1]));"
        f"shutil.copytree({str(compressed / 'int4')!r}, job['output'] + '/m', "
        f"ignore=shutil.ignore_patterns({RECORD!r}))",
    )
