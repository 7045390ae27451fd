"""The proof of dithered merges: right ones are exact, and every way of being wrong is seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.files import digests
from lorasmith.merging.merge import merge
from lorasmith.proving.weights.dither import make_dither, philox
from lorasmith.proving.weights.prove import prove
from tests.merging.numbers.philox import philox as philox_of_the_paper
from tests.merging.numbers.philox import threshold
from tests.proving.claims import claim, entries
from tests.proving.small import (
    FORMATS,
    Tensors,
    adapter_tensors,
    add,
    base_tensors,
    factors,
    fractions,
    module,
    product,
    right_merge,
    write_adapter,
    write_model,
)
from tests.tiny import save_adapter, save_base

SEED = 3


def dither_fraction(x: Fraction, share: Fraction, dtype: torch.dtype) -> float:
    """The rule by rational numbers alone: |x| up if it lies above its threshold in its cell."""
    bits, least, _ = FORMATS[dtype]
    size = abs(x)
    if not size:
        return 0.0
    exponent = math.floor(math.log2(size))
    exponent += (Fraction(2) ** (exponent + 1) <= size) - (Fraction(2) ** exponent > size)
    unit = Fraction(2) ** (max(exponent, least) - bits + 1)
    below = size // unit
    return math.copysign(float((below + (size / unit - below > share)) * unit), x)


def dithered_merge(base: Tensors, adapter: Tensors, dtype: torch.dtype, *, seed: int = SEED) -> Tensors:
    """The right merge with s = 2, where every tensor that the adapter changes is dithered."""
    merged = right_merge(base, [(adapter, 2.0)], dtype)
    for name in merged:
        path = name.removesuffix(".weight")
        if f"base_model.model.{path}.lora_A.weight" not in adapter:
            continue
        exact = add((Fraction(1), fractions(base[name])), (Fraction(2), product(*factors(adapter, path))))
        width = len(exact[0])
        merged[name] = torch.tensor(
            [
                [
                    dither_fraction(x, threshold(seed, name, row * width + col), dtype)
                    for col, x in enumerate(values)
                ]
                for row, values in enumerate(exact)
            ],
            dtype=torch.float64,
        ).to(dtype)
    return merged


def folders(place: Path) -> tuple[Path, Path]:
    return write_model(place / "base", base_tensors()), write_adapter(place / "adapter", adapter_tensors())


def test_the_stream_is_the_papers() -> None:
    counters, key = np.array([0, 1, 5, 2**40]), (0x0123456789ABCDEF, 0xFEDCBA9876543210)
    found = philox(counters, key)
    for row, counter in zip(found, counters, strict=True):
        assert row.tolist() == philox_of_the_paper([int(counter) + 1, 0, 0, 0], list(key))
    whole = make_dither(SEED, "x", 7).rows(3, 9)
    alone = make_dither(SEED, "x", 7).shares(np.repeat(np.arange(3, 9), 7), np.tile(np.arange(7), 6))
    wanted = [float(threshold(SEED, "x", element)) for element in range(21, 63)]
    assert whole.reshape(-1).tolist() == alone.tolist() == wanted


@pytest.mark.parametrize("dtype", sorted(FORMATS, key=str))
def test_a_right_merge_is_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    merged = write_model(tmp_path / "merged", dithered_merge(base_tensors(), adapter_tensors(), dtype))
    assert prove(base, adapter, merged).grade == "different", "it is not rounded to nearest"
    precision = {torch.float32: "float32", torch.float16: "float16"}.get(dtype, "base")
    claim(base, [adapter], merged, rounding="dithered", seed=SEED, precision=precision)
    proof = prove(base, adapter, merged)
    assert (proof.grade, proof.rounding, proof.bound_ulps, proof.differences) == ("exact", "dithered", 0, [])


def off_by_one(tensors: Tensors) -> None:
    tensors[f"{module(0, 'up_proj')}.weight"].view(torch.int16)[7, 5] += 1


def swapped_rows(tensors: Tensors) -> None:
    tensors[f"{module(0, 'k_proj')}.weight"][[2, 3]] = tensors[f"{module(0, 'k_proj')}.weight"][[3, 2]]


def nearest_instead(tensors: Tensors) -> None:
    name = f"{module(1, 'down_proj')}.weight"
    tensors[name] = right_merge(base_tensors(), [(adapter_tensors(), 2.0)])[name]


def untouched_moved(tensors: Tensors) -> None:
    tensors["model.layers.1.norm.weight"].view(torch.int16)[4] += 1


@pytest.mark.parametrize("plant", [off_by_one, swapped_rows, nearest_instead, untouched_moved])
def test_what_is_wrong_is_seen(plant: Callable[[Tensors], None], tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    tensors = dithered_merge(base_tensors(), adapter_tensors(), torch.bfloat16)
    plant(tensors)
    merged = write_model(tmp_path / "merged", tensors)
    claim(base, [adapter], merged, rounding="dithered", seed=SEED)
    proof = prove(base, adapter, merged)
    assert proof.grade == "different"
    assert proof.differences


def test_the_seed_belongs_to_the_claim(tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    tensors = dithered_merge(base_tensors(), adapter_tensors(), torch.bfloat16, seed=SEED + 1)
    merged = write_model(tmp_path / "merged", tensors)
    claim(base, [adapter], merged, rounding="dithered", seed=SEED)
    assert prove(base, adapter, merged).grade == "different"


def test_a_calibrated_merge_is_exact_where_it_only_dithered(tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    tensors = right_merge(base_tensors(), [(adapter_tensors(), 2.0)])
    dithered = dithered_merge(base_tensors(), adapter_tensors(), torch.bfloat16)
    for layer in range(2):
        name = f"{module(layer, 'k_proj')}.weight"
        tensors[name] = dithered[name]
    tensors[f"{module(0, 'q_proj')}.weight"].view(torch.int16)[:, 3] += 2
    merged = write_model(tmp_path / "merged", tensors)
    claims: dict[str, Any] = {"rounding": "calibrated", "seed": SEED, "tensors": entries(dithered="k_proj")}
    claim(base, [adapter], merged, **claims)
    proof = prove(base, adapter, merged)
    assert (proof.grade, proof.bound_ulps) == ("bounded", 2)
    tensors[f"{module(0, 'k_proj')}.weight"].view(torch.int16)[1, 1] += 1
    merged = write_model(tmp_path / "off", tensors)
    claim(base, [adapter], merged, **claims)
    assert prove(base, adapter, merged).grade == "different"


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "use_dora": True}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}),
        ("qwen3-moe", {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]}),
    ],
    ids=["plain", "dora", "embedding", "dora-columns", "experts"],
)
@pytest.mark.parametrize("precision", ["base", "float32"])
def test_what_the_merge_writes_is_proved(
    architecture: str, config: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", architecture, dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, **config)
    merge(base, adapter, tmp_path / "out", rounding="dithered", seed=SEED, precision=precision)
    proof = prove(base, adapter, tmp_path / "out")
    assert (proof.grade, proof.rounding) == ("exact", "dithered"), proof.findings
    file = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(file)
    moved = next(one for one in proof.tensors if one.rounding == "dithered" and one.name in tensors)
    kind = torch.int16 if precision == "base" else torch.int32
    tensors[moved.name].view(kind).reshape(-1)[-1] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert digests.digest_folder(tmp_path / "out", rehash=True)
    again = prove(base, adapter, tmp_path / "out")
    assert again.grade == "different"
    assert next(one for one in again.tensors if one.name == moved.name).wrong == 1
