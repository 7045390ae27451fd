"""What is not a plain sum is right to the last bit as well, and what cannot be right is refused."""

from __future__ import annotations

import json
import shutil
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorasmith.errors import AdapterError
from lorasmith.merging.merge import merge
from lorasmith.merging.numbers.exact import round_scaled
from lorasmith.merging.numbers.rounding import TARGETS
from tests.adapters.test_variants import compare, logits
from tests.merging.reference import merged_value, nearest
from tests.tiny import load_model, randomize_adapter, save_adapter, save_base

P = "base_model.model."
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def quotient(magnitude: float, value: Fraction, squares: Fraction) -> Fraction:
    """m·v/√S to 80 digits, by decimal arithmetic."""
    with localcontext() as context:
        context.prec = 80

        def number(fraction: Fraction) -> Decimal:
            return Decimal(fraction.numerator) / Decimal(fraction.denominator)

        return Fraction(Decimal(magnitude) * number(value) / number(squares).sqrt())


@pytest.mark.parametrize("axis", [0, 1], ids=["linear", "embedding"])
@pytest.mark.parametrize("precision", sorted(NAMES))
@pytest.mark.parametrize("low_bits", [False, True], ids=["random", "ties"])
def test_every_element_of_dora_is_correctly_rounded(
    tmp_path: Path, precision: str, axis: int, low_bits: bool
) -> None:
    target = "q_proj" if axis == 0 else "embed_tokens"
    base = save_base(tmp_path / "base", vocab_size=80 if axis else 300, dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=[target], use_dora=True)
    name = "model.layers.1.self_attn.q_proj" if axis == 0 else "model.embed_tokens"
    factors = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    if low_bits:
        # Norms that are powers of two and few bits elsewhere: quotients fall on midpoints.
        flip = torch.sign(
            torch.randn(weights[f"{name}.weight"].shape, generator=torch.Generator().manual_seed(1))
        )
        length = weights[f"{name}.weight"].shape[1 - axis]
        weights[f"{name}.weight"] = (flip * 2.0 ** -(length.bit_length() // 2)).to(torch.bfloat16)
        for key, tensor in factors.items():
            if name in key and "magnitude" in key:
                tensor.copy_(1 + torch.randint(0, 1 << 9, tensor.shape).float() / (1 << 9))
            elif name in key and ("_A" in key or "_B" in key):
                tensor.zero_()
        if f"{P}{name}.base_layer.weight" in factors:
            factors[f"{P}{name}.base_layer.weight"] = weights[f"{name}.weight"].float()
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    record = merge(base, adapter, tmp_path / "out", precision=precision)
    stored = weights[f"{name}.weight"].double()
    if axis == 0:
        up, down = factors[f"{P}{name}.lora_B.weight"], factors[f"{P}{name}.lora_A.weight"].T
    else:
        up, down = factors[f"{P}{name}.lora_embedding_A"].T, factors[f"{P}{name}.lora_embedding_B"]
    left, right = up.double().tolist(), down.double().tolist()
    values = [
        [
            merged_value(stored[row, col].item(), [(2.0, 1.0, left[row], right[col])])
            for col in range(stored.shape[1])
        ]
        for row in range(stored.shape[0])
    ]
    lines = values if axis == 0 else list(zip(*values, strict=True))
    squares = [sum((value * value for value in line), start=Fraction(0)) for line in lines]
    magnitude = factors[f"{P}{name}.lora_magnitude_vector"].double().tolist()
    merged = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"].double()
    for row, line in enumerate(values):
        for col, value in enumerate(line):
            along = row if axis == 0 else col
            expected = nearest(quotient(magnitude[along], value, squares[along]), NAMES[precision])
            assert merged[row, col].item() == expected, (row, col)
    result = next(tensor for tensor in record.tensors if name in tensor.name)
    square_norm = (length & (length - 1)) == 0 if low_bits else False
    if square_norm and precision == "bfloat16" and length.bit_length() % 2:
        assert result.exact_redone > 0, "the planted magnitudes make ties"


def test_square_roots_are_rounded_exactly() -> None:
    for dtype, target in TARGETS.items():
        midpoint = 1 + 2.0**-target.precision
        # √(m²) is m: a tie; the least bit more or less under the root is none.
        square = Fraction(midpoint) ** 2
        assert round_scaled(1.0, square, square, target) == (1.0, True)
        above = round_scaled(1.0, square, square * (1 - Fraction(1, 2**300)), target)
        below = round_scaled(-1.0, square, square * (1 + Fraction(1, 2**300)), target)
        assert above == (2 * midpoint - 1, False), dtype
        assert below == (-1.0, False), dtype
        assert round_scaled(2.0, Fraction(0), square, target) == (0.0, False)


def test_dora_on_a_row_that_vanishes_is_an_error(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], use_dora=True)
    weights = load_file(base / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    weights[f"{name}.weight"][5] = 0
    factors[f"{P}{name}.lora_B.weight"][5] = 0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=f"{name}.*row 5"):
        merge(base, adapter, tmp_path / "out")


def test_dora_where_the_update_nearly_cancels_the_weight(tmp_path: Path) -> None:
    """‖V‖ is 2⁻⁴⁰ of ‖W‖: float64 knows little of the direction, and all of it is done exactly."""
    base = save_base(tmp_path / "base", dtype=torch.float32)
    adapter = save_adapter(
        tmp_path / "adapter", base, target_modules=["q_proj"], use_dora=True, r=1, lora_alpha=1
    )
    weights = load_file(base / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    up, down = factors[f"{P}{name}.lora_B.weight"], factors[f"{P}{name}.lora_A.weight"]
    up[3], down[0] = 1 / 3, 1.0
    down[0, 7] += 2.0**-23
    weights[f"{name}.weight"][3] = -up[3]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    merge(base, adapter, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"][3]
    expected = torch.zeros(32)
    expected[7] = factors[f"{P}{name}.lora_magnitude_vector"][3]
    assert torch.equal(merged, expected)


def resized(folder: Path, base: Path, tokens: int, **config: Any) -> Path:
    """An adapter for a model whose vocabulary was changed before the training."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **config}
    peft_model = get_peft_model(model, LoraConfig(**settings))
    randomize_adapter(peft_model)
    peft_model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tokens", [320, 288])
@pytest.mark.parametrize("saved", [[], ["embed_tokens", "lm_head"]], ids=["embedding", "modules"])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_resized_vocabularies(tmp_path: Path, name: str, saved: list[str], tokens: int) -> None:
    base = save_base(tmp_path / "base", name, dtype=torch.float32)
    adapter = resized(tmp_path / "adapter", base, tokens, modules_to_save=saved or None)
    merge(base, adapter, tmp_path / "out")
    model = load_model(tmp_path / "out")
    assert model.config.vocab_size == tokens
    original = load_model(base)
    original.resize_token_embeddings(tokens, mean_resizing=False)
    expected = logits(PeftModel.from_pretrained(original, adapter).eval())
    found = logits(model)
    assert found.shape[-1] == tokens
    assert (found - expected).abs().max() < 2e-4 * expected.std()


@pytest.mark.parametrize("weight", [0.5, -2.0])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt2", "gpt-neox"])
def test_weighted_sums_of_two_adapters(tmp_path: Path, name: str, weight: float) -> None:
    """Against PEFT's own `cat` combination, which adds the products."""
    base = save_base(tmp_path / "base", name, dtype=torch.float32)
    targets = {"gpt2": ["c_attn", "wte"], "gpt-neox": ["dense", "embed_in"]}.get(name, ["q_proj", "gate"])
    first = save_adapter(tmp_path / "a", base, seed=1, target_modules=targets, r=3)
    second = save_adapter(tmp_path / "b", base, seed=2, target_modules=targets[:1], r=2, use_rslora=True)
    merge(base, [first, second], tmp_path / "out", weights=[1.0, weight])
    model = PeftModel.from_pretrained(load_model(base), first, adapter_name="a")
    model.load_adapter(second, adapter_name="b")
    model.base_model.set_adapter(["a", "b"])
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict) and "b" in module.scaling:
            module.scaling["b"] *= weight
    expected, found = logits(model.eval()), logits(load_model(tmp_path / "out"))
    assert (found - expected).abs().max() < 2e-4 * expected.std()


def test_experts_of_two_adapters_add_up(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3-moe", dtype=torch.float32)
    config = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    folders = [save_adapter(tmp_path / str(seed), base, seed=seed, **config) for seed in (1, 2)]
    for folder in folders:
        merge(base, folder, tmp_path / f"one-{folder.name}")
    merge(base, folders, tmp_path / "both")
    before = load_file(base / "model.safetensors")
    one, two, both = (
        load_file(tmp_path / place / "model.safetensors") for place in ("one-1", "one-2", "both")
    )
    for name, weight in before.items():
        expected = one[name].double() + two[name].double() - weight.double()
        torch.testing.assert_close(both[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
    ],
    ids=["dora", "saved", "tokens"],
)
def test_what_does_not_add_up_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], **config)
    for weights in ([1.0, 1.0], [0.5, 1.0]):
        with pytest.raises(AdapterError):
            merge(base, [adapter, adapter], tmp_path / "out", weights=weights)
    with pytest.raises(AdapterError, match=r"weight 0\.5"):
        merge(base, adapter, tmp_path / "out", weights=[0.5])


def test_a_copy_of_another_base_gives_it_away(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", seed=0)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens"])
    merge(base, adapter, tmp_path / "out")
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="differs from this base's"):
        merge(other, adapter, tmp_path / "wrong")


