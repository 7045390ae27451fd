"""A run on a quantized base: what it is asked, and that each model is measured on the base that was given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorasmith
from lorasmith.errors import UsageError
from lorasmith.files.jsonl import write_rows
from lorasmith.options import RunOptions
from lorasmith.preflight.doctor import examine
from tests.quantized.bases import BITSANDBYTES, save_bitsandbytes, save_plain
from tests.tiny import save_adapter, tiny_rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    plain = save_plain(folder / "plain")
    save_adapter(folder / "adapter", plain, std=0.05)
    save_bitsandbytes(folder / "base", plain, **BITSANDBYTES["nf4"])
    write_rows(folder / "test.jsonl", tiny_rows(8))
    write_rows(folder / "train.jsonl", tiny_rows(24, seed=5))
    return {
        "base": folder / "base",
        "adapter": folder / "adapter",
        "test_set": folder / "test.jsonl",
        "train": (folder / "train.jsonl",),
    }


def test_what_it_is_merged_into_is_asked_before_anything_is_written(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="the base is quantized: 14 weights in nf4") as error:
        lorasmith.run(**inputs, output=tmp_path / "run")
    assert error.value.expected == "--into 16bit or --into base"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("into", "precision", "grade"), [("16bit", "float32", "exact"), ("base", "base", "bounded")]
)
def test_the_merge_keeps_what_the_adapter_does_on_its_own_base(
    inputs: dict[str, Any], tmp_path: Path, into: str, precision: str, grade: str
) -> None:
    result = lorasmith.run(**inputs, output=tmp_path / "run", into=into, precision=precision)
    loss = {role: getattr(result, role).overall.loss for role in ("base", "adapter", "merged")}
    config = json.loads((tmp_path / "run" / "merged" / "config.json").read_text())
    assert ("quantization_config" in config) == (into == "base")
    assert result.weights.grade == grade
    if into == "16bit":
        # Of float32's own rounding: what NF4 has lost is in both.
        assert loss["merged"] == pytest.approx(loss["adapter"], abs=1e-5)
        assert abs(loss["base"] - loss["adapter"]) > 1e-3
    else:
        assert {tensor.rounding for tensor in result.merge.tensors} == {"calibrated"}


def test_doctor_tells_the_format_and_what_a_merge_writes(inputs: dict[str, Any], tmp_path: Path) -> None:
    found = {}
    for into in ("16bit", "base"):
        record = examine(RunOptions(**inputs, output=tmp_path / "run", into=into))
        assert not [check for check in record.checks if check.state == "error"]
        base = next(check for check in record.checks if check.name == "base")
        assert "14 weights in nf4" in base.found
        found[into] = next(stage.disk_bytes for stage in record.stages if stage.stage == "merge")
    # 16 bits a weight against 4 of most: embedding and head are in 16 bits in both.
    assert found["base"] < found["16bit"]
