"""What comes after the release, as steps of a run: folder, package, resume, kills, and what is refused."""

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
from lorasmith.errors import CheckpointError, ExitCode, InputError, UsageError
from lorasmith.files.atomic import read_record
from lorasmith.files.jsonl import write_rows
from lorasmith.followup.drafts.layers import spread_layers
from lorasmith.packaging.verify import verify
from lorasmith.progress import silent
from lorasmith.records.base import Finding
from lorasmith.records.followup import RespondRecord, RespondTiming
from lorasmith.runs.config import load_config, to_toml
from lorasmith.runs.results import RunResult, judge_run
from lorasmith.runs.stages import read_timings
from tests.campaigns.kills import contents
from tests.tiny import save_adapter, save_base, tiny_rows

ASKED: dict[str, Any] = {
    "respond": {"max_new_tokens": 12, "top_logprobs": 4},
    "draft": {"layers": "1", "epochs": 2.0, "batch_size": 4, "validate_every": 2, "learning_rate": 0.003},
    "speculate": {"draft_tokens": (2,), "max_new_tokens": 8, "limit": 3},
    "compress": {"limit": 4, "max_perplexity_ratio": 100.0, "max_mean_kl": 100.0, "min_top1": 0.0},
}
STAGES = ["respond", "draft", "speculate", "compress-compressed-tensors-rtn"]


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

    def generated(self, tokens: int) -> None: ...


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
    assert found is not None and found.responses and found.draft
    assert found.speculation and found.speculation_speed
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
    names = [result.gate.name for result in finished.judged.gates]
    after = ["every row is answered", "speculation changes no text"]
    assert names[:4] == ["weights", "independent test set", *after]
    assert judge_run(finished.folder) == finished.judged


def test_the_package_holds_the_records_and_no_weights(finished: RunResult) -> None:
    with tarfile.open(finished.folder / "package" / "validation_results.tar.gz") as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "followup" in name}
    assert names == {
        "followup/responses/responses.json",
        "followup/draft/lorasmith_draft.json",
        "followup/speculation.json",
        "followup/compressed/compressed-tensors-rtn/lorasmith_compress.json",
    }


