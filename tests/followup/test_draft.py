"""The draft: it learns what the target says, goes on after a kill to the same bytes, and fits the target."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.errors import BusyError, CheckpointError, DataError, DiskError, UsageError
from lorasmith.files.digests import digest_folder
from lorasmith.files.jsonl import read_examples, write_rows
from lorasmith.files.lock import only_one
from lorasmith.followup import draft_train
from lorasmith.followup.draft import train_draft
from lorasmith.followup.draft_base import match_vocabulary, parse_layers
from lorasmith.followup.draft_labels import label_rows, split_rows
from lorasmith.followup.draft_loss import Weights, batch_loss, topk_kl
from lorasmith.followup.draft_report import calibration_error, report_classifier
from lorasmith.followup.draft_rows import DraftRow, logprobs_beside, read_responses
from lorasmith.followup.draft_save import HEAD
from lorasmith.followup.draft_settings import DraftSettings
from lorasmith.followup.respond import RespondOptions, respond
from lorasmith.models.encode import encode_examples
from tests.faults import in_child, was_killed
from tests.tiny import save_base, tiny_model, tiny_rows, tiny_tokenizer

SETTINGS = DraftSettings(
    learning_rate=5e-3, epochs=6, batch_size=8, validation=0.15, held_out=0.2, validate_every=6, patience=9
)
K = 8


def write_responses(folder: Path, count: int) -> Path:
    """What the target says, in the shape of `lorasmith respond`; an easy prompt is short, a hard one long."""
    target = AutoModelForCausalLM.from_pretrained(folder / "target").eval()
    tokenizer = tiny_tokenizer()
    generator = torch.Generator().manual_seed(1)
    rows, columns = [], []
    for index, row in enumerate(tiny_rows(count, seed=3)):
        easy = index % 2 == 0
        prompt = "the cat" if easy else row["prompt"] + " " + row["prompt"]
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        tokens: list[int] = []
        with torch.no_grad():
            for _ in range(10):
                odds = target(torch.tensor([ids + tokens])).logits[0, -1].softmax(-1)
                tokens.append(int(torch.multinomial(odds, 1, generator=generator)))
            logprobs = target(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        top = logprobs.topk(K)
        common = {"id": row["id"], "key": f"key-{index}", "finish_reason": "length"}
        label = {"difficulty": "easy" if easy else "hard"}
        rows.append({**common, "prompt": prompt, "response": tokenizer.decode(tokens), "metadata": label})
        columns.append(
            {
                **common, "prompt": ids, "tokens": tokens,
                "logprobs": [float(logprobs[at, token]) for at, token in enumerate(tokens)],
                "top_tokens": top.indices.tolist(), "top_logprobs": top.values.tolist(),
            }
        )  # fmt: skip
    path = folder / "responses.jsonl"
    write_rows(path, rows)
    pq.write_table(pa.Table.from_pylist(columns), logprobs_beside(path))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target` of four layers, `responses.jsonl` with stored probabilities, `draft` of two of the layers."""
    folder = tmp_path_factory.mktemp("draft")
    save_base(folder / "target", num_hidden_layers=4, dtype=torch.float32)
    write_responses(folder, 60)
    train_draft(
        folder / "target", folder / "responses.jsonl", folder / "draft", layers=[0, 3], settings=SETTINGS
    )
    return folder


def held_out(place: Path) -> list[DraftRow]:
    rows = read_responses(place / "responses.jsonl", tiny_tokenizer(), max_length=1024)[0]
    return [rows[at] for at in split_rows(60, validation=0.15, held_out=0.2, seed=42).held_out]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "lorasmith_draft.json").read_text())  # type: ignore[no-any-return]


def test_the_generator_comes_closer_to_the_target(place: Path) -> None:
    record = record_of(place / "draft")
    # What is left above the target's own entropy shrinks; below it no draft can come.
    entropy = -np.mean([row.confidence for row in held_out(place)])
    assert record["generator"]["loss"] - entropy < 0.75 * (record["before"]["loss"] - entropy)
    assert record["generator"]["kl"] < 0.9 * record["before"]["kl"]
    assert record["generator"]["perplexity"] == pytest.approx(math.exp(record["generator"]["loss"]))
    assert record["train_rows"] + record["validation_rows"] + record["held_out_rows"] == 60
    assert record["validations"][-1]["step"] == record["steps"] == len(record["losses"])


