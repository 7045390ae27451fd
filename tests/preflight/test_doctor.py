"""What is wrong is said before a run, all of it at once; and a run that cannot end does not begin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorasmith.cli.main import run as lorasmith
from lorasmith.errors import DiskError, ExitCode, MemoryLimitError
from lorasmith.files.atomic import write_record
from lorasmith.files.jsonl import write_examples, write_rows
from lorasmith.machine import resources
from lorasmith.machine.resources import available_memory
from lorasmith.options import RunOptions
from lorasmith.preflight import doctor
from lorasmith.preflight import doctor as module
from lorasmith.preflight.doctor import examine, require_machine
from lorasmith.preflight.estimate import Rates, least_memory
from lorasmith.records.doctor import DoctorRecord
from lorasmith.records.release import Gate, GateRecord, GateResult
from tests.samples import sample_examples
from tests.tiny import save_adapter, save_base, tiny_rows

FAST = Rates(flops=1e12, write_bytes=1e9)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    write_rows(tmp_path / "test.jsonl", tiny_rows(8))
    monkeypatch.setattr(module, "measure_rates", lambda *arguments: FAST)
    return {
        "base": tmp_path / "base",
        "adapter": tmp_path / "adapter",
        "test_set": tmp_path / "test.jsonl",
        "output": tmp_path / "run",
    }


def states(record: DoctorRecord) -> dict[str, str]:
    """The worst state of each check."""
    ranks = ["ok", "note", "warning", "error"]
    found: dict[str, str] = {}
    for check in record.checks:
        found[check.name] = max(found.get(check.name, "ok"), check.state, key=ranks.index)
    return found


def test_a_sound_run_is_estimated_and_nothing_is_written(inputs: dict[str, Any]) -> None:
    record = examine(RunOptions.make({**inputs, "price_per_hour": 3.6}))
    assert "error" not in states(record).values()
    assert {stage.stage for stage in record.stages} >= {"validate-base", "merge", "compare", "package"}
    assert record.seconds == pytest.approx(sum(stage.seconds for stage in record.stages))
    # At 3.60 an hour a second costs a tenth of a cent.
    assert record.dollars == pytest.approx((record.seconds or 0) / 1000)
    assert not inputs["output"].exists()


def test_everything_that_is_wrong_is_found_at_once(inputs: dict[str, Any], tmp_path: Path) -> None:
    (inputs["base"] / "model.safetensors").unlink()
    (inputs["adapter"] / "adapter_config.json").write_text("{")
    inputs["test_set"].write_text('{"prompt": "a"}\n')
    found = states(examine(RunOptions.make(inputs)))
    assert (found["base"], found["adapter"], found["test set"]) == ("error", "error", "error")


def test_an_adapter_of_another_base_fails_at_the_merge(inputs: dict[str, Any], tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", hidden_size=64)
    assert states(examine(RunOptions.make({**inputs, "base": other})))["merge"] == "error"


def test_rows_beyond_the_context_are_said_before(inputs: dict[str, Any]) -> None:
    assert states(examine(RunOptions.make({**inputs, "max_length": 16})))["test set"] == "error"
    lenient = RunOptions.make({**inputs, "max_length": 16, "strict": False})
    assert states(examine(lenient))["test set"] == "warning"


def test_a_test_set_for_days_gets_a_smaller_size(
    inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure_rates", lambda *arguments: Rates(flops=100.0, write_bytes=1e9))
    record = examine(RunOptions.make(inputs))
    (check,) = [check for check in record.checks if check.name == "time"]
    assert check.state == "warning"
    assert "--size" in check.remedy


def test_a_merge_that_is_fitted_to_rows_takes_longer(inputs: dict[str, Any], tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", tiny_rows(30, seed=4))

    def seconds(**more: Any) -> float:
        stages = examine(RunOptions.make({**inputs, **more})).stages
        return next(stage.seconds for stage in stages if stage.stage == "merge")

    train = {"train": (tmp_path / "train.jsonl",)}
    assert seconds(**train) > seconds(**train, rounding="dithered") == seconds()
    assert states(examine(RunOptions.make({**inputs, "rounding": "calibrated"})))["merge"] == "error"


def test_questions_are_looked_for_before_they_are_asked(inputs: dict[str, Any]) -> None:
    assert states(examine(RunOptions.make({**inputs, "tasks": True})))["tasks"] == "error"
    write_examples(inputs["test_set"], sample_examples(10))
    record = examine(RunOptions.make({**inputs, "tasks": True}))
    assert states(record)["tasks"] == "ok"
    assert [stage.stage for stage in record.stages if stage.stage.startswith("tasks")]


def test_the_container_limits_memory_not_the_host(tmp_path: Path) -> None:
    free = available_memory(tmp_path / "none")
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 400000\n")
    assert available_memory(tmp_path) == 2_400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == pytest.approx(free, rel=0.5)


@pytest.mark.parametrize(("share", "state"), [(0.9, "error"), (1.1, "warning"), (1e6, "ok")])
def test_memory_is_judged_by_what_one_model_needs(
    inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, share: float, state: str
) -> None:
    need = least_memory(size_of(inputs))
    monkeypatch.setattr(module, "available_memory", lambda: int(share * need))
    assert states(examine(RunOptions.make(inputs)))["memory needed"] == state


def size_of(inputs: dict[str, Any]) -> Any:
    from lorasmith.checkpoint.model import open_checkpoint
    from lorasmith.preflight.sizes import model_size

    return model_size(open_checkpoint(inputs["base"]), None, 1)


def test_a_run_that_cannot_fit_in_memory_does_not_begin(
    inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 1000)
    options = [f"--{name.replace('_', '-')}={path}" for name, path in inputs.items()]
    assert lorasmith(["run", *options]) == ExitCode.MACHINE
    error = capsys.readouterr().err
    assert "too little memory for this run: 1.0 kB are available" in error
    assert "--no-check-memory" in error
    assert not (inputs["output"] / "validation").exists()
    require_machine(RunOptions.make({**inputs, "check_memory": False}))
    # A model that is spread over devices and disk needs less.
    require_machine(RunOptions.make({**inputs, "device_map": "auto"}))


def test_a_comparison_that_is_done_needs_no_memory(
    inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 1000)
    with pytest.raises(MemoryLimitError):
        require_machine(RunOptions.make(inputs))
    (inputs["output"] / "stages").mkdir(parents=True)
    (inputs["output"] / "stages" / "compare.json").write_text("{}")
    require_machine(RunOptions.make(inputs))


def test_a_run_that_cannot_fit_on_the_disk_does_not_begin(
    inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(place: Any) -> Any:
        return type("Status", (), {"f_bavail": 10, "f_frsize": 1024})()

    monkeypatch.setattr(resources.os, "statvfs", small)
    with pytest.raises(DiskError, match="merge and pack"):
        require_machine(RunOptions.make(inputs))


def test_a_full_disk_is_an_error_of_the_examination(
    inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage)
    found = states(examine(RunOptions.make(inputs)))
    assert (found["disk"], found["cache"]) == ("error", "error")


def test_a_base_of_the_hub_is_not_fetched_for_an_estimate(
    inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = examine(RunOptions.make({**inputs, "base": "acme/no-such-model"}))
    assert states(record)["base"] == "note"
    assert not record.stages


def test_differences_of_an_earlier_run_come_with_advice(inputs: dict[str, Any]) -> None:
    gate = Gate(name="merge loss Δ", metric="merge.loss_delta", threshold=1e-4, advice="merge again")
    results = [GateResult(gate=gate, measured=1e-3, verdict="fail")]
    write_record(inputs["output"] / "gates.json", GateRecord(passed=False, gates=results))
    (check,) = [check for check in examine(RunOptions.make(inputs)).checks if check.name == "gates"]
    assert "merge loss Δ: fail" in check.found
    assert check.remedy == "merge again"


def test_libraries_outside_their_range_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=999", "no-such-package>=1", "absent-extra>=1; extra == 'sign'", "pydantic>=2"]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    found = {check.name: check for check in doctor.environment_checks()}
    assert found["libraries"].state == "error"
    assert "numpy" in found["libraries"].found
    assert "no-such-package is not installed" in found["libraries"].found
    assert found["optional libraries"].found == "not installed: absent-extra"


def test_the_command_alone_looks_at_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert lorasmith(["doctor"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "libraries" in out
    assert "devices" in out


def test_the_command_with_a_run(
    inputs: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {name: value for name, value in inputs.items() if name != "output"}
    options = [f"--{name.replace('_', '-')}={path}" for name, path in given.items()]
    assert lorasmith(["doctor", *options, "--price-per-hour", "2"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "Cost: about $" in out
    assert "compare" in out
    assert lorasmith(["doctor", *options, "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["format"] == "lorasmith/doctor/1"
    (inputs["adapter"] / "adapter_model.safetensors").write_bytes(b"")
    assert lorasmith(["doctor", *options]) == ExitCode.ANSWER_IS_NO


def test_real_rates_are_measured(tmp_path: Path) -> None:
    from lorasmith.preflight.rates import measure_rates

    rates = measure_rates(tmp_path / "not" / "there", device="cpu")
    assert 1e8 < rates.flops < 1e14
    assert 1e5 < rates.write_bytes < 1e12
    assert 1e8 < rates.read_bytes < 1e13
    assert 1e5 < rates.pack_bytes < rates.read_bytes
    assert 1e5 < rates.round_bytes < rates.read_bytes
    assert not list(tmp_path.iterdir())
