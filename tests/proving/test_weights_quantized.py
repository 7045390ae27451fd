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
from lorasmith.quantized.open import open_base
from tests.quantized.bases import (
    BITSANDBYTES,
    FORMATS,
    save_bitsandbytes,
    save_gpt_oss,
    save_plain,
    save_quantized,
)
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


# Back into the base's own format.


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rounding", ["nearest", "dithered"])
def test_a_merge_onto_the_bases_grid_is_exact(
    kind: str, rounding: str, plain: Path, adapter: Path, tmp_path: Path
) -> None:
    base = save_quantized(tmp_path / "base", plain, kind)
    record = lorasmith.merge(base, adapter, tmp_path / "out", into="base", rounding=rounding)
    assert all(tensor.changed for tensor in record.tensors)
    proof = lorasmith.prove(base, adapter, tmp_path / "out")
    assert proof.grade == "exact", proof.findings
    merged = {tensor.name for tensor in proof.tensors if tensor.kind == "merged"}
    assert merged == {tensor.name for tensor in record.tensors}


def test_the_base_itself_is_no_merge_of_it(nf4: Path, adapter: Path) -> None:
    proof = lorasmith.prove(nf4, adapter, nf4)
    assert proof.grade == "different"
    assert any("codes of the base" in tensor.note for tensor in proof.tensors)


def _next_code(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WEIGHT][100] ^= 0x01


@pytest.mark.parametrize("plant", [_swap_nibbles, _shift_blocks, _fresh_outer_scale, _one_code, _next_code])
def test_a_planted_mistake_in_codes_or_scales_is_found(
    plant: Plant, nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    lorasmith.merge(nf4, adapter, tmp_path / "right", into="base")
    tensors = _copy(tmp_path / "right", tmp_path / "wrong")
    plant(tensors)
    (tmp_path / "wrong" / "lorasmith_merge.json").unlink()
    save_file(tensors, tmp_path / "wrong" / "model.safetensors", metadata={"format": "pt"})
    proof = lorasmith.prove(nf4, adapter, tmp_path / "wrong")
    assert proof.grade == "different"
    assert all(tensor.name.startswith(WEIGHT) for tensor in proof.tensors if tensor.wrong)


def test_a_wrong_zero_point_is_found(plain: Path, adapter: Path, tmp_path: Path) -> None:
    base = save_quantized(tmp_path / "base", plain, "int4 asymmetric")
    lorasmith.merge(base, adapter, tmp_path / "right", into="base")
    tensors = _copy(tmp_path / "right", tmp_path / "wrong")
    name = WEIGHT.replace("weight", "weight_zero_point")
    tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / "wrong" / "model.safetensors", metadata={"format": "pt"})
    proof = lorasmith.prove(base, adapter, tmp_path / "wrong")
    assert [tensor.name for tensor in proof.tensors if tensor.wrong] == [name]


