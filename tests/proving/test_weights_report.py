"""What a proof tells: findings, its record, and an audit of what went wrong."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasmith.files import atomic
from lorasmith.proving.weights.prove import prove
from lorasmith.records.proof import WeightProof
from tests.proving.claims import codes, folders
from tests.proving.small import (
    adapter_tensors,
    base_tensors,
    module,
    right_merge,
    write_adapter,
    write_model,
)
from tests.tiny import save_adapter, save_base, tiny_tokenizer


def test_findings_that_do_not_change_the_grade(tmp_path: Path) -> None:
    base, _ = folders(tmp_path)
    tensors = adapter_tensors()
    lost = f"base_model.model.{module(1, 'k_proj')}.lora_"
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    adapter = write_adapter(tmp_path / "part", tensors)
    merged = write_model(tmp_path / "merged", right_merge(base_tensors(), [(tensors, 2.0)]))
    (merged / "consolidated.safetensors").write_bytes(b"old")
    (merged / "tokenizer.json").unlink()
    proof = prove(base, adapter, merged)
    assert proof.grade == "exact"
    assert codes(proof) == {"untouched-targets", "stray-weights", "missing-tokenizer"}
    assert "base-not-verified" in {finding.code for finding in proof.findings}


def test_the_record_is_written_and_read_back(tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    merged = write_model(tmp_path / "merged", right_merge(base_tensors(), [(adapter_tensors(), 2.0)]))
    proof = prove(base, adapter, merged, output=tmp_path / "proof" / "weights.json")
    assert atomic.read_record(tmp_path / "proof" / "weights.json", WeightProof) == proof


def test_an_audit_tells_dropped_from_rounded_otherwise(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    proof = prove(base, adapter, tmp_path / "merged")
    assert proof.grade == "different"
    assert "rounded-otherwise" in codes(proof)
    shard = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(shard)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = load_file(base / "model.safetensors")[name]
    write_model(tmp_path / "merged", tensors)
    proof = prove(base, adapter, tmp_path / "merged")
    notes = {tensor.name: tensor.note for tensor in proof.tensors}
    assert "dropped" in notes[name]
    assert not notes["model.norm.weight"]
    dropped = next(finding for finding in proof.findings if finding.code == "update-dropped")
    assert name in dropped.message


def test_an_audit_estimates_a_wrong_scale(tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    merged = write_model(tmp_path / "merged", right_merge(base_tensors(), [(adapter_tensors(), 6.0)]))
    proof = prove(base, adapter, merged)
    notes = {tensor.note for tensor in proof.tensors if tensor.wrong and "q_proj" not in tensor.name}
    assert notes == {"wrong values: the update looks applied 3 times"}
