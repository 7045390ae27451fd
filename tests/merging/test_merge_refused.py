"""A merge refuses what it would do wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.errors import AdapterError, CheckpointError, DiskError, LorasmithError, UsageError
from lorasmith.merging.merge import merge
from lorasmith.records.merging import MergeRecord
from tests.merging.planted import PREFIX, plant, tensors_of
from tests.tiny import save_adapter, save_base


def test_a_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr("os.statvfs", lambda _: Full)
    with pytest.raises(DiskError, match="too little disk space"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float16_overflow_is_an_error_that_offers_bfloat16(tmp_path: Path) -> None:
    base, adapter = plant(tmp_path, torch.float32, low_bits=False)
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    factors = load_file(adapter / "adapter_model.safetensors")
    factors[PREFIX + name.replace(".weight", ".lora_B.weight")][7] = 0
    save_file(factors, adapter / "adapter_model.safetensors")
    for value, fits in ((65519.99, True), (65520.0, False)):
        weights[name][7, 7] = value
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        if fits:
            merge(base, adapter, tmp_path / "out", precision="float16")
            assert tensors_of(tmp_path / "out")[name][7, 7].item() == 65504
        else:
            with pytest.raises(CheckpointError, match=name) as caught:
                merge(base, adapter, tmp_path / "out", precision="float16")
            assert "bfloat16" in str(caught.value)


def test_an_untouched_tensor_that_overflows_float16_is_an_error(tmp_path: Path) -> None:
    base, adapter = plant(tmp_path, torch.bfloat16, low_bits=False)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        merge(base, adapter, tmp_path / "out", precision="float16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["lora_A", "lora_B", "base"])
def test_numbers_that_are_not_finite_name_their_tensor(
    tmp_path: Path, base: Path, adapter: Path, value: float, where: str
) -> None:
    own_base = shutil.copytree(base, tmp_path / "base")
    own_adapter = shutil.copytree(adapter, tmp_path / "adapter")
    module = "model.layers.1.self_attn.k_proj"
    if where == "base":
        file = next(file for file in own_base.glob("*.safetensors") if f"{module}.weight" in load_file(file))
        name = f"{module}.weight"
    else:
        file, name = own_adapter / "adapter_model.safetensors", f"{PREFIX}{module}.{where}.weight"
    tensors = load_file(file)
    tensors[name][1, 2] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LorasmithError, match="NaN or infinite") as caught:
        merge(own_base, own_adapter, tmp_path / "out")
    assert name in caught.value.found
    assert not (tmp_path / "out").exists()


def rewrite(adapter: Path, change: Any) -> None:
    tensors = change(load_file(adapter / "adapter_model.safetensors"))
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def without(fragment: str) -> Any:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if fragment not in name}


def renamed(old: str, new: str) -> Any:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


Q = "layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{Q}.lora_A"), "has no use without its partner"),
        (without(f"{Q}.lora_B"), "has no use without its partner"),
        (without(f"{Q}."), "targets model.layers.1.self_attn.q_proj, the adapter has no tensors"),
        (renamed("layers.1.", "layers.7."), "no module 'model.layers.7"),
        (renamed("q_proj", "query"), "no module"),
        (renamed("lora_A.weight", "lora_A.default.weight"), "still carries the adapter's name"),
        (renamed("lora_A.weight", "lora_C.weight"), "is of no known kind"),
        (renamed("base_model.model.", "transformer."), "does not begin with"),
        (renamed("q_proj", "../../q_proj"), "no module"),
        (
            lambda t: {n: v[:, :-1].contiguous() if "q_proj.lora_A" in n else v for n, v in t.items()},
            "has the shape",
        ),
        (
            lambda t: {n: v[:2].contiguous() if "q_proj.lora_A" in n else v for n, v in t.items()},
            "has the shape",
        ),
        (lambda t: {n: v.to(torch.int8) for n, v in t.items()}, "has the type I8"),
        (lambda t: {}, "holds no tensors"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, base: Path, adapter: Path, change: Any, message: str
) -> None:
    own = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((own / "adapter_config.json").read_text())
    config["target_modules"] = sorted({name.split(".")[-1] for name in config["target_modules"]})
    (own / "adapter_config.json").write_text(json.dumps(config))
    rewrite(own, change)
    with pytest.raises(AdapterError, match=message):
        merge(base, own, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"precision": "int8"},
        {"rounding": "up"},
        {"weights": [1.0, 2.0]},
        {"weights": [0.0]},
        {"weights": [float("nan")]},
    ],
)
def test_impossible_arguments(tmp_path: Path, base: Path, adapter: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        merge(base, adapter, tmp_path / "out", **arguments)


@pytest.mark.parametrize(
    ("trained", "config", "without", "message"),
    [
        ({"lora_bias": True}, {}, "lora_B.bias", "lora_bias: true, the adapter has no"),
        ({"lora_bias": True}, {"lora_bias": False}, "", "lora_bias: false, the adapter has a"),
        ({"use_dora": True}, {}, "lora_magnitude_vector", "says use_dora, the adapter has no"),
        ({"use_dora": True}, {"use_dora": False}, "", "use_dora: false"),
    ],
)
def test_factors_that_lack_what_the_config_promises_are_refused(
    tmp_path: Path, trained: dict[str, Any], config: dict[str, Any], without: str, message: str
) -> None:
    base = save_base(tmp_path / "base", "qwen2")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], **trained)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    if without:
        tensors = load_file(adapter / "adapter_model.safetensors")
        # One layer of several: the others must not hide it.
        del tensors[next(name for name in tensors if without in name)]
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=message):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trained_biases_that_the_adapter_does_not_hold_are_told(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    assert "biases-left-out" not in codes(merge(base, adapter, tmp_path / "out"))
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bias": "lora_only"}))
    assert "biases-left-out" in codes(merge(base, adapter, tmp_path / "out"))


def codes(record: MergeRecord) -> set[str]:
    return {finding.code for finding in record.findings}
