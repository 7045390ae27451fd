"""A seeded sample of the campaign of troubles: each ends in one message and in a run that goes on."""

from __future__ import annotations

import subprocess
import sys


def test_every_trouble_is_said_and_the_run_goes_on() -> None:
    # In a process of its own: forking is safe only where no library has started threads.
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.troubles", "--points", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 5
    assert all("1 of 1" in row or "skipped" in row for row in rows)