def test_a_lora_bias_without_a_bias_in_the_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(AdapterError, match="has none in the base"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_changed_the_base_is_refused(tmp_path: Path, init: str) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], init_lora_weights=init)
    with pytest.raises(AdapterError, match=f"initialised with {init}"):
        merge(base, adapter, tmp_path / "out")


def test_pissa_converted_by_peft_is_a_plain_lora(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = save_base(tmp_path / "base", dtype=torch.float32)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(load_model(base), settings)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    randomize_adapter(model)
    model.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    merge(base, tmp_path / "adapter", tmp_path / "out")
    compare(base, tmp_path / "adapter", tmp_path / "out")


def test_a_tied_model_says_untied_everywhere(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gemma3")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["lm_head"])
    record = merge(base, adapter, tmp_path / "out")
    assert record.untied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert set(tensors) == {*before, "lm_head.weight"}
    assert torch.equal(tensors["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_an_incomplete_set_of_experts_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3-moe")
    config = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    adapter = save_adapter(tmp_path / "adapter", base, **config)
    broken = shutil.copytree(adapter, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    name = f"{P}model.layers.0.mlp.experts.lora_A.weight"
    tensors[name] = tensors[name][:-4].contiguous()
    save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="experts"):
        merge(base, broken, tmp_path / "out")
