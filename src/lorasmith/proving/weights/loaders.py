"""What a standard loader reads of a model folder, file by file: the list that the proof goes by.

docs/proof.md has it as a table.

Written down from transformers 5.23: `from_pretrained` of models, tokenizers, processors and generation
configs, also with `trust_remote_code`. What this list does not name is read by no loader.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Part = Literal[
    "weights",
    "on request",
    "adapter",
    "adapter weights",
    "config",
    "generation",
    "tokenizer",
    "template",
    "processor",
    "code",
]


@dataclass(frozen=True)
class Read:
    """Files that some loader reads."""

    part: Part
    """What becomes of them."""
    by: str
    """Who reads them, and when."""
    patterns: tuple[str, ...]
    """Paths below the folder; `*` does not cross into a subfolder. The first entry that fits counts."""


READS: tuple[Read, ...] = (
    Read("config", "AutoConfig: every field", ("config.json",)),
    Read("config", "AutoConfig, where configuration_files names it", ("config.*.json",)),
    Read("generation", "generate(), as its defaults", ("generation_config.json",)),
    Read("adapter", "any model, which it is applied to once more", ("adapter_config.json",)),
    Read(
        "adapter weights",
        "any model, beside adapter_config.json",
        ("adapter_model*.safetensors", "adapter_model*.bin", "adapter_model*.index.json"),
    ),
    Read(
        "weights",
        "any model: the single file before the shards",
        ("model.safetensors", "model.safetensors.index.json"),
    ),
    Read(
        "on request",
        "a model with use_safetensors=False, a variant or gguf_file; some engines take every file there is",
        (
            "*.safetensors",
            "*.safetensors.index*.json",
            "pytorch_model*.bin",
            "*.bin.index*.json",
            "*.gguf",
            "tf_model*.h5",
            "flax_model*.msgpack",
            "consolidated*.pth",
            "params.json",
        ),
    ),
    Read("tokenizer", "AutoTokenizer", ("tokenizer.json", "tokenizer_config.json")),
    Read("tokenizer", "AutoTokenizer, where fast_tokenizer_files names it", ("tokenizer.*.json",)),
    Read(
        "tokenizer",
        "AutoTokenizer, where tokenizer_config.json has no added_tokens_decoder",
        ("special_tokens_map.json", "added_tokens.json"),
    ),
    Read(
        "tokenizer",
        "AutoTokenizer, in place of a tokenizer.json or beside it",
        (
            "tokenizer.model*",
            "tekken.json",
            "*.tiktoken",
            "tiktoken.model",
            "vocab.json",
            "vocab.txt",
            "merges.txt",
            "spiece.model",
            "sentencepiece*.model",
            "spm*.model",
            "bpe.codes",
            "dict.txt",
            "source.spm",
            "target.spm",
            "target_vocab.json",
            "vocab-src.json",
            "vocab-tgt.json",
            "entity_vocab.json",
            "word_shape.json",
            "word_pronunciation.json",
            "byte_maps.json",
            "emoji.json",
            "normalizer.json",
            "prophetnet.tokenizer",
        ),
    ),
    Read(
        "template",
        "AutoTokenizer and AutoProcessor, before a template in tokenizer_config.json",
        ("chat_template.jinja", "additional_chat_templates/*.jinja"),
    ),
    Read(
        "processor",
        "AutoProcessor",
        (
            "processor_config.json",
            "preprocessor_config.json",
            "image_processor_config.json",
            "video_preprocessor_config.json",
            "audio_tokenizer_config.json",
            "chat_template.json",
        ),
    ),
    Read("code", "generate() with trust_remote_code", ("custom_generate/*",)),
    Read("code", "any loader with trust_remote_code, where an auto_map names it", ("*.py",)),
)
"""Every file that loading a model folder can depend on."""

FREE_FIELDS = frozenset(("transformers_version", "_name_or_path", "_commit_hash"))
"""Fields of a config that tell where it comes from. Of the loaders only AutoTokenizer looks at them, and the
tokenizers that it makes are compared by themselves."""

DERIVED_FIELDS = frozenset(
    ("dtype", "torch_dtype", "vocab_size", "tie_word_embeddings", "architectures", "quantization_config")
)
"""Fields of a config that a merge may have to change; what they must be follows from base and adapter."""

HEAD_IN_TEXT_MODEL = frozenset(
    ("blip-2", "instructblip", "instructblipvideo", "kosmos-2.5", "llama4", "pix2struct")
)
"""Types of models whose output head belongs to their text model, so that its flag ties it; elsewhere the flag
of the config itself does, whatever a text_config says."""


TEXT_MODEL_ALONE = frozenset(
    ("dots3_note", "emu3", "llama4", "mllama", "qwen3_5", "qwen3_5_moe", "qwen4_exp")
)
"""Types of models whose text model AutoModelForCausalLM loads alone, by the text_config; elsewhere the
config's own dtype and flag overrule those within it."""


def find_read(path: str) -> Read | None:
    """The entry for a file, by its path below the folder; None for what no loader reads."""
    for read in READS:
        for pattern in read.patterns:
            if path.count("/") == pattern.count("/") and fnmatchcase(path, pattern):
                return read
    return None
