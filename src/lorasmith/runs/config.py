"""What a run is asked to do: defaults, a TOML file, flags; the later wins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from lorasmith.errors import UsageError, os_errors
from lorasmith.followup.asked import FollowupAsked, from_folder, with_named
from lorasmith.gates import GUIDE_GATES
from lorasmith.hub.cache import hub_name
from lorasmith.parsing import parse_toml
from lorasmith.records.base import Part
from lorasmith.records.release import Gate


class RunConfig(Part):
    """All options of `lorasmith run`, as flags (`--test-set`) and as keys of `run.toml` (`test_set`)."""

    base: Path
    """Folder of the base model, or `org/name[@revision]` of the Hugging Face hub."""
    adapter: Path
    """Folder of the LoRA adapter."""
    test_set: Path
    """JSONL with prompt, response and metadata."""
    output: Path
    """The run folder."""
    train: tuple[Path, ...] = ()
    """What the adapter was trained on: the test set is checked against it, `rounding` is fitted to it."""

    precision: Literal["base", "float32", "bfloat16", "float16"] = "base"
    rounding: Literal["auto", "nearest", "dithered", "calibrated"] = "auto"
    """`auto`: calibrated on `train` where that is given, else nearest."""
    calibration_tokens: int = Field(default=32_768, gt=0)
    """Of the training rows, as many as hold so many tokens go into a calibrated merge."""
    seed: int = Field(default=42, ge=0)

    template: Literal["auto", "chat", "plain"] = "auto"
    loss_on: Literal["response", "all"] = "response"
    end_of_turn: bool = True
    device: str = "auto"
    device_map: Literal["auto"] | None = None
    arithmetic: Literal["auto", "mkl", "onednn"] = "auto"
    batch_tokens: int | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, gt=0)
    max_length: int | None = Field(default=None, gt=0)
    strict: bool = True
    tasks: bool = False
    """Also answer the benchmarks' questions with all three models and score the answers."""
    generate: int | None = Field(default=None, gt=0)
    """So many tokens adapter and merged model also write after each prompt, to see where they part."""

    followup: FollowupAsked | None = None
    """What comes after the release: responses, draft model, speculative decoding, fewer bits."""

    compression: Literal["gzip", "zstd", "none"] = "gzip"
    model_name: str | None = None
    """The merged model's, in its card."""
    base_model_id: str | None = Field(default=None, pattern=r"^[\w-][\w.-]*/[\w-][\w.-]*$")
    """`org/name` of the base on the hub, for the card; the adapter's config tells where this is absent."""
    gate_defaults: Literal["guide", "none"] = "guide"
    gates: tuple[Gate, ...] = ()
    """Added to the defaults; one with the name of a default replaces it."""
    behaviour_thresholds: dict[str, float] = {}
    check_memory: bool = True
    """Refuse to start where the model cannot lie in memory in the type it is scored in."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Of the machine, in dollars: goes into `timing.json` and the gates on cost, and changes nothing else."""
    budget: float | None = Field(default=None, ge=0)
    """In dollars: a run that would cost more stops, and can be continued."""
    executor: Literal["local", "ray"] = "local"
    """Where models run over rows and shards are merged; changes nothing of what is asked."""
    ray_address: str | None = None
    workers: int | None = Field(default=None, gt=0)
    worker_threads: int | None = Field(default=None, gt=0)
    worker_gpus: float | None = Field(default=None, ge=0)

    def resolved_gates(self) -> list[Gate]:
        """The default gates with this config's own in place of those they name."""
        return _with_defaults(self.gates, self.gate_defaults)


def _with_defaults(gates: tuple[Gate, ...], defaults: str) -> list[Gate]:
    own = {gate.name: gate for gate in gates}
    replaced = [own.pop(gate.name, gate) for gate in (GUIDE_GATES if defaults == "guide" else ())]
    return [*replaced, *own.values()]


class _GateConfig(Part):
    """The keys of a config file that concern gates."""

    gate_defaults: Literal["guide", "none"] = "guide"
    gates: tuple[Gate, ...] = ()


_PATHS = ("base", "adapter", "test_set", "output")


def load_config(file: Path | None, flags: Mapping[str, Any]) -> RunConfig:
    """The config of `file` (if any) overlaid with the flags that were given (those not None).

    Paths in the file are relative to the file; `followup` is a flag of names, whose tables may stand in the
    file. Raises `UsageError` for unknown keys, wrong types and missing options, naming them.
    """
    values: dict[str, Any] = _read_toml(file) if file else {}
    given = {key: value for key, value in flags.items() if value is not None and value != ()}
    if isinstance(named := given.get("followup"), str):
        given["followup"] = with_named(values.get("followup"), named)
    values.update(given)
    return make_config(values, where=str(file) if file else None)


def load_gates(file: Path) -> list[Gate]:
    """The gates of a config file, defaults included; its other keys are not looked at."""
    values = {key: value for key, value in _read_toml(file).items() if key in _GateConfig.model_fields}
    try:
        found = _GateConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{option}: {first['msg']}", where=file) from error
    return _with_defaults(found.gates, found.gate_defaults)


def make_config(values: Mapping[str, Any], *, where: str | None = None) -> RunConfig:
    """Check the values; one `UsageError` names the first wrong option."""
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        flag = "--" + option.replace("_", "-")
        if first["type"] == "missing":
            raise UsageError(
                f"{flag} is missing", where=where, remedy=f"give {flag}, or {option} in the config file"
            ) from error
        if first["type"] == "extra_forbidden":
            known = ", ".join(_known(first["loc"][:-1]))
            raise UsageError(f"there is no option {option!r}", where=where, expected=known) from error
        raise UsageError(f"{flag}: {first['msg']}", where=where) from error


def _known(place: tuple[int | str, ...]) -> list[str]:
    """The keys of the table at a place in the config."""
    kind: Any = RunConfig
    for name in place:
        options = get_args(kind.model_fields[name].annotation) if name in kind.model_fields else ()
        kind = next((option for option in options if hasattr(option, "model_fields")), kind)
    return list(kind.model_fields)


def _read_toml(file: Path) -> dict[str, Any]:
    with os_errors(file, "read the config"):
        content = file.read_bytes()
    try:
        values = parse_toml(content)
    except ValueError as error:
        raise UsageError(f"the config is not TOML: {error}", where=file) from error
    folder = file.parent
    for key in _PATHS:
        named = values.get(key)
        of_the_hub = (
            key == "base" and isinstance(named, str) and not (folder / named).exists() and hub_name(named)
        )
        if isinstance(named, str) and not of_the_hub:
            values[key] = folder / named
    if "followup" in values:
        values["followup"] = from_folder(values["followup"], folder)
    train = values.get("train")
    if isinstance(train, str | list):
        names = [train] if isinstance(train, str) else train
        values["train"] = [folder / name for name in names if isinstance(name, str)]
    return values


def to_toml(config: RunConfig) -> str:
    """The resolved config as TOML, gates included, readable by `--config` again."""
    import tomli_w

    body = config.model_dump(mode="json", exclude_none=True)
    gates = [gate.model_dump(mode="json", exclude_none=True) for gate in config.resolved_gates()]
    return tomli_w.dumps({**body, "gate_defaults": "none", "gates": gates}, multiline_strings=False)
