"""The guide to rented machines: every command in it can be typed as it stands, and every message exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from lorasmith.cli import GROUPS
from lorasmith.cli.flags import find_command
from lorasmith.cli.main import app
from lorasmith.cli.remote.command import read_command
from lorasmith.cli.remote.rentals import needs
from lorasmith.preflight import estimate as rates
from lorasmith.remote.rental.job import SETUP_HOURS, estimate
from lorasmith.remote.rental.provider import Offer

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "vast-guide.md").read_text()


def commands() -> list[str]:
    """Whole command lines of the blocks, and those between backquotes."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", GUIDE, re.S | re.M)).replace("\\\n", " ")
    typed = [line.split("  #")[0].strip() for line in blocks.splitlines() if line.startswith("lorasmith ")]
    inline = re.findall(r"`(lorasmith [^`]+)`", re.sub(r"^```.*?^```", "", GUIDE, flags=re.S | re.M))
    return [*typed, *inline]


def test_the_guide_shows_every_command_for_other_machines() -> None:
    shown = {line.split()[2] for line in commands() if line.startswith("lorasmith remote")}
    known = set(getattr(typer.main.get_command(app), "commands")["remote"].commands)  # noqa: B009
    assert shown == known


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_guide_can_be_typed(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    own, _, there = " ".join(words).partition(" -- ")
    count = 2 if words[0] in {name for name, *_ in GROUPS} else 1
    command = find_command(typer.main.get_command(app), words[:count])
    found = command.make_context(" ".join(words[:count]), words[count:])  # raises for what is no option
    if words[:2] in (["remote", "run"], ["remote", "offers"]):
        assert there, own
        inner = read_command(found.params["command"])
        assert inner.inputs and inner.outputs and needs(inner, None, None).disk >= 25


def test_the_messages_of_the_guide_are_those_of_the_program() -> None:
    table = GUIDE[GUIDE.index("## When something fails") :]
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    for cell in re.findall(r"^\| (`.*?`) \|", table, re.M):
        for message in re.findall(r"`([^`]+)`", cell):
            for part in re.split(r" … |\$1", message):
                assert part.strip() in source, message
    assert len(re.findall(r"^\| `.*?` \| [123] \|", table, re.M)) >= 15


def test_the_numbers_of_the_guide_are_those_of_the_program() -> None:
    assert f"hours   = {SETUP_HOURS:g} + h" in GUIDE
    assert f"3·2·N·T/({rates.EFFICIENCY:g}·R) + 3·B/{rates.LOAD_BYTES / 1e6:.0f}e6" in GUIDE
    # The example: 15 GB there, 30 GB back, 1 Gbit/s each way, half an hour of work at $1.50.
    offer = Offer(1, "H100", 1, 80, 1.50, 0.0, 0.0, 0.0, 0.99, 500, 1000.0, 1000.0, "")
    found = estimate(offer, 0.5, 15.0, 30.0)
    assert f"= {found.hours:.2f} hours, ${found.dollars:.3f}" in GUIDE
