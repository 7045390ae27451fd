"""Groups that a kill does not tear: stored log-probabilities are the same bytes after it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.followup.responses import work
from lorasmith.followup.responses.respond import respond
from lorasmith.models.generation.decoding import GeneratedAnswer, Request
from lorasmith.options import RespondOptions
from tests.followup.responding import COUNT, Scripted, kill_after, read, write
from tests.tiny import save_base, tiny_rows

GROUP = 6
CHOSEN: dict[str, Any] = {"max_new_tokens": 12, "batch_size": 4, "top_logprobs": 3, "whole_groups": True}
OPTIONS = RespondOptions(**CHOSEN)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    save_base(folder / "base", dtype=torch.float32)
    write(folder / "data.jsonl", tiny_rows(COUNT))
    return folder


def test_killed_in_the_second_group_every_file_has_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "GROUP_ROWS", GROUP)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        respond(place / "base", place / "data.jsonl", tmp_path / "whole" / "r.jsonl", options=OPTIONS)
        killed = tmp_path / "killed" / "r.jsonl"
        kill_after(place, killed, GROUP + 3, GROUP, **CHOSEN)
        respond(place / "base", place / "data.jsonl", killed, options=OPTIONS)
    finally:
        torch.set_num_threads(threads)
    for name in ("r.jsonl", "r.json", "r.logprobs.parquet"):
        assert (killed.parent / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


class Likely(Scripted):
    """Scripted answers with a likeliest token at each place."""

    def answers(self, requests: Iterable[Request], *args: Any) -> Iterator[GeneratedAnswer]:
        for answer in super().answers(requests, *args):
            count = len(answer.tokens) + (answer.end is not None)
            answer.logprobs.extend([-0.5] * count)
            answer.top.extend([([7], [-0.5])] * count)
            yield answer


@pytest.mark.parametrize(("after", "again"), [(0, 0), (4, 4), (GROUP, 0), (GROUP + 2, 2), (COUNT - 1, 1)])
def test_only_the_group_under_way_is_answered_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, again: int
) -> None:
    monkeypatch.setattr(work, "GROUP_ROWS", GROUP)
    first, second = Likely(break_after=after), Likely()
    options = RespondOptions(max_new_tokens=12, top_logprobs=1, whole_groups=True)
    with pytest.raises(RuntimeError, match="broken off"):
        respond(place / "base", place / "data.jsonl", tmp_path / "r.jsonl", options=options, loaded=first)
    respond(place / "base", place / "data.jsonl", tmp_path / "r.jsonl", options=options, loaded=second)
    assert len(first.asked[:after]) + len(second.asked) == COUNT + again
    assert len(read(tmp_path / "r.jsonl")) == COUNT


def test_rows_that_fail_do_not_hold_their_group_back(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "GROUP_ROWS", GROUP)
    options = RespondOptions(max_new_tokens=12, top_logprobs=1, whole_groups=True)
    data = write(tmp_path / "data.jsonl", [*tiny_rows(COUNT), {"nothing": 1}])
    record = respond(place / "base", data, tmp_path / "r.jsonl", options=options, loaded=Likely(fails={2}))
    assert (record.rows, record.failed) == (COUNT - 1, 2)
    idle = Likely()
    respond(place / "base", data, tmp_path / "r.jsonl", options=options, loaded=idle)
    assert idle.asked == []
    failed = [json.loads(line)["error"] for line in (tmp_path / "r.failed.jsonl").read_text().splitlines()]
    assert failed == ["the device gave up", "the row has no prompt and response: its fields are nothing"]
