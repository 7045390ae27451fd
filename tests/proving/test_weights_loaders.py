"""The list of what loaders read is transformers' own: its files, its heads, its text models."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from lorasmith.proving.weights.loaders import (
    DERIVED_FIELDS,
    FREE_FIELDS,
    HEAD_IN_TEXT_MODEL,
    READS,
    TEXT_MODEL_ALONE,
    find_read,
)


def test_every_file_that_a_tokenizer_class_names_is_on_the_list() -> None:
    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        block = re.search(
            r"^VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text("utf-8"), re.DOTALL | re.MULTILINE
        )
        names |= set(re.findall(r':\s*"([^"]+)"', block[1])) if block else set()
    assert len(names) > 15
    assert {name for name in names if find_read(name) is None} == set()


def test_every_name_that_a_loader_has_for_a_file_is_on_the_list() -> None:
    names = set()
    for module in ("utils", "utils.hub", "utils.peft_utils", "tokenization_utils_base"):
        for name, value in vars(importlib.import_module(f"transformers.{module}")).items():
            if name.endswith(("_NAME", "_FILE")) and isinstance(value, str) and "." in value:
                names.add(value)
    assert {"adapter_config.json", "processor_config.json", "added_tokens.json"} <= names
    assert {name for name in names if find_read(name) is None} == {"modelcard.json"}


@pytest.mark.parametrize("kind", [*sorted(HEAD_IN_TEXT_MODEL), "llava", "gemma3", "qwen2_5_vl", "idefics3"])
def test_the_flag_that_ties_is_the_one_that_the_loader_reads(kind: str) -> None:
    named = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
    config = CONFIG_MAPPING[kind]()
    config.tie_word_embeddings = kind not in HEAD_IN_TEXT_MODEL
    config.get_text_config().tie_word_embeddings = kind in HEAD_IN_TEXT_MODEL
    with torch.device("meta"):
        tied = getattr(transformers, named)._from_config(config).all_tied_weights_keys
    assert any(name.endswith("lm_head.weight") for name in tied)


def test_the_types_whose_text_model_loads_alone_are_those_of_transformers() -> None:
    alone = set()
    for kind, name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        text = CONFIG_MAPPING[kind].sub_configs.get("text_config") if kind in CONFIG_MAPPING else None
        if text is not None and getattr(transformers, name).config_class is text:
            alone.add(kind)
    assert alone == TEXT_MODEL_ALONE


def test_the_documentation_has_the_whole_list() -> None:
    text = (Path(__file__).parents[2] / "docs" / "proof.md").read_text("utf-8")
    patterns = [pattern for read in READS for pattern in read.patterns]
    missing = [name for name in (*patterns, *FREE_FIELDS, *DERIVED_FIELDS) if f"`{name}`" not in text]
    assert missing == []
