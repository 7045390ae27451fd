"""A command line without a process of its own, which would import torch once more."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import pytest

from lorasmith.cli.main import run


class Answer(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Typed(Protocol):
    def __call__(self, *arguments: object) -> Answer: ...


def type_here(capfd: pytest.CaptureFixture[str]) -> Typed:
    """What the command would print and end with, by the function that its process calls."""

    def typed(*arguments: object) -> Answer:
        capfd.readouterr()
        code = run([*map(str, arguments)])
        return Answer(int(code), *capfd.readouterr())

    return typed
