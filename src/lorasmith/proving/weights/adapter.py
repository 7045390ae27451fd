"""An adapter folder as the proof reads it: the settings that change the maths, and the tensors by module.

Follows what peft 0.21 writes (`LoraConfig` and `get_peft_model_state_dict`). What is not known here might
change the result, so it is refused by name.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.errors import AdapterError, InputError, MachineError
from lorasmith.proving.weights.model_folder import ProvenTensor, open_file, read_json

# From module paths, as adapters have them, to names of tensors on disk.
#
# Three kinds of names meet here: those in the base's files, and the module paths of transformers 4 and 5,
# which renamed some modules in memory only. The tables are data; a path that fits the base as it is needs
# none.


STARTS: tuple[tuple[str, ...], ...] = (
    ("model.language_model.", "language_model.model.", "language_model.", "model."),
    ("model.text_model.", "text_model.model.", "text_model."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.audio_tower.", "audio_tower."),
    ("lm_head.", "language_model.lm_head."),
    ("lm_head.", "embed_out."),
    ("transformer.", ""),
    ("model.", ""),
    ("gpt_neox.", ""),
)
"""Beginnings that mean the same, in transformers 4, in transformers 5, or in a file of the bare model."""

MIDDLES: tuple[tuple[str, str], ...] = ((".block_sparse_moe.", ".mlp."),)
"""Inner parts that mean the same."""

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
"""Last part of the path of an input embedding."""

HEADS = ("lm_head", "embed_out")
"""Last part of the path of an output head."""

EXPERT_PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Parameter that stacks all experts → what its rows are, from the top, where each expert has its own file
tensors: first as Qwen and most others call them, then as Mixtral does."""

TRANSPOSED_EXPERTS = frozenset(("gpt_oss", "openai_privacy_filter", "aria", "aria_text"))
"""Model types whose classes say that their stacked experts are [E, in, out] (`is_transposed`)."""


def spellings(path: str) -> Iterator[str]:
    """A path ending in a dot, and all others that may mean the same module; itself first."""
    seen: dict[str, None] = {path: None}
    for middle in ("", *MIDDLES):
        inner = path
        if middle:
            for have, want in (middle, middle[::-1]):
                if have in path:
                    inner = path.replace(have, want)
        seen.setdefault(inner)
        for group in STARTS:
            for have in group:
                if inner.startswith(have) and (have or not inner.startswith(group[0])):
                    for want in group:
                        seen.setdefault(want + inner[len(have) :])
    return iter(seen)


def find(path: str, leaf: str, names: Iterable[str]) -> list[str]:
    """Names on disk that may be the tensor `leaf` of the module at `path`: one, or none, or too many.

    A name that fits as it is wins over all other spellings.
    """
    known = names if isinstance(names, dict | set | frozenset) else set(names)
    fitting = [f"{spelling}{leaf}" for spelling in spellings(f"{path}.") if f"{spelling}{leaf}" in known]
    return fitting[:1] if fitting and fitting[0] == f"{path}.{leaf}" else fitting


def expert_names(path: str, part: str, names: Iterable[str]) -> dict[int, str]:
    """Number of an expert → name of its weight, for a module of experts that are stored one by one."""
    starts = tuple(spellings(f"{path}."))
    result: dict[int, str] = {}
    ending = f".{part}.weight"
    for name in names:
        if name.endswith(ending) and name.startswith(starts):
            match = re.fullmatch(r"(.*\.)(\d+)", name.removesuffix(ending))
            if match and match[1] in starts:
                result[int(match[2])] = name
    return result


def is_named(path: str, listed: object) -> bool:
    """Whether a config's list of targets names a path or its end; such a weight is taken as it is stored."""
    named = listed if isinstance(listed, list) else []
    return any(isinstance(one, str) and f".{path}".endswith(f".{one}") for one in named)


def is_embedding(path: str) -> bool:
    """Whether a module path is an input embedding's."""
    return path.rpartition(".")[2] in EMBEDDINGS


def is_head(path: str) -> bool:
    """Whether a module path is an output head's."""
    return path.rpartition(".")[2] in HEADS


# Which pattern of a config a module fits: asked of Python's own `re`, in a process that can be ended.
#
# Its matcher tries exponentially many ways for some expressions, and nothing can stop it from within.
# Patterns that cannot do so, because nothing in them is optional, repeated or a choice, are matched here.


SECONDS = 10.0
"""For all modules of an adapter together; honest patterns take milliseconds."""
_NAMES_AT_ONCE = 20_000
_FEW = 1_000_000
"""Matches of plain patterns that take some seconds at most."""
_PLAIN = re.compile(r"[A-Za-z0-9_.\\-]*")
"""Characters, dots and escapes: each stands for exactly one character."""

_ASK = """
import json, re, sys
patterns, names = json.load(sys.stdin)
whole = [re.compile(r"(.*\\.)?(" + pattern + ")$") for pattern in patterns]
json.dump([next((i for i, one in enumerate(whole) if one.match(name)), None) for name in names], sys.stdout)
"""


class PatternError(Exception):
    """A pattern that is no expression, or that takes too long; says which and why."""


def check(pattern: str) -> None:
    """Raise `PatternError` for what Python cannot read as an expression, alone or where PEFT puts it."""
    try:
        re.compile(pattern)
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"the pattern {pattern[:80]!r}: {error}") from error


def first_fitting(patterns: Sequence[str], names: Iterable[str]) -> dict[str, str | None]:
    """Name → the first pattern that fits it, or None; raises `PatternError` where that takes too long."""
    wanted = list(dict.fromkeys(names))
    few = len(patterns) * len(wanted) <= _FEW
    if few and all(_PLAIN.fullmatch(pattern) for pattern in patterns):
        whole = [(pattern, re.compile(rf"(.*\.)?({pattern})$")) for pattern in patterns]
        return {name: next((text for text, one in whole if one.match(name)), None) for name in wanted}
    fitting: dict[str, str | None] = {}
    for start in range(0, len(wanted), _NAMES_AT_ONCE):
        part = wanted[start : start + _NAMES_AT_ONCE]
        places = _ask(patterns, part)
        for name, place in zip(part, places, strict=True):
            fitting[name] = None if place is None else patterns[place]
    return fitting


def _ask(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _ASK],
            input=json.dumps([list(patterns), list(names)]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PatternError(
            f"its patterns take longer than {SECONDS:.0f} s to match: '{', '.join(patterns)[:80]}'"
        ) from error
    if done.returncode != 0:
        raise MachineError(
            f"the process that matches patterns ended with {done.returncode}",
            where=sys.executable,
            expected=done.stderr.strip().splitlines()[-1] if done.stderr.strip() else None,
        )
    places: list[int | None] = json.loads(done.stdout)
    return places


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
    modules: Mapping[str, Mapping[str, ProvenTensor]] = field(default_factory=dict)
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
                patterns = first_fitting(list(values), new)
            except PatternError as error:
                raise self.refuse(f"{kind}: {error}", "names of modules, or simple patterns") from error
            self.fitting.update({(kind, name): pattern for name, pattern in patterns.items()})
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


def _by_module(adapter: Adapter) -> dict[str, dict[str, ProvenTensor]]:
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
    modules: dict[str, dict[str, ProvenTensor]] = {}
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


def _check_pairs(adapter: Adapter, module: str, roles: Mapping[str, ProvenTensor]) -> None:
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
