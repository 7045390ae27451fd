"""Mistakes in the commands after a release, as they are typed: one message each, and nothing written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lorasmith.cli.main import run
from lorasmith.files.jsonl import write_rows
from tests.followup.responding import write
from tests.tiny import save_base, tiny_rows


@pytest.fixture(scope="module")
def files(answering: Path, drafted: Path, compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the commands below name, under short names."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, place in (
        ("merged", drafted / "target"),
        ("draft", drafted / "draft"),
        ("responses.jsonl", drafted / "responses.jsonl"),
        ("responses.logprobs.parquet", drafted / "responses.logprobs.parquet"),
        ("data.jsonl", answering / "data.jsonl"),
        ("wide", compressed / "base"),
        ("int4", compressed / "int4"),
    ):
        (folder / name).symlink_to(place)
    write(folder / "no-prompts.jsonl", [{"answer": 4}, {"answer": 5}])
    (folder / "not.jsonl").write_text("prompt,response\n1,2\n")
    (folder / "empty.jsonl").write_text("")
    save_base(folder / "no-template", chat=False)
    other = save_base(folder / "other")
    body = json.loads((other / "tokenizer.json").read_text())
    words = body["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(body))
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("years of work")
    write_rows(folder / "rows.jsonl", tiny_rows(4))
    return folder


DRAFT = "draft train --target merged --responses responses.jsonl --from-target --layers 0"

MISTAKES = [
    ("respond --model merged --data absent.jsonl --output r.jsonl", "absent.jsonl"),
    ("respond --model merged --data no-prompts.jsonl --output r.jsonl", "prompt"),
    ("respond --model merged --data not.jsonl --output r.jsonl", "not.jsonl"),
    ("respond --model merged --data empty.jsonl --output r.jsonl", "empty.jsonl"),
    ("respond --model absent --data data.jsonl --output r.jsonl", "absent"),
    ("respond --model no-template --template chat --data data.jsonl --output r.jsonl", "chat template"),
    ("respond --model merged --data data.jsonl --output r.jsonl --max-new-tokens 0", "--max-new-tokens is 0"),
    ("respond --model merged --data data.jsonl --output r.jsonl --temperature -1", "temperature"),
    ("respond --model merged --data data.jsonl --output r.jsonl --engine llama", "llama"),
    ("respond --model merged --data data.jsonl --output mine", "mine"),
    ("draft train --target merged --responses absent.jsonl --from-target --layers 0 --output d", "absent"),
    ("draft train --target merged --responses responses.jsonl --from-target --layers 99 --output d", "99"),
    ("draft train --target merged --responses responses.jsonl --from-target --layers x --output d", "'x'"),
    ("draft train --target merged --responses responses.jsonl --from-target --output d", "--layers"),
    ("draft train --target merged --responses responses.jsonl --output d", "--from-model"),
    ("draft train --target merged --responses responses.jsonl --from-model other --output d", "tokenizer"),
    (
        "draft train --target merged --responses no-prompts.jsonl --from-target --layers 0 --output d",
        "no-prompts",
    ),
    (
        "draft train --target int4 --responses responses.jsonl --from-target --layers 0 --output d",
        "compressed",
    ),
    (f"{DRAFT} --output mine", "did not write"),
    (f"{DRAFT} --output merged", "lies in"),
    ("train --base merged --train data.jsonl --output mine", "did not write"),
    ("train --base merged --train data.jsonl --output merged", "lies in"),
    ("speculate --target merged --draft other --prompts data.jsonl", "tokenizer"),
    ("speculate --target merged --draft absent --prompts data.jsonl", "absent"),
    ("speculate --target merged --draft draft --prompts no-prompts.jsonl", "prompt"),
    ("speculate --target merged --draft draft --prompts data.jsonl --draft-tokens two", "two"),
    ("speculate --target merged --draft draft --prompts data.jsonl --draft-tokens 0", "--draft-tokens is 0"),
    ("compress --model wide --plan --target-size 5bananas", "'5bananas' is not a size"),
    ("compress --model wide --plan --target-size 0MB", "is not a size"),
    ("compress --model wide --target-size -1GB --output c", "is not a size"),
    ("compress --model wide", "--output"),
    ("compress --model absent --plan", "absent"),
    ("compress --model wide --format gguf:q9 --output c", "--format is 'gguf:q9'"),
    ("compress --model wide --method best --output c", "--method is 'best'"),
    ("compress --model wide --bits 3 --output c", "3 bits"),
    ("compress --model wide --group-size 48 --output c", "no group of 48 divides"),
    ("compress --model wide --method calibrated --output c", "--calibration"),
    ("compress --model wide --method calibrated --calibration absent.jsonl --output c", "absent.jsonl"),
    ("compress --model wide --test-set absent.jsonl --output c", "absent.jsonl"),
    ("compress --model wide --test-set rows.jsonl --limit 0 --output c", "--limit"),
    ("compress --model wide --output wide", "the output is, lies in"),
    ("compress --model wide --output wide/int4", "the output is, lies in"),
    ("compress --model wide --output mine", "did not write"),
    ("compress --model int4 --output c", "quantized"),
    ("chat --model absent --prompt hello", "absent"),
    ("chat --model no-template --prompt hello", "chat template"),
    ("chat --model merged --draft other --prompt hello", "tokenizer"),
    ("chat --model merged --side-by-side --prompt hello", "--side-by-side"),
]


@pytest.mark.parametrize(("typed", "said"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake_is_one_message(
    files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], typed: str, said: str
) -> None:
    monkeypatch.chdir(files)
    before = sorted(path.name for path in files.iterdir())
    assert run(typed.split()) == 2
    printed = capfd.readouterr()
    assert said in printed.err and "Traceback" not in printed.err
    assert printed.err.count("error: ") == 1
    assert sorted(path.name for path in files.iterdir()) == before
    assert (files / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "typed",
    [
        f"{DRAFT} --output d",
        "compress --model wide --output c",
    ],
)
def test_no_disk_is_told_before_the_work(
    files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], typed: str
) -> None:
    monkeypatch.chdir(files)
    state = os.statvfs(files)
    full = os.statvfs_result((state.f_bsize, state.f_frsize, state.f_blocks, 0, 0, *tuple(state)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    assert run(typed.split()) == 3
    assert "too little disk space" in capfd.readouterr().err
