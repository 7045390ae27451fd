"""Which files belong to a model beside its config and weights: tokenizer, chat template, terms of use."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

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
    "*.py",
)
"""What else a model needs in order to load, and the terms that go with its weights."""


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file's path below the folder is one of those meant; `*` does not cross into a subfolder."""
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)
