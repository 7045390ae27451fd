"""Folders that must not load silently: missing or foreign tensors, another vocabulary, no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.errors import AdapterError, CheckpointError
from lorasmith.models.load import load_model, load_tokenizer
from tests.tiny import save_adapter, save_base, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base)


def edit_tensors(adapter: Path, change: str) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if change == "drop":
        del tensors[name]
    elif change == "foreign":
        tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()
    elif change == "named":  # a file whose keys still hold the name of the adapter in the training program
        tensors = {key.replace(".weight", ".mine.weight"): value for key, value in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def test_loads_in_float32_with_the_adapter_active(base: Path, adapter: Path) -> None:
    plain, adapted = load_model(base), load_model(base, adapter=adapter)
    ids = torch.arange(5, 20)[None]
    with torch.inference_mode():
        a, b = plain.model(ids).logits, adapted.model(ids).logits
    assert a.dtype == b.dtype == torch.float32
    assert float((a - b).abs().max()) > 0.1
    assert plain.parameters == adapted.parameters
    assert (plain.architecture, plain.vocabulary, plain.context) == ("LlamaForCausalLM", 300, 256)


@pytest.mark.parametrize(
    ("change", "words"), [("drop", "missing from"), ("foreign", "left over"), ("named", "missing from")]
)
def test_adapter_tensors_that_do_not_fit_are_an_error(
    base: Path, adapter: Path, change: str, words: str
) -> None:
    edit_tensors(adapter, change)
    with pytest.raises(AdapterError, match=words) as caught:
        load_model(base, adapter=adapter)
    assert "lora_A" in caught.value.message()


def test_an_adapter_of_a_wider_model_is_an_error(base: Path, tmp_path: Path) -> None:
    wide = save_base(tmp_path / "wide", hidden_size=64)
    with pytest.raises(AdapterError, match="does not load onto this base") as caught:
        load_model(base, adapter=save_adapter(tmp_path / "adapter", wide))
    assert "lora_A" in caught.value.found  # the tensor, not only that there is one
    assert "64" in caught.value.found


def test_an_adapter_with_added_tokens_brings_its_longer_embedding(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model(seed=0)
    model.resize_token_embeddings(304)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=True
    )
    assert load_model(base, adapter=tmp_path / "adapter").vocabulary == 304


def test_a_checkpoint_without_all_its_tensors_is_an_error(base: Path, tmp_path: Path) -> None:
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj"):
        load_model(tmp_path)


def test_a_tokenizer_of_a_larger_vocabulary_is_an_error(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "small", vocab_size=200)
    with pytest.raises(CheckpointError, match="200 rows"):
        load_model(folder)


def test_the_adapters_own_tokenizer_is_used(base: Path, adapter: Path) -> None:
    assert load_tokenizer(base, adapter=adapter).chat_template is not None
    own = tiny_tokenizer(chat=False)
    own.save_pretrained(adapter)
    assert load_tokenizer(base, adapter=adapter).eos_token == own.eos_token != load_tokenizer(base).eos_token


@pytest.mark.parametrize("damage", ["no folder", "no config", "no weights", "no tokenizer", "bad tokenizer"])
def test_a_damaged_folder_is_named(base: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    if damage != "no folder":
        folder.mkdir()
        for file in base.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif damage == "bad tokenizer":
        (folder / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert str(folder) in caught.value.message()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_the_absent_file_of_an_adapter_is_named(base: Path, adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    with pytest.raises(AdapterError) as caught:
        load_model(base, adapter=adapter)
    assert name in caught.value.message()
    assert "Error" not in caught.value.message()


def test_the_absent_shard_of_a_model_is_named(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "model", max_shard_size="30KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert caught.value.where == str(shard)
    assert "Error" not in caught.value.message()
