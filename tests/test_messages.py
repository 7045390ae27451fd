"""What messages tell people to type exists: every flag that a text in the source names is some command's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from lorasmith.cli.flags import with_flags
from lorasmith.cli.main import app

SOURCE = Path(__file__).parents[1] / "src" / "lorasmith"
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![\w-])")

FOREIGN = {
    "remote/ssh.py": {
        "--secluded-args", "--recursive", "--copy-links", "--times", "--partial", "--append-verify", "--info",
        "--no-inc-recursive", "--from0", "--files-from", "--timeout", "--no-links", "--no-devices",
        "--no-specials", "--chmod",
    },
    "remote/agent/requests.py": {"--query-gpu"},
    "remote/agent/supervise.py": {"--disable-pip-version-check"},
    "cli/flags.py": {"--no"},
    "cli/remote/command.py": {"--name", "--no-name"},
}  # fmt: skip
"""Flags of rsync, nvidia-smi and pip, and names of no flag in particular."""


def commands() -> Iterator[tuple[str, Any]]:
    """Words after `lorasmith` → command, groups left out."""

    def walk(command: Any, words: str) -> Iterator[tuple[str, Any]]:
        if not hasattr(command, "commands"):
            yield words, with_flags(command)
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, f"{words} {name}".strip())

    yield from walk(typer.main.get_command(app), "")


def flags_of(command: Any) -> set[str]:
    names = [name for option in command.params for name in (*option.opts, *option.secondary_opts)]
    return {name for name in names if name.startswith("--")} | {"--help"}


FLAGS = {words: flags_of(command) for words, command in commands()}
KNOWN = {flag for flags in FLAGS.values() for flag in flags} | {"--version"}


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string of a module with its line; an f-string as one text with `…` for what is filled in."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


def modules() -> list[str]:
    return sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


@pytest.mark.parametrize("module", modules())
def test_every_flag_in_a_message_exists(module: str) -> None:
    for line, text in texts(ast.parse((SOURCE / module).read_text())):
        unknown = set(FLAG.findall(text)) - KNOWN - FOREIGN.get(module, set())
        assert not unknown, f"{module}:{line}: {unknown} in {text!r}"


@pytest.mark.parametrize("module", modules())
def test_a_flag_named_with_its_command_belongs_to_it(module: str) -> None:
    longest = sorted(FLAGS, key=len, reverse=True)
    named = re.compile(rf"(?<![\w-])({'|'.join(longest)}) (?=(?:[A-Z…]+ )?--)")
    for line, text in texts(ast.parse((SOURCE / module).read_text())):
        for found in named.finditer(text):
            # Only words that are surely a command: of two words, or after the program's name.
            words = found[1]
            if " " not in words and not text[: found.start()].endswith("lorasmith "):
                continue
            rest = re.split(r"[.;,:)`\n]|, or | or ", text[found.end() :])[0]
            wrong = set(FLAG.findall(rest)) - FLAGS[words]
            assert not wrong or "remote run" in text, f"{module}:{line}: {words} has no {wrong}"


def test_a_flag_that_does_not_exist_is_seen() -> None:
    assert set(FLAG.findall("testset split --test-size 5, or --sizes")) - KNOWN == {"--test-size", "--sizes"}
    assert "--size" in FLAGS["testset split"]
