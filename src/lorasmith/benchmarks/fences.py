"""Fenced code in what a model wrote, as models really write it."""

from __future__ import annotations

import re

_OPENS = re.compile(r"^([ \t]*)(?:(?:[-*+]|\d+[.)])[ \t]+)?(`{3,}|~{3,})[^\n`]*$")


def code_blocks(answer: str) -> list[str]:
    """The contents of the fenced blocks, in their order.

    Fences of backticks or tildes, with whatever is said behind them, in a list or indented (their own indent
    is taken from each line), with CRLF line ends; one that is not closed reaches to the end. A closing fence
    has the signs of the opening one, at least as many of them (CommonMark 0.31, section 4.5).
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
            blocks.append(_block(inside))
            inside = None
        else:
            inside.append(line.removeprefix(indent) if line.strip() else "")
    if inside is not None:
        blocks.append(_block(inside))
    return blocks


def _block(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
