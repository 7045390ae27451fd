"""A finished run made of records alone, without a model: for tests of the report and the package.

The numbers are random but consistent with each other, and come from a seed.
"""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models

from lorasmith.files.atomic import write_record
from lorasmith.files.digests import hash_file
from lorasmith.files.jsonl import read_examples, write_examples
from lorasmith.records.base import FileDigest, Interval
from lorasmith.records.dataset import ContaminationRecord, DatasetStatistics, Example, Metadata
from lorasmith.records.merging import MergedTensor, MergeRecord
from lorasmith.records.proof import (
    BehaviourProof,
    ComparisonRecord,
    Divergence,
    ExampleComparison,
    Flip,
    GenerationComparison,
    KLStatistics,
    PairedEffect,
    TensorProof,
    TokenComparison,
    WeightProof,
)
from lorasmith.records.release import (
    Gate,
    GateRecord,
    GateResult,
    RunRecord,
    StageTiming,
    TimingRecord,
)
from lorasmith.records.scoring import GroupMetrics, ModelIdentity, ScoringSettings, ValidationResult

SOURCES = ("DROP", "GPQA", "HumanEval", "MATH", "MMLU")
DOMAINS = ("reading", "science", "code", "math", "multitask")
DIFFICULTIES = ("easy", "hard", "medium", "hard", "medium")
ROLES = ("base", "adapter", "merged")
SECRET = "quintessential-sphinx"
"""Stands in the text of every row that must not be published."""

_TEXT = "the answer follows from a lemma where each term is bounded by its limit so we find"
_WORDS = _TEXT.split()
_VOCABULARY = [
    "<unk>",
    "<end>",
    *(f"{mark}{word}" for word in [*sorted(set(_WORDS)), SECRET] for mark in ("▁", "")),
]


