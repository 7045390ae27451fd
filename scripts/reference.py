"""Write the command-line reference from the commands' own help; `--check` fails when it is stale."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from inspect import cleandoc, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from typer.models import OptionInfo

from lorasmith.cli import COMMANDS, GROUPS
from lorasmith.cli.flags import flag_text, hints_of, shown_default, taken
from lorasmith.errors import ExitCode
from lorasmith.options import PANELS, Options
from lorasmith.options.base import flag_of, help_line, panel_of

TARGET = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"


def option_row(name: str, hint: Any, default: Any) -> str:
    """One line of a command's table: flag, whether it is required, its default and help."""
    info = OptionInfo(default=default)
    if get_origin(hint) is Annotated:
        hint, info = get_args(hint)[:2]
    # Within Annotated, typer takes the first name of an option for its default.
    names = [info.default, *(info.param_decls or ())]
    flags = [text for text in names if isinstance(text, str) and text.startswith("-")]
    flag = flags[0] if flags else "--" + name.replace("_", "-")
    if default is ...:
        shown = "required"
    elif default in (None, False, ()):
        shown = ""
    else:
        shown = f"`{default}`"
    return f"| `{flag}` | {shown} | {info.help or ''} |"


def field_row(model: type[Options], name: str, *, whole: bool) -> str:
    """One line of a command's table, for a flag that is made from a field."""
    required = whole and model.model_fields[name].is_required()
    default = shown_default(model, name)
    shown = "required" if required else default if flag_of(model, name).default else f"`{default}`"
    return f"| `{flag_text(model, name)}` | {shown if shown != '``' else ''} | {help_line(model, name)} |"


def command_rows(function: Callable[..., Any]) -> list[str]:
    """The lines of a command's table, those of one group of the help together."""
    hints, models = hints_of(function), taken(function)
    groups: dict[str, dict[str, str]] = {}
    for name, parameter in signature(function).parameters.items():
        if name not in models:
            default = ... if parameter.default is parameter.empty else parameter.default
            panel = (
                getattr(get_args(hints[name])[1], "rich_help_panel", None) if get_args(hints[name]) else None
            )
            groups.setdefault(panel or PANELS[0], {})[name] = option_row(name, hints[name], default)
            continue
        one = models[name]
        for field in one.names:
            rows = groups.setdefault(panel_of(one.model, field), {})
            rows.setdefault(field, field_row(one.model, field, whole=one.whole))
    return [row for panel in PANELS if panel in groups for row in groups[panel].values()]


def command_text(path: str, function: Callable[..., Any]) -> str:
    """A section: the docstring and a table of options."""
    rows = command_rows(function)
    about = re.sub(r"^Example: (.*)$", r"Example: \1", cleandoc(function.__doc__ or ""), flags=re.M)
    table = "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])
    return f"## lorasmith {path}\n\n{about}\n\n{table}\n"


def reference() -> str:
    """The whole page."""
    codes = "\n".join(f"| {code.value} | {code.name.lower().replace('_', ' ')} |" for code in ExitCode)
    sections = [command_text(name, function) for name, function in COMMANDS]
    for group, _, commands in GROUPS:
        sections += [command_text(f"{group} {name}", function) for name, function in commands]
    head = "# Command-line reference\n\nMade by `scripts/reference.py` from the commands themselves.\n"
    return "\n".join([head, "## Exit codes\n", "| code | meaning |", "|---|---|", codes, "", *sections])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when the page is not up to date")
    text = reference()
    if parser.parse_args().check:
        if TARGET.exists() and TARGET.read_text() == text:
            return 0
        print(f"{TARGET} is stale: run scripts/reference.py", file=sys.stderr)
        return 1
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
