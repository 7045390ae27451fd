"""Kill the steps after the release at seeded points, continue, and compare every byte of the run folder.

`python -m tests.campaigns.followup_kills --kills 20`; exit code 1 if any continued run differs. Compression
is left out: its process beside us is killed in tests/followup/test_compress.py.
"""

from __future__ import annotations

import argparse
import importlib
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import lorasmith
from lorasmith.files.jsonl import write_rows
from tests.campaigns.kills import SEED, LastStep, contents, load_libraries, prepare, show
from tests.faults import in_child, was_killed
from tests.tiny import tiny_rows

ASKED: dict[str, Any] = {
    "respond": {"max_new_tokens": 6, "top_logprobs": 2},
    "draft": {"layers": "1", "epochs": 1.0, "batch_size": 2, "validate_every": 2, "labels": "confidence"},
    "speculate": {"draft_tokens": (2,), "max_new_tokens": 4, "limit": 2},
}


def kept(run: Path) -> dict[str, str]:
    """Digest of every file but timings and the report that shows them."""
    return {name: sha for name, sha in contents(run).items() if not name.endswith(".timing.json")}


def campaign(kills: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Kill at `kills` seeded writes; returns how often in which step, and what went wrong."""
    inputs: dict[str, Any] = {
        "base": folder / "base", "adapter": folder / "adapter", "test_set": folder / "test.jsonl",
        "train": (folder / "train.jsonl",), "rounding": "nearest",
    }  # fmt: skip
    released, whole = folder / "released", folder / "whole"
    counter, step = folder / "writes", folder / "step"

    def release() -> None:
        prepare(folder)
        write_rows(folder / "train.jsonl", tiny_rows(10, seed=5))
        lorasmith.run(**inputs, output=released)

    # Every computation happens in a child: torch's thread pool does not survive a fork.
    load_libraries()
    for name in ("responses.engines", "responses.respond", "drafts.draft", "speculation.speculate"):
        importlib.import_module(f"lorasmith.followup.{name}")
    if in_child(release, die_at=None):
        return Counter(), ["the run could not be made"]

    def go_on(run: Path) -> None:
        lorasmith.run(**inputs, followup=ASKED, output=run, watcher=LastStep(step))

    shutil.copytree(released, whole)
    if in_child(lambda: go_on(whole), die_at=None, count_to=counter):
        return Counter(), ["the undisturbed run failed"]
    expected, writes = kept(whole), int(counter.read_text())
    points = sorted(random.Random(SEED).sample(range(1, writes), min(kills, writes - 1)))
    where: Counter[str] = Counter()
    wrong: list[str] = []
    for point in points:
        run = folder / f"killed-{point}"
        shutil.copytree(released, run)
        step.write_text("before the first step")
        status = in_child(lambda run=run: go_on(run), die_at=point)  # type: ignore[misc]
        where[step.read_text()] += 1
        if not was_killed(status):
            wrong.append(f"write {point} of {writes}: the child was not killed")
        elif in_child(lambda run=run: go_on(run), die_at=None):  # type: ignore[misc]
            wrong.append(f"write {point} of {writes}: the run did not continue")
        elif kept(run) != expected:
            found = kept(run)
            names = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
            wrong.append(f"write {point} of {writes}: other bytes in {', '.join(sorted(names))}")
        shutil.rmtree(run, ignore_errors=True)
    return where, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where, wrong = campaign(asked.kills, Path(folder))
    return show(where, wrong)


if __name__ == "__main__":
    sys.exit(main())
