"""All roundings side by side: measured, recommended for a reason, nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.errors import DataError, UsageError
from lorasmith.files.atomic import read_record
from lorasmith.models.layerwise import UnsupportedLayers
from lorasmith.records.merging import MergeRecord, RoundingsRecord
from lorasmith.runs import roundings
from lorasmith.runs.roundings import compare_roundings, float16_range
from tests.merging.calibrated.test_fit import write_rows
from tests.quantized.bases import BITSANDBYTES, save_bitsandbytes, save_plain
from tests.tiny import save_adapter, save_base


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Path]:
    folder = tmp_path_factory.mktemp("roundings")
    base = save_base(folder / "base")
    adapter = save_adapter(folder / "adapter", base, std=0.02)
    return base, adapter, write_rows(folder / "train.jsonl"), write_rows(folder / "test.jsonl", 6, first=300)


def test_every_mode_is_measured_and_the_nearest_to_the_adapter_recommended(
    folders: tuple[Path, Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, train, test_set = folders
    record = compare_roundings(base, adapter, test_set, tmp_path / "out", calibration=train)
    modes = {one.name: one for one in record.modes}
    assert list(modes) == ["nearest", "dithered", "calibrated", "float16"]
    assert modes["float16"].kl.mean < modes["calibrated"].kl.mean < modes["nearest"].kl.mean
    assert record.recommended == "calibrated"
    assert f"{modes['calibrated'].kl.mean:.1e} against {modes['nearest'].kl.mean:.1e}" in record.reason
    assert "float16 is nearer still" in record.reason
    assert {finding.code for finding in record.findings} == {"float16-activations"}
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["roundings.json"]
    assert read_record(tmp_path / "out" / "roundings.json", RoundingsRecord) == record


def test_without_rows_calibration_is_left_out_and_named(
    folders: tuple[Path, Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, _, test_set = folders
    record = compare_roundings(base, adapter, test_set, tmp_path / "out")
    assert "calibrated" not in {one.name for one in record.modes}
    assert "not-calibrated" in {finding.code for finding in record.findings}


def test_rows_of_the_test_set_are_refused_before_anything_is_measured(
    folders: tuple[Path, Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, _, test_set = folders
    with pytest.raises(DataError, match="6 of 6 calibration rows are in the test set"):
        compare_roundings(base, adapter, test_set, tmp_path / "out", calibration=test_set)
    assert not list((tmp_path / "out").iterdir())


def test_a_model_that_cannot_be_calibrated_is_measured_in_the_other_modes(
    folders: tuple[Path, Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UnsupportedLayers("it has no decoder layers", remedy="give another")

    monkeypatch.setattr("lorasmith.merging.calibrated.layers.LayerwiseModel", refuse)
    base, adapter, train, test_set = folders
    record = compare_roundings(base, adapter, test_set, tmp_path / "out", calibration=train)
    assert [one.name for one in record.modes] == ["nearest", "dithered", "float16"]
    told = next(finding for finding in record.findings if finding.code == "not-calibrated")
    assert told.message.endswith("was not measured: it has no decoder layers")


def test_it_calibrates_on_as_many_tokens_as_asked(
    folders: tuple[Path, Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, train, test_set = folders
    used: list[int] = []
    merge = roundings.merge

    def noting(*arguments: Any, **options: Any) -> MergeRecord:
        record = merge(*arguments, **options)
        used.extend([record.calibration.tokens] if record.calibration else [])
        return record

    monkeypatch.setattr(roundings, "merge", noting)
    options: dict[str, Any] = {"calibration": train, "calibration_tokens": 200}
    compare_roundings(base, adapter, test_set, tmp_path / "out", **options)
    assert len(used) == 1 and 100 < used[0] <= 200


def test_a_weight_beyond_float16_is_a_finding(folders: tuple[Path, Path, Path, Path], tmp_path: Path) -> None:
    _, _, _, test_set = folders
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, std=0.02)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][299, 0] = 1e5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    record = compare_roundings(base, adapter, test_set, tmp_path / "out")
    assert "float16" not in {one.name for one in record.modes}
    assert "float16-overflow" in {finding.code for finding in record.findings}


def test_subnormal_float16_weights_are_counted(tmp_path: Path) -> None:
    values = torch.tensor([0.0, 1.0, -7.5, 2.0**-15, -(2.0**-24), 2.0**-14], dtype=torch.float16)
    save_file({"a": values, "b": torch.arange(3)}, tmp_path / "model.safetensors")
    found = float16_range(tmp_path)
    assert (found.numbers, found.subnormal, found.largest) == (6, 2, 7.5)


def test_a_folder_with_other_things_is_left_alone(
    folders: tuple[Path, Path, Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="other things"):
        compare_roundings(*folders[:2], folders[3], tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_command_as_typed(folders: tuple[Path, Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, train, test_set = folders
    rows = ["--test-set", str(test_set), "--calibration", str(train), "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "lorasmith.cli.main", "merge", "--base", str(base), "--adapter"]
    done = subprocess.run(
        [*command, str(adapter), *rows, "--compare-roundings"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Recommended: calibrated: mean KL" in done.stdout
    assert "float16: the largest weight is" in done.stdout
    both = [*command, str(adapter), "--adapter", str(adapter), *rows, "--compare-roundings"]
    refused = subprocess.run(both, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "one --adapter and --test-set" in refused.stderr


def test_on_the_grid_of_a_quantized_base_each_mode_says_what_of_the_gain_is_kept(tmp_path: Path) -> None:
    plain = save_plain(tmp_path / "plain")
    adapter = save_adapter(tmp_path / "adapter", plain, std=0.02)
    base = save_bitsandbytes(tmp_path / "nf4", plain, **BITSANDBYTES["nf4"])
    train, test_set = write_rows(tmp_path / "train.jsonl"), write_rows(tmp_path / "test.jsonl", 6, first=300)
    given: dict[str, Any] = {"into": "base", "calibration": train}
    record = compare_roundings(base, adapter, test_set, tmp_path / "out", **given)
    modes = {one.name: one for one in record.modes}
    assert list(modes) == ["nearest", "dithered", "calibrated"]
    assert modes["calibrated"].kl.mean < modes["nearest"].kl.mean
    assert record.recommended != "nearest"
    # The merge's loss is the adapter's plus Δ: with what is kept that gives the base's, the same for all.
    gains = [mode.loss_delta / (1 - mode.recovery) for mode in record.modes if mode.recovery is not None]
    assert len(gains) == 3
    assert gains == pytest.approx([gains[0]] * 3, rel=1e-6)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["roundings.json"]
