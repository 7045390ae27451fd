"""The proof over quantized bases: exact where the merge is right, and every planted mistake is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorasmith
from lorasmith.errors import CheckpointError
from tests.quantized.bases import BITSANDBYTES, FORMATS, save_bitsandbytes, save_plain, save_quantized
from tests.tiny import save_adapter

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "adapter", plain, std=0.05)


def _copy(folder: Path, to: Path) -> dict[str, torch.Tensor]:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return load_file(to / "model.safetensors")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_merge_of_a_quantized_base_is_exact(kind: str, plain: Path, adapter: Path, tmp_path: Path) -> None:
    base = save_quantized(tmp_path / "base", plain, kind)
    lorasmith.merge(base, adapter, tmp_path / "out", into="16bit")
    proof = lorasmith.prove(base, adapter, tmp_path / "out")
    assert proof.grade == "exact", proof.findings
    assert proof.elements_checked == sum(
        tensor.numel() for tensor in load_file(plain / "model.safetensors").values()
    )


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    return save_bitsandbytes(tmp_path_factory.mktemp("nf4") / "model", plain, **BITSANDBYTES["nf4"])


Plant = Callable[[dict[str, torch.Tensor]], None]


def _swap_nibbles(tensors: dict[str, torch.Tensor]) -> None:
    codes = tensors[WEIGHT]
    tensors[WEIGHT] = (codes << 4) | (codes >> 4)


def _shift_blocks(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{WEIGHT}.absmax"] = tensors[f"{WEIGHT}.absmax"].roll(1)


def _fresh_outer_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{WEIGHT}.nested_absmax"] *= 1.01


def _one_code(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WEIGHT][7] ^= 0x10


@pytest.mark.parametrize("plant", [_swap_nibbles, _shift_blocks, _fresh_outer_scale, _one_code])
def test_a_merge_that_read_the_base_wrongly_is_found(
    plant: Plant, nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    tensors = _copy(nf4, tmp_path / "wrong")
    plant(tensors)
    save_file(tensors, tmp_path / "wrong" / "model.safetensors", metadata={"format": "pt"})
    lorasmith.merge(tmp_path / "wrong", adapter, tmp_path / "out", into="16bit")
    proof = lorasmith.prove(nf4, adapter, tmp_path / "out")
    assert proof.grade == "different"
    assert {tensor.name for tensor in proof.tensors if tensor.wrong} == {WEIGHT}


def test_a_rounded_dequantization_is_not_the_exact_merge(nf4: Path, adapter: Path, tmp_path: Path) -> None:
    """What other tools do: the base to bfloat16 first, then the update, which rounds twice."""
    lorasmith.merge(nf4, adapter, tmp_path / "out", into="16bit")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    from lorasmith.quantized.open import open_base

    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{WEIGHT.removesuffix('weight')}lora_{x}.weight"] for x in "AB")
    weight = open_base(nf4).decoded[WEIGHT].rows(0, 64).to(torch.bfloat16)
    merged[WEIGHT] = (weight + (2.0 * b @ a).to(torch.bfloat16)).contiguous()
    (tmp_path / "out" / "lorasmith_merge.json").unlink()
    save_file(merged, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    proof = lorasmith.prove(nf4, adapter, tmp_path / "out")
    assert proof.grade == "different"
    wrong = next(tensor for tensor in proof.tensors if tensor.name == WEIGHT)
    assert 0 < wrong.wrong < wrong.elements


def test_a_record_that_names_another_kind_of_base_disagrees(nf4: Path, adapter: Path, tmp_path: Path) -> None:
    lorasmith.merge(nf4, adapter, tmp_path / "out", into="16bit")
    path = tmp_path / "out" / "lorasmith_merge.json"
    body = json.loads(path.read_text())
    del body["into"]
    path.write_text(json.dumps(body))
    assert "record-disagrees" in [
        one.code for one in lorasmith.prove(nf4, adapter, tmp_path / "out").findings
    ]


def test_a_table_that_is_not_the_formats_own_is_refused_by_merge_and_proof(
    nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    lorasmith.merge(nf4, adapter, tmp_path / "out", into="16bit")
    tensors = _copy(nf4, tmp_path / "wrong")
    tensors[f"{WEIGHT}.quant_map"][3] += 0.01
    save_file(tensors, tmp_path / "wrong" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="table"):
        lorasmith.merge(tmp_path / "wrong", adapter, tmp_path / "other", into="16bit")
    with pytest.raises(CheckpointError, match="table"):
        lorasmith.prove(tmp_path / "wrong", adapter, tmp_path / "out")
