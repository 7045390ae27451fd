"""What a folder does when transformers loads it: the logits, texts, tokens and prompts that come out.

The measure that the proof is held against: nothing here is taken from the code under test.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

TEXT = "the cat  sat in the rain <s> then<|end|> zzz é"
MESSAGES = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "there"}]
IDS = torch.tensor([[1, 40, 41, 17, 99, 150, 7, 12, 200, 33, 61, 18]])


@dataclass(frozen=True)
class Outputs:
    """All that is measured of one folder."""

    logits: torch.Tensor | None = None
    dtype: str = ""
    words: dict[str, Any] = field(default_factory=dict)
    """Name of an output → tokens, text or settings; an error's words where the folder does not load."""

    def change(self, other: Outputs) -> str:
        """What is not equal in the two, in words; empty where nothing is."""
        parts = [name for name in self.words if self.words[name] != other.words.get(name)]
        if (self.logits is None) != (other.logits is None):
            parts.append("loading")
        elif self.logits is not None and other.logits is not None:
            apart = (self.logits.double() - other.logits.double()).abs().max().item()
            if apart != 0 or self.dtype != other.dtype:
                parts.append(f"logits by {apart:.3g}")
        return ", ".join(parts)


def measure(folder: Path, *, model: bool = True, trust: bool = False) -> Outputs:
    """Load a folder and ask it for all its outputs."""
    words: dict[str, Any] = {}
    logits, dtype = None, ""
    with _quiet():
        if model:
            try:
                loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
                with torch.no_grad():
                    logits, dtype = loaded(IDS).logits, str(loaded.dtype)
                    torch.manual_seed(0)
                    words["text"] = loaded.generate(IDS, max_new_tokens=12).tolist()
            except Exception as error:
                logits, words["model"] = None, type(error).__name__
        words |= _tokens(folder, trust)
        try:
            words["processor"] = _tokenizer_words(AutoProcessor.from_pretrained(folder))
        except Exception as error:
            words["processor"] = type(error).__name__
    return Outputs(logits, dtype, words)


def _tokens(folder: Path, trust: bool) -> dict[str, Any]:
    try:
        return _tokenizer_words(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust))
    except Exception as error:
        return {"tokenizer": type(error).__name__}


def _tokenizer_words(tokenizer: Any) -> dict[str, Any]:
    ids = tokenizer(TEXT)["input_ids"]
    words = {
        "ids": ids,
        "decoded": tokenizer.decode(ids),
        "skipped": tokenizer.decode(ids, skip_special_tokens=True),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "batch": tokenizer(["the", TEXT], padding=True, truncation=True, max_length=6)["input_ids"],
        "length": tokenizer.model_max_length,
        "vocabulary": len(tokenizer),
    }
    templates = tokenizer.chat_template
    names = list(templates) if isinstance(templates, dict) else [None]
    for name in names:
        try:
            words[f"prompt {name}"] = tokenizer.apply_chat_template(
                MESSAGES, chat_template=name, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            words[f"prompt {name}"] = type(error).__name__
    return words


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
