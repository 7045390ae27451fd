"""Dithered rounding follows its rule to the last bit, is unbiased, and is the same however it is computed."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lorasmith.errors import CheckpointError, UsageError
from lorasmith.files.digests import digest_folder
from lorasmith.merging import disk, writers
from lorasmith.merging.merge import merge
from lorasmith.merging.numbers.dither import ThresholdStream, dither_expansion, dither_reals
from lorasmith.merging.numbers.exact import dither_rational
from lorasmith.merging.numbers.rounding import TARGETS
from tests.merging.numbers.philox import philox, threshold
from tests.merging.numbers.test_rounding import FORMATS, edges
from tests.merging.planted import NAMES, PREFIX, plant, tensors_of
from tests.merging.reference import merged_value, nearest
from tests.tiny import save_adapter, save_base


def neighbour(value: float, dtype: str, direction: int) -> float:
    """The next number of a format towards larger (1) or smaller (-1) sizes; `value` ≥ 0 is one."""
    native = TARGETS[dtype].native
    width = torch.int32 if dtype == "F32" else torch.int16
    bits = torch.tensor([value], dtype=native).view(width) + direction
    return float(bits.view(native).double()[0])


def dithered(value: Fraction, share: Fraction, dtype: str) -> float:
    """The rule of the module's head, with the neighbours found by rounding to nearest."""
    size = abs(value)
    near = nearest(size, dtype)
    below = near if Fraction(near) <= size else neighbour(near, dtype, -1)
    above = neighbour(below, dtype, 1)
    limit = Fraction(below) + share * (Fraction(above) - Fraction(below))
    result = above if size > limit else below
    return -result if value < 0 else result


