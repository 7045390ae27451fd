"""Deliberate bugs in merges of the rarer variants; each starts from PEFT's right merge in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasmith.proving.weights.prove import prove
from tests.proving.test_weights_variants import Tensors, merge_right, write_tensors
from tests.tiny import save_adapter, save_base

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"use_dora": True}),
    "dora-embedding": ("llama", {"use_dora": True, "target_modules": ["embed_tokens"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens"]}),
    "conv1d": ("gpt2", {"bias": "all"}),
    "lora-bias": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]}),
    "tokens": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 290, 7]}},
    ),
    "experts": (
        "qwen3-moe",
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "stacked": (
        "llama4-text",
        {"target_modules": [], "target_parameters": ["feed_forward.experts.down_proj"]},
    ),
}

P = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"
C_PROJ = "transformer.h.0.attn.c_proj"
EXPERTS = "model.layers.1.mlp.experts"
STACK = "model.layers.0.feed_forward.experts"
S = 2.0
"""α/r of every adapter here."""


class Ready:
    """Tensors of base and adapter, in float64."""

    def __init__(self, base: Path, adapter: Path, merged: Path) -> None:
        self.folders = base, adapter
        self.base = {k: t.double() for k, t in load_file(base / "model.safetensors").items()}
        self.adapter = {k: t.double() for k, t in load_file(adapter / "adapter_model.safetensors").items()}
        self.right = load_file(merge_right(base, adapter, merged) / "model.safetensors")
        self.merged = merged

    def a(self, path: str) -> torch.Tensor:
        """lora_A."""
        return self.adapter[f"{P}{path}.lora_A.weight"]

    def b(self, path: str) -> torch.Tensor:
        """lora_B."""
        return self.adapter[f"{P}{path}.lora_B.weight"]

    def embedding(self) -> torch.Tensor:
        """s·(BA)ᵀ of the embedding."""
        a, b = (self.adapter[f"{P}{EMBED}.lora_embedding_{x}"] for x in "AB")
        return S * (b @ a).T

    def v(self) -> torch.Tensor:
        """W + s·BA of the query projection."""
        return self.base[f"{Q}.weight"] + S * self.b(Q) @ self.a(Q)

    def m(self, path: str = Q) -> torch.Tensor:
        """DoRA's magnitudes."""
        return self.adapter[f"{P}{path}.lora_magnitude_vector"]

    def by_expert(self, expert: int, rows: slice, *, a: Any = None, b: Any = None) -> torch.Tensor:
        """Δ of rows of gate_up of one expert, with other layouts of the factors than the right ones."""
        path = f"{EXPERTS}.base_layer"
        whole_a, whole_b = self.a(path), self.b(path)
        part_a = whole_a.reshape(4, -1, whole_a.shape[1])[expert] if a is None else a(whole_a)[expert]
        part_b = whole_b.reshape(len(whole_b), -1, 4)[:, :, expert] if b is None else b(whole_b)[:, :, expert]
        return S * (part_b @ part_a)[rows]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ready]:
    place = tmp_path_factory.mktemp("variants")
    made: dict[str, Ready] = {}

    def make(name: str) -> Ready:
        if name not in made:
            architecture, config = VARIANTS[name]
            base = save_base(place / f"{name}-base", architecture)
            adapter = save_adapter(place / f"{name}-adapter", base, **config)
            made[name] = Ready(base, adapter, place / f"{name}-merged")
        return made[name]

    return make


def value(name: str, compute: Callable[[Ready], torch.Tensor]) -> Callable[[Ready, Tensors], None]:
    """A bug that is another value of one tensor."""

    def plant(r: Ready, merged: Tensors) -> None:
        merged[name] = compute(r).float().contiguous()

    return plant


def swap(one: str, other: str) -> Callable[[Ready, Tensors], None]:
    """A bug that mixes two tensors up."""

    def plant(r: Ready, merged: Tensors) -> None:
        merged[one], merged[other] = merged[other], merged[one]

    return plant


