"""`lorasmith compress` as it is typed, mistakes included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_the_plan_command(compressed: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "lorasmith.cli.main",
            "compress",
            "--model",
            str(compressed / "base"),
        ]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)

    refused = run("--plan", "--target-size", "1kB")
    assert refused.returncode == 1 and "No method reaches it" in refused.stdout
    assert "Traceback" not in refused.stderr
    fits = run("--plan", "--target-size", "1GB", "--json")
    assert fits.returncode == 0 and json.loads(fits.stdout)["reachable"] is True
    nonsense = run("--plan", "--target-size", "five")
    assert nonsense.returncode == 2 and "is not a size" in nonsense.stderr
    # A target that nothing reaches is refused before any work, also without --plan.
    assert run("--output", str(compressed / "never"), "--target-size", "1kB").returncode == 1
    assert not (compressed / "never").exists()
