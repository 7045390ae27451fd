"""What a quantized base is refused for: every part has to be there, of its type and its size, and used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorasmith.errors import CheckpointError
from lorasmith.quantized.open import open_base
from tests.quantized.cases import CASES, MODULE, random_weight
from tests.quantized.test_codecs import write

Damage = Callable[[dict[str, torch.Tensor]], None]


def _drop(leaf: str) -> Damage:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{MODULE}.{leaf}"]

    return damage


def _put(leaf: str, value: torch.Tensor) -> Damage:
    return lambda tensors: tensors.update({f"{MODULE}.{leaf}": value})


def _fill(leaf: str, value: float) -> Damage:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MODULE}.{leaf}"] = torch.full_like(tensors[f"{MODULE}.{leaf}"], value)

    return damage


DAMAGES: list[tuple[str, Damage, str]] = [
    ("nf4", _drop("weight.absmax"), "lacks its tensor .*absmax"),
    ("nf4", _drop("weight"), "lacks its tensor"),
    ("nf4", _put("weight.absmax", torch.ones(3)), "it has 3 elements"),
    ("nf4", _put("weight.quant_map", torch.linspace(-1, 1, 16)), "another table"),
    ("nf4", _put("weight.quant_state.bitsandbytes__nf4", torch.zeros(4, dtype=torch.uint8)), "not JSON"),
    ("nf4", _fill("weight.absmax", float("nan")), "NaN or infinite scales"),
    ("int8", _put("SCB", torch.ones(5)), "5 scales"),
    ("int8", _put("weight_format", torch.tensor(2, dtype=torch.uint8)), "tiled"),
    ("fp8 block", _drop("weight_scale_inv"), r"quantized: .*\(fp8\)"),
    ("fp8 block", _put("weight_scale_inv", torch.ones(7, 3)), "shape"),
    ("fp8 block", _fill("weight_scale_inv", float("inf")), "NaN or infinite scales"),
    ("nvfp4", _put("weight_global_scale", torch.zeros(1)), "no positive number"),
    ("nvfp4", _put("weight_zero_point", torch.zeros(4, dtype=torch.int8)), "no part of any weight"),
    ("int4 groups", _drop("weight_shape"), "lacks its tensor"),
    ("int4 groups", _put("weight_shape", torch.tensor([24, 999])), "4 or 8 bits"),
    ("gptq act-order", _put("g_idx", torch.full((128,), 9, dtype=torch.int32)), "it does not fit"),
    ("gptq", _put("qzeros", torch.zeros(3, 3, dtype=torch.int32)), "shape"),
    ("awq", _put("scales", torch.ones(4, 8, dtype=torch.float16)), "shape"),
    ("awq", _put("weight_scale_inv", torch.ones(1)), "no part of any weight"),
]


@pytest.mark.parametrize(("kind", "damage", "told"), DAMAGES, ids=[f"{k}: {t}" for k, _, t in DAMAGES])
def test_a_damaged_weight_is_one_message_that_names_the_tensor(
    kind: str, damage: Damage, told: str, tmp_path: Path
) -> None:
    made = CASES[kind](random_weight(24, 128))
    damage(made.tensors)
    folder = write(tmp_path / "model", made)
    with pytest.raises(CheckpointError, match=told) as caught:
        for weight in open_base(folder).decoded.values():
            weight.rows(0, 4)
    # Where nothing of it is a known weight, the config's word for the format is all there is to say.
    assert MODULE in str(caught.value) or "its config says" in str(caught.value)
    assert caught.value.remedy


def test_two_formats_may_stand_in_one_base_as_long_as_each_tensor_has_its_weight(tmp_path: Path) -> None:
    made = CASES["nf4"](random_weight(24, 128))
    other = CASES["fp8 channel"](random_weight(24, 128))
    moved = {name.replace("q_proj", "k_proj"): tensor for name, tensor in other.tensors.items()}
    made.tensors.update(moved)
    assert sorted(one.format for one in open_base(write(tmp_path / "model", made)).decoded.values()) == [
        "fp8",
        "nf4",
    ]
