"""What a run is asked to do: defaults, a TOML file, flags; the later wins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasmith.errors import UsageError, os_errors
from lorasmith.files.inputs import read_input
from lorasmith.gates import GUIDE_GATES, with_required
from lorasmith.hub.cache import hub_name
from lorasmith.options import Flag, GateOptions, RunOptions
from lorasmith.options.base import in_order, with_paths
from lorasmith.options.run import tables_named
from lorasmith.parsing import parse_toml
from lorasmith.records.release import Gate


def resolved_gates(options: GateOptions) -> list[Gate]:
    """The default gates with the run's own in place of those they name."""
    own = {gate.name: gate for gate in options.gates}
    defaults = GUIDE_GATES if options.gate_defaults == "guide" else ()
    replaced = [own.pop(gate.name, gate) for gate in defaults]
    return [*replaced, *own.values()]


def run_gates(options: RunOptions) -> list[Gate]:
    """All gates of a run: those that are asked for, and those that no run is without."""
    return with_required(resolved_gates(options), checked=bool(options.train))


def load_config(file: Path | None, flags: Mapping[str, Any]) -> RunOptions:
    """The config of `file` (if any) overlaid with the flags that were given (those not None).

    Paths in the file are relative to the file; `followup` is a flag of names, whose tables may stand in the
    file. Raises `UsageError` for unknown keys, wrong types and missing options, naming them.
    """
    values: dict[str, Any] = _read_toml(file) if file else {}
    given = {key: value for key, value in flags.items() if value is not None and value != ()}
    if isinstance(named := given.get("followup"), str):
        tables = values.get("followup")
        given["followup"] = {**tables_named(named), **(tables if isinstance(tables, Mapping) else {})}
    return RunOptions.make({**values, **given}, where=file)


def load_gates(file: Path) -> list[Gate]:
    """The gates of a config file, defaults included; its other keys are not looked at."""
    values = {key: value for key, value in _read_toml(file).items() if key in GateOptions.model_fields}
    return resolved_gates(GateOptions.make(values, where=file))


def _read_toml(file: Path) -> dict[str, Any]:
    with os_errors(file, "read the config"):
        content = read_input(file)
    try:
        values = parse_toml(content)
    except ValueError as error:
        raise UsageError(f"the config is not TOML: {error}", where=file) from error

    def beside(text: str, flag: Flag) -> str | Path:
        path = file.parent / text
        of_the_hub = flag.hub and not path.exists() and hub_name(text) is not None
        return text if of_the_hub else path

    return with_paths(RunOptions, values, beside)


def to_toml(options: RunOptions) -> str:
    """The resolved config as TOML, gates included, readable by `--config` again."""
    import tomli_w

    body = options.model_dump(mode="json", exclude_none=True)
    body["gates"] = [gate.model_dump(mode="json", exclude_none=True) for gate in run_gates(options)]
    body["gate_defaults"] = "none"
    ordered = {name: body[name] for name in in_order(RunOptions) if name in body}
    return tomli_w.dumps(ordered, multiline_strings=False)
