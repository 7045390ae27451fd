"""Merging into a base that is quantized: what is asked, what comes out, and that it is what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import lorasmith
from lorasmith.checkpoint.header import TensorInfo
from lorasmith.errors import CheckpointError, UsageError
from lorasmith.quantized.open import open_base
from tests.quantized.bases import (
    BITSANDBYTES,
    FORMATS,
    save_bitsandbytes,
    save_gguf,
    save_gpt_oss,
    save_plain,
    save_quantized,
)
from tests.tiny import load_model, save_adapter


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "adapter", plain, std=0.05)


@pytest.fixture(scope="module", params=FORMATS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    return save_quantized(tmp_path_factory.mktemp("base") / "model", plain, request.param)


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    return save_bitsandbytes(tmp_path_factory.mktemp("nf4") / "model", plain, **BITSANDBYTES["nf4"])


def decoded(base: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the model in float64."""
    checkpoint = open_base(base)
    tensors = {}
    for shard in checkpoint.shards:
        stored = load_file(shard.path) if shard.path.suffix == ".safetensors" else _gguf_values(shard.path)
        for name in shard.tensors:
            weight = checkpoint.decoded.get(name)
            if weight is None:
                tensors[name] = stored[name].double()
            else:
                tensors[name] = weight.read(0, weight.info.elements).reshape(weight.info.shape)
    return tensors


def _gguf_values(file: Path) -> dict[str, torch.Tensor]:
    """The norms, which are all that is not quantized."""
    import gguf

    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    values = {}
    for tensor in gguf.GGUFReader(file).tensors:
        name = tensor.name.replace("blk.", "model.layers.").replace("output_norm", "model.norm")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        values[name] = torch.from_numpy(tensor.data.copy())
    return values


def test_the_merge_asks_which_model_is_wanted_and_says_what_each_is(
    nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"quantized: 14 weights in nf4; .* trained on .*plain") as caught:
        lorasmith.merge(nf4, adapter, tmp_path / "out")
    assert "--into 16bit" in str(caught.value)
    assert "--into base" in str(caught.value)


def test_a_base_that_is_not_quantized_has_no_such_choice(plain: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is for a quantized base"):
        lorasmith.merge(plain, adapter, tmp_path / "out", into="16bit")


def test_into_16_bits_gives_a_model_that_computes_what_peft_computes_on_the_dequantized_base(
    base: Path, plain: Path, adapter: Path, tmp_path: Path
) -> None:
    record = lorasmith.merge(base, adapter, tmp_path / "out", into="16bit", precision="float32")
    assert record.into == "16bit"
    reference = load_model(plain, torch.float64)
    reference.load_state_dict(decoded(base))
    unmerged = PeftModel.from_pretrained(reference, adapter).double()
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        expected = unmerged(ids).logits
        found = load_model(tmp_path / "out", torch.float64)(ids).logits
    # Only the merged weights are rounded, to float32: 2^-24 of each, through two layers.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_every_element_is_the_nearest_bfloat16_number(base: Path, adapter: Path, tmp_path: Path) -> None:
    lorasmith.merge(base, adapter, tmp_path / "out", into="16bit")
    merged, factors = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    for name, values in decoded(base).items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        exact = values
        if f"{module}.lora_A.weight" in factors:
            exact = (
                values
                + 2.0
                * factors[f"{module}.lora_B.weight"].double()
                @ factors[f"{module}.lora_A.weight"].double()
            )
        stored = merged[name]
        # The norms of a GGUF file are float32 and stay so.
        single = stored.dtype == torch.float32 and "norm" in name
        assert single or stored.dtype == torch.bfloat16
        half = stored.double().abs() * (0.0 if single else 2.0**-8)
        assert ((stored.double() - exact).abs() <= half).all(), name


def test_the_config_says_what_the_weights_are(nf4: Path, adapter: Path, tmp_path: Path) -> None:
    body: dict[str, Any] = json.loads((nf4 / "config.json").read_text())
    assert body["quantization_config"]["quant_method"] == "bitsandbytes"
    lorasmith.merge(nf4, adapter, tmp_path / "out", into="16bit")
    merged = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in merged
    assert merged["dtype"] == "bfloat16"


def test_parts_of_a_weight_may_lie_in_different_shards(nf4: Path, adapter: Path, tmp_path: Path) -> None:
    many = _split(nf4, tmp_path / "many")
    lorasmith.merge(many, adapter, tmp_path / "out", into="16bit")
    lorasmith.merge(nf4, adapter, tmp_path / "one", into="16bit")
    parts = [load_file(file) for file in sorted((tmp_path / "out").glob("*.safetensors"))]
    together = {name: tensor for part in parts for name, tensor in part.items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], whole[name]) for name in whole)
    assert lorasmith.prove(many, adapter, tmp_path / "out").grade == "exact"
    load_model(tmp_path / "out")


