"""The sizes of quantized models: against public figures, against what is really written, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lorasmith.errors import CheckpointError, UsageError
from lorasmith.followup.compression.sizes import (
    BLOCKS,
    Shape,
    choose_group,
    classify,
    integer_bytes,
    packed_bytes,
    parse_size,
    plan_compression,
    plan_sizes,
)
from lorasmith.records.compression import SizePlan
from tests.tiny import save_base, tiny_model

QWEN = {
    # Published config.json of Qwen2.5: hidden, intermediate, layers, width of keys and values, rows, tied.
    "Qwen2.5-0.5B": (896, 4864, 24, 128, 151_936, True),
    "Qwen2.5-7B": (3584, 18_944, 28, 512, 152_064, False),
}


def qwen(name: str) -> tuple[list[Shape], bool]:
    hidden, inner, layers, values, rows, tied = QWEN[name]
    tensors: list[tuple[str, tuple[int, ...], str]] = [
        ("model.embed_tokens.weight", (rows, hidden), "BF16"),
        ("lm_head.weight", (rows, hidden), "BF16"),
        ("model.norm.weight", (hidden,), "BF16"),
    ]
    for layer in range(layers):
        matrices = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (values, hidden),
            "self_attn.v_proj": (values, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        path = f"model.layers.{layer}."
        tensors += [(f"{path}{part}.weight", shape, "BF16") for part, shape in matrices.items()]
        tensors += [
            (f"{path}self_attn.{part}.bias", (matrices[f"self_attn.{part}"][0],), "BF16")
            for part in ("q_proj", "k_proj", "v_proj")
        ]
        tensors += [
            (f"{path}{part}.weight", (hidden,), "BF16")
            for part in ("input_layernorm", "post_attention_layernorm")
        ]
    return classify(tensors, tied), tied


def sizes(plan: SizePlan) -> dict[str, int]:
    return {planned.method: planned.bytes for planned in plan.methods}


def test_the_parameters_are_those_of_the_model_cards() -> None:
    # 7.61 B (6.53 B without embeddings) and 0.49 B (0.36 B): Qwen2.5's model cards.
    for name, total, without in (("Qwen2.5-7B", 7.61e9, 6.53e9), ("Qwen2.5-0.5B", 0.49e9, 0.36e9)):
        shapes, tied = qwen(name)
        plan = plan_sizes(shapes, tied=tied)
        assert plan.parameters == pytest.approx(total, rel=0.01)
        assert plan.parameters - plan.embedding_parameters == pytest.approx(without, rel=0.01)


@pytest.mark.parametrize(
    ("method", "gigabytes"),
    [
        # By hand: 6.525 G weights at 4 + 16/128 bits and 1.090 G embeddings at 16 bits; and so on.
        ("int8 g128", 8.808),
        ("int4 g128", 5.545),
        ("int4 g128, embeddings too", 3.927),
        ("int3 g128", 4.730),
        ("int3 g128, embeddings too", 2.975),
        ("int2 g64", 4.016),
        ("int2 g64, embeddings too", 2.142),
        # Public files of Qwen2.5-7B-Instruct (4.68, 4.43 and 8.10 GB), less the tokenizer's 6 MB.
        ("gguf q4_k_m", 4.677),
        ("gguf q4_0", 4.425),
        ("gguf q8_0", 8.093),
        # 50 bytes for 256 weights of all 7.615 G parameters.
        ("gguf iq1_s, at least", 1.489),
    ],
)
def test_qwen_7b(method: str, gigabytes: float) -> None:
    shapes, tied = qwen("Qwen2.5-7B")
    assert sizes(plan_sizes(shapes, tied=tied))[method] / 1e9 == pytest.approx(gigabytes, abs=5e-4)


def test_540_mb_for_7_b_is_refused_and_a_half_b_draft_fits() -> None:
    shapes, tied = qwen("Qwen2.5-7B")
    plan = plan_sizes(shapes, tied=tied, target=parse_size("540MB"))
    assert plan.reachable is False
    assert plan.target_bits_per_weight == pytest.approx(0.567, abs=1e-3)
    text = " ".join(plan.advice)
    assert "0.57 bit per weight" in text
    assert "iq1_s" in text and "1.5 GB" in text
    assert "a model of 500 M parameters fits" in text
    draft, draft_tied = qwen("Qwen2.5-0.5B")
    small = plan_sizes(draft, tied=draft_tied, target=parse_size("540MB"))
    assert small.reachable
    assert all(planned.fits for planned in small.methods if planned.format == "compressed-tensors")


def test_the_block_sizes_are_those_of_the_gguf_package() -> None:
    for name, block in BLOCKS.items():
        assert GGML_QUANT_SIZES[GGMLQuantizationType[name]] == block


def test_smollm2_as_it_was_written() -> None:
    """Bytes of the tensors in files that auto-round 0.16.1 wrote of SmolLM2-135M, read off their headers."""
    hidden, inner, values, rows = 576, 1536, 192, 49_152
    tensors: list[tuple[str, tuple[int, ...], str]] = [("model.embed_tokens.weight", (rows, hidden), "BF16")]
    tensors += [("model.norm.weight", (hidden,), "BF16")]
    for layer in range(30):
        path = f"model.layers.{layer}."
        tensors += [
            (f"{path}self_attn.q_proj.weight", (hidden, hidden), "BF16"),
            (f"{path}self_attn.k_proj.weight", (values, hidden), "BF16"),
            (f"{path}self_attn.v_proj.weight", (values, hidden), "BF16"),
            (f"{path}self_attn.o_proj.weight", (hidden, hidden), "BF16"),
            (f"{path}mlp.gate_proj.weight", (inner, hidden), "BF16"),
            (f"{path}mlp.up_proj.weight", (inner, hidden), "BF16"),
            (f"{path}mlp.down_proj.weight", (hidden, inner), "BF16"),
            (f"{path}input_layernorm.weight", (hidden,), "BF16"),
            (f"{path}post_attention_layernorm.weight", (hidden,), "BF16"),
        ]
    found = sizes(plan_sizes(classify(tensors, True), tied=True))
    assert found["gguf q4_0"] == 89_941_248
    # A width of 576 is no multiple of 256: only the down projections are really in K blocks.
    assert found["gguf q4_k_m"] == 103_668_480
    assert found["int4 g64"] == 113_098_656


def test_the_group_divides_every_width() -> None:
    def matrix(width: int) -> Shape:
        return Shape("model.layers.0.mlp.up_proj.weight", (8, width), "BF16", "matrix")

    assert choose_group([matrix(1024), matrix(256)]) == 128
    assert choose_group([matrix(576), matrix(1536)]) == 64
    assert choose_group([matrix(576), matrix(1536)], 128) is None
    assert choose_group([matrix(100)]) is None


def test_what_is_never_quantized_keeps_16_bits() -> None:
    tensors = [
        ("model.layers.0.mlp.up_proj.weight", (64, 64), "F32"),
        ("model.layers.0.input_layernorm.weight", (64,), "F32"),
        ("model.visual.blocks.0.attn.qkv.weight", (64, 64), "F32"),
    ]
    shapes = classify(tensors, False)
    assert [shape.kind for shape in shapes] == ["matrix", "kept", "kept"]
    assert integer_bytes(shapes, 4, 32) == packed_bytes(shapes[0], 4, 32) + 2 * 64 + 2 * 64 * 64
    assert packed_bytes(shapes[0], 4, 32) == 64 * 64 // 2 + 64 * 2 * 2 + 16


def test_the_plan_reads_headers_only(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hidden_size=64, intermediate_size=96, dtype=torch.bfloat16)
    plan = plan_compression(base, target_size="1GB")
    assert plan.reachable
    assert plan.parameters == tiny_model(hidden_size=64, intermediate_size=96).num_parameters()
    assert plan.bytes < (base / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "text", ["", "540", "540MB", "0.5 GiB", "1e3", "-3MB", "0MB", "ten GB", "5 bananas", "nan"]
)
def test_sizes_are_read_or_refused(text: str) -> None:
    good = {"540": 540, "540MB": 540_000_000, "0.5 GiB": 1 << 29}
    if text in good:
        assert parse_size(text) == good[text]
    else:
        with pytest.raises(UsageError, match="is not a size"):
            parse_size(text)


def test_an_adapter_is_not_a_model_to_compress(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter folder"):
        plan_compression(tmp_path)
