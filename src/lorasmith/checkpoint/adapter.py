"""A PEFT adapter folder on disk: its config and the headers of its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorasmith.checkpoint.header import FLOATS, TensorFile, TensorInfo, read_header, read_object
from lorasmith.checkpoint.patterns import Patterns
from lorasmith.errors import AdapterError, CheckpointError, os_errors
from lorasmith.files.inputs import require_own_links

# `adapter_config.json`: which fields change the maths, which are harmless, and what is refused.


T = TypeVar("T")

UNDERSTOOD = frozenset(
    {
        "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out",
        "bias", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices",
        "ensure_weight_tying", "init_lora_weights", "target_modules", "exclude_modules",
        "layers_to_transform", "layers_pattern", "peft_type", "peft_version", "base_model_name_or_path",
        "revision",
    }
)  # fmt: skip
"""Fields whose every value is handled (or refused by a rule of its own below)."""

HARMLESS = frozenset(
    {
        "task_type", "inference_mode", "auto_mapping", "lora_dropout", "megatron_core", "megatron_config",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
        "velora_config",
    }
)  # fmt: skip
"""Fields about training, or about how `init_lora_weights` was done: no value of theirs changes the merge."""

REFUSED: dict[str, str] = {
    "alora_invocation_tokens": "it switches on in the middle of a text, which no merged weight can do",
    "arrow_config": "it routes between adapters at run time, which no merged weight can do",
    "use_qalora": "it pools inputs for a quantized base",
    "layer_replication": "it makes a model with other layers than the base",
    "use_bdlora": "its factors are block-diagonal",
    "monteclora_config": "its factors are random variables",
    "kasa_config": "it truncates the base's own weights when it is loaded",
}
"""Fields that must be off, and what they would mean."""

_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class PeftConfig:
    """The fields of a LoRA config that change the merge, checked."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Patterns[int]
    alpha_pattern: Patterns[float]
    use_dora: bool
    lora_bias: bool
    bias: str
    """Which biases were trained: none, all or lora_only."""
    modules_to_save: tuple[str, ...]
    target_modules: tuple[str, ...] | str | None
    target_parameters: tuple[str, ...]
    trainable_token_indices: Mapping[str, tuple[int, ...]] | tuple[int, ...] | None
    some_layers: bool
    """True where layers_to_transform or exclude_modules left out modules that target_modules names."""
    peft_version: str | None
    base_model: str | None
    revision: str | None

    def rank(self, module: str) -> int:
        """r of one module: the first pattern that fits the end of its path, else the common one."""
        return self.rank_pattern.of(module, self.r)

    def alpha(self, module: str) -> float:
        """α of one module, found as its rank is."""
        return self.alpha_pattern.of(module, self.lora_alpha)

    def scale(self, module: str) -> float:
        """s = α/r, or α/√r with rsLoRA (arXiv 2312.03732), in float64 as PEFT holds it."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)


def parse_config(raw: Mapping[str, Any], where: Path) -> PeftConfig:
    """Check a config; raises `AdapterError` for anything that this merge would not do right."""
    if raw.get("peft_type") != "LORA":
        raise AdapterError(
            f"the adapter's peft_type is {raw.get('peft_type')!r}",
            where=where,
            expected="LORA",
            remedy="only LoRA and its variants can be merged",
        )
    _refuse_fields(raw, where)
    _refuse_initialisations(raw.get("init_lora_weights", True), where)
    bias = raw.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise _wrong(where, "bias", bias, "none, all or lora_only")
    return PeftConfig(
        r=_rank(raw.get("r", 8), "r", where),
        lora_alpha=_number(raw.get("lora_alpha", 8), "lora_alpha", where),
        use_rslora=_flag(raw, "use_rslora", where),
        rank_pattern=_patterns(raw, "rank_pattern", where, _rank),
        alpha_pattern=_patterns(raw, "alpha_pattern", where, _number),
        use_dora=_flag(raw, "use_dora", where),
        lora_bias=_flag(raw, "lora_bias", where),
        bias=bias,
        modules_to_save=_names(raw.get("modules_to_save"), "modules_to_save", where),
        target_modules=_targets(raw.get("target_modules"), where),
        target_parameters=_names(raw.get("target_parameters"), "target_parameters", where),
        trainable_token_indices=_token_indices(raw.get("trainable_token_indices"), where),
        some_layers=bool(raw.get("layers_to_transform") is not None or raw.get("exclude_modules")),
        peft_version=_text(raw, "peft_version", where),
        base_model=_text(raw, "base_model_name_or_path", where),
        revision=_text(raw, "revision", where),
    )


def _refuse_fields(raw: Mapping[str, Any], where: Path) -> None:
    for field, value in raw.items():
        if field in REFUSED and value not in (None, False, [], {}):
            raise AdapterError(
                f"the adapter uses {field}: {REFUSED[field]}",
                where=where,
                expected=f"{field} off",
                remedy="this adapter cannot be merged; serve it with PEFT",
            )
        known = field in UNDERSTOOD or field in HARMLESS or field in REFUSED
        if not known and value not in (None, False, [], {}, ""):
            raise AdapterError(
                f"the adapter's config has the field {field!r} = {str(value)[:80]}, which is not known here",
                where=where,
                expected="fields of PEFT 0.21",
                remedy="use a newer lorasmith; if the field has nothing to do with the weights, remove it",
            )


def _refuse_initialisations(init: Any, where: Path) -> None:
    if isinstance(init, bool) or init is None or init in _HARMLESS_INITS:
        return
    name = str(init)
    if name.startswith(_BASE_CHANGING):
        raise AdapterError(
            f"the adapter was initialised with {name}, which changed the base's weights when training began",
            where=where,
            expected="an adapter for the unchanged base",
            remedy="save it with PEFT's path_initial_model_for_weight_conversion as a plain LoRA",
        )
    raise AdapterError(
        f"the adapter's init_lora_weights is {name[:80]!r}, which is not known here",
        where=where,
        expected="true, false, " + ", ".join(_HARMLESS_INITS),
    )


def _wrong(where: Path, field: str, found: Any, expected: str) -> AdapterError:
    return AdapterError(
        f"the adapter's {field} is {str(found)[:80]!r}", where=where, expected=f"{field}: {expected}"
    )


def _flag(raw: Mapping[str, Any], field: str, where: Path) -> bool:
    value = raw.get(field, False)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _wrong(where, field, value, "true or false")


def _text(raw: Mapping[str, Any], field: str, where: Path) -> str | None:
    value = raw.get(field)
    if value is None or isinstance(value, str):
        return value
    raise _wrong(where, field, value, "a string")


def _rank(value: Any, field: str, where: Path) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31:
        return value
    raise _wrong(where, f"rank {field}" if field != "r" else "r", value, "a whole number above 0")


def _number(value: Any, field: str, where: Path) -> float:
    # Beyond 2**±64 the merge's products could leave the range that float64 computes exactly enough in.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (value == 0 or 2.0**-64 <= abs(value) <= 2.0**64):
        return value
    raise _wrong(where, field, value, "a number between 2**-64 and 2**64 in size, or 0")


def _patterns(
    raw: Mapping[str, Any], field: str, where: Path, check: Callable[[Any, str, Path], T]
) -> Patterns[T]:
    value = raw.get(field) or {}
    if not isinstance(value, dict):
        raise _wrong(where, field, value, "an object")
    return Patterns({key: check(number, key, where) for key, number in value.items()}, field, where)


def _names(value: Any, field: str, where: Path) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise _wrong(where, field, value, "a list of names")


def _targets(value: Any, where: Path) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    return _names(value, "target_modules", where)


def _token_indices(value: Any, where: Path) -> Mapping[str, tuple[int, ...]] | tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, list):
        return _indices(value, where)
    if isinstance(value, dict):
        return {str(name): _indices(indices, where) for name, indices in value.items()}
    raise _wrong(where, "trainable_token_indices", value, "a list of token ids, or one per module")


def _indices(value: Any, where: Path) -> tuple[int, ...]:
    if isinstance(value, list) and all(
        isinstance(index, int) and not isinstance(index, bool) and 0 <= index < 1 << 31 for index in value
    ):
        return tuple(value)
    raise _wrong(where, "trainable_token_indices", value, "token ids")


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter folder whose config and header have been checked; no tensor data is read yet."""

    folder: Path
    config: PeftConfig
    file: TensorFile

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by the name they have on disk."""
        return dict(self.file.tensors)


def open_adapter(folder: Path) -> Adapter:
    """Read config and header of an adapter folder.

    Raises `AdapterError` for a folder that is none, pickled weights, a config that cannot be merged rightly,
    keys that do not begin as PEFT's do or still hold an adapter's name, and tensors that are not floats.
    """
    with os_errors(folder, "open the adapter"):
        if not folder.is_dir():
            raise AdapterError("there is no such adapter folder", where=folder, expected="a folder")
    require_own_links(folder)
    if not (folder / CONFIG).exists():
        raise AdapterError(
            f"the folder holds no {CONFIG}",
            where=folder,
            expected=f"{CONFIG} and {WEIGHTS}, as PEFT saves them",
            remedy="give the folder that PEFT's save_pretrained wrote",
        )
    config = parse_config(read_object(folder / CONFIG, AdapterError), folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise _no_weights(folder)
    try:
        file = read_header(folder / WEIGHTS)
    except CheckpointError as error:
        raise AdapterError(
            error.found, where=error.where, expected=error.expected, remedy=error.remedy
        ) from error
    if not file.tensors:
        raise AdapterError("the adapter holds no tensors", where=file.path)
    for info in file.tensors.values():
        _check_tensor(info, file.path)
    return Adapter(folder, config, file)


def _check_tensor(info: TensorInfo, path: Path) -> None:
    if ".default." in info.name or info.name.endswith(".default"):
        raise AdapterError(
            f"the tensor {info.name!r} still carries the adapter's name `default`",
            where=path,
            expected="names as PEFT's save_pretrained writes them, such as …lora_A.weight",
            remedy="save the adapter with PEFT's save_pretrained; a raw state_dict is not an adapter file",
        )
    if not info.name.startswith(PREFIX):
        raise AdapterError(
            f"the tensor {info.name[:200]!r} does not begin with {PREFIX!r}",
            where=path,
            expected="names as PEFT's save_pretrained writes them",
            remedy="this file was not written by PEFT for a transformers model; convert it first",
        )
    if info.dtype not in FLOATS:
        raise AdapterError(
            f"the tensor {info.name!r} has the type {info.dtype}",
            where=path,
            expected="one of " + ", ".join(FLOATS),
        )


def _no_weights(folder: Path) -> AdapterError:
    if (folder / PICKLE).exists():
        return AdapterError(
            f"the adapter's weights are a pickle ({PICKLE}), which can run any code when it is loaded",
            where=folder,
            expected=WEIGHTS,
            remedy="load it once where you trust it and save it again with PEFT: it writes safetensors",
        )
    return AdapterError(f"the folder holds no {WEIGHTS}", where=folder, expected=f"{CONFIG} and {WEIGHTS}")