def test_a_file_of_scales_alone_has_no_counterpart_in_16_bits(
    nf4: Path, adapter: Path, tmp_path: Path
) -> None:
    apart = _split(nf4, tmp_path / "apart", lambda name: ".weight." in name)
    assert all(".weight." in name for name in load_file(apart / "model-1.safetensors"))
    lorasmith.merge(apart, adapter, tmp_path / "out", into="16bit")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model-0.safetensors"]
    assert lorasmith.prove(apart, adapter, tmp_path / "out").grade == "exact"
    load_model(tmp_path / "out")


def _split(base: Path, to: Path, second: Callable[[str], bool] | None = None) -> Path:
    """The same model in two shards: every other tensor in each, or those in the second that are named."""
    to.mkdir()
    for file in base.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    (to / "model.safetensors").unlink()
    places = {}
    for number in (0, 1):
        part = dict(sorted(tensors.items())[number::2])
        if second is not None:
            part = {name: tensor for name, tensor in tensors.items() if second(name) == bool(number)}
        save_file(part, to / f"model-{number}.safetensors", metadata={"format": "pt"})
        places |= dict.fromkeys(part, f"model-{number}.safetensors")
    (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return to


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}],
    ids=["dora", "modules_to_save", "embedding"],
)
def test_other_variants_are_proved_too(
    nf4: Path, plain: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = save_adapter(tmp_path / "adapter", plain, std=0.05, **settings)
    for rounding in ("nearest", "dithered"):
        out = tmp_path / rounding
        lorasmith.merge(nf4, adapter, out, into="16bit", rounding=rounding)
        proof = lorasmith.prove(nf4, adapter, out)
        assert proof.grade == "exact", proof.findings


def test_experts_of_gpt_oss_are_merged_the_way_round_that_the_model_has_them(tmp_path: Path) -> None:
    plain, packed = save_gpt_oss(tmp_path)
    adapter = save_adapter(
        tmp_path / "adapter",
        plain,
        std=0.05,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    lorasmith.merge(packed, adapter, tmp_path / "out", into="16bit", precision="float32")
    reference = load_model(plain, torch.float64)
    reference.load_state_dict(decoded(packed))
    merged = load_model(tmp_path / "out", torch.float64)
    for model in (reference, merged):
        model.set_experts_implementation("eager")  # grouped products know no float64
    unmerged = PeftModel.from_pretrained(reference, adapter).double()
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        expected, found = unmerged(ids).logits, merged(ids).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    proof = lorasmith.prove(packed, adapter, tmp_path / "out")
    assert proof.grade == "exact", proof.findings


# Back into the base's own format.


def test_into_the_base_changes_codes_and_nothing_else(base: Path, adapter: Path, tmp_path: Path) -> None:
    lorasmith.merge(base, adapter, tmp_path / "out", into="base")
    codes: list[TensorInfo] = []
    for weight in open_base(base).decoded.values():
        codes.append(weight.weight.parts["codes"].info)  # type: ignore[attr-defined]
    for file in base.iterdir():
        before, after = file.read_bytes(), (tmp_path / "out" / file.name).read_bytes()
        assert len(after) == len(before)
        if file.suffix in (".safetensors", ".gguf"):
            changed = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))
            assert len(changed)
            starts, stops = (np.array(sorted(getattr(one, at) for one in codes)) for at in ("start", "stop"))
            place = np.searchsorted(starts, changed, side="right") - 1
            assert ((place >= 0) & (changed < stops[place])).all()
        else:
            assert after == before


