"""Which files belong to a model beside its config and weights: tokenizer, chat template, terms of use."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from lorasmith.errors import InputError
from lorasmith.files.inputs import read_input
from lorasmith.parsing import parse_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
"""What transformers writes for a tokenizer."""

OTHER_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""What else a model needs in order to load, and the terms that go with its weights."""

CODE_FILES = ("*.py", "custom_generate/generate.py", "custom_generate/requirements.txt")
"""Python files of a model, wanted only where `names_code` says so: lorasmith runs none of them."""


def names_code(folder: Path) -> bool:
    """Whether the configs of a model name code that comes with it (`auto_map`), or it has a `generate()`.

    transformers runs either for whoever loads the model with `trust_remote_code`; a model whose class its
    configs name cannot be loaded otherwise.
    """
    if (folder / "custom_generate" / "generate.py").is_file():
        return True
    for name in ("config.json", "tokenizer_config.json"):
        try:
            config = parse_json(read_input(folder / name))
        except (InputError, OSError, ValueError):
            continue  # what is wrong with a config is said when the model is opened
        if isinstance(config, dict) and config.get("auto_map"):
            return True
    return False


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file's path below the folder is one of those meant; `*` does not cross into a subfolder."""
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)
