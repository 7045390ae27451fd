"""Full disk, read-only disk, vanished input, jumping clock, two runs on one folder: said, then continued.

`python -m tests.campaigns.troubles --points 8` prints a table; exit code 1 if any trouble ended otherwise
than in one message and a run that goes on to the same bytes.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from lorasmith.cli.main import run as lorasmith
from lorasmith.cli.views import run as running
from lorasmith.runs import stages
from lorasmith.runs.stages import open_run
from tests.campaigns.kills import contents, load_libraries, prepare
from tests.faults import in_child

SEED = 21
STEPS = 11
"""Of a run without benchmark questions; a step that is not there is never reached, and its run is whole."""
DISK = "128m"


@dataclass
class Ended:
    """How one command ended."""

    code: int
    error: str

    @property
    def clear(self) -> bool:
        """One message, no traceback."""
        return self.error.count("error: ") == 1 and "Traceback" not in self.error

    @property
    def headline(self) -> str:
        """The message without its place, which differs from machine to machine."""
        lines = [line for line in self.error.splitlines() if line.startswith("error: ")]
        return lines[0].removeprefix("error: ").split(": /")[0] if lines else ""


@dataclass
class Trouble:
    """One kind of trouble, over all its points."""

    name: str
    tried: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    continued: int = 0
    wrong: list[str] = field(default_factory=list)
    skipped: str = ""

    def note(self, point: int, first: Ended, second: Ended, same: bool, *, may_finish: bool) -> None:
        """Judge one point: the command in trouble, and the one after it."""
        self.tried += 1
        finished = first.code in (0, 1) and may_finish
        if finished:
            said = "it ends as if nothing had happened"
        else:
            said = f"exit {first.code}: {first.headline}"
            if first.code not in (2, 3) or not first.clear:
                self.wrong.append(f"{self.name}, step {point}: exit {first.code}\n{first.error}")
        self.ends[said] = self.ends.get(said, 0) + 1
        if second.code in (0, 1) and same:
            self.continued += 1
        else:
            self.wrong.append(
                f"{self.name}, step {point}: did not continue, exit {second.code}\n{second.error}"
            )


class Campaign:
    """The inputs, an undisturbed run to compare with, and the troubles that were tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        load_libraries()
        if in_child(lambda: prepare(folder), die_at=None):
            raise SystemExit("the inputs could not be made")
        whole = self.command(folder / "whole")
        if whole.code not in (0, 1):
            raise SystemExit(f"the undisturbed run failed\n{whole.error}")
        self.expected = contents(folder / "whole")

    def command(self, run: Path, at: int = 0, trouble: Callable[[], object] = lambda: None) -> Ended:
        """`lorasmith run` as typed, in a child; `trouble` comes before step `at`."""
        code, error = self.folder / "code", self.folder / "error"
        code.unlink(missing_ok=True)

        def work() -> None:
            _before_step(at, trouble)
            given = {"base": "base", "adapter": "adapter", "test-set": "test.jsonl"}
            options = [f"--{name}={self.folder / path}" for name, path in given.items()]
            with error.open("w") as stderr, redirect_stderr(stderr), redirect_stdout(io.StringIO()):
                ended = lorasmith(["run", *options, f"--output={run}"])
            code.write_text(str(int(ended)))

        status = in_child(work, die_at=None)
        ended = int(code.read_text()) if code.exists() else -1
        return Ended(ended if status == 0 else -1, error.read_text())

    def same(self, run: Path) -> bool:
        """Whether a run ended with the bytes of the undisturbed one."""
        return run.is_dir() and contents(run) == self.expected


def _before_step(at: int, trouble: Callable[[], object]) -> None:
    usual = running.TerminalWatcher.step

    def step(self: running.TerminalWatcher, number: int, total: int, title: str) -> None:
        if number == at:
            trouble()
        usual(self, number, total, title)

    running.TerminalWatcher.step = step  # type: ignore[method-assign]


@contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    """A disk of `DISK` in memory, or None where this machine does not let us mount one."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def _fill(disk: Path) -> None:
    """Take every byte that is left."""
    with (disk / "filler").open("wb", buffering=0) as handle:
        for size in (1 << 20, 4096, 1):
            try:
                while handle.write(bytes(size)):
                    pass
            except OSError:
                continue


def full_disk(campaign: Campaign, points: list[int]) -> Trouble:
    """Another program takes the rest of the disk before a step."""
    found = Trouble("the disk fills up")
    with small_disk(campaign.folder / "small") as disk:
        if disk is None:
            found.skipped = "mounting a small disk needs root"
            return found
        for point in points:
            run = disk / f"run-{point}"
            first = campaign.command(run, point, lambda: _fill(disk))
            (disk / "filler").unlink(missing_ok=True)
            second = campaign.command(run)
            found.note(point, first, second, campaign.same(run), may_finish=False)
            shutil.rmtree(run, ignore_errors=True)
    return found


def read_only(campaign: Campaign, points: list[int]) -> Trouble:
    """The disk of a run that was killed before a step has become read-only."""
    found = Trouble("the folder is read-only")
    with small_disk(campaign.folder / "locked") as disk:
        if disk is None:
            found.skipped = "mounting a small disk needs root"
            return found
        for point in points:
            run = disk / f"run-{point}"
            campaign.command(run, point, lambda: os.kill(os.getpid(), signal.SIGKILL))
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            first = campaign.command(run)
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            second = campaign.command(run)
            found.note(point, first, second, campaign.same(run), may_finish=False)
            shutil.rmtree(run, ignore_errors=True)
    return found


def vanished_input(campaign: Campaign, points: list[int]) -> Trouble:
    """Base weights, adapter and test set are moved away before a step, one after the other."""
    found = Trouble("an input vanishes")
    names = ("base/model.safetensors", "adapter/adapter_model.safetensors", "test.jsonl", "base")
    for place, point in enumerate(points):
        path = campaign.folder / names[place % len(names)]
        hidden = path.with_name(f"{path.name}.hidden")
        run = campaign.folder / f"vanished-{point}"
        first = campaign.command(run, point, lambda path=path, hidden=hidden: path.rename(hidden))  # type: ignore[misc]
        if hidden.exists():
            hidden.rename(path)
        second = campaign.command(run)
        found.note(point, first, second, campaign.same(run), may_finish=True)
        shutil.rmtree(run, ignore_errors=True)
    return found


def jumping_clock(campaign: Campaign, points: list[int]) -> Trouble:
    """The clock goes ten years back or on before a step, and files carry dates of the other time."""
    found = Trouble("the clock jumps")
    for place, point in enumerate(points):
        run = campaign.folder / f"clock-{point}"
        years = -10 if place % 2 else 10
        first = campaign.command(run, point, lambda years=years: _jump(years))  # type: ignore[misc]
        other = time.time() + years * 365 * 86_400
        for path in [*run.rglob("*"), *(campaign.folder / "base").iterdir()]:
            os.utime(path, (other, other))
        second = campaign.command(run)
        found.note(point, first, second, campaign.same(run), may_finish=True)
        shutil.rmtree(run, ignore_errors=True)
    return found


def _jump(years: int) -> None:
    real, shift = time.time, timedelta(days=365 * years)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + shift

    time.time = lambda: real() + shift.total_seconds()
    stages.datetime = Clock  # type: ignore[misc]


def two_runs(campaign: Campaign, points: list[int]) -> Trouble:
    """The same command a second time while the first one still works."""
    found = Trouble("two runs on one folder")
    for point in points:
        run = campaign.folder / f"two-{point}"
        campaign.command(run, point, lambda: os.kill(os.getpid(), signal.SIGKILL))
        with open_run(run):
            first = campaign.command(run)
        second = campaign.command(run)
        found.note(point, first, second, campaign.same(run), may_finish=False)
        shutil.rmtree(run, ignore_errors=True)
    return found


TROUBLES = (full_disk, read_only, vanished_input, jumping_clock, two_runs)


def campaign(points: int, folder: Path) -> list[Trouble]:
    """Every trouble at `points` seeded steps."""
    ready = Campaign(folder)
    chance = random.Random(SEED)
    return [
        trouble(ready, sorted(chance.sample(range(1, STEPS + 1), min(points, STEPS)))) for trouble in TROUBLES
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=STEPS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(asked.points, Path(folder))
    print("| trouble | times | how the command ended | continued with the same bytes |\n|---|---|---|---|")
    for one in found:
        if one.skipped:
            print(f"| {one.name} | 0 | skipped: {one.skipped} | – |")
            continue
        ends = "<br>".join(f"{times} × {said}" for said, times in one.ends.items())
        print(f"| {one.name} | {one.tried} | {ends} | {one.continued} of {one.tried} |")
    wrong = [text for one in found for text in one.wrong]
    for text in wrong:
        print(f"\n{text}", file=sys.stderr)
    return 1 if wrong or not any(one.tried for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