@pytest.mark.parametrize("kind", ["nf4", "int4 groups"])
def test_what_loads_the_base_loads_the_merge(kind: str, plain: Path, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = save_quantized(tmp_path / "base", plain, kind)
    lorasmith.merge(base, adapter, tmp_path / "out", into="base")
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)(ids).logits
        before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)(ids).logits
    assert found.isfinite().all()
    assert not torch.equal(found, before)


def test_transformers_reads_the_merged_gguf_as_what_the_record_says(
    plain: Path, adapter: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    base = save_gguf(tmp_path / "base", plain, "Q8_0")
    lorasmith.merge(base, adapter, tmp_path / "out", into="base")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        gguf_file="model.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).state_dict()
    before, after = decoded(base), decoded(tmp_path / "out")
    assert loaded.keys() == after.keys()
    for name, values in after.items():
        assert torch.equal(loaded[name], values.float()), name
    assert sum(not torch.equal(before[name], after[name]) for name in after) == 14


def test_a_gguf_file_alone_is_merged_into_but_not_into_16_bits(
    plain: Path, adapter: Path, tmp_path: Path
) -> None:
    base = save_gguf(tmp_path / "base", plain, config=False)
    with pytest.raises(CheckpointError, match=r"no config\.json beside the GGUF file"):
        lorasmith.merge(base, adapter, tmp_path / "wide", into="16bit")
    lorasmith.merge(base, adapter, tmp_path / "out", into="base")
    assert [file.name for file in (tmp_path / "out").iterdir() if file.suffix == ".gguf"] == ["model.gguf"]
    proof = lorasmith.prove(base, adapter, tmp_path / "out")
    assert proof.grade == "exact", proof.findings


def test_a_killed_merge_into_the_base_ends_with_the_same_bytes(
    nf4: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasmith.merging.folder import PartialFolder

    many = _split(nf4, tmp_path / "many")
    lorasmith.merge(many, adapter, tmp_path / "whole", into="base", rounding="dithered")
    finish = PartialFolder.finish_shard

    def killed(self: PartialFolder, shard: Any) -> None:
        finish(self, shard)
        raise KeyboardInterrupt

    monkeypatch.setattr(PartialFolder, "finish_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        lorasmith.merge(many, adapter, tmp_path / "out", into="base", rounding="dithered")
    monkeypatch.setattr(PartialFolder, "finish_shard", finish)
    lorasmith.merge(many, adapter, tmp_path / "out", into="base", rounding="dithered")
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("settings", "asked", "told"),
    [
        ({"use_dora": True}, {}, "DoRA scales"),
        ({"modules_to_save": ["k_proj"], "target_modules": ["q_proj"]}, {}, "replaces"),
        ({}, {"precision": "float16"}, "contradict"),
        ({}, {"rounding": "calibrated"}, "needs rows to calibrate on"),
    ],
)
def test_what_the_bases_format_has_no_place_for_is_refused(
    nf4: Path, plain: Path, tmp_path: Path, settings: dict[str, Any], asked: dict[str, Any], told: str
) -> None:
    adapter = save_adapter(tmp_path / "adapter", plain, **settings)
    with pytest.raises(UsageError, match=told):
        lorasmith.merge(nf4, adapter, tmp_path / "out", into="base", **asked)
