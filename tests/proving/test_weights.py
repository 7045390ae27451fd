"""The proof as a person meets it: precisions, several adapters, what a record claims."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.errors import AdapterError, CheckpointError, InputError, UsageError
from lorasmith.files import digests
from lorasmith.proving.weights.prove import prove
from tests.proving.claims import claim, codes, entries, folders
from tests.proving.small import (
    Tensors,
    adapter_tensors,
    base_tensors,
    module,
    right_merge,
    write_adapter,
    write_model,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_of_base_and_merge(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = base_tensors(dtype=stored)
    base = write_model(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors())
    merged = right_merge(tensors, [(adapter_tensors(), 2.0)], dtype)
    proof = prove(base, adapter, write_model(tmp_path / "merged", merged))
    assert proof.grade == "exact", proof.findings
    assert proof.precision == ("base" if dtype == stored else str(dtype).removeprefix("torch."))
    kinds = {tensor.kind for tensor in proof.tensors}
    assert kinds == ({"merged", "copied"} if dtype == stored else {"merged", "cast", "copied"})


def test_float32_arithmetic_is_not_the_correctly_rounded_result(tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    tensors = right_merge(base_tensors(), [(adapter_tensors(), 2.0)], torch.float32)
    for layer in range(2):
        path = module(layer, "up_proj")
        factors = adapter_tensors()
        a, b = (factors[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
        tensors[f"{path}.weight"] = base_tensors()[f"{path}.weight"].float() + 2 * (b @ a)
    proof = prove(base, adapter, write_model(tmp_path / "merged", tensors))
    assert proof.grade == "different"
    assert codes(proof) == {"rounded-otherwise"}
    wrong = [tensor for tensor in proof.tensors if tensor.wrong]
    assert {tensor.name for tensor in wrong} == {f"{module(layer, 'up_proj')}.weight" for layer in range(2)}
    assert all(sum(tensor.ulps.values()) == tensor.wrong for tensor in wrong)


def test_differences_name_element_and_values(tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    tensors = right_merge(base_tensors(), [(adapter_tensors(), 2.0)])
    name = f"{module(1, 'down_proj')}.weight"
    right = float(tensors[name][4, 9])
    tensors[name].view(torch.int16)[4, 9] += 3
    proof = prove(base, adapter, write_model(tmp_path / "merged", tensors))
    (difference,) = proof.differences
    assert (difference.tensor, difference.index, difference.ulps) == (name, [4, 9], 3)
    assert (difference.found, difference.expected) == (float(tensors[name][4, 9]), right)


def test_several_adapters_are_weighted(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", base_tensors())
    one, two = adapter_tensors(1), adapter_tensors(2, ties=False)
    adapters = [write_adapter(tmp_path / "one", one), write_adapter(tmp_path / "two", two, use_rslora=True)]
    weights = [0.75, -0.3]
    # w·s of the second is a product of two float64 numbers: exact only as a rational.
    merged = _weighted([(one, 0.75 * 2.0), (two, (-0.3, 6 / math.sqrt(3)))])
    folder = write_model(tmp_path / "merged", merged)
    assert prove(base, adapters, folder, weights=weights).grade == "exact"
    assert prove(base, adapters[::-1], folder, weights=weights[::-1]).grade == "exact"
    assert prove(base, adapters, folder, weights=[0.75, 0.3]).grade == "different"
    assert prove(base, adapters, folder).grade == "different"
    with pytest.raises(UsageError, match="1 weights"):
        prove(base, adapters, folder, weights=[1.0])


def _weighted(adapters: list[tuple[Tensors, Any]]) -> Tensors:
    from fractions import Fraction

    from tests.proving.small import add, factors, fractions, product, rounded

    merged = base_tensors()
    for name, tensor in merged.items():
        path = name.removesuffix(".weight")
        if f"base_model.model.{path}.lora_A.weight" in adapters[0][0]:
            terms = []
            for tensors, scale in adapters:
                pair = scale if isinstance(scale, tuple) else (1.0, scale)
                terms.append((Fraction(pair[0]) * Fraction(pair[1]), product(*factors(tensors, path))))
            merged[name] = rounded(add((Fraction(1), fractions(tensor)), *terms), torch.bfloat16)
    return merged


def test_what_the_record_claims_is_checked(tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    merged = write_model(tmp_path / "merged", right_merge(base_tensors(), [(adapter_tensors(), 2.0)]))
    claim(base, [adapter], merged)
    proof = prove(base, adapter, merged)
    assert (proof.grade, proof.claimed, proof.findings) == ("exact", True, [])
    assert proof.merged_sha256 == digests.digest_folder(merged)
    claim(base, [adapter], merged, precision="float32")
    assert "wrong-dtype" in codes(prove(base, adapter, merged))
    claim(base, [adapter], merged)
    (merged / "tokenizer.json").write_text('{"changed": 1}')
    proof = prove(base, adapter, merged)
    assert proof.grade == "different"
    assert codes(proof) == {"record-disagrees", "tokenizer-differs"}


def test_weights_come_from_the_record(tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    merged = write_model(tmp_path / "merged", right_merge(base_tensors(), [(adapter_tensors(), 1.0)]))
    assert prove(base, adapter, merged).grade == "different"
    claim(base, [adapter], merged, adapter_weights=[0.5])
    assert prove(base, adapter, merged).grade == "exact"
    assert prove(base, adapter, merged, weights=[1.0]).grade == "different"


def test_an_unknown_rounding_is_never_a_pass(tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    merged = write_model(tmp_path / "merged", right_merge(base_tensors(), [(adapter_tensors(), 2.0)]))
    claim(base, [adapter], merged, rounding="upwards", seed=1)
    with pytest.raises(InputError, match="cannot check rounding 'upwards'"):
        prove(base, adapter, merged)
    claim(base, [adapter], merged, rounding="dithered")
    with pytest.raises(InputError, match="has no seed"):
        prove(base, adapter, merged)
    claim(base, [adapter], merged, rounding="calibrated", seed=0, tensors=entries(upwards="up_proj"))
    with pytest.raises(InputError, match="unknown rounding 'upwards'"):
        prove(base, adapter, merged)


def test_calibrated_is_bounded_and_only_where_the_adapter_acts(tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    tensors = right_merge(base_tensors(), [(adapter_tensors(), 2.0)])
    name = f"{module(0, 'up_proj')}.weight"
    tensors[name].view(torch.int16)[:, ::2] += 2
    merged = write_model(tmp_path / "merged", tensors)
    assert prove(base, adapter, merged).grade == "different"
    claim(base, [adapter], merged, rounding="calibrated", seed=0, tensors=entries())
    proof = prove(base, adapter, merged)
    assert (proof.grade, proof.bound_ulps) == ("bounded", 2)
    tensors[name].view(torch.int16)[3, 3] += 300
    merged = write_model(tmp_path / "far", tensors)
    claim(base, [adapter], merged, rounding="calibrated", seed=0, tensors=entries())
    assert prove(base, adapter, merged).grade == "different"
    tensors = right_merge(base_tensors(), [(adapter_tensors(), 2.0)])
    tensors["model.embed_tokens.weight"].view(torch.int16)[3, 3] += 1
    merged = write_model(tmp_path / "untouched", tensors)
    claim(base, [adapter], merged, rounding="calibrated", seed=0, tensors=entries())
    assert prove(base, adapter, merged).grade == "different"


def test_every_part_of_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Parts of a few rows each, so that every tensor here is cut, and one expert's matrix within itself.
    monkeypatch.setattr("lorasmith.proving.weights.check._READ_ELEMENTS", 30)
    monkeypatch.setattr("lorasmith.proving.weights.check._HANDED_OVER", 0)
    monkeypatch.setattr("lorasmith.proving.weights.quick._STEP_BYTES", 64)
    odd = {"model.experts": torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(2)).bfloat16()}
    base = write_model(tmp_path / "base", base_tensors() | odd)
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors())
    right = right_merge(base_tensors(), [(adapter_tensors(), 2.0)]) | odd
    for name, tensor in right.items():
        for corner in (0, tensor.numel() // 2, tensor.numel() - 1):
            changed = right | {name: tensor.clone()}
            changed[name].view(-1)[corner] = 3
            proof = prove(base, adapter, write_model(tmp_path / "merged", changed))
            assert proof.elements_checked == sum(tensor.numel() for tensor in right.values())
            index = [int(part[0]) for part in torch.unravel_index(torch.tensor([corner]), tensor.shape)]
            assert [(d.tensor, d.index) for d in proof.differences] == [(name, index)]


def test_scalars_empty_tensors_and_buffers(tmp_path: Path) -> None:
    odd = {
        "model.scale": torch.tensor(1.5, dtype=torch.bfloat16),
        "model.nothing": torch.empty(0, 12, dtype=torch.bfloat16),
        "model.mask": torch.tensor([-math.inf, 0.0, math.nan, -0.0], dtype=torch.float32),
        "model.flags": torch.tensor([True, False]),
        "model.experts": torch.randn(3, 5, 2, 4).bfloat16(),
    }
    base = write_model(tmp_path / "base", base_tensors() | odd)
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors())
    right = right_merge(base_tensors(), [(adapter_tensors(), 2.0)]) | odd
    proof = prove(base, adapter, write_model(tmp_path / "merged", right))
    assert proof.grade == "exact", proof.findings
    assert proof.tensors_checked == len(right)
    narrow = right_merge(base_tensors(), [(adapter_tensors(), 2.0)], torch.float32) | {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in odd.items()
    }
    proof = prove(base, adapter, write_model(tmp_path / "float32", narrow))
    assert (proof.grade, proof.precision) == ("exact", "float32"), proof.findings
    wrong = {name: tensor.clone() for name, tensor in right.items()}
    wrong["model.experts"][2, 4, 1, 3] = 7
    wrong["model.mask"][2] = 0
    proof = prove(base, adapter, write_model(tmp_path / "wrong", wrong))
    assert {tuple(d.index) for d in proof.differences} == {(2, 4, 1, 3), (2,)}


def test_float64_bases_are_not_guessed_at(tmp_path: Path) -> None:
    tensors = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in base_tensors().items()
    }
    base = write_model(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors())
    with pytest.raises(CheckpointError, match="float64"):
        prove(base, adapter, write_model(tmp_path / "merged", tensors))
    merged = right_merge(base_tensors(), [(adapter_tensors(), 2.0)], torch.float32)
    assert prove(base, adapter, write_model(tmp_path / "float32", merged)).grade == "exact"


def test_factors_too_small_for_float64_are_refused(tmp_path: Path) -> None:
    base, _ = folders(tmp_path)
    tensors = adapter_tensors()
    name = f"base_model.model.{module(0, 'q_proj')}.lora_A.weight"
    tensors[name] = tensors[name].double() * 2.0**-600
    adapter = write_adapter(tmp_path / "tiny", tensors)
    merged = write_model(tmp_path / "merged", right_merge(base_tensors(), [(adapter_tensors(), 2.0)]))
    with pytest.raises(AdapterError, match="holds numbers below"):
        prove(base, adapter, merged)
