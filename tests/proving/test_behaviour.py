"""Adapter against merged model: numbers of the published formulas, grades that mean what they say."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.errors import CheckpointError, UsageError
from lorasmith.files.atomic import read_record
from lorasmith.models import device
from lorasmith.proving.behaviour.compare import compare
from lorasmith.proving.behaviour.measure import THRESHOLDS, grade
from lorasmith.records.proof import BehaviourProof, KLStatistics, TokenComparison
from tests.tiny import save_adapter, save_base, tiny_rows, tiny_tokenizer

ROWS = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("behaviour")
    save_base(folder / "base")
    save_adapter(folder / "adapter", folder / "base")
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(ROWS)))
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        merged = adapted(folder, torch.float32).merge_and_unload().to(dtype)
        merged.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def adapted(place: Path, dtype: torch.dtype) -> Any:
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=dtype)
    return PeftModel.from_pretrained(base, str(place / "adapter")).to(dtype)


@pytest.fixture
def one_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor whose matrix unit makes oneDNN compute in bfloat16: torch's own route is its only one."""
    monkeypatch.setattr(device, "probe", lambda: device.Probe(1.0, 0.1, 4e-7, 3e-3))


def run(place: Path, merged: str, output: Path | None = None, **options: Any) -> BehaviourProof:
    return compare(place / "base", place / "adapter", place / merged, place / "test.jsonl", output, **options)


