"""Settings, adapters and bases that a proof cannot follow are refused, one message each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.errors import AdapterError, CheckpointError, InputError
from lorasmith.proving.weights.prove import prove
from tests.proving.claims import edit_config, folders
from tests.proving.small import (
    adapter_tensors,
    base_tensors,
    module,
    right_merge,
    write_adapter,
    write_model,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"r": 0}, "r is 0"),
        ({"r": 4}, "r = 4"),
        ({"rank_pattern": {"q_proj": 2}}, "r = 2"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"some_new_setting": 3}, "some_new_setting"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_B.bias"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base, adapter = folders(tmp_path)
    merged = write_model(tmp_path / "merged", right_merge(base_tensors(), [(adapter_tensors(), 2.0)]))
    edit_config(adapter, **changes)
    with pytest.raises(AdapterError) as error:
        prove(base, adapter, merged)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"base_model.model.{module(0, 'q_proj')}.lora_B.weight"), "no lora_B"),
        (lambda t: t.update({"base_model.model.x.lora_C.weight": torch.ones(1)}), "has no"),
        (lambda t: t.update({"stray": torch.ones(1)}), "stray"),
        (
            lambda t: t.update(
                {
                    "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(3, 12),
                    "base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": torch.ones(16, 3),
                }
            ),
            "layers.9",
        ),
        (
            lambda t: t.update(
                {f"base_model.model.{module(0, 'q_proj')}.lora_A.default.weight": torch.ones(1)}
            ),
            "adapter's name",
        ),
        (lambda t: t[f"base_model.model.{module(0, 'q_proj')}.lora_A.weight"].fill_(math.nan), "not finite"),
        (lambda t: t[f"base_model.model.{module(0, 'q_proj')}.lora_B.weight"].fill_(math.inf), "not finite"),
    ],
)
def test_adapter_tensors_without_a_place_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    base, _ = folders(tmp_path)
    merged = write_model(tmp_path / "merged", right_merge(base_tensors(), [(adapter_tensors(), 2.0)]))
    tensors = adapter_tensors()
    change(tensors)
    adapter = write_adapter(tmp_path / "changed", tensors)
    with pytest.raises(AdapterError) as error:
        prove(base, adapter, merged)
    assert message in str(error.value)


def test_bases_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    _, adapter = folders(tmp_path)
    merged = write_model(tmp_path / "merged", right_merge(base_tensors(), [(adapter_tensors(), 2.0)]))
    with pytest.raises(InputError):
        prove(tmp_path / "nowhere", adapter, merged)
    quantized = write_model(tmp_path / "quantized", base_tensors(), quantization_config={"bits": 4})
    with pytest.raises(CheckpointError, match="quantized"):
        prove(quantized, adapter, merged)
    tensors = base_tensors()
    tensors[f"{module(0, 'q_proj')}.weight"][0, 0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        prove(write_model(tmp_path / "nan", tensors), adapter, merged)
