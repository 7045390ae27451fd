"""Flags are made from option models: one line more in a model is one flag more."""

from __future__ import annotations

import importlib
import runpy
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import typer

import lorasmith
from lorasmith import options
from lorasmith.cli import COMMANDS, GROUPS
from lorasmith.cli.flags import CommandGroup, Given, add_command, taken
from lorasmith.cli.main import run
from lorasmith.options import ClusterOptions, Options, RunOptions, ScoringOptions, ValidateOptions
from lorasmith.options.base import Flag, panel_of
from lorasmith.options.keywords import documented
from lorasmith.options.values import Count, OneOrSeveral, OrAuto


class Cooking(Options):
    """Something to choose."""

    PANEL: ClassVar[str] = "Merging"

    place: Annotated[Path, Flag(metavar="DIR")]
    """Place to cook at."""
    heat: Annotated[Count | None, OrAuto, Flag(metavar="N|auto", text=True, default="as needed")] = None
    """Heat of the fire."""
    stir: bool = True
    """Stir while it cooks."""
    herbs: tuple[Literal["dill", "basil"], ...] = ()
    """Herbs that go in."""
    salt: Annotated[tuple[float, ...], OneOrSeveral, Flag(name="--grains")] = (1.0,)
    """Grains of salt."""
    secret: Annotated[int, Flag(hidden=True)] = 3
    """What the cook alone knows."""


def call(command: Any, *words: str) -> None:
    app = typer.Typer(cls=CommandGroup, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    add_command(app, "cook", command)
    app(["cook", *words], standalone_mode=False)


@pytest.fixture
def got() -> list[Any]:
    return []


@pytest.fixture
def cook(got: list[Any]) -> Any:
    def command(cooking: Cooking, cluster: ClusterOptions, loud: bool = False) -> None:
        """Cook."""
        got.extend([cooking, cluster, loud])

    command.__annotations__ = {"cooking": Cooking, "cluster": ClusterOptions, "loud": bool}
    return command


def test_flags_become_models(cook: Any, got: list[Any], tmp_path: Path) -> None:
    call(
        cook, "--place", str(tmp_path), "--heat", "7", "--no-stir", "--herbs", "dill", "--herbs", "basil",
        "--grains", "2.5", "--executor", "ray", "--loud",
    )  # fmt: skip
    cooking, cluster, loud = got
    assert cooking == Cooking(place=tmp_path, heat=7, stir=False, herbs=("dill", "basil"), salt=(2.5,))
    assert cluster == ClusterOptions(executor="ray")
    assert loud is True


def test_what_is_not_typed_is_left_to_the_model(cook: Any, got: list[Any]) -> None:
    call(cook, "--place", "here", "--heat", "auto")
    assert got[:2] == [Cooking(place=Path("here")), ClusterOptions()]


def test_help_is_grouped_and_shows_defaults(cook: Any, capsys: pytest.CaptureFixture[str]) -> None:
    call(cook, "--help")
    shown = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    order = [lines.index(f"{panel}:") for panel in ("Options", "Merging", "Cluster")]
    assert order == sorted(order)
    text = " ".join(shown.split())
    assert "--heat N|auto Heat of the fire. [as needed]" in text
    assert "--stir / --no-stir Stir while it cooks. [on]" in text
    assert "--herbs dill|basil Herbs that go in." in text
    assert "Place to cook at. [required]" in text
    assert "secret" not in text


def test_a_command_may_ask_for_what_was_typed_alone(got: list[Any]) -> None:
    def command(typed: dict[str, Any]) -> None:
        """Cook."""
        got.append(typed)

    command.__annotations__ = {"typed": Annotated[dict[str, Any], Given(Cooking, "place", "stir", "heat")]}
    call(command, "--no-stir")
    call(command, "--heat", "2")
    assert got == [{"stir": False}, {"heat": "2"}]


def test_a_field_more_is_a_flag_and_a_line_of_help_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wider(ValidateOptions):
        sharpness: Annotated[Count | None, Flag(default="none")] = None
        """Sharpness of the knife."""

    monkeypatch.setattr(options, "ValidateOptions", Wider)
    assert run(["validate", "--help"]) == 0
    assert "--sharpness <int>" in (shown := " ".join(capsys.readouterr().out.split()))
    assert "Sharpness of the knife. [none]" in shown
    needed = ["--model", "m", "--test-set", "t", "--output", "o"]
    assert run(["validate", *needed, "--sharpness", "0"]) == 2
    assert "--sharpness is 0" in capsys.readouterr().err


def test_two_commands_show_one_option_alike(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("validate", "compare"):
        assert run([name, "--help"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        for field in ScoringOptions.model_fields.values():
            assert " ".join((field.description or "").split()) in shown


def test_a_wrong_value_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    needed = ["--model", "m", "--test-set", "t", "--output", "o"]
    assert run(["validate", *needed, "--loss-on", "prompt"]) == 2
    assert (
        capsys.readouterr().err
        == "error: --loss-on is 'prompt'\n  expected: response, assistant, last or all\n"
    )


def test_a_field_more_in_a_run_is_a_flag_a_key_a_keyword_and_a_line_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Wider(RunOptions):
        sharpness: Annotated[Count | None, Flag(default="none")] = None
        """Sharpness of the knife."""

    # Imported for the first time while it is replaced, a module would keep the other one for ever.
    for name in ("lorasmith.runs.demo", "lorasmith.runs.pipeline", "lorasmith.preflight.doctor"):
        importlib.import_module(name)
    monkeypatch.setattr(options, "RunOptions", Wider)
    monkeypatch.setattr("lorasmith.runs.config.RunOptions", Wider)
    (tmp_path / "run.toml").write_text("sharpness = 3\n")
    needed = ["--base", "b", "--adapter", "a", "--test-set", "t", "--output", "o", "--print-config"]
    assert run(["run", *needed, "--config", str(tmp_path / "run.toml")]) == 0
    assert "sharpness = 3\n" in capsys.readouterr().out
    assert run(["run", *needed, "--config", str(tmp_path / "run.toml"), "--sharpness", "4"]) == 0
    assert "sharpness = 4\n" in capsys.readouterr().out
    row = "| `--sharpness` | none | Sharpness of the knife. |"
    assert row in reference_page().split("## lorasmith run\n")[1].split("\n## ")[0]

    @documented(Wider)
    def cook(options: Wider | None = None, **given: Any) -> Wider:
        """Cook."""
        return Wider.given(options, given)

    assert "- `sharpness`: Sharpness of the knife." in (cook.__doc__ or "")
    assert signature(cook).parameters["sharpness"].default is None
    assert cook(base="b", adapter="a", test_set="t", output="o", sharpness=5).sharpness == 5


def reference_page() -> str:
    """The command-line reference, as its script makes it now."""
    place = Path(__file__).parents[2] / "scripts" / "reference.py"
    return str(runpy.run_path(str(place))["reference"]())


@pytest.mark.parametrize(
    "name", ["merge", "validate", "compare", "train", "respond", "speculate", "compress"]
)
def test_python_shows_the_options_that_the_command_has(name: str) -> None:
    shown = signature(getattr(lorasmith, name)).parameters
    model = getattr(options, f"{name.capitalize()}Options")
    for field, info in model.model_fields.items():
        assert shown[field].default == info.get_default(call_default_factory=True)
    assert "given" not in shown


def test_every_command_names_what_it_takes_in_a_known_group() -> None:
    for command in [command for _, command in COMMANDS] + [
        command for _, _, commands in GROUPS for _, command in commands
    ]:
        for one in taken(command).values():
            assert all(panel_of(one.model, name) in options.PANELS for name in one.names)
