"""A lorasmith command with local paths, checked here and rewritten for another machine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

from lorasmith.errors import UsageError, os_errors
from lorasmith.files.inputs import read_input
from lorasmith.parsing import parse_toml

if TYPE_CHECKING:
    from lorasmith.records.remote import HubInput, Transfer

OUTPUTS = {"output", "output_dir", "output_file"}
"""Options that name what a command writes; every other path is something that it reads."""
_LOCAL_ONLY = {"demo", "chat", "remote", "costs"}
_CHANGES_ITS_INPUT = {("testset split", "remove")}


@dataclass
class RemoteCommand:
    """What runs there, and what goes there and comes back."""

    name: str
    arguments: list[str] = field(default_factory=list)
    inputs: list[Transfer] = field(default_factory=list)
    hub: list[HubInput] = field(default_factory=list)
    outputs: list[Transfer] = field(default_factory=list)
    needs_gpu: bool = False
    extras: list[str] = field(default_factory=list)
    """Those of lorasmith's optional dependencies that the command needs."""
    values: dict[str, Any] = field(default_factory=dict)
    """The options as they were typed, with paths of this machine."""
    takes_price: bool = False
    """Whether it has --price-per-hour, and nobody has given it."""

    def at_price(self, price: float | None) -> list[str]:
        """The arguments, with the price of the machine where the command can use it."""
        if price is None or not self.takes_price:
            return self.arguments
        words = len(self.name.split())
        return [*self.arguments[:words], "--price-per-hour", f"{price:g}", *self.arguments[words:]]

    def place(self, value: Path, *, output: bool) -> str:
        """The path of `value` there; remembers that it has to go there, or come back."""
        from lorasmith.records.remote import Transfer
        from lorasmith.remote.job import hub_model

        text = str(value)
        if not output and text.startswith("hub:"):
            remote = f"in/hub-{len(self.hub)}/{text.partition('@')[0].rsplit('/', 1)[-1]}"
            self.hub.append(hub_model(text, remote))
            return remote
        local = str(value.absolute())
        kind, known = ("out", self.outputs) if output else ("in", self.inputs)
        for item in known:
            if item.local == local:
                return item.remote
        remote = f"{kind}/{len(known)}/{value.name or 'input'}"
        known.append(Transfer(local=local, remote=remote))
        return remote


def read_command(tokens: Sequence[str]) -> RemoteCommand:
    """Check the command here, before anything is sent or rented, and rewrite its paths.

    Raises `UsageError` for a command that cannot run elsewhere; wrong options end as they would locally.
    """
    from lorasmith.cli.flags import arguments, expanded

    name, command, rest = _find(tokens)
    function = expanded(command)
    remote = RemoteCommand(name=name)
    values = _parse(name, rest)
    arguments(command, values)  # a wrong value is told here
    if name == "run" and values.get("config"):
        values = _with_config(values, remote)
    remote.values = values
    remote.takes_price = "price_per_hour" in values and values["price_per_hour"] is None
    options: list[str] = []
    for key, parameter in inspect.signature(function).parameters.items():
        value = values.get(key)
        default = None if parameter.default is parameter.empty else parameter.default
        if value is None or value == default or value in ((), []):
            continue
        if (name, key) in _CHANGES_ITS_INPUT:
            raise UsageError(f"--{key} changes a file here, which a command elsewhere cannot")
        hint = get_type_hints(function, include_extras=True)[key]
        texts = _texts(remote, key, value)
        if _is_argument(hint):
            remote.arguments += texts
        elif isinstance(value, bool):
            options.append(_flag(hint, key, value))
        else:
            options += [token for text in texts for token in (_flag(hint, key, True), text)]
    remote.arguments = [*name.split(), *options, *remote.arguments]
    remote.needs_gpu = str(values.get("device") or "").startswith("cuda")
    remote.extras = _extras(name, values)
    _require_output(remote, function)
    return remote


def _extras(name: str, values: dict[str, Any]) -> list[str]:
    asked = str(values.get("followup") or "")
    wanted = {
        "benchmarks": values.get("tasks"),
        "cluster": values.get("executor") == "ray",
        "compress": name == "compress" or "compress" in asked,
        "sign": values.get("sign"),
        "vllm": values.get("engine") == "vllm",
    }
    return [extra for extra, needed in wanted.items() if needed]


