"""`lorasmith gates` and the verdicts of `lorasmith run`, as a CI system calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from junitparser import JUnitXml

from lorasmith.cli.main import run as lorasmith
from lorasmith.errors import ExitCode
from lorasmith.files.atomic import read_record, write_record
from lorasmith.files.jsonl import write_rows
from lorasmith.gates import GUIDE_GATES
from lorasmith.records.release import GateRecord, RunRecord, TimingRecord
from tests.reporting.test_tasks import add_tasks
from tests.samples import sample_run
from tests.tiny import save_adapter, save_base, tiny_rows

CHEAP = """
gate_defaults = "none"
[[gates]]
name = "budget"
metric = "cost.dollars"
threshold = 0.75
advice = "use a cheaper machine"
[[gates]]
name = "helps"
metric = "effect.loss_delta_high"
threshold = 0.0
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run in the current folder, whose gates are the default ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    folder = sample_run(tmp_path / "run", count=10)
    record = read_record(folder / "run.json", RunRecord)
    gates = [gate.model_dump(mode="json") for gate in GUIDE_GATES]
    write_record(folder / "run.json", record.model_copy(update={"config": {**record.config, "gates": gates}}))
    return folder


def test_a_run_is_judged_again_by_its_own_gates(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lorasmith(["gates", "run", "--format", "json"]) == ExitCode.ANSWER_IS_NO
    record = GateRecord.from_json(capsys.readouterr().out, "stdout")
    assert [result.gate.model_copy(update={"advice": ""}) for result in record.gates] == list(GUIDE_GATES)
    assert lorasmith(["gates", "run"]) == ExitCode.ANSWER_IS_NO
    out = capsys.readouterr().out
    assert "another rounding" in out
    assert "the adapter helps" in out


def test_other_gates_come_from_a_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("ci.toml").write_text(CHEAP)
    asked = ["gates", "run", "--config", "ci.toml", "--format", "junit"]
    assert lorasmith(asked) == ExitCode.ANSWER_IS_NO
    budget, helps = next(iter(JUnitXml.fromstring(capsys.readouterr().out.encode())))
    assert budget.result[0].type == "not measured"
    assert "--price-per-hour" in budget.result[0].text
    assert helps.is_passed
    # The sample took 168.7 seconds.
    assert lorasmith([*asked, "--price-per-hour", "15"]) == ExitCode.OK
    assert lorasmith([*asked, "--price-per-hour", "17"]) == ExitCode.ANSWER_IS_NO


def test_accuracy_is_judged_from_the_records(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = (
        '[[gates]]\nname = "{}"\nmetric = "merge.accuracy_delta_low"\ngroup = "source={}"\ncomparison = ">"\n'
    )
    text = 'gate_defaults = "none"\n' + "".join(
        gate.format(name, name) + f"threshold = {limit}\n" for name, limit in (("DROP", -0.1), ("MATH", -0.1))
    )
    Path("ci.toml").write_text(text)
    asked = ["gates", "run", "--config", "ci.toml", "--format", "json"]
    lorasmith(asked)
    before = GateRecord.from_json(capsys.readouterr().out, "stdout")
    assert [result.verdict for result in before.gates] == ["not measured"] * 2
    add_tasks(run)
    lorasmith(asked)
    drop, maths = GateRecord.from_json(capsys.readouterr().out, "stdout").gates
    assert (drop.verdict, drop.measured) == ("pass", -0.08)
    assert (maths.verdict, maths.reason) == ("not measured", "no answer that both models have in source=MATH")


def test_github_gets_annotations_and_a_summary(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    Path("summary.md").write_text("before\n")
    assert lorasmith(["gates", "run", "--format", "github"]) == ExitCode.ANSWER_IS_NO
    assert capsys.readouterr().out.startswith("::error title=")
    assert Path("summary.md").read_text().startswith("before\n### lorasmith: ")


def test_gates_of_unpacked_results_need_no_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lorasmith(["package", "run", "--output", "out"])
    lorasmith(["unpack", "out/validation_results.tar.gz", "--output", "there"])
    capsys.readouterr()
    assert lorasmith(["gates", "there/validation_results", "--format", "json"]) == ExitCode.ANSWER_IS_NO
    there = capsys.readouterr().out
    lorasmith(["gates", "run", "--format", "json"])
    assert capsys.readouterr().out == there


def test_judging_never_imports_torch(run: Path) -> None:
    code = (
        "import sys; from lorasmith.cli.main import run; run(['gates', 'run']); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False False")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gates", "nowhere"], "run.json"),
        (["gates", "run", "--format", "yaml"], "text, json, junit, markdown, github"),
        (["gates", "run", "--config", "bad.toml"], "adapter.lost"),
        (["gates", "run", "--config", "odd.toml"], "gates.0.threshold"),
    ],
)
def test_mistakes_get_one_message(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    Path("bad.toml").write_text('[[gates]]\nname = "x"\nmetric = "adapter.lost"\nthreshold = 1')
    Path("odd.toml").write_text('[[gates]]\nname = "x"\nmetric = "adapter.loss"')
    assert lorasmith(arguments) == ExitCode.BAD_INPUT
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


def test_a_run_without_gates_in_its_record_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = read_record(run / "run.json", RunRecord)
    write_record(run / "run.json", record.model_copy(update={"config": {}}))
    assert lorasmith(["gates", "run"]) == ExitCode.BAD_INPUT
    assert "--config" in capsys.readouterr().err


def test_a_run_prints_its_verdict_and_keeps_costs_out_of_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    write_rows(tmp_path / "test.jsonl", tiny_rows(8))
    (tmp_path / "ci.toml").write_text(CHEAP)

    def command(price: float, output: Path) -> list[str]:
        given = {"base": tmp_path / "base", "adapter": tmp_path / "adapter", "output": output}
        given |= {"test-set": tmp_path / "test.jsonl", "config": tmp_path / "ci.toml"}
        options = [part for name, path in given.items() for part in (f"--{name}", str(path))]
        return ["run", *options, "--price-per-hour", str(price), "--format", "json"]

    run = tmp_path / "run"
    lorasmith(command(1e-6, run))
    record = GateRecord.from_json(capsys.readouterr().out, "stdout")
    assert [result.gate.name for result in record.gates] == ["helps", "weights", "budget"]
    assert record.gates[2].verdict == "pass"
    packed = (run / "package" / "SHA256SUMS").read_bytes()
    assert lorasmith(command(1e9, run)) == ExitCode.ANSWER_IS_NO
    assert json.loads(capsys.readouterr().out)["gates"][2]["verdict"] == "fail"
    assert (run / "package" / "SHA256SUMS").read_bytes() == packed
    assert read_record(run / "timing.json", TimingRecord).price_per_hour == 1e9
    names = [result.gate.name for result in read_record(run / "gates.json", GateRecord).gates]
    assert names == ["helps", "weights"]
