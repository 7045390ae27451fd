"""Compression: what is written loads again, holds the planned bytes, and a finished output is kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import LlamaTokenizer

import lorasmith
from lorasmith.errors import CheckpointError, DataError, MachineError, UsageError
from lorasmith.files.digests import digest_folder
from lorasmith.followup.compression import quantize
from lorasmith.followup.compression.compress import compress
from lorasmith.followup.compression.quantize import calibration_samples
from lorasmith.followup.compression.sizes import plan_compression
from lorasmith.options import CompressOptions
from lorasmith.proving.behaviour.compare import compare_pair
from tests.followup.compressing import TINY, record_of, unpacked
from tests.tiny import load_model, tiny_model, tiny_rows, tiny_tokenizer


def test_what_is_written_is_what_was_planned(compressed: Path) -> None:
    record = record_of(compressed / "int4")
    tensors = load_file(compressed / "int4" / "model.safetensors")
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == record.planned_bytes
    assert record.bytes == (compressed / "int4" / "model.safetensors").stat().st_size
    assert record.bits_per_weight == pytest.approx(8 * record.bytes / tiny_model(**TINY).num_parameters())
    assert (record.group_size, record.calibration) == (64, None)


def test_every_weight_is_a_level_of_its_group(compressed: Path) -> None:
    """Round to nearest by hand in float64: no weight is further from the original than half a step."""
    loaded = unpacked(compressed / "int4")
    original = load_model(compressed / "base")
    ours = loaded.model.layers[1].mlp.up_proj.weight.detach().double().reshape(-1, 64)
    theirs = original.model.layers[1].mlp.up_proj.weight.detach().double().reshape(-1, 64)
    steps = np.array([np.diff(np.unique(row.numpy())).min() for row in ours])
    assert all(len(row.unique()) <= 16 for row in ours)
    # The outermost level of a symmetric grid lies one step inside: −8 … 7 steps for −max … max.
    assert float(((ours - theirs).abs().max(1).values / torch.tensor(steps)).max()) <= 1.01
    assert torch.equal(loaded.model.embed_tokens.weight, original.model.embed_tokens.weight)


def test_eight_bits_are_written_and_planned_as_well(compressed: Path, tmp_path: Path) -> None:
    record = compress(compressed / "base", tmp_path / "int8", options=CompressOptions(bits=(8,)))
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == record.planned_bytes
    sizes = {one.format: one.bytes for one in plan_compression(compressed / "base").methods}
    assert sizes["compressed-tensors --bits 8"] == record.planned_bytes
    theirs = load_model(compressed / "base").model.layers[1].mlp.up_proj.weight.double()
    ours = unpacked(tmp_path / "int8").model.layers[1].mlp.up_proj.weight.double()
    # Half a step of 255 levels over −max … max, and what bfloat16 keeps of the scale.
    assert float((ours - theirs).abs().max()) < 1.5 * float(theirs.abs().max()) / 127


def save_llama_with_sentencepiece(folder: Path) -> Path:
    """A base whose tokenizer the GGUF conversion knows: SentencePiece, trained on the rows."""
    import sentencepiece

    text = [f"{row['prompt']} {row['response']}" for row in tiny_rows(200)]
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    tiny_model(**TINY).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_calibrated_gguf_file_loads_again_and_is_what_was_planned(compressed: Path, tmp_path: Path) -> None:
    base = save_llama_with_sentencepiece(tmp_path / "base")
    options = CompressOptions(
        method=("calibrated",), format=("gguf:q4_0",), iterations=2, calibration_rows=4,
        calibration_length=32, calibration=compressed / "rows.jsonl",
    )  # fmt: skip
    record = compress(base, tmp_path / "q4", options=options)
    reader = GGUFReader(tmp_path / "q4" / "model-q4_0.gguf")
    assert sum(-(-tensor.n_bytes // 32) * 32 for tensor in reader.tensors) == record.planned_bytes
    assert record.calibration is not None and record.calibration.path == "rows.jsonl"
    assert record.calibration_samples == 4 and record.findings == []
    ours, theirs = unpacked(tmp_path / "q4"), load_model(base)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    # The same model but for its rounding: far closer than two models of these weights in another order.
    assert 0.01 < float((a - b).std() / b.std()) < 0.7
    assert float((a - b.flip(1)).std() / b.std()) > 1


def test_a_finished_output_is_kept_and_a_damaged_one_is_made_again(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plain = digest_folder(compressed / "int4"), CompressOptions()
    monkeypatch.setattr(quantize, "WORKER", ("-c", "raise SystemExit('not again')"))
    assert compress(compressed / "base", compressed / "int4", options=plain).quality is not None
    assert digest_folder(compressed / "int4") == before
    other = CompressOptions(group_size=32)
    with pytest.raises(MachineError, match="not again"):
        compress(compressed / "base", compressed / "int4", options=other)
    assert digest_folder(compressed / "int4") == before  # a failure leaves the older output alone
    damaged = shutil.copytree(compressed / "int4", tmp_path / "damaged")
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(MachineError, match="not again"):
        compress(compressed / "base", damaged, options=plain)


def test_other_commands_take_a_compressed_folder(compressed: Path, tmp_path: Path) -> None:
    shutil.copytree(compressed / "int4", tmp_path / "int4")
    options = CompressOptions(test_set=compressed / "rows.jsonl", limit=6)
    quality = compress(compressed / "base", tmp_path / "int4", options=options, compare=compare_pair).quality
    found = lorasmith.validate(compressed / "int4", compressed / "rows.jsonl", tmp_path / "found", limit=6)
    assert quality is not None
    # The same tokens by two ways of adding float32 losses up.
    assert found.overall.perplexity == pytest.approx(quality.perplexity_b, rel=1e-5)
    with pytest.raises(CheckpointError, match="is compressed"):
        lorasmith.train_draft(compressed / "int4", compressed / "rows.jsonl", tmp_path / "draft", layers=[0])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "magic"}, "--method is 'magic'"),
        ({"format": "gguf:q1_x"}, "--format is 'gguf:q1_x'"),
        ({"bits": 3}, "3 bits"),
        ({"format": "gguf:q4_0", "bits": 5}, "has 4 bits"),
        ({"format": "gguf:q4_0", "group_size": 64}, "own groups"),
        ({"group_size": 48}, "no group of 48 divides"),
        ({"method": "calibrated"}, "needs rows"),
        ({"method": "calibrated", "calibration_rows": 0}, "--calibration-rows is 0"),
    ],
)
def test_wrong_settings_are_one_message(
    compressed: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        compress(compressed / "base", tmp_path / "out", options=CompressOptions.make(settings))
    assert not (tmp_path / "out").exists()


def test_a_compressed_model_is_not_compressed_again(compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantized"):
        compress(compressed / "int4", tmp_path / "out", options=CompressOptions())


def test_calibration_rows_are_laid_end_to_end(compressed: Path) -> None:
    samples = calibration_samples(compressed / "base", compressed / "rows.jsonl", 3, 40)
    assert [len(sample) for sample in samples] == [40, 40, 40]
    text = tiny_tokenizer().decode([token for sample in samples for token in sample])
    assert text.startswith("<|start|>user\n" + tiny_rows(1)[0]["prompt"])
    with pytest.raises(DataError, match="less than one sample"):
        calibration_samples(compressed / "base", compressed / "rows.jsonl", 3, 100_000)
