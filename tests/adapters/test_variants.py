"""Every variant on every architecture: the merged model computes what the base with its adapter computes.

The reference is PEFT's own forward with the adapter beside the base, in float32. Its merge is none: it puts
two different updates into one tensor where embedding and head are tied.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lorasmith.adapters.registry import VARIANTS
from lorasmith.merging.merge import merge
from lorasmith.proving.weights.prove import prove
from tests.adapters.cases import CASES, Case
from tests.tiny import load_model, save_adapter, save_base


def logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 280, (2, 20), generator=generator)
    ids[0, :6] = torch.tensor([3, 7, 9, 250, 4, 3])
    with torch.no_grad():
        return model(ids).logits.double()


def unmerged_logits(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(load_model(base), adapter).eval())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bases")

    def get(name: str) -> Path:
        place = folder / name
        return place if place.exists() else save_base(place, name, dtype=torch.float32, max_shard_size="40KB")

    return get


def compare(base: Path, adapter: Path, merged: Path) -> None:
    """Merged logits against PEFT's with the adapter beside the base."""
    alone, expected, found = (
        logits(load_model(base)),
        unmerged_logits(base, adapter),
        logits(load_model(merged)),
    )
    assert (expected - alone).std() > 0.01 * alone.std(), "an adapter that does nothing tests nothing"
    # Both are float32 forwards of one function: rounding differs in the last bits of each layer.
    assert (found - expected).abs().max() < 2e-4 * expected.std()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_merged_computes_what_the_adapter_does(tmp_path: Path, bases: Any, case: Case) -> None:
    base = bases(case.architecture)
    adapter = save_adapter(tmp_path / "adapter", base, std=case.std, **case.config)
    record = merge(base, adapter, tmp_path / "out")
    compare(base, adapter, tmp_path / "out")
    assert prove(base, adapter, tmp_path / "out").grade == "exact"
    changed = [tensor.name for tensor in record.tensors if tensor.changed]
    for fragment in case.changed:
        assert any(fragment in name for name in changed), f"{fragment} is not among {changed}"
    used = {name for tensor in record.tensors for name in tensor.adapter_tensors}
    stored = set(load_file(adapter / "adapter_model.safetensors"))
    assert used == {name for name in stored if not name.endswith("base_layer.weight")}
    assert record.untied == case.untied
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("tie_word_embeddings") is False or not case.untied


def test_every_entry_of_the_registry_has_a_case() -> None:
    assert {variant.name for variant in VARIANTS} == {entry for case in CASES for entry in case.entries}


def test_the_names_of_cases_are_their_own() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)
