"""A base without a chat template, an adapter that was trained with one: all models are asked alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lorasmith
from lorasmith.errors import DataError
from lorasmith.files.jsonl import write_rows
from lorasmith.models.load import load_tokenizer, tokenizer_for_both
from tests.tiny import CHAT_TEMPLATE, save_adapter, save_base, tiny_rows, tiny_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", chat=False)
    adapter = save_adapter(folder / "adapter", base)
    tiny_tokenizer(chat=True).save_pretrained(adapter)
    write_rows(folder / "test.jsonl", tiny_rows(6))
    return {"base": base, "adapter": adapter, "test_set": folder / "test.jsonl"}


def test_a_run_asks_the_base_with_the_template_of_the_training(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    result = lorasmith.run(**inputs, output=tmp_path / "run")
    alone = lorasmith.validate(inputs["base"], inputs["test_set"], tmp_path / "alone")
    given = lorasmith.validate(
        inputs["base"], inputs["test_set"], tmp_path / "given", tokenizer=inputs["adapter"]
    )
    assert result.base.settings.template == result.adapter.settings.template == "chat"
    assert result.base.overall.loss == given.overall.loss != alone.overall.loss
    assert "other-tokenizer" in {finding.code for finding in result.base.findings}
    assert "other-tokenizer" not in {finding.code for finding in result.adapter.findings}


def test_a_template_beside_an_adapter_without_a_tokenizer_is_used_as_a_merge_uses_it(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", inputs["base"])
    (adapter / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    lorasmith.merge(inputs["base"], adapter, tmp_path / "merged")
    asked = load_tokenizer(inputs["base"], adapter=adapter)
    assert asked.chat_template == load_tokenizer(tmp_path / "merged").chat_template == CHAT_TEMPLATE


def test_an_adapter_with_tokens_of_its_own_is_refused_before_the_first_step(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", inputs["base"])
    grown = tiny_tokenizer(chat=True)
    grown.add_tokens(["mat"])
    grown.save_pretrained(adapter)
    with pytest.raises(DataError, match="makes others of row"):
        lorasmith.run(**inputs | {"adapter": adapter}, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_base_keeps_its_tokenizer_where_the_adapters_is_the_same_or_has_more_tokens(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    assert tokenizer_for_both(inputs["base"], inputs["adapter"]) == inputs["adapter"]
    assert tokenizer_for_both(inputs["base"], inputs["base"]) is None
    grown = tiny_tokenizer(chat=True)
    grown.add_tokens(["<more>"])
    grown.save_pretrained(tmp_path / "grown")
    assert tokenizer_for_both(inputs["base"], tmp_path / "grown") is None
