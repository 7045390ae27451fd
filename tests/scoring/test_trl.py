"""The number that TRL prints: the same tokens, the same of them scored, and the loss to 1e-5.

What TRL gave lies in `trl.json`, so that these tests need no TRL. Where LORASMITH_TRL_PYTHON names an
interpreter that has it, the file is held against it anew.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import lorasmith
from lorasmith.data.rows import read_examples
from lorasmith.files.jsonl import write_rows
from lorasmith.models.chat_template import use_template
from lorasmith.models.load import load_tokenizer
from lorasmith.models.text import encode_examples
from tests.scoring.trl_cases import CASES, FILE, SIZES
from tests.tiny import save_base

MADE = json.loads(FILE.read_text())
LOSS_ON = {"completion": "response", "assistant": "assistant", "all": "all"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model", **SIZES)


def test_every_case_was_given_to_trl() -> None:
    assert sorted(MADE["cases"]) == sorted(CASES)
    assert MADE["versions"]["trl"] == "1.16.0"


@pytest.mark.parametrize("name", list(CASES))
def test_tokens_and_loss_are_those_of_trl(name: str, base: Path, tmp_path: Path) -> None:
    template, rows, loss = CASES[name]
    write_rows(tmp_path / "rows.jsonl", rows)
    given: dict[str, Any] = {"loss_on": LOSS_ON[loss], "boundary": "text"}
    tokenizer = load_tokenizer(base)
    if template is None:
        given["template"] = "plain"
    else:
        (tmp_path / "template.jinja").write_text(template)
        given["chat_template"] = tmp_path / "template.jinja"
        use_template(tokenizer, given["chat_template"])
    wanted = MADE["cases"][name]
    encoded = encode_examples(
        read_examples(tmp_path / "rows.jsonl"),
        tokenizer,
        template=given.get("template", "auto"),
        max_length=1024,
        loss_on=given["loss_on"],
        boundary="text",
    ).rows
    assert [row.ids for row in encoded] == [row["ids"] for row in wanted["rows"]]
    # The first token of a row is a label of TRL's that nothing predicts.
    scored = [[place for place in row["scored"] if place > 0] for row in wanted["rows"]]
    assert [row.scored_at for row in encoded] == scored
    found = lorasmith.validate(base, tmp_path / "rows.jsonl", tmp_path, both_boundaries=False, **given)
    # Float32, summed in another order and in padded batches there.
    assert found.overall.loss == pytest.approx(wanted["loss"], abs=1e-5)
    assert found.overall.tokens == sum(map(len, scored))


def test_the_file_is_what_trl_gives_today(tmp_path: Path) -> None:
    python = os.environ.get("LORASMITH_TRL_PYTHON")
    if python is None:
        pytest.skip("no interpreter with TRL: name one by LORASMITH_TRL_PYTHON")
    made = tmp_path / "made.json"
    subprocess.run(
        [python, "-m", "tests.scoring.trl_cases", made],
        cwd=Path(__file__).resolve().parents[2],
        check=True,
        capture_output=True,
    )
    again = json.loads(made.read_text())
    for name, case in MADE["cases"].items():
        assert again["cases"][name]["rows"] == case["rows"], name
        assert again["cases"][name]["loss"] == pytest.approx(case["loss"], abs=1e-5), name
