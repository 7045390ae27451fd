"""Kill a run at seeded points, continue it, and compare every byte with an undisturbed run.

`python -m tests.campaigns.kills --kills 100` prints a table; exit code 1 if any continued run differs.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import random
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import lorasmith
from lorasmith.files.digests import SUMS
from lorasmith.files.jsonl import write_rows
from lorasmith.progress import silent
from tests.faults import in_child, was_killed
from tests.tiny import save_adapter, save_base, tiny_rows

SEED = 20
LIBRARIES = (
    "torch", "transformers", "peft", "pyarrow.parquet", "huggingface_hub", "lorasmith.models.load",
    "lorasmith.merging.merge", "lorasmith.proving.weights.prove", "lorasmith.proving.behaviour.compare",
    "lorasmith.scoring.validate", "lorasmith.packaging.pack", "lorasmith.reporting.page",
)  # fmt: skip


class LastStep:
    """A watcher that leaves the title of the step in a file, for the parent of a killed child to read."""

    progress = staticmethod(silent)

    def __init__(self, file: Path) -> None:
        self.file = file

    def step(self, number: int, total: int, title: str) -> None:
        self.file.write_text(title)

    def finished(self, stage: str, *, reused: bool, seconds: float) -> None: ...

    def show(self, stage: str, record: object) -> None: ...

    def generated(self, tokens: int) -> None: ...


def contents(run: Path) -> dict[str, str]:
    """Digest of every file of a run but what may differ: timings, the report that shows them, and the list of
    checksums that holds both; and the lock."""
    return {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file()
        and path.name not in ("timing.json", ".lock")
        and path not in (run / "report.html", run / SUMS)
    }


def load_libraries() -> None:
    """Import what every child needs, once, before the first fork.

    Nothing is computed here: pools of threads start with the first computation, and do not survive a fork.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    # What the libraries made stays: each stage collects garbage, and would look at all of it again.
    gc.freeze()


def prepare(folder: Path) -> None:
    """Base, adapter and test set."""
    save_adapter(folder / "adapter", save_base(folder / "base"))
    write_rows(folder / "test.jsonl", tiny_rows(12))


@dataclass(frozen=True)
class Trial:
    """One kill: at which write, of what, and what the run has to come to."""

    folder: Path
    inputs: dict[str, Path]
    expected: dict[str, str]
    writes: int
    point: int

    def __call__(self) -> tuple[str, str]:
        """The step in which the run was killed, and what went wrong."""
        run, step = self.folder / f"killed-{self.point}", self.folder / f"step-{self.point}"
        step.write_text("before the first step")
        status = in_child(
            lambda: lorasmith.run(**self.inputs, output=run, watcher=LastStep(step)), die_at=self.point
        )
        title, wrong = step.read_text(), ""
        if not was_killed(status):
            wrong = "the child was not killed"
        elif in_child(lambda: lorasmith.run(**self.inputs, output=run), die_at=None):
            wrong = "the run did not continue"
        elif contents(run) != self.expected:
            wrong = "other bytes"
        shutil.rmtree(run, ignore_errors=True)
        return title, wrong and f"write {self.point} of {self.writes} ({title}): {wrong}"


def campaign(kills: int, folder: Path, jobs: int = 1) -> tuple[Counter[str], list[str]]:
    """Kill at `kills` seeded writes, `jobs` at a time; how often in which step, and what went wrong."""
    load_libraries()
    if in_child(lambda: prepare(folder), die_at=None):
        return Counter(), ["the inputs could not be made"]
    inputs = {"base": folder / "base", "adapter": folder / "adapter", "test_set": folder / "test.jsonl"}
    whole, counter = folder / "whole", folder / "writes"
    status = in_child(lambda: lorasmith.run(**inputs, output=whole), die_at=None, count_to=counter)
    if status:
        return Counter(), ["the undisturbed run failed"]
    expected = contents(whole)
    writes = int(counter.read_text())
    points = sorted(random.Random(SEED).sample(range(1, writes), min(kills, writes - 1)))
    trials = [Trial(folder, inputs, expected, writes, point) for point in points]
    # Every computation happens in a child: torch's thread pool does not survive a fork.
    with get_context("fork").Pool(jobs) as pool:
        found = pool.map(Trial.__call__, trials, chunksize=1)
    return Counter(title for title, _ in found), [wrong for _, wrong in found if wrong]


def show(where: Counter[str], wrong: list[str]) -> int:
    """Print the table of a campaign; the exit code is 1 where a continued run differs, or none was killed."""
    print("| killed in step | times |\n|---|---|")
    for title, times in where.items():
        print(f"| {title} | {times} |")
    for line in wrong:
        print(f"- {line}")
    total = sum(where.values())
    print(f"\n{total - len(wrong)} of {total} killed runs continued and ended with the same bytes.")
    return 1 if wrong or not total else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where, wrong = campaign(asked.kills, Path(folder), asked.jobs)
    return show(where, wrong)


if __name__ == "__main__":
    sys.exit(main())
