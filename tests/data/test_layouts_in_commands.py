"""Every layout is read by every command that takes rows, and the table in docs/data.md says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import lorasmith
from lorasmith.data.layouts import LAYOUTS
from lorasmith.errors import DataError
from lorasmith.files.jsonl import write_rows
from lorasmith.followup.compression.quantize import calibration_samples
from lorasmith.followup.responses.rows import read_prompts
from lorasmith.merging.calibrated.rows import load_calibration
from lorasmith.options import MergeOptions, RunOptions, TrainOptions
from lorasmith.runs.pipeline import check_rows
from lorasmith.testset.check import check
from lorasmith.testset.show import show
from lorasmith.testset.split import split
from tests.tiny import save_base

ASKED, SAID = "the cat sat on a mat", "in rain then ran over there"
TALK = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
ROWS: dict[str, dict[str, Any]] = {
    "preference": {"prompt": ASKED, "chosen": SAID, "rejected": "no"},
    "messages": {"messages": TALK},
    "conversations": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
    "conversation": {"conversation": TALK},
    "prompt/completion": {"prompt": TALK[:1], "completion": TALK[1:]},
    "prompt/response": {"prompt": ASKED, "response": SAID},
    "alpaca": {"instruction": ASKED, "input": "", "output": SAID},
    "instruction/response": {"instruction": ASKED, "context": "", "response": SAID},
    "question/answer": {"question": ASKED, "answer": SAID},
    "question/response": {"question": ASKED, "response": SAID},
    "query/response": {"query": ASKED, "response": SAID},
    "query/answer": {"query": ASKED, "answer": SAID},
    "problem/solution": {"problem": ASKED, "solution": SAID},
    "text": {"text": f"{ASKED} {SAID}"},
}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


def test_the_page_and_this_test_name_every_layout() -> None:
    names = [layout.name for layout in LAYOUTS]
    assert sorted(ROWS) == sorted(names)
    page = PAGE.read_text()
    for table in ("## Layouts", "## Where they are read"):
        part = page.partition(table)[2].partition("\n## ")[0]
        rows = re.findall(r"^\| ([\w/]+) \|", part, re.M)
        assert sorted(set(rows) - {"layout"}) == sorted(names), table


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_a_layout_is_read_by_every_command(layout: str, base: Path, tmp_path: Path) -> None:
    row = ROWS[layout]
    rows = write(tmp_path / "rows.jsonl", row)
    other = write(tmp_path / "other.jsonl", {"prompt": "a cat", "response": "a mat"})
    assert show(rows).layouts == {layout: 2}
    split(rows, tmp_path / "held_out.jsonl", size=1)
    assert check(other, [rows], None).counts["test_rows"] == 0
    assert check(rows, [rows], None).counts["test_rows"] == 2
    losses = {
        "validate": lorasmith.validate(base, rows, tmp_path / "v").overall.tokens,
        "show": getattr(show(rows, model=base).tokens, "scored", None),
    }
    assert losses["validate"] == losses["show"] > 0
    calibrated = load_calibration(
        (rows,), base, (), budget=1_000, test_set=None, leave_out=False, wording=MergeOptions(), seed=0
    )
    assert calibrated.use.rows == 2
    assert len(calibration_samples(base, rows, 2, 64))
    asked = RunOptions(base=base, adapter=base, test_set=rows, train=(rows,), output=tmp_path / "run")
    check_rows(asked)
    if layout == "text":
        with pytest.raises(DataError, match="asks nothing"):
            read_prompts(rows, None)
    else:
        assert [one.messages[-1]["content"] for one in read_prompts(rows, None)] == [ASKED, ASKED]


@pytest.mark.parametrize("layout", ["messages", "alpaca", "text"])
def test_a_layout_is_learnt_from(layout: str, base: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS[layout])
    lorasmith.train(base, rows, tmp_path / "adapter", options=TrainOptions(rank=2))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def write(file: Path, row: dict[str, Any]) -> Path:
    write_rows(file, [{"id": "one"} | row, {"id": "two"} | row])
    return file
