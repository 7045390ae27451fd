"""Everything a run needs, looked at before it starts; nothing is loaded and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, TypeVar

from packaging.requirements import Requirement

from lorasmith.checkpoint.adapter import Adapter, open_adapter
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.data.rows import read_examples
from lorasmith.data.sources import with_local_rows
from lorasmith.errors import InputError, LorasmithError, MemoryLimitError
from lorasmith.files.atomic import read_record
from lorasmith.files.digests import cache_folder
from lorasmith.hub.cache import find_cached, hub_name
from lorasmith.machine.resources import available_memory, hardware, human_bytes, require_disk
from lorasmith.merging.into import PlannedMerge, choose_into, plan_into
from lorasmith.options import RunOptions
from lorasmith.preflight.estimate import estimate, estimate_followup, followup_disk, least_memory
from lorasmith.preflight.rates import existing, measure_rates
from lorasmith.preflight.sizes import (
    AnswerSize,
    CalibrationSize,
    ModelSize,
    WorkSize,
    answer_size,
    calibration_size,
    model_size,
    plain_bytes,
    work_size,
)
from lorasmith.quantized.open import formats, open_base
from lorasmith.records.base import Finding
from lorasmith.records.dataset import Example
from lorasmith.records.doctor import Check, DoctorRecord
from lorasmith.records.release import GateRecord

# The machine and what is installed on it.


_CACHE_BYTES = 50_000_000


def environment_checks() -> list[Check]:
    """Libraries, memory, devices, cache."""
    return [*_libraries(), _memory(), _devices(), _cache()]


def _libraries() -> list[Check]:
    """Every dependency against the range that lorasmith declares; those of extras may be absent."""
    wrong, absent, right = [], [], 0
    for line in requires("lorasmith") or []:
        needed = Requirement(line)
        optional = needed.marker is not None and "extra" in str(needed.marker)
        if needed.marker is not None and not optional and not needed.marker.evaluate():
            continue
        try:
            installed = version(needed.name)
        except PackageNotFoundError:
            if optional:
                absent.append(needed.name)
            else:
                wrong.append(f"{needed.name} is not installed, {needed.specifier} is needed")
            continue
        if needed.specifier.contains(installed, prereleases=True):
            right += 1
        else:
            wrong.append(f"{needed.name} {installed}, {needed.specifier} is needed")
    checks = []
    if wrong:
        remedy = (
            "pip install 'lorasmith' into a fresh environment; `make` takes the versions it was tested with"
        )
        checks.append(Check(name="libraries", state="error", found="; ".join(wrong), remedy=remedy))
    else:
        checks.append(Check(name="libraries", state="ok", found=f"{right} in their declared ranges"))
    if absent:
        lacking = f"not installed: {', '.join(sorted(set(absent)))}"
        remedy = "needed by extras only: see `pip install 'lorasmith[…]'`"
        checks.append(Check(name="optional libraries", state="note", found=lacking, remedy=remedy))
    return checks


def _memory() -> Check:
    return Check(name="memory", state="ok", found=f"{human_bytes(available_memory())} available")


def _devices() -> Check:
    import torch

    devices = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            devices.append(f"cuda:{number} {name}, {human_bytes(free)} of {human_bytes(total)} free")
    if torch.backends.mps.is_available():
        devices.append("mps")
    text = "; ".join([*devices, f"cpu, {torch.get_num_threads()} threads"])
    return Check(name="devices", state="ok", found=text)


def _cache() -> Check:
    place = existing(cache_folder())
    free = shutil.disk_usage(place).free
    return _space("cache", place, free, _CACHE_BYTES)


def _space(name: str, place: Path, free: int, needed: int) -> Check:
    space = f"{human_bytes(free)} free at {place}, {human_bytes(needed)} needed"
    if free < needed:
        return Check(name=name, state="error", found=space, remedy="free some space, or choose another disk")
    return Check(name=name, state="ok", found=space)


def disk_check(output: Path, needed: int) -> Check:
    """The disk of the run folder against what the run will leave there."""
    place = existing(output)
    return _space("disk", place, shutil.disk_usage(place).free, needed)


T = TypeVar("T")
State = Literal["ok", "note", "warning", "error"]

LONG_HOURS = 8.0
"""From here on a smaller test set is advised: the guide's whole procedure takes less than one."""


@dataclass
class _Checks:
    """What was looked at, in order; a failed look is an error among the checks."""

    done: list[Check] = field(default_factory=list)

    def add(self, name: str, state: State, found: str, remedy: str = "") -> None:
        self.done.append(Check(name=name, state=state, found=found, remedy=remedy))

    def attempt(self, name: str, action: Callable[[], T]) -> T | None:
        """The result, or None and an error among the checks."""
        try:
            return action()
        except LorasmithError as error:
            where = f" ({error.where})" if error.where else ""
            expected = f"; expected {error.expected}" if error.expected else ""
            self.add(name, "error", f"{error.found}{where}{expected}", error.remedy or "")
            return None


