"""A run with a person's own metric: asked, compared, gated and shown; another module asks anew."""

from __future__ import annotations

from pathlib import Path

import lorasmith
from lorasmith.files import run_layout as layout
from lorasmith.files.atomic import read_record
from lorasmith.files.jsonl import write_rows
from lorasmith.records.proof import ComparisonRecord
from lorasmith.records.release import Gate
from lorasmith.records.scoring import TaskResult
from lorasmith.runs.results import RunResult
from tests.runs.test_pipeline import Log
from tests.scoring.test_no_reference import ifeval
from tests.tiny import save_adapter, save_base, tiny_rows

MODULE = """NAME = "letters"
MAX_NEW_TOKENS = 4
def score(example, answer):
    return {"share_of_a": answer.count("a") / max(1, len(answer)), "a_written": "a" in answer}
"""


def test_a_run_asks_compares_gates_and_shows_it(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    write_rows(tmp_path / "test.jsonl", [*tiny_rows(5), ifeval(0, "startend:quotation")])
    module = tmp_path / "letters.py"
    module.write_text(MODULE)
    gate = Gate(
        name="letters", metric="merge.accuracy_delta", comparison=">=", threshold=-1.0, group="source=letters"
    )

    def run(log: Log) -> RunResult:
        return lorasmith.run(
            base=tmp_path / "base",
            adapter=tmp_path / "adapter",
            test_set=tmp_path / "test.jsonl",
            output=tmp_path / "run",
            tasks=True,
            task_module=module,
            gates=(gate,),
            gate_defaults="none",
            watcher=log,
        )

    result, log = run(Log()), Log()
    [judged] = [one for one in result.gates.gates if one.gate.name == "letters"]
    assert judged.verdict == "pass"
    folder = tmp_path / "run"
    tasks = read_record(folder / "validation" / "adapter_tasks.json", TaskResult)
    assert [one.metric for one in tasks.metrics if one.benchmark == "letters"] == ["share_of_a", "a_written"]
    compared = read_record(folder / "proof" / "comparison.json", ComparisonRecord).task_effects["merge"]
    own = [one for one in compared if one.benchmark == "letters"]
    assert [one.metric for one in own] == ["share_of_a", "a_written"]
    assert judged.measured == own[0].delta  # a gate reads the first metric that the module names
    # A row without a reference answer is asked beside them, and no loss is computed of it.
    assert {one.examples for one in compared if one.benchmark == "IFEval"} == {1}
    assert layout.VALIDATIONS["merged"].read(folder).overall.examples == 5
    report = (folder / "report.html").read_text()
    assert "letters" in report and "share_of_a" in report
    written = layout.RUN.read(folder)
    assert "task module" in written.inputs and str(tmp_path) not in (folder / "run.json").read_text()
    run(log)
    assert log.ran == []
    module.write_text(MODULE.replace("max(1, ", "max(2, "))
    run(log)
    assert {"tasks-base", "tasks-adapter", "tasks-merged"} <= set(log.ran)
    assert not any(stage.startswith("validate") or stage == "merge" for stage in log.ran)
