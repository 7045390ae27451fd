"""Layer by layer gives what the whole model gives, whatever it hands to its layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorasmith.errors import CheckpointError
from lorasmith.models.layerwise import LayerwiseModel, UnsupportedLayers, watched
from tests.tiny import load_model, save_base

ROWS = [[5, 6, 7, 8, 9, 40, 41, 77, 12, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 42], [9, 8, 7]]


def layerwise(folder: Path, changed: dict[str, torch.Tensor] | None = None) -> LayerwiseModel:
    tensors = {**load_file(folder / "model.safetensors"), **(changed or {})}

    def read(name: str) -> torch.Tensor:
        return tensors[name].float()

    return LayerwiseModel(folder, read, torch.device("cpu"))


@pytest.mark.parametrize(
    "architecture", ["llama-tied", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "gpt-neox"]
)
def test_hidden_states_are_the_whole_models(architecture: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", architecture)
    model = layerwise(base)
    hidden = model.embed(ROWS)
    for number in range(model.count):
        with model.layer(number):
            hidden = [model.advance(ids, states) for ids, states in zip(ROWS, hidden, strict=True)]
    whole = load_model(base)
    seen: list[torch.Tensor] = []
    norm = next(
        module
        for name, module in whole.named_modules()
        if name.endswith(("model.norm", "ln_f", "final_layer_norm"))
    )
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.inference_mode():
        for ids in ROWS:
            whole(input_ids=torch.tensor([ids]))
    for mine, theirs in zip(hidden, seen, strict=True):
        # The same operations on the same numbers.
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)


def test_only_the_layer_in_turn_holds_weights(tmp_path: Path) -> None:
    model = layerwise(save_base(tmp_path / "base"))
    with model.layer(1) as layer:
        assert not any(parameter.is_meta for parameter in layer.parameters())
        assert all(parameter.is_meta for parameter in model._layers[0].parameters())
    assert all(parameter.is_meta for parameter in model._layers[1].parameters())


def test_linear_layers_tell_what_they_get(tmp_path: Path) -> None:
    model = layerwise(save_base(tmp_path / "base"))
    found: dict[str, torch.Tensor] = {}
    paths = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]
    hidden = model.embed(ROWS)
    with model.layer(0) as layer, watched(layer, paths, found.__setitem__):
        model.advance(ROWS[0], hidden[0])
    assert found["self_attn.q_proj"] is found["self_attn.k_proj"], "shared inputs are one tensor"
    assert found["mlp.down_proj"].shape == (1, 20, 48)


def test_a_checkpoint_with_other_names_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    broken = LayerwiseModel(base, lambda name: tensors[name].float(), torch.device("cpu"))
    with pytest.raises(UnsupportedLayers, match=r"mlp\.up_proj\.weight"), broken.layer(1):
        pass
    shape = {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match=r"has the shape \[3, 3\]"), layerwise(base, shape).layer(0):
        pass


def test_what_is_no_causal_model_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llava")
    with pytest.raises(UnsupportedLayers) as caught:
        layerwise(base)
    assert "dithered" in str(caught.value.remedy)