def _find(tokens: Sequence[str]) -> tuple[str, Callable[..., Any], list[str]]:
    from lorasmith.cli import COMMANDS, GROUPS

    known = dict(COMMANDS)
    for group, _, commands in GROUPS:
        known |= {f"{group} {name}": function for name, function in commands}
    words = list(tokens)
    if words[:1] == ["lorasmith"]:
        words = words[1:]
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in known and words[0] not in _LOCAL_ONLY:
            return name, known[name], words[count:]
    able = ", ".join(name for name in known if name.split()[0] not in _LOCAL_ONLY)
    raise UsageError(
        f"{' '.join(words[:1]) or 'nothing'!r} is no command that runs elsewhere", expected=f"one of {able}"
    )


def _parse(name: str, rest: list[str]) -> dict[str, Any]:
    """The values as the command itself would get them."""
    import typer

    from lorasmith.cli.flags import find_command
    from lorasmith.cli.main import app

    command = find_command(typer.main.get_command(app), name.split())
    return dict(command.make_context(f"lorasmith {name}", list(rest)).params)


def _with_config(values: dict[str, Any], remote: RemoteCommand) -> dict[str, Any]:
    """The paths of a config file as flags, and a copy of the file without them: they are this machine's.

    Those that no flag can give become places there, seen from where the file will lie: in/NUMBER/run.toml.
    """
    import tomli_w

    from lorasmith.files.atomic import write_bytes
    from lorasmith.hub.cache import hub_name
    from lorasmith.options import Flag, RunOptions
    from lorasmith.options.base import path_fields, with_paths
    from lorasmith.remote.state import state_folder

    file = Path(values["config"])
    with os_errors(file, "read the config"):
        content = read_input(file)
    try:
        body = parse_toml(content)
    except ValueError as error:
        raise UsageError(f"the config is not TOML: {error}", where=file) from error
    merged = dict(values)

    def here(text: str, flag: Flag) -> Path:
        return Path(text) if text.startswith("hub:") else file.parent / text

    def there(text: str, flag: Flag) -> str:
        if flag.hub and not (file.parent / text).exists() and hub_name(text):
            return text  # fetched there, as it would be here
        return f"../../{remote.place(here(text, flag), output=False)}"

    names = path_fields(RunOptions)
    paths = with_paths(RunOptions, {name: body.pop(name) for name in names if name in body}, here)
    if body.get("price_per_hour") is not None:
        paths["price_per_hour"] = body.pop("price_per_hour")
    merged |= {name: value for name, value in paths.items() if not values.get(name)}
    body = with_paths(RunOptions, body, there)
    import hashlib

    digest = hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:12]
    merged["config"] = state_folder() / "configs" / digest / "run.toml"
    write_bytes(merged["config"], tomli_w.dumps(body).encode())
    return merged


def _texts(remote: RemoteCommand, key: str, value: Any) -> list[str]:
    many = value if isinstance(value, list | tuple) else [value]
    return [remote.place(one, output=key in OUTPUTS) if isinstance(one, Path) else str(one) for one in many]


def _is_argument(hint: Any) -> bool:
    from typer.models import ArgumentInfo

    return get_origin(hint) is Annotated and isinstance(get_args(hint)[1], ArgumentInfo)


def _flag(hint: Any, key: str, value: bool) -> str:
    """`--name`, or the negative one of `--name/--no-name`."""
    info = get_args(hint)[1] if get_origin(hint) is Annotated else None
    # Within Annotated, typer takes the first name of an option for its default.
    names = [getattr(info, "default", None), *(getattr(info, "param_decls", None) or ())]
    flags = [text for text in names if isinstance(text, str) and text.startswith("--")]
    flag = flags[0] if flags else "--" + key.replace("_", "-")
    positive, _, negative = flag.partition("/")
    return positive if value or not negative else negative


def _require_output(remote: RemoteCommand, function: Callable[..., Any]) -> None:
    can_write = OUTPUTS & set(inspect.signature(function).parameters)
    if can_write and not remote.outputs:
        flag = "--" + sorted(can_write)[0].replace("_", "-")
        raise UsageError(
            f"`{remote.name}` would leave nothing to fetch", expected=f"{flag}, where the results go here"
        )
