"""A quantized model loads as what its format's own library makes of it, and takes an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorasmith
from lorasmith.errors import CheckpointError
from lorasmith.files.jsonl import write_rows
from lorasmith.models.load import load_model
from tests.quantized.bases import BITSANDBYTES, FORMATS, save_bitsandbytes, save_plain, save_quantized
from tests.quantized.cases import CASES
from tests.tiny import save_adapter, tiny_rows, tiny_tokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain(tmp_path_factory.mktemp("plain") / "model")


@pytest.mark.parametrize("kind", [*BITSANDBYTES, "gguf"])
def test_a_base_loads_whole_and_near_to_the_model_it_was_made_from(
    kind: str, plain: Path, tmp_path: Path
) -> None:
    base = save_quantized(tmp_path / "base", plain, kind)
    tiny_tokenizer().save_pretrained(base)
    own, made = load_model(plain).model, load_model(base).model
    held = made.state_dict()
    assert {value.dtype for value in held.values()} == {torch.float32}
    far = {
        name: float((held[name] - value).norm() / value.norm()) for name, value in own.state_dict().items()
    }
    # 4 bits lose 8 to 18 % of a random weight; one in another's place, or drawn anew, is off by 140 %.
    assert max(far.values()) < 0.25
    assert sum(far.values()) > 0
    assert bool(made(torch.arange(3, 40)[None]).logits.isfinite().all())


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind in CASES and kind not in BITSANDBYTES])
def test_a_base_loads_as_its_formats_library_decodes_it(kind: str, plain: Path, tmp_path: Path) -> None:
    base = save_quantized(tmp_path / "base", plain, kind)
    tiny_tokenizer().save_pretrained(base)
    held = load_model(base).model.state_dict()
    for name, weight in load_file(plain / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            library = CASES[kind](weight.float()).reference
            # The library rounds to its own type, which is all that differs.
            assert torch.equal(held[name].to(library.dtype), library), name
        else:
            assert torch.equal(held[name], weight.float()), name


def test_a_4_bit_base_holds_what_bitsandbytes_dequantizes(plain: Path, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    base = save_bitsandbytes(tmp_path / "base", plain, **BITSANDBYTES["nf4"])
    stored = load_file(base / "model.safetensors")
    held = load_model(base).model.state_dict()
    weights = [name for name in stored if f"{name}.absmax" in stored]
    assert weights
    for name in weights:
        parts = {
            key: value for key, value in stored.items() if key.startswith(f"{name}.") and key != f"{name}."
        }
        state = functional.QuantState.from_dict(
            {key.removeprefix(f"{name}."): value for key, value in parts.items()}, device=torch.device("cpu")
        )
        library = functional.dequantize_4bit(stored[name], state)
        # The library rounds its product to the model's bfloat16, which is all that differs.
        assert torch.equal(held[name].to(library.dtype), library), name


def test_an_adapter_is_validated_on_its_quantized_base(plain: Path, tmp_path: Path) -> None:
    base = save_bitsandbytes(tmp_path / "base", plain, **BITSANDBYTES["nf4"])
    adapter = save_adapter(tmp_path / "adapter", plain, std=0.05)
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, tiny_rows(4))
    lorasmith.merge(base, adapter, tmp_path / "merged", into="16bit", precision="float32")
    one = lorasmith.validate(base, rows, tmp_path / "v", adapter=adapter)
    other = lorasmith.validate(tmp_path / "merged", rows, tmp_path / "v", role="merged")
    alone = lorasmith.validate(base, rows, tmp_path / "v")
    # Both in float32, summed in different orders.
    assert one.overall.loss == pytest.approx(other.overall.loss, abs=1e-5)
    assert abs(one.overall.loss - alone.overall.loss) > 1e-3


def test_a_quantized_base_that_lacks_a_scale_is_refused(plain: Path, tmp_path: Path) -> None:
    base = save_bitsandbytes(tmp_path / "base", plain, **BITSANDBYTES["nf4"])
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight.absmax"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight"):
        load_model(base)
