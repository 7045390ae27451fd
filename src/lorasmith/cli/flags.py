"""Flags of a command, made from the option models that its parameters name.

A command is written as `def validate(options: ValidateOptions, as_json: AsJson = False)`: a parameter whose
type is a model stands for a flag for each of its fields, every other one is a parameter of typer's. A flag is
left out of what the model gets unless it was typed, so that defaults stand in the model alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
import typer.core

if TYPE_CHECKING:
    from lorasmith.options import Options


class Given:
    """The type of a parameter that gets what was typed as a mapping, where a file may give the rest.

    Written as `Annotated[dict[str, Any], Given(RunOptions)]`; with names, only these fields become flags.
    """

    def __init__(self, model: type[Options], *names: str) -> None:
        self.model, self.names = model, names


@dataclass(frozen=True)
class Taken:
    """A parameter of a command that stands for the fields of a model."""

    parameter: str
    model: type[Options]
    names: tuple[str, ...]
    whole: bool
    """Whether the command gets the model; else a mapping of what was typed."""


def taken(command: Callable[..., Any]) -> dict[str, Taken]:
    """Parameter → the fields that it stands for; parameters of typer's own are not in it."""
    from lorasmith.options import Options

    found = {}
    for name, hint in hints_of(command).items():
        given = next((item for item in get_args(hint) if isinstance(item, Given)), None)
        if given is not None:
            names = given.names or shown_fields(given.model)
            found[name] = Taken(name, given.model, names, whole=False)
        elif isinstance(hint, type) and issubclass(hint, Options):
            found[name] = Taken(name, hint, shown_fields(hint), whole=True)
    return found


def shown_fields(model: type[Options]) -> tuple[str, ...]:
    """The fields that become flags."""
    from lorasmith.options.base import flag_of, in_order

    return tuple(name for name in in_order(model) if not flag_of(model, name).hidden)


def expanded(command: Callable[..., Any]) -> Callable[..., None]:
    """The command with a parameter for each flag: what typer makes a command line of."""
    models, hints = taken(command), hints_of(command)
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in models:
            parameters[name] = parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)
            continue
        one = models[name]
        for field in one.names:
            parameters.setdefault(field, _parameter(one.model, field, required=one.whole))

    def called(**values: Any) -> None:
        command(**arguments(command, values))

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__annotations__ = {name: one.annotation for name, one in parameters.items()}
    vars(called)["__signature__"] = inspect.Signature(list(parameters.values()))
    return called


