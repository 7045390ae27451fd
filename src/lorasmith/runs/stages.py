"""One stage of a run: done again only when an input, a parameter or an output is not what it was.

A stage's record is written last and holds the SHA-256 of every input and output, the parameters and the
version. A folder that merely exists proves nothing.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lorasmith
from lorasmith.errors import BudgetError, InputError, UsageError, os_errors
from lorasmith.files.atomic import read_record, write_record
from lorasmith.files.digests import combine, describe, digest_path, folder_files, sha256_file
from lorasmith.files.output_folder import holds_another, locked
from lorasmith.machine.meter import counted, this_machine
from lorasmith.machine.resources import (
    OutOfTime,
    hardware,
    peak_memory,
    reset_peak_memory,
    return_memory,
    stop_after,
)
from lorasmith.records.base import FileDigest
from lorasmith.records.release import StageRecord, StageTiming, TimingRecord

_LEFTOVER = re.compile(r"^\..+\.\d+\.partial$")
"""A file that `atomic_file` was writing when its process was killed."""


_MARKS = (".lock", "run.json", "timing.json", "stages", "SHA256SUMS")
"""What a folder of lorasmith's holds from its first moment, or when it came back from another machine."""


@dataclass(frozen=True)
class Stage:
    """What a stage reads, with which parameters, what it writes, and how."""

    name: str
    inputs: Mapping[str, Path]
    """Name → file or folder; its digest decides whether the stage is done again."""
    parameters: Mapping[str, Any]
    outputs: Sequence[str]
    """Files and folders below the run folder."""
    action: Callable[[], object]
    """Writes the outputs, each of them atomically."""
    revision: int = 1
    """Raised when the code of the stage changes what it writes."""

    @property
    def version(self) -> str:
        """Version of lorasmith, and revision of the stage."""
        return f"{lorasmith.__version__}/{self.revision}"


@dataclass
class RunFolder:
    """The folder of a run: its lock, its stage records, its timings."""

    path: Path
    rehash: bool = False
    price_per_hour: float | None = None
    budget: float | None = None
    """Most that may ever be spent in this folder, in dollars; it counts only with a price."""
    timings: dict[str, StageTiming] = field(default_factory=dict)
    pinned: dict[Path, str] = field(default_factory=dict)
    """Digest of each file and folder as `run.json` names it, or as the first stage to touch it found it."""

    def record_path(self, stage: str) -> Path:
        """Where the record of a stage lies."""
        return self.path / "stages" / f"{stage}.json"

    def perform(self, stage: Stage) -> StageTiming:
        """Run the stage unless its record still matches; returns what it cost when it last ran."""
        wanted = self._wanted(stage)
        self._require_unchanged(stage, wanted["inputs"])
        if self._is_done(stage, wanted):
            known = self._known_timing(stage.name)
            self._keep_timing(known.model_copy(update={"reused": True}))
            self._pin_outputs(stage, self._outputs(stage))
            return self.timings[stage.name]
        self.forget(stage)
        timing = self._measure(stage)
        record = StageRecord(**wanted, outputs=self._outputs(stage))
        self._pin_outputs(stage, record.outputs)
        write_record(self.record_path(stage.name), record)
        self._keep_timing(timing)
        return timing

    def forget(self, stage: Stage) -> None:
        """From here on the stage counts as not done."""
        self.record_path(stage.name).unlink(missing_ok=True)

    def _require_unchanged(self, stage: Stage, digests: Mapping[str, str]) -> None:
        """Raise `InputError` where an input is not what it was when this run first read or wrote it.

        Every stage would be right by itself; together they would tell of a model that never was.
        """
        for name, path in stage.inputs.items():
            first = self.pinned.setdefault(path, digests[name])
            if first != digests[name]:
                raise InputError(
                    f"this was changed while the run was at work: stage {stage.name} finds another {name}",
                    where=path,
                    expected=f"SHA-256 {first}, found {digests[name]}",
                    remedy="leave it as it is while a run works, and give the same command again: "
                    "what depends on it is then done again",
                )

    def _pin_outputs(self, stage: Stage, outputs: Sequence[FileDigest]) -> None:
        for output in outputs:
            self.pinned[self.path / output.path] = output.sha256
        for name in stage.outputs:
            if (self.path / name).is_dir():
                below = [
                    output.model_copy(update={"path": output.path.removeprefix(f"{name}/")})
                    for output in outputs
                    if output.path.startswith(f"{name}/")
                ]
                self.pinned[self.path / name] = combine(below)

    def _measure(self, stage: Stage) -> StageTiming:
        """Run the stage for as long as the budget lasts; an attempt that does not end is counted as well."""
        began = time.perf_counter()
        try:
            with stop_after(self._seconds_left(stage.name)):
                return measure(stage.name, stage.action)
        except BaseException as error:
            self._keep_unfinished(time.perf_counter() - began)
            if isinstance(error, OutOfTime):
                raise BudgetError(
                    f"the budget of ${self.budget:g} is spent",
                    where=f"{self.path}, stage {stage.name}",
                    remedy="give the same command with a larger --budget: it goes on where it stopped",
                ) from None
            raise

    def _seconds_left(self, stage: str) -> float | None:
        """What the budget still pays for; what the stage cost when it last ran was paid for too."""
        if self.budget is None or not self.price_per_hour:
            return None
        known = {**read_timings(self.path), **self.timings}
        spent = sum(timing.wall_seconds for timing in known.values()) + self._unfinished()
        return self.budget / self.price_per_hour * 3600 - spent

    def _unfinished(self) -> float:
        try:
            return read_record(self.path / "timing.json", TimingRecord).unfinished_seconds
        except InputError:
            return 0.0

    def _keep_unfinished(self, seconds: float) -> None:
        self._write_timing(self._unfinished() + seconds)

    def _wanted(self, stage: Stage) -> dict[str, Any]:
        return {
            "stage": stage.name,
            "version": stage.version,
            "inputs": {name: digest_path(path, rehash=self.rehash) for name, path in stage.inputs.items()},
            "parameters": {name: _as_json(value) for name, value in stage.parameters.items()},
        }

    def _outputs(self, stage: Stage) -> list[FileDigest]:
        files: list[Path] = []
        for name in stage.outputs:
            place = self.path / name
            files += folder_files(place) if place.is_dir() else [place]
        return describe(files, self.path, rehash=self.rehash)

    def _is_done(self, stage: Stage, wanted: Mapping[str, Any]) -> bool:
        path = self.record_path(stage.name)
        if not path.exists():
            return False
        try:
            record = read_record(path, StageRecord)
            known = {key: getattr(record, key) for key in wanted}
            return known == wanted and record.outputs == self._outputs(stage)
        except InputError:
            # A record of another version, or an output that is gone: the stage is not done.
            return False

    def _known_timing(self, stage: str) -> StageTiming:
        if stage in self.timings:
            return self.timings[stage]
        unknown = StageTiming(
            stage=stage, wall_seconds=0, cpu_seconds=0, peak_rss_bytes=None, started="unknown"
        )
        return read_timings(self.path).get(stage, unknown)

    def _keep_timing(self, timing: StageTiming) -> None:
        self.timings[timing.stage] = timing
        self._write_timing(self._unfinished())

    def _write_timing(self, unfinished: float) -> None:
        merged = {**read_timings(self.path), **self.timings}
        record = TimingRecord(
            hardware=hardware(),
            price_per_hour=self.price_per_hour,
            budget=self.budget,
            unfinished_seconds=round(unfinished, 3),
            stages=list(merged.values()),
        )
        write_record(self.path / "timing.json", record)


