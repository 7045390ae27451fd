"""The table of log-probabilities that belongs to responses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lorasmith.followup.responses.output import answer_arrays, write_logprobs


def test_a_table_that_a_killed_command_had_finished_is_written_again_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    answer = SimpleNamespace(tokens=[5, 6], end=2, logprobs=[-0.5, -0.25, -0.125], top=[])
    rows = {name: {"key": name, "id": name, "finish_reason": "stop"} for name in ("a", "b")}
    journal: Any = SimpleNamespace(rows=rows, arrays=lambda key: answer_arrays([1, 2, 3], answer))
    once = write_logprobs(tmp_path / "t.parquet", list(rows), journal, rows)
    assert write_logprobs(tmp_path / "t.parquet", list(rows), journal, rows) == once