def sha(text: str) -> str:
    """A digest to fill a record with."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest(path: Path, root: Path) -> FileDigest:
    """Of a file that was just written."""
    return FileDigest(
        path=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=hash_file(path)
    )


def sample_examples(count: int, *, seed: int = 0, words: int = 30) -> list[Example]:
    """Rows of five sources in turn; those of GPQA hold `SECRET`."""
    chance = random.Random(seed)
    rows = []
    for index in range(count):
        kind = index % len(SOURCES)
        secret = SECRET if SOURCES[kind] == "GPQA" else ""
        prompt = " ".join(chance.choices(_WORDS, k=chance.randint(words // 2, 2 * words)))
        response = " ".join(chance.choices(_WORDS, k=chance.randint(2, words)))
        rows.append(
            Example(
                id=f"{SOURCES[kind].lower()}-{index:05d}",
                prompt=f"{prompt} {secret}".strip(),
                response=f"{response} {secret}".strip(),
                metadata=Metadata(
                    source=SOURCES[kind],
                    domain=DOMAINS[kind],
                    difficulty=DIFFICULTIES[kind],
                    sha256=sha(prompt),
                ),
            )
        )
    return rows


def write_test_set(run: Path, rows: list[Example]) -> FileDigest:
    """`testset/` with its statistics and a contamination record."""
    file = run / "testset" / "test_set.jsonl"
    write_examples(file, rows)
    found = FileDigest(path="test_set.jsonl", bytes=file.stat().st_size, sha256=hash_file(file))
    counts: dict[str, dict[str, int]] = {
        "source": {},
        "domain": {},
        "difficulty": {},
        "source × difficulty": {},
    }
    for row in rows:
        meta = row.metadata
        crossing = f"{meta.source} / {meta.difficulty}"
        for kind, name in zip(counts, (meta.source, meta.domain, meta.difficulty, crossing), strict=True):
            counts[kind][name] = counts[kind].get(name, 0) + 1
    write_record(
        run / "testset" / "statistics.json",
        DatasetStatistics(
            examples=len(rows),
            file=found,
            seed=42,
            by_source=counts["source"],
            by_domain=counts["domain"],
            by_difficulty=counts["difficulty"],
            crossings={"source × difficulty": counts["source × difficulty"]},
        ),
    )
    write_record(
        run / "testset" / "contamination.json",
        ContaminationRecord(
            verdict="independent",
            test=found,
            train=[FileDigest(path="train.jsonl", bytes=123456, sha256=sha("train"))],
            rows_test=len(rows),
            rows_train=2000,
            parameters={"ngram": 13, "jaccard": 0.8},
            counts={"exact": 0, "ngram": 0, "near": 0},
        ),
    )
    return found


Losses = dict[str, list[list[float]]]
"""Role → row → token → loss."""


def identity(role: str) -> ModelIdentity:
    """A model of a role."""
    return ModelIdentity(
        role=role,
        model_sha256=sha("merged" if role == "merged" else "base"),
        adapter_sha256=sha("adapter") if role == "adapter" else None,
        architecture="LlamaForCausalLM",
        parameters=134_515_008,
    )


SETTINGS = ScoringSettings(
    template="chat", max_length=2048, arithmetic="float32", device="cpu", batch_tokens=4096
)


def _metrics(losses: list[list[float]]) -> GroupMetrics:
    tokens = [loss for row in losses for loss in row]
    mean = sum(tokens) / len(tokens)
    spread = 0.6 / math.sqrt(len(losses))
    return GroupMetrics(
        examples=len(losses),
        tokens=len(tokens),
        loss=mean,
        perplexity=math.exp(mean),
        interval=Interval(low=mean - spread, high=mean + spread),
    )


def _grouped(rows: list[Example], values: list[Any]) -> dict[str, dict[str, list[Any]]]:
    groups: dict[str, dict[str, list[Any]]] = {"source": {}, "domain": {}, "difficulty": {}}
    for row, value in zip(rows, values, strict=True):
        for kind, members in groups.items():
            members.setdefault(getattr(row.metadata, kind), []).append(value)
    return groups


def _token_ids(row: Example) -> list[int]:
    """One token a word, the space before it belonging to it, and the end of the turn."""
    first, *others = row.response.split()
    tokens = (first, *(f"▁{word}" for word in others), "<end>")
    return [_VOCABULARY.index(token) if token in _VOCABULARY else 0 for token in tokens]


def _worst(row: Example, losses: list[float]) -> list[dict[str, Any]]:
    ids = _token_ids(row)
    places = sorted(range(len(losses)), key=lambda place: -losses[place])[:5]
    return [
        {
            "position": place,
            "token_id": ids[place],
            "text": _VOCABULARY[ids[place]],
            "logprob": -losses[place],
        }
        for place in places
    ]


def token_losses(rows: list[Example], *, seed: int = 0) -> dict[str, list[list[float]]]:
    """Role → row → token → loss in nats; the adapter helps where the difficulty is not hard."""
    chance = random.Random(seed)
    result: dict[str, list[list[float]]] = {role: [] for role in ROLES}
    for row in rows:
        hard = row.metadata.difficulty == "hard"
        base = [min(14.0, chance.expovariate(0.7)) for _ in _token_ids(row)]
        adapter = [max(1e-5, loss * chance.uniform(0.7, 1.3) * (1.0 if hard else 0.35)) for loss in base]
        result["base"].append(base)
        result["adapter"].append(adapter)
        result["merged"].append([loss * (1 + chance.gauss(0, 2e-3)) for loss in adapter])
    return result


def write_validation(run: Path, rows: list[Example], test_set: FileDigest, losses: Losses) -> None:
    """The three validations and their tables."""
    (run / "validation").mkdir(parents=True, exist_ok=True)
    for role in ROLES:
        table = run / "validation" / f"{role}.parquet"
        mine = losses[role]
        pq.write_table(
            pa.table(
                {
                    "id": [row.id for row in rows],
                    "source": [row.metadata.source for row in rows],
                    "domain": [row.metadata.domain for row in rows],
                    "difficulty": [row.metadata.difficulty for row in rows],
                    "tokens": [len(row) for row in mine],
                    "loss": [sum(row) / len(row) for row in mine],
                    "perplexity": [math.exp(sum(row) / len(row)) for row in mine],
                    "truncated": pa.array([0] * len(rows), pa.int32()),
                    "token_ids": pa.array([_token_ids(row) for row in rows], pa.list_(pa.int32())),
                    "logprobs": pa.array([[-loss for loss in row] for row in mine], pa.list_(pa.float32())),
                    "worst": [_worst(row, losses) for row, losses in zip(rows, mine, strict=True)],
                }
            ),
            table,
        )
        write_record(
            run / "validation" / f"{role}.json",
            ValidationResult(
                model=identity(role),
                test_set=test_set,
                settings=SETTINGS,
                overall=_metrics(mine),
                groups={
                    kind: {name: _metrics(group) for name, group in members.items()}
                    for kind, members in _grouped(rows, mine).items()
                },
                per_example=FileDigest(path=table.name, bytes=table.stat().st_size, sha256=hash_file(table)),
            ),
        )


def write_merged(run: Path, *, layers: int = 6, weights: bytes = b"\x3f\x80" * 40_000) -> MergeRecord:
    """A `merged/` folder whose weights are any bytes, with the record of its merge."""
    folder = run / "merged"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(_VOCABULARY)}, "<unk>"))
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="never")
    core.add_special_tokens(["<end>"])
    core.save(str(folder / "tokenizer.json"))
    modules = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    modules += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    chance = random.Random(0)
    tensors = []
    for layer in range(layers):
        for module in modules:
            elements = 576 * 576
            swallowed = int(elements * chance.uniform(0.35, 0.8))
            name = f"model.layers.{layer}.{module}"
            tensors.append(
                MergedTensor(
                    name=f"{name}.weight",
                    formula="W + s·B·A",
                    adapter_tensors=[f"{name}.lora_A.weight", f"{name}.lora_B.weight"],
                    scale=2.0,
                    shape=[576, 576],
                    dtype_base="BF16",
                    dtype_merged="BF16",
                    elements=elements,
                    changed=elements - swallowed,
                    swallowed=swallowed,
                    relative_update=chance.uniform(1e-3, 9e-3),
                )
            )
    updated, swallowed = sum(t.elements for t in tensors), sum(t.swallowed for t in tensors)
    record = MergeRecord(
        lorasmith_version="0.1.0",
        base_sha256=sha("base"),
        adapter_sha256=[sha("adapter")],
        adapter_weights=[1.0],
        precision="base",
        rounding="nearest",
        tensors=tensors,
        copied=62,
        cast=0,
        elements_updated=updated,
        elements_swallowed=swallowed,
        swallowed_fraction=swallowed / updated,
        files=[
            digest(file, folder)
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != "lorasmith_merge.json"
        ],
    )
    write_record(folder / "lorasmith_merge.json", record)
    return record


def _comparison(a: list[list[float]], b: list[list[float]], scale: float) -> TokenComparison:
    left, right = _metrics(a), _metrics(b)
    delta = right.loss - left.loss
    return TokenComparison(
        examples=left.examples,
        tokens=left.tokens,
        loss_a=left.loss,
        loss_b=right.loss,
        loss_delta=delta,
        loss_delta_interval=Interval(low=delta - 2e-4, high=delta + 2e-4),
        perplexity_a=left.perplexity,
        perplexity_b=right.perplexity,
        perplexity_delta=right.perplexity - left.perplexity,
        kl=KLStatistics(
            mean=6.8e-4 * scale,
            standard_error=2.1e-5 * scale,
            median=1.2e-4 * scale,
            q90=1.9e-3 * scale,
            q95=3.0e-3 * scale,
            q99=8.1e-3 * scale,
            q999=2.4e-2 * scale,
            max=5.3e-2 * scale,
        ),
        delta_p_mean=-1e-5 * scale,
        delta_p_rms=4e-3 * scale,
        top1_agreement=1 - 8.7e-3 * min(1.0, scale),
        max_abs_delta=0.21 * scale,
    )


def write_proof(run: Path, rows: list[Example], test_set: FileDigest, losses: Losses) -> None:
    """`proof/`: exact weights, behaviour that drifted a little."""
    adapter, merged = losses["adapter"], losses["merged"]
    pairs = list(zip(adapter, merged, strict=True))
    write_record(
        run / "proof" / "weights.json",
        WeightProof(
            grade="exact",
            rounding="nearest",
            bound_ulps=0,
            base_sha256=sha("base"),
            adapter_sha256=[sha("adapter")],
            merged_sha256=sha("merged"),
            tensors_checked=272,
            elements_checked=134_515_008,
            adapter_tensors_used=84,
            adapter_tensors_total=84,
            tensors=[TensorProof(name="model.norm.weight", kind="copied", elements=576, wrong=0, max_ulps=0)],
            differences=[],
        ),
    )
    write_record(
        run / "proof" / "behaviour.json",
        BehaviourProof(
            grade="drifted",
            reasons=["mean KL 6.8e-04 ≥ 1e-04", "top-1 agreement 99.13 % < 99.5 %"],
            thresholds={
                "loss_delta": 1e-4,
                "perplexity_delta": 0.01,
                "mean_kl": 1e-4,
                "top1_agreement": 0.995,
            },
            a=identity("adapter"),
            b=identity("merged"),
            test_set=test_set,
            settings=SETTINGS,
            overall=_comparison(adapter, merged, 1.0),
            groups={
                kind: {
                    name: _comparison([a for a, _ in group], [b for _, b in group], 0.5 + 0.3 * index)
                    for index, (name, group) in enumerate(members.items())
                }
                for kind, members in _grouped(rows, pairs).items()
            },
            floor=_comparison(adapter, adapter, 1e-7),
            flips=[
                Flip(example=row.id, position=0, token_a=271, token_b=198, margin=0.01 * (index + 1))
                for index, row in enumerate(rows[:10])
            ],
            generation=GenerationComparison(
                max_new_tokens=64,
                examples=len(rows),
                same=len(rows) - 2,
                same_fraction=(len(rows) - 2) / len(rows),
                unfinished_a=1,
                unfinished_b=1,
                tokens_before_divergence=41.5,
                divergences=[
                    Divergence(
                        id=row.id, position=3, text_a=row.response, text_b=f"other than {row.response}"
                    )
                    for row in rows[:2]
                ],
                floor_same=4,
                floor_examples=4,
            ),
            examples=[
                ExampleComparison(
                    id=row.id,
                    tokens=len(a),
                    loss_delta=sum(b) / len(b) - sum(a) / len(a),
                    mean_kl=1e-5 * (index + 1),
                    max_abs_delta=1e-3,
                    flips=1 if index < 10 else 0,
                )
                for index, (row, (a, b)) in enumerate(zip(rows, pairs, strict=True))
            ],
        ),
    )
    write_record(
        run / "proof" / "comparison.json",
        ComparisonRecord(
            adapter_effect=_effect(losses["base"], adapter),
            adapter_effect_groups={
                kind: {
                    name: _effect([a for a, _ in group], [b for _, b in group])
                    for name, group in members.items()
                }
                for kind, members in _grouped(rows, list(zip(losses["base"], adapter, strict=True))).items()
            },
            merge_effect=_effect(adapter, merged),
            weights_grade="exact",
            behaviour_grade="drifted",
        ),
    )


def _effect(a: list[list[float]], b: list[list[float]]) -> PairedEffect:
    left, right = _metrics(a), _metrics(b)
    delta, half = right.loss - left.loss, 0.4 / math.sqrt(len(a))
    verdict = "helps" if delta + half < 0 else "hurts" if delta - half > 0 else "no clear effect"
    return PairedEffect(
        examples=left.examples,
        loss_a=left.loss,
        loss_b=right.loss,
        loss_delta=delta,
        perplexity_delta=right.perplexity - left.perplexity,
        interval=Interval(low=delta - half, high=delta + half),
        verdict=verdict,
    )


def write_gates(run: Path) -> None:
    """Two gates that pass, one that fails, one without data."""
    retrain = "train again with more regularisation"
    results = [
        (Gate(name="loss", metric="adapter.loss", threshold=0.10, advice=retrain), 0.0734, "pass", ""),
        (
            Gate(name="perplexity", metric="adapter.perplexity", threshold=2.0, advice=retrain),
            1.0762,
            "pass",
            "",
        ),
        (
            Gate(
                name="merge loss Δ",
                metric="merge.loss_delta",
                threshold=1e-4,
                advice="merge again at higher precision or with another rounding",
            ),
            1.53e-3,
            "fail",
            "",
        ),
        (
            Gate(name="hard perplexity", metric="adapter.perplexity", group="difficulty=hard", threshold=3.0),
            None,
            "not measured",
            "no example in difficulty=hard",
        ),
    ]
    write_record(
        run / "gates.json",
        GateRecord(
            passed=False,
            gates=[
                GateResult(gate=gate, measured=measured, verdict=verdict, reason=reason)
                for gate, measured, verdict, reason in results
            ],
        ),
    )


def write_timing(run: Path) -> None:
    """`timing.json` of a small run."""
    seconds = {"testset": 0.4, "validate-base": 63.2, "validate-adapter": 81.0, "merge": 9.3, "prove": 14.8}
    write_record(
        run / "timing.json",
        TimingRecord(
            hardware={"processor": "ACME-9000", "cores": 2, "memory_bytes": 24 << 30, "system": "Linux 6.1"},
            stages=[
                StageTiming(
                    stage=stage,
                    wall_seconds=wall,
                    cpu_seconds=wall * 1.8,
                    peak_rss_bytes=900_000_000 + int(wall * 1e7),
                    started="2026-11-22T10:00:00+00:00",
                )
                for stage, wall in seconds.items()
            ],
        ),
    )


def sample_run(run: Path, *, count: int = 40, seed: int = 0, rows: list[Example] | None = None) -> Path:
    """A whole run folder."""
    rows = sample_examples(count, seed=seed) if rows is None else rows
    run.mkdir(parents=True, exist_ok=True)
    test_set = write_test_set(run, rows)
    examples = read_examples(run / "testset" / "test_set.jsonl")
    losses = token_losses(examples, seed=seed)
    write_validation(run, examples, test_set, losses)
    write_merged(run)
    write_proof(run, examples, test_set, losses)
    write_gates(run)
    write_timing(run)
    write_record(
        run / "run.json",
        RunRecord(
            config={"precision": "base", "rounding": "nearest", "seed": 42, "template": "auto"},
            versions={"lorasmith": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
            inputs={"base": sha("base"), "adapter": sha("adapter"), "test_set": test_set.sha256},
        ),
    )
    return run
