"""A flag that takes one value is given once: no command takes the last of several in silence."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from lorasmith.cli import COMMANDS, GROUPS
from lorasmith.cli.flags import find_command
from lorasmith.cli.main import app, run

PATHS = [(name,) for name, _ in COMMANDS] + [(group, name) for group, _, inner in GROUPS for name, _ in inner]


def options_of(path: tuple[str, ...]) -> list[Any]:
    command = find_command(typer.main.get_command(app), path)
    return [one for one in command.params if one.param_type_name == "option" and not one.is_eager]


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_no_option_of_one_value_is_taken_twice(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for option in options_of(path):
        once = [option.opts[0], *([] if option.is_flag else ["1"])]
        complaint = f"error: {' or '.join([*option.opts, *option.secondary_opts])} is given more than once"
        code = run([*path, *once, *once])
        assert (complaint in capsys.readouterr().err) != option.multiple, option.opts
        if not option.multiple:
            assert code == 2


@pytest.mark.parametrize("path", [("run",), ("validate",), ("compare",)], ids=" ".join)
def test_a_second_adapter_is_told_how_adapters_are_joined(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*path, "--adapter", "one", "--adapter", "two"]) == 2
    told = capsys.readouterr().err
    assert "--adapter is given more than once" in told and "lorasmith merge" in told
    assert f"lorasmith {path[0]}\n" in told


def test_a_flag_and_its_contrary_are_one_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "--strict", "--no-strict"]) == 2
    assert "--strict or --no-strict is given more than once" in capsys.readouterr().err