def test_fresh_scales_are_found_though_the_model_is_a_good_one(
    plain: Path, nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    """What PEFT's merge of a 4-bit layer does: dequantize, add, quantize anew."""
    functional = pytest.importorskip("bitsandbytes.functional")
    lorasmith.merge(nf4, adapter, tmp_path / "right", into="base")
    lorasmith.merge(nf4, adapter, tmp_path / "wide", into="16bit")
    tensors = _copy(tmp_path / "right", tmp_path / "wrong")
    wide = load_file(tmp_path / "wide" / "model.safetensors")[WEIGHT]
    codes, state = functional.quantize_4bit(wide, quant_type="nf4", compress_statistics=True, blocksize=64)
    tensors[WEIGHT] = codes
    tensors |= {f"{WEIGHT}.{key}": part for key, part in state.as_dict(packed=True).items()}
    save_file(tensors, tmp_path / "wrong" / "model.safetensors", metadata={"format": "pt"})
    proof = lorasmith.prove(nf4, adapter, tmp_path / "wrong")
    assert f"{WEIGHT}.absmax" in [tensor.name for tensor in proof.tensors if tensor.wrong]


def test_experts_of_gpt_oss_are_proved_and_transposed_ones_found(tmp_path: Path) -> None:
    plain, packed = save_gpt_oss(tmp_path)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = {"target_modules": ["q_proj"], "target_parameters": targets}
    adapter = save_adapter(tmp_path / "adapter", plain, std=0.1, **settings)
    record = lorasmith.merge(packed, adapter, tmp_path / "right", into="base")
    assert all(tensor.changed for tensor in record.tensors)
    assert lorasmith.prove(packed, adapter, tmp_path / "right").grade == "exact"
    tensors = _copy(tmp_path / "right", tmp_path / "wrong")
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    # Square experts: [E, O = 64, 2 groups, 16] of 64 inputs, turned round.
    low, high = tensors[name] & 15, tensors[name] >> 4
    codes = torch.stack([low, high], dim=-1).reshape(4, 64, 64).transpose(1, 2).reshape(4, 64, 2, 16, 2)
    tensors[name] = (codes[..., 0] | codes[..., 1] << 4).contiguous()
    save_file(tensors, tmp_path / "wrong" / "model.safetensors", metadata={"format": "pt"})
    proof = lorasmith.prove(packed, adapter, tmp_path / "wrong")
    assert [tensor.name for tensor in proof.tensors if tensor.wrong] == [name.removesuffix("_blocks")]


def test_another_scale_in_a_block_of_gguf_is_found(plain: Path, adapter: Path, tmp_path: Path) -> None:
    base = save_quantized(tmp_path / "base", plain, "gguf")
    lorasmith.merge(base, adapter, tmp_path / "out", into="base")
    assert lorasmith.prove(base, adapter, tmp_path / "out").grade == "exact"
    start = open_base(base).decoded[WEIGHT].weight.parts["codes"].info.start  # type: ignore[attr-defined]
    content = bytearray((tmp_path / "out" / "model.gguf").read_bytes())
    content[start] ^= 1
    (tmp_path / "out" / "model.gguf").write_bytes(content)
    proof = lorasmith.prove(base, adapter, tmp_path / "out")
    assert "scales-differ" in [finding.code for finding in proof.findings]
    assert proof.grade == "different"


def test_a_tie_goes_to_the_side_of_the_bases_number(plain: Path, tmp_path: Path) -> None:
    """Scales that are powers of two and an update of exactly half a step, or one and a half."""
    base = save_quantized(tmp_path / "base", plain, "int4 groups")
    tensors = load_file(base / "model.safetensors")
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] = torch.full_like(tensors[name], 2.0**-4)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_adapter(tmp_path / "adapter", plain, r=1, lora_alpha=1, target_modules=["q_proj"])
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, factor in factors.items():
        steps = torch.ones_like(factor) if "lora_A" in name else torch.full_like(factor, 0.5)
        if "lora_B" in name:
            steps[1::2] = -1.5
        factors[name] = steps * (1.0 if "lora_A" in name else 2.0**-4)
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    record = lorasmith.merge(base, adapter, tmp_path / "out", into="base")
    proof = lorasmith.prove(base, adapter, tmp_path / "out")
    assert proof.grade == "exact", proof.findings
    weight = next(tensor for tensor in record.tensors if tensor.name == WEIGHT)
    before, after = (
        open_base(folder).decoded[WEIGHT].read(0, 64 * 64) for folder in (base, tmp_path / "out")
    )
    steps = ((after - before) * 16).reshape(64, 64)
    assert weight.exact_redone > 3000
    # Half a step stays where it was, one and a half go one step: but where the grid ends before.
    assert torch.equal(steps[0::2], torch.zeros(32, 64, dtype=torch.float64))
    assert set(steps[1::2].unique().tolist()) == {-1.0, 0.0}
