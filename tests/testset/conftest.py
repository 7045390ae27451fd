"""A folder with invented rows of all five benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.testset.invented import (
    code_row,
    drop_row,
    gpqa_row,
    math_row,
    mmlu_row,
    write,
)


@pytest.fixture
def five(tmp_path: Path) -> Path:
    """All five benchmarks, 40 rows each."""
    folder = tmp_path / "benchmarks"
    makers = {"math": math_row, "mmlu": mmlu_row, "humaneval": code_row, "gpqa": gpqa_row, "drop": drop_row}
    for name, make in makers.items():
        write(folder / f"{name}.jsonl", [make(number) for number in range(40)])
    return folder
