"""Everything a run needs, looked at before it starts; nothing is loaded and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeVar

from lorasmith.checkpoint.adapter import Adapter, open_adapter
from lorasmith.checkpoint.model import Checkpoint, open_checkpoint
from lorasmith.config import RunConfig
from lorasmith.errors import InputError, LorasmithError
from lorasmith.files.atomic import read_record
from lorasmith.files.hub import find_cached, hub_name
from lorasmith.files.jsonl import read_examples
from lorasmith.files.machine import available_memory, hardware, human_bytes
from lorasmith.merging.plan import Plan, make_plan
from lorasmith.preflight.answers import AnswerSize, answer_size
from lorasmith.preflight.calibrated import CalibrationSize, calibration_size
from lorasmith.preflight.environment import disk_check, environment_checks
from lorasmith.preflight.estimate import estimate, least_memory
from lorasmith.preflight.followup import estimate_followup
from lorasmith.preflight.rates import measure_rates
from lorasmith.preflight.sizes import ModelSize, WorkSize, model_size, work_size
from lorasmith.records.dataset import Example
from lorasmith.records.doctor import Check, DoctorRecord
from lorasmith.records.release import GateRecord

T = TypeVar("T")
State = Literal["ok", "note", "warning", "error"]

LONG_HOURS = 8.0
"""From here on a smaller test set is advised: the guide's whole procedure takes less than one."""


@dataclass
class _Findings:
    checks: list[Check] = field(default_factory=list)

    def add(self, name: str, state: State, found: str, remedy: str = "") -> None:
        self.checks.append(Check(name=name, state=state, found=found, remedy=remedy))

    def attempt(self, name: str, action: Callable[[], T]) -> T | None:
        """The result, or None and an error among the checks."""
        try:
            return action()
        except LorasmithError as error:
            where = f" ({error.where})" if error.where else ""
            expected = f"; expected {error.expected}" if error.expected else ""
            self.add(name, "error", f"{error.found}{where}{expected}", error.remedy or "")
            return None


def examine(config: RunConfig | None = None) -> DoctorRecord:
    """Look at the machine and, with the config of a run, at all that it would read, and estimate it.

    Problems are findings, not errors: the record holds all of them at once.
    """
    found = _Findings(environment_checks())
    record = DoctorRecord(machine=hardware(), checks=[])
    if config is not None:
        record = _examine_run(config, found, record)
    return record.model_copy(update={"checks": found.checks})