def examine(config: RunOptions | None = None) -> DoctorRecord:
    """Look at the machine and, with the config of a run, at all that it would read, and estimate it.

    Problems are findings, not errors: the record holds all of them at once.
    """
    checks = _Checks(environment_checks())
    record = DoctorRecord(machine=hardware(), checks=[])
    if config is not None:
        record = _examine_run(config, checks, record)
    return record.model_copy(update={"checks": checks.done})


def _examine_run(config: RunOptions, checks: _Checks, record: DoctorRecord) -> DoctorRecord:
    config = checks.attempt("rows", lambda: with_local_rows(config)) or config
    base = _base(config, checks)
    adapter = checks.attempt("adapter", lambda: open_adapter(config.adapter))
    if adapter is not None:
        _describe_adapter(adapter, checks)
    plan = _plan(config, base, adapter, checks) if base and adapter else None
    examples = checks.attempt("test set", lambda: read_examples(config.test_set))
    _look_back(config.output, checks)
    if base is None or examples is None:
        return record
    merged_bytes = plan.nbytes if plan else plain_bytes(base)
    size = model_size(base, adapter, merged_bytes)
    work = _test_set(examples, base.folder, size, config, checks)
    rates = checks.attempt("rates", lambda: measure_rates(config.output, config.device, config.arithmetic))
    if rates is None:
        return record
    stages = estimate(
        size,
        work,
        rates,
        calibration=_calibration(config, base, plan, checks),
        answers=_answers(config, examples, base, checks),
    )
    stages += checks.attempt("followup", lambda: estimate_followup(config, base, size, rates)) or []
    seconds = sum(stage.seconds for stage in stages)
    disk = sum(stage.disk_bytes for stage in stages)
    peak = max(stage.memory_bytes for stage in stages)
    checks.done.append(disk_check(config.output, disk))
    _judge_memory(size, peak, config, checks)
    if seconds > LONG_HOURS * 3600:
        rows = max(1, int(work.rows * LONG_HOURS * 3600 / seconds))
        checks.add(
            "time",
            "warning",
            f"about {seconds / 3600:.0f} hours for {work.rows:,} examples",
            f"use a smaller test set (testset split --size {rows}, or fewer --samples-per-benchmark)",
        )
    price = config.price_per_hour
    return record.model_copy(
        update={
            "rates": vars(rates),
            "stages": stages,
            "seconds": seconds,
            "memory_bytes": peak,
            "disk_bytes": disk,
            "price_per_hour": price,
            "dollars": None if price is None else price * seconds / 3600,
        }
    )


def _base(config: RunOptions, checks: _Checks) -> Checkpoint | None:
    folder = Path(config.base)
    named = hub_name(config.base)
    if named is not None:
        cached = find_cached(named)
        if cached is None:
            checks.add(
                "base", "note", f"{named.repository} is not in the hub's cache: a run downloads it first"
            )
            return None
        folder = cached
    base = checks.attempt("base", lambda: open_base(folder))
    if base is not None:
        elements = sum(info.elements for info in base.tensors.values())
        text = (
            f"{base.architecture}, {elements:,} parameters, {human_bytes(sum(s.size for s in base.shards))}"
        )
        checks.add("base", "ok", f"{text}, {formats(base)}" if base.decoded else text)
    return base


def _describe_adapter(adapter: Adapter, checks: _Checks) -> None:
    config = adapter.config
    named = config.base_model or "an unnamed base"
    checks.add("adapter", "ok", f"{len(adapter.tensors)} tensors, rank {config.r}, trained on {named}")
    here = version("peft")
    if config.peft_version and config.peft_version.split(".")[:2] != here.split(".")[:2]:
        checks.add(
            "PEFT",
            "note",
            f"the adapter was saved by PEFT {config.peft_version}, here is {here}",
            "if adapter and merged model differ later, score with the version of the training",
        )


def _plan(config: RunOptions, base: Checkpoint, adapter: Adapter, checks: _Checks) -> PlannedMerge | None:
    plan = checks.attempt("merge", lambda: _planned(config, base, adapter))
    if plan is not None:
        changed = len(plan.written.outputs)
        checks.add("merge", "ok", f"every adapter tensor has its place; {changed} tensors will be written")
        for finding in plan.own.findings:
            checks.add("merge", "note", finding.message, finding.remedy or "")
    return plan


def _planned(config: RunOptions, base: Checkpoint, adapter: Adapter) -> PlannedMerge:
    into = choose_into(base, [adapter], config.into, config.precision)
    return plan_into(base, [adapter], [1.0], config.precision, into)