def arguments(command: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What the command is called with, of the values of its flags; raises `UsageError` for a wrong one."""
    models = taken(command)
    typed = {name: value for name, value in values.items() if value is not None and value != []}
    own = {name: values[name] for name in inspect.signature(command).parameters if name not in models}
    for one in models.values():
        asked = {name: typed[name] for name in one.names if name in typed}
        own[one.parameter] = one.model.make(asked) if one.whole else asked
    return own


def shown_default(model: type[Options], name: str) -> str:
    """The default of a field as it is typed; empty where it has none."""
    from lorasmith.options.base import flag_of

    field, flag = model.model_fields[name], flag_of(model, name)
    if flag.default is not None:
        return flag.default
    default = field.get_default(call_default_factory=True)
    if field.is_required() or default in (None, (), {}):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def flag_text(model: type[Options], name: str) -> str:
    """`--batch-size`, or `--strict/--no-strict`."""
    from lorasmith.options.base import flag_name

    flag = flag_name(model, name)
    return f"{flag}/--no-{flag[2:]}" if _typed_as(model, name)[0] is bool else flag


def _parameter(model: type[Options], name: str, *, required: bool) -> inspect.Parameter:
    """A flag as typer wants it. It has no default of its own: what is not typed is left to the model."""
    from lorasmith.options.base import flag_of, help_line, panel_of

    flag, default = flag_of(model, name), shown_default(model, name)
    kind, choices = _typed_as(model, name)
    needed = required and model.model_fields[name].is_required()
    metavar = flag.metavar or ("|".join(choices) if choices else None)
    shown: dict[str, Any] = {
        "help": help_line(model, name) + (f" [{default}]" if default else ""),
        "metavar": metavar,
        "show_default": False,
        "rich_help_panel": panel_of(model, name),
    }
    info: Any = typer.Option(flag_text(model, name), **shown)
    annotation = Annotated[kind if needed else kind | None, info]  # type: ignore[valid-type]
    unset = inspect.Parameter.empty if needed else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=unset, annotation=annotation)


def _typed_as(model: type[Options], name: str) -> tuple[Any, tuple[str, ...]]:
    """What typer reads from the command line, and the choices of a field that has some.

    The choices are checked by the model, which knows short names such as bf16 as well.
    """
    from lorasmith.options.base import flag_of

    if flag_of(model, name).text:
        return str, ()
    return _kind(model.model_fields[name].annotation)


def _kind(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin in (Union, UnionType):
        return _kind(next(one for one in arguments if one is not NoneType))
    if origin is Literal:
        return str, tuple(map(str, arguments))
    if origin in (tuple, list):
        kind, choices = _kind(arguments[0])
        return list[kind], choices  # type: ignore[valid-type]
    return (annotation if annotation in (bool, int, float, Path) else str), ()


def hints_of(command: Callable[..., Any]) -> Mapping[str, Any]:
    """The types of a command's parameters; its file imports the models for the type checker only."""
    from lorasmith import options

    hints = get_type_hints(command, localns=vars(options), include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return"}


class PanelCommand(typer.core.TyperCommand):
    """A command whose help is grouped, the group that is used most first, and whose flags are given once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments into `ctx`; raises `UsageError` for a flag of one value that is there twice.

        click would take the last one in silence, and forget the others.
        """
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(list(args))
            for place, parameter in enumerate(order):
                if parameter in order[:place] and _takes_one(parameter):
                    raise _twice(self.name, parameter)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then the options under the names of their groups."""
        from lorasmith.options import PANELS

        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                panel = getattr(parameter, "rich_help_panel", None) or PANELS[0]
                heading = "Arguments" if parameter.param_type_name == "argument" else panel
                groups.setdefault(heading, []).append(record)
        for heading in ("Arguments", *PANELS):
            if heading in groups:
                with formatter.section(heading):
                    formatter.write_dl(groups[heading])


def _takes_one(parameter: Any) -> bool:
    option = parameter.param_type_name == "option" and not parameter.is_eager
    return option and not parameter.multiple and not parameter.count


def _twice(command: str | None, parameter: Any) -> Exception:
    from lorasmith.errors import UsageError

    names = [*parameter.opts, *parameter.secondary_opts]
    remedy = None
    if "--adapter" in names:
        remedy = (
            "give one; `lorasmith merge` joins several, each with its --weight, and the result is one model"
        )
    return UsageError(
        f"{' or '.join(names)} is given more than once",
        where=f"lorasmith {command}",
        expected="it once",
        remedy=remedy,
    )


class CommandGroup(typer.core.TyperGroup):
    """Commands whose flags are made when they are called: the overview needs no option of any of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is named, with its flags."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, None if command is None else with_flags(command), rest


def add_command(to: typer.Typer, name: str, command: Callable[..., Any]) -> None:
    """List a command in the overview, by the first paragraph of its docstring, uncut."""

    def listed() -> None:
        """Stands in the overview."""

    listed.__doc__ = command.__doc__
    vars(listed)["command"] = command
    summary = " ".join((command.__doc__ or "").split("\n\n")[0].split())
    to.command(name, short_help=summary)(listed)


def find_command(group: Any, words: Sequence[str]) -> Any:
    """The command that the first words name, ready to be called; as many words as it takes."""
    found, rest = group, list(words)
    while hasattr(found, "commands") and rest:
        found = found.commands[rest.pop(0)]
    return with_flags(found)


def with_flags(listed: Any) -> Any:
    """A command of the overview as one that can be called; groups stay as they are."""
    command = getattr(listed.callback, "command", None)
    if command is None:
        return listed
    # One that can do with nothing but options would otherwise show its help instead of doing its work.
    bare = getattr(command, "works_without_arguments", False)
    alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    alone.command(listed.name, cls=PanelCommand, no_args_is_help=not bare)(expanded(command))
    return typer.main.get_command(alone)