def rows(r: Ready, *order: int) -> torch.Tensor:
    """The embedding with its trained rows written to other places."""
    delta = r.adapter[f"{P}{EMBED}.token_adapter.trainable_tokens_delta"]
    changed = r.base[f"{EMBED}.weight"].clone()
    changed[list(order)] = delta
    return changed


def expert(e: int, part: str) -> str:
    """Name of one expert's matrix."""
    return f"{EXPERTS}.{e}.{part}.weight"


GATE, UP = slice(0, 24), slice(24, 48)

PLANTS: dict[str, tuple[str, Callable[[Ready, Tensors], None]]] = {
    "magnitude ignored": ("dora", value(f"{Q}.weight", lambda r: r.v())),
    "norm of the base": (
        "dora",
        value(
            f"{Q}.weight", lambda r: r.m()[:, None] / r.base[f"{Q}.weight"].norm(dim=1, keepdim=True) * r.v()
        ),
    ),
    "norm over the other axis": (
        "dora",
        value(f"{Q}.weight", lambda r: r.m()[:, None] / r.v().norm(dim=0, keepdim=True) * r.v()),
    ),
    "only the update scaled": (
        "dora",
        value(
            f"{Q}.weight",
            lambda r: (
                r.base[f"{Q}.weight"]
                + r.m()[:, None] / r.v().norm(dim=1, keepdim=True) * (r.v() - r.base[f"{Q}.weight"])
            ),
        ),
    ),
    "norm without a root": (
        "dora",
        value(f"{Q}.weight", lambda r: r.m()[:, None] / r.v().square().sum(1, keepdim=True) * r.v()),
    ),
    "norm in float32": (
        "dora",
        value(
            f"{Q}.weight",
            lambda r: (r.m()[:, None] / r.v().norm(dim=1, keepdim=True)).float() * r.v().float(),
        ),
    ),
    "norm per row of an embedding": (
        "dora-embedding",
        value(
            f"{EMBED}.weight",
            lambda r: torch.nn.functional.normalize(r.base[f"{EMBED}.weight"] + r.embedding()) * r.m(EMBED),
        ),
    ),
    "magnitude of an embedding ignored": (
        "dora-embedding",
        value(f"{EMBED}.weight", lambda r: r.base[f"{EMBED}.weight"] + r.embedding()),
    ),
    "embedding not scaled": (
        "embedding",
        value(f"{EMBED}.weight", lambda r: r.base[f"{EMBED}.weight"] + r.embedding() / S),
    ),
    "embedding dropped": ("embedding", value(f"{EMBED}.weight", lambda r: r.base[f"{EMBED}.weight"])),
    "embedding's rows shifted": (
        "embedding",
        value(f"{EMBED}.weight", lambda r: r.base[f"{EMBED}.weight"] + r.embedding().roll(1, 0)),
    ),
    "last rows of the embedding skipped": (
        "embedding",
        value(
            f"{EMBED}.weight",
            lambda r: torch.cat([r.right[f"{EMBED}.weight"][:-1].double(), r.base[f"{EMBED}.weight"][-1:]]),
        ),
    ),
    "head changed with the embedding": (
        "embedding",
        value("lm_head.weight", lambda r: r.base["lm_head.weight"] + r.embedding()),
    ),
    "Conv1D taken for a linear layer": (
        "conv1d",
        value(f"{C_PROJ}.weight", lambda r: r.base[f"{C_PROJ}.weight"] + S * r.b(C_PROJ) @ r.a(C_PROJ)),
    ),
    "bias dropped": ("conv1d", value(f"{C_PROJ}.bias", lambda r: r.base[f"{C_PROJ}.bias"])),
    "bias added, not replaced": (
        "conv1d",
        value(
            f"{C_PROJ}.bias", lambda r: r.base[f"{C_PROJ}.bias"] + r.adapter[f"{P}{C_PROJ}.base_layer.bias"]
        ),
    ),
    "bias of a norm dropped": (
        "conv1d",
        value("transformer.ln_f.bias", lambda r: r.base["transformer.ln_f.bias"]),
    ),
    "lora_B.bias dropped": ("lora-bias", value(f"{Q}.bias", lambda r: r.base[f"{Q}.bias"])),
    "lora_B.bias not scaled": (
        "lora-bias",
        value(f"{Q}.bias", lambda r: r.base[f"{Q}.bias"] + r.adapter[f"{P}{Q}.lora_B.bias"]),
    ),
    "saved module ignored": ("saved", value("model.norm.weight", lambda r: r.base["model.norm.weight"])),
    "saved embedding ignored": ("saved", value(f"{EMBED}.weight", lambda r: r.base[f"{EMBED}.weight"])),
    "saved module added": (
        "saved",
        value(
            "model.norm.weight", lambda r: r.base["model.norm.weight"] + r.adapter[f"{P}model.norm.weight"]
        ),
    ),
    "saved module through bfloat16": (
        "saved",
        value("model.norm.weight", lambda r: r.adapter[f"{P}model.norm.weight"].bfloat16()),
    ),
    "trained tokens dropped": ("tokens", value(f"{EMBED}.weight", lambda r: r.base[f"{EMBED}.weight"])),
    "trained tokens one row on": ("tokens", value(f"{EMBED}.weight", lambda r: rows(r, 6, 291, 8))),
    "trained tokens sorted": ("tokens", value(f"{EMBED}.weight", lambda r: rows(r, 5, 7, 290))),
    "trained tokens at the front": ("tokens", value(f"{EMBED}.weight", lambda r: rows(r, 0, 1, 2))),
    "experts swapped": ("experts", swap(expert(0, "gate_proj"), expert(1, "gate_proj"))),
    "gate and up swapped": ("experts", swap(expert(2, "gate_proj"), expert(2, "up_proj"))),
    "updates of gate and up swapped": (
        "experts",
        value(expert(2, "gate_proj"), lambda r: r.base[expert(2, "gate_proj")] + r.by_expert(2, UP)),
    ),
    "update of another expert": (
        "experts",
        value(expert(0, "up_proj"), lambda r: r.base[expert(0, "up_proj")] + r.by_expert(1, UP)),
    ),
    "A with experts fastest": (
        "experts",
        value(
            expert(1, "gate_proj"),
            lambda r: (
                r.base[expert(1, "gate_proj")]
                + r.by_expert(1, GATE, a=lambda a: a.reshape(-1, 4, a.shape[1]).transpose(0, 1))
            ),
        ),
    ),
    "B with experts slowest": (
        "experts",
        value(
            expert(1, "gate_proj"),
            lambda r: (
                r.base[expert(1, "gate_proj")]
                + r.by_expert(1, GATE, b=lambda b: b.reshape(len(b), 4, -1).transpose(1, 2))
            ),
        ),
    ),
    "one expert dropped": (
        "experts",
        value(expert(3, "down_proj"), lambda r: r.base[expert(3, "down_proj")]),
    ),
    "last of the stacked experts dropped": (
        "stacked",
        value(
            f"{STACK}.down_proj",
            lambda r: torch.cat(
                [r.right[f"{STACK}.down_proj"][:-1].double(), r.base[f"{STACK}.down_proj"][-1:]]
            ),
        ),
    ),
    "stacked experts in reverse": (
        "stacked",
        value(f"{STACK}.down_proj", lambda r: r.right[f"{STACK}.down_proj"].flip(0)),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_without_a_bug_each_is_exact(name: str, ready: Callable[[str], Ready]) -> None:
    r = ready(name)
    write_tensors(r.merged, r.right)
    assert prove(*r.folders, r.merged).grade == "exact"


@pytest.mark.parametrize("name", PLANTS)
def test_every_planted_bug_is_different(name: str, ready: Callable[[str], Ready]) -> None:
    variant, plant = PLANTS[name]
    r = ready(variant)
    merged = dict(r.right)
    plant(r, merged)
    write_tensors(r.merged, merged)
    proof = prove(*r.folders, r.merged)
    assert proof.grade == "different"
    changed = {key for key in merged if not torch.equal(merged[key], r.right[key])}
    assert {tensor.name for tensor in proof.tensors if tensor.wrong} == changed != set()
