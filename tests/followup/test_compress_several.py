"""Several ways to compress in one call: folders, recommendation, table and plot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import UsageError
from lorasmith.files.atomic import read_record
from lorasmith.files.jsonl import write_rows
from lorasmith.followup.compression import quantize
from lorasmith.followup.compression.settings import every_way
from lorasmith.followup.compression.table import plot, write_page
from lorasmith.options import CompressOptions
from lorasmith.records.compression import CompressionsRecord
from lorasmith.runs import compression
from lorasmith.runs.compression import compress_several
from tests.followup.compressing import LOOSE, copies, questions, record_of
from tests.tiny import tiny_rows


def test_several_ways_in_one_call(compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "WORKER", copies(compressed))
    write_rows(tmp_path / "rows.jsonl", [*questions()[:6], *tiny_rows(3)])
    write_rows(tmp_path / "train.jsonl", tiny_rows(30, seed=9))
    options = CompressOptions(
        method=("rtn", "calibrated"), iterations=2, calibration_rows=2, calibration_length=16, group_size=32,
        calibration=tmp_path / "train.jsonl", test_set=tmp_path / "rows.jsonl",
        max_accuracy_drop=1.0, **LOOSE,
    )  # fmt: skip
    asked = count_questions(monkeypatch)
    record = compress_several(compressed / "base", tmp_path / "all", options=options)
    assert asked == ["original", "compressed", "compressed"]
    assert record.folders == ["compressed-tensors-rtn", "compressed-tensors-calibrated"]
    assert [one.method for one in record.compressed] == ["rtn", "calibrated"]
    assert all(record_of(tmp_path / "all" / name).passed for name in record.folders)
    assert record.recommended in record.folders
    assert read_record(tmp_path / "all" / "compressions.json", CompressionsRecord) == record
    hard = options.model_copy(update={"max_mean_kl": 0.0})
    strict = compress_several(compressed / "base", tmp_path / "all", options=hard)
    assert strict.recommended is None and "none passes" in strict.reason
    with pytest.raises(UsageError, match="more than once"):
        compress_several(compressed / "base", tmp_path / "all", method=("rtn", "rtn"))


def count_questions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The role of every model that is asked from now on."""
    asked, ask = [], compression.evaluate_tasks

    def counted(*arguments: Any, **options: Any) -> Any:
        asked.append(options["role"])
        return ask(*arguments, **options)

    monkeypatch.setattr(compression, "evaluate_tasks", counted)
    return asked


def test_all_ways_are_looked_at_before_the_first_is_begun(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "WORKER", ("-c", "raise SystemExit('too late')"))
    size = record_of(compressed / "int4").planned_bytes
    options = CompressOptions(target_size=f"{size}B", format=("compressed-tensors", "gguf:q8_0"))
    with pytest.raises(UsageError, match="gguf:q8_0 makes"):
        compress_several(compressed / "base", tmp_path / "all", options=options)
    assert not (tmp_path / "all").exists()


def test_every_combination_stands_once() -> None:
    asked = CompressOptions(
        format=("compressed-tensors", "gguf:q4_k_m"), method=("rtn", "calibrated"), bits=(4, 8),
        group_size=64, iterations=1, calibration_rows=2, calibration_length=3,
    )  # fmt: skip
    ways = every_way(asked, 4)
    assert [way.name for way in ways] == [
        "compressed-tensors-rtn",
        "compressed-tensors-calibrated",
        "compressed-tensors-8bit-rtn",
        "compressed-tensors-8bit-calibrated",
        "q4_k_m-rtn",
        "q4_k_m-calibrated",
    ]
    assert [(way.bits, way.group_size) for way in ways[3:5]] == [(8, 64), (4, None)]
    assert {(way.iterations, way.seed) for way in ways} == {(1, 4)}
    with pytest.raises(UsageError, match="own groups"):  # nothing here could take them
        every_way(CompressOptions(format=("gguf:q8_0",), group_size=64), 4)
    with pytest.raises(UsageError, match="has 8 bits, not 4"):
        every_way(CompressOptions(format=("gguf:q8_0",), bits=(4,)), 4)


def test_table_and_plot(compressed: Path, tmp_path: Path) -> None:
    write_page([compressed / "int4"], tmp_path / "t.md")
    record = record_of(compressed / "int4")
    assert record.quality is not None
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert "| int4 g64 | rtn" in lines[2] and f"{record.quality.kl.mean:.4f}" in lines[2]
    write_page([compressed / "int4"], tmp_path / "t.html")
    text = (tmp_path / "t.html").read_text()
    assert "<svg" in text and "<circle" in text and "http" not in text


def test_labels_of_the_plot_do_not_cover_each_other(compressed: Path) -> None:
    record = record_of(compressed / "int4")
    near = [record, record.model_copy(update={"bytes": record.bytes + 10, "method": "calibrated"})]
    heights = re.findall(r'<text x="[^"]+" y="([^"]+)" text-anchor="end">int4', plot(near))
    assert len(heights) == 2 and abs(float(heights[0]) - float(heights[1])) >= 12
