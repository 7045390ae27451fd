"""A run on conversations: they are scored, shown, packed and hidden as such."""

from __future__ import annotations

import base64
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest

import lorasmith
from lorasmith.data.rows import read_examples
from lorasmith.files.jsonl import write_examples
from lorasmith.packaging.unpack import rejoin, unpack
from lorasmith.reporting.explorer import build_explorer
from lorasmith.reporting.page import report_records
from lorasmith.runs.results import RunResult
from tests.tiny import save_adapter, save_base

TOOL = {"type": "function", "function": {"name": "weather", "description": "tooltext"}}
WORDS = ["the cat", "a mat", "in rain", "over there"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("conversations")
    base = save_base(folder / "base", max_position_embeddings=512)
    adapter = save_adapter(folder / "adapter", base)
    rows = [
        {
            "id": f"row {n}",
            "messages": [
                {"role": "system", "content": "systemtext"},
                {"role": "user", "content": f"{WORDS[n % 4]} firstquestion"},
                {"role": "assistant", "content": "firstanswer"},
                {"role": "user", "content": WORDS[(n + 1) % 4]},
                {"role": "assistant", "content": "lastanswer"},
            ],
            "tools": [TOOL],
            "metadata": {"source": "GPQA" if n % 2 else "mine"},
        }
        for n in range(6)
    ]
    test_set = folder / "test.jsonl"
    test_set.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lorasmith.run(
        base=base, adapter=adapter, test_set=test_set, output=folder / "run", loss_on="assistant"
    )


def test_each_turn_has_its_loss_in_every_record_and_on_the_page(result: RunResult) -> None:
    for validation in (result.base, result.adapter, result.merged):
        assert {name: group.examples for name, group in validation.groups["turn"].items()} == {"1": 6, "2": 6}
    assert "By turn" in (result.folder / "report.html").read_text()


def test_the_page_shows_the_turns_by_their_roles_and_none_of_a_hidden_row(result: RunResult) -> None:
    explorer = build_explorer(report_records(result.folder, timings=True))
    assert explorer is not None
    details: list[dict[str, Any]] = []
    for chunk in explorer.chunks:
        details += json.loads(zlib.decompress(base64.b64decode(chunk), -zlib.MAX_WBITS))
    assert [bool(detail.get("redacted")) for detail in details] == [False, True] * 3
    assert details[1] == {"redacted": True}
    shown = details[0]["prompt"]
    assert "tooltext" in shown
    assert "system: systemtext\n\nuser: the cat firstquestion\n\nassistant: firstanswer" in shown
    assert details[0]["response"] == "lastanswer"
    # All that was scored: both answers, each with the end of its turn.
    assert "".join(details[0]["pieces"]) == "firstanswer<|end|>lastanswer<|end|>"


def test_a_package_holds_no_word_of_a_hidden_conversation_and_gets_it_back(
    result: RunResult, tmp_path: Path
) -> None:
    unpack([result.folder / "package"], tmp_path / "out")
    packed = (tmp_path / "out" / "validation_results" / "testset" / "test_set.jsonl").read_text().splitlines()
    for number, line in enumerate(packed):
        words = ("systemtext", "firstquestion", "firstanswer", "lastanswer", "tooltext")
        assert [word in line for word in words] == [number % 2 == 0] * len(words)
    whole = read_examples(result.folder / "testset" / "test_set.jsonl")
    hidden = [row for row in whole if row.metadata.source == "GPQA"]
    write_examples(tmp_path / "whole.jsonl", rejoin(tmp_path / "out", hidden))
    assert (tmp_path / "whole.jsonl").read_bytes() == (
        result.folder / "testset" / "test_set.jsonl"
    ).read_bytes()
    with tarfile.open(result.folder / "package" / "merged_model.tar.gz") as archive:
        assert any(name.endswith("README.md") for name in archive.getnames())