def read_timings(run: Path) -> dict[str, StageTiming]:
    """What each stage of a run folder cost when it last ran; empty where nothing was recorded."""
    try:
        record = read_record(run / "timing.json", TimingRecord)
    except InputError:
        return {}
    return {timing.stage: timing for timing in record.stages}


def measure(name: str, action: Callable[[], object]) -> StageTiming:
    """Run `action` and take its time, its peak memory, and what the devices tell of it."""
    return_memory()
    can_reset = reset_peak_memory()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    wall, cpu = time.perf_counter(), _cpu_seconds()
    with counted() as others, this_machine().running() as devices:
        action()
    return StageTiming(
        stage=name,
        wall_seconds=round(time.perf_counter() - wall, 3),
        cpu_seconds=round(_cpu_seconds() - cpu + others.cpu_seconds, 3),
        peak_rss_bytes=peak_memory() if can_reset else None,
        worker_peak_rss_bytes=others.peak_rss_bytes,
        started=started,
        **vars(others.with_these(devices)),
    )


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@contextmanager
def open_run(path: Path, *, rehash: bool = False, price_per_hour: float | None = None) -> Iterator[RunFolder]:
    """The run folder under an exclusive lock; what a killed process left half-written is removed.

    Raises `BusyError` when another process works on it, `InputError` when it is a file.
    """
    if path.is_dir() and not path.is_symlink() and holds_another(path, *_MARKS):
        raise UsageError(
            "the folder holds something that no run has left there",
            where=path,
            expected="a new folder, or one of an earlier run",
            remedy="choose another --output",
        )
    with os_errors(path, "open the run folder"):
        path.mkdir(parents=True, exist_ok=True)
    held = locked(
        path / ".lock",
        "open the run folder",
        found="another process works on this run folder",
        where=path,
        remedy="wait until it ends, or choose another --output",
    )
    with held:
        for file in path.rglob(".*.partial"):
            if file.is_file() and _LEFTOVER.match(file.name):
                file.unlink(missing_ok=True)
        yield RunFolder(path, rehash=rehash, price_per_hour=price_per_hour)


def _as_json(value: Any) -> Any:
    """A parameter as a record gives it back; of a file its contents, since its path says nothing of them."""
    if isinstance(value, Path):
        return sha256_file(value) if value.is_file() else str(value)
    return json.loads(json.dumps(value, default=str))
