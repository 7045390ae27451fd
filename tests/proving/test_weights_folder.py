"""Where the proof finds a tensor's values, beside what safetensors itself loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.proving.weights.model_folder import open_file


def test_values_are_those_that_safetensors_loads(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(5, 3).bfloat16(),
        "a": torch.arange(7),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "cube": torch.randn(2, 3, 4, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    found = open_file(tmp_path / "x.safetensors").tensors
    assert found.keys() == tensors.keys()
    for name, expected in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(found[name].whole(), expected)
    assert torch.equal(found["cube"].rows((1, slice(1, 3))), tensors["cube"][1, 1:3])
    assert torch.equal(found["b"].rows((slice(2, 4),)), tensors["b"][2:4])


@pytest.mark.parametrize("padding", range(8))
def test_a_header_of_any_length_leaves_the_values_whole(tmp_path: Path, padding: int) -> None:
    values = torch.randn(33, dtype=torch.float64)
    header = json.dumps({"x": {"dtype": "F64", "shape": [33], "data_offsets": [0, 264]}}).encode()
    header += b" " * padding
    raw = len(header).to_bytes(8, "little") + header + values.numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(raw)
    assert torch.equal(open_file(tmp_path / "x.safetensors").tensors["x"].whole(), values)


def test_tensors_behind_one_of_a_type_that_is_not_read_are_found(tmp_path: Path) -> None:
    save_file(
        {"a": torch.ones(8, 3).to(torch.float8_e5m2), "z": torch.arange(6.0)}, tmp_path / "x.safetensors"
    )
    folder = open_file(tmp_path / "x.safetensors")
    assert [problem.code for problem in folder.problems] == ["unknown-dtype"]
    assert torch.equal(folder.tensors["z"].whole(), torch.arange(6.0))
