"""What a draft learns from: stored responses, their probabilities, and labels of difficulty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lorasmith.data.rows import read_examples
from lorasmith.errors import DataError, UsageError
from lorasmith.files.jsonl import write_rows
from lorasmith.followup.drafts.draft import train_draft
from lorasmith.followup.drafts.rows import label_rows, read_responses
from lorasmith.followup.responses.respond import respond
from lorasmith.models.text import encode_examples
from lorasmith.options import RespondOptions
from tests.followup.drafting import SETTINGS
from tests.tiny import save_base, tiny_rows, tiny_tokenizer


def test_without_stored_probabilities_it_says_so(drafted: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl"
    write_rows(plain, tiny_rows(24))
    settings = SETTINGS.model_copy(update={"epochs": 1})
    record = train_draft(drafted / "target", plain, tmp_path / "d", layers=[0], options=settings)
    assert [finding.code for finding in record.findings] == ["no-logprobs"]
    assert record.generator.kl is None and record.logprobs is None
    assert record.classifier is not None and record.classifier.labels == ["easy", "hard", "medium"]
    # The tokens are those that validation scores.
    scored = encode_examples(read_examples(plain), tiny_tokenizer(), max_length=1024).rows
    ours = read_responses(plain, tiny_tokenizer(), max_length=1024)[0]
    assert [(row.ids, row.n_prompt) for row in ours] == [(row.ids, row.n_prompt) for row in scored]
    only = settings.model_copy(update={"cross_entropy_weight": 0.0})
    with pytest.raises(UsageError, match="nothing to learn from"):
        train_draft(drafted / "target", plain, tmp_path / "e", layers=[0], options=only)


def test_what_respond_writes_is_what_is_read(drafted: Path, tmp_path: Path) -> None:
    """The extraction itself, then the draft, and a draft of another target, which is told."""
    write_rows(tmp_path / "data.jsonl", tiny_rows(8))
    output = tmp_path / "r.jsonl"
    respond(
        drafted / "target", tmp_path / "data.jsonl", output,
        options=RespondOptions(max_new_tokens=6, top_logprobs=4, device="cpu"),
    )  # fmt: skip
    rows = read_responses(output, tiny_tokenizer(), max_length=1024)[0]
    target = AutoModelForCausalLM.from_pretrained(drafted / "target")
    for row in rows:
        with torch.no_grad():
            logprobs = target(torch.tensor([row.ids])).logits[0, row.n_prompt - 1 : -1].log_softmax(-1)
        assert row.top_logprobs is not None and row.top_ids is not None
        assert torch.allclose(torch.from_numpy(row.top_logprobs), logprobs.topk(4).values, atol=1e-4)
        assert row.top_ids[:, 0].tolist() == row.ids[row.n_prompt :]  # greedy: the likeliest is what was said
    settings = SETTINGS.model_copy(update={"epochs": 1})
    record = train_draft(drafted / "target", output, tmp_path / "d", layers=[0, 3], options=settings)
    assert record.findings == [] and record.generator.agreement is not None
    save_base(tmp_path / "other", seed=9, dtype=torch.float32)
    told = train_draft(tmp_path / "other", output, tmp_path / "e", layers=[0], options=settings)
    assert [finding.code for finding in told.findings] == ["other-target"]


def test_rows_that_are_cut_or_left_out_are_told(drafted: Path) -> None:
    rows, told = read_responses(drafted / "responses.jsonl", tiny_tokenizer(), max_length=40)
    whole = read_responses(drafted / "responses.jsonl", tiny_tokenizer(), max_length=1024)[0]
    left_out = sum(row.n_prompt >= 40 for row in whole)
    cut = sum(row.n_prompt < 40 < len(row.ids) for row in whole)
    assert left_out > 0 and len(rows) == 60 - left_out and all(len(row.ids) <= 40 for row in rows)
    assert any(finding.message.startswith(f"{left_out} rows were left out") for finding in told)
    assert any(finding.message.startswith(f"{cut} of {len(rows)}") for finding in told) == (cut > 0)


def test_responses_that_cannot_be_used(drafted: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "two.jsonl", [{"prompt": "a", "response": "b"}] * 2)
    with pytest.raises(DataError, match="2 usable responses"):
        train_draft(drafted / "target", tmp_path / "two.jsonl", tmp_path / "d", layers=[0])
    write_rows(tmp_path / "none.jsonl", [{"text": "a"}] * 5)
    with pytest.raises(DataError, match=r"none\.jsonl:1"):
        train_draft(drafted / "target", tmp_path / "none.jsonl", tmp_path / "d", layers=[0])


def test_labels_from_the_targets_confidence(drafted: Path) -> None:
    rows = read_responses(drafted / "responses.jsonl", tiny_tokenizer(), max_length=1024)[0]
    labelled, names, source = label_rows(rows, range(40), "confidence")
    assert (names, source) == (["easy", "hard"], "confidence")
    middle = np.median([row.confidence for row in rows[:40]])
    assert all((row.confidence < middle) == bool(row.label) for row in labelled)
