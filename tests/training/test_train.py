"""The trainer: the loss of the right tokens, the same bytes from the same inputs, a file that PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorasmith.data.rows import read_examples
from lorasmith.errors import DataError, UsageError
from lorasmith.files.digests import digest_folder
from lorasmith.files.jsonl import write_rows
from lorasmith.models.text import encode_examples
from lorasmith.options import TrainOptions
from lorasmith.scoring.validate import validate
from lorasmith.training.train import batch_loss, make_batches, train
from tests.tiny import save_base, tiny_model, tiny_rows, tiny_tokenizer

SETTINGS = TrainOptions(rank=4, alpha=8, learning_rate=2e-2, epochs=4, batch_size=4, max_length=128)
ROLES = ("user", "assistant", "user", "assistant")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a training file."""
    place = tmp_path_factory.mktemp("training")
    save_base(place / "base")
    write_rows(place / "train.jsonl", tiny_rows(24))
    return place


def test_training_lowers_the_loss_and_writes_what_peft_loads(folder: Path, tmp_path: Path) -> None:
    record = train(folder / "base", folder / "train.jsonl", tmp_path / "adapter", options=SETTINGS)
    assert record.examples == 24
    assert len(record.losses) == 24
    assert sum(record.losses[-6:]) < 0.8 * sum(record.losses[:6])
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base"), str(tmp_path / "adapter")
    )
    assert model.peft_config["default"].r == 4
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()


def test_the_same_inputs_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(folder / "base", folder / "train.jsonl", tmp_path / name, options=SETTINGS)
    assert digest_folder(tmp_path / "one") == digest_folder(tmp_path / "two")
    other = SETTINGS.model_copy(update={"seed": 7})
    train(folder / "base", folder / "train.jsonl", tmp_path / "other", options=other)
    assert digest_folder(tmp_path / "other") != digest_folder(tmp_path / "one")


def test_the_base_is_not_written_to(folder: Path, tmp_path: Path) -> None:
    before = digest_folder(folder / "base", rehash=True)
    train(folder / "base", folder / "train.jsonl", tmp_path / "adapter", options=SETTINGS)
    assert digest_folder(folder / "base", rehash=True) == before


def test_the_loss_is_that_of_the_response_tokens_in_a_plain_float64_loop(folder: Path) -> None:
    rows = encode_examples(
        read_examples(folder / "train.jsonl")[:5], tiny_tokenizer(), template="chat", max_length=128
    ).rows
    model = tiny_model()
    total, count = 0.0, 0
    reference = tiny_model().double()
    for row in rows:
        logits = reference(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for position in range(row.n_prompt, len(row.ids)):
            total -= logits[position - 1, row.ids[position]].item()
            count += 1
    loss, tokens = batch_loss(model, rows, torch.device("cpu"))
    assert tokens == count
    # Autocast computes products in bfloat16, with 8 significant bits; the mean over tokens is better.
    assert float(loss) == pytest.approx(total / count, rel=1e-2)
    assert abs(float(batch_loss(model, rows[:1], torch.device("cpu"))[0]) - total / count) > 1e-3


def test_every_row_is_used_once_an_epoch_and_batches_are_of_like_length(folder: Path) -> None:
    rows = encode_examples(
        read_examples(folder / "train.jsonl"), tiny_tokenizer(), template="chat", max_length=128
    ).rows
    batches = list(make_batches(rows, TrainOptions(epochs=2, batch_size=5)))
    for epoch in (batches[:5], batches[5:10]):
        assert sorted(id(row) for batch in epoch for row in batch) == sorted(id(row) for row in rows)
    waste = sum(max(len(row.ids) for row in batch) * len(batch) for batch in batches[:5])
    assert waste < 1.3 * sum(len(row.ids) for row in rows)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(folder / "base", folder / "train.jsonl", tmp_path / "whole", options=SETTINGS)
    monkeypatch.setattr("lorasmith.training.train._PART_TOKENS", 1)
    parts = train(folder / "base", folder / "train.jsonl", tmp_path / "parts", options=SETTINGS)
    assert parts.tokens == whole.tokens
    # The same sums in another order, in bfloat16 products, over 24 steps that build on each other.
    assert parts.losses == pytest.approx(whole.losses, rel=2e-2)


def test_the_config_is_sorted_so_that_bytes_do_not_depend_on_hash_order(folder: Path, tmp_path: Path) -> None:
    train(folder / "base", folder / "train.jsonl", tmp_path / "adapter", options=SETTINGS)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"batch_size": -1}, {"epochs": 0.0}, {"target_modules": "no_such_layer"}]
)
def test_wrong_settings_are_one_message(folder: Path, tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        train(folder / "base", folder / "train.jsonl", tmp_path / "adapter", **{**SETTINGS.values(), **wrong})
    assert not (tmp_path / "adapter").exists()


def test_a_row_without_a_response_is_named(folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "bad.jsonl", [*tiny_rows(2), {"id": "x", "prompt": "a", "response": " "}])
    with pytest.raises(DataError, match=r"bad\.jsonl:3"):
        train(folder / "base", tmp_path / "bad.jsonl", tmp_path / "adapter", options=SETTINGS)


@pytest.mark.parametrize("boundary", ["generation", "text"])
@pytest.mark.parametrize("loss_on", ["assistant", "response"])
def test_the_loss_it_prints_is_what_validate_says_of_the_same_rows(
    folder: Path, tmp_path: Path, loss_on: str, boundary: str
) -> None:
    words = ["the cat ", "sat on", "a mat"]
    rows = [
        {"messages": [{"role": role, "content": words[(n + place) % 3]} for place, role in enumerate(ROLES)]}
        for n in range(4)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    how = {"loss_on": loss_on, "boundary": boundary}
    one_step = TrainOptions(epochs=1, batch_size=4, max_length=128, **how)
    record = train(folder / "base", tmp_path / "rows.jsonl", tmp_path / "adapter", options=one_step)
    found = validate(folder / "base", tmp_path / "rows.jsonl", tmp_path / "out", **how)
    # Before its first step an adapter changes nothing; the trainer computes in bfloat16, of 8 bits.
    assert record.losses[0] == pytest.approx(found.overall.loss, rel=2**-6)
    other = "response" if loss_on == "assistant" else "assistant"
    apart = validate(folder / "base", tmp_path / "rows.jsonl", tmp_path / "other", loss_on=other)
    assert apart.overall.tokens != found.overall.tokens
