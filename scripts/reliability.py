"""Run the long campaigns and put their tables into docs/reliability.md, each with its commit.

scripts/reliability.py [kills] [followup] [troubles] [damages]     all without a name; what is not run stays
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "reliability.md"
HEAD = """# What goes wrong, and how it ends

Made by `make campaign` (`scripts/reliability.py`); a small sample of everything runs with the tests.

Of kills and troubles each trial is a whole `lorasmith run` of a tiny model in a process of its own. It is
disturbed once, at a seeded point; then the same command is given again, not disturbed. It has to end with the
same bytes as a run that never was: every file but `timing.json`, the page that shows the times, and the run's
`SHA256SUMS`, which lists both.

Damages are done to finished folders: `lorasmith verify` has to find each of them, and `lorasmith unpack` has
to leave nothing behind, or exactly what was packed.
"""
SECTIONS = {
    "kills": (
        "Killed (SIGKILL) at a random write",
        ["tests.campaigns.kills", "--kills", os.environ.get("KILLS", "100")],
    ),
    "followup": (
        "Killed in the steps after the release",
        ["tests.campaigns.followup_kills", "--kills", os.environ.get("FOLLOWUP_KILLS", "30")],
    ),
    "troubles": (
        "Full disk, read-only disk, vanished input, jumping clock, two runs",
        ["tests.campaigns.troubles", "--points", os.environ.get("POINTS", "11")],
    ),
    "damages": (
        "Damaged afterwards, at a random place",
        ["tests.campaigns.damages", "--times", os.environ.get("DAMAGES", "100")],
    ),
}

SIZES = {"kills": "KILLS", "followup": "FOLLOWUP_KILLS", "troubles": "POINTS", "damages": "DAMAGES"}
"""Environment variables that ask for more or fewer trials."""


def known_sections() -> dict[str, str]:
    """Title → text of each section that the page has."""
    if not TARGET.exists():
        return {}
    parts = re.split(r"^## (.+)\n", TARGET.read_text(), flags=re.M)
    return dict(zip(parts[1::2], (text.strip() for text in parts[2::2]), strict=True))


def run(module: list[str]) -> tuple[str, bool]:
    """The table that a campaign prints, and whether everything went well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        check=False,
    )
    return done.stdout.strip(), done.returncode == 0


def main() -> int:
    """Run what was asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SECTIONS)}")
    asked = parser.parse_args().names or list(SECTIONS)
    revision = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, cwd=ROOT, text=True, capture_output=True, check=True).stdout.strip()
    sections, good = known_sections(), True
    for name in asked:
        title, module = SECTIONS[name]
        table, went_well = run(module)
        good = good and went_well
        variable = SIZES[name]
        asked_for = f" (`{variable}={os.environ[variable]} make campaign`)" if variable in os.environ else ""
        sections[title] = f"From commit {commit}{asked_for}.\n\n{table}"
    order = [title for title, _ in SECTIONS.values() if title in sections]
    TARGET.write_text("\n".join([HEAD, *(f"## {title}\n\n{sections[title]}\n" for title in order)]))
    print(TARGET.read_text())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
