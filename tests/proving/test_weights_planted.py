"""Deliberate bugs in an otherwise right merge: each one must be graded `different`."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from lorasmith.proving.weights.prove import prove
from tests.proving.small import (
    SHAPES,
    Tensors,
    adapter_tensors,
    add,
    base_tensors,
    factors,
    fractions,
    module,
    product,
    right_merge,
    rounded,
    write_adapter,
    write_model,
)

RANKS = {module(0, "q_proj"): 2, module(1, "down_proj"): 4}
# "proj" and "k_pro" fit no module: a pattern is a whole number of parts of a path, at its end.
PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 4},
    "alpha_pattern": {"proj": 9, "k_pro": 7, "mlp": 3, "k_proj": 5, "self_attn.k_proj": 8},
}
Q0, K0, K1, UP0, DOWN1, TIES = (
    module(0, "q_proj"),
    module(0, "k_proj"),
    module(1, "k_proj"),
    module(0, "up_proj"),
    module(1, "down_proj"),
    module(1, "q_proj"),
)


def scales() -> dict[str, float]:
    """α/r per module under the patterns; `down_proj` matches in both layers."""
    result = {}
    for layer in range(2):
        for name in SHAPES:
            path = module(layer, name)
            rank = 4 if name == "down_proj" else RANKS.get(path, 3)
            result[path] = (5 if name == "k_proj" else 6) / rank
    return result


class Case:
    """A base, an adapter with patterns, and the right merge of the two."""

    def __init__(self) -> None:
        self.base = base_tensors()
        ranks = {**RANKS, module(0, "down_proj"): 4}
        self.adapter = adapter_tensors(ranks=ranks)
        self.right = right_merge(self.base, [(self.adapter, scales())])

    def merged(self, path: str, scale: float | None = None, **other: torch.Tensor) -> torch.Tensor:
        """One tensor, correctly rounded, with another scale or other factors than the right ones."""
        b, a = factors(self.adapter, path)
        change = product(other.get("b", b), other.get("a", a))
        base = fractions(self.base[f"{path}.weight"])
        factor = Fraction(scales()[path] if scale is None else scale)
        return rounded(add((Fraction(1), base), (factor, change)), torch.bfloat16)

    def b(self, path: str) -> torch.Tensor:
        """lora_B of a module."""
        return factors(self.adapter, path)[0]

    def a(self, path: str) -> torch.Tensor:
        """lora_A of a module."""
        return factors(self.adapter, path)[1]

    def update(self, path: str) -> torch.Tensor:
        """s·B·A in float64."""
        b, a = factors(self.adapter, path)
        return scales()[path] * b.double() @ a.double()

    def w(self, path: str) -> torch.Tensor:
        """The base's matrix in float64."""
        return self.base[f"{path}.weight"].double()


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def _truncate(exact: torch.Tensor) -> torch.Tensor:
    return (exact.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()


def _half_up(exact: torch.Tensor) -> torch.Tensor:
    return ((exact.float().view(torch.int32) + 0x8000) & -65536).view(torch.float32).bfloat16()


def _stochastic(exact: torch.Tensor) -> torch.Tensor:
    noise = torch.randint(
        0, 65536, exact.shape, generator=torch.Generator().manual_seed(5), dtype=torch.int32
    )
    return ((exact.float().view(torch.int32) + noise) & -65536).view(torch.float32).bfloat16()


Plant = Callable[[Case, Tensors], object]
PLANTS: dict[str, Plant] = {}


def plant(name: str) -> Callable[[Plant], Plant]:
    """Enter a bug into the table; it changes the right tensors in place."""

    def enter(function: Plant) -> Plant:
        PLANTS[name] = function
        return function

    return enter


def put(path: str, value: Callable[[Case], torch.Tensor]) -> Plant:
    """A bug that is another value of one matrix."""

    def change(case: Case, merged: Tensors) -> None:
        merged[f"{path}.weight"] = value(case)

    return change


PLANTS |= {
    "alpha not divided by r": put(UP0, lambda c: c.merged(UP0, 6.0)),
    "alpha over root r": put(UP0, lambda c: c.merged(UP0, 6 / math.sqrt(3))),
    "r over alpha": put(UP0, lambda c: c.merged(UP0, 0.5)),
    "scale one": put(UP0, lambda c: c.merged(UP0, 1.0)),
    "applied twice": put(UP0, lambda c: c.merged(UP0, 4.0)),
    "subtracted": put(UP0, lambda c: c.merged(UP0, -2.0)),
    "scale a millionth too large": put(TIES, lambda c: c.merged(TIES, 2.000002)),
    "rank pattern ignored": put(Q0, lambda c: c.merged(Q0, 6 / 3)),
    "alpha pattern ignored": put(K0, lambda c: c.merged(K0, 6 / 3)),
    "pattern of another layer": put(TIES, lambda c: c.merged(TIES, 6 / 2)),
    "update transposed": put(K0, lambda c: c.merged(K0, b=c.a(K0).T, a=c.b(K0).T)),
    "update of the neighbour": put(
        K0,
        lambda c: c.merged(K0, b=c.b(K1), a=c.a(K1)),
    ),
    "factors reshaped, not transposed": put(K0, lambda c: c.merged(K0, b=c.a(K0).reshape(12, 3))),
    "last rank forgotten": put(UP0, lambda c: c.merged(UP0, b=c.b(UP0) * torch.tensor([1, 1, 0]))),
    "factors rounded to bfloat16": put(
        UP0,
        lambda c: c.merged(UP0, b=c.b(UP0).bfloat16(), a=c.a(UP0).bfloat16()),
    ),
    "update rounded before it is added": put(UP0, lambda c: c.w(UP0).bfloat16() + c.update(UP0).bfloat16()),
    "half up, not half to even": put(TIES, lambda c: _half_up(c.w(TIES) + c.update(TIES))),
    "rounded twice, through float32": put(TIES, lambda c: (c.w(TIES) + c.update(TIES)).float().bfloat16()),
    "truncated": put(UP0, lambda c: _truncate(c.w(UP0) + c.update(UP0))),
    "rounded at random": put(UP0, lambda c: _stochastic(c.w(UP0) + c.update(UP0))),
    "update dropped": put(DOWN1, lambda c: c.base[f"{DOWN1}.weight"]),
    "base of another seed": put(UP0, lambda c: (base_tensors(9)[f"{UP0}.weight"] + c.update(UP0)).bfloat16()),
    "update one row down": put(UP0, lambda c: (c.w(UP0) + c.update(UP0).roll(1, 0)).bfloat16()),
    "update one column on": put(UP0, lambda c: (c.w(UP0) + c.update(UP0).roll(1, 1)).bfloat16()),
    "update absolute": put(UP0, lambda c: (c.w(UP0) + c.update(UP0).abs()).bfloat16()),
    "only the update": put(UP0, lambda c: c.update(UP0).bfloat16()),
    "magnitude normalised": put(
        UP0, lambda c: torch.nn.functional.normalize(c.w(UP0) + c.update(UP0)).bfloat16()
    ),
}


@plant("last block skipped")
def _(case: Case, merged: Tensors) -> None:
    merged[f"{UP0}.weight"][-2:] = case.base[f"{UP0}.weight"][-2:]


@plant("last column skipped")
def _(case: Case, merged: Tensors) -> None:
    merged[f"{UP0}.weight"][:, -1] = case.base[f"{UP0}.weight"][:, -1]


@plant("rows one off")
def _(case: Case, merged: Tensors) -> None:
    merged[f"{UP0}.weight"] = merged[f"{UP0}.weight"].roll(1, 0)


@plant("two tensors swapped")
def _(case: Case, merged: Tensors) -> None:
    merged[f"{Q0}.weight"], merged[f"{K0}.weight"] = merged[f"{K0}.weight"], merged[f"{Q0}.weight"]


@plant("layers swapped")
def _(case: Case, merged: Tensors) -> None:
    for name in SHAPES:
        a, b = f"{module(0, name)}.weight", f"{module(1, name)}.weight"
        merged[a], merged[b] = merged[b], merged[a]


@plant("nothing merged")
def _(case: Case, merged: Tensors) -> None:
    merged.update(case.base)


@plant("one element an ulp up")
def _(case: Case, merged: Tensors) -> None:
    _bits(merged[f"{UP0}.weight"])[7, 5] += 1


@plant("one element an ulp down in an untouched tensor")
def _(case: Case, merged: Tensors) -> None:
    _bits(merged["model.embed_tokens.weight"])[19, 11] -= 1


@plant("sign of a zero in an untouched tensor")
def _(case: Case, merged: Tensors) -> None:
    merged["model.layers.0.norm.weight"][3] = 0.0


@plant("integer buffer off by one")
def _(case: Case, merged: Tensors) -> None:
    merged["model.positions"][4] += 1


@plant("integer buffer cast")
def _(case: Case, merged: Tensors) -> None:
    merged["model.positions"] = merged["model.positions"].bfloat16()


@plant("integer buffer narrowed")
def _(case: Case, merged: Tensors) -> None:
    merged["model.positions"] = merged["model.positions"].int()


@plant("a tensor missing")
def _(case: Case, merged: Tensors) -> None:
    del merged["model.layers.1.norm.weight"]


@plant("a tensor too many")
def _(case: Case, merged: Tensors) -> None:
    merged["lm_head.weight"] = merged["model.embed_tokens.weight"].clone()


@plant("factors left in the model")
def _(case: Case, merged: Tensors) -> None:
    merged[f"{Q0}.lora_A.weight"] = factors(case.adapter, Q0)[1]


@plant("names with PEFT's prefix")
def _(case: Case, merged: Tensors) -> None:
    for name in list(merged):
        merged[f"base_model.model.{name}"] = merged.pop(name)


@plant("one tensor in float32")
def _(case: Case, merged: Tensors) -> None:
    merged[f"{UP0}.weight"] = merged[f"{UP0}.weight"].float()


@plant("one untouched tensor in float16")
def _(case: Case, merged: Tensors) -> None:
    merged["model.layers.1.norm.weight"] = merged["model.layers.1.norm.weight"].half()


@plant("all float32, but rounded to bfloat16 first")
def _(case: Case, merged: Tensors) -> None:
    for name, tensor in merged.items():
        merged[name] = tensor.float() if tensor.is_floating_point() else tensor


@plant("another shape")
def _(case: Case, merged: Tensors) -> None:
    merged[f"{UP0}.weight"] = merged[f"{UP0}.weight"].reshape(12, 16)


@plant("a vector made a matrix")
def _(case: Case, merged: Tensors) -> None:
    merged["model.layers.1.norm.weight"] = merged["model.layers.1.norm.weight"][None]


@plant("not a number")
def _(case: Case, merged: Tensors) -> None:
    merged[f"{UP0}.weight"][0, 0] = math.nan


@plant("infinite")
def _(case: Case, merged: Tensors) -> None:
    merged[f"{UP0}.weight"][15, 11] = -math.inf


@plant("not a number in an untouched tensor")
def _(case: Case, merged: Tensors) -> None:
    merged["model.embed_tokens.weight"][0, 0] = math.nan


@plant("norms plus one")
def _(case: Case, merged: Tensors) -> None:
    merged["model.layers.1.norm.weight"] += 1


@plant("tiny numbers flushed to zero")
def _(case: Case, merged: Tensors) -> None:
    weight = merged[f"{UP0}.weight"]
    weight[weight.abs() == weight.abs().min()] = 0.0


@pytest.fixture(scope="module")
def folders(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("planted")
    base = write_model(place / "base", case.base)
    return base, write_adapter(place / "adapter", case.adapter, **PATTERNS)


def test_without_a_bug_the_merge_is_exact(case: Case, folders: tuple[Path, Path], tmp_path: Path) -> None:
    proof = prove(*folders, write_model(tmp_path / "merged", case.right))
    assert proof.grade == "exact", proof.findings
    assert proof.adapter_tensors_used == proof.adapter_tensors_total == 16
    assert sum(tensor.wrong for tensor in proof.tensors) == 0
    assert proof.elements_checked == sum(tensor.numel() for tensor in case.right.values())


@pytest.mark.parametrize("name", PLANTS)
def test_every_planted_bug_is_different(
    name: str, case: Case, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    merged = {name: tensor.clone() for name, tensor in case.right.items()}
    PLANTS[name](case, merged)
    proof = prove(*folders, write_model(tmp_path / "merged", merged))
    assert proof.grade == "different"
    assert any(tensor.wrong for tensor in proof.tensors) or any(f.severity == "error" for f in proof.findings)


def test_enough_bugs_were_tried() -> None:
    assert len(PLANTS) >= 50
