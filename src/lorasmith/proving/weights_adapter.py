"""An adapter folder as the proof reads it: the settings that change the maths, and the tensors by module.

Follows what peft 0.21 writes (`LoraConfig` and `get_peft_model_state_dict`). What is not known here might
change the result, so it is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.errors import AdapterError, InputError
from lorasmith.proving.weights_folder import open_file, read_json
from lorasmith.proving.weights_names import EXPERT_PARTS
from lorasmith.proving.weights_patterns import PatternError, check, first_fitting
from lorasmith.proving.weights_stored import Stored

PREFIX = "base_model.model."

ROLES: Mapping[str, str] = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "B.bias",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".base_layer.weight": "copy",
    ".base_layer.bias": "bias",
    ".weight": "weight",
    ".bias": "bias",
}
"""How a key ends → what the tensor is for; the first that fits."""

_MATTERS = frozenset(
    (
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "use_dora",
        "fan_in_fan_out",
        "bias",
        "lora_bias",
        "modules_to_save",
        "target_parameters",
        "trainable_token_indices",
        "ensure_weight_tying",
        "peft_type",
        "peft_version",
        "init_lora_weights",
    )
)
_NO_MATTER = frozenset(
    (
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "runtime_config",
        "eva_config",
        "qalora_group_size",
        "_custom_modules",
    )
)
"""Settings of training, or of which modules got an adapter: the tensors show that."""
_OFF: tuple[object, ...] = (None, False, {}, [])

PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base as it was."""


@dataclass(frozen=True)
class Adapter:
    """One adapter, checked as far as that can be done without the base."""

    path: Path
    weight: float
    config: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, Stored]] = field(default_factory=dict)
    """Module path → role → tensor."""
    fitting: dict[tuple[str, str], str | None] = field(default_factory=dict)
    """(rank_pattern or alpha_pattern, module) → the pattern that fits, as far as it was asked for."""

    @property
    def tensors(self) -> int:
        """How many tensors the adapter holds."""
        return sum(len(roles) for roles in self.modules.values())

    def rank(self, module: str) -> int:
        """r, by the first pattern that fits the module."""
        return int(self._by_pattern("rank_pattern", module, self.config["r"]))

    def scale(self, module: str) -> float:
        """α/r, or α/√r with rank-stabilised LoRA (arXiv 2312.03732), in float64 as PEFT computes it."""
        alpha = self._by_pattern("alpha_pattern", module, self.config["lora_alpha"])
        rank = self.rank(module)
        return float(alpha / math.sqrt(rank) if self.config["use_rslora"] else alpha / rank)

    def _by_pattern(self, kind: str, module: str, otherwise: Any) -> Any:
        """The value of the first pattern that fits; all modules are asked about at once."""
        values = self.config[kind]
        if not values:
            return otherwise
        if (kind, module) not in self.fitting:
            stacks = [name for name in self.modules if name.endswith(".experts")]
            parameters = [f"{name}.{part}" for name in stacks for part in EXPERT_PARTS]
            asked = [module, *self.modules, *parameters]
            new = [name for name in asked if (kind, name) not in self.fitting]
            try:
                found = first_fitting(list(values), new)
            except PatternError as error:
                raise self.refuse(f"{kind}: {error}", "names of modules, or simple patterns") from error
            self.fitting.update({(kind, name): pattern for name, pattern in found.items()})
        pattern = self.fitting[kind, module]
        return otherwise if pattern is None else values[pattern]

    def refuse(self, found: str, expected: str | None = None, remedy: str | None = None) -> AdapterError:
        """The error that something is wrong with this adapter."""
        return AdapterError(found, where=self.path, expected=expected, remedy=remedy)


def read_adapter(path: Path, weight: float) -> Adapter:
    """Read settings and tensor headers; raises `AdapterError` for what cannot be merged for certain."""
    try:
        config = read_json(path / "adapter_config.json")
    except InputError as error:
        raise AdapterError(
            error.found, where=error.where, expected="the folder of a PEFT adapter", remedy=error.remedy
        ) from error
    adapter = Adapter(path, weight, _with_defaults(config))
    _check_config(adapter, config)
    return Adapter(path, weight, adapter.config, _by_module(adapter))


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "r": 8,
        "lora_alpha": 8,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
        "init_lora_weights": True,
        **config,
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
    }


