"""A whole run: its folder, its verdict, what is done again after a change, and kills at any point."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

import lorasmith
from lorasmith.data.rows import read_examples
from lorasmith.errors import ExitCode, InputError, UsageError
from lorasmith.files.jsonl import write_rows
from lorasmith.packaging.verify import verify
from lorasmith.progress import silent
from lorasmith.records.release import Gate
from lorasmith.runs.results import RunResult, judge_run
from tests.campaigns.kills import contents
from tests.tiny import save_adapter, save_base, tiny_rows

SAME_ANSWERS = Gate(name="same answers", metric="merge.same_answers", comparison=">=", threshold=0.9)
KILLS = 8
"""Points at which a run is killed: a seeded sample of the hundred of `make campaign`."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    save_adapter(folder / "adapter", save_base(folder / "base"))
    write_rows(folder / "test.jsonl", tiny_rows(12))
    write_rows(folder / "train.jsonl", tiny_rows(12, seed=5))
    return {
        "base": folder / "base",
        "adapter": folder / "adapter",
        "test_set": folder / "test.jsonl",
        "train": (folder / "train.jsonl",),
    }


@pytest.fixture(scope="module")
def finished(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return lorasmith.run(**inputs, output=tmp_path_factory.mktemp("finished") / "run")


class Log:
    """A watcher that remembers which stages really ran."""

    progress = staticmethod(silent)

    def __init__(self) -> None:
        self.ran: list[str] = []

    def step(self, number: int, total: int, title: str) -> None: ...

    def finished(self, stage: str, *, reused: bool, seconds: float) -> None:
        if not reused:
            self.ran.append(stage)

    def show(self, stage: str, record: object) -> None: ...

    def generated(self, tokens: int) -> None: ...


def test_the_run_folder_is_laid_out_as_documented(finished: RunResult) -> None:
    names = set(contents(finished.folder)) | {"timing.json", "report.html"}
    for name in (
        "run.json", "timing.json", "report.html", "gates.json",
        "testset/test_set.jsonl", "testset/statistics.json", "testset/contamination.json",
        "validation/base.json", "validation/adapter.parquet", "validation/merged.json",
        "merged/config.json", "merged/tokenizer.json", "merged/chat_template.jinja",
        "merged/generation_config.json", "merged/README.md", "merged/model.safetensors",
        "merged/lorasmith_merge.json",
        "proof/weights.json", "proof/behaviour.json", "proof/comparison.json",
        "package/validation_results.tar.gz", "package/merged_model.tar.gz",
        "package/manifest.json", "package/SHA256SUMS",
    ):  # fmt: skip
        assert name in names, name


def test_a_finished_run_is_sealed(finished: RunResult) -> None:
    assert verify(finished.folder) == []
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    subprocess.run(check, cwd=finished.folder, check=True)
    listed = {line[66:] for line in (finished.folder / "SHA256SUMS").read_text().splitlines()}
    there = {
        path.relative_to(finished.folder).as_posix() for path in finished.folder.rglob("*") if path.is_file()
    }
    assert there - listed == {".lock", "SHA256SUMS"}


def test_the_verdict_of_a_run(finished: RunResult) -> None:
    # The run has training rows: its rounding is fitted to them, and proved within a few steps of exact.
    assert (finished.weights.grade, finished.weights.rounding) == ("bounded", "calibrated")
    assert finished.weights.adapter_tensors_used == finished.weights.adapter_tensors_total
    assert finished.contamination.verdict == "independent"
    assert {gate.gate.name for gate in finished.gates.gates if gate.verdict == "fail"} >= {
        "loss",
        "perplexity",
    }
    assert finished.exit_code == ExitCode.ANSWER_IS_NO
    # What is judged again, and what the page shows, is what the run said.
    assert judge_run(finished.folder) == finished.judged
    assert finished.judged.gates[-1].gate.name == "independent test set"
    failed = sum(gate.verdict != "pass" for gate in finished.judged.gates)
    page = (finished.folder / "report.html").read_text()
    assert f"{failed} of {len(finished.judged.gates)} gates did not pass" in page


def test_the_numbers_of_the_stages_agree(finished: RunResult) -> None:
    # Validation and comparison score the same tokens of the same models in float32, batched differently.
    overall = finished.behaviour.overall
    assert overall.tokens == finished.adapter.overall.tokens == finished.merged.overall.tokens
    assert overall.loss_a == pytest.approx(finished.adapter.overall.loss, abs=1e-6)
    assert overall.loss_b == pytest.approx(finished.merged.overall.loss, abs=1e-6)
    assert finished.comparison.merge_effect.loss_delta == pytest.approx(overall.loss_delta, abs=1e-6)


def test_the_package_holds_the_test_set_that_was_used(finished: RunResult, inputs: dict[str, Any]) -> None:
    with tarfile.open(finished.folder / "package" / "validation_results.tar.gz") as archive:
        names = archive.getnames()
        member = next(name for name in names if name.endswith("test_set.jsonl"))
        content = archive.extractfile(member)
        assert content is not None
        packed = [json.loads(line) for line in content.read().splitlines()]
    assert [row["response"] for row in packed] == [row.response for row in read_examples(inputs["test_set"])]
    assert not any("timing" in name for name in names)


def test_no_record_names_a_place_of_this_machine(finished: RunResult, inputs: dict[str, Any]) -> None:
    for path in finished.folder.rglob("*.json"):
        if path.parent.name != "merged" or path.name == "lorasmith_merge.json":
            assert str(inputs["base"].parent) not in path.read_text(), path


def test_two_runs_give_the_same_bytes(finished: RunResult, inputs: dict[str, Any], tmp_path: Path) -> None:
    again = lorasmith.run(**inputs, output=tmp_path / "elsewhere")
    assert contents(again.folder) == contents(finished.folder)


def test_a_finished_run_does_nothing_again(
    finished: RunResult, inputs: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    log = Log()
    lorasmith.run(**inputs, output=run, watcher=log)
    assert log.ran == []


AFTER_TEST_SET = [
    "validate-base", "validate-adapter", "validate-merged", "compare", "comparison",
    "gates", "card", "package",
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"precision": "float32"}, ["merge", "prove-weights", "validate-merged", "compare", "comparison"]),
        (
            {"gates": ({"name": "kl", "metric": "merge.kl_mean", "threshold": 1.0},)},
            ["gates", "card", "package"],
        ),
        ({"compression": "none"}, ["package"]),
        ({"end_of_turn": False}, AFTER_TEST_SET),
    ],
    ids=["precision", "gates", "compression", "scoring"],
)
def test_a_changed_parameter_redoes_what_depends_on_it(
    finished: RunResult, inputs: dict[str, Any], tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    log = Log()
    lorasmith.run(**inputs, **changes, output=run, watcher=log)
    last = ("gates", "card", "package")
    assert [stage for stage in log.ran if stage not in last] == [
        stage for stage in expected if stage not in last
    ]
    assert set(expected) <= set(log.ran)
    fresh = lorasmith.run(**inputs, **changes, output=tmp_path / "fresh")
    assert contents(run) == contents(fresh.folder)


def test_a_damaged_output_is_found_and_made_again(
    finished: RunResult, inputs: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    shard = run / "merged" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    log = Log()
    lorasmith.run(**inputs, output=run, watcher=log)
    assert "merge" in log.ran
    assert contents(run) == contents(finished.folder)


def test_a_run_killed_at_any_point_ends_with_the_same_bytes() -> None:
    # In a process of its own: forking is safe only where no library has started threads.
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.kills", "--kills", str(KILLS)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{KILLS} of {KILLS} killed runs continued" in done.stdout


def test_output_inside_an_input_is_refused(inputs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--base"):
        lorasmith.run(**inputs, output=inputs["base"] / "run")
    assert not (inputs["base"] / "run").exists()


def test_missing_inputs_are_found_before_anything_is_written(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--adapter does not exist"):
        lorasmith.run(**{**inputs, "adapter": tmp_path / "absent"}, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_inputs_are_never_written_to(finished: RunResult, inputs: dict[str, Any]) -> None:
    names = {path.name for path in inputs["base"].iterdir()} | {
        path.name for path in inputs["adapter"].iterdir()
    }
    assert not {name for name in names if "lorasmith" in name or name.startswith(".")}


def test_the_public_functions_take_paths_as_text(inputs: dict[str, Any], tmp_path: Path) -> None:
    base, adapter, test_set = (str(inputs[name]) for name in ("base", "adapter", "test_set"))
    merged = str(tmp_path / "merged")
    lorasmith.merge(base, adapter, merged)
    assert lorasmith.prove(base, adapter, merged, output=str(tmp_path / "weights.json")).grade == "exact"
    assert lorasmith.validate(base, test_set, str(tmp_path / "v"), adapter=adapter).overall.examples == 12
    assert lorasmith.compare(base, adapter, merged, test_set, str(tmp_path / "b.json")).overall.examples == 12


def test_tasks_are_answered_by_all_three_models_and_compared(inputs: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {
            "id": f"MMLU/{index}",
            "prompt": f"the {'cat ' * index}\nA. one\nB. two\nC. in\nD. on\nAnswer:",
            "response": "ABCD"[index % 4],
            "metadata": {
                "source": "MMLU",
                "choices": ["one", "two", "in", "on"],
                "answer": "ABCD"[index % 4],
            },
        }
        for index in range(6)
    ]
    write_rows(tmp_path / "test.jsonl", rows)
    asked = {**inputs, "test_set": tmp_path / "test.jsonl", "output": tmp_path / "run"}
    log = Log()
    result = lorasmith.run(**asked, tasks=True, generate=3, gates=(SAME_ANSWERS,), watcher=log)
    written = result.behaviour.generation
    assert written is not None and (written.max_new_tokens, written.examples) == (3, 6)
    (judged,) = [gate for gate in result.gates.gates if gate.gate.name == SAME_ANSWERS.name]
    assert judged.measured == written.same_fraction
    assert [stage for stage in log.ran if stage.startswith("tasks")] == [
        "tasks-base", "tasks-adapter", "tasks-merged",
    ]  # fmt: skip
    effects = result.comparison.task_effects
    assert [(one.benchmark, one.metric, one.examples) for one in effects["effect"]] == [
        ("MMLU", "accuracy", 6)
    ]
    assert [(one.benchmark, one.examples) for one in effects["merge"]] == [("MMLU", 6)]
    with tarfile.open(tmp_path / "run" / "package" / "validation_results.tar.gz") as archive:
        assert any(name.endswith("validation/adapter_tasks.json") for name in archive.getnames())
    assert not (tmp_path / "run" / ".states").exists()
    again = Log()
    lorasmith.run(**asked, tasks=True, generate=3, gates=(SAME_ANSWERS,), watcher=again)
    assert again.ran == []
    # Without tasks the answers are no part of the run any more.
    lorasmith.run(**asked)
    lorasmith.run(**{**asked, "output": tmp_path / "fresh"})
    assert contents(tmp_path / "run") == contents(tmp_path / "fresh")
