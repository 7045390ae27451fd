"""Right merges are never `different`, whoever wrote base and merge: lorasmith, PEFT, or transformers 4."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lorasmith.merging.merge import merge
from lorasmith.proving.weights.prove import prove
from lorasmith.records.proof import WeightProof
from tests.tiny import ARCHITECTURES, load_model, save_adapter, save_base, tiny_tokenizer


def edit(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def told(proof: WeightProof) -> set[str]:
    """Codes of the findings, without mere notes."""
    return {finding.code for finding in proof.findings if finding.severity != "note"}


def as_transformers_4_wrote_it(folder: Path) -> None:
    """A config with the older names, without what newer versions write out, and no generation config."""
    body = json.loads((folder / "config.json").read_text())
    for part in (body, body.get("text_config") or {}):
        rope = part.pop("rope_parameters", None) or {}
        part.update({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})
        part.update({"torch_dtype": part.pop("dtype")} if "dtype" in part else {})
        for name in ("mlp_bias", "layer_types", "attention_bias", "pretraining_tp"):
            part.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**body, "transformers_version": "4.44.0"}))
    (folder / "generation_config.json").unlink(missing_ok=True)


def save_from_peft(base: Path, adapter: Path, output: Path) -> Path:
    """PEFT's merge in float64, then one rounding to float32, saved by transformers as everyone does."""
    model = PeftModel.from_pretrained(load_model(base, torch.float64), adapter)
    model.double().merge_and_unload().float().save_pretrained(output)
    return output


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "mistral", "qwen2", "phi3", "gpt2", "mixtral", "llava"]
)
def test_a_merge_is_right_whoever_wrote_base_and_merge(name: str, tmp_path: Path) -> None:
    assert name in ARCHITECTURES
    base = save_base(tmp_path / "base", name, dtype=torch.float32)
    as_transformers_4_wrote_it(base)
    if name in ("llama", "mistral", "llava"):
        generation = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 4], "pad_token_id": 0}
        (base / "generation_config.json").write_text(json.dumps(generation))
    targets = r".*(?<!vision_model)\.layers\.\d+\..*(q_proj|qkv_proj)|.*c_attn"
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=targets)
    saved = save_from_peft(base, adapter, tmp_path / "saved")
    proof = prove(base, adapter, saved)
    assert proof.grade == "exact", proof.findings
    assert told(proof) <= {"missing-tokenizer", "wrong-dtype"}
    AutoTokenizer.from_pretrained(base).save_pretrained(saved)
    proof = prove(base, adapter, saved)
    assert proof.grade == "exact", proof.findings
    for precision in ("base", "bfloat16"):
        merged = tmp_path / f"merged-{precision}"
        merge(base, adapter, merged, precision=precision)
        proof = prove(base, adapter, merged)
        assert (proof.grade, told(proof)) == ("exact", set()), proof.findings


def test_tokenizer_and_template_may_be_the_adapters(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    merge(base, adapter, tmp_path / "template")
    assert prove(base, adapter, tmp_path / "template").grade == "exact"
    own = tiny_tokenizer()
    own.add_tokens(["zzz"])
    own.model_max_length = 77
    own.save_pretrained(adapter)
    merge(base, adapter, tmp_path / "whole")
    assert prove(base, adapter, tmp_path / "whole").grade == "exact"
    # Half of one and half of the other is neither.
    shutil.copy(base / "tokenizer.json", tmp_path / "whole")
    proof = prove(base, adapter, tmp_path / "whole")
    assert proof.grade == "different" and "tokenizer-differs" in told(proof)


def test_code_that_comes_with_the_base_goes_along(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    (base / "custom_generate").mkdir()
    for name in ("custom_generate/generate.py", "custom_generate/requirements.txt", "modeling_mine.py"):
        (base / name).write_text("# nothing")
    edit(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    merge(base, adapter, tmp_path / "merged")
    proof = prove(base, adapter, tmp_path / "merged")
    assert (proof.grade, told(proof)) == ("exact", set()), proof.findings
    (tmp_path / "merged" / "lorasmith_merge.json").unlink()
    for name in ("custom_generate/generate.py", "modeling_mine.py"):
        for change in (lambda file: file.write_text("# other"), Path.unlink):
            folder = shutil.copytree(tmp_path / "merged", tmp_path / "changed", dirs_exist_ok=True)
            change(folder / name)
            proof = prove(base, adapter, folder)
            assert proof.grade == "different" and told(proof) == {"code-differs"}


def test_generation_defaults_may_be_written_out(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    generation = '{"do_sample": true, "temperature": 0.2, "eos_token_id": 2}'
    (base / "generation_config.json").write_text(generation)
    merge(base, adapter, tmp_path / "merged")
    (tmp_path / "merged" / "lorasmith_merge.json").unlink()
    for extra in ({"transformers_version": "5.23.0"}, {"top_p": None}):
        edit(tmp_path / "merged" / "generation_config.json", **extra)
        proof = prove(base, adapter, tmp_path / "merged")
        assert (proof.grade, told(proof)) == ("exact", set()), proof.findings


HEADS: dict[str, dict[str, Any]] = {
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("older", [False, True], ids=["new names", "names of transformers 4"])
@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_a_tied_vision_language_model_may_be_parted(
    name: str, older: bool, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "llava", dtype=torch.float32, tie_word_embeddings=True)
    if older:
        old = {
            key.replace("model.language_model.", "language_model.model."): tensor
            for key, tensor in _read(base)
        }
        save_file(old, base / "model.safetensors", {"format": "pt"})
    assert not any("lm_head" in key for key, _ in _read(base))
    adapter = save_adapter(tmp_path / "adapter", base, **HEADS[name])
    merge(base, adapter, tmp_path / "merged")
    proof = prove(base, adapter, tmp_path / "merged")
    assert proof.grade == "exact", [*proof.findings, *(one.name for one in proof.tensors if one.wrong)]
    ids = torch.tensor([[1, 5, 7, 22, 100, 150]])
    unmerged = PeftModel.from_pretrained(load_model(base), adapter).eval()
    with torch.no_grad():
        assert (unmerged(ids).logits - load_model(tmp_path / "merged")(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_flags_that_disagree_are_taken_as_the_loader_takes_them(
    top: bool, text: bool, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", "llava", tie_word_embeddings=top)
    body = json.loads((base / "config.json").read_text())
    body["text_config"]["tie_word_embeddings"] = text
    (base / "config.json").write_text(json.dumps(body))
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=r".*language_model.*q_proj")
    merge(base, adapter, tmp_path / "merged")
    proof = prove(base, adapter, tmp_path / "merged")
    assert (proof.grade, told(proof)) == ("exact", set()), proof.findings
    # The top one is read: turned round, the same tensors load as another model, or with a head at random.
    edit(tmp_path / "merged" / "config.json", tie_word_embeddings=not top)
    assert prove(base, adapter, tmp_path / "merged").grade == "different"


def test_a_head_of_its_own_keeps_a_flag_that_ties_it_from_being_obeyed(tmp_path: Path) -> None:
    # Loaders leave head and embedding apart where both are stored and differ; so does the proof.
    base = save_base(tmp_path / "base")
    edit(base / "config.json", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", base)
    saved = tmp_path / "saved"
    merge(base, adapter, saved)
    proof = prove(base, adapter, saved)
    assert (proof.grade, told(proof)) == ("exact", set()), proof.findings


def _read(folder: Path) -> list[tuple[str, torch.Tensor]]:
    return list(load_file(folder / "model.safetensors").items())
