"""What the steps after the release would take: by hand, from a real folder; refused on a full disk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lorasmith.checkpoint.model import open_checkpoint
from lorasmith.errors import DiskError
from lorasmith.files.jsonl import write_rows
from lorasmith.followup.compression.sizes import plan_compression
from lorasmith.machine import resources
from lorasmith.options import RunOptions
from lorasmith.preflight.doctor import examine, require_machine
from lorasmith.preflight.estimate import EFFICIENCY, LOAD_BYTES, Rates, estimate_followup, followup_disk
from lorasmith.preflight.sizes import ModelSize, model_size
from lorasmith.records.doctor import StageEstimate
from tests.tiny import save_adapter, save_base, tiny_rows

RATES = Rates(flops=1e9, write_bytes=1e9)
ASKED: dict[str, Any] = {
    "respond": {"max_new_tokens": 100, "top_logprobs": 8, "limit": 10},
    "draft": {"layers": "0,3", "epochs": 2.0},
    "speculate": {"draft_tokens": (2, 4), "max_new_tokens": 50, "limit": 5},
    "compress": {"format": ("compressed-tensors", "gguf:q8_0")},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("preflight")
    base = save_base(folder / "base", hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    save_adapter(folder / "adapter", base)
    write_rows(folder / "test.jsonl", tiny_rows(6))
    write_rows(folder / "train.jsonl", [{"prompt": "x" * 350, "response": "y"}] * 20)
    return {
        "base": base, "adapter": folder / "adapter", "test_set": folder / "test.jsonl",
        "train": (folder / "train.jsonl",), "output": folder / "run",
    }  # fmt: skip


def estimated(inputs: dict[str, Any], asked: dict[str, Any]) -> tuple[ModelSize, dict[str, StageEstimate]]:
    config: RunOptions = RunOptions.make({**inputs, "followup": asked})
    base = open_checkpoint(inputs["base"])
    size = model_size(base, None, base.total_bytes)
    return size, {stage.stage: stage for stage in estimate_followup(config, base, size, RATES)}


def test_each_step_by_hand(inputs: dict[str, Any]) -> None:
    size, found = estimated(inputs, ASKED)
    assert list(found) == [
        "respond",
        "draft",
        "speculate",
        "compress-compressed-tensors-rtn",
        "compress-q8_0-rtn",
    ]
    # 10 rows of 350 characters, 3.5 to a token, and 100 new tokens; two operations a parameter and token.
    tokens, forward = 10 * (100 + 100), 2 * (size.active + size.vocabulary * size.hidden)
    rate = EFFICIENCY * 1e9
    load = size.base_bytes / LOAD_BYTES
    # Prompts need no output head; at 1 GFLOP/s the products of 16 rows take longer than reading the weights.
    answers = (1000 * 2 * size.active + 1000 * forward) / rate
    assert found["respond"].seconds == pytest.approx(answers + load)
    # Half of the layers, embedding and head: a forward and a backward of twice its cost, twice over the rows.
    outer = size.parameters - size.active
    draft = outer + size.active // 2
    expected = 2 * tokens * 3 * (draft / size.parameters) * forward / rate
    assert found["draft"].seconds == pytest.approx(expected, rel=1e-6)
    assert found["draft"].disk_bytes == 32 * draft
    # 5 prompts of 50 tokens, greedily and in four ways.
    assert found["speculate"].seconds == pytest.approx(5 * 5 * 50 * forward / rate + load)


def test_compressed_sizes_are_those_of_the_plan(inputs: dict[str, Any]) -> None:
    _, found = estimated(inputs, {"compress": ASKED["compress"]})
    planned = {one.format: one.bytes for one in plan_compression(inputs["base"]).methods if one.format}
    for form, name in (("compressed-tensors", "compressed-tensors-rtn"), ("gguf:q8_0", "q8_0-rtn")):
        assert found[f"compress-{name}"].disk_bytes == planned[form]


def test_calibrated_steps_count_like_training(inputs: dict[str, Any]) -> None:
    asked = {"format": ("compressed-tensors",), "iterations": 10, "calibration_length": 64}
    size, plain = estimated(inputs, {"compress": asked})
    _, calibrated = estimated(inputs, {"compress": {**asked, "method": "calibrated"}})
    # Eight samples a step, forward and backward, at 1 GFLOP/s; no output head.
    expected = 10 * 8 * 64 * 3 * 2 * size.active / (EFFICIENCY * 1e9)
    (one,), (two,) = plain.values(), calibrated.values()
    assert two.seconds - one.seconds == pytest.approx(expected, rel=1e-6)


def test_the_doctor_lists_them_among_the_steps_of_the_run(inputs: dict[str, Any]) -> None:
    record = examine(RunOptions.make({**inputs, "followup": ASKED}))
    names = [stage.stage for stage in record.stages]
    assert names[-5:] == list(estimated(inputs, ASKED)[1])
    assert record.disk_bytes == sum(stage.disk_bytes for stage in record.stages)
    wrong = examine(RunOptions.make({**inputs, "followup": {"respond": {}, "draft": {"layers": "9"}}}))
    assert any(check.name == "followup" and check.state == "error" for check in wrong.checks)


def test_a_full_disk_is_told_before_the_run_and_steps_that_are_done_need_none(
    inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunOptions.make({**inputs, "followup": ASKED})
    base = open_checkpoint(inputs["base"])
    whole = followup_disk(config, base, base.total_bytes, ())
    drafted = followup_disk(config, base, base.total_bytes, {"draft"})
    assert whole - drafted == estimated(inputs, ASKED)[1]["draft"].disk_bytes
    room = 2 * base.total_bytes + whole // 2
    monkeypatch.setattr(resources.os, "statvfs", lambda place: SimpleNamespace(f_bavail=room, f_frsize=1))
    require_machine(RunOptions.make(inputs))
    with pytest.raises(DiskError):
        require_machine(config)
