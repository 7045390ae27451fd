"""A token limit that cuts rows off is told early, with one that would not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lorasmith.followup.responses.respond import respond
from lorasmith.followup.responses.work import Length, is_loop, judge_limit, suggest_limit
from lorasmith.options import RespondOptions
from lorasmith.records.base import Finding
from tests.followup.responding import Hears, Scripted, write


def test_a_limit_that_cuts_most_rows_is_told_after_the_first_hundred(answering: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": f"question {number}"} for number in range(300)])
    told: list[tuple[int, Finding]] = []
    engine = Scripted(lambda index: 10 if index % 5 == 0 else 30)
    watcher = Hears(lambda finding: told.append((len(engine.asked), finding)))
    record = respond(
        answering / "base",
        data,
        tmp_path / "r.jsonl",
        options=RespondOptions(max_new_tokens=12),
        watcher=watcher,
        loaded=engine,
    )
    [(asked, finding)] = told
    assert asked == 100  # 200 rows before it would have been too late
    assert "cut off at 12 tokens" in finding.message
    assert "--max-new-tokens" in (finding.remedy or "")
    assert record.cut_off == pytest.approx(0.8)
    assert record.findings == [finding]


def test_the_suggested_limit_leaves_few_rows_cut() -> None:
    """Lengths with a constant hazard, the case the estimate is exact for: 1 % must be left within 1 point."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.rand(20_000, generator=generator).log() * -200).tolist()
    lengths = [Length(min(int(one), 100), one > 100, False) for one in drawn]
    suggested = suggest_limit(lengths, 100)
    assert sum(one > suggested for one in drawn) / len(drawn) < 0.02
    assert suggested < 1100
    assert judge_limit([Length(5, False, False)] * 99 + [Length(9, True, False)], 9, None) is None


@pytest.mark.parametrize(
    ("most", "advice"),
    [
        (None, r"give --max-new-tokens \d+ "),
        (80, "give --max-new-tokens 80 "),
        (64, "context leaves no larger limit"),
        (40, "context leaves no larger limit"),
    ],
)
def test_only_a_full_context_is_called_full(most: int | None, advice: str) -> None:
    lengths = [Length(20, False, False)] * 50 + [Length(64, True, False)] * 50
    finding = judge_limit(lengths, 64, most)
    assert finding is not None and re.search(advice, finding.remedy or "")


def test_rows_that_must_not_be_published_are_told_before_the_first_answer(
    answering: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"question {number}", "metadata": {"source": "GPQA-diamond"}} for number in range(3)]
    data = write(tmp_path / "d.jsonl", [*rows, {"prompt": "mine"}])
    told: list[tuple[int, Finding]] = []
    engine = Scripted()
    record = respond(
        answering / "base",
        data,
        tmp_path / "r.jsonl",
        options=RespondOptions(max_new_tokens=12),
        watcher=Hears(lambda finding: told.append((len(engine.asked), finding))),
        loaded=engine,
    )
    asked, finding = told[0]
    assert (asked, finding.code) == (0, "text-not-to-publish")
    assert "3 rows of GPQA-diamond in plain text" in finding.message
    assert finding in record.findings


def test_loops_are_not_answered_with_a_larger_limit() -> None:
    assert is_loop([1, 2, 3, 9, 8, 9, 8, 9, 8, 9, 8])
    assert not is_loop([1, 2, 3, 4, 5, 6, 7, 8])
    looping = [Length(20, False, False)] * 50 + [Length(64, True, True)] * 50
    finding = judge_limit(looping, 64, 4096)
    assert finding is not None
    assert "50 went round in a loop" in finding.message
    assert "context" not in (finding.remedy or "")  # it is not full: 64 of 4,096 tokens
    assert "--max-new-tokens" not in (finding.remedy or "")
    assert suggest_limit(looping, 64) == 64
