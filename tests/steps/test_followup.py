"""What comes after the release, as steps of a run: folder, package, resume, kills, and what is refused."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

import lorasmith
from lorasmith.config import load_config, to_toml
from lorasmith.errors import ExitCode, InputError, UsageError
from lorasmith.files.atomic import read_record
from lorasmith.files.jsonl import write_rows
from lorasmith.followup.asked import spread_layers
from lorasmith.packaging.verify import verify
from lorasmith.progress import silent
from lorasmith.records.followup import RespondTiming
from lorasmith.results import RunResult
from lorasmith.stages import read_timings
from tests.campaigns.kills import contents
from tests.tiny import save_adapter, save_base, tiny_rows

ASKED: dict[str, Any] = {
    "respond": {"max_new_tokens": 12, "top_logprobs": 4},
    "draft": {"layers": "1", "epochs": 2.0, "batch_size": 4, "validate_every": 2, "learning_rate": 0.003},
    "speculate": {"draft_tokens": (2,), "max_new_tokens": 8, "limit": 3},
    "compress": {"limit": 4, "max_perplexity_ratio": 100.0, "max_mean_kl": 100.0, "min_top1": 0.0},
}
STAGES = ["respond", "draft", "speculate", "compress-compressed-tensors"]


class Log:
    """A watcher that remembers which stages really ran, and what was told at once."""

    progress = staticmethod(silent)

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.told: list[object] = []

    def step(self, number: int, total: int, title: str) -> None: ...

    def finished(self, stage: str, *, reused: bool, seconds: float) -> None:
        if not reused:
            self.ran.append(stage)

    def show(self, stage: str, record: object) -> None:
        self.told.append(record)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", hidden_size=64, intermediate_size=128)
    save_adapter(folder / "adapter", base)
    write_rows(folder / "test.jsonl", tiny_rows(6))
    write_rows(folder / "train.jsonl", tiny_rows(14, seed=5))
    return {
        "base": base,
        "adapter": folder / "adapter",
        "test_set": folder / "test.jsonl",
        "train": (folder / "train.jsonl",),
        "rounding": "nearest",
        "gate_defaults": "none",
    }


@pytest.fixture(scope="module")
def finished(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return lorasmith.run(**inputs, followup=ASKED, output=tmp_path_factory.mktemp("finished") / "run")


def test_all_of_it_is_done_in_one_run(finished: RunResult) -> None:
    found = finished.followup
    assert found is not None and found.responses and found.draft and found.speculation and found.speeds
    assert found.responses.rows == 14 and found.responses.failed == 0
    assert found.responses.logprobs is not None
    # The chain: the draft learned from these responses, and is the one that was tested.
    assert found.draft.responses == found.responses.output
    assert found.draft.logprobs == found.responses.logprobs and found.draft.generator.kl is not None
    assert found.draft.layers == [1]
    assert found.draft.target_sha256 == found.responses.settings.model_sha256
    assert [setting.method for setting in found.speculation.settings] == ["draft", "lookup"]
    assert sum(setting.different for setting in found.speculation.settings) == 0
    (compressed,) = found.compressed
    assert compressed.model_sha256 == found.speculation.target_sha256
    assert compressed.quality is not None and compressed.quality.examples == 4
    assert not (finished.folder / ".followup").exists()


def test_each_step_has_its_record_and_its_cost(finished: RunResult) -> None:
    timings = read_timings(finished.folder)
    for name in STAGES:
        assert (finished.folder / "stages" / f"{name}.json").is_file()
        assert timings[name].wall_seconds > 0
    speed = read_record(finished.folder / "followup" / "responses.timing.json", RespondTiming)
    assert speed.rows == 14 and speed.rows_per_second > 0
    assert finished.exit_code == ExitCode.OK


def test_the_package_holds_the_records_and_no_weights(finished: RunResult) -> None:
    with tarfile.open(finished.folder / "package" / "validation_results.tar.gz") as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "followup" in name}
    assert names == {
        "followup/responses/responses.json",
        "followup/draft/lorasmith_draft.json",
        "followup/speculation.json",
        "followup/compressed/compressed-tensors/lorasmith_compress.json",
    }


@pytest.mark.parametrize(
    "name",
    ["responses/responses.jsonl", "draft/model.safetensors", "speculation.json",
     "compressed/compressed-tensors/model.safetensors"],
)  # fmt: skip
def test_verify_finds_a_flipped_bit(finished: RunResult, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    assert verify(run) == []
    content = bytearray((run / "followup" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (run / "followup" / name).write_bytes(content)
    assert any(name in finding.message for finding in verify(run))


def test_a_finished_run_does_nothing_again_and_a_change_redoes_what_follows(
    finished: RunResult, inputs: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    log = Log()
    lorasmith.run(**inputs, followup=ASKED, output=run, watcher=log)
    assert log.ran == []
    fewer = {**ASKED, "draft": {**ASKED["draft"], "epochs": 1.0}}
    lorasmith.run(**inputs, followup=fewer, output=run, watcher=log)
    assert log.ran == ["draft", "speculate", "package"]


def test_steps_that_are_not_asked_for_any_more_are_gone(
    finished: RunResult, inputs: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    respond = {"respond": ASKED["respond"]}
    result = lorasmith.run(**inputs, followup=respond, output=run)
    assert result.followup is not None and result.followup.draft is None
    assert lorasmith.run(**inputs, output=run).followup is None
    assert contents(run) == contents(lorasmith.run(**inputs, output=tmp_path / "fresh").folder)