def _check_config(adapter: Adapter, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise adapter.refuse(f"peft_type is {config.get('peft_type')!r}", "'LORA'")
    for name, value in config.items():
        if name not in _MATTERS and name not in _NO_MATTER and value not in _OFF:
            raise adapter.refuse(f"the setting {name!r} is {value!r}", "a setting whose effect is known here")
    start = adapter.config["init_lora_weights"]
    if start not in PLAIN_STARTS:
        raise adapter.refuse(
            f"init_lora_weights is {start!r}: the adapter belongs to a changed base",
            "an initialisation that leaves the base alone",
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion",
        )
    numbers = {"r": adapter.config["r"], "lora_alpha": adapter.config["lora_alpha"]}
    for kind in ("rank_pattern", "alpha_pattern"):
        if not isinstance(adapter.config[kind], dict):
            raise adapter.refuse(f"{kind} is {adapter.config[kind]!r}", "an object of patterns and numbers")
        for pattern in adapter.config[kind]:
            try:
                check(pattern)
            except PatternError as error:
                raise adapter.refuse(f"{kind} has {error}") from error
        numbers.update({f"{kind}[{key!r}]": value for key, value in adapter.config[kind].items()})
    for name, value in numbers.items():
        rank = name.startswith("r")
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or (rank and (value != int(value) or value < 1)):
            raise adapter.refuse(f"{name} is {value!r}", "a whole number ≥ 1" if rank else "a number")
    if adapter.config["lora_bias"] and adapter.config["use_dora"]:
        raise adapter.refuse("lora_bias and use_dora are both on", "one of them; PEFT has no such variant")


def _by_module(adapter: Adapter) -> dict[str, dict[str, Stored]]:
    file = adapter.path / "adapter_model.safetensors"
    if not file.is_file():
        pickled = (adapter.path / "adapter_model.bin").is_file()
        raise adapter.refuse(
            "the adapter is a pickle, which can run code" if pickled else "the folder has no adapter tensors",
            "adapter_model.safetensors",
            "load it with PEFT where you trust it, and save it again" if pickled else None,
        )
    folder = open_file(file)
    for problem in folder.problems:
        raise AdapterError(problem.message, where=file)
    modules: dict[str, dict[str, Stored]] = {}
    for name, stored in folder.tensors.items():
        module, role = _parse(adapter, name)
        roles = modules.setdefault(module, {})
        if role in roles:
            raise adapter.refuse(f"two tensors of {module!r} are its {role}", "one")
        roles[role] = stored
    if not modules:
        raise adapter.refuse("the adapter holds no tensors")
    for module, roles in modules.items():
        _check_pairs(adapter, module, roles)
    return modules


def _parse(adapter: Adapter, name: str) -> tuple[str, str]:
    if ".default." in name or name.endswith(".default"):
        raise adapter.refuse(
            f"the key {name!r} still holds the adapter's name",
            "keys as PEFT's save_pretrained writes them",
            "save the adapter with save_pretrained",
        )
    if name.startswith(PREFIX):
        for ending, role in ROLES.items():
            if name.endswith(ending) and len(name) > len(PREFIX) + len(ending):
                return name[len(PREFIX) : -len(ending)], role
    raise adapter.refuse(
        f"the key {name!r} is of no known kind", f"{PREFIX}MODULE.lora_A.weight and the like"
    )


def _check_pairs(adapter: Adapter, module: str, roles: Mapping[str, Stored]) -> None:
    for one, other in (("A", "B"), ("embedding_A", "embedding_B")):
        for have, lack in ((one, other), (other, one)):
            if have in roles and lack not in roles:
                raise adapter.refuse(f"{module!r} has lora_{have} but no lora_{lack}", "both")
    for part in ("B.bias", "magnitude"):
        if part in roles and "B" not in roles and "embedding_B" not in roles:
            raise adapter.refuse(f"{module!r} has a {part} but no factors", "lora_A and lora_B")
    factored = "B" in roles or "embedding_B" in roles
    if factored and bool(adapter.config["use_dora"]) != ("magnitude" in roles):
        there = "has" if "magnitude" in roles else "has no"
        raise adapter.refuse(f"{module!r} {there} lora_magnitude_vector", "what use_dora says")
    if "B" in roles and bool(adapter.config["lora_bias"]) != ("B.bias" in roles):
        there = "has" if "B.bias" in roles else "has no"
        raise adapter.refuse(f"{module!r} {there} lora_B.bias", "what lora_bias says")
