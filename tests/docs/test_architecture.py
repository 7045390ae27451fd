"""The journeys through the code name what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lorasmith

SOURCE = Path(lorasmith.__file__).parent
PAGE = SOURCE.parents[1] / "docs" / "architecture.md"
STOP = re.compile(r"^\| \d+ \| `(?P<file>[\w/]+\.py)` \| (?P<names>[^|]+) \|", re.MULTILINE)


def stops(text: str) -> list[tuple[str, str]]:
    """Each file of each journey with each name that it is said to define."""
    return [
        (stop["file"], name) for stop in STOP.finditer(text) for name in re.findall(r"`(\w+)`", stop["names"])
    ]


def defined(file: Path) -> set[str]:
    """The functions and classes of a module."""
    return {
        node.name
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


@pytest.mark.parametrize(("file", "name"), sorted(set(stops(PAGE.read_text(encoding="utf-8")))))
def test_every_stop_of_a_journey_exists(file: str, name: str) -> None:
    assert name in defined(SOURCE / file)


def test_no_stop_is_overlooked() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert rows and len(rows) == len(STOP.findall(text))
