"""Gates judged again from the records of a run, without a model."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from lorasmith.config import load_gates
from lorasmith.errors import InputError
from lorasmith.files.atomic import read_record
from lorasmith.gates import evaluate
from lorasmith.records.release import Gate, GateRecord, RunRecord
from lorasmith.results import load_measured


def judge(run: Path, *, config: Path | None = None, price_per_hour: float | None = None) -> GateRecord:
    """The gates of `config` (those of the run without one) on the records that lie in `run`.

    `price_per_hour` in dollars replaces the one that the run recorded. Raises `InputError` for a folder
    without `run.json`, and `UsageError` for a gate that does not exist.
    """
    record = read_record(run / "run.json", RunRecord)
    gates = load_gates(config) if config else _recorded(record, run)
    measured = load_measured(run)
    if price_per_hour is not None and measured.timing is not None:
        timing = measured.timing.model_copy(update={"price_per_hour": price_per_hour})
        measured = type(measured)(**{**vars(measured), "timing": timing})
    return evaluate(gates, measured)


def _recorded(record: RunRecord, run: Path) -> list[Gate]:
    try:
        return [Gate.model_validate(gate) for gate in record.config["gates"]]
    except (KeyError, TypeError, ValidationError) as error:
        raise InputError(
            "the run does not name its gates",
            where=run / "run.json",
            expected="a list `gates` in its config",
            remedy="name them in a file: --config",
        ) from error