def exact(place: Path, merged: str) -> dict[str, Any]:
    """The published formulas row by row in float64: KL, choices and log-probabilities per token."""
    a = adapted(place, torch.float64)
    b = AutoModelForCausalLM.from_pretrained(place / merged, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    kl, agree, logprob_a, logprob_b, rows = [], [], [], [], []
    for line in (place / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = f"<|start|>user\n{row['prompt']}<|end|>\n<|start|>assistant\n"
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*prompt, *tokenizer(row["response"] + "<|end|>", add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            p, q = (
                torch.log_softmax(m(torch.tensor([ids])).logits[0], -1)[len(prompt) - 1 : -1] for m in (a, b)
            )
        targets = torch.tensor(ids[len(prompt) :])[:, None]
        kl.append((p.exp() * (p - q)).sum(-1).numpy())
        agree.append((p.argmax(-1) == q.argmax(-1)).numpy())
        logprob_a.append(p.gather(-1, targets)[:, 0].numpy())
        logprob_b.append(q.gather(-1, targets)[:, 0].numpy())
        rows.append(row)
    return {"kl": kl, "agree": agree, "a": logprob_a, "b": logprob_b, "rows": rows}


def test_every_number_matches_the_formulas_in_float64(place: Path, tmp_path: Path) -> None:
    proof = run(place, "bfloat16", tmp_path / "behaviour.json")
    truth = exact(place, "bfloat16")
    kl, a, b = (np.concatenate(truth[key]) for key in ("kl", "a", "b"))
    found = proof.overall
    assert (found.examples, found.tokens) == (ROWS, len(kl))
    assert found.kl.mean == pytest.approx(kl.mean(), rel=1e-3)
    assert found.kl.median == pytest.approx(np.median(kl), rel=1e-2)
    assert found.kl.q99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-2)
    assert found.kl.max == pytest.approx(kl.max(), rel=1e-2)
    # Losses are means of some 400 float32 log-probabilities, each right to about 1e-6.
    assert found.loss_delta == pytest.approx((a - b).mean(), abs=1e-6)
    assert found.perplexity_delta == pytest.approx(math.exp(-b.mean()) - math.exp(-a.mean()), abs=2e-3)
    assert found.perplexity_ratio == pytest.approx(math.exp((a - b).mean()), abs=1e-6)
    assert found.max_abs_delta == pytest.approx(np.abs(a - b).max(), abs=5e-5)
    assert found.delta_p_rms == pytest.approx(np.sqrt(((np.exp(b) - np.exp(a)) ** 2).mean()), rel=1e-2)
    assert found.top1_agreement == pytest.approx(np.concatenate(truth["agree"]).mean())
    assert proof == read_record(tmp_path / "behaviour.json", BehaviourProof)


def test_every_flip_is_listed_with_its_place_and_margin(place: Path) -> None:
    proof = run(place, "bfloat16")
    truth = exact(place, "bfloat16")
    expected = {
        (row["id"], int(position))
        for row, agree in zip(truth["rows"], truth["agree"], strict=True)
        for position in np.flatnonzero(~agree)
    }
    assert expected  # a comparison without flips would prove nothing here
    assert {(flip.example, flip.position) for flip in proof.flips} == expected
    assert all(flip.margin > 0 and flip.token_a != flip.token_b for flip in proof.flips)
    assert sum(line.flips for line in proof.examples) == len(expected)


def test_a_float32_merge_is_indistinguishable_and_a_rounded_one_is_not(place: Path, one_route: None) -> None:
    exact_merge = run(place, "float32")
    assert exact_merge.grade == "indistinguishable", exact_merge.reasons
    assert exact_merge.floor is not None
    assert 0 < exact_merge.floor.kl.mean < 1e-10
    rounded = run(place, "bfloat16")
    assert rounded.grade == "drifted", rounded.reasons  # random weights of this size move by 1e-4 in bf16
    relaxed = {"loss_delta": 1.0, "perplexity_delta": 100.0, "mean_kl": 1.0, "top1_agreement": 0.5}
    assert run(place, "bfloat16", thresholds=relaxed).grade == "faithful"


ON_ONEDNN = """
import sys
from lorasmith.proving.behaviour.compare import compare
for merged in ("float32", "bfloat16"):
    proof = compare("base", "adapter", merged, "test.jsonl", arithmetic="onednn")
    print(merged, proof.grade, proof.floor_layouts[1], *proof.reasons, sep="; ")
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_the_other_float32_route_comes_to_the_same_verdicts(place: Path, tmp_path: Path) -> None:
    # Held to instructions without a matrix unit, oneDNN computes in float32 on every processor.
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "LORASMITH_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ON_ONEDNN],
        cwd=place,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    exact_merge, rounded = done.stdout.splitlines()
    assert exact_merge.startswith("float32; indistinguishable; "), exact_merge
    assert "float32 (oneDNN), the terms of every matrix product in another order" in exact_merge
    assert rounded.startswith("bfloat16; drifted; "), rounded


def test_the_floor_is_what_float32_leaves_open_and_no_more(place: Path) -> None:
    """Measured against float64: two independent errors, so about twice the divergence that one makes."""
    proof = run(place, "float32", arithmetic="mkl")
    double, single = adapted(place, torch.float64), adapted(place, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    kl = []
    for line in (place / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = f"<|start|>user\n{row['prompt']}<|end|>\n<|start|>assistant\n"
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*prompt, *tokenizer(row["response"] + "<|end|>", add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            p, q = (
                torch.log_softmax(m(torch.tensor([ids])).logits[0].double(), -1)[len(prompt) - 1 : -1]
                for m in (double, single)
            )
        # Of differences this small the second-order term: the first sums to 0 but for float64's own 1e-16.
        kl.append((p.exp() * (p - q) ** 2).sum(-1).numpy() / 2)
    assert proof.floor is not None
    # Other rows and other layouts than the reference's: 2 within a factor of two.
    assert 1 < proof.floor.kl.mean / float(np.concatenate(kl).mean()) < 4


def test_the_serving_type_is_measured_beside_the_floor(place: Path) -> None:
    proof = run(place, "bfloat16")
    served, floor = proof.serving, proof.floor
    assert served is not None
    assert floor is not None
    assert proof.serving_layouts[-1].endswith("bfloat16")
    # PEFT's own forward in bfloat16 against itself in float64, row by row.
    low, exact_model = adapted(place, torch.bfloat16), adapted(place, torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    kl = []
    for line in (place / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = f"<|start|>user\n{row['prompt']}<|end|>\n<|start|>assistant\n"
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*prompt, *tokenizer(row["response"] + "<|end|>", add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            p, q = (
                torch.log_softmax(m(torch.tensor([ids])).logits[0].double(), -1)[len(prompt) - 1 : -1]
                for m in (exact_model, low)
            )
        kl.append((p.exp() * (p - q)).sum(-1).numpy())
    # The same rounding in other places, on two thirds of the rows: of one size, not equal.
    assert 0.4 < served.kl.mean / float(np.concatenate(kl).mean()) < 2.5
    assert served.kl.mean > 1e4 * floor.kl.mean


def test_float32_has_no_other_serving_type(place: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base)
    assert compare(base, adapter, base, place / "test.jsonl", limit=3).serving is None


def test_the_base_in_place_of_the_merged_model_is_found_out(place: Path) -> None:
    proof = run(place, "base")
    assert proof.grade == "drifted"
    assert proof.overall.kl.mean > 0.1


def test_groups_hold_all_tokens_and_rows_do_not_depend_on_batches(place: Path) -> None:
    whole, small = run(place, "bfloat16"), run(place, "bfloat16", batch_tokens=70)
    for groups in whole.groups.values():
        assert sum(group.tokens for group in groups.values()) == whole.overall.tokens
    for one, two in zip(whole.examples, small.examples, strict=True):
        assert one.loss_delta == pytest.approx(two.loss_delta, abs=2e-6)
        assert one.mean_kl == pytest.approx(two.mean_kl, rel=2e-2)


def test_a_merged_folder_with_another_chat_template_is_no_release(place: Path, tmp_path: Path) -> None:
    for file in (place / "float32").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = tmp_path / "chat_template.jinja"
    template.write_text("You are a helpful assistant.\n" + template.read_text())
    proof = compare(place / "base", place / "adapter", tmp_path, place / "test.jsonl")
    assert proof.grade == "drifted"
    assert f"{ROWS} rows" in proof.reasons[0]
    assert [finding.code for finding in proof.findings] == ["tokenizer-differs"]
    template.unlink()
    assert compare(place / "base", place / "adapter", tmp_path, place / "test.jsonl").grade == "drifted"


def test_a_merged_folder_without_a_tokenizer_is_compared_and_reported(
    place: Path, tmp_path: Path, one_route: None
) -> None:
    for file in (place / "float32").iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    proof = compare(place / "base", place / "adapter", tmp_path, place / "test.jsonl")
    assert proof.grade == "indistinguishable"
    assert [finding.code for finding in proof.findings] == ["no-tokenizer"]


def test_models_of_different_vocabulary_are_one_message(place: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", vocab_size=320)
    with pytest.raises(CheckpointError, match="320 embedding rows"):
        compare(place / "base", place / "adapter", other, place / "test.jsonl")


def test_the_same_comparison_gives_the_same_bytes(place: Path, tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        run(place, "bfloat16", tmp_path / name, limit=6)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_record(tmp_path / "a.json", BehaviourProof).partial


def comparison(**values: float) -> TokenComparison:
    kl = values.pop("kl", 0.0)
    fields = {"loss_delta": 0.0, "perplexity_delta": 0.0, "top1_agreement": 1.0, **values}
    return TokenComparison(
        examples=1,
        tokens=10,
        loss_a=1,
        loss_b=1,
        perplexity_a=3,
        perplexity_b=3,
        kl=KLStatistics(mean=kl, standard_error=0, median=0, q90=0, q95=0, q99=0, q999=0, max=kl),
        delta_p_mean=0,
        delta_p_rms=0,
        max_abs_delta=0,
        **fields,
    )


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"kl": 1.9e-12}, "indistinguishable"),
        ({"kl": 2.1e-12}, "faithful"),
        ({"kl": 9e-5, "loss_delta": -9e-5, "perplexity_delta": 0.009}, "faithful"),
        ({"kl": 2e-4}, "drifted"),
        ({"kl": 1e-5, "loss_delta": -2e-4}, "drifted"),  # a loss that fell is a difference too
        ({"kl": 1e-5, "perplexity_delta": -0.02}, "drifted"),
        ({"kl": 1e-5, "top1_agreement": 0.99}, "drifted"),
    ],
)
def test_each_threshold_decides(values: dict[str, float], wanted: str) -> None:
    found, reasons = grade(comparison(**values), comparison(kl=1e-12), THRESHOLDS)
    assert found == wanted
    assert len(reasons) == 5


def test_unknown_thresholds_and_inexact_arithmetic_are_refused(place: Path) -> None:
    with pytest.raises(UsageError, match="klmean"):
        run(place, "float32", thresholds={"klmean": 1.0})
    with pytest.raises(UsageError, match="bfloat16"):
        run(place, "float32", arithmetic="bfloat16")


def test_generation_is_compared_token_by_token(place: Path) -> None:
    same = run(place, "float32", generate=10).generation
    assert same is not None
    assert (same.same, same.examples, same.divergences) == (ROWS, ROWS, [])
    assert same.floor_same == same.floor_examples == 16
    other = run(place, "base", generate=10, limit=6).generation
    assert other is not None
    assert other.same < other.examples == 6
    assert len(other.divergences) == 6 - other.same
    assert other.tokens_before_divergence < 10
    assert sorted(other.groups["source"]) == ["alpha", "beta", "gamma"]
    for groups in other.groups.values():
        assert sum(group.examples for group in groups.values()) == 6
        assert sum(group.same for group in groups.values()) == other.same
        agreed = sum(group.tokens_before_divergence * group.examples for group in groups.values())
        assert agreed / 6 == pytest.approx(other.tokens_before_divergence)
    assert run(place, "float32", limit=3).generation is None
    with pytest.raises(UsageError):
        run(place, "float32", generate=0)
