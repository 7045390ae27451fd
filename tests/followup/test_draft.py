"""The draft: it learns what the target says, and its figures are those of plain forwards."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.followup.drafts.draft import HEAD, calibration_error, report_classifier, train_draft
from lorasmith.followup.drafts.loss import Weights, batch_loss, topk_kl
from lorasmith.followup.drafts.rows import label_rows, logprobs_beside, read_responses, split_rows
from tests.followup.drafting import SETTINGS, held_out, record_of
from tests.tiny import tiny_model, tiny_tokenizer


def test_the_generator_comes_closer_to_the_target(drafted: Path) -> None:
    record = record_of(drafted / "draft")
    # What is left above the target's own entropy shrinks; below it no draft can come.
    entropy = -np.mean([row.confidence for row in held_out(drafted)])
    assert record["generator"]["loss"] - entropy < 0.75 * (record["before"]["loss"] - entropy)
    assert record["generator"]["kl"] < 0.9 * record["before"]["kl"]
    assert record["generator"]["perplexity"] == pytest.approx(math.exp(record["generator"]["loss"]))
    assert record["train_rows"] + record["validation_rows"] + record["held_out_rows"] == 60
    assert record["validations"][-1]["step"] == record["steps"] == len(record["losses"])


def test_the_folder_is_a_plain_transformers_model_and_its_loss_is_the_reported_one(drafted: Path) -> None:
    """Held-out loss again, with transformers alone in float64."""
    model = AutoModelForCausalLM.from_pretrained(drafted / "draft").double()
    tokenizer = AutoTokenizer.from_pretrained(drafted / "draft")
    assert model.config.num_hidden_layers == 2
    assert model.config.vocab_size == 300
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    total, count = 0.0, 0
    for row in held_out(drafted):
        with torch.no_grad():
            logprobs = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for at in range(row.n_prompt, len(row.ids)):
            total -= float(logprobs[at - 1, row.ids[at]])
            count += 1
    assert record_of(drafted / "draft")["generator"]["tokens"] == count
    assert record_of(drafted / "draft")["generator"]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_reported_kl_is_that_of_the_stored_probabilities_in_float64(drafted: Path) -> None:
    """Read straight from the Parquet file, with transformers alone and sums in numpy's float64."""
    model = AutoModelForCausalLM.from_pretrained(drafted / "draft").double()
    stored = pq.read_table(logprobs_beside(drafted / "responses.jsonl")).to_pylist()
    order = split_rows(60, validation=0.15, held_out=0.2, seed=42).held_out
    kl, same = [], []
    for row in (stored[at] for at in order):
        text, begin = [*row["prompt"], *row["tokens"]], len(row["prompt"])
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0, begin - 1 : -1].numpy()
        q = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        for place_, (tokens, logprobs) in enumerate(zip(row["top_tokens"], row["top_logprobs"], strict=True)):
            p, own = np.exp(np.array(logprobs, dtype=np.float64)), q[place_, tokens]
            rest_p, rest_q = 1 - p.sum(), 1 - own.sum()
            kl.append((p * np.log(p / own)).sum() + rest_p * np.log(rest_p / rest_q))
            same.append(q[place_].argmax() == tokens[0])
    found = record_of(drafted / "draft")["generator"]
    # Both sum float32 logits; the stored probabilities themselves have float32's digits.
    assert found["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert found["agreement"] == pytest.approx(np.mean(same))


def test_the_classifier_beats_the_majority_and_its_head_is_usable_alone(drafted: Path) -> None:
    found = record_of(drafted / "draft")["classifier"]
    assert found["labels"] == ["easy", "hard"] and found["labels_from"] == "data"
    assert found["accuracy"] > found["majority_accuracy"] + 0.1
    head = load_file(drafted / "draft" / f"{HEAD}.safetensors")
    config = json.loads((drafted / "draft" / f"{HEAD}.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(drafted / "draft")
    tokenizer = tiny_tokenizer()

    def predict(prompt: str) -> str:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        return str(config["labels"][int((head["weight"] @ hidden + head["bias"]).argmax())])

    assert predict("the cat") == "easy"
    assert predict("over there in rain then ran over there in rain then ran a mat") == "hard"


def test_training_stops_when_validation_gets_no_better(drafted: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"learning_rate": 1.0, "validate_every": 1, "patience": 2})
    record = train_draft(
        drafted / "target", drafted / "responses.jsonl", tmp_path / "d", layers=[0, 1], options=settings
    )
    assert record.stopped_early
    losses = [found.loss for found in record.validations]
    assert record.best_step == record.validations[losses.index(min(losses))].step
    assert record.steps == record.best_step + 2


def test_the_kl_over_stored_tokens_is_the_formula_and_a_lower_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(5, 40, generator=generator).double() * 2 for _ in range(2))
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    full = (p.exp() * (p - q)).sum(-1)
    everything = p.topk(40)
    assert torch.allclose(topk_kl(student, everything.indices, everything.values), full, atol=1e-6)
    top = p.topk(6)
    found = topk_kl(student, top.indices, top.values)
    kept = (top.values.exp() * (top.values - q.gather(-1, top.indices))).sum(-1)
    rest_p, rest_q = 1 - top.values.exp().sum(-1), 1 - q.gather(-1, top.indices).exp().sum(-1)
    assert torch.allclose(found, kept + rest_p * (rest_p / rest_q).log())
    assert bool((found <= full + 1e-9).all())
    assert float(topk_kl(teacher, top.indices, top.values).abs().max()) < 1e-6


def test_parts_of_a_batch_add_up_to_the_weighted_sum(drafted: Path) -> None:
    rows = read_responses(drafted / "responses.jsonl", tiny_tokenizer(), max_length=1024)[0][:6]
    rows, _, _ = label_rows(rows, range(6), "data")
    model, head = tiny_model().double(), torch.nn.Linear(32, 2).double()
    weights = Weights(0.7, 0.2, 0.3)
    tokens = sum(row.scored for row in rows)
    device = torch.device("cpu")

    def share(part: Any, one: Weights = weights) -> float:
        return float(batch_loss(model, head.float(), part, one, device, tokens=tokens, labelled=6).detach())

    assert share(rows[:2]) + share(rows[2:]) == pytest.approx(share(rows), rel=1e-5)
    alone = [share(rows, Weights(1, 0, 0)), share(rows, Weights(0, 1, 0)), share(rows, Weights(0, 0, 1))]
    assert share(rows) == pytest.approx(0.7 * alone[0] + 0.2 * alone[1] + 0.3 * alone[2], rel=1e-5)


def test_classifier_figures_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
    found = report_classifier(probabilities, [0, 1, 1, 0], ["easy", "hard"], "data", 0)
    assert found.confusion == [[2, 0], [1, 1]]
    assert found.accuracy == 0.75
    assert found.f1_by_label == pytest.approx({"easy": 4 / 5, "hard": 2 / 3})
    assert (found.majority_accuracy, found.majority_f1) == pytest.approx((0.5, 1 / 3))
    # Bins 0.9: right, gap 0.1; 0.6: wrong, gap 0.6; 0.8: right, 0.2; 0.7: right, 0.3.
    assert found.calibration_error == pytest.approx((0.1 + 0.6 + 0.2 + 0.3) / 4)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0


def test_the_command_as_typed(drafted: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable, "-m", "lorasmith.cli.main", "draft", "train", "--target", str(drafted / "target"),
            "--responses", str(drafted / "responses.jsonl"), "--output", str(tmp_path / "d"),
        ]  # fmt: skip
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)

    done = run("--from-target", "--layers", "0,3", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "held-out rows" in done.stdout and "always " in done.stdout and "Confusion" in done.stdout
    alone = run("--from-target")
    assert alone.returncode == 2 and "go together" in alone.stderr and "Traceback" not in alone.stderr
