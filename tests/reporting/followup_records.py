"""Records of the steps after the release for a sample run: consistent with each other, made up."""

from __future__ import annotations

from pathlib import Path

from lorasmith.files.atomic import write_record
from lorasmith.records.base import FileDigest, Finding, Interval
from lorasmith.records.compression import CompressRecord, TaskQuality
from lorasmith.records.followup import (
    Acceptance,
    ClassifierReport,
    DraftRecord,
    DraftStep,
    GeneratorReport,
    LengthSummary,
    RespondRecord,
    RespondSettings,
    RespondTiming,
    SpeculationRecord,
    SpeculationSetting,
    SpeculationSpeed,
    SpeculationTiming,
)
from lorasmith.records.release import Gate, GateResult
from lorasmith.records.scoring import TaskEffect
from tests.records_for_tests import comparison

HOSTILE = "<img src=x onerror=alert(1)>"
"""As a label of the data and as a format's name it must stay text."""
FILE = FileDigest(path="responses.jsonl", bytes=10, sha256="2" * 64)


def responses() -> RespondRecord:
    settings = RespondSettings(
        model_sha256="1" * 64, engine="transformers", dtype="float32", template="chat",
        max_new_tokens=256, temperature=0.0, top_logprobs=8,
    )  # fmt: skip
    return RespondRecord(
        settings=settings, data=FILE, output=FILE, logprobs=FILE, rows=95,
        finish={"length": 19, "stop": 76}, cut_off=0.2, repeating=4, failed=5,
        prompt_tokens=9000, response_tokens=14000,
        lengths=LengthSummary(least=3, median=120, p90=256, most=256),
        findings=[Finding(severity="warning", code="cut-off", message="19 of 95 rows were cut off")],
    )  # fmt: skip


def draft() -> DraftRecord:
    labels = ["easy", HOSTILE]
    generators = [
        GeneratorReport(rows=10, tokens=1200, loss=loss, perplexity=2.718**loss, kl=kl, agreement=same)
        for loss, kl, same in ((6.5, 5.25, 0.125), (2.25, 1.75, 0.5))
    ]
    classifier = ClassifierReport(
        rows=10, labels=labels, labels_from="confidence", accuracy=0.7, f1=0.65,
        f1_by_label=dict(zip(labels, (0.7, 0.6), strict=True)), calibration_error=0.11,
        confusion=[[5, 1], [2, 2]], majority_label="easy", majority_accuracy=0.6, majority_f1=0.375,
    )  # fmt: skip
    return DraftRecord(
        lorasmith_version="0.1.0", target_sha256="1" * 64, layers=[0, 3], responses=FILE, logprobs=FILE,
        settings={}, parameters=4_000_000, target_parameters=16_000_000, vocabulary=300, train_rows=75,
        validation_rows=10, held_out_rows=10, steps=30, best_step=20, stopped_early=True, losses=[3.0, 2.0],
        validations=[DraftStep(step=20, loss=2.5)], before=generators[0], generator=generators[1],
        classifier=classifier,
    )  # fmt: skip


def acceptance(rate: float, places: int) -> Acceptance:
    return Acceptance(
        prompts=8, tokens=400, rounds=300, drafted=600, accepted=int(600 * rate), acceptance_rate=rate,
        accepted_length=1.5, by_position=[rate - 0.05 * place for place in range(places)],
    )  # fmt: skip


def speculation() -> tuple[SpeculationRecord, SpeculationTiming]:
    ways = [("draft", 2, 0.5), ("draft", 4, 0.45), ("lookup", 2, 0.25)]
    settings = [
        SpeculationSetting(
            method=method,
            draft_tokens=count,
            overall=acceptance(rate, count),
            by_source={name: acceptance(rate, count) for name in ("DROP", "MATH")},
            equal=7,
            ties=1,
            different=0,
        )
        for method, count, rate in ways
    ]
    record = SpeculationRecord(
        target_sha256="1" * 64, draft_sha256="3" * 64, prompts=FILE, template="chat", dtype="float32",
        max_new_tokens=64, noise=2e-5, settings=settings,
    )  # fmt: skip
    speeds = [
        SpeculationSpeed(
            method=method,
            draft_tokens=count,
            tokens_per_second=20.0,
            speedup=0.8 + 0.1 * rate,
            draft_cost=0.4,
            verify_cost=1.3,
            predicted=1.1,
            predicted_with_verify=0.9,
        )
        for method, count, rate in ways
    ]
    timing = SpeculationTiming(
        greedy_tokens_per_second=23.5,
        speeds=speeds,
        pays=False,
        recommendation="speculative decoding does not pay",
    )
    return record, timing


def asked() -> TaskQuality:
    """Questions of one benchmark, in two domains."""

    def effect(name: str, examples: int, a: float, b: float) -> TaskEffect:
        return TaskEffect(
            benchmark=name, metric="accuracy", examples=examples, value_a=a, value_b=b, delta=b - a,
            interval=Interval(low=-0.125, high=0.025), p_value=0.5, verdict="no clear effect",
        )  # fmt: skip

    groups = {"domain": {"anatomy": effect("anatomy", 16, 0.5, 0.25), "law": effect("law", 24, 0.5, 0.5)}}
    return TaskQuality(
        overall=effect("all", 40, 0.5, 0.4), metrics=[effect("MMLU", 40, 0.5, 0.4)], groups=groups
    )


def compressed(form: str, size: int, kl: float | None) -> CompressRecord:
    gate = Gate(name="compressed mean kl", metric="compressed.mean_kl", comparison="<=", threshold=0.05)
    passed = None if kl is None else kl <= 0.05
    verdict = "pass" if passed else "fail"
    return CompressRecord(
        lorasmith_version="0.1.0", versions={}, model_sha256="1" * 64, file_format=form, method="rtn", bits=4,
        group_size=64, settings={}, calibration=None, parameters=130_000_000, original_bytes=269_000_000,
        bytes=size, planned_bytes=size, bits_per_weight=8 * size / 130e6, files=[],
        quality=None if kl is None else comparison(kl=kl), tasks=None if kl is None else asked(),
        gates=[] if kl is None else [GateResult(gate=gate, measured=kl, verdict=verdict)], passed=passed,
    )  # fmt: skip


def add_followup(run: Path) -> None:
    """All steps, with two formats measured and one not."""
    folder = run / "followup"
    write_record(folder / "responses" / "responses.json", responses())
    timing = RespondTiming(
        rows=95, tokens=14000, seconds=200, rows_per_second=0.475, tokens_per_second=70, cost=0.5
    )
    write_record(folder / "responses.timing.json", timing)
    write_record(folder / "draft" / "lorasmith_draft.json", draft())
    record, speeds = speculation()
    write_record(folder / "speculation.json", record)
    write_record(folder / "speculation.timing.json", speeds)
    for name, form, size, kl in (
        ("one", "gguf:q8_0", 145_000_000, 0.0011),
        ("two", "compressed-tensors", 113_000_000, 0.318),
        ("three", HOSTILE, 92_000_000, None),
    ):
        write_record(folder / "compressed" / name / "lorasmith_compress.json", compressed(form, size, kl))
