"""Tiny random models, tokenizers and adapters: real architectures and real PEFT, small enough for a test.

Every adapter has all its factors random and non-zero, and strong enough that a merge that does nothing
changes the logits by far more than rounding does.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""ChatML in small."""

_COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_COMMON},
    "llama-tied": {"model_type": "llama", **_COMMON, "tie_word_embeddings": True},
}
"""Name → the config that `tiny_model` builds."""


def tiny_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens without merges but a few of common pairs; offline and exact."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<|start|>", "<|end|>"]
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("i", "n"),
        ("e", "r"),
        ("Ġ", "Ġ"),
        ("ĠĠ", "ĠĠ"),
        ("r", "e"),
        ("o", "n"),
    ]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>" if chat else "</s>",
        additional_special_tokens=["<|start|>", "<|end|>"],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(
    name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random model of an architecture of `ARCHITECTURES`, with weights large enough that outputs differ."""
    torch.manual_seed(seed)
    settings = {"initializer_range": 0.2, **ARCHITECTURES[name], **overrides}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(dtype).eval()


def save_base(
    folder: Path,
    name: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
    chat: bool = True,
    **overrides: Any,
) -> Path:
    """A base model folder: shards, config, tokenizer with chat template."""
    model = tiny_model(name, seed=seed, dtype=dtype, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer(chat=chat).save_pretrained(folder)
    return folder


def randomize_adapter(model: PeftModel, *, seed: int = 1, std: float = 0.2) -> None:
    """Give every trainable tensor random non-zero values, as no initialisation of PEFT does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std
                parameter.copy_(parameter + noise.to(parameter.dtype))


def save_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int = 1,
    std: float = 0.2,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A PEFT adapter folder for the model in `base`, written by PEFT itself."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft_model = get_peft_model(model, LoraConfig(**settings))
    randomize_adapter(peft_model, seed=seed, std=std)
    if dtype != torch.float32:
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    peft_model.save_pretrained(folder)
    return folder


def tiny_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Test-set rows of mixed lengths, three sources, domains and difficulties."""
    generator = random.Random(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", "in", "rain", "then", "ran", "over", "there", "into"]
    rows = []
    for index in range(count):
        prompt = " ".join(generator.choices(words, k=generator.randint(2, 14)))
        response = " ".join(generator.choices(words, k=generator.randint(1, 12)))
        rows.append(
            {
                "id": f"row-{index}",
                "prompt": prompt,
                "response": response,
                "metadata": {
                    "source": ("alpha", "beta", "gamma")[index % 3],
                    "domain": ("one", "two")[index % 2],
                    "difficulty": ("easy", "medium", "hard")[index % 3],
                },
            }
        )
    return rows