@pytest.mark.parametrize(
    "name",
    ["responses/responses.jsonl", "draft/model.safetensors", "speculation.json",
     "compressed/compressed-tensors-rtn/model.safetensors"],
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


def test_killed_in_the_steps_after_the_release_it_ends_with_the_same_bytes() -> None:
    # In a process of its own: forking is safe only where no library has started threads.
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.followup_kills", "--kills", "3"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 killed runs continued" in done.stdout


def test_a_limit_that_cuts_rows_off_is_told_while_rows_are_answered(
    inputs: dict[str, Any], finished: RunResult, tmp_path: Path
) -> None:
    run, log = Path(shutil.copytree(finished.folder, tmp_path / "run")), Log()
    lorasmith.run(**inputs, followup={"respond": {"max_new_tokens": 1}}, output=run, watcher=log)
    told = next(one for one in log.told if isinstance(one, Finding))
    assert told.code == "cut-off" and "--max-new-tokens" in (told.remedy or "")
    # Told before the record that the step leaves, not after it.
    assert log.told.index(told) < next(n for n, one in enumerate(log.told) if isinstance(one, RespondRecord))


def test_rows_that_failed_are_tried_once_more_and_are_an_answer_of_no(
    inputs: dict[str, Any], finished: RunResult, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    write_rows(tmp_path / "rows.jsonl", [*tiny_rows(3), {"nothing": 1}])
    respond = {"data": tmp_path / "rows.jsonl", "max_new_tokens": 4}
    result = lorasmith.run(**inputs, followup={"respond": respond}, output=run)
    assert result.followup is not None and result.followup.responses is not None
    assert (result.followup.responses.rows, result.followup.responses.failed) == (3, 1)
    failed = [one.gate.name for one in judge_run(result.folder).gates if one.verdict != "pass"]
    assert failed == ["every row is answered"]
    assert "every row is answered" in (result.folder / "report.html").read_text()
    assert (run / "followup" / "responses" / "responses.failed.jsonl").is_file()
    assert result.exit_code == ExitCode.ANSWER_IS_NO


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"draft": {}}, "learns from responses"),
    ({"respond": {"data": "absent.jsonl"}}, r"followup\.respond\.data does not exist"),
    ({"respond": {}, "draft": {"layers": "0,7"}}, "there is no layer 7"),
    ({"respond": {}, "draft": {"layers": "1,0"}}, "do not rise"),
    ({"respond": {}, "draft": {"layers": "0", "from_model": "x"}}, "as a model or as layers"),
    ({"respond": {}, "draft": {"kl_weight": -1.0}}, r"followup\.draft\.kl_weight is -1"),
    ({"speculate": {"draft_tokens": (0,)}}, r"followup\.speculate\.draft_tokens\.0 is 0"),
    ({"compress": {"format": ("gguf:q9",)}}, r"followup\.compress\.format\.0 is 'gguf:q9'"),
    ({"compress": {"format": ("gguf:q8_0", "gguf:q8_0")}}, "more than once"),
    ({"compress": {"target_size": "5 bananas"}}, "is not a size"),
    ({"compress": {"target_size": "2kB"}}, "the limit is 2.0 kB"),
    ({"compress": {"max_q99_kl": -1.0}}, r"max_q99_kl is -1"),
    ({"compress": {"group_size": 48}}, "no group of 48"),
    ({"respond": {"max_new_tokens": 0}}, "followup.respond.max"),
    ({"respond": {"max_tokens": 9}}, "there is no option 'followup.respond.max_tokens'"),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_is_refused_before_anything_is_written(
    inputs: dict[str, Any], tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises((UsageError, InputError), match=message):
        lorasmith.run(**inputs, followup=asked, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_base_with_another_tokenizer_is_refused_before_hours_are_spent(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    other = save_base(tmp_path / "other", chat=False)
    names = json.loads((other / "tokenizer.json").read_text())
    vocabulary = names["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(names))
    with pytest.raises(CheckpointError, match="tokenizer is not the target's"):
        lorasmith.run(
            **inputs, followup={"respond": {}, "draft": {"from_model": other}}, output=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_responses_need_rows(inputs: dict[str, Any], tmp_path: Path) -> None:
    asked = {**inputs, "train": ()}
    with pytest.raises(UsageError, match="no rows to answer"):
        lorasmith.run(**asked, followup={"respond": {}}, output=tmp_path / "run")
    with pytest.raises(UsageError, match="calibrated compression needs rows"):
        lorasmith.run(**asked, followup={"compress": {"method": "calibrated"}}, output=tmp_path / "run")


def test_a_config_file_names_the_steps_and_a_flag_adds_to_them(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    places = "".join(f'{name} = "{inputs[name]}"\n' for name in ("base", "adapter", "test_set"))
    file.write_text(
        f'{places}output = "run"\n[followup.respond]\ndata = "rows.jsonl"\n[followup.draft]\nlayers = "0-1"\n'
    )
    config = load_config(file, {})
    assert config.followup is not None and config.followup.named == ("respond", "draft")
    assert config.followup.respond is not None
    assert config.followup.respond.data == tmp_path / "rows.jsonl"  # relative to the file
    more = load_config(file, {"followup": "speculate, respond"}).followup
    assert more is not None and more.named == ("respond", "draft", "speculate")
    assert more.draft is not None and more.draft.layers == "0-1"
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "again.toml", {}).followup == config.followup
    with pytest.raises(UsageError, match="--followup is 'chat'"):
        load_config(file, {"followup": "chat"})


def test_the_command_as_typed(inputs: dict[str, Any], finished: RunResult, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    done = subprocess.run(
        [
            sys.executable, "-m", "lorasmith.cli.main", "run",
            "--base", inputs["base"], "--adapter", inputs["adapter"], "--test-set", inputs["test_set"],
            "--train", inputs["train"][0], "--rounding", "nearest",
            "--config", _config(tmp_path), "--output", run,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for told in ("Train a draft model", "After the release:", "Responses:   14", "Speculation: ", "top-1"):
        assert told in done.stdout, done.stdout


def _config(folder: Path) -> Path:
    import tomli_w

    (folder / "run.toml").write_text(tomli_w.dumps({"gate_defaults": "none", "followup": ASKED}))
    return folder / "run.toml"


@pytest.mark.parametrize(
    ("total", "kept"), [(1, [0]), (4, [3]), (8, [0, 7]), (30, [0, 5, 10, 14, 19, 24, 29])]
)
def test_a_quarter_of_the_layers_is_kept_by_default(total: int, kept: list[int]) -> None:
    found = spread_layers(total)
    assert found[-1] == total - 1 and len(found) == max(1, total // 4)
    assert len(found) == 1 or found[0] == 0
    assert all(abs(a - b) <= 1 for a, b in zip(found, kept, strict=True))
