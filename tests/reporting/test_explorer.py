"""What the explorer leaves out when there is too much, and that it says so."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lorasmith.reporting import explorer
from tests.reporting.test_page import render
from tests.samples import sample_examples, sample_run


def test_small_runs_lose_nothing(tmp_path: Path) -> None:
    page = render(sample_run(tmp_path / "run"))
    assert "To keep this page light" not in page.sections["examples"]


@pytest.mark.parametrize(("budget", "tokens"), [(9_000, False), (4_000, False)])
def test_large_runs_lose_token_losses_first_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, tokens: bool
) -> None:
    monkeypatch.setattr(explorer, "BUDGET", budget)
    page = render(sample_run(tmp_path / "run", count=60))
    shown = [detail for detail in page.details() if not detail.get("redacted")]
    assert "losses of single tokens are left out" in page.sections["examples"]
    assert all(("pieces" in detail) == tokens for detail in shown)
    assert all(detail["prompt"] and detail["response"] for detail in shown)


def test_long_texts_are_cut_with_their_rest_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sample_examples(6)
    chance = random.Random(0)
    long = "".join(chance.choice("abcdefghijklmnop") for _ in range(20_000))
    rows[0] = rows[0].model_copy(update={"prompt": long})
    run = sample_run(tmp_path / "run", rows=rows)
    monkeypatch.setattr(explorer, "BUDGET", 8_000)
    page = render(run)
    first = page.details()[0]
    assert first["prompt"].endswith("more characters)")
    assert rows[0].prompt.startswith(first["prompt"].split(" … (")[0])
    assert "texts are cut after" in page.sections["examples"]
