"""Responses for a whole file: those of generate, in the rows' order, each row once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from lorasmith.cli.main import run
from lorasmith.data.rows import Reading, iterate_rows, read_examples
from lorasmith.errors import DataError
from lorasmith.followup.responses.respond import respond
from lorasmith.followup.responses.rows import read_prompts
from lorasmith.options import RespondOptions
from tests.followup.responding import COUNT, SHORT, Scripted, plain, read, scripted, write
from tests.tiny import load_model, tiny_rows
from tests.typed import Typed


def test_responses_are_those_of_generate_in_the_rows_order_without_prompt_tails(
    answering: Path, tmp_path: Path
) -> None:
    record = respond(answering / "base", answering / "data.jsonl", tmp_path / "r.jsonl", options=SHORT)
    rows = read(tmp_path / "r.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in tiny_rows(COUNT)]
    for row, given in zip(rows, tiny_rows(COUNT), strict=True):
        assert row["input"] == given
        assert row["metadata"] == given["metadata"]
        assert row["response"] == plain(answering, given["prompt"])
    assert record.rows == COUNT == sum(record.finish.values())
    assert record.response_tokens == sum(row["response_tokens"] for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.jsonl", "r.timing.json"]
    assert len(read_examples(tmp_path / "r.jsonl")) == COUNT  # a test set or training file again


def test_an_adapter_answers_as_peft_does(answering: Path, tmp_path: Path) -> None:
    respond(
        answering / "base", answering / "data.jsonl", tmp_path / "r.jsonl",
        adapter=answering / "adapter", max_new_tokens=12, limit=3,
    )  # fmt: skip
    for row in read(tmp_path / "r.jsonl"):
        assert row["response"] == plain(answering, row["prompt"], adapter=True)


def test_top_log_probabilities_lie_beside_the_responses(answering: Path, tmp_path: Path) -> None:
    options = RespondOptions(max_new_tokens=12, batch_size=4, top_logprobs=3)
    respond(answering / "base", answering / "data.jsonl", tmp_path / "r.jsonl", options=options)
    table = pq.read_table(tmp_path / "r.logprobs.parquet").to_pylist()
    model = load_model(answering / "base")
    assert [row["key"] for row in table] == [row["key"] for row in read(tmp_path / "r.jsonl")]
    for row, said in zip(table, read(tmp_path / "r.jsonl"), strict=True):
        assert len(row["tokens"]) == said["response_tokens"] + (said["finish_reason"] == "stop")
        with torch.no_grad():
            logits = model(torch.tensor([row["prompt"] + row["tokens"]])).logits[
                0, len(row["prompt"]) - 1 : -1
            ]
        best = logits.log_softmax(-1).topk(3)
        assert row["top_tokens"] == best.indices.tolist()
        # float32 forwards in another order of summation differ by less than 1e-5 nats here
        assert torch.tensor(row["top_logprobs"]).allclose(best.values, atol=1e-4)


def test_a_finished_output_is_not_made_again_and_takes_new_rows(answering: Path, tmp_path: Path) -> None:
    scripted(answering, tmp_path, Scripted())
    before = (tmp_path / "r.jsonl").read_bytes()
    again = Scripted()
    scripted(answering, tmp_path, again)
    assert again.asked == []
    assert (tmp_path / "r.jsonl").read_bytes() == before
    longer = write(tmp_path / "more.jsonl", [*tiny_rows(COUNT), {"prompt": "one more"}])
    scripted(answering, tmp_path, again, data=longer)
    assert again.asked == [COUNT]
    assert len(read(tmp_path / "r.jsonl")) == COUNT + 1
    record = scripted(answering, tmp_path, again)  # the shorter file once more: nothing is thrown away
    assert len(read(tmp_path / "r.jsonl")) == COUNT + 1
    assert [finding.code for finding in record.findings] == ["rows-not-in-data"]


def test_equal_rows_are_answered_each(answering: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": "the same"}] * 3)
    record = scripted(answering, tmp_path, Scripted(), data=data)
    assert record.rows == 3
    assert len({row["key"] for row in read(tmp_path / "r.jsonl")}) == 3


def test_rows_without_a_prompt_are_told_and_the_others_answered(answering: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": "good"}, {"prompt": " "}, {"text": "x"}, {"prompt": 3}])
    record = scripted(answering, tmp_path, Scripted(), data=data)
    assert (record.rows, record.failed) == (1, 3)
    reasons = [row["error"] for row in read(tmp_path / "r.failed.jsonl")]
    assert reasons == [
        "the field 'prompt' is empty",
        "raw text asks nothing that could be answered",
        "the field 'prompt' is not text",
    ]
    mended = write(tmp_path / "d.jsonl", [{"prompt": "good"}, {"prompt": "better"}])
    record = scripted(answering, tmp_path, Scripted(), data=mended)
    assert (record.rows, record.failed) == (2, 0)
    nothing = write(tmp_path / "n.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(DataError, match="none of the 3 rows has a prompt") as raised:
        read_prompts(nothing)
    assert "messages" in str(raised.value) and "--columns" in str(raised.value)
    with pytest.raises(DataError, match="no rows"):
        read_prompts(write(tmp_path / "e.jsonl", []))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "response": "b"}, [("user", "a")]),
        ({"question": "a", "answer": "b"}, [("user", "a")]),
        ({"instruction": "a", "input": "b", "output": "c"}, [("user", "a\n\nb")]),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
            [("system", "s"), ("user", "u")],
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            [("user", "u")],
        ),
        ({"prompt": [{"role": "user", "content": "u"}]}, [("user", "u")]),
    ],
    ids=["prompt", "question", "alpaca", "messages", "sharegpt", "prompt as messages"],
)
def test_the_shapes_of_training_files_are_read(
    tmp_path: Path, row: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    (read,) = iterate_rows(write(tmp_path / "row.jsonl", [row]), Reading(answered=False))
    assert read.example is not None, read.fault
    assert [(turn.role, turn.content) for turn in read.example.messages] == expected


def test_the_command_as_typed(answering: Path, tmp_path: Path, here: Typed) -> None:
    command = ["respond", "--model", str(answering / "base")]
    command += ["--data", str(answering / "data.jsonl"), "--output", str(tmp_path / "r.jsonl")]
    command += ["--max-new-tokens", "5", "--price-per-hour", "2.5"]
    done = here(*command)
    assert done.returncode == 0, done.stderr
    assert f"Responses: {COUNT}" in done.stdout
    assert "rows/s" in done.stderr and "cost" in done.stderr
    assert "cut off at 5 tokens" in done.stderr
    assert json.loads((tmp_path / "r.timing.json").read_text())["cost"] > 0


def test_failed_rows_are_named_by_their_file(
    answering: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "data.jsonl", [*tiny_rows(2), {"nothing": 1}])
    command = ["respond", "--model", str(answering / "base"), "--data", str(tmp_path / "data.jsonl")]
    assert run([*command, "--output", str(tmp_path / "r.jsonl"), "--max-new-tokens", "3"]) == 1
    assert f"they lie in {tmp_path / 'r.failed.jsonl'}" in capfd.readouterr().out
