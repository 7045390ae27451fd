"""Code that a model wrote: the fenced blocks of an answer, as models really write them, and pass@1."""

from __future__ import annotations

import re

from lorasmith.benchmarks.base import Scores, Unscored
from lorasmith.benchmarks.sandbox import run

_OPENS = re.compile(r"^([ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?)(`{3,}|~{3,})[^\n`]*$")


def pass_at_1(program: str) -> Scores:
    """1.0 when the program, its tests included, runs to its end in the sandbox, else 0.0."""
    if refusal := run.refusal():
        raise Unscored(refusal)
    return {"pass@1": float(run.run_answer(program).finished)}


def code_blocks(answer: str) -> list[str]:
    """The contents of the fenced blocks, in their order.

    Fences of backticks or tildes, with whatever is said behind them, in a list or indented (their own indent,
    a bullet before them included, is taken from their lines), with CRLF line ends; one that is not closed
    reaches to the end. A closing fence has the signs of the opening one, at least as many of them (CommonMark
    0.31, section 4.5).
    """
    blocks: list[str] = []
    inside: list[str] | None = None
    indent, fence = "", ""
    for line in answer.replace("\r\n", "\n").split("\n"):
        if inside is None:
            opened = _OPENS.match(line)
            if opened:
                indent, fence, inside = opened[1], opened[2], []
        elif re.fullmatch(rf"[ \t]*{re.escape(fence[0])}{{{len(fence)},}}[ \t]*", line):
            blocks.append(_block(inside, indent))
            inside = None
        else:
            inside.append(line)
    if inside is not None:
        blocks.append(_block(inside, indent))
    return blocks


def _block(lines: list[str], indent: str) -> str:
    """The lines without the fence's indent, or as much of it as all of them have: Python needs the rest."""
    if indent:
        lines = [_expanded(line) for line in lines]
    filled = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    width = min([len(indent.expandtabs()), *filled])
    return "".join(f"{line[width:] if line.strip() else ''}\n" for line in lines)


def _expanded(line: str) -> str:
    """The line with the tabs of its indent as spaces."""
    rest = line.lstrip(" \t")
    return line[: len(line) - len(rest)].expandtabs() + rest
