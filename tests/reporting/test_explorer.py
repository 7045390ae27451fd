"""What the explorer leaves out when there is too much, and that it says so."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorasmith.errors import InputError
from lorasmith.reporting import explorer
from lorasmith.reporting.page import write_report
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


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def other_bytes(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4:404] = bytes(400)
    file.write_bytes(bytes(content))


def without_losses(file: Path) -> None:
    pq.write_table(pq.read_table(file).drop_columns(["loss"]), file)


def text_for_losses(file: Path) -> None:
    table = pq.read_table(file)
    place = table.column_names.index("loss")
    pq.write_table(table.set_column(place, "loss", pa.array(["x"] * len(table))), file)


def one_loss_too_few(file: Path) -> None:
    table = pq.read_table(file)
    place = table.column_names.index("logprobs")
    fewer = pa.array([row[1:] for row in table["logprobs"].to_pylist()], pa.list_(pa.float32()))
    pq.write_table(table.set_column(place, "logprobs", fewer), file)


def not_a_number(file: Path) -> None:
    table = pq.read_table(file)
    place = table.column_names.index("loss")
    pq.write_table(table.set_column(place, "loss", pa.array([float("nan")] * len(table))), file)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        other_bytes,
        without_losses,
        text_for_losses,
        one_loss_too_few,
        not_a_number,
        lambda file: file.write_bytes(b""),
    ],
    ids=["cut", "other bytes", "no losses", "text", "too few", "not a number", "empty"],
)
def test_a_damaged_table_is_one_message(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    run = sample_run(tmp_path / "run", count=20)
    file = run / "validation" / "adapter.parquet"
    damage(file)
    with pytest.raises(InputError) as raised:
        write_report(run, tmp_path / "report.html")
    assert raised.value.where == str(file) and raised.value.remedy
    assert not (tmp_path / "report.html").exists()