def test_the_stream_is_philox_as_published() -> None:
    # Known answers that the authors publish with their code (Random123, kat_vectors, philox4x64 10).
    assert philox([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    for first, count in ((0, 40), (1, 1), (13, 21), (8 * 2**30 - 3, 9)):
        found = ThresholdStream(7, "model.layers.0.weight").take(first, count)
        wanted = [threshold(7, "model.layers.0.weight", first + place) for place in range(count)]
        assert [Fraction(int(number), 1 << 25) for number in found] == wanted


def test_streams_differ_by_seed_and_name() -> None:
    streams = [ThresholdStream(seed, name).take(0, 1000) for seed in (0, 1) for name in ("a", "b")]
    for place, one in enumerate(streams):
        for other in streams[:place]:
            assert abs(float(np.corrcoef(one, other)[0, 1])) < 0.15  # 5 standard errors of 1000 pairs


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("number", [1, (1 << 24) + 1, (1 << 25) - 1, 12345671])
def test_edges_follow_the_rule(dtype: str, number: int) -> None:
    target, share = TARGETS[dtype], Fraction(number, 1 << 25)
    step = 2.0 ** (1 - target.precision)
    at_threshold = [1 + step * float(share), -(3 + 2 * step * float(share))]
    values = np.array(edges(dtype) + at_threshold)
    values = values[np.abs(values) <= target.largest]
    with_limit = [v for v in values if abs(v) < target.largest]
    expected = [dithered(Fraction(value), share, dtype) for value in with_limit]
    draws = np.full(len(with_limit), number)
    found = dither_reals(np.array(with_limit), draws, target)
    assert found.tolist() == expected
    assert [dither_rational(Fraction(v), number, target)[0] for v in with_limit] == expected
    assert dither_reals(np.array([target.largest, target.largest * (1 + step)]), draws[:2], target)[0] == (
        target.largest
    )


@pytest.mark.parametrize("dtype", FORMATS)
@settings(max_examples=150, deadline=None)
@given(
    mantissa=st.integers(-(2**53), 2**53),
    exponent=st.integers(-75, -40),
    low=st.integers(-(2**20), 2**20),
    number=st.integers(0, 2**24 - 1),
)
def test_any_sum_follows_the_rule(dtype: str, mantissa: int, exponent: int, low: int, number: int) -> None:
    high = mantissa * 2.0**exponent
    rest = low * 2.0**-21 * math.ulp(high)
    share = 2 * number + 1
    expected = dithered(Fraction(high) + Fraction(rest), Fraction(share, 1 << 25), dtype)
    found, _ = dither_expansion(np.array([high]), np.array([rest]), np.array([share]), TARGETS[dtype])
    assert found[0] == expected
    assert dither_rational(Fraction(high) + Fraction(rest), share, TARGETS[dtype])[0] == expected


@pytest.mark.parametrize("low_bits", [False, True], ids=["random", "few-bits"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_every_element_of_a_merge_follows_the_rule(
    tmp_path: Path, stored: torch.dtype, precision: str, low_bits: bool
) -> None:
    base, adapter = plant(tmp_path, stored, low_bits=low_bits)
    record = merge(base, adapter, tmp_path / "out", precision=precision, rounding="dithered", seed=5)
    dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[precision]
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    factors = load_file(adapter / "adapter_model.safetensors")
    assert (record.rounding, record.seed) == ("dithered", 5)
    for result in record.tensors[:1]:
        weights = before[result.name].double().tolist()
        up = factors[PREFIX + result.name.replace(".weight", ".lora_B.weight")].double().tolist()
        down = factors[PREFIX + result.name.replace(".weight", ".lora_A.weight")].double().T.tolist()
        for row in range(32):
            for col in range(32):
                value = merged_value(weights[row][col], [(2.0, 1.0, up[row], down[col])])
                expected = dithered(value, threshold(5, result.name, 32 * row + col), dtype)
                assert after[result.name][row, col].double().item() == expected, (row, col)
    for name in set(before) - {result.name for result in record.tensors}:
        assert torch.equal(after[name], before[name].to(NAMES[dtype])), name


def test_an_element_on_the_grid_never_moves(tmp_path: Path) -> None:
    """Rows of B that are zero leave their rows of the weight alone, whatever the seed."""
    base, adapter = plant(tmp_path, torch.bfloat16, low_bits=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    before = tensors_of(base)[name][4]
    for seed in range(3):
        merge(base, adapter, tmp_path / str(seed), rounding="dithered", seed=seed)
        assert torch.equal(tensors_of(tmp_path / str(seed))[name][4], before)


def test_the_mean_over_seeds_is_the_exact_value(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    name = "model.layers.1.self_attn.q_proj.weight"
    merge(base, adapter, tmp_path / "exact", precision="float32")
    exact = tensors_of(tmp_path / "exact")[name].double()
    total, runs = torch.zeros_like(exact), 12
    for seed in range(runs):
        merge(base, adapter, tmp_path / "out", rounding="dithered", seed=seed)
        total += tensors_of(tmp_path / "out")[name].double()
    step = torch.ldexp(torch.ones_like(exact), torch.frexp(exact)[1] - 8)
    error = (total / runs - exact) / step
    # The error of one draw has at most half a step of deviation; 1,024 elements, 12 draws, 5 deviations.
    assert abs(float(error.mean())) < 5 * 0.5 / math.sqrt(runs * error.numel())
    assert float(error.abs().max()) < 5 * 0.5 / math.sqrt(runs)


def test_golden_bytes() -> None:
    """The same bytes as when this was written: whoever changes the stream changes every dithered merge."""
    found = ThresholdStream(11, "model.layers.0.self_attn.q_proj.weight").take(0, 1024)
    result = dither_reals(np.arange(1024) / 4096 * (1 + 2.0**-11), found, TARGETS["BF16"]).astype("<f4")
    assert hashlib.sha256(found.astype("<i8").tobytes()).hexdigest()[:16] == "dccdf9917adcccff"
    assert hashlib.sha256(result.tobytes()).hexdigest()[:16] == "8fc1bbcee87da33e"


def test_neither_threads_nor_blocks_nor_shards_change_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = save_base(tmp_path / "one")
    many = save_base(tmp_path / "many", max_shard_size="30KB")
    adapter = save_adapter(tmp_path / "adapter", one)
    found = []
    for number, (threads, block, chunk) in enumerate(
        [(1, 1 << 17, 1 << 24), (2, 100, 1 << 12), (3, 7, 1 << 13)]
    ):
        monkeypatch.setattr(writers, "BLOCK_ELEMENTS", block)
        monkeypatch.setattr(disk, "BUFFER_BYTES", chunk)
        monkeypatch.setattr("os.sched_getaffinity", lambda _, count=threads: range(count))
        merge(one, adapter, tmp_path / f"out{number}", rounding="dithered", seed=1)
        found.append(digest_folder(tmp_path / f"out{number}"))
    assert len(set(found)) == 1
    merge(many, adapter, tmp_path / "sharded", rounding="dithered", seed=1)
    whole, parts = tensors_of(tmp_path / "out0"), tensors_of(tmp_path / "sharded")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    merge(one, adapter, tmp_path / "other", rounding="dithered", seed=2)
    assert digest_folder(tmp_path / "other") != found[0]


def test_beyond_the_largest_number_is_refused(tmp_path: Path) -> None:
    base, adapter = plant(tmp_path, torch.float32, low_bits=False)
    from safetensors.torch import save_file

    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][7, 7] = 65519.0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="beyond float16"):
        for seed in range(8):  # below the midpoint to infinity: up or down by the threshold
            merge(base, adapter, tmp_path / "out", precision="float16", rounding="dithered", seed=seed)


def test_an_unknown_rounding_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        merge(tmp_path, tmp_path, tmp_path / "out", rounding="up")
    assert all(name in str(caught.value.expected) for name in ("nearest", "dithered", "calibrated", "auto"))
