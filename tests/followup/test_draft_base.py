"""What a draft begins as: layers of the target, or a base whose tokenizer and vocabulary must agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorasmith.errors import CheckpointError, UsageError
from lorasmith.followup.drafts.draft import train_draft
from lorasmith.followup.drafts.layers import parse_layers
from lorasmith.followup.drafts.start import match_vocabulary
from tests.followup.drafting import SETTINGS
from tests.tiny import save_base, tiny_model


def test_a_kept_layer_is_the_targets(drafted: Path) -> None:
    """All layers kept and nothing trained is the target itself."""
    from lorasmith.followup.drafts.start import cut_from_target

    ids = torch.tensor([[5, 6, 7, 8]])
    target = AutoModelForCausalLM.from_pretrained(drafted / "target")
    with torch.no_grad():
        whole = cut_from_target(drafted / "target", [0, 1, 2, 3], torch.device("cpu")).model(ids).logits
        assert torch.equal(whole, target(ids).logits)
        last = cut_from_target(drafted / "target", [2], torch.device("cpu")).model
    wanted = target.state_dict()["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(last.state_dict()["model.layers.0.mlp.up_proj.weight"], wanted)


def test_another_base_is_padded_to_the_targets_vocabulary(drafted: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "small", vocab_size=280, num_hidden_layers=1, hidden_size=16, dtype=torch.float32)
    settings = SETTINGS.model_copy(update={"epochs": 1})
    record = train_draft(
        drafted / "target",
        drafted / "responses.jsonl",
        tmp_path / "d",
        from_model=tmp_path / "small",
        options=settings,
    )
    assert (record.padded_rows, record.vocabulary) == (20, 300)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 300
    assert model.get_output_embeddings().weight.shape[0] == 300


def test_new_rows_are_never_the_likeliest() -> None:
    model = tiny_model(vocab_size=280)
    used = 275
    match_vocabulary(model, 300, used)
    ids = torch.arange(5, 200)[None]
    with torch.no_grad():
        logits = model(ids).logits[0]
    # They are copies of row 279, which is unused: equal to it, so never above it.
    assert torch.allclose(logits[:, 280:], logits[:, 279:280].expand(-1, 20), atol=1e-5)
    assert match_vocabulary(model, 290, used) == -10
    with pytest.raises(CheckpointError, match="its tokenizer 275 tokens"):
        match_vocabulary(model, 270, used)


def test_another_tokenizer_is_refused(drafted: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "other", dtype=torch.float32)
    path = tmp_path / "other" / "tokenizer.json"
    body = json.loads(path.read_text())
    vocabulary = body["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="is not the target's") as caught:
        train_draft(
            drafted / "target", drafted / "responses.jsonl", tmp_path / "d", from_model=tmp_path / "other"
        )
    assert "--from-target" in str(caught.value)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("text", ["", "a", "3,1", "1,1", "1,,2", "4-2", "-1"])
def test_nonsense_layers(text: str) -> None:
    with pytest.raises(UsageError):
        parse_layers(text)


def test_layers() -> None:
    assert parse_layers("0,2,4-6, 9") == [0, 2, 4, 5, 6, 9]


def test_layers_that_do_not_exist(drafted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no layer 7") as caught:
        train_draft(drafted / "target", drafted / "responses.jsonl", tmp_path / "d", layers=[0, 7])
    assert "layers 0 to 3" in str(caught.value)
    # Told before the responses are read: those may take minutes.
    with pytest.raises(UsageError, match="no layer 7"):
        train_draft(drafted / "target", tmp_path / "absent.jsonl", tmp_path / "d", layers=[7])