def _test_set(
    examples: list[Example], base: Path, size: ModelSize, config: RunOptions, checks: _Checks
) -> WorkSize:
    work = work_size(examples, base)
    how = "" if work.counted else " (guessed from the characters)"
    text = f"{work.rows:,} examples, about {work.tokens:,} tokens{how}, the longest {work.longest:,}"
    most = min(value for value in (config.max_length, size.context, work.longest) if value)
    if work.longest > most:
        remedy = "remove the long rows, or give --no-strict to cut them"
        checks.add(
            "test set", "error" if config.strict else "warning", f"{text}; the limit is {most:,}", remedy
        )
    else:
        checks.add("test set", "ok", text)
    return work


def _calibration(
    config: RunOptions, base: Checkpoint, plan: PlannedMerge | None, checks: _Checks
) -> CalibrationSize | None:
    """None where the merge is not fitted to rows."""
    if config.rounding == "calibrated" and not config.train:
        checks.add("merge", "error", "a calibrated merge needs rows to be fitted to", "give --train")
    if plan is None or not config.train or config.rounding not in ("auto", "calibrated"):
        return None
    if config.precision == "float32":
        return None  # nothing is lost there that could be made up for
    budget = config.calibration_tokens
    size = checks.attempt(
        "training rows", lambda: calibration_size(plan.own, config.train, base.folder, budget)
    )
    if size is not None:
        checks.add("training rows", "ok", f"the merge is fitted to about {size.tokens:,} tokens of them")
    return size


def _answers(
    config: RunOptions, examples: list[Example], base: Checkpoint, checks: _Checks
) -> AnswerSize | None:
    if not config.tasks:
        return None
    size = checks.attempt("tasks", lambda: answer_size(examples, base.folder, config.task_module))
    if size is None:
        return None
    if not size.rows:
        remedy = "build the test set with `lorasmith testset build`, or do without --tasks"
        checks.add("tasks", "error", "no row belongs to a benchmark that can be answered", remedy)
        return None
    text = f"{size.rows:,} questions, answers of up to {size.written:,} tokens together, three times"
    checks.add("tasks", "ok", text)
    return size


def _judge_memory(size: ModelSize, peak: int, config: RunOptions, checks: _Checks) -> None:
    """Whether the models fit into memory; on a GPU they lie there, and the host needs no more than one."""
    have, where = device_memory(config.device)
    text = f"{human_bytes(peak)} needed at the peak, {human_bytes(have)} available on {where}"
    if have < least_memory(size):
        remedy = "use a machine with more memory: a model is scored in float32"
        checks.add("memory needed", "error", text, remedy)
    elif have < peak:
        remedy = "give smaller batches (--batch-tokens 512), or stop what else is running"
        checks.add("memory needed", "warning", text, remedy)
    else:
        checks.add("memory needed", "ok", text)


def device_memory(device: str) -> tuple[int, str]:
    """Free memory where the models would lie, and the name of that place."""
    import torch

    from lorasmith.models.device import resolve_device

    place = resolve_device(device)
    if place.type == "cuda":
        return int(torch.cuda.mem_get_info(place)[0]), str(place)
    return available_memory(), "this machine"


def _look_back(run: Path, checks: _Checks) -> None:
    """What an earlier run in this folder left undone: its failed gates with what to do about them."""
    try:
        record = read_record(run / "gates.json", GateRecord)
    except InputError:
        return
    for result in record.gates:
        if result.verdict != "pass":
            text = f"earlier run: gate {result.gate.name}: {result.verdict}"
            checks.add("gates", "note", text, result.reason or result.gate.advice)


# What a run refuses to start with: hours would be spent before it fails.


def require_machine(config: RunOptions) -> list[Finding]:
    """Raise `MemoryLimitError` or `DiskError` where the run could not end; look at headers only.

    Also raises what is wrong with base and adapter (`CheckpointError`, `AdapterError`), and returns warnings
    about the two, such as a base that the adapter does not name. A stage that is done needs nothing any more.
    `config.base` is a folder.
    """
    base, adapter = open_base(Path(config.base)), open_adapter(config.adapter)
    plan = _planned(config, base, adapter)
    merged = plan.nbytes
    done = {path.stem for path in (config.output / "stages").glob("*.json")}
    if "compare" not in done and config.check_memory and config.device_map is None:
        needed = least_memory(model_size(base, adapter, merged))
        have, where = device_memory(config.device)
        if have < needed:
            raise MemoryLimitError(
                f"too little memory for this run: {human_bytes(have)} are available on {where}",
                where=config.base,
                expected=f"{human_bytes(needed)}: the model in float32",
                remedy="use a machine with more memory; --no-check-memory tries all the same",
            )
    left = merged * len({"merge", "package"} - done) + followup_disk(config, base, merged, done)
    if left:
        require_disk(config.output, left, "merge and pack the model")
    return [finding for finding in plan.own.findings if finding.severity == "warning"]
