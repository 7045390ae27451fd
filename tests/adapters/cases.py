"""What is merged in the tests: variants of LoRA, the architectures each runs on, and why it is there.

A case names the registry entries that it exercises; an entry without a case fails the contract test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3")
ATTENTION: dict[str, list[str]] = {
    "phi3": ["qkv_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gpt-neox": ["query_key_value", "dense"],
}
"""What stands for q_proj and o_proj where they are called otherwise."""
EMBEDDING = {"gpt2": "wte", "gpt-neox": "embed_in"}
NORM = {"gpt2": "ln_f", "gpt-neox": "final_layer_norm"}


@dataclass(frozen=True)
class Case:
    """One variant on one architecture."""

    variant: str
    architecture: str
    config: dict[str, Any]
    entries: tuple[str, ...] = ("lora",)
    """Registry entries that it exercises."""
    std: float = 0.2
    """Size of the noise on every trained tensor."""
    changed: tuple[str, ...] = ()
    """Fragments of tensor names that must be among the changed ones."""
    untied: bool = field(default=False)

    def __str__(self) -> str:
        return f"{self.variant}-{self.architecture}"


def attention(architecture: str) -> list[str]:
    """The attention's projections."""
    return ATTENTION.get(architecture, ["q_proj", "o_proj"])


def _cases() -> list[Case]:
    found: list[Case] = []
    everywhere = (*DENSE, "gpt2", "gpt-neox", "llava", "mixtral", "qwen3-moe", "llama4-text", "llama-tied")
    for name in everywhere:
        found.append(Case("plain", name, {"target_modules": attention(name)}))
        if name not in ("mixtral", "qwen3-moe", "llama4-text"):
            found.append(
                Case("all-linear", name, {"target_modules": "all-linear", "use_rslora": True, "r": 3})
            )
    for name in (*DENSE, "gpt2", "gpt-neox", "llava"):
        config = {"target_modules": attention(name), "use_dora": True}
        found.append(Case("dora", name, config, ("dora",), changed=(attention(name)[0],)))
    for name in ("llama", "qwen2", "gpt-neox"):
        # PEFT sorts the patterns when it saves them, so only a sorted dict means the same before and after.
        patterns = {r"layers\.1\..*": 6, attention(name)[0]: 2}
        alphas = {attention(name)[1]: 3}
        config = {"target_modules": attention(name), "rank_pattern": patterns, "alpha_pattern": alphas}
        found.append(Case("patterns", name, config))
    for name in ("llama", "qwen3", "phi3", "gpt-neox", "llava"):
        embedding = EMBEDDING.get(name, "embed_tokens")
        config = {"target_modules": [*attention(name), embedding]}
        found.append(Case("embedding", name, config, ("embedding", "lora"), changed=(embedding,)))
    config = {"target_modules": ["embed_tokens"], "use_dora": True}
    found.append(Case("embedding-dora", "llama", config, ("embedding",), changed=("embed_tokens",)))
    for name in ("llama-tied", "gemma3", "gpt2"):
        embedding = EMBEDDING.get(name, "embed_tokens")
        found += _tied(name, embedding)
    for name in ("qwen2", "gpt2", "gpt-neox"):
        target = attention(name)[:1]
        for bias in ("lora_only", "all"):
            config = {"target_modules": target, "bias": bias}
            found.append(Case(f"bias-{bias}", name, config, ("trained-bias", "lora"), changed=("bias",)))
        config = {"target_modules": target, "lora_bias": True}
        found.append(Case("lora-bias", name, config, ("lora-bias", "lora"), changed=("bias",)))
    for name in ("llama", "gpt2", "gpt-neox", "llava"):
        modules = [NORM.get(name, "norm")]
        if name not in ("gpt2", "llava"):
            modules += [EMBEDDING.get(name, "embed_tokens")]
        config = {"target_modules": attention(name), "modules_to_save": modules}
        found.append(Case("saved-modules", name, config, ("saved-module", "lora"), changed=(modules[-1],)))
    for name in ("llama", "qwen2", "llava", "gpt-neox"):
        config = {"target_modules": attention(name), "trainable_token_indices": [3, 250, 7]}
        found.append(Case("tokens", name, config, ("trainable-tokens", "lora")))
    for name, weight in (("llama", "q_proj.weight"), ("gpt2", "c_attn.weight")):
        config = {"target_modules": [], "target_parameters": [weight], "rank_pattern": {weight: 2}}
        found.append(Case("parameter", name, config, changed=(weight,)))
    indices = {"embed_tokens": [3, 7], "lm_head": [9, 250, 4]}
    config = {"target_modules": ["q_proj"], "trainable_token_indices": indices}
    found.append(Case("tokens-of-head", "llama", config, ("trainable-tokens", "lora"), changed=("lm_head",)))
    for name in ("llama-tied", "gemma3", "gpt2"):
        config = {"target_modules": attention(name), "trainable_token_indices": [3, 7]}
        found.append(Case("tokens-tied", name, config, ("trainable-tokens", "lora")))
    return found + _experts()


def _tied(name: str, embedding: str) -> list[Case]:
    entries = ("embedding", "lora")
    found = [
        Case("tied-embedding", name, {"target_modules": [embedding]}, entries, untied=True),
        Case("tied-head", name, {"target_modules": ["lm_head"]}, untied=True, changed=("lm_head",)),
        Case("tied-both", name, {"target_modules": ["lm_head", embedding]}, entries, untied=True),
        Case(
            "tied-embedding-dora",
            name,
            {"target_modules": [embedding], "use_dora": True},
            entries,
            untied=True,
        ),
        Case(
            "tied-head-dora", name, {"target_modules": ["lm_head"], "use_dora": True}, ("dora",), untied=True
        ),
    ]
    for modules in ([embedding], ["lm_head"], ["lm_head", embedding]):
        config = {"target_modules": attention(name), "modules_to_save": modules}
        label = "tied-saved-" + "-".join("head" if part == "lm_head" else "embedding" for part in modules)
        found.append(Case(label, name, config, ("saved-module", "lora"), untied=True))
    if name == "llama-tied":
        config = {"target_modules": [embedding], "ensure_weight_tying": True}
        found.append(Case("tied-kept-embedding", name, config, entries, untied=True))
        config = {"target_modules": ["q_proj"], "modules_to_save": [embedding], "ensure_weight_tying": True}
        found.append(Case("tied-kept-saved", name, config, ("saved-module", "lora"), untied=True))
    return found


def _experts() -> list[Case]:
    found = []
    for name in ("qwen3-moe", "mixtral", "llama4-text"):
        block = "feed_forward.experts." if name == "llama4-text" else "mlp.experts."
        for label, parameters in (
            ("both", ["gate_up_proj", "down_proj"]),
            ("down", ["down_proj"]),
            ("up", ["gate_up_proj"]),
        ):
            config = {
                "target_modules": ["q_proj"],
                "target_parameters": [block + parameter for parameter in parameters],
                "rank_pattern": {"down_proj": 3},
            }
            found.append(Case(f"experts-{label}", name, config, ("experts", "lora"), changed=("experts",)))
    for name in ("qwen3-moe", "mixtral"):
        found.append(Case("experts-all-linear", name, {"target_modules": "all-linear"}, ("experts", "lora")))
    found.append(Case("router", "mixtral", {"target_modules": ["gate"]}, changed=("gate",)))
    return found


CASES = _cases()
