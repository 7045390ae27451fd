"""Which rows keep their text to themselves, whatever the person called their source."""

from __future__ import annotations

import pytest

from lorasmith.records.release import is_redacted


@pytest.mark.parametrize(
    "source", ["GPQA", "gpqa_diamond", "Idavidrein/gpqa", "my_GPQA rows", "hf-gpqa-main"]
)
def test_a_source_that_names_gpqa_is_redacted(source: str) -> None:
    assert is_redacted(source)


@pytest.mark.parametrize("source", ["MMLU", "HumanEval", "graduate qa", "", "GP QA"])
def test_other_sources_show_their_rows(source: str) -> None:
    assert not is_redacted(source)