def _examine_run(config: RunConfig, found: _Findings, record: DoctorRecord) -> DoctorRecord:
    base = _base(config, found)
    adapter = found.attempt("adapter", lambda: open_adapter(config.adapter))
    if adapter is not None:
        _describe_adapter(adapter, found)
    plan = _plan(config, base, adapter, found) if base and adapter else None
    examples = found.attempt("test set", lambda: read_examples(config.test_set))
    _look_back(config.output, found)
    if base is None or examples is None:
        return record
    merged_bytes = sum(output.nbytes for output in plan.outputs) if plan else base.total_bytes
    size = model_size(base, adapter, merged_bytes)
    work = _test_set(examples, base.folder, size, config, found)
    rates = found.attempt("rates", lambda: measure_rates(config.output, config.device, config.arithmetic))
    if rates is None:
        return record
    stages = estimate(
        size,
        work,
        rates,
        calibration=_calibration(config, base, plan, found),
        answers=_answers(config, examples, base, found),
    )
    stages += found.attempt("followup", lambda: estimate_followup(config, base, size, rates)) or []
    seconds = sum(stage.seconds for stage in stages)
    disk = sum(stage.disk_bytes for stage in stages)
    peak = max(stage.memory_bytes for stage in stages)
    found.checks.append(disk_check(config.output, disk))
    _judge_memory(size, peak, config, found)
    if seconds > LONG_HOURS * 3600:
        rows = max(1, int(work.rows * LONG_HOURS * 3600 / seconds))
        found.add(
            "time",
            "warning",
            f"about {seconds / 3600:.0f} hours for {work.rows:,} examples",
            f"use a smaller test set (testset split --test-size {rows}, or fewer --samples-per-benchmark)",
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


def _base(config: RunConfig, found: _Findings) -> Checkpoint | None:
    folder = Path(config.base)
    named = hub_name(config.base)
    if named is not None:
        cached = find_cached(named)
        if cached is None:
            found.add(
                "base", "note", f"{named.repository} is not in the hub's cache: a run downloads it first"
            )
            return None
        folder = cached
    base = found.attempt("base", lambda: open_checkpoint(folder))
    if base is not None:
        elements = sum(info.elements for info in base.tensors.values())
        text = f"{base.architecture}, {elements:,} parameters, {human_bytes(base.total_bytes)}"
        found.add("base", "ok", text)
    return base


def _describe_adapter(adapter: Adapter, found: _Findings) -> None:
    config = adapter.config
    named = config.base_model or "an unnamed base"
    found.add("adapter", "ok", f"{len(adapter.tensors)} tensors, rank {config.r}, trained on {named}")
    here = version("peft")
    if config.peft_version and config.peft_version.split(".")[:2] != here.split(".")[:2]:
        found.add(
            "PEFT",
            "note",
            f"the adapter was saved by PEFT {config.peft_version}, here is {here}",
            "if adapter and merged model differ later, score with the version of the training",
        )


def _plan(config: RunConfig, base: Checkpoint, adapter: Adapter, found: _Findings) -> Plan | None:
    plan = found.attempt("merge", lambda: make_plan(base, [adapter], [1.0], config.precision))
    if plan is not None:
        changed = len(plan.outputs)
        found.add("merge", "ok", f"every adapter tensor has its place; {changed} tensors will be written")
        for finding in plan.findings:
            found.add("merge", "note", finding.message, finding.remedy or "")
    return plan


def _test_set(
    examples: list[Example], base: Path, size: ModelSize, config: RunConfig, found: _Findings
) -> WorkSize:
    work = work_size(examples, base)
    how = "" if work.counted else " (guessed from the characters)"
    text = f"{work.rows:,} examples, about {work.tokens:,} tokens{how}, the longest {work.longest:,}"
    most = min(value for value in (config.max_length, size.context, work.longest) if value)
    if work.longest > most:
        remedy = "remove the long rows, or give --no-strict to cut them"
        found.add(
            "test set", "error" if config.strict else "warning", f"{text}; the limit is {most:,}", remedy
        )
    else:
        found.add("test set", "ok", text)
    return work


def _calibration(
    config: RunConfig, base: Checkpoint, plan: Plan | None, found: _Findings
) -> CalibrationSize | None:
    """None where the merge is not fitted to rows."""
    if config.rounding == "calibrated" and not config.train:
        found.add("merge", "error", "a calibrated merge needs rows to be fitted to", "give --train")
    if plan is None or not config.train or config.rounding not in ("auto", "calibrated"):
        return None
    if config.precision == "float32":
        return None  # nothing is lost there that could be made up for
    budget = config.calibration_tokens
    size = found.attempt("training rows", lambda: calibration_size(plan, config.train, base.folder, budget))
    if size is not None:
        found.add("training rows", "ok", f"the merge is fitted to about {size.tokens:,} tokens of them")
    return size


def _answers(
    config: RunConfig, examples: list[Example], base: Checkpoint, found: _Findings
) -> AnswerSize | None:
    if not config.tasks:
        return None
    size = answer_size(examples, base.folder)
    if not size.rows:
        remedy = "build the test set with `lorasmith testset build`, or do without --tasks"
        found.add("tasks", "error", "no row belongs to a benchmark that can be answered", remedy)
        return None
    text = f"{size.rows:,} questions, answers of up to {size.written:,} tokens together, three times"
    found.add("tasks", "ok", text)
    return size


def _judge_memory(size: ModelSize, peak: int, config: RunConfig, found: _Findings) -> None:
    """On a GPU the models lie there: the host then needs no more than one of them."""
    have, where = device_memory(config.device)
    text = f"{human_bytes(peak)} needed at the peak, {human_bytes(have)} available on {where}"
    if have < least_memory(size):
        remedy = "use a machine with more memory: a model is scored in float32"
        found.add("memory needed", "error", text, remedy)
    elif have < peak:
        remedy = "give smaller batches (--batch-tokens 512), or stop what else is running"
        found.add("memory needed", "warning", text, remedy)
    else:
        found.add("memory needed", "ok", text)


def device_memory(device: str) -> tuple[int, str]:
    """Free memory where the models would lie, and the name of that place."""
    import torch

    from lorasmith.models.arithmetic import resolve_device

    place = resolve_device(device)
    if place.type == "cuda":
        return int(torch.cuda.mem_get_info(place)[0]), str(place)
    return available_memory(), "this machine"


def _look_back(run: Path, found: _Findings) -> None:
    """What an earlier run in this folder left undone: its failed gates with what to do about them."""
    try:
        record = read_record(run / "gates.json", GateRecord)
    except InputError:
        return
    for result in record.gates:
        if result.verdict != "pass":
            text = f"earlier run: gate {result.gate.name}: {result.verdict}"
            found.add("gates", "note", text, result.reason or result.gate.advice)
