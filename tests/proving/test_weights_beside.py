"""What lies beside the tensors: no folder is `exact` that transformers loads as another model.

A matrix of changes to a right merge, each in three states of the merge's own record (there, rewritten to
agree with the change, absent), and each measured through transformers on a tiny model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.files import atomic, digests
from lorasmith.merging.merge import merge
from lorasmith.proving.weights.prove import prove
from lorasmith.records.merging import MergeRecord
from tests.proving.loading import Outputs, measure
from tests.tiny import save_adapter, save_base

Change = Callable[[Path], object]
GONE = object()
RECORD = "lorasmith_merge.json"
ROPE = {"rope_theta": 5.0, "rope_type": "default"}


def edit(name: str, **fields: Any) -> Change:
    """Fields of a JSON file set, or taken out."""

    def change(folder: Path) -> None:
        body = json.loads((folder / name).read_text())
        body = {key: value for key, value in {**body, **fields}.items() if value is not GONE}
        (folder / name).write_text(json.dumps(body))

    return change


def write(name: str, text: str) -> Change:
    """A file written, in a new folder if need be."""

    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return change


def drop(*names: str) -> Change:
    """Files removed."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def replace(name: str, old: str, new: str) -> Change:
    """Text of a file replaced."""

    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def of_version_4(folder: Path) -> None:
    """A config that transformers takes in place of config.json: of one layer, in place of two."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.4.0.0.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))


def both(*changes: Change) -> Change:
    """Several changes together."""
    return lambda folder: [change(folder) for change in changes]


def tensors(change: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> Change:
    """The tensors of the single file changed, and saved again."""

    def apply(folder: Path) -> None:
        loaded = dict(load_file(folder / "model.safetensors"))
        change(loaded)
        save_file(loaded, folder / "model.safetensors", {"format": "pt", **metadata})

    return apply


def copied(source: str, name: str) -> Change:
    """A file of the merge copied to another name."""
    return lambda folder: shutil.copy(folder / source, folder / name)


def from_adapter(*names: str) -> Change:
    """Files of the adapter left beside the merge."""
    return lambda folder: [shutil.copy(folder.parent / "adapter" / name, folder) for name in names]


def index(folder: Path) -> None:
    """A shard index beside the single file."""
    names = load_file(folder / "model.safetensors")
    body = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(body))


def shard_beside_single(folder: Path) -> None:
    """A right shard with its index, and a single file of other numbers that loaders prefer."""
    loaded = load_file(folder / "model.safetensors")
    save_file(loaded, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(loaded, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    save_file(
        {name: tensor * 0 for name, tensor in loaded.items()}, folder / "model.safetensors", {"format": "pt"}
    )


CODE = """
from transformers import LlamaForCausalLM
class Mine(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs
"""
GENERATE = "def generate(model, input_ids, **kwargs):\n    return input_ids\n"

CONFIG: dict[str, Change] = {
    "rope_theta beside rope_parameters": edit("config.json", rope_theta=5.0),
    "rope_parameters changed": edit("config.json", rope_parameters=ROPE),
    "rope_parameters removed": edit("config.json", rope_parameters=GONE),
    "rope_parameters removed, rope_theta added": edit("config.json", rope_parameters=GONE, rope_theta=5.0),
    "rope_scaling added": edit("config.json", rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "rms_norm_eps changed": edit("config.json", rms_norm_eps=0.5),
    "rms_norm_eps removed": edit("config.json", rms_norm_eps=GONE),
    "hidden_act changed": edit("config.json", hidden_act="gelu"),
    "hidden_act removed": edit("config.json", hidden_act=GONE),
    "num_key_value_heads removed": edit("config.json", num_key_value_heads=GONE),
    "num_attention_heads changed": edit(
        "config.json", num_attention_heads=2, head_dim=16, num_key_value_heads=1
    ),
    "head_dim removed": edit("config.json", head_dim=GONE),
    "head_dim changed": edit("config.json", head_dim=4),
    "num_hidden_layers less": edit("config.json", num_hidden_layers=1),
    "num_hidden_layers more": edit("config.json", num_hidden_layers=3),
    "attention_bias as a number": edit("config.json", attention_bias=0),
    "mlp_bias on": edit("config.json", mlp_bias=True),
    "sliding_window added": edit("config.json", sliding_window=4),
    "softcap added": edit("config.json", final_logit_softcapping=1.0),
    "is_decoder off": edit("config.json", is_decoder=False),
    "a text_config added": edit("config.json", text_config={"vocab_size": 3}),
    "use_cache off": edit("config.json", use_cache=False),
    "max_position_embeddings changed": edit("config.json", max_position_embeddings=999_999),
    "a float where a whole number stood": edit("config.json", hidden_size=32.0),
    "model_type changed": edit("config.json", model_type="mistral"),
    "model_type unknown": edit("config.json", model_type="x"),
    "model_type removed": edit("config.json", model_type=GONE),
    "architectures changed": edit("config.json", architectures=["MistralForCausalLM"]),
    "architectures removed": edit("config.json", architectures=GONE),
    "tied by the config": edit("config.json", tie_word_embeddings=True),
    "vocab_size less": edit("config.json", vocab_size=299),
    "dtype float16": edit("config.json", dtype="float16"),
    "dtype float32": edit("config.json", dtype="float32"),
    "dtype removed": edit("config.json", dtype=GONE),
    "dtype under its older name": edit("config.json", dtype=GONE, torch_dtype="float16"),
    "older name of dtype beside it": edit("config.json", torch_dtype="float16"),
    "quantization_config added": edit("config.json", quantization_config={"quant_method": "fp8"}),
    "eos_token_id changed": edit("config.json", eos_token_id=5),
    "pad_token_id changed": edit("config.json", pad_token_id=9),
    "transformers_weights added": both(
        edit("config.json", transformers_weights="other.safetensors"),
        lambda folder: save_file(
            {name: tensor * 0 for name, tensor in load_file(folder / "model.safetensors").items()},
            folder / "other.safetensors",
            {"format": "pt"},
        ),
    ),
    "a config for another version": both(
        edit("config.json", configuration_files=["config.4.0.0.json"]),
        of_version_4,
    ),
    "a config for no version": write("config.4.0.0.json", '{"model_type": "llama"}'),
    "a field written twice": replace("config.json", "{", '{"rms_norm_eps": 5.0,'),
    "a byte order mark": lambda folder: (folder / "config.json").write_text(
        "\ufeff" + (folder / "config.json").read_text()
    ),
    "in another encoding": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text(), "utf-16"
    ),
    "no config": drop("config.json"),
}
GENERATION: dict[str, Change] = {
    "eos of generation changed": edit("generation_config.json", eos_token_id=77),
    "sampling otherwise": edit("generation_config.json", do_sample=True, temperature=5.0),
    "penalty added": edit("generation_config.json", repetition_penalty=5.0),
    "forced token added": edit("generation_config.json", suppress_tokens=list(range(3, 200))),
    "generation config removed": drop("generation_config.json"),
    "generation config damaged": write("generation_config.json", "{"),
}
WEIGHTS: dict[str, Change] = {
    "adapter left whole": from_adapter("adapter_config.json", "adapter_model.safetensors"),
    "adapter's config left": from_adapter("adapter_config.json"),
    "adapter's weights left": from_adapter("adapter_model.safetensors"),
    "pickle beside": write("pytorch_model.bin", "x"),
    "index of pickles beside": write("pytorch_model.bin.index.json", '{"weight_map": {}}'),
    "index beside": index,
    "other single file beside the shards": shard_beside_single,
    "variant beside": copied("model.safetensors", "model.fp16.safetensors"),
    "another checkpoint beside": write("consolidated.safetensors", "x"),
    "weights of TensorFlow beside": write("tf_model.h5", "x"),
    "weights of Flax beside": write("flax_model.msgpack", "x"),
    "GGUF beside": write("model.Q4_K_M.gguf", "x"),
    "weights in a subfolder": write("original/consolidated.00.pth", "x"),
    "all in float16": tensors(lambda t: t.update({name: one.half() for name, one in t.items()})),
    "a tensor too many": tensors(lambda t: t.update({"more.weight": torch.zeros(3)})),
    "the head missing": tensors(lambda t: t.pop("lm_head.weight")),
    "the head missing and tied": both(
        tensors(lambda t: t.pop("lm_head.weight")), edit("config.json", tie_word_embeddings=True)
    ),
    "metadata more": tensors(lambda t: None, x="y"),
}
TOKENS: dict[str, Change] = {
    "eos of the tokenizer changed": edit("tokenizer_config.json", eos_token="<pad>"),
    "padding side changed": edit("tokenizer_config.json", padding_side="left"),
    "longest input changed": edit("tokenizer_config.json", model_max_length=5),
    "class changed": edit("tokenizer_config.json", tokenizer_class="LlamaTokenizer"),
    "spaces cleaned up": edit("tokenizer_config.json", clean_up_tokenization_spaces=True),
    "a template in the config, beside its file": edit("tokenizer_config.json", chat_template="x"),
    "a special token more": edit("tokenizer_config.json", extra_special_tokens=["<|start|>", "the"]),
    "a token in the config": edit(
        "tokenizer_config.json",
        added_tokens_decoder={"290": {"content": "zzz", "special": False, "normalized": False}},
    ),
    "vocabulary changed": replace("tokenizer.json", '"the":', '"teh":'),
    "merges changed": replace("tokenizer.json", '"th",', '"ht",'),
    "tokenizer.json removed": drop("tokenizer.json"),
    "tokenizer_config.json removed": drop("tokenizer_config.json"),
    "tokenizer.json damaged": write("tokenizer.json", "{"),
    "tokenizer.json of another version beside": copied("tokenizer.json", "tokenizer.4.0.0.json"),
    "special_tokens_map.json added": write("special_tokens_map.json", '{"eos_token": "<pad>"}'),
    "added_tokens.json added": write("added_tokens.json", '{"zzz": 290}'),
    "vocab.json added": write("vocab.json", "{}"),
    "tokenizer.model added": write("tokenizer.model", "x"),
    "spiece.model added": write("spiece.model", "x"),
    "template changed": write("chat_template.jinja", "{{ 'other' }}"),
    "template removed": drop("chat_template.jinja"),
    "template of tools added": write("additional_chat_templates/tool_use.jinja", "other"),
    "older template file added": write("chat_template.json", '{"chat_template": "other"}'),
    "processor added": write("processor_config.json", '{"processor_class": "LlavaProcessor"}'),
    "preprocessor added": write("preprocessor_config.json", '{"image_processor_type": "x"}'),
    "written otherwise": lambda folder: (folder / "tokenizer.json").write_text(
        json.dumps(json.loads((folder / "tokenizer.json").read_text()), sort_keys=True)
    ),
}
CODES: dict[str, Change] = {
    "auto_map without its code": edit("config.json", auto_map={"AutoModelForCausalLM": "modeling_x.Mine"}),
    "auto_map and its code": both(
        edit("config.json", auto_map={"AutoModelForCausalLM": "modeling_x.Mine"}),
        write("modeling_x.py", CODE),
    ),
    "code that nothing names": write("modeling_x.py", CODE),
    "a generate of its own": write("custom_generate/generate.py", GENERATE),
}
NOBODY: dict[str, Change] = {
    "a card": write("README.md", "# A model"),
    "another text": write("notes.txt", "x"),
    "a license": write("LICENSE", "x"),
}
CHANGES = CONFIG | GENERATION | WEIGHTS | TOKENS | CODES | NOBODY


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with generation config, tokenizer and template, an adapter for it, and the right merge."""
    place = tmp_path_factory.mktemp("beside")
    base = save_base(place / "base")
    write(
        "generation_config.json",
        '{"do_sample": false, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}',
    )(base)
    adapter = save_adapter(place / "adapter", base, target_modules=["q_proj", "down_proj"])
    merge(base, adapter, place / "merged")
    return place


@pytest.fixture(scope="module")
def untouched(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """The outputs of the right merge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("code"))
        )
        return measure(place / "merged")


def rewrite_record(folder: Path) -> None:
    """The merge's record, as a tool writes it that agrees with all that is there."""
    record = atomic.read_record(folder / RECORD, MergeRecord)
    files = [file for file in digests.folder_files(folder) if file.name not in (RECORD, "README.md")]
    atomic.write_record(folder / RECORD, record.model_copy(update={"files": digests.describe(files, folder)}))


STATES: dict[str, Change] = {
    "there": lambda folder: None,
    "rewritten": rewrite_record,
    "absent": drop(RECORD),
}


def test_the_right_merge_is_exact_in_every_state(place: Path, untouched: Outputs, tmp_path: Path) -> None:
    assert untouched.logits is not None and not any("Error" in str(word) for word in untouched.words.values())
    for state, change in STATES.items():
        folder = shutil.copytree(place / "merged", tmp_path / state)
        change(folder)
        proof = prove(place / "base", place / "adapter", folder)
        assert (proof.grade, {f.severity for f in proof.findings} - {"note"}) == ("exact", set()), (
            proof.findings
        )


@pytest.mark.parametrize("name", CHANGES)
def test_what_loads_otherwise_is_never_exact(
    name: str, place: Path, untouched: Outputs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    shutil.copytree(place / "merged", tmp_path / "changed")
    (tmp_path / "adapter").symlink_to(place / "adapter")
    CHANGES[name](tmp_path / "changed")
    moved = untouched.change(measure(tmp_path / "changed", trust=name in CODES))
    for state, change in STATES.items():
        folder = shutil.copytree(tmp_path / "changed", tmp_path / state)
        change(folder)
        proof = prove(place / "base", place / "adapter", folder)
        told = [f"{finding.severity} {finding.code}" for finding in proof.findings]
        if moved:
            assert proof.grade == "different", (name, state, moved, told)
        if name in NOBODY and state != "there":
            assert proof.grade == "exact" and not any(word.startswith("warning") for word in told), (
                name,
                told,
            )