def test_the_folder_is_a_plain_transformers_model_and_its_loss_is_the_reported_one(place: Path) -> None:
    """Held-out loss again, with transformers alone in float64."""
    model = AutoModelForCausalLM.from_pretrained(place / "draft").double()
    tokenizer = AutoTokenizer.from_pretrained(place / "draft")
    assert model.config.num_hidden_layers == 2
    assert model.config.vocab_size == 300
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    total, count = 0.0, 0
    for row in held_out(place):
        with torch.no_grad():
            logprobs = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for at in range(row.n_prompt, len(row.ids)):
            total -= float(logprobs[at - 1, row.ids[at]])
            count += 1
    assert record_of(place / "draft")["generator"]["tokens"] == count
    assert record_of(place / "draft")["generator"]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_reported_kl_is_that_of_the_stored_probabilities_in_float64(place: Path) -> None:
    """Read straight from the Parquet file, with transformers alone and sums in numpy's float64."""
    model = AutoModelForCausalLM.from_pretrained(place / "draft").double()
    stored = pq.read_table(logprobs_beside(place / "responses.jsonl")).to_pylist()
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
    found = record_of(place / "draft")["generator"]
    # Both sum float32 logits; the stored probabilities themselves have float32's digits.
    assert found["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert found["agreement"] == pytest.approx(np.mean(same))


def test_the_classifier_beats_the_majority_and_its_head_is_usable_alone(place: Path) -> None:
    found = record_of(place / "draft")["classifier"]
    assert found["labels"] == ["easy", "hard"] and found["labels_from"] == "data"
    assert found["accuracy"] > found["majority_accuracy"] + 0.1
    head = load_file(place / "draft" / f"{HEAD}.safetensors")
    config = json.loads((place / "draft" / f"{HEAD}.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(place / "draft")
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


def test_a_killed_training_goes_on_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    def work() -> None:
        train_draft(
            place / "target", place / "responses.jsonl", tmp_path / "draft", layers=[0, 3], settings=SETTINGS
        )

    counted = tmp_path / "count"
    assert in_child(work, die_at=None, count_to=counted) == 0
    whole = digest_folder(tmp_path / "draft")
    assert whole == digest_folder(place / "draft")
    writes = int(counted.read_text())
    for at in (writes // 4, writes // 2):  # within a checkpoint's files, and between two of them
        (tmp_path / "draft").rename(tmp_path / f"before-{at}")
        assert was_killed(in_child(work, die_at=at))
        assert not (tmp_path / "draft").exists()
        assert (tmp_path / ".draft.checkpoint" / "state.json").is_file()
        work()
        assert digest_folder(tmp_path / "draft") == whole
        assert not (tmp_path / ".draft.checkpoint").exists()


def test_a_checkpoint_of_other_settings_is_not_continued(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.followup.draft.save_draft", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_draft(
            place / "target", place / "responses.jsonl", tmp_path / "d", layers=[0], settings=SETTINGS
        )
    other = DraftSettings(**{**vars(SETTINGS), "seed": 7})
    with pytest.raises(UsageError, match="other inputs, settings or versions"):
        train_draft(place / "target", place / "responses.jsonl", tmp_path / "d", layers=[0], settings=other)


def test_a_damaged_checkpoint_is_named(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that lost part of a file: no traceback, and no training from half of it."""
    with monkeypatch.context() as patched:
        patched.setattr("lorasmith.followup.draft.save_draft", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_draft(
                place / "target", place / "responses.jsonl", tmp_path / "d", layers=[0], settings=SETTINGS
            )
    for name in ("state.json", "model.safetensors", "optimizer.pt"):
        file = tmp_path / ".d.checkpoint" / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match="damaged") as caught:
            train_draft(
                place / "target", place / "responses.jsonl", tmp_path / "d", layers=[0], settings=SETTINGS
            )
        assert ".d.checkpoint" in str(caught.value)
        file.write_bytes(content)


def test_a_disk_that_fills_up_in_a_checkpoint_loses_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second checkpoint meets a full disk; the first is then continued to the same bytes."""
    real, calls = draft_train.save_file, []

    def save(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:  # a checkpoint holds two such files
            raise OSError(28, "No space left on device")
        real(*arguments)

    def work() -> None:
        train_draft(
            place / "target", place / "responses.jsonl", tmp_path / "draft", layers=[0, 3], settings=SETTINGS
        )

    with monkeypatch.context() as patched:
        patched.setattr(draft_train, "save_file", save)
        with pytest.raises(DiskError, match="the disk is full"):
            work()
    assert json.loads((tmp_path / ".draft.checkpoint" / "state.json").read_text())["step"] == 6
    work()
    assert digest_folder(tmp_path / "draft") == digest_folder(place / "draft")


def test_two_trainings_of_one_output_are_refused(place: Path, tmp_path: Path) -> None:
    with only_one(tmp_path / "d", "training"), pytest.raises(BusyError, match="another training"):
        train_draft(
            place / "target", place / "responses.jsonl", tmp_path / "d", layers=[0], settings=SETTINGS
        )


def test_training_stops_when_validation_gets_no_better(place: Path, tmp_path: Path) -> None:
    settings = DraftSettings(**{**vars(SETTINGS), "learning_rate": 1.0, "validate_every": 1, "patience": 2})
    record = train_draft(
        place / "target", place / "responses.jsonl", tmp_path / "d", layers=[0, 1], settings=settings
    )
    assert record.stopped_early
    losses = [found.loss for found in record.validations]
    assert record.best_step == record.validations[losses.index(min(losses))].step
    assert record.steps == record.best_step + 2


def test_a_kept_layer_is_the_targets(place: Path) -> None:
    """All layers kept and nothing trained is the target itself."""
    from lorasmith.followup.draft_base import cut_from_target

    ids = torch.tensor([[5, 6, 7, 8]])
    target = AutoModelForCausalLM.from_pretrained(place / "target")
    with torch.no_grad():
        whole = cut_from_target(place / "target", [0, 1, 2, 3], torch.device("cpu")).model(ids).logits
        assert torch.equal(whole, target(ids).logits)
        last = cut_from_target(place / "target", [2], torch.device("cpu")).model
    wanted = target.state_dict()["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(last.state_dict()["model.layers.0.mlp.up_proj.weight"], wanted)


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


def test_parts_of_a_batch_add_up_to_the_weighted_sum(place: Path) -> None:
    rows = read_responses(place / "responses.jsonl", tiny_tokenizer(), max_length=1024)[0][:6]
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


def test_another_base_is_padded_to_the_targets_vocabulary(place: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "small", vocab_size=280, num_hidden_layers=1, hidden_size=16, dtype=torch.float32)
    settings = DraftSettings(**{**vars(SETTINGS), "epochs": 1})
    record = train_draft(
        place / "target",
        place / "responses.jsonl",
        tmp_path / "d",
        base=tmp_path / "small",
        settings=settings,
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


def test_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "other", dtype=torch.float32)
    path = tmp_path / "other" / "tokenizer.json"
    body = json.loads(path.read_text())
    vocabulary = body["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="is not the target's") as caught:
        train_draft(place / "target", place / "responses.jsonl", tmp_path / "d", base=tmp_path / "other")
    assert "--from-target" in str(caught.value)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("text", ["", "a", "3,1", "1,1", "1,,2", "4-2", "-1"])
def test_nonsense_layers(text: str) -> None:
    with pytest.raises(UsageError):
        parse_layers(text)


def test_layers() -> None:
    assert parse_layers("0,2,4-6, 9") == [0, 2, 4, 5, 6, 9]


def test_layers_that_do_not_exist(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no layer 7") as caught:
        train_draft(place / "target", place / "responses.jsonl", tmp_path / "d", layers=[0, 7])
    assert "layers 0 to 3" in str(caught.value)
    # Told before the responses are read: those may take minutes.
    with pytest.raises(UsageError, match="no layer 7"):
        train_draft(place / "target", tmp_path / "absent.jsonl", tmp_path / "d", layers=[7])


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0.0},
        {"patience": 0},
        {"kl_weight": -1.0},
        {"validation": 0.6, "held_out": 0.5},
        {"labels": "x"},
        {"cross_entropy_weight": 0.0, "kl_weight": 0.0},
    ],
)
def test_wrong_settings_are_one_message(place: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    settings = DraftSettings(**{**vars(SETTINGS), **wrong})
    with pytest.raises(UsageError):
        train_draft(
            place / "target", place / "responses.jsonl", tmp_path / "d", layers=[0], settings=settings
        )
    assert list(tmp_path.iterdir()) == []


def test_without_stored_probabilities_it_says_so(place: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl"
    write_rows(plain, tiny_rows(24))
    settings = DraftSettings(**{**vars(SETTINGS), "epochs": 1})
    record = train_draft(place / "target", plain, tmp_path / "d", layers=[0], settings=settings)
    assert [finding.code for finding in record.findings] == ["no-logprobs"]
    assert record.generator.kl is None and record.logprobs is None
    assert record.classifier is not None and record.classifier.labels == ["easy", "hard", "medium"]
    # The tokens are those that validation scores.
    scored = encode_examples(read_examples(plain), tiny_tokenizer(), max_length=1024).rows
    ours = read_responses(plain, tiny_tokenizer(), max_length=1024)[0]
    assert [(row.ids, row.n_prompt) for row in ours] == [(row.ids, row.n_prompt) for row in scored]
    only = DraftSettings(**{**vars(settings), "cross_entropy_weight": 0.0})
    with pytest.raises(UsageError, match="nothing to learn from"):
        train_draft(place / "target", plain, tmp_path / "e", layers=[0], settings=only)


def test_what_respond_writes_is_what_is_read(place: Path, tmp_path: Path) -> None:
    """The extraction itself, then the draft, and a draft of another target, which is told."""
    write_rows(tmp_path / "data.jsonl", tiny_rows(8))
    output = tmp_path / "r.jsonl"
    respond(
        place / "target", tmp_path / "data.jsonl", output,
        options=RespondOptions(max_new_tokens=6, top_logprobs=4, device="cpu"),
    )  # fmt: skip
    rows = read_responses(output, tiny_tokenizer(), max_length=1024)[0]
    target = AutoModelForCausalLM.from_pretrained(place / "target")
    for row in rows:
        with torch.no_grad():
            logprobs = target(torch.tensor([row.ids])).logits[0, row.n_prompt - 1 : -1].log_softmax(-1)
        assert row.top_logprobs is not None and row.top_ids is not None
        assert torch.allclose(torch.from_numpy(row.top_logprobs), logprobs.topk(4).values, atol=1e-4)
        assert row.top_ids[:, 0].tolist() == row.ids[row.n_prompt :]  # greedy: the likeliest is what was said
    settings = DraftSettings(**{**vars(SETTINGS), "epochs": 1})
    record = train_draft(place / "target", output, tmp_path / "d", layers=[0, 3], settings=settings)
    assert record.findings == [] and record.generator.agreement is not None
    save_base(tmp_path / "other", seed=9, dtype=torch.float32)
    told = train_draft(tmp_path / "other", output, tmp_path / "e", layers=[0], settings=settings)
    assert [finding.code for finding in told.findings] == ["other-target"]


def test_rows_that_are_cut_or_left_out_are_told(place: Path) -> None:
    rows, told = read_responses(place / "responses.jsonl", tiny_tokenizer(), max_length=40)
    whole = read_responses(place / "responses.jsonl", tiny_tokenizer(), max_length=1024)[0]
    left_out = sum(row.n_prompt >= 40 for row in whole)
    cut = sum(row.n_prompt < 40 < len(row.ids) for row in whole)
    assert left_out > 0 and len(rows) == 60 - left_out and all(len(row.ids) <= 40 for row in rows)
    assert any(finding.message.startswith(f"{left_out} rows were left out") for finding in told)
    assert any(finding.message.startswith(f"{cut} of {len(rows)}") for finding in told) == (cut > 0)


def test_responses_that_cannot_be_used(place: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "two.jsonl", [{"prompt": "a", "response": "b"}] * 2)
    with pytest.raises(DataError, match="2 usable responses"):
        train_draft(place / "target", tmp_path / "two.jsonl", tmp_path / "d", layers=[0])
    write_rows(tmp_path / "none.jsonl", [{"text": "a"}] * 5)
    with pytest.raises(DataError, match=r"none\.jsonl:1"):
        train_draft(place / "target", tmp_path / "none.jsonl", tmp_path / "d", layers=[0])


def test_labels_from_the_targets_confidence(place: Path) -> None:
    rows = read_responses(place / "responses.jsonl", tiny_tokenizer(), max_length=1024)[0]
    labelled, names, source = label_rows(rows, range(40), "confidence")
    assert (names, source) == (["easy", "hard"], "confidence")
    middle = np.median([row.confidence for row in rows[:40]])
    assert all((row.confidence < middle) == bool(row.label) for row in labelled)


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


def test_a_loss_that_is_no_number_stops_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = draft_train.batch_loss
    monkeypatch.setattr(draft_train, "batch_loss", lambda *a, **k: real(*a, **k) * float("nan"))
    with pytest.raises(draft_train.MachineError, match="step 1 is not a number"):
        train_draft(
            place / "target", place / "responses.jsonl", tmp_path / "d", layers=[0], settings=SETTINGS
        )


def test_no_disk(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = os.statvfs(tmp_path)
    full = os.statvfs_result((state.f_bsize, state.f_frsize, state.f_blocks, 0, 0, *tuple(state)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(DiskError, match="too little disk space to train the draft"):
        train_draft(
            place / "target", place / "responses.jsonl", tmp_path / "d", layers=[0], settings=SETTINGS
        )
    assert list(tmp_path.iterdir()) == []


def test_the_command_as_typed(place: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable, "-m", "lorasmith.cli.main", "draft", "train", "--target", str(place / "target"),
            "--responses", str(place / "responses.jsonl"), "--output", str(tmp_path / "d"),
        ]  # fmt: skip
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)

    done = run("--from-target", "--layers", "0,3", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "held-out rows" in done.stdout and "Always" in done.stdout
    alone = run("--from-target")
    assert alone.returncode == 2 and "go together" in alone.stderr and "Traceback" not in alone.stderr
